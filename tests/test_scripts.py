"""Python as a stranger writes it: scripts without a main guard, in processes of their own."""
import json, os, signal, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from weclip.machine import BrokenProcessPool, Processes, parallel_map
from weclip.world.scenes import draw_scene, write_scenes
from weclip.engine.infer import mask_stream
from weclip.use.segmentation import cached_model, predict_many

ROOT = Path(__file__).resolve().parents[1]

def script(folder, text):
    "What a script says that holds these lines alone: (status, standard output, standard error)."
    return ended(started(folder, text))

def started(folder, text):
    "The process of a script that holds these lines alone."
    folder.mkdir(exist_ok=True)
    (folder/"script.py").write_text(text, encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
           "WECLIP_CACHE": str(folder/"cache")}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    return subprocess.Popen([sys.executable, "script.py"], cwd=folder, env=env, **pipes)

def ended(process):
    "Its status, standard output and standard error."
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err

@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=4, val=2)

WITHOUT_PROCESSES = """
import hashlib, torch
from weclip.data.voc import open_data
from weclip.engine.infer import evaluate, mask_stream
from weclip.engine.job import demo
from weclip.world.scenes import write_scenes
from weclip.use.segmentation import cached_model, predict_many
print("start")
root = write_scenes("drawn", train=3, val=2)
model = cached_model(device="cpu")
data = open_data(root, "val", model.classes.classes, with_masks=True, norm=model.cfg.norm)
samples = [(i, data.read(i)[0]) for i in data.ids]
one = [masks["crf"].tobytes() for _, masks in mask_stream(model, samples, ("crf",))]
two = [seg.ids.tobytes() for _, seg in predict_many(samples, model)]
print(one == two, hashlib.sha256(b"".join(one)).hexdigest())
print(sorted(evaluate(model, data, progress=False)))
few = dict(iters=2, switch=1, warmup=1, d=16, layers=1, heads=2, bs=2)
print(sorted(demo("run", train=3, val=2, modes=("ms", "crf"), say=lambda _: None, **few)))
"""

def test_scripts_without_a_main_guard_run(tmp_path):
    """`mask_stream`, `predict_many`, `evaluate`, `write_scenes` and `demo` started processes unasked: each of them read
    the script again and died of "An attempt has been made to start a new process before the current process has
    finished its bootstrapping phase"."""
    import hashlib
    status, out, err = script(tmp_path, WITHOUT_PROCESSES)
    assert status == 0, err[-2000:]
    start, masks, scores, run = out.splitlines()
    assert (start, scores) == ("start", "['crf', 'ms', 'single']")
    assert run == "['crf', 'initial', 'initial+PAR', 'ms', 'pseudo', 'refined']"
    drawn = sorted((tmp_path/"drawn"/"JPEGImages").glob("val*"))
    pictures = [(p, np.asarray(Image.open(p))) for p in drawn]
    found = mask_stream(cached_model(device="cpu"), pictures, ("crf",), workers=1)
    seen = b"".join(masks["crf"].tobytes() for _, masks in found)
    assert masks == "True " + hashlib.sha256(seen).hexdigest()  # as with a process: no number changes

PREDICTION = """
from weclip.use.segmentation import cached_model, predict_many
import numpy as np
samples = [(k, np.zeros((40, 40, 3), np.uint8)) for k in range(3)]
print(len(list(predict_many(samples, cached_model(device='cpu'), workers=2))))
"""
SCENES = """
from weclip.world.scenes import write_scenes
print(write_scenes('drawn', train=40, val=0, workers=2))
"""
DEMO = """
from weclip.engine.job import demo
print(demo('run', train=40, val=2, drawing=None, iters=2))
"""

def test_processes_that_cannot_start_are_told_in_a_sentence(tmp_path):
    "A pool asked for in a script without a guard: a traceback per child, and a parent that waited for ever."
    asked = dict(predict_many=PREDICTION, write_scenes=SCENES, drawing=DEMO)
    running = {what: started(tmp_path/what, text) for what, text in asked.items()}  # at the same time
    bad = []
    for what, process in running.items():
        status, out, err = ended(process)
        last = (err.splitlines() or [""])[-1]
        left = [p for p in (tmp_path/what).iterdir() if p.name not in ("script.py", "cache")]
        half = list((tmp_path/what).glob("cache/.*"))
        is_told = 'put the call under `if __name__ == "__main__":`' in last and err.count("Traceback") == 1
        if status != 1 or out or not is_told or "bootstrapping" in err or left or half:
            bad.append((what, status, out, err[-2000:], left, half))
    assert not bad, bad

def test_with_the_guard_processes_run(tmp_path):
    guarded = "\n".join(f"    {line}" for line in PREDICTION.splitlines())
    assert script(tmp_path, f"if __name__ == '__main__':\n{guarded}")[:2] == (0, "3\n")

# ---- a process that is killed

def kill_worker(pool):
    pid = pool.first.result()
    os.kill(pid, signal.SIGKILL)

def test_a_killed_crf_worker_costs_no_picture(monkeypatch, caplog):
    "BrokenProcessPool ended a prediction of thousands of pictures: one process had been killed for want of memory."
    import weclip.engine.infer as infer
    pools = []
    real = infer.crf_pool
    def kept(n):
        pools.append(real(n))
        return pools[0]
    monkeypatch.setattr(infer, "crf_pool", kept)
    samples = [(k, draw_scene(k, (64, 80)).img) for k in range(6)]
    model = cached_model(device="cpu")
    got = []
    for k, seg in predict_many(samples, model, workers=1):
        if k == 1:
            kill_worker(pools[0])
        got.append(seg.ids)
    want = [seg.ids for _, seg in predict_many(samples, model)]
    assert len(got) == 6 and all(np.array_equal(a, b) for a, b in zip(got, want))
    told = [r.message for r in caplog.records if "was killed" in r.message]
    assert told == [caplog.records[-1].message]  # once
    assert "computed without processes" in caplog.text

def test_a_killed_drawing_is_a_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(BrokenProcessPool, match="was killed, perhaps because memory ran out"):
        list(parallel_map(die, range(4), workers=2))
    with pytest.raises(TypeError):
        write_scenes(tmp_path/"a", train=2, val=0, seed=object())
    assert not list(tmp_path.iterdir())

def die(k):
    if k == 3:
        os.kill(os.getpid(), signal.SIGKILL)

def test_a_pool_knows_whether_it_ran():
    with Processes(1) as pool:
        assert pool.submit(abs, -1).result() == 1 and pool.came_up
        assert "killed" in str(pool.why_broken())
    with pytest.raises(ValueError, match="at least one picture"):
        write_scenes("nowhere", train=0, val=0)

def test_workers_change_no_scene(root, tmp_path):
    again = write_scenes(tmp_path/"again", train=4, val=2, workers=2)
    names = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(again).as_posix() for p in again.rglob("*") if p.is_file())
    assert all((root/n).read_bytes() == (again/n).read_bytes() for n in names)
    assert json.loads((root/"scenes.json").read_text()) == json.loads((again/"scenes.json").read_text())
