"""The field's data: hostile archives, broken downloads, stopped builds, odd annotations, and real photographs."""
import http.server, io, json, os, pickle, re, shutil, signal, stat, tarfile, threading, time, weakref, zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np, pytest, torch
from PIL import Image

pytest.importorskip("scipy.io", reason="needs the data extras: scipy")
pytest.importorskip("pycocotools.mask", reason="needs the data extras: pycocotools")
from pycocotools import mask as rle
from pycocotools.coco import COCO as CocoAPI
from scipy.io import savemat
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

import weclip.use.commands, weclip.data.field as field
from refusals import check_all, not_refused
from weclip.method.classes import COCO, VOC, voc_palette
from weclip.method.config import preset
from weclip.data.pictures import read_mask, save_mask
from weclip.data.voc import open_data, read_onehot, read_tags
from weclip.data.field import (
    Archive, build_coco, build_voc, coco_mask, complete, fetch, pack_masks, pack_voc, sbd_mask, survey, train_aug,
    unpack)
from weclip.world.scenes import write_scenes
from weclip.engine.infer import evaluate, evaluation_hours
from weclip.cli import main

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
needs_data = pytest.mark.skipif(not (DATA/"VOCdevkit").is_dir() or not (DATA/"coco").is_dir(),
                                reason=f"no VOC and COCO photographs at {DATA} (set WECLIP_DATA)")
quiet = dict(progress=False)

def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
def parts(root): return [p.name for p in root.rglob("*") if p.name.endswith(".part") or p.name.startswith(".")]
def lists(root): return root/"ImageSets"/"Segmentation"
def write_list(path, ids): path.write_text("".join(f"{i}\n" for i in ids))

# ---- downloading, from a server of this machine

BODY = bytes(range(256))*40

class Server(http.server.BaseHTTPRequestHandler):
    "Serves BODY: whole, in parts (resumable), broken off, or as another file."
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        start = int(asked[6:-1]) if asked and "fixed" not in self.path else 0
        if "gone" in self.path: return self.send_error(404)
        if start >= len(BODY): return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        body = BODY[start:] if "other" not in self.path else BODY[start:][::-1]
        self.wfile.write(body[:3000] if "breaks" in self.path and not asked else body)
    def log_message(self, *a): pass

@pytest.fixture
def server():
    s = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    s.asked = []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()

def archive(server, path, tmp_path):
    (tmp_path/"body").write_bytes(BODY)
    return Archive("a.bin", 0, calculate_md5(tmp_path/"body"), f"http://127.0.0.1:{server.server_port}/{path}")

def test_a_broken_download_goes_on(server, tmp_path):
    a = archive(server, "breaks", tmp_path)
    to = tmp_path/"to"
    with pytest.raises(OSError, match=r"after 3,000 of 10,240"):
        fetch(a, to, **quiet)
    assert [p.name for p in to.iterdir()] == ["a.bin.part"]                # never under its name
    assert fetch(a, to, **quiet).read_bytes() == BODY
    assert server.asked == [None, "bytes=3000-"] and [p.name for p in to.iterdir()] == ["a.bin"]
    assert fetch(a, to, **quiet) == to/"a.bin" and len(server.asked) == 2  # what is there is not fetched again

def test_servers_that_do_not_resume(server, tmp_path):
    for path, part in (("fixed", b"old"), ("x", BODY)):  # one sends all of it; one has nothing more to send
        to = tmp_path/path
        to.mkdir()
        (to/"a.bin.part").write_bytes(part)
        assert fetch(archive(server, path, tmp_path), to, **quiet).read_bytes() == BODY
    assert server.asked == ["bytes=3-", "bytes=10240-"]
    for path, error in (("other", ValueError), ("gone", OSError)):  # nothing stays of a wrong file
        with pytest.raises(error):
            fetch(archive(server, path, tmp_path), tmp_path/"to", **quiet)
        assert not (tmp_path/"to").exists() or not list((tmp_path/"to").iterdir())

def test_without_a_network(monkeypatch, server, tmp_path, capsys):
    server.server_close()  # nobody answers there
    nowhere = f"http://127.0.0.1:{server.server_port}/x"
    monkeypatch.setattr(field, "ARCHIVES", {k: a._replace(url=nowhere) for k, a in field.ARCHIVES.items()})
    md5 = {a.name: a.md5 for a in field.ARCHIVES.values()}
    wanted = dict(voc=["VOCtrainval_11-May-2012.tar", "benchmark.tgz"],
                  coco=["annotations_trainval2014.zip", "train2014.zip", "val2014.zip"])
    wrong = []
    for kind, names in wanted.items():
        for flags, told, not_told in ((["--download"], "could not be fetched", "--download"),
                                      ([], "--download", "could not be fetched")):
            status = main(["data", kind, str(tmp_path/"new"), *flags])
            said = capsys.readouterr().err
            is_named = all(name in said and md5[name] in said for name in names)
            if status != 2 or not is_named or told not in said or not_told in said or (tmp_path/"new").exists():
                wrong.append((kind, flags, said))
    assert not wrong, wrong

def test_what_was_put_there_is_checked(tmp_path):
    (tmp_path/"benchmark.tgz").write_bytes(b"half of it")
    (tmp_path/"VOCdevkit"/"VOC2012"/"JPEGImages").mkdir(parents=True)
    with pytest.raises(ValueError, match="benchmark.tgz: expected MD5 82b4d87c.*10 bytes"):
        build_voc(tmp_path, **quiet)

# ---- unpacking

def make_tar(path, members, mode="w"):
    "members: (name, bytes) or (name, type, target)."
    with tarfile.open(path, mode) as t:
        for name, what, *target in members:
            m = tarfile.TarInfo(name)
            if target:
                m.type = what
                m.linkname = target[0]
            else:
                m.size = len(what)
            t.addfile(m, None if target else io.BytesIO(what))
    return path

def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, what, *target in members:
            info = zipfile.ZipInfo(name)
            if target:
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, target[0] if target else what)
    return path

MAKERS = {"a.tar": make_tar, "a.tgz": lambda path, members: make_tar(path, members, "w:gz"), "a.zip": make_zip}
CONTENT = {f"d{i % 3}/f{i}.bin": bytes([i])*(700*i) for i in range(9)}

@pytest.fixture
def full(tmp_path):
    "The same nine files in a folder for each kind of archive, a.tar/a.tar and so on."
    for kind, make in MAKERS.items():
        (tmp_path/kind).mkdir()
        make(tmp_path/kind/kind, list(CONTENT.items()))
    return [tmp_path/kind/kind for kind in MAKERS]

def unpacked(path):
    "What the folder beside an archive holds when it has been unpacked into it anew; the error, if there was one."
    to = path.parent/"to"
    shutil.rmtree(to, ignore_errors=True)
    try:
        unpack(path, to, **quiet)
    except ValueError as e:
        return tree(to) if to.exists() else {}, str(e)
    return tree(to), ""

def test_no_path_leaves_the_folder(tmp_path):
    results = {}
    for name in ("../up", "a/../../up", "/up", "..", "a/b/../../../up", "..\\up", "C:up", "C:\\up", "a\\..\\..\\up"):
        for kind, make in MAKERS.items():
            path = make(tmp_path/kind, [("fine.txt", b"fine"), (name, b"evil")])
            results[kind, name] = not_refused("expected paths inside", unpack, path, tmp_path/"in"/"to", **quiet)
            path.unlink()
    results["written"] = list(tmp_path.iterdir())  # not even the fine one
    check_all(results)

def test_links_are_left_out(tmp_path, caplog):
    (tmp_path/"safe").mkdir()
    (tmp_path/"safe"/"secret").write_text("untouched")
    members = [("door", tarfile.SYMTYPE, str(tmp_path/"safe")), ("door/secret", b"evil"),
               ("up", tarfile.SYMTYPE, "../safe/secret"), ("up", b"evil")]
    for kind, make in MAKERS.items():
        caplog.clear()
        to = tmp_path/f"{kind}.to"
        unpack(make(tmp_path/kind, members), to, **quiet)
        assert tree(tmp_path/"safe") == {"secret": b"untouched"}
        assert not any(p.is_symlink() for p in to.rglob("*")) and caplog.text.count("left out") == 2
        assert tree(to) == {"door/secret": b"evil", "up": b"evil"}, kind  # inside, as files
    secret = tmp_path/"safe"/"secret"
    for kind in (tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE):
        to = tmp_path/f"type {kind.decode()}"
        unpack(make_tar(tmp_path/"a.tar", [("x", kind, "../safe/secret"), ("y", b"y")]), to, **quiet)
        assert tree(to) == {"y": b"y"} and os.stat(secret).st_nlink == 1, kind

def test_every_cut_is_an_error_or_leaves_whole_files(full):
    for path in full:
        whole = path.read_bytes()
        n_errors = 0
        wrong = []
        for n in np.random.default_rng(0).integers(0, len(whole) - 1, 40):
            path.write_bytes(whole[:n])
            files, error = unpacked(path)
            n_errors += bool(error)
            is_told = path.name in error and "cut short" in error
            if error and not is_told or not files.items() <= CONTENT.items() or parts(path.parent):
                wrong.append((n, error, files.keys()))
        assert not wrong, wrong
        # a tar cut between two members looks complete: its MD5 does not
        assert n_errors >= (21 if path.name == "a.tar" else 38), path.name

def test_damage_inside(full):
    for path in full:
        whole = path.read_bytes()
        rng = np.random.default_rng(1)
        errors = []
        for _ in range(60):
            damaged = bytearray(whole)
            for i in rng.integers(0, len(damaged), 3):
                damaged[i] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            errors.append(unpacked(path)[1])
            assert not parts(path.parent)
        assert any(errors)
        assert {p.name for p in path.parent.iterdir()} <= {"to", path.name}

def test_a_stopped_unpacking_goes_on(full, monkeypatch):
    real = shutil.copyfileobj
    calls = []
    def stop(src, dst, n):
        calls.append(1)
        if len(calls) == 5:
            dst.write(b"half")
            raise KeyboardInterrupt
        real(src, dst, n)
    monkeypatch.setattr(shutil, "copyfileobj", stop)
    for path in full:
        to = path.parent/"to"
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            unpack(path, to, **quiet)
        assert tree(to).items() < CONTENT.items() and not parts(to)
        n = len(tree(to))
        unpack(path, to, **quiet)
        assert tree(to) == CONTENT and len(calls) == 5 + len(CONTENT) - n, path.name

def test_a_full_disk_is_told_before(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="of free disk"):
        unpack(make_tar(tmp_path/"a.tar", CONTENT.items()), tmp_path/"to", **quiet)
    assert not (tmp_path/"to").exists()

# ---- VOC and SBD in miniature

def write_mat(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    edges = np.empty((20, 1), object)
    edges[:] = [[np.zeros(ids.shape, np.uint8)]]
    marked = dict(Boundaries=edges, Segmentation=ids, CategoriesPresent=np.unique(ids[ids > 0])[:, None])
    savemat(path, dict(GTcls=marked), do_compression=True)

def mini_voc(root, n=12, seed=0):
    "n pictures; the first third VOC train, the next VOC val, the rest SBD only; SBD has every second of VOC's, too."
    voc = root/"VOCdevkit"/"VOC2012"
    sbd = root/"benchmark_RELEASE"/"dataset"
    rng = np.random.default_rng(seed)
    for p in (voc/"JPEGImages", voc/"Annotations", lists(voc), sbd/"cls"):
        p.mkdir(parents=True)
    ids = [f"20{8 + i % 4:02d}_{i:06d}" for i in range(n)]
    for k, i in enumerate(ids):
        mask = rng.integers(0, 21, (9 + k % 4, 13), dtype=np.uint8)
        Image.fromarray(rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)).save(voc/"JPEGImages"/f"{i}.jpg")
        names = [VOC.classes[t - 1] for t in np.unique(mask[mask > 0])]
        objects = "".join(f"<object><name>{o}</name><part><name>hand</name></part></object>" for o in names)
        (voc/"Annotations"/f"{i}.xml").write_text(f"<annotation>{objects}</annotation>")
        if k < 2*n//3:
            bordered = np.where(rng.random(mask.shape) < .2, 255, mask).astype(np.uint8)
            save_mask(voc/"SegmentationClass"/f"{i}.png", bordered)
        if k >= 2*n//3 or k % 2:
            write_mat(sbd/"cls"/f"{i}.mat", mask)
    split = dict(train=ids[:n//3], val=ids[n//3:2*n//3])
    theirs = sorted(p.stem for p in (sbd/"cls").iterdir())
    for name, listed in split.items():
        write_list(lists(voc)/f"{name}.txt", listed)
    write_list(sbd/"train.txt", theirs[::2])
    write_list(sbd/"val.txt", theirs[1::2])
    return SimpleNamespace(root=root, voc=voc, sbd=sbd, ids=ids, split=split)

@pytest.fixture(scope="module")
def published(tmp_path_factory):
    "VOC and SBD as they are published."
    return mini_voc(tmp_path_factory.mktemp("published")/"voc")

@pytest.fixture(scope="module")
def built(published, tmp_path_factory):
    "The same, built; not to be changed."
    set_ = copy_of(published, tmp_path_factory.mktemp("built")/"voc")
    build_voc(set_.root, **quiet)
    return set_

def copy_of(given, root):
    "A data set of one's own to change."
    shutil.copytree(given.root, root)
    folders = dict(voc=root/given.voc.relative_to(given.root), sbd=root/given.sbd.relative_to(given.root))
    return SimpleNamespace(root=root, **folders, ids=given.ids, split=given.split)

def test_voc(built):
    root = built.root
    voc = built.voc
    data = open_data(root, "train_aug", VOC.classes, with_masks=True)
    assert data.ids == sorted(set(built.ids) - set(built.split["val"]))
    for i in data.ids:
        own = voc/"SegmentationClass"/f"{i}.png"
        want = read_mask(own, 21) if own.exists() else sbd_mask(built.sbd/"cls"/f"{i}.mat")
        assert np.array_equal(data.read(i)[1], want)
        assert Image.open(data.masks[i]).mode == "P"
    for i in built.split["val"]:
        own, aug = (read_mask(voc/folder/f"{i}.png", 21) for folder in ("SegmentationClass", "SegmentationClassAug"))
        assert np.array_equal(own, aug)
    assert json.loads((lists(voc)/"tags.json").read_text()).keys() == set(built.ids)
    assert data.tags == read_tags(voc, data.ids, VOC.classes, "xml")
    rows = survey(root, VOC)
    n = len(data)
    assert complete(rows) and rows["test"]["listed"] is None
    assert rows["train_aug"] == dict(listed=n, pictures=n, masks=n, tagged=n, published=10_582)
    before = tree(root)
    assert build_voc(root, **quiet) == voc
    assert tree(root) == before

def test_tags_of_the_masks(built, tmp_path):
    mine = copy_of(built, tmp_path/"voc")
    file = lists(mine.voc)/"tags.json"
    ids = open_data(mine.root, "train_aug", VOC.classes).ids
    def tags(source="json"): return {i: read_tags(mine.voc, ids, VOC.classes, source)[i] for i in ids}
    file.unlink()
    build_voc(mine.root, tags_from="masks", **quiet)
    assert tags() == tags("masks")
    file.write_text(json.dumps({i: ["cat"] for i in ids}))
    build_voc(mine.root, **quiet)
    assert tags()[ids[0]] == [7]  # somebody's own tags stay
    build_voc(mine.root, tags_from="xml", **quiet)
    assert tags() == tags("xml")
    file.write_text("{")
    with pytest.raises(ValueError, match="tags.json: expected JSON"):
        build_voc(mine.root, tags_from="xml", **quiet)

def test_voc_from_archives(published, built, tmp_path, monkeypatch):
    root = tmp_path/"root"
    root.mkdir()
    def pack(name, top):
        with tarfile.open(root/name, "w:gz" if name.endswith("gz") else "w") as t:
            t.add(published.root/top, top)
        return calculate_md5(root/name)
    md5 = dict(voc=pack("VOCtrainval_11-May-2012.tar", "VOCdevkit"), sbd=pack("benchmark.tgz", "benchmark_RELEASE"))
    test = {"VOC2012/JPEGImages/t.jpg": (published.voc/"JPEGImages"/"2008_000000.jpg").read_bytes(),
            "VOC2012/ImageSets/Segmentation/test.txt": b"t\n"}
    make_tar(root/"VOC2012test.tar", [(f"VOCdevkit/{name}", content) for name, content in test.items()])
    md5["test"] = calculate_md5(root/"VOC2012test.tar")
    archives = {k: a._replace(md5=md5.get(k, a.md5)) for k, a in field.ARCHIVES.items()}
    monkeypatch.setattr(field, "ARCHIVES", archives)
    real = shutil.copyfileobj
    calls = []
    def stop(*a):
        calls.append(1)
        if len(calls) == 20: raise KeyboardInterrupt
        real(*a)
    monkeypatch.setattr(shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        build_voc(root, **quiet)  # in the middle of VOC: JPEGImages may be there, but not all of it
    build_voc(root, **quiet)
    assert tree(root/"VOCdevkit") == {**tree(built.root/"VOCdevkit"), **test}
    assert open_data(root, "test", VOC.classes, tags_from=None).ids == ["t"] and complete(survey(root, VOC))
    for a in root.glob("*.t*"):
        if not a.name.endswith("unpacked"):
            a.unlink()
    n = len(calls)
    build_voc(root, **quiet)
    assert len(calls) == n  # the archives may go

def test_killed_builds_leave_whole_files(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    started = mini_voc(tmp_path/"root", 120)
    want = copy_of(started, tmp_path/"want")
    build_voc(want.root, **quiet)
    shapes = {p.name: read_mask(p, 21).shape for p in (want.voc/"SegmentationClassAug").iterdir()}
    rng = np.random.default_rng(0)
    n_seen = []
    for _ in range(20):
        if (pid := os.fork()) == 0:
            try:
                tqdm.set_lock(threading.RLock())  # its own: a lock shared with this process would die held
                build_voc(started.root, **quiet)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(.005, .15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        # without what a killed process was writing
        masks = [p for p in (started.voc/"SegmentationClassAug").glob("*.png") if not p.name.startswith(".")]
        n_seen.append(len(masks))
        assert not [p for p in masks if read_mask(p, 21).shape != shapes[p.name]]
        if (lists(started.voc)/"train_aug.txt").exists():
            assert complete(survey(started.root, VOC))  # a list promises its masks
    assert n_seen == sorted(n_seen)
    build_voc(started.root, **quiet)
    left = {k: v for k, v in tree(started.root/"VOCdevkit").items() if "/." not in k}
    assert left == tree(want.root/"VOCdevkit")

def first_val(s): return s.split["val"][0]

VOC_MISTAKES = {  # what is said -> how the folder is spoilt
    "expected a file of SBD, found none": lambda s: sorted((s.sbd/"cls").iterdir())[-1].unlink(),
    "without folder or drive": lambda s: (s.sbd/"train.txt").write_text("../../../evil\n"),
    "no picture for 1 of": lambda s: next((s.voc/"JPEGImages").iterdir()).unlink(),
    "no such split": lambda s: (lists(s.voc)/"val.txt").unlink(),
    "no such file or folder of tags": lambda s: shutil.rmtree(s.voc/"Annotations"),
    "of the picture's 99x98 pixels, got 13x":
        lambda s: Image.new("RGB", (99, 98)).save(s.voc/"JPEGImages"/f"{first_val(s)}.jpg"),
    "mode RGB": lambda s: Image.new("RGB", (13, 9)).save(s.voc/"SegmentationClass"/f"{first_val(s)}.png"),
    "benchmark.tgz": lambda s: shutil.rmtree(s.sbd)}

def test_voc_mistakes(published, tmp_path, capsys):
    wrong = {}
    for k, (says, spoil) in enumerate(VOC_MISTAKES.items()):
        mine = copy_of(published, tmp_path/str(k))
        spoil(mine)
        status = main(["data", "voc", str(mine.root)])
        err = capsys.readouterr().err
        if status != 2 or says not in err or parts(tmp_path) or list(tmp_path.rglob("evil*")):
            wrong[says] = status, err
    assert not wrong, wrong

def test_sbd_elsewhere(published, tmp_path):
    mine = copy_of(published, tmp_path/"a")
    (mine.root/"benchmark_RELEASE").rename(tmp_path/"far")
    for wrong in (tmp_path, tmp_path/"nowhere"):
        with pytest.raises(FileNotFoundError, match="expected SBD's folder"):
            build_voc(mine.root, sbd=wrong, **quiet)
    build_voc(mine.root, sbd=tmp_path/"far", **quiet)
    assert complete(survey(mine.root, VOC))

def test_damaged_mat(tmp_path):
    path = tmp_path/"a.mat"
    rng = np.random.default_rng(0)
    write_mat(path, rng.integers(0, 21, (30, 40), dtype=np.uint8))
    whole = path.read_bytes()
    want = sbd_mask(path)
    for n in rng.integers(0, len(whole), 40):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="a.mat: expected"):
            sbd_mask(path)
    for _ in range(200):
        damaged = bytearray(whole)
        for i in rng.integers(0, len(damaged), 3):
            damaged[i] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            assert sbd_mask(path).dtype == np.uint8
        except ValueError as e:
            assert "a.mat" in str(e)
    path.write_bytes(whole)
    assert np.array_equal(sbd_mask(path), want)
    savemat(path, dict(GTinst=dict(Segmentation=want)))
    with pytest.raises(ValueError, match="GTcls.Segmentation"):
        sbd_mask(path)
    savemat(path, dict(GTcls=dict(Segmentation=want/2)))
    with pytest.raises(ValueError, match="float64"):
        sbd_mask(path)

def test_complete_lists_give_the_published_number():
    def names(start, stop): return [f"p{i:05d}" for i in range(start, stop)]
    train = names(0, 1464)
    val = names(1464, 2913)
    # as the sets overlap: 9,119 of SBD alone make 10,582 + 1
    sbd = names(1464 - 787, 2913) + names(2913, 2913 + 11_355 - 787 - 1449)
    with pytest.raises(ValueError, match="10,582"):
        train_aug(train, val, sbd)
    sbd[-1] = train[0]
    assert len(set(sbd)) == 11_355 and len(train_aug(train, val, sbd)) == 10_582
    assert len(train_aug(train, val, sbd[:-9])) < 10_582  # parts of the sets: whatever they give

# ---- COCO in miniature

GAPS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
IDS = {k: i + 1 for i, k in enumerate(GAPS)}

def square(x0, x1, h): return [[x0, 0, x1, 0, x1, h, x0, h]]

def packed(seg):
    r = rle.frPyObjects(seg, *seg["size"])
    return dict(r, counts=r["counts"].decode())

def mini_coco(root, split="val", year=2014, n=5, pictures=None):
    "n pictures of 2x6 and one without objects; the first has a crowd, packed in the second."
    src = root/(pictures or f"{split}{year}")
    src.mkdir(parents=True)
    (root/"annotations").mkdir(exist_ok=True)
    prefix = f"COCO_{split}{year}_" if year == 2014 else ""
    images = [dict(id=i, file_name=f"{prefix}{i:012d}.jpg", height=2, width=6) for i in range(1, n + 2)]
    for info in images:
        Image.fromarray(np.full((2, 6, 3), info["id"], np.uint8)).save(src/info["file_name"])
    crowd = dict(size=[2, 6], counts=[6, 6])
    anns = []
    for i in range(1, n + 1):
        place = dict(image_id=i, iscrowd=0)
        anns.append(dict(place, id=2*i, category_id=GAPS[i % 80], area=8., segmentation=square(0, 4, 2)))
        if i <= 2:
            seg = crowd if i == 1 else packed(crowd)
            anns.append(dict(image_id=i, id=2*i + 1, category_id=1, iscrowd=1, area=6., segmentation=seg))
    write_instances(root, split, year, images, anns)
    return root

def write_instances(root, split, year, images, anns):
    categories = [dict(id=k, name=c) for k, c in zip(GAPS, COCO.classes)]
    text = json.dumps(dict(images=images, annotations=anns, categories=categories))
    (root/"annotations"/f"instances_{split}{year}.json").write_text(text)

@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    "`val`, built; not to be changed."
    return build_coco(mini_coco(tmp_path_factory.mktemp("coco")/"c"), ("val",), **quiet)

def test_coco(tmp_path):
    root = build_coco(mini_coco(mini_coco(tmp_path/"c"), "train", n=3), **quiet)
    val, train = (open_data(root, s, COCO.classes, with_masks=True) for s in ("val", "train"))
    assert len(train) == 3 and val.ids == [f"COCO_val2014_{i:012d}" for i in range(1, 6)]  # not the sixth
    for k, i in enumerate(val.ids, 1):
        has_crowd = k <= 2
        want = np.zeros((2, 6), np.uint8)
        want[:, :4] = k + 1
        if has_crowd:
            want[:, 3:] = 1  # the crowd is smaller
        assert np.array_equal(val.read(i)[1], want)
        assert val.tags[i] == ([0, k] if has_crowd else [k])
    assert not (root/"JPEGImages"/"COCO_val2014_000000000006.jpg").exists() and complete(survey(root, COCO))
    shutil.move(root, tmp_path/"moved")  # links are relative
    assert open_data(tmp_path/"moved", "val", COCO.classes).read(val.ids[0])[0].shape == (2, 6, 3)

def test_coco_refuses_what_it_does_not_know(coco, tmp_path):
    for splits, tags_from, says in ((("test",), None, "unknown split"), (("train2014",), None, "did you mean 'train'"),
                                    (("val",), "mask", "tags_from")):
        with pytest.raises(ValueError, match=says):
            build_coco(coco, splits, tags_from=tags_from, **quiet)
    (tmp_path/"annotations").mkdir()
    shutil.copy(coco/"annotations"/"instances_val2014.json", tmp_path/"annotations"/"instances_val2017.json")
    with pytest.raises(FileNotFoundError, match="val2017"):
        build_coco(tmp_path, ("val",), **quiet)  # asked for val2014.zip

def test_coco_crowds_can_be_ignored(tmp_path):
    root = build_coco(mini_coco(tmp_path), ("val",), ignore_crowds=True, **quiet)
    val = open_data(root, "val", COCO.classes, with_masks=True)
    assert val.read(val.ids[0])[1].tolist() == [[2, 2, 2, 2, 255, 255]]*2 and val.tags[val.ids[0]] == [0, 1]
    build_coco(root, ("val",), tags_from="masks", **quiet)
    assert open_data(root, "val", COCO.classes).tags[val.ids[0]] == [1]

def test_coco_resumes_and_mends(coco, tmp_path, monkeypatch):
    root = mini_coco(tmp_path/"root")
    real = field.save_mask
    calls = []
    def stop(*a):
        if len(calls) == 3: raise KeyboardInterrupt
        calls.append(1)
        real(*a)
    monkeypatch.setattr(field, "save_mask", stop)
    with pytest.raises(KeyboardInterrupt):
        build_coco(root, ("val",), **quiet)
    assert not (lists(root)/"val.txt").exists() and not parts(root)
    monkeypatch.setattr(field, "save_mask", lambda *a: (calls.append(1), real(*a)))
    link = root/"JPEGImages"/"COCO_val2014_000000000002.jpg"
    link.unlink()
    link.symlink_to("nowhere")
    for _ in range(2):  # the second time nothing is left to do
        build_coco(root, ("val",), workers=1, **quiet)
        assert tree(root) == tree(coco) and len(calls) == 5

def test_two_processes_do_the_same(coco, tmp_path):
    assert pickle.loads(pickle.dumps(field._voc_mask)) is field._voc_mask  # VOC's part of the same loop
    assert tree(build_coco(mini_coco(tmp_path/"b"), ("val",), workers=2, **quiet)) == tree(coco)

def test_links_copies_and_second_names(tmp_path, monkeypatch):
    first = "COCO_val2014_000000000001.jpg"
    copied = build_coco(mini_coco(tmp_path/"a"), ("val",), copy=True, **quiet)/"JPEGImages"/first
    assert not copied.is_symlink() and copied.stat().st_nlink == 1
    def forbidden(*a, **k): raise OSError("a privilege is missing")
    monkeypatch.setattr(Path, "symlink_to", forbidden)
    hard = build_coco(mini_coco(tmp_path/"b"), ("val",), **quiet)/"JPEGImages"/first
    assert not hard.is_symlink() and hard.samefile(tmp_path/"b"/"val2014"/first)

def test_coco_where_others_keep_it(tmp_path):
    for k, pictures in enumerate(("val2014", "images/val2014", "JPEGImages/val2014")):
        root = build_coco(mini_coco(tmp_path/str(k), pictures=pictures), ("val",), **quiet)
        assert len(open_data(root, "val", COCO.classes, with_masks=True)) == 5, pictures
    root = build_coco(mini_coco(tmp_path/"later", year=2017), ("val",), **quiet)
    assert open_data(root, "val", COCO.classes).ids[0] == "000000000001"

def instances(root): return root/"annotations"/"instances_val2014.json"

def edited(change):
    "A function that changes the annotations of a folder."
    def edit(root):
        content = json.loads(instances(root).read_text())
        change(content)
        instances(root).write_text(json.dumps(content))
    return edit

def image(k, **new): return edited(lambda d: d["images"][k].update(new))
def region(seg): return edited(lambda d: d["annotations"][0].update(segmentation=seg))

CANNOT = "expected annotations that can be drawn"
COCO_MISTAKES = [  # how the folder is spoilt, what is said
    (lambda root: instances(root).write_text('{"images": ['), "expected COCO's instances"),
    (lambda root: instances(root).write_text('[]'), "expected COCO's instances"),
    (edited(lambda d: d.pop("categories")), "expected COCO's instances|expected the 80 classes"),
    (edited(lambda d: d["images"][0].pop("file_name")), "expected COCO's instances"),
    (image(0, file_name="../../evil.jpg"), "without folder or drive"),
    (image(0, height=3), f"1.jpg: {CANNOT}.*6x2 pixels"),
    (image(2, height=3), "of the picture's 6x2 pixels, got 6x3"),
    (region([[1]]), CANNOT),
    (region(dict(size=[2, 6], counts="garbage")), CANNOT),
    (region(dict(size=[9**9, 9**9], counts=[1])), CANNOT),
    (edited(lambda d: d["annotations"][0].update(category_id=12)), CANNOT),
    (edited(lambda d: d["annotations"][0].pop("area")), CANNOT),
    (lambda root: (root/"val2014"/"COCO_val2014_000000000003.jpg").unlink(),
     "no picture for 1 of 5: COCO_val2014_000000000003.jpg"),
    (lambda root: shutil.rmtree(root/"val2014"), "val2014.zip")]

def test_coco_mistakes(tmp_path, capsys):
    wrong = []
    for k, (spoil, says) in enumerate(COCO_MISTAKES):
        root = mini_coco(tmp_path/str(k)/"root")
        spoil(root)
        status = main(["data", "coco", str(root), "--splits", "val"])
        err = capsys.readouterr().err
        has_list = (lists(root)/"val.txt").exists()
        if status != 2 or not re.search(says, err) or has_list or parts(root) or list(tmp_path.rglob("evil*")):
            wrong.append((k, says, status, err))
    assert not wrong, wrong

def test_complete_annotations_give_the_published_number(tmp_path):
    root = mini_coco(tmp_path)
    more = [dict(id=i, file_name=f"{i}.jpg", height=2, width=6) for i in range(100, 100 + 40_504 - 6)]
    edited(lambda d: d["images"].extend(more))(root)
    with pytest.raises(ValueError, match="expected 40,137 pictures with objects among 40,504, got 5"):
        build_coco(root, ("val",), **quiet)

def encoded(seg, h, w):
    "An annotation's region as pycocotools packs it."
    if isinstance(seg, list): return rle.merge(rle.frPyObjects(seg, h, w))
    return rle.frPyObjects(seg, h, w) if isinstance(seg["counts"], list) else seg

def field_mask(anns, h, w):
    "coco2voc's rule, object by object: by area, and a pixel keeps its first class."
    out = np.zeros((h, w), np.int64)
    for a in sorted(anns, key=lambda a: a["area"]):
        region = rle.decode(encoded(a["segmentation"], h, w)).astype(np.int64)
        out = np.where(out > 0, out, region*IDS[a["category_id"]])
    return out

def test_overlaps_are_drawn_as_the_field_draws_them():
    rng = np.random.default_rng(0)
    def ann():  # many have equal areas
        return dict(category_id=int(rng.choice(GAPS)), iscrowd=int(rng.random() < .3), area=float(rng.integers(1, 4)),
                    segmentation=[rng.uniform(0, 20, 8).tolist() for _ in range(rng.integers(1, 3))])
    for _ in range(30):
        anns = [ann() for _ in range(rng.integers(0, 9))]
        assert np.array_equal(coco_mask(anns, (17, 23), IDS), field_mask(anns, 17, 23))
        ignored = coco_mask(anns, (17, 23), IDS, ignore_crowds=True)
        objects = field_mask([a for a in anns if not a["iscrowd"]], 17, 23)
        crowd = field_mask([a for a in anns if a["iscrowd"]], 17, 23) > 0
        assert np.array_equal(ignored, np.where(objects > 0, objects, np.where(crowd, 255, 0)))

def test_run_lengths_that_end_too_early():
    "pycocotools leaves memory as it was in what they do not reach: zeros or an error, never that."
    big = [np.full((300, 400), 255, np.uint8) for _ in range(20)]
    del big
    for counts in ([7], [3, 4], "0"*9, ""):
        ann = dict(category_id=3, area=9, segmentation=dict(size=[300, 400], counts=counts))
        for _ in range(20):
            try:
                mask = coco_mask([ann], (300, 400), IDS)
            except ValueError as e:
                assert "end before" in str(e)
            else:
                assert set(np.unique(mask)) <= {0, 3} and (mask > 0).sum() == (4 if counts == [3, 4] else 0)

TRIANGLE = [1, 1, 8, 1, 8, 8]

def drawn(*polygons): return coco_mask([dict(category_id=3, area=9, segmentation=list(polygons))], (12, 12), IDS)

def test_polygons_without_an_area_draw_nothing():
    "Two points were taken for a box and ended in pycocotools with TypeError."
    alone = drawn(TRIANGLE)
    assert (alone == 3).sum() == 21 and not drawn().any()
    for less in ([], [5, 5], [1, 1, 8, 8], [2., 2., 2., 2.]):
        assert not drawn(less).any() and not drawn(less, less).any(), less
        for both in (drawn(less, TRIANGLE), drawn(TRIANGLE, less)):
            assert np.array_equal(both, alone), less
    assert np.array_equal(drawn(tuple(TRIANGLE)), alone) and np.array_equal(drawn(np.array(TRIANGLE)), alone)

BAD_POLYGONS = [
    ([1, 1, 8, 1, 8], "pairs x, y, got a polygon of 5"), ([1, 1, 8, 1, 8, 8, 3], "of 7 numbers"),
    ([float("nan")]*6, "coordinates in a picture of 12x12 pixels, got nan"), ([1, 1, 8, 1, 8, 1e9], "got 1000000000"),
    ([1, 1, float("-inf"), 1, 8, 8], "got -inf"), (["a"]*6, "expected numbers"), ([[1, 1]]*6, "expected numbers"),
    (7, "expected polygons as lists")]

def test_polygons_that_cannot_be_drawn():
    "Of coordinates that are no places in a picture pycocotools fills memory until the system ends it."
    results = {}
    for polygon, says in BAD_POLYGONS:
        results["alone", str(polygon)] = not_refused(says, drawn, polygon)
        results["second", str(polygon)] = not_refused(says, drawn, TRIANGLE, polygon)
    check_all(results)

# ---- the test server

def test_a_packed_mask_goes_by_its_colours(tmp_path):
    "With its palette sorted anew, person went to the server as aeroplane."
    ids = np.zeros((6, 8), np.uint8)
    ids[2:5, 1:4] = 15
    Image.new("RGB", (8, 6)).save(tmp_path/"q.jpg")
    Image.fromarray(voc_palette()[ids]).quantize(256, dither=0).save(tmp_path/"q.png")
    with tarfile.open(pack_masks(tmp_path, tmp_path/"q.tgz", {"q": tmp_path/"q.jpg"}, **quiet)) as t:
        assert np.array_equal(np.asarray(Image.open(t.extractfile(t.next()))), ids)

@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    "1,456 small pictures and their masks; not to be changed."
    top = tmp_path_factory.mktemp("test")
    root = top/"VOC2012"
    (root/"JPEGImages").mkdir(parents=True)
    lists(root).mkdir(parents=True)
    ids = [f"2008_{i:06d}" for i in range(1456)]
    for k, (h, w) in enumerate([(5, 7), (7, 5), (6, 6)]):
        Image.new("RGB", (w, h)).save(top/f"{k}.jpg")
        save_mask(top/f"{k}.png", np.full((h, w), k + 18, np.uint8))
    (top/"masks").mkdir()
    for k, i in enumerate(ids):
        os.link(top/f"{k % 3}.jpg", root/"JPEGImages"/f"{i}.jpg")
        shutil.copy(top/f"{k % 3}.png", top/"masks"/f"{i}.png")
    write_list(lists(root)/"test.txt", ids)
    write_list(lists(root)/"few.txt", ids[:10])
    return root, top/"masks", ids

def test_pack(test_set, tmp_path):
    root, masks, ids = test_set
    masks = shutil.copytree(masks, tmp_path/"masks")
    # ids without a palette: the server would take the greys for colours
    Image.fromarray(np.full((5, 7), 18, np.uint8)).save(masks/f"{ids[0]}.png")
    save_mask(masks/"extra.png", np.zeros((2, 2), np.uint8))
    assert main(["data", "pack", str(masks), str(tmp_path/"r.tgz"), "--data", str(root)]) == 0
    with tarfile.open(tmp_path/"r.tgz", "r:gz") as t:
        assert t.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{i}.png" for i in ids]
        for k in (0, 1, 1455):
            im = Image.open(t.extractfile(t.getmembers()[k]))
            assert im.mode == "P" and im.getextrema() == (k % 3 + 18, k % 3 + 18)
            assert im.size == Image.open(root/"JPEGImages"/f"{ids[k]}.jpg").size
            assert np.array_equal(np.reshape(im.getpalette(), (-1, 3))[:21], voc_palette()[:21])
    out = pack_voc(masks, tmp_path/"5.tar.gz", root, split="few", competition="comp5", **quiet)
    with tarfile.open(out) as t:
        assert "comp5_test_cls" in t.getnames()[9]

BAD_MASKS = {  # what is said -> how the mask of a picture of 5x7 pixels is spoilt
    "no mask for 1 of 1,456 pictures of test": lambda file: file.unlink(),
    "pixels as the picture, got 6x7": lambda file: save_mask(file, np.zeros((7, 6), np.uint8)),
    "ids up to 20, got 255": lambda file: save_mask(file, np.full((5, 7), 255, np.uint8)),
    "expected values 0..20": lambda file: save_mask(file, np.full((5, 7), 21, np.uint8)),
    "mode RGB": lambda file: Image.new("RGB", (7, 5)).save(file),
    "cannot be read": lambda file: file.write_bytes(b"x")}

def test_pack_refuses_what_the_server_would(test_set, tmp_path, capsys):
    root, masks, ids = test_set
    file = masks/f"{ids[300]}.png"
    good = file.read_bytes()
    wrong = {}
    for says, spoil in BAD_MASKS.items():
        spoil(file)
        status = main(["data", "pack", str(masks), str(tmp_path/"r.tgz"), "--data", str(root)])
        err = capsys.readouterr().err
        if status != 2 or says not in err or ids[300] not in err or list(tmp_path.iterdir()):
            wrong[says] = status, err
        file.write_bytes(good)
    assert not wrong, wrong

# ---- the command

def test_check_only_counts(published, built, tmp_path, capsys):
    before = tree(published.root)
    assert main(["data", "voc", str(published.root), "--check"]) == 0  # `val` can be opened, `train` too
    assert tree(published.root) == before
    mine = copy_of(built, tmp_path/"voc")
    check = ["data", "voc", str(mine.root), "--check"]
    next((mine.voc/"SegmentationClassAug").iterdir()).unlink()
    before = tree(mine.root)
    assert main(check) == 1 and tree(mine.root) == before
    assert "10,582" in capsys.readouterr().out
    assert main(["data", "voc", str(mine.root)]) == 0 and main(check) == 0
    assert main(["data", "coco", str(mini_coco(tmp_path/"c")), "--check"]) == 2
    assert "to build it: weclip data coco" in capsys.readouterr().err

def test_a_folder_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def denied(*a, **k): raise PermissionError(13, "Permission denied", "JPEGImages")
    monkeypatch.setattr(field.Path, "mkdir", denied)
    root = tmp_path/"c"
    os.makedirs(root/"val2014")
    os.makedirs(root/"annotations")
    write_instances(root, "val", 2014, [], [])
    assert main(["data", "coco", str(root), "--splits", "val"]) == 2 and "Permission denied" in capsys.readouterr().err

def test_from_a_list_to_a_submission(tmp_path, capsys, monkeypatch):
    "predict of a list, pack of its masks; the hours of a long evaluation are told first."
    root = write_scenes(tmp_path/"scenes", train=1, val=3, workers=1)
    listed = lists(root)/"test.txt"
    shutil.copy(lists(root)/"val.txt", listed)
    masks = str(tmp_path/"masks")
    assert main(["predict", str(listed), "--out", masks, "--no-crf", "--device", "cpu"]) == 0
    assert main(["data", "pack", masks, str(tmp_path/"r.tgz"), "--data", str(root)]) == 0
    with tarfile.open(tmp_path/"r.tgz") as t:
        assert len(t.getnames()) == 3
    capsys.readouterr()
    monkeypatch.setattr(weclip.use.commands, "LONG", 3)
    assert main(["evaluate", str(root), "--no-crf", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "3 pictures: about 0.0 hours" in said and said.index("hours") < said.index("mIoU")

def test_evaluate_looks_at_as_many_pictures_together_as_it_is_told(tmp_path, monkeypatch):
    root = write_scenes(tmp_path/"scenes", train=1, val=3, workers=1)
    commands = weclip.use.commands
    batches = []
    def spied(*args, **kwargs):
        batches.append(kwargs["batch"])
        return evaluate(*args, **kwargs)
    monkeypatch.setattr(commands, "evaluate_model", spied)
    for more in ([], ["--batch", "2"]):
        assert main(["evaluate", str(root), "--no-crf", "--device", "cpu", *more]) == 0
    assert batches == [1, 2]
    assert commands.batch_for(torch.nn.Linear(1, 1, device="meta"), 0) == 8  # on what is no CPU

# ---- evaluation of a large set

class Red(torch.nn.Module):
    "Class 1 where it is red, of COCO's 81."
    classes = COCO
    patch = 16
    def __init__(self):
        super().__init__()
        self.cfg = preset("coco", long_side=64, scales=(1.,), tta_flip=False)
        self.w = torch.nn.Parameter(torch.ones(1))
    def logits(self, img):
        x = torch.nn.functional.avg_pool2d(img, 16)
        red = x[:, :1]
        return torch.cat([red*0 + .5, red*self.w, x.new_zeros(len(x), 79, *x.shape[2:])], 1)

class Counted(np.ndarray):
    "An array that can carry a token."

class Token:
    "Dies with its array."
    def __init__(self, array): array.token = self

class CountingData:
    "120 pictures; `alive` after each is read how many arrays there are."
    def __init__(self):
        self.ids = [f"p{i}" for i in range(120)]
        self.tokens = weakref.WeakSet()
        self.alive = []
    def __len__(self): return len(self.ids)
    def read(self, i):
        img = np.full((40, 40, 3), int(i[1:]), np.uint8).view(Counted)
        mask = np.eye(40, dtype=np.uint8).view(Counted)  # an object, or nothing would be scored
        for array in (img, mask):
            self.tokens.add(Token(array))
        self.alive.append(len(self.tokens))
        return img, mask

@pytest.mark.parametrize("workers, modes", [(0, ("single",)), (1, ("single", "crf"))])
def test_evaluation_streams(workers, modes, tmp_path):
    "However many pictures: a few are alive at a time, and nothing but masks is written."
    data = CountingData()
    scores = evaluate(Red(), data, workers=workers, modes=modes, out=tmp_path, progress=False)
    assert scores["single"]["miou"] >= 0 and len(data.alive) == 120
    assert max(data.alive[20:]) <= 2*(2*workers + 4) and max(data.alive[60:]) <= max(data.alive[:60])
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".png"}

# ---- the real thing

GIVEN = DATA/"VOCdevkit"/"VOC2012"

@needs_data
def test_real_voc(tmp_path):
    "The masks of the field, taken apart into a VOC and an SBD, come together as they were."
    voc = tmp_path/"VOCdevkit"/"VOC2012"
    sbd = tmp_path/"benchmark_RELEASE"/"dataset"
    lists(voc).mkdir(parents=True)
    (sbd/"cls").mkdir(parents=True)
    (voc/"JPEGImages").symlink_to(GIVEN/"JPEGImages")
    aug, val = ((lists(GIVEN)/f"{s}.txt").read_text().split() for s in ("train_aug", "val"))
    masks = {i: read_mask(GIVEN/"SegmentationClassAug"/f"{i}.png", 21) for i in aug + val}
    train = [i for i in aug if 255 in masks[i]]  # only VOC draws borders
    for i in train + val:
        save_mask(voc/"SegmentationClass"/f"{i}.png", masks[i])
    for i in set(aug) - set(train):
        write_mat(sbd/"cls"/f"{i}.mat", masks[i])
    for i in (*train[:5], *val[:9]):  # SBD marks some of them, too, and must not win
        write_mat(sbd/"cls"/f"{i}.mat", np.zeros_like(masks[i]))
    theirs = sorted(p.stem for p in (sbd/"cls").iterdir())
    write_list(lists(voc)/"train.txt", train)
    write_list(lists(voc)/"val.txt", val)
    write_list(sbd/"train.txt", theirs[:40])
    write_list(sbd/"val.txt", theirs[40:])
    build_voc(tmp_path, tags_from="masks", **quiet)
    data = open_data(tmp_path, "train_aug", VOC.classes, with_masks=True)
    assert sorted(data.ids) == sorted(aug) and complete(survey(tmp_path, VOC))
    assert not [i for i in data.ids if not np.array_equal(data.read(i)[1], masks[i])]
    assert open_data(tmp_path, "val", VOC.classes, tags_from=None, with_masks=True).ids == val
    onehot = read_onehot(lists(GIVEN)/"cls_labels_onehot.npy", VOC.classes)
    assert all(set(data.tags[i]) <= set(onehot[i]) for i in data.ids)
    # tags name what masks show, and difficult objects besides
    assert any(set(data.tags[i]) < set(onehot[i]) for i in data.ids)

@needs_data
def test_real_voc_as_it_lies_there(capsys):
    def when(): return sorted((p, p.stat().st_mtime_ns) for p in (DATA/"VOCdevkit").rglob("*"))
    before = when()
    assert main(["data", "voc", str(DATA)]) == 0 and main(["data", "voc", str(DATA), "--check"]) == 0
    assert when() == before
    assert capsys.readouterr().out.count("train_aug         70        70        70        70    10,582") == 2

@needs_data
def test_real_voc_to_the_server(tmp_path):
    want = {}
    for i in (lists(GIVEN)/"val.txt").read_text().split():
        ids = read_mask(GIVEN/"SegmentationClassAug"/f"{i}.png", 21)
        want[i] = np.where(ids == 255, 0, ids).astype(np.uint8)
        save_mask(tmp_path/"m"/f"{i}.png", want[i])
    with tarfile.open(pack_voc(tmp_path/"m", tmp_path/"val.tgz", DATA, split="val", **quiet)) as t:
        got = {Path(m.name).stem: np.asarray(Image.open(t.extractfile(m))) for m in t}
    assert got.keys() == want.keys()
    assert not [i for i in want if not np.array_equal(got[i], want[i])]

@pytest.fixture(scope="module")
def real_coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for d in ("annotations", "train2017", "val2017"):
        (root/d).symlink_to(DATA/"coco"/d)
    return build_coco(root, **quiet)

@needs_data
def test_real_coco(real_coco):
    n_crowds = 0
    for split in ("train", "val"):
        api = CocoAPI(DATA/"coco"/"annotations"/f"instances_{split}2017.json")
        data = open_data(real_coco, split, COCO.classes, with_masks=True)
        assert data.ids == sorted(Path(i["file_name"]).stem for i in api.imgs.values() if api.imgToAnns[i["id"]])
        for i in data.ids:
            mask = data.read(i)[1]
            anns = api.imgToAnns[int(i)]
            assert np.array_equal(mask, field_mask(anns, *mask.shape)) and mask.max() <= 80
            union = np.any([api.annToMask(a) for a in anns], 0)
            assert np.array_equal(mask > 0, union)  # every claimed pixel has a class, no other has
            shown = set(np.unique(mask[mask > 0]) - 1)
            marked = {COCO.classes.index(api.cats[a["category_id"]]["name"]) for a in anns}
            assert shown <= set(data.tags[i]) == marked
            n_crowds += sum(a["iscrowd"] for a in anns)
    assert n_crowds >= 1

@needs_data
def test_real_coco_is_evaluated(real_coco, tmp_path):
    data = open_data(real_coco, "val", COCO.classes, tags_from=None, with_masks=True)
    assert evaluation_hours(Red(), data, ("single",), pictures=2) > 0
    scores = evaluate(Red(), data, modes=("single",), workers=0, out=tmp_path, progress=False)
    assert 0 <= scores["single"]["miou"] < .1
    assert len(list((tmp_path/"single").iterdir())) == len(data)
