"""Many predictions in a row, and many training steps, at bounded memory: the slope of the process's size, well below
what one of them makes."""
import ctypes, gc, os
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest
from PIL import Image

from weclip.method.model import WeCLIP
from weclip.data.pictures import save_mask
from weclip.data.voc import open_data
from weclip.world.scenes import write_scenes
from weclip.engine.train import train
from weclip.engine.infer import evaluate
from weclip.use.segmentation import predict_many, read_ahead
from weclip.speed.bench import inputs

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the process's size from /proc")]

def resident():
    "Bytes of memory that the process holds, after everything that can be given back was."
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass  # another C library
    return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")

def slope(sizes):
    "Bytes per item: the median over all pairs of the later measurements, which a single jump does not move."
    i, x = np.array(sizes).T
    n = len(sizes)//3
    i = i[n:]
    x = x[n:]
    a, b = np.triu_indices(len(i), 1)
    return float(np.median((x[b] - x[a])/(i[b] - i[a])))

@pytest.fixture(scope="module")
def model():
    model = inputs(quick=True, size=32)[0]
    gc.collect()
    gc.freeze()  # what is there by now is not looked through again at every measurement
    yield model
    gc.unfreeze()

SIZES = [(40, 60), (60, 40), (48, 48), (33, 65), (64, 64), (50, 90)]
PICTURE = sum(h*w*3 for h, w in SIZES)//len(SIZES)  # bytes of one on average; a mask has a third

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "Files of different sizes."
    d = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k, (h, w) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(d/f"{k}.png")
    return sorted(d.iterdir())

def predicted(model, files, n, tmp, crf=False, leak=None):
    "Sizes of the process during `n` rounds over the files, read, predicted and written as the command does."
    endless = (f for _ in range(n) for f in files)
    sizes = []
    for k, (f, seg) in enumerate(predict_many(read_ahead(endless, []), model, crf=crf)):
        save_mask(tmp/f"{f.stem}.png", seg.ids)
        if leak is not None:
            leak.append(seg.ids)
        if k % len(files) == 0:
            sizes.append((k, resident()))
    return sizes

@pytest.mark.parametrize("crf, n", [(False, 50), (True, 24)])
def test_predictions(model, pictures, tmp_path, crf, n):
    assert slope(predicted(model, pictures, n, tmp_path, crf)) < PICTURE/3/4

def test_a_kept_mask_would_be_seen(model, pictures, tmp_path):
    assert slope(predicted(model, pictures, 30, tmp_path, leak=[])) > PICTURE/3/2

def test_scores(model, tmp_path):
    rng = np.random.default_rng(0)
    sizes = []
    def triples():
        for k in range(240):
            h, w = SIZES[k % len(SIZES)]
            if k % 6 == 0:
                sizes.append((k, resident()))
            yield k, rng.integers(0, 256, (h, w, 3), dtype=np.uint8), np.indices((h, w)).sum(0) % 21
    evaluate(model, triples(), crf=False, progress=False)
    assert slope(sizes) < PICTURE/3/4

@pytest.mark.parametrize("kept", [False, True])
def test_training_steps(model, tmp_path, kept):
    root = write_scenes(tmp_path/"scenes", train=6, val=0, workers=1)
    def tags(root, ids, names): return {i: [k % 3] for k, i in enumerate(ids)}
    data = open_data(root, "train", model.classes.classes, tags_from=tags, crop=48)
    cfg = replace(model.cfg, crop=48, bs=2, iters=120, switch=40, warmup=5, par_iters=2, par_dilations=(1, 2))
    sizes = []
    held = []
    def look(i, out):
        if kept:
            held.append(out.attn)
        if i % 5 == 0:
            sizes.append((i, resident()))
    twin = WeCLIP(model.clip, model.text_fg, model.text_bg, model.classes, cfg)
    train(twin, data, tmp_path/"run", every=20, log_every=5, on_step=look, progress=False)
    attn = 4*2*4*36**2  # bytes of a step's attention maps: 2 pictures, 4 maps of 36 tokens
    assert slope(sizes) > attn/2 if kept else slope(sizes) < attn/4
