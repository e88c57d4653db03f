"""What would spoil the page of `bench`: other settings, the order of the stages, that measuring leaves the model's mode alone."""
import json, os, subprocess, sys
from itertools import accumulate
from pathlib import Path
from time import sleep

import pytest, torch
from torch.profiler import ProfilerActivity, profile
from weclip.engine.train import optimiser, train_step
from weclip.speed.bench import (
    TARGETS, bench, inputs, measure, prediction, report, rounds, stages, target_table)
from weclip.speed.memory import peak_bytes

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
needs_data = pytest.mark.skipif(not (DATA/"VOCdevkit").is_dir(), reason=f"no VOC photographs at {DATA} (set WECLIP_DATA)")

NAMES = ["encoder", "encoder + attention", "GradCAM", "RFM", "PAR", "decoder", "losses", "optimiser", "iteration"]
PLAIN = {"encoder", "encoder + attention", "GradCAM", "PAR", "decoder", "losses", "iteration"}

@pytest.mark.parametrize("change", [{}, dict(pool="cls"), dict(seg_loss="ce", aff_loss="ce", radius=0), dict(n_dynamic=1), dict(n_feats=4), dict(par_scale=.5), dict(refine=False)])
def test_stages_are_the_iteration(change):
    from dataclasses import replace
    model, batch, _ = inputs(quick=True, size=32)
    if "n_feats" in change:
        model.decoder = type(model.decoder)(width=32, n_feats=4, n_classes=21, d=16, layers=1, heads=2)
    model.cfg = replace(model.cfg, **change)
    fs = stages(model.eval(), batch)
    assert list(fs) == NAMES
    with torch.no_grad():
        out = model(batch.img, batch.tags)
    assert torch.allclose(fs["GradCAM"]().cam, out.cam, atol=1e-5) and torch.allclose(fs["RFM"](), out.cam_ref, atol=1e-5)
    assert (fs["PAR"]() == out.pseudo).float().mean() > .999
    loss = fs["losses"]()[0]
    losses, _ = train_step(model, optimiser(model, model.cfg), batch, model.cfg.switch)
    torch.testing.assert_close(torch.stack(loss), torch.stack(losses).detach(), check_dtype=False)

def test_functions_may_run_in_any_order_and_often():
    model, batch, _ = inputs(quick=True, size=32)
    fs = stages(model.train(), batch)
    for name in reversed(NAMES):
        fs[name]()
        fs[name]()
    assert all(p.isfinite().all() for p in model.decoder.parameters())

def test_encoder_forwards_of_a_prediction():
    model, _, image = inputs(quick=True, size=32)
    model.train()
    fs = prediction(model, image)
    seen = []
    handle = model.clip.visual.conv1.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))
    fs["prediction"]()
    one = list(seen)
    seen.clear()
    fs["prediction's encoder"]()
    handle.remove()
    assert one == seen == [(2, 3, 48, 64), (2, 3, 36, 48)] and model.training

def test_every_round_has_a_number():
    "A number for every round and function, none for the warm-up."
    seen = rounds(dict(a=lambda: None, b=lambda: sleep(.02)), repeats=3)
    assert len(seen["a"]) == len(seen["b"]) == 3 and all(x >= .02 for x in seen["b"])
    assert measure(dict(b=lambda: sleep(.02)), repeats=1)["b"] >= .02

def test_threads_are_restored():
    before = torch.get_num_threads()
    used = []
    measure(dict(f=lambda: used.append(torch.get_num_threads())), threads=2, repeats=1)
    assert set(used) == {2} and torch.get_num_threads() == before

def test_rows_and_report(tmp_path):
    path = tmp_path/"a"/"b.json"
    result = bench(threads=1, repeats=1, size=48, out=path, quick=True)
    assert json.loads(path.read_text()) == dict(cpu=result)
    bench(threads=1, repeats=1, size=32, out=path, quick=True)
    assert json.loads(path.read_text())["cpu"]["setup"]["size"] == 32   # the newer one
    assert list(result["rows"]) == list(TARGETS) and result["setup"]["threads"] == 1
    stages = {r["stage"]: r for r in result["stages"]}
    assert list(stages) == [*NAMES, "encoder, static maps", "encoder, open_clip", "prediction", "prediction's encoder", "DenseCRF"]
    assert all(stages[s]["ratio"] == 1 for s in ("encoder", "prediction's encoder"))
    crf = stages["DenseCRF"]   # the tensors of other libraries are not counted
    assert {s for s, r in stages.items() if r["plain_mib"]} == PLAIN and all(r["mib"] >= 0 for r in stages.values() if r is not crf)
    rows = result["rows"]
    assert crf["plain_seconds"] == rows["DenseCRF, 21 classes, 375x500, one core"] > 0
    assert crf["seconds"] == rows["DenseCRF with --drop 0.5"] > 0 and crf["mib"] is crf["ratio"] is None
    assert all(r["range"] == [r["ratio"]]*2 for r in stages.values() if r is not crf)   # one round
    assert result["rows"]["memory of an iteration / of its plain form"] == stages["iteration"]["mib"]/stages["iteration"]["plain_mib"] < 1
    assert {(r["size"], r["tags"]) for r in result["sizes"]} == {(32, 2), (48, 2), (32, 1)} and {r["stage"] for r in result["sizes"]} == set(NAMES)
    targets, stage_table, setup = report(result).split("\n\n")
    assert targets.count("\n") == len(TARGETS) + 1 and targets.count("not measured") == 3
    assert stage_table.count("\n") == len(stages) + 1 and all(line.count("|") == 9 for line in stage_table.splitlines())
    assert "threads: 1;" in setup and "48x48" in setup and "--device cuda" in setup and f"torch {torch.__version__}" in setup
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("\n## cpu\n") == 1

def test_pages_tell_what_was_measured():
    "The stored report and the README's table are those of the stored numbers."
    root = Path(__file__).resolve().parents[1]
    known = json.loads((root/"nbs"/"7_speed"/"measured.json").read_text(encoding="utf-8"))
    assert known["cpu"]["setup"]["encoder"] == "ViT-B/16" and known["cpu"]["setup"]["repeats"] >= 7
    for result in known.values():
        assert report(result) in (root/"nbs"/"7_speed"/"measured.md").read_text(encoding="utf-8")
    told = (root/"README.md").read_text(encoding="utf-8").split("<!-- speed -->")[1].split("<!-- /speed -->")[0]
    rows = {row[0].strip(): row for row in (line.strip("|").split("|") for line in target_table(known["cpu"]).splitlines())}
    for name in ("iteration / encoder", "PAR / encoder", "GradCAM / encoder", "prediction / its encoder forwards"):
        ours, _, _, theirs = (cell.strip() for cell in rows[name][1:])
        assert ours in told and f"({theirs}" in told, name

def test_memory_is_a_count():
    "The same twice, and close to what the allocator hands out."
    model, batch, _ = inputs(quick=True, size=64)
    for name, f in stages(model, batch).items():
        f()
        a = peak_bytes(f)
        b = peak_bytes(f)
        assert a == b, name
    f = stages(model, batch)["PAR"]
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    most = max(accumulate(n for _, n in events))
    assert .9 < peak_bytes(f)/most < 1.1

@needs_data
def test_bench_reads_a_voc_folder():
    result = bench(threads=1, repeats=1, size=32, quick=True, data=DATA)
    assert result["setup"]["pictures"] == "VOC" and result["rows"]["labels of DenseCRF with --drop 0.5 as with all"] >= .999

def test_runs_without_notebook_tools():
    code = "import sys; sys.modules['nbdev'] = None; import weclip.speed.bench as b; print(b.report(b.bench(repeats=1, size=32, quick=True)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("|  | measured |"), done.stdout + done.stderr
