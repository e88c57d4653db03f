"""The runner: only what is missing is run, a failure stops no other run, two runners do not meet, a card per worker."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from weclip.lab.plan import Grid, plan, read_places, run_parameters
from weclip.lab.results import _invented, keep_arrays, keep_run, read_rows, read_runs, result_file, run_rows
from weclip.lab.runner import Job, execute, find_devices, hold, on_cluster, run_jobs, run_tables, set_up
from weclip.cli import main

RUNS = plan(["table4"], Grid(quick=True))
FIRST, SECOND = (run.name for run in RUNS)
TRAIN = """import json, os, time
from pathlib import Path
from weclip.lab.results import keep_run, result_file, run_rows
behave = json.loads(Path(out, "behave.json").read_text()).get(name, "")
with open(f"{out}/{name}/starts", "a") as f: f.write(f"{os.getpid()}\\n")
if behave == "raise": 1/0
if behave == "slow": time.sleep(60)
keep_run(result_file(results, "scenes"), run_rows(json.loads(Path(out, f"{name}.json").read_text())))"""

def page(path, *sources):
    "A notebook whose first cell holds the parameters."
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)

@pytest.fixture(scope="session")
def drawn(tmp_path_factory): return tmp_path_factory.mktemp("drawn")

@pytest.fixture
def grid(tmp_path, drawn, monkeypatch):
    "A folder of notebooks whose training does nothing; returns the arguments of `set_up`."
    monkeypatch.setenv("WECLIP_CACHE", str(drawn))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path/"runs"
    out.mkdir()
    page(tmp_path/"01_run.ipynb", "\n".join(f"{k} = None" for k in run_parameters(RUNS[0])), TRAIN)
    page(tmp_path/"table4.ipynb", "seeds = []\ndevice = ''", "seeds, device")
    page(tmp_path/"results.ipynb", "results = ''", "results")
    for run in RUNS:
        (out/f"{run.name}.json").write_text(json.dumps(_invented(run)))
    behave(out, {})
    where = dict(notebooks=tmp_path, out=out, results=tmp_path/"results", device="cpu")
    return dict(names=["table4"], quick=True, workers=2, **where)

def behave(out, how): (out/"behave.json").write_text(json.dumps(how))

def go(grid, dry_run=False, rerun_stale=False, **more):
    said = []
    status = run_tables(set_up(**{**grid, **more}), dry_run, rerun_stale, said.append)
    return status, "\n".join(said)

def starts(grid, name): return (grid["out"]/name/"starts").read_text().split()
def table(grid): return result_file(grid["results"], "scenes")
def shown(grid, name): return nbformat.read(open(grid["out"]/f"{name}.ipynb"), 4).cells[-1].outputs[-1]

def until(true, seconds=120):
    "Wait for something to become true."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "waited in vain"
        time.sleep(.05)

# ---- only what is missing

def test_runs_then_pages_then_only_what_is_missing(grid):
    "In turn: nothing is there; one run fails and stops no other; it does not fail; it leaves no numbers."
    assert "2 of 2 runs to do" in go(grid, dry_run=True)[1] and not table(grid).exists()
    behave(grid["out"], {FIRST: "raise"})
    status, said = go(grid)
    assert status == 1 and f"failed: {FIRST}: cell 2: ZeroDivisionError: division by zero; see " in said
    assert [*read_runs(table(grid))[0]] == [SECOND]
    assert shown(grid, "table4")["data"]["text/plain"] == "([1, 2, 3, 4, 5], 'cpu')"
    assert shown(grid, FIRST)["output_type"] == "error"

    behave(grid["out"], {})
    status, said = go(grid)
    assert status == 0 and "2 of 2 runs have numbers" in said
    assert [len(starts(grid, name)) for name in (FIRST, SECOND)] == [2, 1]

    lines = table(grid).read_text().splitlines()
    kept = [line for line in lines if not line.startswith(FIRST)]
    table(grid).write_text("\n".join(kept) + "\n")
    others = read_rows(table(grid))[0]
    (grid["out"]/f"{FIRST}.json").write_text(json.dumps({**_invented(RUNS[0]), "scores": []}))
    status, said = go(grid)
    assert status == 1 and f"no number: {FIRST}: missing: score" in said
    assert [len(starts(grid, name)) for name in (FIRST, SECOND)] == [3, 1]
    assert others and [row for row in read_rows(table(grid))[0] if row["run"] == SECOND] == others

def test_stale_results_are_shown_and_kept_until_asked(grid):
    for run in RUNS:
        keep_run(table(grid), run_rows(_invented(run)))
    keep_run(table(grid), run_rows(_invented(RUNS[0], code="0"*12)))
    old = grid["out"]/FIRST
    old.mkdir()
    (old/"checkpoint.pt").touch()
    (old/"code.txt").write_text("0"*12)
    said = go(grid, dry_run=True)[1]
    assert f"{FIRST}: stale: made by code 000000000000" in said and "0 of 2 runs to do" in said
    status, said = go(grid)
    assert status == 1 and f"no number: {FIRST}: stale" in said and "--rerun-stale" in said
    assert go(grid, rerun_stale=True)[0] == 0 and not (old/"checkpoint.pt").exists()  # from the beginning
    assert (grid["out"]/f"{FIRST}.old"/"checkpoint.pt").exists() and not (grid["out"]/SECOND).exists()

def test_a_page_without_runs_starts_with_the_runs(grid, tmp_path):
    "Figure 5 trains its own network: the workers should not wait for each other."
    write = "open(f'{out}/figure5.there', 'w').close()\nf'clip: {clip!r}'"
    page(tmp_path/"figure5.ipynb", "clip = None\nout = ''", write)
    (tmp_path/"weclip.toml").write_text('clip = "ViT-B-16.pt"\n')
    behave(grid["out"], {FIRST: "raise"})
    go(grid, names=["figure5", "table4"], config=tmp_path/"weclip.toml")
    assert (grid["out"]/"figure5.there").stat().st_mtime < (grid["out"]/"table4.ipynb").stat().st_mtime
    assert "None" in shown(grid, "figure5")["data"]["text/plain"]  # the photographs' CLIP is not the scenes'

def test_the_collecting_page_needs_neither_runs_nor_photographs(grid, tmp_path, monkeypatch):
    monkeypatch.delenv("WECLIP_VOC", raising=False)
    monkeypatch.chdir(tmp_path)
    assert go(grid, names=["results"], profile="voc")[0] == 0 and not (grid["out"]/FIRST).exists()
    with pytest.raises(FileNotFoundError, match="VOCtrainval"):
        go(grid, profile="voc")

def test_a_figure_that_is_kept_needs_no_run(grid, tmp_path):
    "A fresh clone would train for what lies beside its results."
    asked = dict(profile="scenes", seeds=2, out=tmp_path/"runs", results=tmp_path/"results", notebooks=tmp_path)
    before = set_up(["figure4"], **asked)
    assert [run.files for run in before.runs] == [("masks/ms",)]
    keep_arrays("figure4", before.grid, iou=[.5])
    after = set_up(["figure4"], **asked)
    assert after.pages == ["figure4"] and not after.runs
    assert set_up(["figure3", "figure4"], **asked).runs[0].files

def test_a_page_without_a_parameter_is_named(tmp_path):
    page(tmp_path/"01_run.ipynb", "nam = ''", "1")
    job = Job("run", tmp_path/"01_run.ipynb", dict(profile="scenes"), tmp_path/"runs")
    assert "unknown parameter of 01_run.ipynb: 'profile'" in execute(job, "cpu")

# ---- two runners, and a runner that ends

def command(grid):
    "The command in a process of its own, which hears Ctrl-C even where the tests run in the background and do not."
    code = """import json, signal, sys
from weclip.lab.runner import run_tables, set_up
signal.signal(signal.SIGINT, signal.default_int_handler)
try: sys.exit(run_tables(set_up(**json.loads(sys.argv[1]))))
except KeyboardInterrupt: sys.exit(130)"""
    asked = {k: str(v) if isinstance(v, Path) else v for k, v in grid.items()}
    nowhere = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(asked)], **nowhere)

def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    except FileNotFoundError:
        return False

KILLED = pytest.param(signal.SIGKILL, id="kill -9", marks=pytest.mark.slow)

@pytest.mark.parametrize("how", [pytest.param(signal.SIGINT, id="Ctrl-C"), KILLED])
def test_a_second_runner_is_refused_and_one_that_ends_takes_its_kernels_along(grid, how):
    behave(grid["out"], {FIRST: "slow", SECOND: "slow"})
    runner = command(grid)
    until(lambda: all((grid["out"]/name/"starts").exists() for name in (FIRST, SECOND)))
    kernels = [int(starts(grid, name)[0]) for name in (FIRST, SECOND)]
    with pytest.raises(ValueError, match="another runner is at work"):
        go(grid)
    with pytest.raises(ValueError, match="another runner is at work"):
        go(grid, results=grid["out"]/"other")
    runner.send_signal(how)
    assert runner.wait(30) == (130 if how == signal.SIGINT else -how)
    until(lambda: not any(map(is_alive, kernels)), 30)
    behave(grid["out"], {})
    assert go(grid)[0] == 0 and len(starts(grid, FIRST)) == 2

def test_a_killed_kernel_is_a_failure_of_its_run(tmp_path):
    page(tmp_path/"dies.ipynb", "", "import os; os.kill(os.getpid(), 9)")
    assert "DeadKernelError" in execute(Job("dies", tmp_path/"dies.ipynb", {}, tmp_path/"runs"), "cpu")

def test_hold_lets_nobody_else_in(tmp_path):
    with hold(tmp_path), pytest.raises(ValueError, match="another runner is at work here"):
        with hold(tmp_path):
            pass
    with hold(tmp_path):
        pass

# ---- cards and clusters

def test_a_card_per_worker(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert find_devices() == find_devices("cuda") == ["cuda:0", "cuda:1"] and find_devices("cuda:1") == ["cuda:1"]
    with pytest.raises(ValueError, match="did you mean"):
        find_devices("cuda:2")
    s = set_up(["table4"], workers=3, out=tmp_path)
    assert s.devices == ["cuda:0", "cuda:1", "cuda:0"] and len(set_up(["table4"], out=tmp_path).devices) == 2
    at_work = []
    most = []
    def call(job, device):
        at_work.append(device)
        most.append(sorted(at_work))
        time.sleep(.05)
        at_work.remove(device)
        return ""
    jobs = [Job(str(k), Path(), {}, Path()) for k in range(6)]
    assert run_jobs(jobs, ["cuda:0", "cuda:1"], call) == {str(k): "" for k in range(6)}
    assert max(map(len, most)) == 2 and ["cuda:0", "cuda:0"] not in most and ["cuda:1", "cuda:1"] not in most

def test_what_the_engine_raises_is_a_failure_of_its_job():
    def call(job, device): raise OSError("sbatch: no more jobs")
    assert run_jobs([Job("a", Path(), {}, Path())], ["cpu"], call) == {"a": "OSError: sbatch: no more jobs"}

def test_submitit_with_two_local_workers(tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    page(tmp_path/"fine.ipynb", "device = ''", "device")
    page(tmp_path/"raises.ipynb", "device = ''", "print(device); 1/0")
    call, device = on_cluster(dict(cluster="local"), tmp_path/"submitit")
    jobs = [Job(name, tmp_path/f"{name}.ipynb", {}, tmp_path/"runs") for name in ("fine", "raises")]
    failures = run_jobs(jobs, [device]*2, call)
    assert failures == {"fine": "", "raises": "cell 2: ZeroDivisionError: division by zero"}
    outputs = nbformat.read(open(tmp_path/"runs"/"raises.ipynb"), 4).cells[-1].outputs
    assert outputs[0].text == "cpu\n"

# ---- plans and mistakes

def test_photographs_that_are_missing(tmp_path, monkeypatch, capsys):
    for k in ("VOC", "COCO"):
        monkeypatch.delenv(f"WECLIP_{k}", raising=False)
    monkeypatch.chdir(tmp_path)
    folders = ["--out", str(tmp_path/"runs"), "--results", str(tmp_path/"results")]
    where = [*folders, "--device", "cpu", "--seeds", "1", "--workers", "1"]
    assert main(["tables", "table2", "--profile", "coco", "--dry-run", *where]) == 0
    said = capsys.readouterr().out
    assert "80,000 iterations\n" in said and "train2014.zip" in said and "WECLIP_COCO" in said
    assert main(["tables", "table4", "--profile", "voc", *where]) == 2 and "VOCtrainval" in capsys.readouterr().err
    (tmp_path/"weclip.toml").write_text('voc = "photos"\n')
    assert main(["tables", "table4", "--profile", "voc", "--dry-run", *where]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path/'photos'}: no such folder" in said and "SegmentationClassAug/ID.png" in said
    assert "60,000 iterations\n" in said

def test_mistakes_are_one_line(capsys):
    odd = []
    for argv, says in (
            ("tabel4", "did you mean 'table4'"), ("--profile scene", "'scenes'"),
            ("--recipe release", "did you mean 'released'"), ("--seeds 0", "at least one seed"),
            ("--config nowhere.toml", "nowhere.toml"), ("--engine slurm", "did you mean 'submitit'"),
            ("table2 --profile voc", "expected profile scenes or coco")):
        status = main(["tables", "--dry-run", "--device", "cpu", *argv.split()])
        err = capsys.readouterr().err
        if status != 2 or says not in err or len(err.splitlines()) != 1:
            odd.append((argv, status, err))
    assert not odd

def test_relative_places_are_meant_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WECLIP_VOC", "photos")
    monkeypatch.setenv("WECLIP_CLIP", "openai")
    monkeypatch.delenv("WECLIP_COCO", raising=False)
    assert read_places() == dict(voc=str(tmp_path/"photos"), clip="openai")
