"""The built-in data: reproducible, split without overlap, and laid out as VOC2012."""
import json
from itertools import combinations

import numpy as np
from PIL import Image
from weclip.method.classes import SCENES
from weclip.data.pictures import read_mask
from weclip.data.voc import open_data
from weclip.world.scenes import STREAMS, draw_split, write_scenes

def test_a_folder_is_drawn_once_and_drawn_alike(tmp_path):
    first = write_scenes(tmp_path/"a", train=4, val=2, workers=1)
    def written(): return {p: p.stat().st_mtime_ns for p in first.rglob("*.png")}
    before = written()
    assert write_scenes(first, train=4, val=2, workers=1) == first and written() == before
    second = write_scenes(tmp_path/"b", train=4, val=2, workers=2)
    files = {p.relative_to(first) for p in first.rglob("*.*")}
    assert files == {p.relative_to(second) for p in second.rglob("*.*")}
    assert not [p for p in files if (first/p).read_bytes() != (second/p).read_bytes()]
    write_scenes(first, train=3, val=1, workers=1)
    assert len(open_data(first, "train", SCENES.classes)) == 3  # other settings are drawn anew

def test_splits_share_no_picture():
    first = {split: draw_split(split, 0).img for split in STREAMS}
    assert not [(a, b) for a, b in combinations(STREAMS, 2) if np.array_equal(first[a], first[b])]

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
