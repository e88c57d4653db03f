"""Somebody's own pictures: every form of tags, every way to get them wrong, and the commands that read them."""
import inspect, json, logging, os, random, re, unicodedata
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from refusals import check_all, not_refused
from weclip.method.classes import SCENES, VOC, ClassSet, voc_palette
from weclip.data.voc import SegData, check_files, get_classes
from weclip.data.own import (
    class_counts, find_images, findings, inside, list_folder, open_images, readable,
    rows_csv, stem, told)
from weclip.world.scenes import write_scenes
from weclip.engine.weights import build, load_backbone, load_model, read_model, save_model, shared_texts, tokens_of
from weclip.use.inspection import _worries_of_class, cam_sheets, inspect_set, survey
from weclip.use.outputs import writer
from weclip.use.segmentation import Segmentation
from weclip.cli import main, read_arguments
from weclip.use.commands import config_of, find_pictures, refuse_overwriting

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
FAST = ["--set", "iters=4", "warmup=2", "d=32", "layers=1", "heads=2", "bs=4", "--device", "cpu"]

def picture(path, h=20, w=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)

def pictures(root, *names):
    for name in names:
        picture(root/f"{name}.jpg")
    return root

@pytest.fixture
def pets(tmp_path):
    "a.jpg, b.png, garden/a.jpg, garden/deep/c.JPEG, beside a secret."
    for name in ("a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG"):
        picture(tmp_path/"pets"/name)
    picture(tmp_path/"secret.jpg")
    return tmp_path/"pets"

def csv(pets, text, name="tags.csv"):
    path = pets.parent/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

def yaml(pets, text): return csv(pets, text, "classes.yaml")

# ---- forms

FORMS = [
    ("file,tags\na.jpg,cat\ngarden/a.jpg,cat;dog\ngarden/deep/c.JPEG,dog\n", "tags.csv"),
    ("garden/deep/c.JPEG,dog\ngarden\\a.jpg, dog ; cat ;\n./a.jpg,cat", "tags.csv"),
    ('\ufeff"file","tags"\r\n"a.jpg","cat"\r\n\r\n"garden/a.jpg","cat;dog"\r\n"garden/deep/c","dog"\r\n', "tags.csv"),
    ("a.jpg;cat\rgarden/a.jpg;cat;dog\rgarden/deep/c.JPEG;dog", "tags.csv"),
    ("Tags\tsplit\tFile\ncat\ttrain\ta.jpg\ncat;dog\tval\tgarden/a.jpg\ndog\ttrain\tgarden/deep/c.JPEG", "tags.tsv"),
    ('{"a.jpg": ["cat"], "garden/a": ["dog", "cat", "dog"], "garden/deep/c.JPEG": ["dog"]}', "tags.json"),
    ('\ufeff{"a": ["cat"], "garden/a.jpg": ["dog"], "garden/a": ["cat"], "garden/deep/c": ["dog"]}', "tags.json")]

def test_forms_agree(pets):
    want = [("a", [0]), ("garden/a", [0, 1]), ("garden/deep/c", [1])]
    wrong = {}
    for text, name in FORMS:
        found = find_images(pets, csv(pets, text, name))
        rest = found.classes.classes, found.images["garden/deep/c"], found.untagged, found.missing
        if list(found.tags.items()) != want or rest != (("cat", "dog"), pets/"garden/deep/c.JPEG", ["b.png"], []):
            wrong[text] = found
    assert not wrong, wrong

def test_folders_are_classes(pets):
    (pets.parent/"flat").mkdir()
    picture(pets.parent/"flat"/"a.jpg")
    with pytest.raises(ValueError, match="sub-folder named after its class"):
        find_images(pets.parent/"flat", "folders")
    for name in ("dog/x/d.jpg", ".thumbs/e.jpg", "dog/._d.jpg"):
        picture(pets/name)
    found = find_images(pets, "folders")
    assert found.tags == {"dog/x/d": [0], "garden/a": [1], "garden/deep/c": [1]}
    assert found.untagged == ["a.jpg", "b.png"]

def test_onehot(pets):
    "Keys that are numbers are those of other repositories' cls_labels.npy: 2007000032 for 2007_000032."
    file = pets.parent/"cls_labels_onehot.npy"
    hot = np.eye(20, dtype=np.float32)
    np.save(file, {"a": hot[7], "nowhere": hot[0]}, allow_pickle=True)
    found = find_images(pets, file, "voc")
    assert found.tags == {"a": [7]} and found.missing == ["nowhere"] and found.classes == VOC
    with pytest.raises(ValueError, match="holds no names"):
        find_images(pets, file)
    with pytest.raises(ValueError, match="expected 80 values"):
        find_images(pets, file, "coco")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_images(pets, pets.parent/"none.npy", "voc")
    for key in (2007000032, np.int32(2007000032)):
        np.save(pets.parent/"cls_labels.npy", {key: hot[7]}, allow_pickle=True)
        with pytest.raises(ValueError, match="cls_labels.npy: .*2007000032.*2007_000032"):
            find_images(pets, pets.parent/"cls_labels.npy", "voc")

def test_data_is_what_a_voc_folder_gives(pets):
    settings = dict(progress=False, crop=16, norm=None)
    data, classes = open_images(pets, {"garden/a.jpg": ["dog"], "a.jpg": ["cat"]}, **settings)
    s = data[1]
    assert (s.id, s.tags, s.mask, tuple(s.img.shape)) == ("garden/a", [1], None, (3, 16, 16))
    assert data.names == classes.classes
    again, _ = open_images(pets, {"a.jpg": ["cat"], "garden/a.jpg": ["dog"]}, **settings)
    assert again.ids == data.ids  # whatever the order of the tags
    assert all(torch.equal(x.img, y.img) for x, y in zip(data, again))

# ---- nothing leaves the folder

ESCAPES = ["../secret.jpg", "garden/../../secret.jpg", "garden/../a.jpg", "..", "..\\secret.jpg", "/etc/hostname",
           "C:\\secret.jpg", "c:secret.jpg", "\\\\host\\share\\a.jpg", "//host/share/a.jpg", "a\0.jpg", "", " ",
           "{top}/secret.jpg", "{top}/pets/a.jpg"]

def test_paths_that_leave_the_folder(pets):
    results = {}
    for bad in (name.format(top=pets.parent) for name in ESCAPES):
        tags = {"a.jpg": ["cat"], bad: ["cat"]}
        results["dict", bad] = not_refused("expected a path below", find_images, pets, tags)
        results["json", bad] = not_refused("expected a path below", find_images, pets,
                                       csv(pets, json.dumps(tags), "tags.json"))
        results["csv", bad] = not_refused("", find_images, pets, csv(pets, f'a.jpg,cat\n"{bad}",cat'))
    check_all(results)

def test_links_that_leave_the_folder(pets):
    "They were refused or passed over, and whole classes with them; who links a folder wants it read."
    (pets/"link.jpg").symlink_to(pets.parent/"secret.jpg")
    (pets/"up").symlink_to(pets.parent)
    (pets/"loop.jpg").symlink_to(pets/"loop.jpg")
    for name in ("link.jpg", "link", "up/secret.jpg"):
        assert len(find_images(pets, {"a.jpg": ["cat"], name: ["cat"]}).images) == 2
    with pytest.raises(ValueError, match="1 of 2 pictures cannot be read: .*loop.jpg"):
        open_images(pets, {"a.jpg": ["cat"], "loop.jpg": ["cat"]}, progress=False)
    # and not the folder again that the link lies in
    assert [n for n in list_folder(pets).files if n.startswith("up/")] == ["up/secret.jpg"]
    picture(pets/"dog"/"d.jpg")
    (pets/"dog"/"out.jpg").symlink_to(pets.parent/"secret.jpg")
    assert find_images(pets, "folders").tags["dog/out"] == find_images(pets, "folders").tags["dog/d"]

def test_links_that_stay(pets):
    (pets/"same.jpg").symlink_to(pets/"a.jpg")
    (pets.parent/"door").symlink_to(pets)
    assert find_images(pets, {"same.jpg": ["cat"]}).tags == {"same": [0]}
    assert find_images(pets.parent/"door", {"a.jpg": ["cat"]}).tags == {"a": [0]}
    assert inside(pets.parent/"door", "garden/a.jpg").is_file()

# ---- misfits

def test_what_does_not_fit_is_counted(pets, caplog):
    rows = ["a.jpg,Cat", "a,dog", "garden/a.jpg,cat", "garden/deep/c.JPEG,cat", "b.png,", "x.jpg,dog", "y/z.jpg,fish"]
    tags = csv(pets, "\n".join(rows))
    found = find_images(pets, tags)
    assert found.classes.classes == ("cat", "dog")  # a fish that is not there makes no class
    assert found.untagged == ["b.png"] and found.missing == ["x.jpg", "y/z.jpg"]
    assert found.twice == ["a.jpg"] and found.respelt == {"Cat": ("cat", 1)}
    with caplog.at_level(logging.WARNING):
        data, _ = open_images(pets, tags, progress=False)
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{tags} for {pets}: {line}" for line in findings(found)] and len(said) == 4
    for part in ("left out: 1 ('b.png')", "not there, left out: 2 ('x.jpg', 'y/z.jpg')",
                 "more than once, tags put together: 1 ('a.jpg')", "'Cat' as 'cat' 1x"):
        assert part in "".join(said)
    assert data.tags["a"] == [0, 1]
    with pytest.raises(ValueError, match=r"\.csv for .*left out: 1 .*left out: 2"):
        open_images(pets, tags, strict=True)
    assert not findings(find_images(pets, {n: ["cat"] for n in list_folder(pets).files}))
    with pytest.raises(FileNotFoundError, match="none of its 2 files.*'train/a.jpg'.*there are 'a.jpg'"):
        find_images(pets, csv(pets, "train/a.jpg,cat\ntrain/b.png,dog"))

def test_spellings_of_a_class(pets):
    tags = {"a.jpg": ["traffic light"], "b.png": ["Traffic  Light"], "garden/a": ["traffic\u00a0light"],
            "garden/deep/c": [" traffic light"]}
    same = find_images(pets, tags)
    assert same.classes.classes == ("traffic light",) and len(same.respelt) == 3
    assert set(same.tags) == {"a", "b", "garden/a", "garden/deep/c"}
    assert find_images(pets, {"a.jpg": ["DOG"]}, "voc").respelt == {"DOG": ("dog", 1)}
    says = "expected tags among the 20 classes, got 'dgo' .1x, nearest: 'dog'., 'unicorn'"
    with pytest.raises(ValueError, match=says):
        find_images(pets, {"a.jpg": ["dgo", "unicorn"]}, "voc")

def test_tags_that_are_no_name(pets):
    "Cells left empty became a class of the pictures that nobody had tagged."
    tags = {"cat,dog": "expected ;", "cat|dog": "expected ;", "background": "not 'background'", "": "printable",
            "a\u200bb": "printable", "a\ud800": "printable"}
    results = {tag: not_refused(says, find_images, pets, {"a.jpg": [tag]}) for tag, says in tags.items()}
    for tag in ("nan", "NaN", "None", "null", "N/A", "<NA>"):
        table = csv(pets, f"file,tags\na.jpg,cat\nb.png,{tag}\n")
        for classes in (None, "voc"):
            results[tag, classes] = not_refused("stands for an empty cell", find_images, pets, table, classes)
    for tag in ("_background_", "__background__", "__ignore__", "_ignore_", "BACKGROUND"):  # of labelling tools
        results[tag] = not_refused("not 'background'", find_images, pets, {"a.jpg": ["cat"], "b.png": [tag]})
        results[tag, "class"] = not_refused("what has no class|differ in more than case", ClassSet, "x", ("cat", tag),
                                        ("cat", "sky"))
    results["['cat']"] = not_refused("cat;dog", find_images, pets, csv(pets, "file,tags\na.jpg,['cat']\n"))
    check_all(results)

def test_two_pictures_of_one_mask(pets):
    picture(pets/"a.png")
    with pytest.raises(ValueError, match="share a mask: a.jpg"):
        find_images(pets, {"a.jpg": ["cat"], "a.png": ["cat"]})
    with pytest.raises(ValueError, match="expected one picture, found a.jpg, a.png"):
        find_images(pets, {"a": ["cat"]})
    assert find_images(pets, {"a.png": ["cat"]}).images["a"] == pets/"a.png"

def test_broken_pictures_are_named_together(pets):
    (pets/"a.jpg").write_bytes((pets/"a.jpg").read_bytes()[:200])
    (pets/"b.png").write_bytes(b"")
    tags = {n: ["cat"] for n in ("a.jpg", "b.png", "garden/a.jpg")}
    with pytest.raises(ValueError, match="2 of 3 pictures cannot be read: .*a.jpg.*b.png"):
        open_images(pets, tags, progress=False)
    assert len(open_images(pets, tags, check=False)[0]) == 3
    check_files(SegData({"x": pets/"garden"/"a.jpg"}, {}, ()), progress=False)

def test_many_classes(pets):
    names = [f"c{i:03}" for i in range(255)]
    assert find_images(pets, {"a.jpg": names[:254]}).classes.n_classes == 255
    with pytest.raises(ValueError, match="at most 254"):
        find_images(pets, {"a.jpg": names})

BROKEN_CSV = {
    "": "empty file",
    "\n \n": "empty file",
    'a.jpg,"cat\nb.png,dog': "quote left open",
    "a.jpg,cat,dog": "line 1: expected 2 columns",
    "file,tags\na.jpg,cat,dog": "line 2: expected 2 columns",
    ",cat": "name of a picture",
    "file,tags": "got none",
    b"caf\xe9.jpg,cat": "UTF-8",
    "a.jpg,cat".encode("utf-16"): "UTF-8",
    "a.jpg,cat\nb.png,dog".encode("utf-16-le"): "UTF-16",  # without its mark
    "file,cat,dog\na.jpg,1,0\nb.png,1,\n": "line 3: expected 0 or 1 in column 'dog'",
    "file,cat,dog\na.jpg,1,-1\nb.png,1,-1\n": "one-hot",
    "a.jpg,1,0\nb.png,0,1": "one-hot table needs a line of headings",
    "file,label\na.jpg,1\nb.png,0": "nothing but numbers",
    "a.jpg,1\nb.png,0": "nothing but numbers",
    "file,label\na.jpg,3\nb.png,17": "need a class list",
    "file,defect\na.jpg,1\nb.png,\n": "nothing but numbers",
    "file,a,b\na.jpg,cat,x\n": "one-hot",
    "image,cat,dog\na.jpg,1,0\nb.jpg,1\n": "line 3 has 2 cells instead of 3"}
BROKEN_JSON = ["", "{", "[]", '"a"', "{}", '{"a.jpg": "cat"}', '{"a.jpg": [1]}', '{"a.jpg": [["cat"]]}',
               '{"a.jpg": {"cat": []}}', "["*50_000, '{"a":'*50_000, "NaN"]

def test_broken_files_of_tags(pets):
    results = {}
    for text, says in BROKEN_CSV.items():
        results[text] = not_refused(says, find_images, pets, csv(pets, text))
    for text in BROKEN_JSON:
        results["json", text[:30]] = not_refused("tags.json", find_images, pets, csv(pets, text, "tags.json"))
    check_all(results)

def test_no_file_no_folder(pets):
    with pytest.raises(FileNotFoundError, match="none.csv: expected a file of tags"):
        find_images(pets, pets/"none.csv")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_images(pets/"cats", {"a.jpg": ["cat"]})
    (pets.parent/"empty").mkdir()
    with pytest.raises(FileNotFoundError, match="found none"):
        find_images(pets.parent/"empty", {"a.jpg": ["cat"]})
    with pytest.raises(ValueError, match="ending in .csv"):
        find_images(pets, pets/"tags.xlsx")
    with pytest.raises(FileNotFoundError):
        find_images(pets, pets/"tags.csv")
    (pets.parent/"empty"/"a.heic").touch()
    with pytest.raises(FileNotFoundError, match="found none; there are pictures in formats.*a.heic"):
        find_pictures([pets.parent/"empty"])

# ---- mutated files: an error or a result, and never a picture from outside

BASE = {
    "tags.csv": b'file,tags\na.jpg,cat\n"garden/a.jpg","cat;dog"\ngarden/deep/c.JPEG, dog ;cat\nb.png,\n./a.jpg,DOG\n',
    "tags.json": b'{"a.jpg": ["cat"], "garden/a.jpg": ["cat", "dog"], "garden/deep/c": [" Dog"], "b.png": []}',
    "classes.yaml": b'name: pets\ntemplate: "a photo of a {}."\nclasses:\n'
                    b'- {name: cat, prompt: [cat, kitten], colour: "#ff8000"}\n- {name: dog, colour: [0, 0, 255]}\n'
                    b'- bird\nbackground: [grass, sky]\n'}
PIECES = [b",", b";", b"\t", b'"', b"\n", b"\r", b"..", b"/", b"\\", b"../secret.jpg", b"C:", b"\0", b"\xff",
          b"\xef\xbb\xbf", "é".encode(), "\u200b".encode(), b"{", b"}", b"[", b"]", b":", b"#", b"&x ", b"*x",
          b"!!python/object:os.system ", b"null", b"1e999", b"\\ud800", b"background", b"9"*50, b"cat", b"file",
          b"- ", b"? ", b"|", b"x"*300]

def mutated(data, rng):
    "One to three small edits of some bytes."
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.choices(range(len(data) + 1), k=2))
        piece = rng.choice(PIECES)
        match rng.randrange(5):
            case 0:
                data[i:i] = piece
            case 1:
                del data[i:min(j, i + 8)]
            case 2:
                data[i:i + len(piece)] = piece
            case 3:
                data[i:i] = data[i:j]
            case 4 if data:
                data[i % len(data)] = rng.randrange(256)
    return bytes(data)

def is_sound(found, home):
    "Has every picture tags that are classes, and lies inside?"
    lie_inside = all(os.path.realpath(p).startswith(home + os.sep) for p in found.images.values())
    ids = set(range(len(found.classes.classes)))
    has_tags = all(t and set(t) <= ids for t in found.tags.values())
    return bool(found.images) and set(found.images) == set(found.tags) and lie_inside and has_tags

@pytest.mark.parametrize("name", BASE)
def test_mutated_files(pets, name):
    rng = random.Random(5)
    n_results = 0
    wrong = []
    tags = csv(pets, BASE["tags.csv"])
    home = os.path.realpath(pets)
    for _ in range(300):
        text = mutated(BASE[name], rng)
        path = csv(pets, text, name)
        try:
            found = find_images(pets, tags, path) if name == "classes.yaml" else find_images(pets, path)
        except (ValueError, FileNotFoundError) as e:
            str(e).encode()  # a message that can be printed
        else:
            n_results += 1
            findings(found)
            found.classes.palette()
            if not is_sound(found, home):
                wrong.append(text)
    assert not wrong, wrong
    assert 10 <= n_results <= 290  # the mutations reach both ends

# ---- nothing is lost without a word

KINDS = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO", ".avif": "AVIF", ".gif": "GIF", ".ppm": "PPM",
         ".jp2": "JPEG2000", ".tga": "TGA", ".JPG": "JPEG"}

def test_every_format_of_pillow_is_read(tmp_path):
    "Only seven suffixes were; a folder of .jfif vanished from predict and training alike."
    Image.init()
    wrong = []
    for suffix, kind in KINDS.items():
        if kind not in Image.SAVE: continue  # this Pillow writes none
        top = tmp_path/suffix[1:]
        (top/"cat").mkdir(parents=True)
        Image.new("RGB", (20, 16), "red").save(top/"cat"/f"a{suffix}", kind)
        data, classes = open_images(top, "folders", strict=True, progress=False)
        names = list(find_pictures([top]).values())
        got = data.ids, classes.classes, names, data.read("cat/a")[0].shape
        if got != (["cat/a"], ("cat",), [f"cat/a{suffix}"], (16, 20, 3)):
            wrong.append((suffix, got))
    assert not wrong, wrong
    # and what is no picture is not opened as one
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".h5", ".grib", ".txt"} & set(readable())
    assert {".jpg", ".tif", ".png", ".webp"} <= set(readable())
    absent = sorted(set(KINDS.values()) - set(Image.SAVE))
    if absent:
        pytest.skip(f"this Pillow writes no {', '.join(absent)}; all others are read")

def test_names_without_suffix_are_recognised_by_content(tmp_path):
    "Cameras' and scrapers' names: none, a number, a date with a blank behind the dot."
    for name in ("IMG_1", "scan.003", "2024.05 cat"):
        Image.new("RGB", (20, 16)).save(tmp_path/name, "PNG")
    for name in ("README", "LICENSE.2"):
        (tmp_path/name).write_text("P5 words that are no picture")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path/"pipe.d")  # opening it would wait for ever
    listing = list_folder(tmp_path)
    assert list(listing.files) == ["2024.05 cat", "IMG_1", "scan.003"] and not listing.lost
    assert told(listing.other) == ["other files, left out: 3 (.2 1x, .d 1x, no suffix 1x)"]
    assert [stem(n) for n in listing.files] == list(listing.files) and stem("a.b/c.d.JPG") == "a.b/c.d"

def test_linked_folders_are_read_once(tmp_path):
    "A class that was a link vanished. Folders come before links; what a second link leads to is named; loops end."
    for name in ("p/cat/1.jpg", "p/zebra/2.jpg", "else/dog/3.jpg", "else/dog/young/4.jpg"):
        picture(tmp_path/name)
    for link, to in (("p/dog", "else/dog"), ("p/hound", "else/dog"), ("p/aardvark", "p/zebra"), ("else/dog/top", "p")):
        (tmp_path/link).symlink_to(tmp_path/to)
    found = find_images(tmp_path/"p", "folders")
    assert found.tags == {"cat/1": [0], "dog/3": [1], "dog/young/4": [1], "zebra/2": [2]}
    assert found.classes.classes == ("cat", "dog", "zebra")
    assert findings(found) == ["sub-folders without pictures of their own, no classes: 2 ('aardvark', 'hound')",
                               "links to folders that are read already: 3 ('aardvark', 'dog/top', 'hound')"]
    with pytest.raises(ValueError, match="links to folders that are read already: 3"):
        open_images(tmp_path/"p", "folders", strict=True)

UNREAD = ["pictures in formats that this Pillow does not read (convert them to JPEG or PNG): "
          "3 ('draw.svg', 'raw.NEF', 'x.HEIC')",
          "folders and files that may not be opened: 1 ('shut')",
          "links that lead nowhere: 1 ('gone.png')",
          "hidden files and folders, left out: 2 ('.h.jpg', '.secret')",
          "other files, left out: 3 (.txt 2x, .db 1x)"]

def test_what_cannot_be_read_is_named(pets, monkeypatch, capsys):
    "Pictures of unknown formats, dead links and closed folders vanished even with --strict."
    for name in ("x.HEIC", "raw.NEF", "draw.svg", "notes.txt", "more.txt", "b.db"):
        (pets/name).touch()
    (pets/"gone.png").symlink_to(pets/"nowhere.png")
    for name in (".secret/s.jpg", ".h.jpg", "shut/s.jpg"):
        picture(pets/name)
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._a.jpg", "@eaDir/a.jpg/thumb.jpg", "__MACOSX/._a.jpg",
                 "$RECYCLE.BIN/d.jpg", "lost+found/x.jpg", ".git/HEAD"):
        (pets/name).parent.mkdir(parents=True, exist_ok=True)
        (pets/name).touch()
    scan = os.scandir
    def closed(path):  # as chmod 000 closes it to anybody but root
        if str(path).endswith("shut"): raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", closed)
    tags = csv(pets, "".join(f"{n},cat\n" for n in ("a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG")))
    found = find_images(pets, tags)
    assert findings(found) == UNREAD and len(found.images) == 4
    with pytest.raises(ValueError, match="draw.svg.*shut.*gone.png"):
        open_images(pets, tags, strict=True)
    assert main(["predict", str(pets), "--out", str(pets/"masks"), "--no-crf", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert all(f"{pets}: {line}" in err for line in UNREAD) and "Traceback" not in err
    assert len(list((pets/"masks").rglob("*.png"))) == 4

def test_a_class_that_vanishes_is_named(pets):
    "fox/ held nothing but .heic, crab/ nothing at all: two classes were gone, and nobody said so."
    for name in ("fox/1.heic", "fox/2.heic"):
        (pets/name).parent.mkdir(exist_ok=True)
        (pets/name).touch()
    (pets/"crab").mkdir()
    found = find_images(pets, "folders")
    assert found.classes.classes == ("garden",)
    assert "sub-folders without pictures of their own, no classes: 2 ('crab', 'fox')" in findings(found)

def test_pictures_that_may_not_be_looked_at(pets, monkeypatch):
    "In a folder that may be listed and not entered, every file seems to be none."
    looked = Path.stat
    def stat(path, **kw):
        if path.name.startswith("c."): raise PermissionError(13, "Permission denied", str(path))
        return looked(path, **kw)
    monkeypatch.setattr(Path, "stat", stat)
    assert told(list_folder(pets).lost) == ["folders and files that may not be opened: 1 ('garden/deep/c.JPEG')"]

def test_names_with_a_backslash(tmp_path):
    "Legal where / separates folders; it was read as a folder, so its tag went to nobody."
    if os.sep != "/":
        pytest.skip("here it separates folders")
    picture(tmp_path/"cat"/"a\\b.jpg")
    picture(tmp_path/"dog"/"1.jpg")
    assert find_images(tmp_path, "folders").tags == {"cat/a\\b": [0], "dog/1": [1]}

def test_companions_are_no_findings(pets):
    "The file of tags, the class list and the masks of a run before lie in the folder and are worth no word."
    (pets/"tags.csv").write_text("file,tags\na.jpg,cat\nb.png,cat\ngarden/a,cat\ngarden/deep/c,cat")
    (pets/"classes.yaml").write_text("classes: [cat]")
    assert not findings(find_images(pets, pets/"tags.csv", pets/"classes.yaml"))
    lost = []
    other = []
    picture(pets/"masks"/"garden"/"a.png")
    (pets/"masks"/"coco.json").touch()
    (pets/"out").symlink_to(pets/"masks")
    assert len(find_pictures([pets], pets/"out", lost, other)) == 4 and not lost
    assert other == [f"{pets}: other files, left out: 2 (.csv 1x, .yaml 1x)"]

# ---- names

def test_accents_stored_in_two_ways(tmp_path):
    "A list written on Linux found nothing in a folder copied from macOS."
    name = "garten/caf\u00e9 \u00fcber.jpg"
    wrong = []
    for listed, stored in (("NFC", "NFD"), ("NFD", "NFC")):
        file = tmp_path/stored/unicodedata.normalize(stored, name)
        picture(file)
        for given in (name, name[:-4]):
            found = find_images(tmp_path/stored, {unicodedata.normalize(listed, given): ["cup"]})
            if list(found.images.values()) != [file] or findings(found):
                wrong.append((listed, given, found))
    assert not wrong, wrong

def test_names_that_some_file_systems_take_for_one(tmp_path):
    "Accents stored in two ways, and capitals, are two pictures where the file system has both."
    both = [unicodedata.normalize(form, "\u00e9\u00e9.jpg") for form in ("NFC", "NFD")]
    accents = pictures(tmp_path/"accents", *map(stem, both))
    capitals = pictures(tmp_path/"capitals", "A", "a")
    keeps_accents, keeps_capitals = (len(list(folder.iterdir())) == 2 for folder in (accents, capitals))
    if keeps_accents:  # exact names are no question
        assert [list(find_images(accents, {n: ["cup"]}).images.values()) for n in both] == [[accents/n] for n in both]
        with pytest.raises(ValueError, match="stored in two ways"):
            find_images(accents, {"e\u0301\u00e9.jpg": ["cup"]})
    if keeps_capitals:
        assert set(find_images(capitals, {"A.jpg": ["x"], "a.jpg": ["x"]}).images) == {"A", "a"}
        assert {"A", "a"} == set(map(stem, find_pictures([capitals]).values()))
    if not (keeps_accents and keeps_capitals):
        pytest.skip("this file system takes two names for one")

def predict(folder, out, *more):
    return main(["predict", str(folder), "--out", str(out), "--no-crf", "--device", "cpu", *more])

def test_results_never_share_a_file(tmp_path, capsys):
    "The confidence of x.jpg overwrote the mask of confidence/x.jpg."
    wrong = []
    for name, formats, confidence, says in (
            ("confidence/x.jpg", ["png"], True, "both would write confidence/x.png"),
            ("coco.json/x.jpg", ["png", "coco"], False, "a folder and a file"),
            ("x.png/y.jpg", ["png"], False, "a folder and a file")):
        top = tmp_path/name.replace("/", "_")
        for n in ("x.jpg", name):
            picture(top/"p"/n)
        flags = ["--confidence"] if confidence else []
        status = predict(top/"p", top/"m", "--format", *formats, *flags)
        err = capsys.readouterr().err
        if status != 2 or says not in err or (top/"m").exists():
            wrong.append((name, status, err))
        refuse_overwriting(find_pictures([top/"p"/"x.jpg"]), top/"m", formats, confidence)
    assert not wrong, wrong

def test_no_result_overwrites_a_picture(tmp_path, capsys):
    "Masks were looked after, overlays were not: predict photos/overlay --out photos replaced the photographs."
    picture(tmp_path/"overlay"/"x.jpg")
    before = (tmp_path/"overlay"/"x.jpg").read_bytes()
    assert predict(tmp_path/"overlay", tmp_path, "--format", "overlay") == 2
    assert "would overwrite" in capsys.readouterr().err and (tmp_path/"overlay"/"x.jpg").read_bytes() == before

class Still:
    "A mask that leaves no file."
    confidence = np.zeros((2, 2))
    def save(self, path): pass

def test_the_writer_refuses_a_name_that_is_taken(tmp_path):
    twins = "x.jpg", "x.png"
    for names, formats, confidence in ((twins, ["png"], False), (twins, ["overlay"], False),
                                       (("confidence/x.jpg", "x.jpg"), ["png"], True)):
        with (pytest.raises(ValueError, match="expected different names"),
              writer(tmp_path, ("background", "a"), formats, confidence) as write):
            for name in names:
                write(name, Still() if "png" in formats else drawn())

def drawn(): return Segmentation(np.zeros((9, 9, 3), np.uint8), np.zeros((9, 9), np.uint8), ("background", "a"))

def test_a_frequent_tag_that_ranks_first_is_not_accused():
    "With the tag on most of the pictures, the last that has it lies in the lower half of all."
    c = dict(name="person", prompt="person", pictures=6, agreement=1., untagged=[], lowest=[("p6", 6), ("p5", 5)])
    assert list(_worries_of_class(c, 10)) == []
    late = dict(c, lowest=[("p6", 9), ("p5", 5)])
    assert list(_worries_of_class(late, 10)) == [
        "person: perhaps wrongly tagged, ranked behind half of those without the tag: p6"]

def test_a_long_name_costs_one_picture(tmp_path, capsys):
    "A picture of a legal name, 254 bytes, whose polygons would have 258, ended a run of thousands."
    pictures(tmp_path/"p", "x"*250, "short")
    assert predict(tmp_path/"p", tmp_path/"m", "--format", "png", "polygons") == 1
    err = capsys.readouterr().err
    assert "258 bytes" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path/"m").glob("*.png")] == ["short.png"]
    assert predict(tmp_path/"p", tmp_path/"n") == 0
    assert len(list((tmp_path/"n").glob("*.png"))) == 2

def test_a_long_name_costs_one_label_map(tmp_path, capsys):
    "A name of 254 bytes without a suffix, to which .png is one too many."
    Image.new("RGB", (64, 64), "red").save(tmp_path/"x", "PNG")
    picture(tmp_path/"p"/"short.jpg", 64, 64)
    (tmp_path/"x").rename(tmp_path/"p"/("x"*254))
    (tmp_path/"t.csv").write_text("file,tags\n" + "x"*254 + ",car\nshort.jpg,car\n")
    assert main(["pseudo", "--images", str(tmp_path/"p"), "--tags", str(tmp_path/"t.csv"), "--clip", "tiny",
                 "--device", "cpu", "--out", str(tmp_path/"m")]) == 1
    out, err = capsys.readouterr()
    assert "1 label maps written" in out and "skipped" in err and "258 bytes" in err
    assert [p.name for p in (tmp_path/"m").iterdir()] == ["short.png"]

# ---- tables as people have them

ONEHOT = ["image_id,cat,dog,fish\na,1,0,0\ngarden/a.jpg,1,1,0\n", "cat;dog;ID\n1;0;a.jpg\n1;1;garden/a.jpg\n",
          ",Image Name,cat,dog,split\n0,a.jpg,1.0,0.0,train\n1,garden/a.jpg,1.0,1.0,val\n",
          "file\tcat\tdog\na.jpg\tTrue\tFalse\ngarden/a.jpg\tTrue\tTrue\n",
          "photos of mine,cat,dog\na.jpg,1,0\ngarden/a.jpg,1,1\n"]

def test_onehot_csv(pets, caplog):
    "Two columns were read as classes '0' and '1', more were refused with 'expected 2 columns'."
    with caplog.at_level(logging.WARNING):
        found = find_images(pets, csv(pets, "filename,defect\na.jpg,1\nb.png,0\n"))
    assert found.classes.classes == ("defect",) and found.tags == {"a": [0]} and "b.png" in found.untagged
    assert "one-hot" in caplog.text and "defect" in caplog.text
    tags = {text: find_images(pets, csv(pets, text)).tags for text in ONEHOT}
    assert tags == dict.fromkeys(ONEHOT, {"a": [0], "garden/a": [0, 1]})

CAT_DOG = [("a.jpg", ["cat"]), ("b.jpg", ["dog"])]
TABLES = {
    # a comma within quotes was taken for the separator
    **dict.fromkeys(['"a, b.jpg";cat\n', '"a, b.jpg"\tcat;\n', 'file;tags\n"a, b.jpg";cat\n',
                     'sep=;\nfile;tags\na, b.jpg;cat', '"a, b.jpg", "cat"'], [("a, b.jpg", ["cat"])]),
    # tags beside a flag, and 0 and 1 beside facts of the picture
    "file,tags,truncated\na.jpg,cat,0\nb.jpg,dog,1": CAT_DOG,
    "filename,split,cat,dog\na.jpg,train,1,0\nb.jpg,val,0,1\n": CAT_DOG,
    "filename,width,height,cat,dog\na.jpg,640,480,1,0\nb.jpg,320,240,0,1\n": CAT_DOG,
    "image,0,1,2\na.jpg,1,0,0\nb.jpg,0,1,1\n": [("a.jpg", ["0"]), ("b.jpg", ["1", "2"])]}
# Where the tag column had a word of its own, the 0/1 column beside it became the only class.
WORDS_BESIDE_BITS = ["filename,animal,difficult\na.jpg,cat,0\nb.jpg,dog,1\n",
                     "file,breed,fold\na.jpg,pug,0\nb.jpg,lab,1\n",
                     "file,emotion,usage,is_test\na.jpg,joy,x,0\nb.jpg,fear,y,1\n",
                     "Image Index,Finding Labels,Follow-up,Patient ID\na.jpg,Mass,0,1\nb.jpg,Hernia,1,0\n",
                     "filename,xmin,ymin,xmax,ymax,kind\na.jpg,0,0,1,1,cat\nb.jpg,0,1,1,1,dog\n"]

def test_rows_of_tables(pets):
    rows = {text: rows_csv(csv(pets, text)) for text in TABLES}
    assert rows == TABLES
    check_all({text: not_refused("columns", rows_csv, csv(pets, text)) for text in WORDS_BESIDE_BITS})

FILE_HEADS = ["image_id", "img", "img_path", "filepath", "image_name", "ID", "photo", "Image Name", "IMAGE-ID",
              "File Path", "Dateiname"]
HEADS = [*(f"{file},{tags}" for file in FILE_HEADS for tags in ("tags", "Class Name", "species")),
         "tags,image_id", "quux,category", "image,what is in it"]

def test_headings(pets):
    "Those not known were counted as a picture that is not there."
    wrong = {}
    for head in HEADS:
        lines = "cat,a.jpg\ndog,b.png" if head.startswith("tags") else "a.jpg,cat\nb.png,dog"
        found = find_images(pets, csv(pets, f"{head}\n{lines}\n"))
        if found.tags != {"a": [0], "b": [1]} or found.missing or found.unread:
            wrong[head] = found
    assert not wrong, wrong
    found = find_images(pets, csv(pets, "Pferd,Apfel\na.jpg,cat\nb.png,dog\n"))
    assert found.tags == {"a": [0], "b": [1]} and not found.missing
    assert found.unread == ["first line of the tags, read as headings: 'Pferd' names no picture"]
    # a picture without its ending
    assert find_images(pets, csv(pets, "a,cat\nb.png,dog\n")).tags == {"a": [0], "b": [1]}
    assert find_images(pets, csv(pets, "lost,cat\nb,dog\n")).missing == ["lost"]  # as all the others

# ---- folders that are no classes

SPLIT = "parts of a data set"
PARTS = {  # pictures of a folder -> what is said; archive/{train,val} trained one class called archive
    ("train/cat/1", "train/dog/2", "val/cat/3", "val/dog/4"):
        "'train', 'val'.*name the folder of one part .*{top}/train",
    ("train/1", "test/2"): SPLIT,
    ("training/cat/1",): "{top}/training",
    ("fold1/cat/1", "fold1/dog/2", "fold2/cat/3", "fold2/dog/4"): "{top}/fold1",
    ("cat/1", "dog/2", "test/3"): "got 'test'",
    ("images/1", "masks/1"): SPLIT,
    ("JPEGImages/1", "SegmentationClass/1"): SPLIT,
    ("train2017/a", "val2017/b"): SPLIT,
    ("train/a", "test1/b"): SPLIT,
    ("seg_train/cat/a", "seg_test/cat/b"): SPLIT,
    ("train_images/a", "test_images/b"): SPLIT,
    ("training_set/cat/a", "training_set/dog/a", "test_set/b"): SPLIT,
    ("JPEGImages/a", "SegmentationClass/b", "SegmentationObject/c"): SPLIT,
    ("archive/train/cat/a", "archive/val/cat/b"): "{top}/archive/train",
    ("cat/2023/1", "cat/2024/1", "dog/2023/1", "dog/2024/1"):
        "hold the same sub-folders .*list them .--classes.*name one folder"}

def test_parts_are_no_classes(tmp_path):
    "data/{train,val}/{cat,dog} trained the classes 'train' and 'val'."
    results = {}
    for k, (names, says) in enumerate(PARTS.items()):
        top = pictures(tmp_path/str(k), *names)
        results[names] = not_refused(says.format(top=re.escape(str(top))), find_images, top, "folders")
    check_all(results)

CLASS_FOLDERS = [  # pictures of a folder, a list of classes, the classes read
    (("train/1", "bus/2"), None, ("bus", "train")),
    (("cat/train/1", "cat/val/2", "dog/train/3", "dog/val/4"), None, ("cat", "dog")),
    (("cat/day/1", "dog/2"), None, ("cat", "dog")),
    (("cat/img/1", "dog/img/2"), None, ("cat", "dog")),
    (("valid/1", "torn/2"), None, ("torn", "valid")),
    (("bird/1", "car/1", "train/1"), None, ("bird", "car", "train")),
    (("valid/1", "invalid/1"), None, ("invalid", "valid")),
    (("test tube/1", "flask/1"), None, ("flask", "test tube")),
    (("test/1", "val/2"), ("test", "val"), ("test", "val")),
    (("cat/2023/1", "cat/2024/1", "dog/2023/1", "dog/2024/1"), ("cat", "dog"), ("cat", "dog"))]

def test_folders_that_are_classes(tmp_path):
    wrong = {}
    for k, (names, listed, want) in enumerate(CLASS_FOLDERS):
        top = pictures(tmp_path/str(k), *names)
        (tmp_path/"c.yaml").write_text(f"classes: {json.dumps(listed)}")
        got = find_images(top, "folders", tmp_path/"c.yaml" if listed else None).classes.classes
        if got != want:
            wrong[names] = got
    assert not wrong, wrong

def test_system_folders_are_no_classes(pets):
    for n in ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".git",
              ".ipynb_checkpoints"):
        picture(pets/n/"x.jpg")
    found = find_images(pets, "folders")
    assert found.classes.classes == ("garden",) and found.untagged == ["a.jpg", "b.png"]
    assert any("'a.jpg', 'b.png'" in line for line in findings(found))
    assert set(find_pictures([pets]).values()) == {"a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG"}

def test_counts_on_one_line(pets):
    found = find_images(pets, {"a.jpg": ["cat"], "b.png": [f"d{i:02}" for i in range(25)], "garden/a.jpg": ["cat"]})
    data, _ = open_images(pets, {"a.jpg": ["cat"], "b.png": ["cat", "dog"]}, progress=False)
    assert class_counts(data) == "cat 2, dog 1" and len(found.classes.classes) == 26
    many, _ = open_images(pets, {"b.png": [f"d{i:02}" for i in range(25)]}, progress=False)
    assert class_counts(many).endswith(", d19 1 and 5 more")

# ---- classes.yaml

def test_class_file_orders_names_and_colours(pets):
    path = yaml(pets, "classes:\n- {name: dog, colour: '#0000ff'}\n"
                      "- {name: cat, prompt: [cat, kitten], colour: tomato}\n- bird\nbackground: [grass]\n")
    found = find_images(pets, {"a.jpg": ["cat"], "b.png": ["Dog"]}, path)
    assert found.classes.classes == ("dog", "cat", "bird") and found.tags == {"a": [1], "b": [0]}
    assert found.classes.bg_texts == ["a clean origami grass."]
    own_colours = [[0, 0, 0], [0, 0, 255], [255, 99, 71]]
    assert found.classes.palette()[:4].tolist() == [*own_colours, voc_palette()[3].tolist()]
    assert any("classes without a picture: 1 (bird)" in line for line in findings(found))
    text = "classes:\n- &x {name: cat, prompt: kitten}\n- {<<: *x, name: dog}\n"  # merged keys do not come twice
    assert get_classes(yaml(pets, text)).prompts == ("kitten", "kitten")

BROKEN_CLASSES = [
    "", "cat", "classes:", "classes: cat", "classes: [1]", "classes: [{name: cat, color: red}]",
    "classes: [{name: cat, colour: '#12'}]", "classes: [{prompt: cat}]", "classes: [{name: cat, prompt: []}]",
    "classes: [{name: cat, colour: #ff0000}]", "classes: [cat]\nbackground: grass", "classes: [cat]\nbackground: []",
    "classes: [cat]\ntemplate: photo", "classes: [cat, cat]", "classes: [background]", "a: &a [*a]",
    "!!python/object/apply:os.system [x]", "classes: [cat\n", "a: &a [x,x]\nb: &b [*a,*a]\nclasses: *b", "["*1000]
DOUBLED_CLASSES = {  # YAML's readers keep the last of two equal keys; classes that differ in case alone were two
    "classes: [cat, dog]\nclasses: [fox]\n": "line 2: 'classes' comes twice",
    "classes:\n- name: cat\n  prompt: cat\n  prompt: kitten\n": "line 4: 'prompt' comes twice",
    "template: a {}.\nclasses: [cat]\n'template': b {}.\n": "line 3: 'template' comes twice",
    "classes: [cat, Cat]": "differ in more than case",
    "classes: [cat, ' cat']": "differ in more than case",
    "classes: [traffic light, traffic  light]": "differ in more than case",
    "classes: [caf\u00e9, cafe\u0301]": "differ in more than case",
    "classes: [cat, Background]": "what has no class"}

def test_broken_class_files(pets):
    pictures_of = {"a.jpg": ["cat"]}
    results = {text: not_refused("", find_images, pets, pictures_of, yaml(pets, text)) for text in BROKEN_CLASSES}
    for text, says in DOUBLED_CLASSES.items():
        results[text] = not_refused(f"classes.yaml: .*{says}", get_classes, yaml(pets, text))
    for names in (("cat", "Cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")):  # in Python alike
        results[names] = not_refused("differ in more than case", ClassSet, "x", names, ("one", "two"))
    check_all(results)

# ---- prompts

LONG_PROMPT = "word "*30

def two(*prompts, classes=("a", "b"), background=("sky",)):
    "A set of two classes with these prompts."
    return ClassSet("x", classes, prompts, background, "a {}.")

def test_prompts_that_become_one_text():
    "Two prompts over the tower's 20 tokens were cut to one text, so the two classes could never be told apart."
    with pytest.raises(ValueError, match="one and the same text to CLIP, which reads 20 tokens"):
        build("tiny", classes=two(LONG_PROMPT + "cup", LONG_PROMPT + "train"))
    with pytest.raises(ValueError, match="one and the same text"):
        build("tiny", classes=two("big cup", "Big Cup"))

def test_every_cut_prompt_is_named(tmp_path, caplog):
    tokenizer = load_backbone("tiny")[1]
    n = len(tokenizer.encode(f"a {LONG_PROMPT}cup.")) + 2
    caplog.set_level(logging.WARNING)
    model = build("tiny", classes=two(LONG_PROMPT + "cup", "train"))
    assert len(caplog.messages) == 1
    assert f"reads 20 tokens, its end is cut off: it has {n}" in caplog.messages[0] and "cup" in caplog.messages[0]
    save_model(tmp_path/"m.safetensors", model, "tiny")
    caplog.clear()
    load_model(tmp_path/"m.safetensors")
    assert len(caplog.messages) == 1 and "cut off" in caplog.messages[0]
    caplog.clear()
    # 18 and the two ends
    at_limit = next(t for t in ("cup "*k for k in range(30)) if len(tokenizer.encode(t + "cup")) == 18)
    tokens_of(tokenizer, [at_limit + "cup"])
    assert not caplog.messages
    tokens_of(tokenizer, [at_limit + "cup cup"])
    assert "it has 21" in caplog.text

def test_prompts_that_share_a_text(caplog):
    "A background word that is also a prompt takes the class's score away; two classes of one prompt are asked for."
    tokenizer = load_backbone("tiny")[1]
    assert shared_texts(tokenizer, ["a Cup.", "a car."], ["a cup.", "a sky."]) == [("a Cup.", "a cup.")]
    caplog.set_level(logging.WARNING)
    build("tiny", classes=two("cup", classes=("a",), background=("sky", "cup")))
    assert "same text as a class's" in caplog.text
    build("tiny", classes=two("pet", "pet", classes=("cat", "dog")))
    assert "'pet' stands for more than one class" in caplog.text

# ---- commands

@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "Sixteen drawn scenes in sub-folders, their tags as CSV, and a list of classes with colours."
    top = tmp_path_factory.mktemp("mine")
    root = write_scenes(top/"scenes", train=16, val=0, workers=1)
    tags = json.loads((root/"ImageSets"/"Segmentation"/"tags.json").read_text())
    rows = ["file,tags"]
    for k, (i, t) in enumerate(sorted(tags.items())):
        to = top/"pics"/"ab"[k % 2]
        to.mkdir(parents=True, exist_ok=True)
        src = next((root/"JPEGImages").glob(f"{i}.*"))
        (to/src.name).write_bytes(src.read_bytes())
        rows.append(f"{to.name}/{src.name},{';'.join(t)}")
    (top/"tags.csv").write_text("\n".join(rows))
    classes = "".join(f"- {{name: {n}, colour: {list(c)}}}\n" for n, c in zip(SCENES.classes, COLOURS))
    (top/"classes.yaml").write_text('template: "a picture of a {}."\nbackground: [grass, sky, water, sand, road]\n'
                                    f"classes:\n{classes}")
    return top

COLOURS = [(10*k + 10, 0, 255) for k in range(len(SCENES.classes))]

def own(mine, *more):
    return ["--images", str(mine/"pics"), "--tags", str(mine/"tags.csv"), "--clip", "tiny", "--device", "cpu", *more]

@pytest.fixture(scope="module")
def model(mine, tmp_path_factory):
    "The file of a model trained for four steps."
    out = tmp_path_factory.mktemp("run")
    args = own(mine, "--classes", str(mine/"classes.yaml"), *FAST, "--out", str(out))
    assert main(["train", *args]) == 0
    return out/"model.safetensors"

@pytest.fixture(scope="module")
def seen(mine): return find_images(mine/"pics", mine/"tags.csv")

def test_train_then_predict_needs_nothing_else(mine, model, tmp_path, capsys):
    about, _ = read_model(model)
    assert tuple(about["classes"]["classes"]) == SCENES.classes and about["config"]["classes"] == "classes"
    assert about["config"]["views"] == 0 and str(mine) not in json.dumps(about)
    away = [(mine/f, mine/f"{f}.away") for f in ("tags.csv", "classes.yaml")]
    for file, hidden in away:
        file.rename(hidden)
    try:
        assert predict(mine/"pics"/"a", tmp_path, "--checkpoint", str(model)) == 0
    finally:
        for file, hidden in away:
            hidden.rename(file)
    assert f"1 {SCENES.classes[0]}, 2 {SCENES.classes[1]}" in capsys.readouterr().out
    masks = sorted(tmp_path.glob("*.png"))
    assert len(masks) == 8
    palette = np.reshape(Image.open(masks[0]).getpalette(), (-1, 3))
    assert palette[:len(SCENES.names)].tolist() == [[0, 0, 0], *map(list, COLOURS)]

def test_train_says_how_long_and_resumes_with_the_same_tags(mine, seen, tmp_path, capsys):
    args = ["train", *own(mine), "--iters", "3", "--set", "bs=2", "d=32", "layers=1", "--out", str(tmp_path)]
    assert main(args) == 0
    out = capsys.readouterr().out
    names = seen.classes.classes
    n_pictures = [sum(k in tags for tags in seen.tags.values()) for k in range(len(names))]
    counts = ", ".join(f"{name} {n}" for name, n in zip(names, n_pictures))
    assert f"pictures of each class: {counts}" in out
    assert f"training on 16 pictures of {len(names)} classes" in out
    assert "3 iterations of 2 crops of 112 pixels, 0 visits to each picture: less than a minute" in out
    about = read_model(tmp_path/"model.safetensors")[0]
    assert about["config"]["switch"] == 1 and about["classes"]["template"] == SCENES.template
    other = tmp_path/"other.csv"
    other.write_text((mine/"tags.csv").read_text().replace("bird", "zeppelin"))
    args[args.index(str(mine/"tags.csv"))] = str(other)
    assert main([*args, "--resume"]) == 2 and "did the tags change" in capsys.readouterr().err

OWN = "--images x --tags y"
PROFILES = {
    OWN: dict(iters=2000, switch=600, crop=320, pad_ignore=True),
    f"{OWN} --iters 500": dict(iters=500, switch=150),
    f"{OWN} --iters 500 --set switch=0": dict(iters=500, switch=0),
    f"{OWN} --clip tiny": dict(iters=1000, crop=112, views=0),
    f"{OWN} --profile coco": dict(iters=80_000, bs=4),
    "root": dict(iters=30_000, switch=9144, pad_ignore=False),
    "root --iters 300": dict(iters=300, switch=91)}

def test_profiles():
    read = {}
    for args, want in PROFILES.items():
        given = read_arguments("train", [*args.split(), "--out", "o"])
        cfg = config_of(**{k: v for k, v in given.items() if k in inspect.signature(config_of).parameters})
        read[args] = {k: getattr(cfg, k) for k in want}
    assert read == PROFILES

def test_pseudo_labels(mine, model, tmp_path):
    listed = own(mine, "--classes", str(mine/"classes.yaml"), "--out", str(tmp_path/"before"))
    assert main(["pseudo", *listed]) == 0
    before = sorted((tmp_path/"before").rglob("*.png"))
    assert len(before) == 16 and {p.parent.name for p in before} == {"a", "b"}
    found = find_images(mine/"pics", mine/"tags.csv", mine/"classes.yaml")
    wrong = []
    for i, tags in found.tags.items():
        mask = Image.open(tmp_path/"before"/f"{i}.png")
        is_tagged = set(np.unique(np.asarray(mask))) <= {0, *(t + 1 for t in tags)}
        is_drawn = mask.size == Image.open(found.images[i]).size and mask.getpalette()[3:6] == list(COLOURS[0])
        if not is_tagged or not is_drawn:
            wrong.append(i)
    assert not wrong, wrong
    (tmp_path/"few.csv").write_text("\n".join((mine/"tags.csv").read_text().splitlines()[:5]))
    few = own(mine, "--checkpoint", str(model), "--stages", "--out", str(tmp_path/"after"))
    few[few.index(str(mine/"tags.csv"))] = str(tmp_path/"few.csv")
    assert main(["pseudo", *few]) == 0
    assert len(list((tmp_path/"after"/"pseudo").rglob("*.png"))) == 4

def test_inspect(mine, seen, tmp_path, capsys):
    assert main(["inspect", *own(mine, "--out", str(tmp_path/"own"), "--sheet", "2")]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path/"own"/"inspect.json").read_text())
    pictures_of = [c["pictures"] for c in report["classes"]]
    assert f"16 pictures, {len(seen.classes.classes)} classes" in out and "few pictures, fewer than 10" in out
    assert sum(pictures_of) == sum(map(len, seen.tags.values())) and report["untagged"] == report["missing"] == []
    sheets = list((tmp_path/"own"/"cams").iterdir())
    assert len(sheets) == sum(n > 0 for n in pictures_of)
    assert Image.open(sheets[0]).width == 3*164 + 4
    assert main(["inspect", str(mine/"scenes"), "--train-split", "train", "--profile", "scenes", "--clip", "tiny",
                 "--device", "cpu", "--out", str(tmp_path/"voc"), "--sheet", "0"]) == 0
    voc = json.loads((tmp_path/"voc"/"inspect.json").read_text())
    assert [c["ap"] for c in voc["classes"]] == [c["ap"] for c in report["classes"]]
    assert not (tmp_path/"voc"/"cams").exists()

MISTAKES = {
    "train": "got neither",
    "train root --images x --tags y": "got both",
    "train --images {mine}/pics": "--images and --tags together",
    "train root --tags x.csv": "--images and --tags together",
    "pseudo --images {mine}/pics --tags none.csv": "none.csv: expected a file of tags",
    "inspect --images none --tags {mine}/tags.csv": "none: expected a folder",
    "train --images {mine}/pics --tags {mine}/tags.csv --iters 0": "--iters: expected at least 1",
    "train --images {mine}/pics --tags {mine}/tags.csv --set supervised=True": "expected masks",
    "train --images {mine}/pics --tags {mine}/tags.csv --classes voc": "expected tags among the 20 classes",
    "train --images {mine}/pics/a --tags {mine}/tags.csv": "none of its 16 files",
    "inspect --images {mine} --tags folders --classes voc": "expected tags among",
    **{f"{command} --images {{mine}}/pics --tags {{mine}}/tags.csv --classes {{tmp}}/long.yaml":
           "one and the same text" for command in ("train", "inspect", "pseudo")}}

def test_mistakes_are_one_line(mine, tmp_path, capsys):
    rows = "".join(f"- {{name: {n}, prompt: '{LONG_PROMPT}{n}'}}\n" for n in SCENES.classes)
    (tmp_path/"long.yaml").write_text("template: 'a {}.'\nclasses:\n" + rows)
    wrong = {}
    for args, says in MISTAKES.items():
        capsys.readouterr()
        words = args.format(mine=mine, tmp=tmp_path).split()
        status = main([*words, "--clip", "tiny", "--device", "cpu", "--out", str(tmp_path/"out")])
        err = capsys.readouterr().err
        is_one_line = "Traceback" not in err and "\n" not in err.strip().split("weclip ")[-1]
        if status != 2 or says not in err or not is_one_line:
            wrong[args] = status, err
    assert not wrong, wrong

# ---- inspection

@pytest.fixture(scope="module")
def tiny(): return build("tiny")

def test_inspection_reports_what_training_refuses(mine, tiny, tmp_path):
    data, _ = open_images(mine/"pics", mine/"tags.csv", SCENES, progress=False)
    data.images["broken"] = mine/"tags.csv"
    data.ids.append("broken")
    data.tags["broken"] = [0]
    report, survey_of = inspect_set(tiny, data, ["said"], progress=False)
    assert list(report["unreadable"]) == ["broken"] and report["pictures"] == 16 and "broken" not in survey_of.ids
    assert report["worries"][0].startswith("broken: ") and report["worries"][1] == "said"
    assert json.dumps(report, allow_nan=False)
    with pytest.raises(ValueError, match="none of 1 can be read"):
        survey(tiny, {"broken": mine/"tags.csv"}, progress=False)

def test_batches_do_not_change_a_survey(seen, tiny):
    a, b = (survey(tiny, seen.images, bs=bs, progress=False) for bs in (1, 7))
    assert a.ids == b.ids == list(seen.images)
    assert torch.allclose(a.scores, b.scores, atol=1e-6) and (a.sizes == b.sizes).all()
    assert tuple(a.sizes[0][::-1]) == Image.open(seen.images[a.ids[0]]).size

def test_sheets_stay_in_their_folder(mine, tiny, tmp_path):
    data, _ = open_images(mine/"pics", mine/"tags.csv", SCENES, progress=False)
    data.names = tuple("../../x" if n == "car" else n for n in data.names)
    files = cam_sheets(tiny, data, survey(tiny, data.images, progress=False), tmp_path/"cams", most=1)
    assert {f.parent for f in files} == {tmp_path/"cams"} and {p.name for p in tmp_path.iterdir()} == {"cams"}
    assert any("_x.png" in f.name for f in files)

def test_one_picture_one_class(tmp_path):
    picture(tmp_path/"p"/"a.jpg", 64, 80)
    data, classes = open_images(tmp_path/"p", {"a": ["car"]}, progress=False)
    report, _ = inspect_set(build("tiny", classes=classes), data, progress=False)
    assert report["classes"][0]["agreement"] is None
    assert any("every picture has this tag" in w for w in report["worries"])

# ---- photographs

@pytest.mark.skipif(not (DATA/"coco").is_dir(), reason=f"no COCO photographs at {DATA} (set WECLIP_DATA)")
def test_coco_photographs_and_a_csv(tmp_path):
    annotations = json.loads((DATA/"coco"/"annotations"/"instances_train2017.json").read_text())
    name = {c["id"]: c["name"] for c in annotations["categories"]}
    objects = {i["id"]: set() for i in annotations["images"]}
    for a in annotations["annotations"]:
        objects[a["image_id"]].add(name[a["category_id"]])
    tags = {i["file_name"]: sorted(objects[i["id"]]) for i in annotations["images"]}
    rows = "".join(f"{file},{';'.join(names)}\n" for file, names in tags.items())
    (tmp_path/"tags.csv").write_text("file,tags\n" + rows)
    folder = DATA/"coco"/"train2017"
    here = {f for f in tags if (folder/f).is_file()}
    assert len(here) == 10
    data, classes = open_images(folder, tmp_path/"tags.csv", progress=False, crop=320)
    assert {p.name for p in data.images.values()} == {f for f in here if tags[f]}
    assert all([classes.classes[k] for k in data.tags[i]] == tags[p.name] for i, p in data.images.items())
    assert all(tuple(s.img.shape) == (3, 320, 320) and s.tags for s in data)
    coco = find_images(folder, tmp_path/"tags.csv", "coco")
    assert coco.classes == get_classes("coco") and coco.images == data.images and not coco.respelt
