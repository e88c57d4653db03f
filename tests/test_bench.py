"""What would spoil the page of `bench`: other settings, the order of the stages, that measuring changes the model."""
import json
import os
import subprocess
import sys
import warnings
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import weclip.speed.bench as page
from weclip.engine.train import optimiser, train_step
from weclip.speed.bench import TARGETS, bench, inputs, measure, prediction, report, rounds, stages, target_table
from weclip.speed.memory import peak_bytes

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WECLIP_DATA", ROOT.parent/"shared"/"data"))
needs_data = pytest.mark.skipif(
    not (DATA/"VOCdevkit").is_dir(), reason=f"no VOC photographs at {DATA} (set WECLIP_DATA)")

NAMES = ["encoder", "encoder + attention", "GradCAM", "RFM", "PAR", "decoder", "losses", "optimiser", "iteration"]
OTHERS = ["encoder, static maps", "encoder, open_clip", "prediction", "prediction's encoder", "DenseCRF"]
PLAIN = {"encoder", "encoder + attention", "GradCAM", "PAR", "decoder", "losses", "iteration"}
CHANGES = [
    {}, dict(pool="cls"), dict(seg_loss="ce", aff_loss="ce", radius=0), dict(n_dynamic=1), dict(n_feats=4),
    dict(par_scale=.5), dict(refine="none")]

def differences(model, batch):
    "Stages that return something else than an iteration has."
    fs = stages(model.eval(), batch)
    with torch.no_grad():
        out = model(batch.img, batch.tags)
    loss = torch.stack(fs["losses"]()[0])
    same = {
        "names": list(fs) == NAMES,
        "GradCAM": torch.allclose(fs["GradCAM"]().cam, out.cam, atol=1e-5),
        "RFM": torch.allclose(fs["RFM"](), out.cam_ref, atol=1e-5),
        "PAR": (fs["PAR"]() == out.pseudo).float().mean() > .999}
    step, _ = train_step(model, optimiser(model, model.cfg), batch, model.cfg.switch)
    same["losses"] = torch.allclose(loss, torch.stack(step).detach().to(loss), rtol=1.3e-6, atol=1e-5)
    return [name for name, is_same in same.items() if not is_same]

def test_stages_are_the_iteration():
    found = []
    for change in CHANGES:
        model, batch, _ = inputs(quick=True, size=32)
        if "n_feats" in change:
            model.decoder = type(model.decoder)(width=32, n_feats=4, n_classes=21, d=16, layers=1, heads=2)
        model.cfg = replace(model.cfg, **change)
        found += [f"{change}: {name}" for name in differences(model, batch)]
    assert not found

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
    "A number for every round and function, none for the warm-up; the threads are as before."
    seen = rounds(dict(a=lambda: None, b=lambda: sleep(.02)), repeats=3)
    assert len(seen["a"]) == len(seen["b"]) == 3 and all(x >= .02 for x in seen["b"])
    assert measure(dict(b=lambda: sleep(.02)), repeats=1)["b"] >= .02
    before = torch.get_num_threads()
    used = []
    measure(dict(f=lambda: used.append(torch.get_num_threads())), threads=2, repeats=1)
    assert set(used) == {2} and torch.get_num_threads() == before

RUN = """
import json, sys
sys.modules["nbdev"] = None
from weclip.speed.bench import bench, report
if __name__ == "__main__":
    result = bench(threads=1, repeats=1, size=48, out=sys.argv[1], quick=True)
    print(json.dumps(dict(result=result, report=report(result))))
"""

@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    "The path of a result, the result, and its report, by a process without notebook tools."
    folder = tmp_path_factory.mktemp("bench")
    (folder/"run.py").write_text(RUN)
    path = folder/"a"/"b.json"
    done = subprocess.run([sys.executable, folder/"run.py", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    return path, told["result"], told["report"]

def test_rows(measured):
    path, result, _ = measured
    assert json.loads(path.read_text()) == dict(cpu=result)
    rows = result["rows"]
    assert list(rows) == list(TARGETS) and result["setup"]["threads"] == 1
    table = {r["stage"]: r for r in result["stages"]}
    assert list(table) == [*NAMES, *OTHERS]
    assert all(table[s]["ratio"] == 1 for s in ("encoder", "prediction's encoder"))
    crf = table.pop("DenseCRF")
    assert crf["mib"] is crf["ratio"] is crf["range"] is None  # the tensors of other libraries are not counted
    assert crf["plain_seconds"] == rows["DenseCRF, 21 classes, 375x500, one core"] > 0
    assert crf["seconds"] == rows["DenseCRF with --drop 0.5"] > 0
    assert {s for s, r in table.items() if r["plain_mib"]} == PLAIN and all(r["mib"] >= 0 for r in table.values())
    assert all(r["range"] == [r["ratio"]]*2 for r in table.values())  # one round
    whole = table["iteration"]
    assert rows["memory of an iteration / of its plain form"] == whole["mib"]/whole["plain_mib"] < 1
    assert rows["iteration / encoder"] == whole["seconds"]/table["encoder"]["seconds"]
    assert {(r["size"], r["tags"]) for r in result["sizes"]} == {(32, 2), (48, 2), (32, 1)}
    assert {r["stage"] for r in result["sizes"]} == set(NAMES)

def test_report(measured):
    path, result, told = measured
    assert told == report(result)
    targets, trainings, card, stage_table, setup = told.split("\n\n")
    assert targets.startswith("|  | measured |")
    assert targets.count("\n") == len(TARGETS) + 1 and targets.count("not measured") == 6
    assert trainings.count("\n") == len(page.FORMS) + 1 and "TF32 moves tokens by up to 0.0e+00" in card
    assert stage_table.count("\n") == len(NAMES + OTHERS) + 1
    assert all(line.count("|") == 9 for line in stage_table.splitlines())
    missing = [x for x in ("threads: 1;", "48x48", "--device cuda", f"torch {torch.__version__}") if x not in setup]
    assert not missing
    assert path.with_suffix(".md").read_text(encoding="utf-8").count("\n## cpu\n") == 1

def test_a_newer_result_takes_the_place(measured, tmp_path):
    _, result, told = measured
    newer = {**result, "setup": {**result["setup"], "size": 32}}
    for one in (result, newer):
        page._store(tmp_path/"b.json", "cpu", one)
    assert json.loads((tmp_path/"b.json").read_text()) == dict(cpu=newer)
    assert report(newer) in (tmp_path/"b.md").read_text(encoding="utf-8") and report(newer) != told

def test_pages_tell_what_was_measured():
    "The stored report and the README's table are those of the stored numbers."
    known = json.loads((ROOT/"nbs"/"7_speed"/"measured.json").read_text(encoding="utf-8"))
    assert known["cpu"]["setup"]["encoder"] == "ViT-B/16" and known["cpu"]["setup"]["repeats"] >= 7
    told = (ROOT/"nbs"/"7_speed"/"measured.md").read_text(encoding="utf-8")
    assert not [kind for kind, result in known.items() if report(result) not in told]
    readme = (ROOT/"README.md").read_text(encoding="utf-8").split("<!-- speed -->")[1].split("<!-- /speed -->")[0]
    table = [line.strip("|").split("|") for line in target_table(known["cpu"]).splitlines()]
    rows = {name.strip(): (ours.strip(), theirs.strip()) for name, ours, _, _, theirs in table}
    names = "iteration / encoder", "PAR / encoder", "GradCAM / encoder", "prediction / its encoder forwards"
    assert not [name for name in names if rows[name][0] not in readme or f"({rows[name][1]}" not in readme]
    if "cuda" not in known:
        assert "a GPU has not been measured" in readme
    else:
        fast = known["cuda"]["rows"]["iterations per second, accelerator"]
        assert f"{fast:.1f} iterations in a second" in readme and known["cuda"]["setup"]["device"] in readme

def test_memory_is_a_count():
    "The same twice, and close to what the allocator hands out."
    model, batch, _ = inputs(quick=True, size=64)
    fs = stages(model, batch)
    for f in fs.values():
        f()
    twice = {name: [peak_bytes(f), peak_bytes(f)] for name, f in fs.items()}
    assert not {name: (a, b) for name, (a, b) in twice.items() if a != b}
    f = stages(model, batch)["PAR"]
    f()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = sorted((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    most = max(accumulate(n for _, n in events))
    assert .9 < peak_bytes(f)/most < 1.1

# --- a GPU, without one -----------------------------------------------------------------------------------------

class Card:
    "What `bench` asks of a GPU, answered without one."
    def __init__(self, monkeypatch):
        self.asked = []
        self.current = None
        self.mode = "default"
        for name, answer in dict(synchronize=None, reset_peak_memory_stats=None, get_device_name="abacus",
                                 max_memory_allocated=2**30, max_memory_reserved=2**31).items():
            monkeypatch.setattr(torch.cuda, name, lambda device, name=name, answer=answer: self.note(device, answer))
        monkeypatch.setattr(torch.cuda, "device", self.use)
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set_mode)
        monkeypatch.setattr(page, "profile", Profile)

    def note(self, device, answer):
        self.asked.append(str(device))
        return answer

    def set_mode(self, mode): self.mode = mode

    @contextmanager
    def use(self, device):
        self.current = device
        try:
            yield
        finally:
            self.current = None

class Profile:
    "Four kernels of a millisecond, called five times each, and a call on the processor."
    def __init__(self, activities): pass

    def __enter__(self): return self

    def __exit__(self, *error): pass

    def key_averages(self):
        kernel = SimpleNamespace(device_type=DeviceType.CUDA, count=5, self_device_time_total=5000)
        return [kernel]*4 + [SimpleNamespace(device_type=DeviceType.CPU, count=9, self_device_time_total=9e9)]

def test_meter(monkeypatch):
    "Waits are counted in their steps alone, kernels of the GPU alone, and everything is asked of the right one."
    card = Card(monkeypatch)
    meter = page.Meter("cuda:1", 60)
    with meter.looking:
        for i in range(60):
            for _ in range(2):  # of which PyTorch would tell, if it was asked to
                if card.mode == "warn":
                    warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
                    warnings.warn("something else", stacklevel=1)
            meter(i, None)
    found = meter.found
    assert set(card.asked) == {"cuda:1"} and card.mode == "default"
    assert (found["waits"], found["kernels"], found["gib"], found["reserved_gib"]) == (2, 5, 1, 2)
    assert abs(found["busy"]/found["per_second"] - .005) < 1e-9

def test_second_card(monkeypatch, tmp_path):
    "Times are taken while the GPU that was asked for is the one in use; what a run has found until it ends is kept."
    card = Card(monkeypatch)
    real = page.inputs
    def rounds(fs, **how):
        card.asked.append(card.current)
        return {name: [1.] for name in fs}
    def train(model, data, out, on_step, **more):
        for i in range(model.cfg.iters):
            on_step(i, None)
    def stop(*args, **how): raise KeyboardInterrupt
    monkeypatch.setattr(page, "inputs", lambda quick, size, device: real(True, size))
    monkeypatch.setattr(page, "rounds", rounds)
    monkeypatch.setattr(page, "train", train)
    monkeypatch.setattr(page, "sweep", stop)
    with pytest.raises(KeyboardInterrupt):
        bench(device="cuda:1", repeats=1, size=32, out=tmp_path/"a.json", quick=True)
    assert set(card.asked) == {"cuda:1"} and card.current is None
    found = json.loads((tmp_path/"a.json").read_text())["cuda"]
    assert len(found["stages"]) == len(NAMES + OTHERS) - 1 and found["sizes"] == []
    missing = [name for name, value in found["rows"].items() if value is None]
    later = "DenseCRF", "loader", "accelerator"
    assert not [name for name in missing if not any(what in name for what in later)]

def test_forms(monkeypatch):
    "A form that is missing or fails says why, and the model is as before."
    def train(model, data, out, on_step, **more):
        if model.cfg.amp == "bf16": raise torch.OutOfMemoryError("CUDA out of memory")
        torch.nn.init.zeros_(model.decoder.pred.weight)
        for i in range(model.cfg.iters):
            on_step(i, None)
    monkeypatch.setattr(page, "train", train)
    monkeypatch.setattr(page, "FORMS", {**page.FORMS, "unknown": dict(abacus=1)})
    model, _, _ = inputs(quick=True, size=32)
    cfg = model.cfg
    before = {name: w.clone() for name, w in model.state_dict().items()}
    rows = {row.pop("name"): row for row in page.trainings(model, 32, 15)}
    assert rows["float32"]["per_second"] > 0 and rows["bf16"] == dict(reason="CUDA out of memory")
    assert "abacus" in rows["unknown"]["reason"]
    assert model.cfg == cfg and all(w.equal(before[name]) for name, w in model.state_dict().items())

@needs_data
def test_bench_reads_a_voc_folder(monkeypatch):
    "Read in this process, and without a clock: how long it takes is not asked here."
    real = page.images_per_second
    read = []
    def in_this_process(data, bs, workers, repeats):
        read.append(workers)
        return real(data, bs, 0, repeats)
    monkeypatch.setattr(page, "images_per_second", in_this_process)
    monkeypatch.setattr(page, "rounds", lambda fs, **how: {name: [1.] for name in fs})
    result = bench(threads=1, repeats=1, size=32, quick=True, data=DATA)
    assert result["setup"]["pictures"] == "VOC" and read == [2, 16]
    assert result["rows"]["labels of DenseCRF with --drop 0.5 as with all"] >= .999
