"""Launches and host waits of the package's steps on a CUDA device that is not there (`fake_device.py`).

    python tests/launches.py               # every case
    python tests/launches.py kept tiny     # cases with one of these words in their names, line by line
    python tests/launches.py --write       # every case, into nbs/7_speed/launches.json

ViT-B/16 with random weights under the released VOC settings: four pictures of 320x320 with six tags a training step,
pictures of 375x500 for predictions. A training step begins with its batch on the host. The record of the losses, one
wait in ten steps, is not in it, and neither is the first step, which sets up what later ones use.
"""
import json
import sys
import traceback
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from fake_device import LAPS, Enough, fake_cuda, missing, preloaded, run, unseen
from PIL import Image
from torch._subclasses.fake_tensor import unset_fake_temporarily

from weclip.data.voc import SegData
from weclip.engine import infer, pseudo, train
from weclip.engine.supervised import supervised_loss
from weclip.method.classes import VOC
from weclip.speed.bench import TAGS, inputs
from weclip.world import tinyclip

TABLE = Path(__file__).resolve().parents[1]/"nbs"/"7_speed"/"launches.json"

@cache
def random_inputs():
    "Model on the device, and a picture."
    model, _, image = inputs(False, 320, "cuda")
    return model, image

def new_model(**changes):
    "The model under the released settings with some changes, and a picture."
    model, image = random_inputs()
    model.cfg = replace(model.cfg, amp="off", views=0, iters=100, switch=0)  # of whatever case came before
    model.cfg = replace(model.cfg, **changes)
    return model.eval(), image

def photographs(folder):
    "Four pictures of noise with tags and masks."
    noise = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    ids = [str(i) for i in range(len(TAGS))]
    images = {i: Path(folder)/f"{i}.jpg" for i in ids}
    masks = {i: Path(folder)/f"{i}.png" for i in ids}
    for i in ids:
        Image.fromarray(noise).save(images[i])
        Image.fromarray(np.ones_like(noise[..., 0])).save(masks[i])
    return SegData(images, dict(zip(ids, TAGS)), VOC.classes, masks, crop=320)

def real(function):
    "A function that computes with real tensors."
    def call(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)
    return call

def real_items(function):
    "A generator whose items are made with real tensors."
    def call(*args, **kwargs):
        items = real(function)(*args, **kwargs)
        def following(): return next(items, None)
        yield from iter(real(following), None)
    return call

def step_of_train(log, resumed=False, kept=False, loss=train.weak_loss, **changes):
    "The second iteration of `train`."
    model, _ = new_model(**changes)
    def on_step(i, output): log.lap()
    with TemporaryDirectory() as folder, mock.patch.object(train, "batches", real_items(train.batches)):
        data = real(photographs)(folder)
        run = Path(folder)/"run"
        if resumed:
            stopped_run(run, model)
        features = Path(folder)/"features" if kept else None
        log.lap()
        train.train(model, data, run, resumed, loss, cache=features, log_every=1000, every=1000, on_step=on_step,
                    progress=False)

def stopped_run(folder, model):
    "A folder with the checkpoint of an iteration."
    folder.mkdir()
    opt = train.optimiser(model, model.cfg)
    for p in model.decoder.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    train.save_checkpoint(folder/"checkpoint.pt", model, opt, 1, [], train.loss_scaler(model))

def prediction(log):
    model, image = new_model()
    log.lap()
    for _ in infer.mask_stream(model, [(k, image) for k in range(LAPS)], ("ms",), flip=True):
        log.lap()

def evaluation(log):
    model, image = new_model()
    lbl = np.ones(image.shape[:2], np.uint8)
    def samples():
        for k in range(LAPS):
            log.lap()
            yield k, image, lbl
    infer.evaluate(model, samples(), crf=False, progress=False)

def label_maps(log):
    model, _ = new_model()
    read = SegData.read
    def counted_read(data, name):
        log.lap()
        return read(data, name)
    with TemporaryDirectory() as folder, mock.patch.object(SegData, "read", counted_read):
        pseudo.score_stages(model, real(photographs)(folder), True, progress=False)

def tiny_step(log):
    def loss(*args):
        log.lap()
        return tinyclip.clip_loss(*args)
    changes = {name: real(getattr(tinyclip, name)) for name in ("batch", "pretraining_set")}
    with TemporaryDirectory() as folder, mock.patch.multiple(tinyclip, **changes):
        tinyclip.train_tiny(folder, 80, n_pictures=8, bs=8, device="cuda", bf16=True, loss=loss)

def zero_shot(log):
    model = tinyclip.new_tiny(0).to("cuda").eval()
    image = np.zeros((112, 112, 3), np.uint8)
    log.lap()
    for _ in range(LAPS):
        tinyclip.zero_shot(model, [image, image])
        log.lap()

def trained(**how):
    "A case of `train`."
    def case(log): step_of_train(log, **how)
    return case

COLUMNS = "encoder", "GradCAM", "RFM", "PAR", "decoder", "losses", "backward", "optimiser", "other"
STATIC = 100  # a `switch` that is never reached

CASES = {  # name -> function of the log
    "static step": trained(switch=STATIC),
    "dynamic step": trained(),
    "static step, bf16": trained(switch=STATIC, amp="bf16"),
    "dynamic step, bf16": trained(amp="bf16"),
    "static step, fp16": trained(switch=STATIC, amp="fp16"),
    "dynamic step, fp16": trained(amp="fp16"),
    "step of a resumed run": trained(resumed=True),
    "step from kept features": trained(kept=True, views=1),
    "supervised step": trained(loss=supervised_loss),
    "prediction, six views": prediction,
    "evaluation of a picture": evaluation,
    "labels of all stages, a picture": label_maps,
    "tiny CLIP's step, bf16": tiny_step,
    "tiny CLIP's zero_shot": zero_shot}

def counted(log, name):
    "A case's row, and its lines."
    log.clear()
    log.laps.clear()
    row = dict(case=name)
    try:
        CASES[name](log)
    except Enough:
        pass
    except Exception as e:
        frames = traceback.extract_tb(e.__traceback__)
        ours = [f"{frame.filename}:{frame.lineno}" for frame in frames if "/torch/" not in frame.filename]
        row["error"] = [f"{type(e).__name__}: {e}", *ours]
    lines, stages, waits, mixed = log.laps[-1] if log.laps else log.snapshot()
    return row | dict(
        launches=lines.total(), waits=waits.total(), stages={stage: stages[stage] for stage in COLUMNS},
        lines=[f"{n:5d} {line}" for line, n in lines.most_common()],
        waits_at=[f"{n:5d} {line} {kind}: {what}" for (kind, what, line), n in sorted(waits.items())],
        mixed=[f"{n:5d} {line} {what}" for (what, line), n in mixed.items()])

def count(words=()):
    "What the log misses, and rows of the cases with one of some words in their names; without words, of all."
    names = [name for name in CASES if not words or any(word in name for word in words)]
    with fake_cuda() as log:
        return unseen(log), [counted(log, name) for name in names]

def show(row):
    stages = ", ".join(f"{stage} {n}" for stage, n in row["stages"].items() if n)
    print(f"{row['case']}: {row['launches']} launches ({stages}), {row['waits']} waits")

def show_lines(row):
    for what in ("error", "mixed", "waits_at", "lines"):
        for line in row.get(what, []):
            print(f"   {what}: {line}")

def table(rows):
    "What is stored."
    kept = "case", "waits", "launches", "stages"
    return dict(torch=torch.__version__.split("+")[0], rows=[{k: row[k] for k in kept} for row in rows])

def write(rows):
    "The table, a row a line."
    failed = [row["case"] for row in rows if "error" in row]
    if failed:
        sys.exit(f"not written, because these fail: {', '.join(failed)}")
    stored = table(rows)
    lines = ",\n".join(map(json.dumps, stored["rows"]))
    TABLE.write_text(f'{{"torch": "{stored["torch"]}", "rows": [\n{lines}]}}\n')

def main(given):
    "In the process with the library."
    words = [word for word in given if not word.startswith("--")]
    missed, rows = count(words)
    if "--json" in given:
        print(json.dumps(dict(missed=missed, rows=rows, table=table(rows))))
        return
    if missed:
        print("The log is wrong about:", *missed, sep="\n   ")
    for row in rows:
        show(row)
        if words or "error" in row:
            show_lines(row)
    if "--write" in given:
        write(rows)

if __name__ == "__main__":
    if preloaded() is not None:
        main(sys.argv[1:])
    else:
        sys.exit(missing() or run(__file__, *sys.argv[1:]).returncode)
