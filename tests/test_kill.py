"""A training killed with SIGKILL at twenty random moments, and in the middle of writing its checkpoint, ends with the
weights of one that nothing disturbed."""
import json, os, random, signal, subprocess, sys, time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")]
KILLS = 20
ITERS = 64

# ---- the parent: one process that has PyTorch imported, and forks a training as often as it is killed

def toy():
    "A random CLIP with a small decoder."
    import open_clip, torch
    from weclip.method.classes import SCENES
    from weclip.method.clip import FrozenCLIP
    from weclip.method.config import preset
    from weclip.method.model import WeCLIP
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=4, width=32, head_width=16, patch_size=8)
    words = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    clip = open_clip.CLIP(16, vision, words).eval()
    n = len(SCENES.classes)
    text = torch.nn.functional.normalize(torch.randn(len(SCENES.classes) + 6, 16), dim=1)
    cfg = preset("scenes", n_feats=3, d=16, layers=1, heads=2, crop=32, bs=2, iters=ITERS, warmup=2, switch=ITERS//2,
                 views=0)
    return WeCLIP(FrozenCLIP(clip), text[:n], text[n:], SCENES, cfg)

def spawn(root, out, resume, tear=None):
    "Fork a training that writes a byte per step to a pipe; `tear` kills it while it writes that checkpoint."
    r, w = os.pipe()
    if pid := os.fork():
        os.close(w)
        return pid, r
    try:
        import torch, weclip.engine.train as t
        from weclip.method.classes import SCENES
        from weclip.data.voc import open_data
        data = open_data(root, "train", SCENES.classes, crop=32, norm="clip")
        if tear:
            tear_at(*tear, torch, t)
        def told(i, _): os.write(w, bytes([i]))
        t.train(toy(), data, out, resume=resume, every=1, log_every=1, on_step=told, progress=False)
        os._exit(0)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)

def tear_at(where, n, torch, t):
    "Die at the n-th checkpoint: after half of the file, or after all of it but before it takes its name."
    save = torch.save
    replace = os.replace
    count = [0]
    def dying_save(x, path):
        save(x, path)
        count[0] += 1
        if where == "half" and count[0] == n:
            os.truncate(path, os.path.getsize(path)//2)
            os.kill(os.getpid(), signal.SIGKILL)
    def dying_replace(a, b):
        if where == "whole" and count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(a, b)
    torch.save = dying_save
    os.replace = dying_replace

def stand(out, model):
    "Iterations in the checkpoint, which has to be sound; 0 where there is none yet."
    from weclip.engine.train import load_checkpoint, optimiser
    path = out/"checkpoint.pt"
    return load_checkpoint(path, model, optimiser(model, model.cfg))[0] if path.exists() else 0

def killed(root, out, model, rng, step, begin, tear=None):
    "Start or continue, kill at a random moment, look at what is left: (steps seen, iterations kept)."
    before = stand(out, model)
    pid, pipe = spawn(root, out, before > 0, tear)
    seen = before
    if tear is None:
        for _ in range(rng.choice([0, 1, 2])):          # so many steps, and a part of the next; or a part of the start
            if not (b := os.read(pipe, 1)): break
            seen = b[0] + 1
        time.sleep(rng.uniform(0, step if seen > before else begin))
        os.kill(pid, signal.SIGKILL)
    while b := os.read(pipe, 1):
        seen = b[0] + 1
    os.close(pipe)
    status = os.waitpid(pid, 0)[1]
    ended = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    return seen, stand(out, model), ended

def finish(root, out, resume):
    pid, pipe = spawn(root, out, resume)
    times = [time.monotonic()]
    while os.read(pipe, 1):
        times.append(time.monotonic())
    os.close(pipe)
    return os.waitpid(pid, 0)[1], times

def main(tmp):
    import torch
    from weclip.world.scenes import write_scenes
    import weclip.engine.train  # noqa: F401  imported once, before the forks
    torch.set_num_threads(1)
    root = write_scenes(tmp/"scenes", train=4, val=0, workers=1)
    model = toy()
    rng = random.Random()
    status, times = finish(root, tmp/"whole", False)
    steps = sorted(b - a for a, b in zip(times[1:], times[2:]))
    rows = []
    step = steps[len(steps)//2]
    begin = times[1] - times[0]
    for _ in range(KILLS):
        rows.append(killed(root, tmp/"killed", model, rng, step, begin))
    for tear in (("half", 1), ("whole", 1), ("half", 2), ("whole", 2)):
        rows.append(killed(root, tmp/"torn", model, rng, step, begin, tear))
    ends = [finish(root, tmp/d, (tmp/d/"checkpoint.pt").exists())[0] for d in ("killed", "torn")]
    cpu = sum(os.times()[:4])
    result = dict(statuses=[status, *ends], rows=rows, cpu=cpu, step=step, begin=begin)
    (tmp/"result.json").write_text(json.dumps(result))

# ---- what has to have come out

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("kill")
    one_core = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TF_CPP_MIN_LOG_LEVEL="3")
    env = {**os.environ, **one_core, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, __file__, str(tmp)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp

@pytest.fixture(scope="module")
def result(out): return json.loads((out/"result.json").read_text())

def test_every_process_was_killed_and_kept_what_it_had_done(result):
    assert len(result["rows"]) == KILLS + 4 and result["statuses"] == [0, 0, 0]
    for seen, kept, sig in result["rows"]:
        assert sig == signal.SIGKILL
        assert seen - 1 <= kept <= seen, result["rows"]  # at most the step whose checkpoint was being written
    assert len({kept for _, kept, _ in result["rows"][:KILLS]}) > 3, "all kills came too early to tell"

def test_torn_files_are_left_aside(result):
    assert [kept for _, kept, _ in result["rows"][KILLS:]] == [0, 0, 1, 2], result["rows"][KILLS:]

@pytest.mark.parametrize("run", ["killed", "torn"])
def test_the_end_is_that_of_an_undisturbed_run(out, run):
    import torch
    a, b = (torch.load(out/d/"checkpoint.pt", weights_only=True) for d in ("whole", run))
    assert a["i"] == b["i"] == ITERS and a["history"] == b["history"] and len(a["history"]) == ITERS
    assert all(a["decoder"][k].equal(b["decoder"][k]) for k in a["decoder"])
    assert all(x.equal(b["opt"]["state"][k][m]) for k, s in a["opt"]["state"].items() for m, x in s.items())
    start = toy().decoder.state_dict()
    assert not any(a["decoder"][k].equal(start[k]) for k in ("pred.weight", "conv.weight"))  # it did learn

def test_it_is_cheap(result): assert result["cpu"] < 60

if __name__ == "__main__":
    main(Path(sys.argv[1]))
