"""The runner against everything that ends a run before its time: errors, kill -9, full disks, a second runner, its own death."""
import json, os, signal, subprocess, sys, time
from pathlib import Path
from threading import Thread
import nbformat, pytest
from weclip.machine import code_digest
from weclip.method.config import to_dict
from weclip.lab.kernels import Job, cards_for, execute, executed, failure_file, local
from weclip.lab.plan import plan, run_config, run_parameters
from weclip.lab.runner import hold, read_places, run_tables, set_up, show_plan
from weclip.cli import main

RUNS = plan(["table4"], quick=True)
FIRST, SECOND = (r.name for r in RUNS)
TRAIN = '''import json, os, shutil, signal, time
from pathlib import Path
os.makedirs(folder := f"{out}/{name}", exist_ok=True); Path(folder, "pid").write_text(str(os.getpid()))
start = int(Path(folder, "checkpoint.pt").read_text()) if Path(folder, "checkpoint.pt").exists() else 0
with open(f"{folder}/starts", "a") as f: f.write(f"{start}\\n")
behave = json.loads(Path(out, "behave.json").read_text()).get(name, "")
for i in range(start, 20):
    Path(folder, "checkpoint.pt").write_text(str(i)); Path(folder, "progress.json").write_text(json.dumps(dict(stage="training", done=i, total=20, time=time.time())))
    if behave == "raise" and i == 5: 1/0
    if behave == "memory" and i == 5: import resource; resource.setrlimit(resource.RLIMIT_AS, (2**33,)*2); bytearray(2**34)
    if behave == "disk" and i == 5: open("/dev/full", "w").write("x"*10**6)
    time.sleep({"slow": .5}.get(behave, .01))
shutil.copy(f"{out}/answers/{name}.json", f"{results}/{name}.json")'''

def page(path, *sources):
    cells = [nbformat.v4.new_code_cell(s) for s in sources]; cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python"))), path)

def answer(run):
    "What a results file holds."
    return dict(config=to_dict(run_config(run)), seed=run.seed, code=code_digest(), scores={f"{s}/{m}": dict(miou=.5) for s, m in run.scores},
                train_minutes=1, minutes=2, peak_gib=.5, n_learnable=1)

@pytest.fixture(scope="session")
def drawn(tmp_path_factory): return tmp_path_factory.mktemp("drawn")

@pytest.fixture
def grid(tmp_path, drawn, monkeypatch):
    "A folder of notebooks whose training only counts to twenty; returns the arguments of `set_up`."
    monkeypatch.setenv("WECLIP_CACHE", str(drawn))
    (tmp_path/"runs"/"answers").mkdir(parents=True); (tmp_path/"results").mkdir()
    page(tmp_path/"01_run.ipynb", "\n".join(f"{k} = None" for k in run_parameters(RUNS[0])), TRAIN)
    page(tmp_path/"table4.ipynb", "seeds = []\nresults = ''\ndevice = ''", "import os; sorted(os.listdir(results)), seeds, device")
    page(tmp_path/"results.ipynb", "results = ''", "results")
    for r in RUNS: (tmp_path/"runs"/"answers"/f"{r.name}.json").write_text(json.dumps(answer(r)))
    behave(tmp_path, {})
    return dict(names=["table4"], quick=True, notebooks=tmp_path, out=tmp_path/"runs", results=tmp_path/"results", workers=2, device="cpu")

def behave(folder, how): (folder/"runs"/"behave.json").write_text(json.dumps(how))
def go(grid, **kw):
    said = []; flags = {k: kw.pop(k) for k in ("dry_run", "rerun_stale") if k in kw}
    return run_tables(set_up(**{**grid, **kw}), say=said.append, **flags), "\n".join(said)
def starts(grid, name): return (grid["out"]/name/"starts").read_text().split()
def result(grid, name): return grid["results"]/f"{name}.json"

def until(true, seconds=240):
    "Wait for something to become true."
    end = time.time() + seconds
    while not true():
        assert time.time() < end, "waited in vain"
        time.sleep(.05)

def alive(pid):
    try: os.kill(pid, 0); return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    except (ProcessLookupError, FileNotFoundError): return False

def running(grid, name):
    "The kernel of a run that has got somewhere, as a process id."
    def far():
        try: return json.loads((grid["out"]/name/"progress.json").read_text())["done"] >= 2
        except (OSError, ValueError): return False
    until(far); return int((grid["out"]/name/"pid").read_text())

def command(grid, *more):
    "The command in a process of its own, which hears Ctrl-C even where the tests run in the background and do not."
    code = "import json, signal, sys; from weclip.lab.runner import run_tables, set_up\nsignal.signal(signal.SIGINT, signal.default_int_handler)\ntry: sys.exit(run_tables(set_up(**json.loads(sys.argv[1]))))\nexcept KeyboardInterrupt: sys.exit(130)"
    args = {k: str(v) if isinstance(v, Path) else v for k, v in grid.items()}
    return subprocess.Popen([sys.executable, "-c", code, json.dumps(args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

# ---- a good day

def test_runs_then_pages_then_nothing(grid, capsys):
    status, said = go(grid)
    assert status == 0 and "2 of 2 runs have numbers" in said
    assert "1 of 2 done" not in said and capsys.readouterr().out.count("finished in") == 3
    page = nbformat.read(open(grid["out"]/"table4.ipynb"), 4)
    assert f"{FIRST}.json" in page.cells[-1].outputs[0]["data"]["text/plain"] and "[1, 2, 3],\n 'cpu'" in page.cells[-1].outputs[0]["data"]["text/plain"]
    assert go(grid)[0] == 0 and starts(grid, FIRST) == starts(grid, SECOND) == ["0"]

def test_a_page_without_runs_starts_with_the_runs(grid, tmp_path):
    "Figure 5 trains its own network: the workers should not wait for each other."
    page(tmp_path/"figure5.ipynb", "out = ''", "import time; open(f'{out}/figure5.when', 'w').write(str(time.time()))")
    behave(tmp_path, {FIRST: "slow"})
    assert go(grid, names=["table4", "figure5"])[0] == 0
    assert float((grid["out"]/"figure5.when").read_text()) < (grid["out"]/FIRST/"progress.json").stat().st_mtime

def test_what_a_page_trains_itself_is_in_the_plan(tmp_path):
    s = set_up(["figure5"], out=tmp_path, results=tmp_path/"results", workers=2, device="cpu")
    assert "figure5 trains a classifier of its own: 40 min" in show_plan(s) and "0 iterations: 20 min with 2" in show_plan(s)
    assert "of its own" not in show_plan(set_up(["figure5"], quick=True, out=tmp_path, device="cpu"))
    (tmp_path/"classifier").mkdir(); (tmp_path/"classifier"/"classifier.safetensors").touch(); (tmp_path/"classifier"/"code.txt").write_text(code_digest())
    assert "of its own" in show_plan(s)  # by code without the classifier's
    (tmp_path/"classifier"/"code.txt").write_text(code_digest("world.classifier"))
    assert "of its own" not in show_plan(s) and "0 iterations: 0 s" in show_plan(s)

def test_a_deleted_result_comes_back_alone(grid):
    go(grid); result(grid, FIRST).unlink()
    assert go(grid)[0] == 0 and result(grid, FIRST).exists()
    assert len(starts(grid, FIRST)) == 2 and len(starts(grid, SECOND)) == 1

def test_the_collecting_page(grid):
    assert go(grid, names=["results"])[0] == 0 and (grid["out"]/"results.ipynb").exists() and not (grid["out"]/FIRST).exists()

# ---- runs that end badly

@pytest.mark.parametrize("how, says", [("raise", "ZeroDivisionError: division by zero"), ("memory", "out of memory (cell"), ("disk", "the disk is full (cell")])
def test_a_failing_run_stops_no_other_and_is_retried_alone(grid, tmp_path, capsys, how, says):
    behave(tmp_path, {FIRST: how})
    status, said = go(grid)
    assert status == 1 and says in said and FIRST in said and result(grid, SECOND).exists() and (grid["out"]/"table4.ipynb").exists()
    assert f"FAILED: {said.split(': ', 2)[2].splitlines()[0]}; notebook: {grid['out']/FIRST}.ipynb" in capsys.readouterr().out
    assert nbformat.read(open(grid["out"]/f"{FIRST}.ipynb"), 4).cells[-1].outputs[-1]["output_type"] == "error"
    assert f"failed ({says[:20]}" in go(grid, dry_run=True)[1] or f"failed (cell 2: {says[:20]}" in go(grid, dry_run=True)[1]
    behave(tmp_path, {})
    assert go(grid)[0] == 0 and len(starts(grid, FIRST)) == 2 and len(starts(grid, SECOND)) == 1
    assert starts(grid, FIRST)[1] == "5" and not failure_file(Job(FIRST, "", "", {}, str(grid["out"]))).exists()

def test_a_killed_kernel_is_reported_at_once_and_resumes(grid, tmp_path):
    behave(tmp_path, {FIRST: "slow"}); when = []
    def kill(): os.kill(running(grid, FIRST), signal.SIGKILL); when.append(time.time())
    Thread(target=kill, daemon=True).start()
    status, said = go(grid)
    assert status == 1 and f"{FIRST}: its kernel was killed by SIGKILL" in said and time.time() - when[0] < 60
    behave(tmp_path, {})
    assert go(grid)[0] == 0 and int(starts(grid, FIRST)[1]) >= 2

def test_a_disk_without_room_for_the_notebook(grid, tmp_path):
    (grid["out"]/f"{FIRST}.ipynb").symlink_to("/dev/full")
    status, said = go(grid)
    assert status == 1 and f"{FIRST}: the disk is full" in said and result(grid, SECOND).exists()

def test_a_run_that_ends_without_its_numbers(grid):
    (grid["out"]/"answers"/f"{FIRST}.json").write_text("{")
    status, said = go(grid)
    assert status == 1 and f"{FIRST}: damaged" in said

# ---- results by other hands

def test_damaged_results_are_named_and_made_again(grid):
    go(grid); result(grid, FIRST).write_text(result(grid, FIRST).read_text()[:40])
    said = go(grid, dry_run=True)[1]
    assert f"{FIRST}: damaged: {FIRST}.json" in said and "1 of 2 runs to do" in said
    assert go(grid)[0] == 0 and json.loads(result(grid, FIRST).read_text()) and len(starts(grid, SECOND)) == 1

def test_stale_results_are_shown_and_kept_until_asked(grid):
    go(grid); r = json.loads(result(grid, FIRST).read_text()); result(grid, FIRST).write_text(json.dumps({**r, "code": "0"*12}))
    (grid["out"]/FIRST/"code.txt").write_text("0"*12)  # its checkpoint, too
    status, said = go(grid)
    assert status == 1 and f"no number: {FIRST}: stale" in said and "with --rerun-stale also what is stale" in said and len(starts(grid, FIRST)) == 1
    assert "0 of 2 runs to do" in go(grid, dry_run=True)[1] and "1 of 2 runs to do" in go(grid, dry_run=True, rerun_stale=True)[1]
    assert go(grid, rerun_stale=True)[0] == 0 and starts(grid, FIRST) == ["0"]  # from the beginning, in a new folder
    assert (grid["out"]/f"{FIRST}.old"/"checkpoint.pt").exists()

def test_features_of_other_code_are_moved_aside_and_halves_removed(grid):
    cache = grid["out"]/"cache"; cache.mkdir(); (cache/"tokens-1.npy").touch(); go(grid)  # by nobody knows what code
    assert not (cache/"tokens-1.npy").exists() and (grid["out"]/"cache.old"/"tokens-1.npy").exists()
    dead = subprocess.Popen([sys.executable, "-c", ""]); dead.wait()
    for name in ("tokens-2.npy", f"tokens-3.{dead.pid}.part", f"tokens-4.{os.getpid()}.part"): (cache/name).touch()
    go(grid); assert {p.name for p in cache.iterdir()} == {"code.txt", "tokens-2.npy", f"tokens-4.{os.getpid()}.part"}

def test_a_plan_believes_checkpoints_only(grid):
    go(grid); result(grid, FIRST).unlink()
    folder = grid["out"]/FIRST; (folder/"progress.json").write_text(json.dumps(dict(stage="training", done=2, total=4, time=1)))
    def said(): return next(line for line in go(grid, dry_run=True)[1].splitlines() if line.startswith(FIRST))
    assert "stopped at 2" in said()
    (folder/"checkpoint.pt").unlink(); assert "to do" in said()  # killed before the first
    (folder/"checkpoint.pt").touch(); (folder/"code.txt").write_text("f"*12); assert "to do" in said()

# ---- two runners, and a runner that dies

def test_a_second_runner_is_refused(grid, tmp_path, capsys):
    behave(tmp_path, {FIRST: "slow"})
    first = command(grid); running(grid, FIRST)
    argv = ["tables", "table4", "--quick", "--device", "cpu", "--out", str(grid["out"]), "--results", str(grid["results"])]
    assert main(argv) == 2 and f"process {first.pid} on" in capsys.readouterr().err
    assert main([*argv[:-1], str(tmp_path/"other")]) == 2 and f"{grid['out']}: another runner" in capsys.readouterr().err
    assert first.wait(240) == 0 and main([*argv, "--dry-run"]) == 0

def test_a_killed_runner_takes_its_kernels_along_and_its_successor_resumes(grid, tmp_path):
    behave(tmp_path, {FIRST: "slow", SECOND: "slow"})
    first = command(grid); kernels = [running(grid, n) for n in (FIRST, SECOND)]
    first.kill(); first.wait()
    assert (grid["results"]/".runner.json").exists()                     # it had no time to tidy up
    behave(tmp_path, {})
    assert go(grid)[0] == 0 and not any(map(alive, kernels))
    assert all(int(starts(grid, n)[1]) >= 2 for n in (FIRST, SECOND))

def test_ctrl_c_interrupts_the_kernels_and_records_no_failure(grid, tmp_path):
    behave(tmp_path, {FIRST: "slow", SECOND: "slow"})
    first = command(grid); kernels = [running(grid, n) for n in (FIRST, SECOND)]
    first.send_signal(signal.SIGINT)
    out = first.communicate(timeout=240)[0]
    assert first.returncode == 130 and out.count("stopped; it goes on from its checkpoint") == 2 and not any(map(alive, kernels))
    assert not list(grid["out"].glob("*.failed.json")) and "stopped at" in go(grid, dry_run=True)[1]
    assert nbformat.read(open(grid["out"]/f"{FIRST}.ipynb"), 4).cells[-1].outputs[-1]["ename"] == "KeyboardInterrupt"

def test_a_run_in_other_hands_is_waited_for(grid):
    job = Job(FIRST, "", str(grid["notebooks"]/"01_run.ipynb"), dict(name=FIRST, out=str(grid["out"]), results=str(grid["results"])), str(grid["out"]))
    other = subprocess.Popen([sys.executable, "-c", f"import time; from filelock import FileLock\nwith FileLock('{executed(job)}.lock'): print(flush=True); time.sleep(3)"], stdout=subprocess.PIPE)
    other.stdout.readline(); start = time.time()
    assert execute(job) == "" and time.time() - start > 2

# ---- a cluster

def test_submitit_with_two_local_workers(grid, tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    config = tmp_path/"weclip.toml"; config.write_text('[submitit]\ncluster = "local"\n')
    behave(tmp_path, {FIRST: "raise"})
    status, said = go(grid, engine="submitit", config=config)
    assert status == 1 and f"{FIRST}: cell 2: ZeroDivisionError" in said and result(grid, SECOND).exists()
    behave(tmp_path, {})
    assert go(grid, engine="submitit", config=config)[0] == 0 and starts(grid, FIRST) == ["0", "5"] and (grid["out"]/"table4.ipynb").exists()

def test_a_submitit_worker_that_is_killed(grid, tmp_path):
    pytest.importorskip("submitit", reason="needs submitit")
    config = tmp_path/"weclip.toml"; config.write_text('[submitit]\ncluster = "local"\n')
    behave(tmp_path, {FIRST: "slow"})
    def kill(): os.kill(int(Path(f"/proc/{running(grid, FIRST)}/stat").read_text().split()[3]), signal.SIGKILL)
    Thread(target=kill, daemon=True).start()
    status, said = go(grid, engine="submitit", config=config)
    assert status == 1 and f"failed: {FIRST}: job" in said and "ended without an answer" in said and result(grid, SECOND).exists()

# ---- plans and mistakes

def test_photographs_that_are_missing(tmp_path, monkeypatch, capsys):
    for k in ("VOC", "COCO"): monkeypatch.delenv(f"WECLIP_{k}", raising=False)
    monkeypatch.chdir(tmp_path)
    places = ["--out", str(tmp_path/"runs"), "--results", str(tmp_path/"results"), "--device", "cpu", "--seeds", "1", "--workers", "1"]
    assert main(["tables", "table2", "--profile", "coco", "--dry-run", *places]) == 0
    said = capsys.readouterr().out
    assert "80,000" in said and "24.0 h" in said and "train2014.zip" in said and "WECLIP_COCO" in said
    assert main(["tables", "table4", "--profile", "voc", *places]) == 2 and "VOCtrainval" in capsys.readouterr().err
    (tmp_path/"weclip.toml").write_text('voc = "photos"\n')
    assert main(["tables", "table4", "--profile", "voc", "--dry-run", *places]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path/'photos'}: no such folder" in said and "SegmentationClassAug/ID.png" in said and "60,000 iterations: 9.0 h" in said

@pytest.mark.parametrize("argv, says", [
    (["tabel4"], "did you mean 'table4'"), (["--profile", "scene"], "'scenes'"), (["--recipe", "release"], "did you mean 'released'"),
    (["--seeds", "0"], "at least one seed"), (["--config", "nowhere.toml"], "nowhere.toml"), (["--engine", "slurm"], "did you mean 'submitit'"),
    (["table2", "--profile", "voc"], "expected profile scenes or coco")], ids=" ".join)
def test_mistakes_are_one_line(argv, says, capsys):
    assert main(["tables", "--dry-run", "--device", "cpu", *argv]) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1

def test_a_page_without_a_parameter_is_named(grid, tmp_path):
    page(tmp_path/"01_run.ipynb", "nam = ''", "1")
    status, said = go(grid)
    assert status == 1 and "unknown parameter of 01_run.ipynb: " in said

def test_the_collecting_page_needs_no_photographs(tmp_path, monkeypatch):
    monkeypatch.delenv("WECLIP_VOC", raising=False); monkeypatch.chdir(tmp_path)
    page(tmp_path/"01_run.ipynb", "x = 1"); page(tmp_path/"results.ipynb", "results = ''", "results")
    places = dict(profile="voc", notebooks=tmp_path, out=tmp_path/"runs", results=tmp_path/"results", device="cpu", workers=1)
    assert run_tables(set_up(["results"], **places)) == 0
    with pytest.raises(FileNotFoundError, match="VOCtrainval"): run_tables(set_up(["table4"], **places))

def test_one_card_of_two(monkeypatch):
    monkeypatch.setattr("weclip.lab.kernels.gpus", lambda: ["3", "5"]); seen = []
    monkeypatch.setattr("weclip.lab.kernels.execute", lambda job, env, live: seen.append(env) or "")
    for device, cards in (None, ["3", "5"]), ("cuda", ["3", "5"]), ("cuda:1", ["5"]):
        assert cards_for(device) == cards
        call, name = local(2, device); seen.clear(); call(None, {}); call(None, {})
        assert name == "cuda" and [e["CUDA_VISIBLE_DEVICES"] for e in seen] == (cards*2)[:2]

def test_relative_places_are_meant_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("WECLIP_VOC", "photos"); monkeypatch.setenv("WECLIP_CLIP", "openai"); monkeypatch.delenv("WECLIP_COCO", raising=False)
    assert read_places() == dict(voc=str(tmp_path/"photos"), clip="openai")

def test_the_scenes_do_not_see_the_photographs_clip(grid, tmp_path):
    page(tmp_path/"figure5.ipynb", "clip = None", "f'clip: {clip!r}'"); config = tmp_path/"weclip.toml"; config.write_text('clip = "ViT-B-16.pt"\n')
    assert go(grid, names=["figure5"], config=config)[0] == 0
    assert "clip: ''" in nbformat.read(open(grid["out"]/"figure5.ipynb"), 4).cells[-1].outputs[0]["data"]["text/plain"]

def test_hold_says_who(tmp_path):
    with hold(tmp_path), pytest.raises(ValueError, match=f"process {os.getpid()} on .*, since"):
        with hold(tmp_path): pass
