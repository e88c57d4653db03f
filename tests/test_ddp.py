"""Two gloo processes take the steps of one: same weights from the same global batch, one writer, and a run may change
its number of processes.

`torchrun` starts this file itself, once, with two processes; what they write is compared with one process here.
Double precision separates a wrong sum, which would show at once, from the rounding of a right one."""
import os, subprocess, sys
from pathlib import Path

import pytest, torch
from weclip.method.config import preset
from weclip.method.losses import local_count
from weclip.data.voc import open_data
from weclip.world.scenes import write_scenes
from weclip.engine.weights import build
from weclip.engine.parallel import join
from weclip.engine.train import train, weak_loss
from weclip.engine.supervised import supervised_loss
from weclip.cli import main

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
STOP = 4
SMALL = dict(iters=STEPS, switch=3, warmup=2, d=16, layers=1, heads=2, bs=4, crop=48, n_feats=4, par_iters=2, views=0)
CASES = dict(weak=dict(dropout=.1), ce=dict(dropout=0., seg_loss="ce", aff_loss="ce", clip_grad=.1),
             masks=dict(dropout=0., supervised=True),
             plus={"refine": "rfm_p", "loss": "plus", "loss.self_thr": .2, "loss.dice_over": "present"},
             second={"model": "plus", "model.second": "tiny", "refine": "rfm_p", "loss": "plus2",
                     "loss.empty": "zero", "loss.self_thr": .2})
CLI = ["--train-split", "train", "--profile", "scenes", "--clip", "tiny", "--device", "cpu",
       "--set", *(f"{k}={v}" for k, v in SMALL.items())]

def in_double(loss):
    def f(model, b, dynamic, whole=local_count):
        return loss(model, b._replace(img=b.img.double()), dynamic, whole)
    return f

def interrupt(i, _):
    "As Ctrl-C would, on every process."
    if i + 1 == STOP: raise KeyboardInterrupt

def run(root, out, case, **kw):
    "A training in double precision."
    model = build("tiny", preset("scenes", **SMALL, **case)).double()
    masks = model.cfg.supervised
    data = open_data(root, "train", model.classes.classes, None if masks else "auto", with_masks=masks,
                     crop=model.cfg.crop, norm=model.cfg.norm)
    loss = in_double(supervised_loss if masks else weak_loss)
    return train(model, data, out, loss=loss, log_every=1, progress=False, **kw)

def work(root, out):
    "What each of the two processes does."
    torch.set_num_threads(1)
    ranks, _ = join("cpu")
    for name, case in CASES.items():
        run(root, out/name, case, ranks=ranks)
    with pytest.raises(KeyboardInterrupt):
        run(root, out/"stopped", CASES["weak"], ranks=ranks, on_step=interrupt)
    (out/f"rank{ranks.rank}").write_text(str(main(["predict", str(root/"JPEGImages"), "--out", str(out/"predicted")])))
    sys.exit(main(["train", str(root), "--out", str(out/"cli"), *CLI]))

@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=9, val=1, workers=1)

@pytest.fixture(scope="module")
def two(root, tmp_path_factory):
    "The folder that two processes leave, and what they said."
    out = tmp_path_factory.mktemp("two")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(root), str(out)]
    said = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=300)
    assert said.returncode == 0, said.stderr[-3000:]
    return out, said.stdout

def state(out): return torch.load(out/"checkpoint.pt", weights_only=True)

def far(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)

@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one(root, two, tmp_path, name):
    history = run(root, tmp_path, CASES[name])
    one = state(tmp_path)
    both = state(two[0]/name)
    start = build("tiny", preset("scenes", **SMALL, **CASES[name])).double().decoder.state_dict()
    assert far(one["decoder"], start) > 1e-3                       # it moved
    assert far(one["decoder"], both["decoder"]) < 1e-9             # and they moved alike
    assert torch.allclose(torch.tensor(history).double(), torch.tensor(both["history"]).double(), rtol=1e-9, atol=1e-12)

def test_the_number_of_processes_may_change(root, two, tmp_path):
    "Stopped on two, continued on one."
    whole = state(two[0]/"weak")
    run(root, two[0]/"stopped", CASES["weak"], resume=True)
    rest = state(two[0]/"stopped")
    assert rest["i"] == whole["i"] == STEPS and far(rest["decoder"], whole["decoder"]) < 1e-9

def test_process_0_writes_and_speaks(two):
    out, said = two
    assert said.count("in 2 processes") == said.count("written: ") == 1
    for name in (*CASES, "cli"):
        assert len(list((out/name/"tensorboard").iterdir())) == 1 and not list((out/name).glob("*.part"))
    assert (out/"cli"/"model.safetensors").is_file()

def test_other_commands_run_alone(two):
    assert [(two[0]/f"rank{r}").read_text() for r in (0, 1)] == ["2", "2"] and not (two[0]/"predicted").exists()

if __name__ == "__main__":
    work(*map(Path, sys.argv[1:]))
