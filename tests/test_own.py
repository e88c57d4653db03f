"""Somebody's own pictures: every form of tags, every way to get them wrong, and the commands that read them."""
import inspect, json, logging, os, random, re, unicodedata
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from weclip.method.classes import SCENES, VOC, ClassSet, voc_palette
from weclip.data.voc import SegData, check_files, get_classes
from weclip.data.own import (
    class_counts, find_images, findings, inside, list_folder, open_images, readable,
    rows_csv, stem, told)
from weclip.world.scenes import write_scenes
from weclip.engine.weights import build, load_backbone, load_model, read_model, save_model, shared_texts, tokens_of
from weclip.use.inspection import cam_sheets, inspect_set, survey
from weclip.use.outputs import writer
from weclip.cli import main, read_arguments
from weclip.use.commands import config_of, find_pictures, refuse_overwriting

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
FAST = ["--set", "iters=4", "warmup=2", "d=32", "layers=1", "heads=2", "bs=4", "--device", "cpu"]

def picture(path, h=20, w=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)

@pytest.fixture
def pets(tmp_path):
    "a.jpg, b.png, garden/a.jpg, garden/deep/c.JPEG, beside a secret."
    for n in ("a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG"):
        picture(tmp_path/"pets"/n)
    picture(tmp_path/"secret.jpg")
    return tmp_path/"pets"

def csv(pets, text, name="tags.csv"):
    path = pets.parent/name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path

# ---- forms

WANT = {"a": [0], "garden/a": [0, 1], "garden/deep/c": [1]}

@pytest.mark.parametrize("text, name", [
    ("file,tags\na.jpg,cat\ngarden/a.jpg,cat;dog\ngarden/deep/c.JPEG,dog\n", "tags.csv"),
    ("garden/deep/c.JPEG,dog\ngarden\\a.jpg, dog ; cat ;\n./a.jpg,cat", "tags.csv"),
    ("\ufeff\"file\",\"tags\"\r\n\"a.jpg\",\"cat\"\r\n\r\n\"garden/a.jpg\",\"cat;dog\"\r\n\"garden/deep/c\",\"dog\"\r\n", "tags.csv"),
    ("a.jpg;cat\rgarden/a.jpg;cat;dog\rgarden/deep/c.JPEG;dog", "tags.csv"),
    ("Tags\tsplit\tFile\ncat\ttrain\ta.jpg\ncat;dog\tval\tgarden/a.jpg\ndog\ttrain\tgarden/deep/c.JPEG", "tags.tsv"),
    ('{"a.jpg": ["cat"], "garden/a": ["dog", "cat", "dog"], "garden/deep/c.JPEG": ["dog"]}', "tags.json"),
    ('\ufeff{"a": ["cat"], "garden/a.jpg": ["dog"], "garden/a": ["cat"], "garden/deep/c": ["dog"]}', "tags.json")])
def test_forms_agree(pets, text, name):
    found = find_images(pets, csv(pets, text, name))
    assert found.classes.classes == ("cat", "dog") and found.tags == WANT and list(found.tags) == sorted(WANT)
    assert found.images["garden/deep/c"] == pets/"garden"/"deep"/"c.JPEG" and found.untagged == ["b.png"] and not found.missing

def test_folders_are_classes(pets):
    picture(pets/"dog"/"x"/"d.jpg")
    picture(pets/".thumbs"/"e.jpg")
    picture(pets/"dog"/"._d.jpg")
    found = find_images(pets, "folders")
    assert found.tags == {"dog/x/d": [0], "garden/a": [1], "garden/deep/c": [1]} and found.untagged == ["a.jpg", "b.png"]

def test_folders_without_folders(tmp_path):
    picture(tmp_path/"a.jpg")
    with pytest.raises(ValueError, match="sub-folder named after its class"):
        find_images(tmp_path, "folders")

def test_onehot(pets):
    np.save(pets.parent/"cls_labels_onehot.npy", {"a": np.eye(20, dtype=np.float32)[7], "nowhere": np.eye(20, dtype=np.float32)[0]}, allow_pickle=True)
    found = find_images(pets, pets.parent/"cls_labels_onehot.npy", "voc")
    assert found.tags == {"a": [7]} and found.missing == ["nowhere"] and found.classes == VOC
    with pytest.raises(ValueError, match="holds no names"):
        find_images(pets, pets.parent/"cls_labels_onehot.npy")
    with pytest.raises(ValueError, match="expected 80 values"):
        find_images(pets, pets.parent/"cls_labels_onehot.npy", "coco")
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_images(pets, pets.parent/"none.npy", "voc")

def test_data_is_what_a_voc_folder_gives(pets):
    data, classes = open_images(pets, {"garden/a.jpg": ["dog"], "a.jpg": ["cat"]}, progress=False, crop=16, norm=None)
    s = data[1]
    assert (s.id, s.tags, s.mask, tuple(s.img.shape)) == ("garden/a", [1], None, (3, 16, 16)) and data.names == classes.classes
    again, _ = open_images(pets, {"a.jpg": ["cat"], "garden/a.jpg": ["dog"]}, progress=False, crop=16, norm=None)
    assert again.ids == data.ids and all(torch.equal(x.img, y.img) for x, y in zip(data, again))  # whatever the order of the tags

# ---- nothing leaves the folder

ESCAPES = ["../secret.jpg", "garden/../../secret.jpg", "garden/../a.jpg", "..", "..\\secret.jpg", "/etc/hostname", "C:\\secret.jpg", "c:secret.jpg",
           "\\\\host\\share\\a.jpg", "//host/share/a.jpg", "a\0.jpg", "", " ", "{top}/secret.jpg", "{top}/pets/a.jpg"]

@pytest.mark.parametrize("bad", ESCAPES)
def test_paths_that_leave_the_folder(pets, bad):
    bad = bad.format(top=pets.parent)
    for tags in ({"a.jpg": ["cat"], bad: ["cat"]}, csv(pets, json.dumps({"a.jpg": ["cat"], bad: ["cat"]}), "tags.json")):
        with pytest.raises(ValueError, match="expected a path below"):
            find_images(pets, tags)
    with pytest.raises(ValueError):
        find_images(pets, csv(pets, f'a.jpg,cat\n"{bad}",cat'))

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
    tags = csv(pets, "a.jpg,Cat\na,dog\ngarden/a.jpg,cat\ngarden/deep/c.JPEG,cat\nb.png,\nx.jpg,dog\ny/z.jpg,fish")
    found = find_images(pets, tags)
    assert found.classes.classes == ("cat", "dog")  # a fish that is not there makes no class
    assert (found.untagged, found.missing, found.twice, found.respelt) == (["b.png"], ["x.jpg", "y/z.jpg"], ["a.jpg"], {"Cat": ("cat", 1)})
    with caplog.at_level(logging.WARNING):
        data, _ = open_images(pets, tags, progress=False)
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{tags} for {pets}: {line}" for line in findings(found)] and len(said) == 4
    for part in ("left out: 1 ('b.png')", "not there, left out: 2 ('x.jpg', 'y/z.jpg')", "more than once, tags put together: 1 ('a.jpg')", "'Cat' as 'cat' 1x"):
        assert part in "".join(said)
    assert data.tags["a"] == [0, 1]
    with pytest.raises(ValueError, match=r"\.csv for .*left out: 1 .*left out: 2"):
        open_images(pets, tags, strict=True)
    assert not findings(find_images(pets, {n: ["cat"] for n in list_folder(pets).files}))

def test_all_files_elsewhere(pets):
    with pytest.raises(FileNotFoundError, match="none of its 2 files.*'train/a.jpg'.*there are 'a.jpg'"):
        find_images(pets, csv(pets, "train/a.jpg,cat\ntrain/b.png,dog"))

def test_spellings_of_a_class(pets):
    same = find_images(pets, {"a.jpg": ["traffic light"], "b.png": ["Traffic  Light"], "garden/a": ["traffic\u00a0light"], "garden/deep/c": [" traffic light"]})
    assert same.classes.classes == ("traffic light",) and len(same.respelt) == 3 and set(same.tags) == {"a", "b", "garden/a", "garden/deep/c"}
    assert find_images(pets, {"a.jpg": ["DOG"]}, "voc").respelt == {"DOG": ("dog", 1)}
    with pytest.raises(ValueError, match="expected tags among the 20 classes, got 'dgo' .1x, nearest: 'dog'., 'unicorn'"):
        find_images(pets, {"a.jpg": ["dgo", "unicorn"]}, "voc")

@pytest.mark.parametrize("tag, says", [("cat,dog", "expected ;"), ("cat|dog", "expected ;"), ("background", "not 'background'"), ("", "printable"), ("a\u200bb", "printable"), ("a\ud800", "printable")])
def test_tags_that_are_no_name(pets, tag, says):
    with pytest.raises(ValueError, match=says):
        find_images(pets, {"a.jpg": [tag]})

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

@pytest.mark.parametrize("text, says", [("", "empty file"), ("\n \n", "empty file"), ('a.jpg,"cat\nb.png,dog', "quote left open"), ("a.jpg,cat,dog", "line 1: expected 2 columns"),
    ("file,tags\na.jpg,cat,dog", "line 2: expected 2 columns"), (",cat", "name of a picture"), ("file,tags", "got none"), (b"caf\xe9.jpg,cat", "UTF-8"), ("a.jpg,cat".encode("utf-16"), "UTF-8")])
def test_broken_csv(pets, text, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        find_images(pets, csv(pets, text))

@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', "{}", '{"a.jpg": "cat"}', '{"a.jpg": [1]}', '{"a.jpg": [["cat"]]}', '{"a.jpg": {"cat": []}}', "["*50_000, '{"a":'*50_000, "NaN"])
def test_broken_json(pets, text):
    with pytest.raises(ValueError, match="tags.json"):
        find_images(pets, csv(pets, text, "tags.json"))

def test_no_file_no_folder(pets):
    with pytest.raises(FileNotFoundError, match="none.csv: expected a file of tags"):
        find_images(pets, pets/"none.csv")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_images(pets/"cats", {"a.jpg": ["cat"]})
    with pytest.raises(FileNotFoundError, match="found none"):
        find_images(pets.parent/"empty", {"a.jpg": ["cat"]}) if (pets.parent/"empty").mkdir() is None else None
    with pytest.raises(ValueError, match="ending in .csv"):
        find_images(pets, pets/"tags.xlsx")
    with pytest.raises(FileNotFoundError):
        find_images(pets, pets/"tags.csv")

# ---- mutated files: an error or a result, and never a picture from outside

BASE = {"tags.csv": 'file,tags\na.jpg,cat\n"garden/a.jpg","cat;dog"\ngarden/deep/c.JPEG, dog ;cat\nb.png,\n./a.jpg,DOG\n'.encode(),
        "tags.json": json.dumps({"a.jpg": ["cat"], "garden/a.jpg": ["cat", "dog"], "garden/deep/c": [" Dog"], "b.png": []}).encode(),
        "classes.yaml": b'name: pets\ntemplate: "a photo of a {}."\nclasses:\n- {name: cat, prompt: [cat, kitten], colour: "#ff8000"}\n- {name: dog, colour: [0, 0, 255]}\n- bird\nbackground: [grass, sky]\n'}
PIECES = [b",", b";", b"\t", b'"', b"\n", b"\r", b"..", b"/", b"\\", b"../secret.jpg", b"C:", b"\0", b"\xff", b"\xef\xbb\xbf", "é".encode(), "\u200b".encode(), b"{", b"}", b"[", b"]",
          b":", b"#", b"&x ", b"*x", b"!!python/object:os.system ", b"null", b"1e999", b"\\ud800", b"background", b"9"*50, b"cat", b"file", b"- ", b"? ", b"|", b"x"*300]

def mutated(data, rng):
    "One to three small edits of some bytes."
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, j, piece = *sorted(rng.choices(range(len(data) + 1), k=2)), rng.choice(PIECES)
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

@pytest.mark.parametrize("name", BASE)
def test_mutated_files(pets, name):
    rng = random.Random(5)
    ends = {"result": 0, "error": 0}
    tags = csv(pets, BASE["tags.csv"])
    home = os.path.realpath(pets)
    for _ in range(300):
        text = mutated(BASE[name], rng)
        path = csv(pets, text, name)
        try:
            if name == "classes.yaml":
                found = find_images(pets, tags, path)
            else:
                found = find_images(pets, path)
        except (ValueError, FileNotFoundError) as e:
            str(e).encode()
            ends["error"] += 1  # a message that can be printed
        else:
            findings(found)
            found.classes.palette()
            ends["result"] += 1
            assert found.images and set(found.images) == set(found.tags) and all(os.path.realpath(p).startswith(home + os.sep) for p in found.images.values())
            assert all(t and set(t) <= set(range(len(found.classes.classes))) for t in found.tags.values())
    assert min(ends.values()) >= 10, ends  # the mutations reach both ends

# ---- nothing is lost without a word

KINDS = {".jfif": "JPEG", ".jpe": "JPEG", ".mpo": "MPO", ".avif": "AVIF", ".gif": "GIF", ".ppm": "PPM",
    ".jp2": "JPEG2000", ".tga": "TGA", ".JPG": "JPEG"}

@pytest.mark.parametrize("suffix", KINDS)
def test_every_format_of_pillow_is_read(tmp_path, suffix):
    "Only seven suffixes were; a folder of .jfif vanished from predict and training alike."
    Image.init()
    if KINDS[suffix] not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {KINDS[suffix]}")
    (tmp_path/"cat").mkdir()
    Image.new("RGB", (20, 16), "red").save(tmp_path/"cat"/f"a{suffix}", KINDS[suffix])
    data, classes = open_images(tmp_path, "folders", strict=True, progress=False)
    assert data.ids == ["cat/a"] and classes.classes == ("cat",) and data.read("cat/a")[0].shape == (16, 20, 3)
    assert list(find_pictures([tmp_path]).values()) == [f"cat/a{suffix}"]

def test_what_is_no_picture_is_not_opened_as_one():
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".h5", ".grib", ".txt"} & set(readable())
    assert {".jpg", ".tif", ".png", ".webp"} <= set(readable())

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

def test_what_cannot_be_read_is_named(pets, monkeypatch, capsys):
    "Pictures of unknown formats, dead links and closed folders vanished even with --strict."
    for name in ("x.HEIC", "raw.NEF", "draw.svg", "notes.txt", "more.txt", "b.db"):
        (pets/name).touch()
    (pets/"gone.png").symlink_to(pets/"nowhere.png")
    picture(pets/".secret"/"s.jpg")
    picture(pets/".h.jpg")
    picture(pets/"shut"/"s.jpg")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "._a.jpg", "@eaDir/a.jpg/thumb.jpg", "__MACOSX/._a.jpg",
        "$RECYCLE.BIN/d.jpg", "lost+found/x.jpg", ".git/HEAD"):
        (pets/name).parent.mkdir(parents=True, exist_ok=True)
        (pets/name).touch()
    scan = os.scandir
    def closed(path):  # as chmod 000 closes it to anybody but root
        if str(path).endswith("shut"): raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    monkeypatch.setattr(os, "scandir", closed)
    said = ["pictures in formats that this Pillow does not read (convert them to JPEG or PNG): "
            "3 ('draw.svg', 'raw.NEF', 'x.HEIC')",
            "folders and files that may not be opened: 1 ('shut')", "links that lead nowhere: 1 ('gone.png')",
            "hidden files and folders, left out: 2 ('.h.jpg', '.secret')", "other files, left out: 3 (.txt 2x, .db 1x)"]
    tags = csv(pets, "".join(f"{n},cat\n" for n in ("a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG")))
    found = find_images(pets, tags)
    assert findings(found) == said and len(found.images) == 4
    with pytest.raises(ValueError, match="draw.svg.*shut.*gone.png"):
        open_images(pets, tags, strict=True)
    assert main(["predict", str(pets), "--out", str(pets/"masks"), "--no-crf", "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert all(f"{pets}: {line}" in err for line in said)
    assert len(list((pets/"masks").rglob("*.png"))) == 4 and "Traceback" not in err

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

def test_a_folder_of_what_cannot_be_read(tmp_path):
    (tmp_path/"a.heic").touch()
    with pytest.raises(FileNotFoundError, match="found none; there are pictures in formats.*a.heic"):
        find_pictures([tmp_path])

# ---- names

@pytest.mark.parametrize("listed, stored", [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_stored_in_two_ways(tmp_path, listed, stored):
    "A list written on Linux found nothing in a folder copied from macOS."
    name = "garten/caf\u00e9 \u00fcber.jpg"
    picture(tmp_path/"p"/unicodedata.normalize(stored, name))
    for given in (name, name[:-4]):
        found = find_images(tmp_path/"p", {unicodedata.normalize(listed, given): ["cup"]})
        assert list(found.images.values()) == [tmp_path/"p"/unicodedata.normalize(stored, name)] and not findings(found)

def test_accents_that_mean_two_pictures(tmp_path):
    both = [unicodedata.normalize(form, "\u00e9\u00e9.jpg") for form in ("NFC", "NFD")]
    for name in both:
        picture(tmp_path/name)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes both names for one")
    # exact names are no question
    assert [list(find_images(tmp_path, {n: ["cup"]}).images.values()) for n in both] == [[tmp_path/n] for n in both]
    with pytest.raises(ValueError, match="stored in two ways"):
        find_images(tmp_path, {"e\u0301\u00e9.jpg": ["cup"]})

def test_capitals_are_another_picture(tmp_path):
    for name in ("A.jpg", "a.jpg"):
        picture(tmp_path/name)
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes both names for one")
    assert set(find_images(tmp_path, {"A.jpg": ["x"], "a.jpg": ["x"]}).images) == {"A",
        "a"} == set(map(stem, find_pictures([tmp_path]).values()))

@pytest.mark.parametrize("name, formats, confidence, says", [
    ("confidence/x.jpg", ["png"], True, "both would write confidence/x.png"),
    ("coco.json/x.jpg", ["png", "coco"], False, "a folder and a file"),
    ("x.png/y.jpg", ["png"], False, "a folder and a file")])
def test_results_never_share_a_file(tmp_path, name, formats, confidence, says, capsys):
    "The confidence of x.jpg overwrote the mask of confidence/x.jpg."
    for n in ("x.jpg", name):
        picture(tmp_path/"p"/n)
    args = ["predict", str(tmp_path/"p"), "--out", str(tmp_path/"m"), "--format", *formats, "--no-crf", "--device",
        "cpu", *["--confidence"]*confidence]
    assert main(args) == 2 and says in capsys.readouterr().err and not (tmp_path/"m").exists()
    refuse_overwriting(find_pictures([tmp_path/"p"/n for n in ("x.jpg",)]), tmp_path/"m", formats, confidence)

def test_no_result_overwrites_a_picture(tmp_path, capsys):
    "Masks were looked after, overlays were not: predict photos/overlay --out photos replaced the photographs."
    picture(tmp_path/"overlay"/"x.jpg")
    before = (tmp_path/"overlay"/"x.jpg").read_bytes()
    assert main(["predict", str(tmp_path/"overlay"), "--out", str(tmp_path), "--format", "overlay", "--device",
        "cpu"]) == 2
    assert "would overwrite" in capsys.readouterr().err and (tmp_path/"overlay"/"x.jpg").read_bytes() == before

def test_the_writer_refuses_a_name_that_is_taken(tmp_path):
    for a, b, confidence in (("x.jpg", "x.png", False), ("confidence/x.jpg", "x.jpg", True)):
        with pytest.raises(ValueError, match="expected different names"), writer(tmp_path, ("background", "a"),
            ["png"], confidence) as write:
            for name in (a, b):
                write(name, Still())

class Still:
    "A mask that leaves no file."
    confidence = np.zeros((2, 2))
    def save(self, path): pass

def test_a_long_name_costs_one_picture(tmp_path, capsys):
    "A picture of a legal name, 254 bytes, whose polygons would have 258, ended a run of thousands."
    for n in ("x"*250 + ".jpg", "short.jpg"):
        picture(tmp_path/"p"/n)
    args = ["--no-crf", "--device", "cpu"]
    assert main(["predict", str(tmp_path/"p"), "--out", str(tmp_path/"m"), "--format", "png", "polygons", *args]) == 1
    err = capsys.readouterr().err
    assert "258 bytes" in err
    assert "Traceback" not in err
    assert [p.name for p in (tmp_path/"m").glob("*.png")] == ["short.png"]
    assert main(["predict", str(tmp_path/"p"), "--out", str(tmp_path/"n"), *args]) == 0
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
    assert "1 label maps written" in out
    assert "skipped" in err
    assert "258 bytes" in err
    assert [p.name for p in (tmp_path/"m").iterdir()] == ["short.png"]

# ---- tables as people have them

def test_onehot_csv(pets, caplog):
    "Two columns were read as classes '0' and '1', more were refused with 'expected 2 columns'."
    with caplog.at_level(logging.WARNING):
        found = find_images(pets, csv(pets, "filename,defect\na.jpg,1\nb.png,0\n"))
    assert found.classes.classes == ("defect",)
    assert found.tags == {"a": [0]}
    assert "b.png" in found.untagged
    assert "one-hot" in caplog.text
    assert "defect" in caplog.text
    for text in ("image_id,cat,dog,fish\na,1,0,0\ngarden/a.jpg,1,1,0\n", "cat;dog;ID\n1;0;a.jpg\n1;1;garden/a.jpg\n",
        ",Image Name,cat,dog,split\n0,a.jpg,1.0,0.0,train\n1,garden/a.jpg,1.0,1.0,val\n",
                 "file\tcat\tdog\na.jpg\tTrue\tFalse\ngarden/a.jpg\tTrue\tTrue\n",
                 "photos of mine,cat,dog\na.jpg,1,0\ngarden/a.jpg,1,1\n"):
        assert find_images(pets, csv(pets, text)).tags == {"a": [0], "garden/a": [0, 1]}, text
    # tags, and a flag
    assert rows_csv(csv(pets, "file,tags,truncated\na.jpg,cat,0\nb.png,dog,1")) == [("a.jpg", ["cat"]),
        ("b.png", ["dog"])]

@pytest.mark.parametrize("text, says", [
    ("file,cat,dog\na.jpg,1,0\nb.png,1,\n", "line 3: expected 0 or 1 in column 'dog'"),
    ("file,cat,dog\na.jpg,1,-1\nb.png,1,-1\n", "one-hot"), ("a.jpg,1,0\nb.png,0,1",
    "one-hot table needs a line of headings"),
    ("file,label\na.jpg,1\nb.png,0", "nothing but numbers"), ("a.jpg,1\nb.png,0", "nothing but numbers"),
    ("file,label\na.jpg,3\nb.png,17", "need a class list"),
    ("file,defect\na.jpg,1\nb.png,\n", "nothing but numbers"), ("file,a,b\na.jpg,cat,x\n", "one-hot")])
def test_tables_that_are_no_tags(pets, text, says):
    with pytest.raises(ValueError, match=says):
        find_images(pets, csv(pets, text))

@pytest.mark.parametrize("text", ['"a, b.jpg";cat\n', '"a, b.jpg"\tcat;\n', 'file;tags\n"a, b.jpg";cat\n',
    'sep=;\nfile;tags\na, b.jpg;cat', '"a, b.jpg", "cat"'])
def test_separators_within_quotes(pets, text):
    "The comma within quotes was taken for the separator: \"',' expected after '\"'\"."
    assert rows_csv(csv(pets, text)) == [("a, b.jpg", ["cat"])]

HEADS = ["image_id", "img", "img_path", "filepath", "image_name", "ID", "photo", "Image Name", "IMAGE-ID",
    "File Path", "Dateiname"]

@pytest.mark.parametrize("head", [*(f"{h},tags" for h in HEADS), *(f"{h},Class Name" for h in HEADS),
    *(f"{h},species" for h in HEADS), "tags,image_id", "quux,category", "image,what is in it"])
def test_headings(pets, head):
    "Those not known were counted as a picture that is not there."
    line = "cat,a.jpg\ndog,b.png" if head.startswith("tags") else "a.jpg,cat\nb.png,dog"
    found = find_images(pets, csv(pets, f"{head}\n{line}\n"))
    assert found.tags == {"a": [0], "b": [1]} and not found.missing and not found.unread

def test_a_heading_of_unknown_words(pets):
    found = find_images(pets, csv(pets, "Pferd,Apfel\na.jpg,cat\nb.png,dog\n"))
    assert found.tags == {"a": [0], "b": [1]}
    assert not found.missing
    assert found.unread == ["first line of the tags, read as headings: 'Pferd' names no picture"]
    # a picture without its ending
    assert find_images(pets, csv(pets, "a,cat\nb.png,dog\n")).tags == {"a": [0], "b": [1]}
    assert find_images(pets, csv(pets, "lost,cat\nb,dog\n")).missing == ["lost"]                # as all the others

@pytest.mark.parametrize("tag", ["nan", "NaN", "None", "null", "N/A", "<NA>"])
def test_holes_in_a_table(pets, tag):
    "They became a class of the pictures that nobody had tagged."
    for classes in (None, "voc"):
        with pytest.raises(ValueError, match="a hole in a table"):
            find_images(pets, csv(pets, f"file,tags\na.jpg,cat\nb.png,{tag}\n"), classes)

@pytest.mark.parametrize("tag", ["_background_", "__background__", "__ignore__", "_ignore_", "BACKGROUND"])
def test_words_of_labelling_tools_for_no_class(pets, tag):
    with pytest.raises(ValueError, match="not 'background'"):
        find_images(pets, {"a.jpg": ["cat"], "b.png": [tag]})
    with pytest.raises(ValueError, match="what has no class|differ in more than case"):
        ClassSet("x", ("cat", tag), ("cat", "sky"))

def test_onehot_keys_that_are_numbers(pets):
    "cls_labels.npy of other repositories: 2007000032 for 2007_000032."
    for key in (2007000032, np.int32(2007000032)):
        np.save(pets.parent/"cls_labels.npy", {key: np.eye(20, dtype=np.float32)[7]}, allow_pickle=True)
        with pytest.raises(ValueError, match="cls_labels.npy: .*2007000032.*2007_000032"):
            find_images(pets, pets.parent/"cls_labels.npy", "voc")

def test_utf16_without_its_mark(pets):
    with pytest.raises(ValueError, match="UTF-16"):
        find_images(pets, csv(pets, "a.jpg,cat\nb.png,dog".encode("utf-16-le")))

# ---- folders that are no classes

@pytest.mark.parametrize("names, says", [
    (("train/cat/1", "train/dog/2", "val/cat/3", "val/dog/4"),
    "'train', 'val'.*name the folder of one part .*data/train"), (("train/1", "test/2"), "parts of a data set"),
    (("training/cat/1",), "data/training"), (("fold1/cat/1", "fold1/dog/2", "fold2/cat/3", "fold2/dog/4"),
    "data/fold1"), (("cat/1", "dog/2", "test/3"), "got 'test'"),
    (("images/1", "masks/1"), "parts of a data set"), (("JPEGImages/1", "SegmentationClass/1"), "parts of a data set")])
def test_parts_are_no_classes(tmp_path, names, says):
    "data/{train,val}/{cat,dog} trained the classes 'train' and 'val'."
    for n in names:
        picture(tmp_path/"data"/f"{n}.jpg")
    with pytest.raises(ValueError, match=says):
        find_images(tmp_path/"data", "folders")

@pytest.mark.parametrize("names, classes, want", [
    (("train/1", "bus/2"), None, ("bus", "train")), (("cat/train/1", "cat/val/2", "dog/train/3", "dog/val/4"), None,
    ("cat", "dog")), (("cat/day/1", "dog/2"), None, ("cat", "dog")),
    (("cat/img/1", "dog/img/2"), None, ("cat", "dog")), (("valid/1", "torn/2"), None, ("torn", "valid")),
    (("test/1", "val/2"), "classes: [test, val]", ("test", "val"))])
def test_folders_that_are_classes(tmp_path, names, classes, want):
    for n in names:
        picture(tmp_path/"data"/f"{n}.jpg")
    if classes:
        (tmp_path/"c.yaml").write_text(classes)
    assert find_images(tmp_path/"data", "folders", tmp_path/"c.yaml" if classes else None).classes.classes == want

def test_system_folders_are_no_classes(pets):
    for n in ("@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", ".git",
        ".ipynb_checkpoints"):
        picture(pets/n/"x.jpg")
    found = find_images(pets, "folders")
    assert found.classes.classes == ("garden",)
    assert found.untagged == ["a.jpg", "b.png"]
    assert any("'a.jpg', 'b.png'" in line for line in findings(found))
    assert set(find_pictures([pets]).values()) == {"a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG"}

def test_counts_on_one_line(pets):
    found = find_images(pets, {"a.jpg": ["cat"], "b.png": [f"d{i:02}" for i in range(25)], "garden/a.jpg": ["cat"]})
    data, _ = open_images(pets, {"a.jpg": ["cat"], "b.png": ["cat", "dog"]}, progress=False)
    assert class_counts(data) == "cat 2, dog 1" and len(found.classes.classes) == 26
    many, _ = open_images(pets, {"b.png": [f"d{i:02}" for i in range(25)]}, progress=False)
    assert class_counts(many).endswith(", d19 1 and 5 more")

# ---- classes.yaml

def yaml(pets, text): return csv(pets, text, "classes.yaml")

def test_class_file_orders_names_and_colours(pets):
    path = yaml(pets, "classes:\n- {name: dog, colour: '#0000ff'}\n- {name: cat, prompt: [cat, kitten], colour: tomato}\n- bird\nbackground: [grass]\n")
    found = find_images(pets, {"a.jpg": ["cat"], "b.png": ["Dog"]}, path)
    assert found.classes.classes == ("dog", "cat", "bird") and found.tags == {"a": [1], "b": [0]} and found.classes.bg_texts == ["a clean origami grass."]
    assert found.classes.palette()[:4].tolist() == [[0, 0, 0], [0, 0, 255], [255, 99, 71], voc_palette()[3].tolist()]
    assert any("classes without a picture: 1 (bird)" in line for line in findings(found))

@pytest.mark.parametrize("text", ["", "cat", "classes:", "classes: cat", "classes: [1]", "classes: [{name: cat, color: red}]", "classes: [{name: cat, colour: '#12'}]", "classes: [{prompt: cat}]",
    "classes: [{name: cat, prompt: []}]", "classes: [{name: cat, colour: #ff0000}]", "classes: [cat]\nbackground: grass", "classes: [cat]\nbackground: []", "classes: [cat]\ntemplate: photo",
    "classes: [cat, cat]", "classes: [background]", "a: &a [*a]", "!!python/object/apply:os.system [x]", "classes: [cat\n", "a: &a [x,x]\nb: &b [*a,*a]\nclasses: *b", "[" * 1000])
def test_broken_class_files(pets, text):
    with pytest.raises(ValueError):
        find_images(pets, {"a.jpg": ["cat"]}, yaml(pets, text))

@pytest.mark.parametrize("text, says", [
    ("classes: [cat, dog]\nclasses: [fox]\n", "line 2: 'classes' comes twice"),
    ("classes:\n- name: cat\n  prompt: cat\n  prompt: kitten\n", "line 4: 'prompt' comes twice"),
    ("template: a {}.\nclasses: [cat]\n'template': b {}.\n", "line 3: 'template' comes twice"),
    ("classes: [cat, Cat]", "differ in more than case"), ("classes: [cat, ' cat']", "differ in more than case"),
    ("classes: [traffic light, traffic  light]", "differ in more than case"),
    ("classes: [caf\u00e9, cafe\u0301]", "differ in more than case"),
    ("classes: [cat, Background]", "what has no class")])
def test_class_files_that_lose_or_double_a_class(pets, text, says):
    "YAML's readers keep the last of two equal keys; classes that differ in case alone were two."
    with pytest.raises(ValueError, match=f"classes.yaml: .*{says}"):
        get_classes(yaml(pets, text))

def test_merged_keys_are_not_twice(pets):
    text = "classes:\n- &x {name: cat, prompt: kitten}\n- {<<: *x, name: dog}\n"
    assert get_classes(yaml(pets, text)).prompts == ("kitten", "kitten")

def test_names_in_python_are_checked_alike():
    for a, b in (("cat", "Cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")):
        with pytest.raises(ValueError, match="differ in more than case"):
            ClassSet("x", (a, b), ("one", "two"))

# ---- prompts

LONG_PROMPT = "word "*30

def test_prompts_that_become_one_text(tmp_path):
    "Two prompts over the tower's 20 tokens were cut to one text, so the two classes could never be told apart."
    classes = ClassSet("x", ("a", "b"), (LONG_PROMPT + "cup", LONG_PROMPT + "train"), ("sky",), "a {}.")
    with pytest.raises(ValueError, match="one and the same text to CLIP, which reads 20 tokens"):
        build("tiny", classes=classes)
    with pytest.raises(ValueError, match="one and the same text"):
        build("tiny", classes=ClassSet("x", ("a", "b"), ("big cup", "Big Cup"), ("sky",), "a {}."))

def test_every_cut_prompt_is_named(tmp_path, caplog):
    tokenizer = load_backbone("tiny")[1]
    n = len(tokenizer.encode(f"a {LONG_PROMPT}cup.")) + 2
    with caplog.at_level(logging.WARNING):
        model = build("tiny", classes=ClassSet("x", ("a", "b"), (LONG_PROMPT + "cup", "train"), ("sky",), "a {}."))
    assert len(caplog.messages) == 1
    assert f"reads 20 tokens, its end is cut off: it has {n}" in caplog.messages[0]
    assert "cup" in caplog.messages[0]
    save_model(tmp_path/"m.safetensors", model, "tiny")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_model(tmp_path/"m.safetensors")
    assert len(caplog.messages) == 1 and "cut off" in caplog.messages[0]
    caplog.clear()
    # 18 and the two ends
    at_limit = next(t for t in ("cup "*k for k in range(30)) if len(tokenizer.encode(t + "cup")) == 18)
    with caplog.at_level(logging.WARNING):
        tokens_of(tokenizer, [at_limit + "cup"])
    assert not caplog.messages
    with caplog.at_level(logging.WARNING):
        tokens_of(tokenizer, [at_limit + "cup cup"])
    assert "it has 21" in caplog.text

def test_a_background_that_is_a_class(caplog):
    "A background word that is also a prompt takes the class's score away."
    tokenizer = load_backbone("tiny")[1]
    assert shared_texts(tokenizer, ["a Cup.", "a car."], ["a cup.", "a sky."]) == [("a Cup.", "a cup.")]
    with caplog.at_level(logging.WARNING):
        build("tiny", classes=ClassSet("x", ("a",), ("cup",), ("sky", "cup"), "a {}."))
    assert "same text as a class's" in caplog.text

@pytest.mark.parametrize("command", ["train", "inspect", "pseudo"])
def test_commands_refuse_prompts_that_become_one(mine, tmp_path, capsys, command):
    rows = "".join(f"- {{name: {n}, prompt: '{LONG_PROMPT}{n}'}}\n" for n in SCENES.classes)
    (tmp_path/"c.yaml").write_text("template: 'a {}.'\nclasses:\n" + rows)
    assert main([command, *own(mine, "--classes", str(tmp_path/"c.yaml"), "--out", str(tmp_path/"o"))]) == 2
    assert "one and the same text" in capsys.readouterr().err

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
        rows.append(f"{'ab'[k % 2]}/{src.name},{';'.join(t)}")
    (top/"tags.csv").write_text("\n".join(rows))
    (top/"classes.yaml").write_text('template: "a picture of a {}."\nbackground: [grass, sky, water, sand, road]\nclasses:\n' +
        "".join(f"- {{name: {n}, colour: [{10*k + 10}, 0, 255]}}\n" for k, n in enumerate(SCENES.classes)))
    return top

@pytest.fixture(scope="module")
def run(mine, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["train", "--images", str(mine/"pics"), "--tags", str(mine/"tags.csv"), "--classes", str(mine/"classes.yaml"), "--clip", "tiny", *FAST, "--out", str(out)]) == 0
    return out

def n_found(mine): return len(find_images(mine/"pics", mine/"tags.csv").classes.classes)

def own(mine, *more): return ["--images", str(mine/"pics"), "--tags", str(mine/"tags.csv"), "--clip", "tiny", "--device", "cpu", *more]

def test_train_then_predict_needs_nothing_else(mine, run, tmp_path, capsys):
    about, _ = read_model(run/"model.safetensors")
    assert tuple(about["classes"]["classes"]) == SCENES.classes and about["config"]["classes"] == "classes" and about["config"]["views"] == 0
    assert str(mine) not in json.dumps(about)
    args = ["predict", str(mine/"pics"/"a"), "--checkpoint", str(run/"model.safetensors"), "--out", str(tmp_path), "--no-crf", "--device", "cpu"]
    for f in ("tags.csv", "classes.yaml"):
        (mine/f).rename(mine/f"{f}.away")
    try:
        assert main(args) == 0
    finally:
        for f in ("tags.csv", "classes.yaml"):
            (mine/f"{f}.away").rename(mine/f)
    assert f"1 {SCENES.classes[0]}, 2 {SCENES.classes[1]}" in capsys.readouterr().out
    masks = sorted(tmp_path.glob("*.png"))
    assert len(masks) == 8
    assert np.array(Image.open(masks[0]).getpalette()).reshape(-1, 3)[:len(SCENES.names)].tolist() == [[0, 0, 0], *([10*k + 10, 0, 255] for k in range(len(SCENES.classes)))]

def test_train_says_how_long(mine, tmp_path, capsys):
    assert main(["train", *own(mine), "--iters", "3", "--set", "bs=2", "d=32", "layers=1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = find_images(mine/"pics", mine/"tags.csv")
    assert "pictures of each class: " + ", ".join(f"{n} {sum(k in t for t in found.tags.values())}" for k,
        n in enumerate(found.classes.classes)) in out
    assert f"training on 16 pictures of {n_found(mine)} classes" in out and "3 iterations of 2 crops of 112 pixels, 0 visits to each picture: less than a minute" in out
    assert read_model(tmp_path/"model.safetensors")[0]["config"]["switch"] == 1 and read_model(tmp_path/"model.safetensors")[0]["classes"]["template"] == SCENES.template

@pytest.mark.parametrize("args, want", [
    (["--images", "x", "--tags", "y"], dict(iters=2000, switch=600, crop=320, pad_ignore=True)), (["--images", "x", "--tags", "y", "--iters", "500"], dict(iters=500, switch=150)),
    (["--images", "x", "--tags", "y", "--iters", "500", "--set", "switch=0"], dict(iters=500, switch=0)), (["--images", "x", "--tags", "y", "--clip", "tiny"], dict(iters=1000, crop=112, views=0)),
    (["--images", "x", "--tags", "y", "--profile", "coco"], dict(iters=80_000, bs=4)), (["root"], dict(iters=30_000, switch=9144, pad_ignore=False)), (["root", "--iters", "300"], dict(iters=300, switch=91))])
def test_profiles(args, want):
    given = read_arguments("train", [*args, "--out", "o"])
    cfg = config_of(**{k: v for k, v in given.items() if k in inspect.signature(config_of).parameters})
    assert {k: getattr(cfg, k) for k in want} == want

def test_pseudo_labels(mine, run, tmp_path):
    assert main(["pseudo", *own(mine, "--classes", str(mine/"classes.yaml"), "--out", str(tmp_path/"before"))]) == 0
    assert main(["pseudo", *own(mine, "--checkpoint", str(run/"model.safetensors"), "--stages", "--out", str(tmp_path/"after"))]) == 0
    before = sorted((tmp_path/"before").rglob("*.png"))
    assert len(before) == 16 and {p.parent.name for p in before} == {"a", "b"}
    assert len(list((tmp_path/"after"/"pseudo").rglob("*.png"))) == 16
    found = find_images(mine/"pics", mine/"tags.csv", mine/"classes.yaml")
    for i, tags in found.tags.items():
        mask = Image.open(tmp_path/"before"/f"{i}.png")
        assert mask.size == Image.open(found.images[i]).size and set(np.unique(np.asarray(mask))) <= {0, *(t + 1 for t in tags)} and mask.getpalette()[3:6] == [10, 0, 255]

def test_resume_with_other_tags(mine, tmp_path, capsys):
    args = ["train", *own(mine), "--set", "iters=2", "d=32", "layers=1", "heads=2", "bs=2", "--out", str(tmp_path)]
    assert main(args) == 0
    text = (mine/"tags.csv").read_text()
    (mine/"other.csv").write_text(text.replace("bird", "zeppelin"))
    args[args.index(str(mine/"tags.csv"))] = str(mine/"other.csv")
    assert main([*args, "--resume"]) == 2 and "did the tags change" in capsys.readouterr().err

def test_inspect(mine, tmp_path, capsys):
    assert main(["inspect", *own(mine, "--out", str(tmp_path/"own"), "--sheet", "2")]) == 0
    out = capsys.readouterr().out
    r = json.loads((tmp_path/"own"/"inspect.json").read_text())
    assert f"16 pictures, {n_found(mine)} classes" in out and "few pictures, fewer than 10" in out
    assert sum(c["pictures"] for c in r["classes"]) == sum(map(len, find_images(mine/"pics", mine/"tags.csv").tags.values())) and r["untagged"] == r["missing"] == []
    assert len(list((tmp_path/"own"/"cams").iterdir())) == sum(c["pictures"] > 0 for c in r["classes"])
    sheet = Image.open(next((tmp_path/"own"/"cams").iterdir()))
    assert sheet.width == 3*164 + 4
    assert main(["inspect", str(mine/"scenes"), "--train-split", "train", "--profile", "scenes", "--clip", "tiny", "--device", "cpu", "--out", str(tmp_path/"voc"), "--sheet", "0"]) == 0
    voc = json.loads((tmp_path/"voc"/"inspect.json").read_text())
    assert [c["ap"] for c in voc["classes"]] == [c["ap"] for c in r["classes"]] and not (tmp_path/"voc"/"cams").exists()

@pytest.mark.parametrize("command, args, says", [
    ("train", [], "got neither"), ("train", ["root", "--images", "x", "--tags", "y"], "got both"), ("train", ["--images", "{mine}/pics"], "--images and --tags together"),
    ("train", ["root", "--tags", "x.csv"], "--images and --tags together"), ("pseudo", ["--images", "{mine}/pics", "--tags", "none.csv"], "none.csv: expected a file of tags"),
    ("inspect", ["--images", "none", "--tags", "{mine}/tags.csv"], "none: expected a folder"), ("train", ["--images", "{mine}/pics", "--tags", "{mine}/tags.csv", "--iters", "0"], "--iters: expected at least 1"),
    ("train", ["--images", "{mine}/pics", "--tags", "{mine}/tags.csv", "--set", "supervised=True"], "expected masks"),
    ("train", ["--images", "{mine}/pics", "--tags", "{mine}/tags.csv", "--classes", "voc"], "expected tags among the 20 classes"),
    ("train", ["--images", "{mine}/pics/a", "--tags", "{mine}/tags.csv"], "none of its 16 files"), ("inspect", ["--images", "{mine}", "--tags", "folders", "--classes", "voc"], "expected tags among")])
def test_mistakes_are_one_line(mine, tmp_path, capsys, command, args, says):
    status = main([command, *(a.format(mine=mine) for a in args), "--clip", "tiny", "--device", "cpu", "--out", str(tmp_path)])
    err = capsys.readouterr().err
    assert status == 2 and says in err and "Traceback" not in err and "\n" not in err.strip().split("weclip ")[-1]

# ---- inspection

@pytest.fixture(scope="module")
def tiny(): return build("tiny")

def test_inspection_reports_what_training_refuses(mine, tiny, tmp_path):
    data, _ = open_images(mine/"pics", mine/"tags.csv", SCENES, progress=False)
    data.images["broken"] = mine/"tags.csv"
    data.ids.append("broken")
    data.tags["broken"] = [0]
    report, seen = inspect_set(tiny, data, ["said"], progress=False)
    assert list(report["unreadable"]) == ["broken"] and report["pictures"] == 16 and "broken" not in seen.ids
    assert report["worries"][0].startswith("broken: ") and report["worries"][1] == "said"
    assert json.dumps(report, allow_nan=False)
    with pytest.raises(ValueError, match="none of 1 can be read"):
        survey(tiny, {"broken": mine/"tags.csv"}, progress=False)

def test_batches_do_not_change_a_survey(mine, tiny):
    images = find_images(mine/"pics", mine/"tags.csv").images
    a, b = (survey(tiny, images, bs=bs, progress=False) for bs in (1, 7))
    assert a.ids == b.ids == list(images) and torch.allclose(a.scores, b.scores, atol=1e-6) and (a.sizes == b.sizes).all()
    assert tuple(a.sizes[0][::-1]) == Image.open(images[a.ids[0]]).size

def test_sheets_stay_in_their_folder(mine, tiny, tmp_path):
    data, _ = open_images(mine/"pics", mine/"tags.csv", SCENES, progress=False)
    data.names = tuple("../../x" if n == "car" else n for n in data.names)
    files = cam_sheets(tiny, data, survey(tiny, data.images, progress=False), tmp_path/"cams", most=1)
    assert {f.parent for f in files} == {tmp_path/"cams"} and {p.name for p in tmp_path.iterdir()} == {"cams"} and any("_x.png" in f.name for f in files)

def test_one_picture_one_class(tmp_path, tiny):
    picture(tmp_path/"p"/"a.jpg", 64, 80)
    data, classes = open_images(tmp_path/"p", {"a": ["car"]}, progress=False)
    report, _ = inspect_set(build("tiny", classes=classes), data, progress=False)
    assert report["classes"][0]["agreement"] is None and any("every picture has this tag" in w for w in report["worries"])

# ---- photographs

@pytest.mark.skipif(not (DATA/"coco").is_dir(), reason=f"no COCO photographs at {DATA} (set WECLIP_DATA)")
def test_coco_photographs_and_a_csv(tmp_path):
    ann = json.loads((DATA/"coco"/"annotations"/"instances_train2017.json").read_text())
    name = {c["id"]: c["name"] for c in ann["categories"]}
    file = {i["id"]: i["file_name"] for i in ann["images"]}
    tags = {f: sorted({name[a["category_id"]] for a in ann["annotations"] if a["image_id"] == i}) for i, f in file.items()}
    (tmp_path/"tags.csv").write_text("file,tags\n" + "".join(f"{f},{';'.join(t)}\n" for f, t in tags.items()))
    folder = DATA/"coco"/"train2017"
    here = {f for f in tags if (folder/f).is_file()}
    assert len(here) == 10
    data, classes = open_images(folder, tmp_path/"tags.csv", progress=False, crop=320)
    assert {p.name for p in data.images.values()} == {f for f in here if tags[f]}
    assert all([classes.classes[k] for k in data.tags[i]] == tags[p.name] for i, p in data.images.items())
    assert all(tuple(s.img.shape) == (3, 320, 320) and s.tags for s in data)
    coco = find_images(folder, tmp_path/"tags.csv", "coco")
    assert coco.classes == get_classes("coco") and coco.images == data.images and not coco.respelt


# ---- what a reader with other people's folders and tables met

@pytest.mark.parametrize("folders", [("train2017/a", "val2017/b"), ("train/a", "test1/b"), ("seg_train/cat/a", "seg_test/cat/b"), ("train_images/a", "test_images/b"),
                                     ("training_set/cat/a", "training_set/dog/a", "test_set/b"), ("JPEGImages/a", "SegmentationClass/b", "SegmentationObject/c")])
def test_parts_of_published_sets_are_no_classes(tmp_path, folders):
    "Only the bare words train, val and test were known, so the classes 'train2017' and 'val2017' were trained."
    for name in folders:
        picture(tmp_path/f"{name}.jpg")
    with pytest.raises(ValueError, match="parts of a data set"):
        find_images(tmp_path, "folders")

def test_a_folder_between_is_no_class(tmp_path):
    "archive/{train,val}/{cat,dog} trained one class called archive."
    for name in ("archive/train/cat/a", "archive/val/cat/b"):
        picture(tmp_path/f"{name}.jpg")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path/"archive"/"train"))):
        find_images(tmp_path, "folders")

@pytest.mark.parametrize("names", [("bird", "car", "train"), ("train", "bus"), ("valid", "invalid"), ("test tube", "flask")])
def test_classes_that_sound_like_parts(tmp_path, names):
    for name in names:
        picture(tmp_path/name/"1.jpg")
    assert find_images(tmp_path, "folders").classes.classes == tuple(sorted(names))

def test_classes_by_year_are_told_both_ways_out(tmp_path):
    for c in ("cat", "dog"):
        for year in ("2023", "2024"):
            picture(tmp_path/c/year/"1.jpg")
    with pytest.raises(ValueError, match="hold the same sub-folders .*list them .--classes.*name one folder"):
        find_images(tmp_path, "folders")
    classes = ClassSet("pets", ("cat", "dog"), ("cat", "dog"), ("sky",))
    assert find_images(tmp_path, "folders", classes).classes.classes == ("cat", "dog")

@pytest.mark.parametrize("table", ["filename,animal,difficult\na.jpg,cat,0\nb.jpg,dog,1\n", "file,breed,fold\na.jpg,pug,0\nb.jpg,lab,1\n",
                                   "file,emotion,usage,is_test\na.jpg,joy,x,0\nb.jpg,fear,y,1\n",
                                   "Image Index,Finding Labels,Follow-up,Patient ID\na.jpg,Mass,0,1\nb.jpg,Hernia,1,0\n",
                                   "filename,xmin,ymin,xmax,ymax,kind\na.jpg,0,0,1,1,cat\nb.jpg,0,1,1,1,dog\n"])
def test_a_column_of_words_is_not_passed_over(tmp_path, table):
    "Where the tag column had a word of its own, the 0/1 column beside it became the only class."
    (tmp_path/"t.csv").write_text(table)
    with pytest.raises(ValueError, match="columns"):
        rows_csv(tmp_path/"t.csv")

def test_onehot_columns_may_be_called_0_and_1(tmp_path):
    (tmp_path/"t.csv").write_text("image,0,1,2\na.jpg,1,0,0\nb.jpg,0,1,1\n")
    assert rows_csv(tmp_path/"t.csv") == [("a.jpg", ["0"]), ("b.jpg", ["1", "2"])]

@pytest.mark.parametrize("table", ["filename,split,cat,dog\na.jpg,train,1,0\nb.jpg,val,0,1\n", "filename,width,height,cat,dog\na.jpg,640,480,1,0\nb.jpg,320,240,0,1\n"])
def test_onehot_beside_facts_of_the_picture(tmp_path, table):
    (tmp_path/"t.csv").write_text(table)
    assert rows_csv(tmp_path/"t.csv") == [("a.jpg", ["cat"]), ("b.jpg", ["dog"])]

def test_a_list_as_a_program_writes_it_is_no_tag(tmp_path):
    picture(tmp_path/"a.jpg")
    (tmp_path/"t.csv").write_text("file,tags\na.jpg,['cat']\n")
    with pytest.raises(ValueError, match="cat;dog"):
        find_images(tmp_path, tmp_path/"t.csv")

def test_a_ragged_table_names_its_line(tmp_path):
    (tmp_path/"t.csv").write_text("image,cat,dog\na.jpg,1,0\nb.jpg,1\n")
    with pytest.raises(ValueError, match="line 3 has 2 cells instead of 3"):
        rows_csv(tmp_path/"t.csv")

def test_two_classes_of_one_prompt_are_told(caplog):
    "They have one and the same text feature, as asked for; only `inspect` said so."
    with caplog.at_level(logging.WARNING):
        build("tiny", classes=ClassSet("x", ("cat", "dog"), ("pet", "pet"), ("sky",), "a {}."))
    assert "'pet' stands for more than one class" in caplog.text
