"""From a model to masks people use: exact round trips, real file kinds, bounded memory, the front door, the page."""
import gc, io, json, os, shutil, socket, sys, tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
import torch.nn.functional as F
from PIL import Image

import weclip
from weclip.data import viz
from weclip.method.config import preset
from weclip.method.classes import ClassSet
from weclip.world.scenes import draw_scene
from weclip.use.outputs import FORMATS, coco_annotations, geojson, polygons, writer
from weclip.engine.weights import load_model
from weclip.use.hub import save_pretrained
from weclip.use.segmentation import (
    SHIPPED, Segmentation, cached_model, open_checkpoint, predict, predict_many, read_ahead)
from weclip.cli import main

class Toy(torch.nn.Module):
    "Classes by colour: red, blue, neither."
    patch = 8
    classes = ClassSet("toy", ("red", "blue"), ("red", "blue"))
    def __init__(self, **settings):
        super().__init__()
        self.cfg = preset("voc", **{"long_side": 0, "scales": (1.,), **settings})
        self.conv = torch.nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[0., 0, 0], [4, 0, -4], [-4, 0, 4]])[..., None, None])
            self.conv.bias.copy_(torch.tensor([1., 0, 0]))
    def logits(self, img): return self.conv(F.avg_pool2d(img, self.patch))

# ---- one mask, three forms; the tolerance is none: every pixel comes back

def masks():
    "Masks with what breaks outlines and run lengths."
    def put(hw, *spots):
        m = np.zeros(hw, np.uint8)
        for where, v in spots:
            m[where] = v
        return m
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:60, :80]
    r = np.hypot(y - 30, x - 40)
    return dict(
        empty=put((5, 7)),
        full=put((4, 6), (np.s_[:], 2)),
        one_pixel_picture=put((1, 1), (np.s_[:], 1)),
        row=put((1, 9), (np.s_[0, 2:5], 1)),
        column=put((9, 1), (np.s_[8, 0], 1)),
        single_pixels=put((6, 6), ((2, 3), 1), ((0, 0), 1), ((5, 5), 2), ((0, 5), 2)),
        border=put((8, 9), (np.s_[[0, -1]], 1), (np.s_[:, [0, -1]], 1)),
        hole=put((9, 9), (np.s_[1:8, 1:8], 1), (np.s_[3:5, 3:6], 0)),
        island=put((11, 11), (np.s_[1:10, 1:10], 1), (np.s_[3:8, 3:8], 0), (np.s_[5, 5], 1)),
        filled_hole=put((9, 9), (np.s_[1:8, 1:8], 1), (np.s_[3:6, 3:6], 2)),
        open_ring=put((3, 3), (np.s_[:], 1), ((1, 1), 0), ((2, 2), 0)),
        holes_that_touch=put((6, 6), (np.s_[:], 1), ((2, 2), 0), ((3, 3), 0)),
        checkers=((y + x) % 2 + 1).astype(np.uint8)[:13, :14],
        noise=(rng.random((37, 53)) < .5).astype(np.uint8),
        three=rng.integers(0, 3, (40, 31)).astype(np.uint8),
        rings=(r.astype(int) // 5 % 3).astype(np.uint8),
        scene=draw_scene(5).lbl % 3)

MASKS = masks()

def seg_of(ids): return Segmentation(np.zeros((*ids.shape, 3), np.uint8), ids, ("background", "red", "blue"))

def from_runs(seg, rle):
    "Ids put together from COCO's run lengths; areas and boxes are looked at on the way."
    ids = np.zeros(seg.shape, np.uint8)
    for row in coco_annotations(seg, 1):
        mask = rle.decode(row["segmentation"]).astype(bool)
        y, x = np.nonzero(mask)
        assert row["area"] == mask.sum()
        assert row["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
        ids[mask] = row["category_id"]
    return ids

def from_outlines(seg, shapely):
    "Ids put together from outlines, as shapely reads them; they have to be valid, and wound as RFC 7946 says."
    ids = np.zeros(seg.shape, np.uint8)
    y, x = np.mgrid[:seg.shape[0], :seg.shape[1]] + .5
    for f in json.loads(json.dumps(geojson(seg)))["features"]:
        shape = shapely.geometry.shape(f["geometry"])
        about = f["properties"]
        assert shape.is_valid and shape.area == about["pixels"] == (seg == about["id"]).sum()
        assert all(p.exterior.is_ccw and not any(h.is_ccw for h in p.interiors) for p in shape.geoms)
        ids[shapely.contains_xy(shape, x, y)] = about["id"]
    return ids

def test_png_run_lengths_and_outlines_hold_the_same_mask(tmp_path):
    rle = pytest.importorskip("pycocotools.mask")
    shapely = pytest.importorskip("shapely")
    bad = []
    for name, ids in MASKS.items():
        seg = seg_of(ids)
        seg.save(tmp_path/f"{name}.png")
        try:
            png = np.asarray(Image.open(tmp_path/f"{name}.png"))
            forms = dict(png=png, runs=from_runs(seg, rle), outlines=from_outlines(seg, shapely))
            assert not [form for form, back in forms.items() if not np.array_equal(back, ids)]
        except AssertionError as e:
            bad.append(f"{name}: {e}")
    assert not bad, bad

def test_outlines_know_their_holes():
    assert [len(p) for p in polygons(MASKS["hole"] == 1)] == [2]
    assert [len(p) for p in polygons(MASKS["holes_that_touch"] == 1)] == [3]  # two holes that share a corner
    assert sorted(len(p) for p in polygons(MASKS["island"] == 1)) == [1, 2]  # the island is a polygon of its own
    assert all(a != b for p in polygons(MASKS["noise"] == 1) for r in p for a, b in zip(r, r[1:]))

def test_a_large_mask_costs_its_box():
    mask = np.zeros((6000, 8000), bool)
    mask[5990:5995, 7000:7010] = True
    polygons(mask[:9, :9])
    tracemalloc.start()
    found = polygons(mask)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [[[[7000, 5990], [7010, 5990], [7010, 5995], [7000, 5995], [7000, 5990]]]] and peak < 1e6

def test_ids_without_names_are_refused():
    with pytest.raises(ValueError, match="one per name"):
        seg_of(np.full((2, 2), 3, np.uint8))
    with pytest.raises(ValueError, match="as the picture"):
        Segmentation(np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2), np.uint8), ("a",))

def test_ignored_pixels_are_in_no_form():
    seg = seg_of(np.array([[255, 1], [0, 255]], np.uint8))
    assert seg.shares() == {"background": .25, "red": .25}
    assert "255" not in seg._repr_html_().split("base64")[-1][-200:]
    assert [f["properties"]["id"] for f in geojson(seg)["features"]] == [1]
    assert [row["category_id"] for row in coco_annotations(seg, 1)] == [1]

def test_coco_evaluation_finds_what_it_is_given(tmp_path, capsys):
    "pycocotools as a stranger uses it: the file as truth, its rows as results."
    coco_api = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    logits = torch.randn(3, 5, 5, generator=torch.manual_seed(0))
    names = ("background", "red", "blue")
    with writer(tmp_path, names, ("coco",)) as write:
        for name, ids in MASKS.items():
            seg = Segmentation(np.zeros((*ids.shape, 3), np.uint8), ids, names, None, logits)
            write(f"photos/{name}.jpg", seg)
    truth = coco_api.COCO(str(tmp_path/"coco.json"))
    assert [c["name"] for c in truth.dataset["categories"]] == ["red", "blue"]
    sizes = {i["file_name"]: (i["height"], i["width"]) for i in truth.dataset["images"]}
    assert sizes == {f"photos/{name}.jpg": ids.shape for name, ids in MASKS.items()}
    rows = truth.dataset["annotations"]
    assert [r["id"] for r in rows] == [*range(1, len(rows) + 1)] and all(0 < r["score"] <= 1 for r in rows)
    e = evaluation.COCOeval(truth, truth.loadRes(rows), "segm")
    e.evaluate()
    e.accumulate()
    e.summarize()
    assert e.stats[0] == 1.

# ---- the command on files as people have them

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    "Landscape, portrait, grey, turned by its EXIF flag, one pixel, transparent, and two that are no pictures."
    d = tmp_path_factory.mktemp("photos")
    scene = Image.fromarray(draw_scene(0, (96, 160)).img)
    scene.save(d/"landscape.jpg")
    scene.transpose(Image.Transpose.ROTATE_90).save(d/"portrait.png")
    scene.convert("L").save(d/"grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    scene.save(d/"turned.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(d/"pixel.bmp")
    Image.new("RGBA", (50, 40), (200, 0, 0, 100)).save(d/"glass.webp")
    (d/"broken.jpg").write_bytes((d/"landscape.jpg").read_bytes()[:300])
    (d/"text.png").write_text("no picture")
    return d

SIZES = dict(landscape=(96, 160), portrait=(160, 96), grey=(96, 160), turned=(160, 96), pixel=(1, 1), glass=(40, 50))

@pytest.fixture(scope="module")
def everything(photos, tmp_path_factory):
    "All formats of all photos, their names on standard input."
    out = tmp_path_factory.mktemp("masks")
    old = sys.stdin
    sys.stdin = io.StringIO("".join(f"{p}\n" for p in sorted(photos.iterdir())))
    try:
        every = ["--format", *FORMATS, "--confidence", "--no-crf", "--device", "cpu", "--batch", "3"]
        return out, main(["predict", "-", "--out", str(out), *every])
    finally:
        sys.stdin = old

def test_unreadable_files_are_skipped_and_told(photos, everything, capsys):
    assert everything[1] == 1
    assert sorted(p.stem for p in everything[0].glob("*.png")) == sorted(SIZES)
    two = [str(photos/"broken.jpg"), str(photos/"pixel.bmp")]
    assert main(["predict", *two, "--out", str(everything[0]/"again"), "--no-crf", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert "skipped" in err and "broken.jpg" in err and "Traceback" not in err

def check_files_of(stem, photos, out):
    "What was written for one photograph: upright, of its size, and what `predict` says."
    seg = predict(next(photos.glob(f"{stem}.*")), cached_model(), crf=False)
    mask, sure = (np.asarray(Image.open(out/d/f"{stem}.png")) for d in ("", "confidence"))
    assert mask.shape == sure.shape == seg.shape == SIZES[stem] and sure.dtype == np.uint8
    assert (mask != seg.ids).mean() < 1e-3  # batches of 3 against one by one
    assert np.abs(sure - 255*seg.confidence).max() < .51
    assert json.loads((out/"polygons"/f"{stem}.geojson").read_text())["width"] == SIZES[stem][1]
    with Image.open(out/"overlay"/f"{stem}.jpg") as im:
        assert im.width > SIZES[stem][1] and im.height >= SIZES[stem][0]

def test_masks_are_upright_and_of_the_pictures_size(photos, everything):
    bad = []
    for stem in SIZES:
        try:
            check_files_of(stem, photos, everything[0])
        except AssertionError as e:
            bad.append(f"{stem}: {e}")
    assert not bad, bad

def test_coco_file_agrees_with_the_masks(everything):
    rle = pytest.importorskip("pycocotools.mask")
    doc = json.loads((everything[0]/"coco.json").read_text())
    assert {Path(i["file_name"]).stem: (i["height"], i["width"]) for i in doc["images"]} == SIZES
    for i in doc["images"]:
        ids = np.zeros((i["height"], i["width"]), np.uint8)
        mask = np.asarray(Image.open(everything[0]/f"{Path(i['file_name']).stem}.png"))
        for row in doc["annotations"]:
            if row["image_id"] == i["id"]:
                ids[rle.decode(row["segmentation"]).astype(bool)] = row["category_id"]
        assert np.array_equal(ids, mask)

def test_mistakes_on_standard_input(monkeypatch, capsys, tmp_path):
    bad = []
    for stdin, says in (("", "got none"), ("\n\n", "got none"), ("nowhere.jpg\n", "nowhere.jpg")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main(["predict", "-", "--out", str(tmp_path)])
        err = capsys.readouterr().err
        if status != 2 or says not in err or "Traceback" in err or list(tmp_path.iterdir()):
            bad.append((stdin, status, err))
    assert not bad, bad

def test_a_picture_is_never_overwritten_by_its_mask(photos, tmp_path, capsys):
    shutil.copy(photos/"portrait.png", tmp_path)
    before = (tmp_path/"portrait.png").read_bytes()
    for picture, says in ((tmp_path, "among the pictures"), (tmp_path/"portrait.png", "would overwrite")):
        assert main(["predict", str(picture), "--out", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err and (tmp_path/"portrait.png").read_bytes() == before

def test_a_tree_keeps_its_shape_and_can_be_given_twice(photos, tmp_path, capsys):
    "Equal names in different sub-folders; masks inside the tree, which a second run must not take for pictures."
    names = ("a/1.jpg", "a/b/1.jpg", "c/1.jpg")
    for n in names:
        (tmp_path/n).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos/"pixel.bmp", tmp_path/n)
    out = tmp_path/"a"/"masks"
    args = ["--no-crf", "--device", "cpu", "--format", *FORMATS, "--confidence"]
    for _ in range(2):
        assert main(["predict", str(tmp_path), "--out", str(out), *args]) == 0
        assert "3 masks" in capsys.readouterr().out
        written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
        kinds = (("", "png"), ("overlay/", "jpg"), ("polygons/", "geojson"), ("confidence/", "png"))
        assert written == {"coco.json", *(f"{d}{n[:-4]}.{suffix}" for n in names for d, suffix in kinds)}
    assert sorted(i["file_name"] for i in json.loads((out/"coco.json").read_text())["images"]) == sorted(names)
    (tmp_path/"a"/"1.png").write_bytes(b"")
    assert main(["predict", str(tmp_path), "--out", str(out), *args]) == 2
    assert "both masks would be a/1.png" in capsys.readouterr().err

def test_without_pycocotools(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    args = ["predict", str(photos/"pixel.bmp"), "--out", str(tmp_path), "--format", "coco", "--device", "cpu"]
    assert main(args) == 2
    assert "pip install 'weclip[data]'" in capsys.readouterr().err and not list(tmp_path.iterdir())

# ---- batches

def test_batches_by_shape_equal_one_by_one():
    model = cached_model(device="cpu")
    sizes = [(128, 144), (144, 128), (128, 144), (128, 144), (144, 128)]
    samples = [(i, draw_scene(i, size).img) for i, size in enumerate(sizes)]
    calls = []
    real = model.logits
    one = list(predict_many(samples, model, crf=False))
    try:
        def counted(img):
            calls.append(len(img))
            return real(img)
        model.logits = counted
        many = list(predict_many(samples, model, crf=False, batch=5))
    finally:
        del model.logits
    views = 2 if model.cfg.tta_flip else 1
    assert sorted(calls) == sorted([views*3, views*2]*len(model.cfg.scales))
    for (k, a), (j, b) in zip(one, many):
        assert k == j and (a != b).mean() < 1e-3
        torch.testing.assert_close(a.logits, b.logits, atol=1e-4*float(a.logits.abs().max()), rtol=0)

# ---- programs on pictures smaller than a patch; letters of all alphabets

def small_model():
    "Two of the encoder's blocks and one layer: every operation of the program, a sixth of the time to follow it."
    from weclip.engine.weights import build
    return build("tiny", preset("scenes", n_feats=2, d=16, layers=1, heads=2, long_side=0)).eval()

def test_an_onnx_program_takes_a_picture_smaller_than_a_patch(tmp_path):
    "ONNX Runtime said: Scale value should be greater than 0. From one patch on, nothing changes."
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason="ONNX needs the onnx extra")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX needs the onnx extra")
    from weclip.use.export import Predictor, export
    model = small_model()
    export(model, tmp_path/"m.onnx")
    session = runtime.InferenceSession(str(tmp_path/"m.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["weclip"])["least_side"] == 1
    rng = np.random.default_rng(0)
    as_it_is = Predictor(model)  # nothing is enlarged
    bad = []
    for h, w in ((1, 1), (3, 5), (2, 40), (33, 7), (8, 8), (8, 21), (50, 70)):
        photo = rng.integers(0, 256, (2, h, w, 3), dtype=np.uint8)
        logits, mask = session.run(None, dict(img=photo))
        want = predict(photo[0], model, scales=(1.,), flip=False, crf=False)
        if logits.shape[2:] != (max(1, h//8), max(1, w//8)) or (mask[0] == want).mean() <= .99:
            bad.append((h, w))
        if min(h, w) < 8: continue
        with torch.no_grad():
            plain, ids = (x.numpy() for x in as_it_is(torch.from_numpy(photo)))
        if np.abs(logits - plain).max() > 1e-5*np.abs(plain).max() or (mask == ids).mean() < .999:
            bad.append((h, w, "is changed"))
    assert not bad, bad

def test_an_archive_says_the_least_side(tmp_path):
    from weclip.use.export import export
    extra = {"weclip.json": ""}
    export(small_model(), tmp_path/"m.pt2")
    program = torch.export.load(tmp_path/"m.pt2", extra_files=extra).module()
    assert json.loads(extra["weclip.json"])["least_side"] == 16
    assert program(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))[1].shape == (1, 16, 16)
    with pytest.raises(AssertionError, match="img.size"):
        program(torch.zeros(1, 15, 16, 3, dtype=torch.uint8))

def strips(names, height=32): return [row[:, height:] for row in np.split(viz.legend(names, height=height), len(names))]

def test_legends_show_letters_not_boxes(caplog):
    "é, Ł and 猫 were one and the same box."
    names = ["é", "Ł", "Ж", "Ω", "ñ", "ő"]
    rows = strips(names)
    assert len({r.tobytes() for r in rows}) == len(names)
    assert all((r < 128).any() for r in rows) and not caplog.records
    accent, plain = strips(["cafe\u0301", "caf\xe9"])
    assert np.array_equal(accent, plain)

def test_letters_that_no_font_has_are_told_once_and_told_apart(monkeypatch, caplog, tmp_path):
    import warnings
    monkeypatch.setattr(viz, "_font_with", lambda letters: None)
    monkeypatch.setattr(viz, "_missing", set())
    viz.lettering("猫")
    cat, dog = strips(["猫", "犬"])
    assert not np.array_equal(cat, dog)
    for _ in range(3):
        viz.save_sheet(tmp_path/"sheet.png", {"猫": [np.zeros((9, 9, 3), np.uint8)]}, ["犬\n1"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            viz.quantise(viz.show_grid([[np.zeros((9, 9, 3), np.uint8)]], ["猫: 犬"], ["é\n猫"]))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 2 and "no font here has 猫" in said[0] and "犬" in said[1] and "Noto" in said[0]
    assert viz.lettering("猫 1") == (viz._dejavu(), "\\u732b 1") and viz.lettering("\udce9\n")[1] == "\\udce9\\n"

def test_a_font_of_the_machine_is_taken_where_one_has_the_letters(monkeypatch):
    "Here Matplotlib's STIX plays the font of another alphabet; one that draws boxes for everything is passed over."
    from matplotlib import font_manager
    stix = next(f.fname for f in font_manager.fontManager.ttflist if f.fname.endswith("STIXGeneral.ttf"))
    only = next(iter(viz._letters(stix) - viz._letters(viz._dejavu()) - set(range(0xE000, 0xF900))))
    path, text = viz.lettering(chr(only))
    assert path not in (None, viz._dejavu()) and text == chr(only) and "LastResort" not in path
    assert (strips([chr(only)])[0] < 128).any()

# ---- memory

def resident(): return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")

def memory_over(n, out, keep=None):
    "Pictures seen, traced bytes and resident bytes, every 20 pictures of a stream through every writer."
    files = [out/f"{i}.png" for i in range(n)]
    rng = np.random.default_rng(0)
    rows = []
    for f in files[:8]:
        Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(f)
    samples = ((i, image) for i, (_, image) in enumerate(read_ahead((files[i % 8] for i in range(n)), [])))
    gc.collect()
    gc.freeze()  # what was there before is not looked through again, which took most of the time
    tracemalloc.start()
    with writer(out/"masks", Toy.classes.names, FORMATS, with_confidence=True) as write:
        for i, seg in predict_many(samples, Toy(), crf=False, batch=4):
            write(f"{i % 8}.png", seg)
            if keep is not None:
                keep.append(seg)
            if i % 20 == 19:
                gc.collect()
                rows.append((i, tracemalloc.get_traced_memory()[0], resident()))
    tracemalloc.stop()
    gc.unfreeze()
    return np.array(rows).T

@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    "The slope after a warm-up, in bytes per picture; a picture with its mask and confidence is 10 kB."
    def slope(n, seen): return np.polyfit(n, seen, 1)[0]
    n, traced, in_use = memory_over(260, tmp_path)[:, 3:]
    assert slope(n, traced) < 300 and slope(n, in_use) < 3000, (slope(n, traced), slope(n, in_use))
    doc = json.loads((tmp_path/"masks"/"coco.json").read_text())
    assert len(doc["images"]) == 260 and len(doc["annotations"]) >= 260
    n, traced, _ = memory_over(80, tmp_path, keep=[])
    assert slope(n, traced) > 3000  # what a stream that forgets nothing would show

def test_reading_ahead_is_bounded(tmp_path):
    asked = []
    for i in range(9):
        Image.new("RGB", (2, 2)).save(tmp_path/f"{i}.png")
    def files():
        for i in range(9):
            asked.append(i)
            yield tmp_path/f"{i}.png"
    pictures = read_ahead(files(), [], ahead=3)
    for n in range(5):
        next(pictures)
        assert len(asked) <= n + 4
    pictures.close()
    assert len(asked) <= 8

# ---- the front door

def test_front_door():
    assert weclip.predict is predict and weclip.Segmentation is Segmentation
    assert {"predict", "Segmentation"} <= set(dir(weclip))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(weclip, "nothing")  # noqa: B009
    with pytest.raises(ImportError):
        from weclip import nothing  # noqa: F401

def test_predict_takes_every_kind_of_picture(tmp_path):
    scene = draw_scene(2)
    Image.fromarray(scene.img).save(tmp_path/"scene.png")
    file = tmp_path/"scene.png"
    kinds = [weclip.predict(x, crf=False) for x in (scene.img, Image.fromarray(scene.img), file, str(file))]
    want = predict(scene.img, cached_model(), crf=False)
    for seg in kinds:
        assert np.array_equal(seg, want) and np.array_equal(seg.image, scene.img)
    toy = weclip.predict(np.full((9, 30, 3), (200, 0, 0), np.uint8), Toy(), crf=False)
    assert (toy == 1).all() and toy.names == ("background", "red", "blue") and toy.confidence.min() > .9

def test_a_model_is_read_once_until_its_file_changes(tmp_path):
    shutil.copy(SHIPPED, tmp_path/"model.safetensors")
    first = cached_model(tmp_path/"model.safetensors")
    assert cached_model(str(tmp_path/"model.safetensors")) is first
    os.utime(tmp_path/"model.safetensors", (1, 1))
    assert cached_model(tmp_path/"model.safetensors") is not first

def test_a_folder_of_a_model_is_read_again_when_it_has_changed(tmp_path):
    model = load_model(SHIPPED)
    save_pretrained(model, tmp_path/"mine")
    first = cached_model(tmp_path/"mine")
    assert cached_model(tmp_path/"mine") is first
    for p in model.decoder.parameters():
        p.data.mul_(.5)
    save_pretrained(model, tmp_path/"mine")
    again = cached_model(tmp_path/"mine")
    assert again is not first and not learnt(again).equal(learnt(first)) and learnt(again).equal(learnt(model))

def learnt(model): return torch.cat([p.detach().flatten().cpu() for p in model.decoder.parameters()])

def test_authors_checkpoints_have_one_architecture():
    for other, says in ((dict(arch="ViT-L-14"), "expected ViT-B-16-quickgelu for a checkpoint of the authors"),
                        (dict(second_weights="second.pt"), "load_released_plus")):
        with pytest.raises(ValueError, match=says):
            open_checkpoint("theirs.pth", **other)

def test_drawn_scenes_with_the_shipped_decoder():
    "One object each; the shipped decoder finds it and names it."
    def iou(seed):
        scene = draw_scene(seed)
        ids = np.asarray(weclip.predict(scene.img, crf=False))
        return ((ids == scene.lbl) & (scene.lbl > 0)).sum()/((ids > 0) | (scene.lbl > 0)).sum()
    assert np.mean([iou(s) for s in (2, 3, 4, 6, 9, 10, 11)]) > .5

def test_a_mask_is_an_array():
    seg = seg_of(MASKS["three"])
    ids = MASKS["three"]
    assert np.array_equal(seg + 1, ids + 1) and np.array_equal(seg == 2, ids == 2) and ((2 == seg) == (ids == 2)).all()
    assert np.array_equal(np.asarray(seg, np.int64), ids) and np.array_equal(seg[5:9, ::2], ids[5:9, ::2])
    assert len(seg) == len(ids) and np.array_equal(np.bincount(np.ravel(seg)), np.bincount(ids.ravel()))
    assert (seg == seg).all() and np.mean(seg) == ids.mean()

def test_pillow_and_torch_take_it_for_its_ids():
    "`Image.fromarray(seg)` raised TypeError, as it asks an array without strides for its buffer."
    orders = dict(
        rows=np.array([[0, 1, 1], [0, 0, 2]], np.uint8),
        columns=np.asfortranarray([[0, 1], [1, 2]]).astype(np.uint8, order="F"),
        backwards=np.arange(3, dtype=np.uint8)[None, ::-1])
    bad = []
    for order, ids in orders.items():
        seg = seg_of(ids)
        picture = Image.fromarray(seg)
        same = (picture.mode == "L", np.array_equal(np.asarray(picture), ids), np.array_equal(np.asarray(seg), ids),
                torch.as_tensor(np.ascontiguousarray(seg)).tolist() == ids.tolist(),
                np.shares_memory(np.asarray(seg), ids))
        if not all(same):
            bad.append((order, same))
    assert not bad, bad

def test_jupyter_shows_names_as_text():
    ids = np.array([[0, 1]], np.uint8)
    html = Segmentation(np.zeros((1, 2, 3), np.uint8), ids, ("background", '<img src="http://x">'))._repr_html_()
    assert "&lt;img" in html and "http://x" in html and html.count("<img ") == 2 and 'src="http' not in html
    png = Image.open(io.BytesIO(seg_of(MASKS["rings"])._repr_png_()))
    assert png.format == "PNG" and png.width > 2*80
    assert "IPython" not in Path(sys.modules["weclip.use.segmentation"].__file__).read_text()

def test_large_pictures_are_shown_small():
    big = Segmentation(np.zeros((1500, 3000, 3), np.uint8), np.zeros((1500, 3000), np.uint8), ("background",))
    assert len(big._repr_html_()) < 50_000
    assert Image.open(io.BytesIO(big._repr_png_())).width < 900

# ---- the page

def test_what_the_page_shows_of_a_picture(tmp_path):
    "Without Gradio: CAMs and pseudo label need tags, the prediction does not; large pictures are computed small."
    from weclip.use.app import SIDE, answer, examples
    model = cached_model(device="cpu")
    (path, tags), *others = examples(tmp_path)
    assert len(others) == 3 and all(Path(p).is_file() and set(t) <= set(model.classes.classes) and t for p, t in others)
    cam, refined, pseudo, key, predicted, names = answer(model, path, tags)
    image = np.asarray(Image.open(path))
    want = predict(image, model)
    assert cam.shape == refined.shape == image.shape and not np.array_equal(cam, refined)
    assert np.array_equal(predicted, want.overlay()) and not np.array_equal(pseudo, predicted)
    assert all(t in key for t in tags) and "background" in names
    untagged = answer(model, path)
    assert untagged[:4] == (None, None, None, "") and np.array_equal(untagged[4], predicted)
    with pytest.raises(ValueError, match="unicorn"):
        answer(model, path, ["unicorn"])
    Image.fromarray(image).resize((SIDE + 100, 64)).save(tmp_path/"wide.png")
    assert answer(model, tmp_path/"wide.png")[4].shape[1] == SIDE

def test_the_page_shows_a_model_whose_labels_vote(tmp_path, monkeypatch):
    "No regions come with a picture that is dropped: the page ended in an error and showed nothing."
    from weclip.use.app import answer, examples
    model = load_model(SHIPPED)
    path, tags = examples(tmp_path)[0]
    of_par = answer(model, path, tags, crf=False)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)  # --no-crf needs none
    model.cfg = replace(model.cfg, labels="vote", options=(("labels.min_share", .5),))
    voting = model.cfg
    again = answer(model, path, tags, crf=False)
    assert all(np.array_equal(a, b) for a, b in zip(of_par, again)) and model.cfg is voting

@pytest.fixture(scope="module")
def served(tmp_path_factory):
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install '.[app]')")
    patch = pytest.MonkeyPatch()
    patch.setenv("WECLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
    from weclip.use.app import serve
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    blocks = serve(cached_model(device="cpu"), port=port, wait=False)
    yield f"http://127.0.0.1:{port}/", port
    blocks.close()
    patch.undo()

def test_page_answers(served, photos, tmp_path):
    from gradio_client import Client, handle_file
    from weclip.use.app import EXAMPLES, answer
    scene = draw_scene(EXAMPLES[0])
    Image.fromarray(scene.img).save(tmp_path/"scene.png")
    tags = sorted({name for name, _ in scene.objects})
    client = Client(served[0], verbose=False)
    def segment(file, tags=()): return client.predict(handle_file(str(file)), list(tags), api_name="/segment")
    cam, refined, pseudo, key, predicted, names = segment(tmp_path/"scene.png", tags)
    want = answer(cached_model(device="cpu"), tmp_path/"scene.png", tags)
    for path, a in ((cam, want[0]), (refined, want[1]), (pseudo, want[2]), (predicted, want[4])):
        with Image.open(path) as im:
            sent = np.asarray(im.convert("RGB").resize(a.shape[1::-1], 0)).astype(int)  # as WebP
        assert np.abs(sent - a).mean() < 6
    assert (key, names) == (want[3], want[5]) and "background" in key
    assert segment(tmp_path/"scene.png")[:2] == (None, None)
    with Image.open(segment(photos/"turned.jpg")[4]) as im:
        assert im.height > im.width
    half = (photos/"landscape.jpg").read_bytes()
    (tmp_path/"cut.jpg").write_bytes(half[:len(half)//2])
    for file, says in ((tmp_path/"cut.jpg", "cannot be decoded"), (photos/"text.png", "cannot identify")):
        with pytest.raises(Exception, match=says):
            segment(file)

def test_a_taken_port_is_told(served):
    from weclip.use.app import serve
    with pytest.raises(ValueError, match="free port"):
        serve(cached_model(device="cpu"), port=served[1], wait=False)

def test_page_in_a_browser(served, tmp_path):
    "Opened, an example clicked, segmented; nothing asked of any other machine."
    from chrome import Browser
    from weclip.use.app import EXAMPLES
    with Browser() as b:
        b.open(served[0])
        b.until("document.querySelectorAll('tr').length > 2 && document.body.innerText.includes('Segment')")
        b.js("document.querySelectorAll('tr')[1].click()")
        b.until(f"document.querySelectorAll('img[src*=scene{EXAMPLES[0]}]').length > 1")
        b.js("[...document.querySelectorAll('button')].find(e => e.innerText.trim() == 'Segment').click()")
        b.until("/background [0-9.]+%[^]*background [0-9.]+%/.test(document.body.innerText)")
        b.screenshot(tmp_path/"page.png")
        assert Image.open(tmp_path/"page.png").convert("RGB").getcolors(256) is None
        assert b.js("document.documentElement.scrollWidth <= innerWidth")
        hosts = {u.split("/")[2] for u in b.requests() if u.startswith("http")}
        assert not b.errors() and hosts == {f"127.0.0.1:{served[1]}"}
