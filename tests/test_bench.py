"""What would spoil the page of `bench`: other settings, the order of the stages, that measuring leaves the model's mode alone."""
import json, subprocess, sys

import pytest, torch
from weclip.bench import TARGETS, bench, inputs, measure, prediction, report, stages
from weclip.train import optimiser, train_step

NAMES = ["encoder", "encoder + attention", "GradCAM", "RFM", "PAR", "decoder", "losses", "optimiser", "iteration"]

@pytest.mark.parametrize("change", [{}, dict(pool="cls"), dict(seg_loss="ce", aff_loss="ce", radius=0), dict(n_dynamic=1), dict(n_feats=4), dict(par_scale=.5), dict(refine=False)])
def test_stages_are_the_iteration(change):
    from dataclasses import replace
    model, batch, _ = inputs(quick=True, size=32)
    if "n_feats" in change: model.decoder = type(model.decoder)(width=32, n_feats=4, n_classes=21, d=16, layers=1, heads=2)
    model.cfg = replace(model.cfg, **change)
    fs = stages(model.eval(), batch)
    assert list(fs) == NAMES
    with torch.no_grad(): out = model(batch.img, batch.tags)
    assert torch.allclose(fs["GradCAM"]().cam, out.cam, atol=1e-5) and torch.allclose(fs["RFM"](), out.cam_ref, atol=1e-5)
    assert (fs["PAR"]() == out.pseudo).float().mean() > .999
    loss, (losses, _) = fs["losses"]()[0], train_step(model, optimiser(model, model.cfg), batch, model.cfg.switch)
    torch.testing.assert_close(torch.stack(loss), torch.stack(losses).detach(), check_dtype=False)

def test_functions_may_run_in_any_order_and_often():
    model, batch, _ = inputs(quick=True, size=32)
    fs = stages(model.train(), batch)
    for name in reversed(NAMES): fs[name](); fs[name]()
    assert all(p.isfinite().all() for p in model.decoder.parameters())

def test_encoder_forwards_of_a_prediction():
    model, _, image = inputs(quick=True, size=32)
    model.train()
    fs, seen = prediction(model, image), []
    handle = model.clip.visual.conv1.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    fs["prediction"](); one = list(seen); seen.clear()
    fs["prediction's encoder"](); handle.remove()
    assert one == seen == [(2, 3, 48, 64), (2, 3, 36, 48)] and model.training

def test_threads_are_restored():
    before = torch.get_num_threads()
    used = []
    measure(dict(f=lambda: used.append(torch.get_num_threads())), threads=2, repeats=1)
    assert set(used) == {2} and torch.get_num_threads() == before

def test_rows_and_report(tmp_path):
    rows = bench(threads=1, repeats=1, size=48, out=tmp_path/"a"/"b.json", quick=True)
    assert json.loads((tmp_path/"a"/"b.json").read_text()) == rows
    assert [r["stage"] for r in rows[:2]] == list(TARGETS) and {r["stage"] for r in rows[:-1]} == {*NAMES, "prediction", "prediction's encoder"}
    assert all(r["ratio"] == 1 for r in rows[:-1] if r["stage"] in ("encoder", "prediction's encoder")) and rows[-1]["threads"] == 1 and rows[-1]["peak_gib"] > 0
    table = report(rows).splitlines()
    assert len(table) == 2 + 11 + 2 and all(line.count("|") == 6 for line in table[:13]) and "threads: 1," in table[-1] and "48x48" in table[-1]

def test_runs_without_notebook_tools():
    code = "import sys; sys.modules['nbdev'] = None; import weclip.bench as b; print(b.report(b.bench(repeats=1, size=32, quick=True)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("| stage"), done.stderr
