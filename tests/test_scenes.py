"""The built-in data: reproducible, split without overlap, and laid out as VOC2012."""
import json
import numpy as np
from PIL import Image
from weclip.method.classes import SCENES
from weclip.data.pictures import read_mask
from weclip.data.voc import open_data
from weclip.world.scenes import STREAMS, draw_split, write_scenes

def test_a_folder_is_drawn_once_and_drawn_alike(tmp_path):
    a = write_scenes(tmp_path/"a", train=4, val=2, workers=1)
    stamp = {p: p.stat().st_mtime_ns for p in a.rglob("*.png")}
    assert write_scenes(a, train=4, val=2, workers=1) == a and {p: p.stat().st_mtime_ns for p in a.rglob("*.png")} == stamp
    b = write_scenes(tmp_path/"b", train=4, val=2, workers=2)
    for p in a.rglob("*.*"):
        assert p.read_bytes() == (b/p.relative_to(a)).read_bytes(), p

def test_other_settings_are_drawn_anew(tmp_path):
    write_scenes(tmp_path/"a", train=2, val=1, workers=1)
    write_scenes(tmp_path/"a", train=3, val=1, workers=1)
    assert len(open_data(tmp_path/"a", "train", SCENES.classes)) == 3

def test_splits_share_no_picture():
    first = {s: draw_split(s, 0) for s in STREAMS}
    for a in first:
        for b in first:
            assert a == b or first[a].img.shape != first[b].img.shape or not np.array_equal(first[a].img, first[b].img)

def test_tags_are_what_the_mask_shows(tmp_path):
    root = write_scenes(tmp_path/"a", train=12, val=1, workers=1)
    tags = json.loads((root/"ImageSets/Segmentation/tags.json").read_text())
    for name, t in tags.items():
        mask = read_mask(root/"SegmentationClassAug"/f"{name}.png", 8)
        assert mask.shape == np.asarray(Image.open(root/"JPEGImages"/f"{name}.jpg")).shape[:2]
        assert t == [SCENES.classes[i - 1] for i in np.unique(mask) if i]

def test_canvases_vary():
    sizes = {draw_split("train", i).lbl.shape for i in range(8)}
    assert len(sizes) > 4 and all(128 <= n <= 176 for s in sizes for n in s)
