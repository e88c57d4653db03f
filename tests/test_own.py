"""Somebody's own pictures: every form of tags, every way to get them wrong, and the commands that read them."""
import json, logging, os, random
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from weclip.classes import SCENES, VOC, get_classes, voc_palette
from weclip.cli import config_of, main, parser
from weclip.inspection import cam_sheets, inspect_set, survey
from weclip.model import build, read_model
from weclip.own import check_pictures, find_images, findings, inside, open_images, picture_files
from weclip.scenes import write_scenes

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
FAST = ["--set", "iters=4", "warmup=2", "d=32", "layers=1", "heads=2", "bs=4", "--device", "cpu"]

def picture(path, h=20, w=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).save(path)

@pytest.fixture
def pets(tmp_path):
    "a.jpg, b.png, garden/a.jpg, garden/deep/c.JPEG, beside a secret."
    for n in ("a.jpg", "b.png", "garden/a.jpg", "garden/deep/c.JPEG"): picture(tmp_path/"pets"/n)
    picture(tmp_path/"secret.jpg")
    return tmp_path/"pets"

def csv(pets, text, name="tags.csv"):
    path = pets.parent/name; path.write_bytes(text if isinstance(text, bytes) else text.encode()); return path

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
    picture(pets/"dog"/"x"/"d.jpg"); picture(pets/".thumbs"/"e.jpg"); picture(pets/"dog"/"._d.jpg")
    found = find_images(pets, "folders")
    assert found.tags == {"dog/x/d": [0], "garden/a": [1], "garden/deep/c": [1]} and found.untagged == ["a.jpg", "b.png"]

def test_folders_without_folders(tmp_path):
    picture(tmp_path/"a.jpg")
    with pytest.raises(ValueError, match="sub-folder named after its class"): find_images(tmp_path, "folders")

def test_onehot(pets):
    np.save(pets.parent/"cls_labels_onehot.npy", {"a": np.eye(20, dtype=np.float32)[7], "nowhere": np.eye(20, dtype=np.float32)[0]}, allow_pickle=True)
    found = find_images(pets, pets.parent/"cls_labels_onehot.npy", "voc")
    assert found.tags == {"a": [7]} and found.missing == ["nowhere"] and found.classes == VOC
    with pytest.raises(ValueError, match="holds no names"): find_images(pets, pets.parent/"cls_labels_onehot.npy")
    with pytest.raises(ValueError, match="expected 80 values"): find_images(pets, pets.parent/"cls_labels_onehot.npy", "coco")
    with pytest.raises(FileNotFoundError, match="no such file"): find_images(pets, pets.parent/"none.npy", "voc")

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
        with pytest.raises(ValueError, match="expected a path below"): find_images(pets, tags)
    with pytest.raises(ValueError): find_images(pets, csv(pets, f'a.jpg,cat\n"{bad}",cat'))

def test_links_that_leave_the_folder(pets):
    (pets/"link.jpg").symlink_to(pets.parent/"secret.jpg"); (pets/"up").symlink_to(pets.parent); (pets/"loop.jpg").symlink_to(pets/"loop.jpg")
    for name in ("link.jpg", "link", "up/secret.jpg"):
        with pytest.raises(ValueError, match="through a link"): find_images(pets, {"a.jpg": ["cat"], name: ["cat"]})
    with pytest.raises(ValueError, match="1 of 2 pictures cannot be read: .*loop.jpg"): open_images(pets, {"a.jpg": ["cat"], "loop.jpg": ["cat"]}, progress=False)
    assert not any(n.startswith("up/") for n in picture_files(pets))
    picture(pets/"dog"/"d.jpg"); (pets/"dog"/"out.jpg").symlink_to(pets.parent/"secret.jpg")
    with pytest.raises(ValueError, match="through a link"): find_images(pets, "folders")

def test_links_that_stay(pets):
    (pets/"same.jpg").symlink_to(pets/"a.jpg"); (pets.parent/"door").symlink_to(pets)
    assert find_images(pets, {"same.jpg": ["cat"]}).tags == {"same": [0]}
    assert find_images(pets.parent/"door", {"a.jpg": ["cat"]}).tags == {"a": [0]}
    assert inside(pets.parent/"door", "garden/a.jpg").is_file()

# ---- misfits

def test_what_does_not_fit_is_counted(pets, caplog):
    tags = csv(pets, "a.jpg,Cat\na,dog\ngarden/a.jpg,cat\ngarden/deep/c.JPEG,cat\nb.png,\nx.jpg,dog\ny/z.jpg,fish")
    found = find_images(pets, tags)
    assert found.classes.classes == ("cat", "dog")  # a fish that is not there makes no class
    assert (found.untagged, found.missing, found.twice, found.respelt) == (["b.png"], ["x.jpg", "y/z.jpg"], ["a.jpg"], {"Cat": ("cat", 1)})
    with caplog.at_level(logging.WARNING): data, _ = open_images(pets, tags, progress=False)
    said = [r.getMessage() for r in caplog.records]
    assert said == [f"{tags} for {pets}: {line}" for line in findings(found)] and len(said) == 4
    for part in ("left out: 1 ('b.png')", "not there, left out: 2 ('x.jpg', 'y/z.jpg')", "more than once, tags put together: 1 ('a.jpg')", "'Cat' as 'cat' 1x"): assert part in "".join(said)
    assert data.tags["a"] == [0, 1]
    with pytest.raises(ValueError, match=r"\.csv for .*left out: 1 .*left out: 2"): open_images(pets, tags, strict=True)
    assert not findings(find_images(pets, {n: ["cat"] for n in picture_files(pets)}))

def test_all_files_elsewhere(pets):
    with pytest.raises(FileNotFoundError, match="none of its 2 files.*'train/a.jpg'.*there are 'a.jpg'"): find_images(pets, csv(pets, "train/a.jpg,cat\ntrain/b.png,dog"))

def test_spellings_of_a_class(pets):
    same = find_images(pets, {"a.jpg": ["traffic light"], "b.png": ["Traffic  Light"], "garden/a": ["traffic\u00a0light"], "garden/deep/c": [" traffic light"]})
    assert same.classes.classes == ("traffic light",) and len(same.respelt) == 3 and set(same.tags) == {"a", "b", "garden/a", "garden/deep/c"}
    assert find_images(pets, {"a.jpg": ["DOG"]}, "voc").respelt == {"DOG": ("dog", 1)}
    with pytest.raises(ValueError, match="expected tags among the 20 classes, got 'dgo' .1x, nearest: 'dog'., 'unicorn'"): find_images(pets, {"a.jpg": ["dgo", "unicorn"]}, "voc")

@pytest.mark.parametrize("tag, says", [("cat,dog", "expected ;"), ("cat|dog", "expected ;"), ("background", "not 'background'"), ("", "printable"), ("a\u200bb", "printable"), ("a\ud800", "printable")])
def test_tags_that_are_no_name(pets, tag, says):
    with pytest.raises(ValueError, match=says): find_images(pets, {"a.jpg": [tag]})

def test_two_pictures_of_one_mask(pets):
    picture(pets/"a.png")
    with pytest.raises(ValueError, match="share a mask: a.jpg"): find_images(pets, {"a.jpg": ["cat"], "a.png": ["cat"]})
    with pytest.raises(ValueError, match="expected one picture, found a.jpg, a.png"): find_images(pets, {"a": ["cat"]})
    assert find_images(pets, {"a.png": ["cat"]}).images["a"] == pets/"a.png"

def test_broken_pictures_are_named_together(pets):
    (pets/"a.jpg").write_bytes((pets/"a.jpg").read_bytes()[:200]); (pets/"b.png").write_bytes(b"")
    tags = {n: ["cat"] for n in ("a.jpg", "b.png", "garden/a.jpg")}
    with pytest.raises(ValueError, match="2 of 3 pictures cannot be read: .*a.jpg.*b.png"): open_images(pets, tags, progress=False)
    assert len(open_images(pets, tags, check=False)[0]) == 3
    check_pictures({"x": pets/"garden"/"a.jpg"}, progress=False)

def test_many_classes(pets):
    names = [f"c{i:03}" for i in range(255)]
    assert find_images(pets, {"a.jpg": names[:254]}).classes.n_classes == 255
    with pytest.raises(ValueError, match="at most 254"): find_images(pets, {"a.jpg": names})

@pytest.mark.parametrize("text, says", [("", "empty file"), ("\n \n", "empty file"), ('a.jpg,"cat\nb.png,dog', "quote left open"), ("a.jpg,cat,dog", "line 1: expected 2 columns"),
    ("file,tags\na.jpg,cat,dog", "line 2: expected 2 columns"), (",cat", "name of a picture"), ("file,tags", "got none"), (b"caf\xe9.jpg,cat", "UTF-8"), ("a.jpg,cat".encode("utf-16"), "UTF-8")])
def test_broken_csv(pets, text, says):
    with pytest.raises((ValueError, FileNotFoundError), match=says): find_images(pets, csv(pets, text))

@pytest.mark.parametrize("text", ["", "{", "[]", '"a"', "{}", '{"a.jpg": "cat"}', '{"a.jpg": [1]}', '{"a.jpg": [["cat"]]}', '{"a.jpg": {"cat": []}}', "["*50_000, '{"a":'*50_000, "NaN"])
def test_broken_json(pets, text):
    with pytest.raises(ValueError, match="tags.json"): find_images(pets, csv(pets, text, "tags.json"))

def test_no_file_no_folder(pets):
    with pytest.raises(FileNotFoundError, match="none.csv: expected a file of tags"): find_images(pets, pets/"none.csv")
    with pytest.raises(FileNotFoundError, match="no such folder"): find_images(pets/"cats", {"a.jpg": ["cat"]})
    with pytest.raises(FileNotFoundError, match="found none"): find_images(pets.parent/"empty", {"a.jpg": ["cat"]}) if (pets.parent/"empty").mkdir() is None else None
    with pytest.raises(ValueError, match="ending in .csv"): find_images(pets, pets/"tags.xlsx")
    with pytest.raises(FileNotFoundError): find_images(pets, pets/"tags.csv")

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
            case 0: data[i:i] = piece
            case 1: del data[i:min(j, i + 8)]
            case 2: data[i:i + len(piece)] = piece
            case 3: data[i:i] = data[i:j]
            case 4 if data: data[i % len(data)] = rng.randrange(256)
    return bytes(data)

@pytest.mark.parametrize("name", BASE)
def test_mutated_files(pets, name):
    rng, ends, tags = random.Random(5), {"result": 0, "error": 0}, csv(pets, BASE["tags.csv"])
    home = os.path.realpath(pets)
    for _ in range(300):
        text = mutated(BASE[name], rng)
        path = csv(pets, text, name)
        try:
            if name == "classes.yaml": found = find_images(pets, tags, path)
            else: found = find_images(pets, path)
        except (ValueError, FileNotFoundError) as e:
            str(e).encode(); ends["error"] += 1  # a message that can be printed
        else:
            findings(found); found.classes.palette(); ends["result"] += 1
            assert found.images and set(found.images) == set(found.tags) and all(os.path.realpath(p).startswith(home + os.sep) for p in found.images.values())
            assert all(t and set(t) <= set(range(len(found.classes.classes))) for t in found.tags.values())
    assert min(ends.values()) >= 10, ends  # the mutations reach both ends

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
    with pytest.raises(ValueError): find_images(pets, {"a.jpg": ["cat"]}, yaml(pets, text))

# ---- commands

@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "Sixteen drawn scenes in sub-folders, their tags as CSV, and a list of classes with colours."
    top = tmp_path_factory.mktemp("mine")
    root = write_scenes(top/"scenes", train=16, val=0, workers=1)
    tags = json.loads((root/"ImageSets"/"Segmentation"/"tags.json").read_text()); rows = ["file,tags"]
    for k, (i, t) in enumerate(sorted(tags.items())):
        to = top/"pics"/"ab"[k % 2]; to.mkdir(parents=True, exist_ok=True)
        src = next((root/"JPEGImages").glob(f"{i}.*")); (to/src.name).write_bytes(src.read_bytes()); rows.append(f"{'ab'[k % 2]}/{src.name},{';'.join(t)}")
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
    for f in ("tags.csv", "classes.yaml"): (mine/f).rename(mine/f"{f}.away")
    try: assert main(args) == 0
    finally:
        for f in ("tags.csv", "classes.yaml"): (mine/f"{f}.away").rename(mine/f)
    assert f"1 {SCENES.classes[0]}, 2 {SCENES.classes[1]}" in capsys.readouterr().out
    masks = sorted(tmp_path.glob("*.png")); assert len(masks) == 8
    assert np.array(Image.open(masks[0]).getpalette()).reshape(-1, 3)[:len(SCENES.names)].tolist() == [[0, 0, 0], *([10*k + 10, 0, 255] for k in range(len(SCENES.classes)))]

def test_train_says_how_long(mine, tmp_path, capsys):
    assert main(["train", *own(mine), "--iters", "3", "--set", "bs=2", "d=32", "layers=1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"training on 16 pictures of {n_found(mine)} classes" in out and "3 iterations of 2 crops of 112 pixels, 0 visits to each picture: less than a minute" in out
    assert read_model(tmp_path/"model.safetensors")[0]["config"]["switch"] == 1 and read_model(tmp_path/"model.safetensors")[0]["classes"]["template"] == SCENES.template

@pytest.mark.parametrize("args, want", [
    (["--images", "x", "--tags", "y"], dict(iters=2000, switch=600, crop=320, pad_ignore=True)), (["--images", "x", "--tags", "y", "--iters", "500"], dict(iters=500, switch=150)),
    (["--images", "x", "--tags", "y", "--iters", "500", "--set", "switch=0"], dict(iters=500, switch=0)), (["--images", "x", "--tags", "y", "--clip", "tiny"], dict(iters=1000, crop=112, views=0)),
    (["--images", "x", "--tags", "y", "--profile", "coco"], dict(iters=80_000, bs=4)), (["root"], dict(iters=30_000, switch=9144, pad_ignore=False)), (["root", "--iters", "300"], dict(iters=300, switch=91))])
def test_profiles(args, want):
    cfg = config_of(parser().parse_args(["train", *args, "--out", "o"]))
    assert {k: getattr(cfg, k) for k in want} == want

def test_pseudo_labels(mine, run, tmp_path):
    assert main(["pseudo", *own(mine, "--classes", str(mine/"classes.yaml"), "--out", str(tmp_path/"before"))]) == 0
    assert main(["pseudo", *own(mine, "--checkpoint", str(run/"model.safetensors"), "--stages", "--out", str(tmp_path/"after"))]) == 0
    before = sorted((tmp_path/"before").rglob("*.png")); assert len(before) == 16 and {p.parent.name for p in before} == {"a", "b"}
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
    out, r = capsys.readouterr().out, json.loads((tmp_path/"own"/"inspect.json").read_text())
    assert f"16 pictures, {n_found(mine)} classes" in out and "few pictures, fewer than 10" in out
    assert sum(c["pictures"] for c in r["classes"]) == sum(map(len, find_images(mine/"pics", mine/"tags.csv").tags.values())) and r["untagged"] == r["missing"] == []
    assert len(list((tmp_path/"own"/"cams").iterdir())) == sum(c["pictures"] > 0 for c in r["classes"])
    sheet = Image.open(next((tmp_path/"own"/"cams").iterdir())); assert sheet.width == 3*164 + 4
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
    data.images["broken"] = mine/"tags.csv"; data.ids.append("broken"); data.tags["broken"] = [0]
    report, seen = inspect_set(tiny, data, ["said"], progress=False)
    assert list(report["unreadable"]) == ["broken"] and report["pictures"] == 16 and "broken" not in seen.ids
    assert report["worries"][0].startswith("broken: ") and report["worries"][1] == "said"
    assert json.dumps(report, allow_nan=False)
    with pytest.raises(ValueError, match="none of 1 can be read"): survey(tiny, {"broken": mine/"tags.csv"}, progress=False)

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
    name, file = {c["id"]: c["name"] for c in ann["categories"]}, {i["id"]: i["file_name"] for i in ann["images"]}
    tags = {f: sorted({name[a["category_id"]] for a in ann["annotations"] if a["image_id"] == i}) for i, f in file.items()}
    (tmp_path/"tags.csv").write_text("file,tags\n" + "".join(f"{f},{';'.join(t)}\n" for f, t in tags.items()))
    folder = DATA/"coco"/"train2017"
    here = {f for f in tags if (folder/f).is_file()}; assert len(here) == 10
    data, classes = open_images(folder, tmp_path/"tags.csv", progress=False, crop=320)
    assert {p.name for p in data.images.values()} == {f for f in here if tags[f]}
    assert all([classes.classes[k] for k in data.tags[i]] == tags[p.name] for i, p in data.images.items())
    assert all(tuple(s.img.shape) == (3, 320, 320) and s.tags for s in data)
    coco = find_images(folder, tmp_path/"tags.csv", "coco")
    assert coco.classes == get_classes("coco") and coco.images == data.images and not coco.respelt
