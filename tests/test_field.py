"""The field's data: hostile archives, broken downloads, stopped builds, odd annotations, and the real thing on real photographs."""
import http.server, io, json, os, pickle, re, shutil, signal, stat, tarfile, threading, time, weakref, zipfile
from pathlib import Path

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
from weclip.method.classes import COCO, VOC, voc_palette
from weclip.data.pictures import read_mask, save_mask
from weclip.data.voc import open_data, read_onehot, read_tags
from weclip.data.field import (
    Archive, build_coco, build_voc, coco_mask, complete, fetch, pack_voc, sbd_mask, survey, train_aug, unpack)
from weclip.cli import main

DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
needs_data = pytest.mark.skipif(not (DATA/"VOCdevkit").is_dir() or not (DATA/"coco").is_dir(), reason=f"no VOC and COCO photographs at {DATA} (set WECLIP_DATA)")
quiet = dict(progress=False)

def tree(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
def parts(root): return [p.name for p in root.rglob("*") if p.name.endswith(".part") or p.name.startswith(".")]
def lists(root): return root/"ImageSets"/"Segmentation"

# ---- downloading, from a server of this machine

BODY = bytes(range(256))*40

class Server(http.server.BaseHTTPRequestHandler):
    "Serves BODY: whole, in parts (resumable), broken off, or as another file."
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        lo = int(asked[6:-1]) if asked and "fixed" not in self.path else 0
        if "gone" in self.path: return self.send_error(404)
        if lo >= len(BODY): return self.send_error(416)
        self.send_response(206 if lo else 200)
        self.send_header("Content-Length", str(len(BODY) - lo))
        self.end_headers()
        body = BODY[lo:] if "other" not in self.path else BODY[lo:][::-1]
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
    assert [p.name for p in to.iterdir()] == ["a.bin.part"]                    # never under its name
    assert fetch(a, to, **quiet).read_bytes() == BODY
    assert server.asked == [None, "bytes=3000-"] and [p.name for p in to.iterdir()] == ["a.bin"]
    assert fetch(a, to, **quiet) == to/"a.bin" and len(server.asked) == 2      # what is there is not fetched again

def test_a_server_that_cannot_resume_sends_all(server, tmp_path):
    (tmp_path/"a.bin.part").write_bytes(b"old")
    assert fetch(archive(server, "fixed", tmp_path), tmp_path, **quiet).read_bytes() == BODY

def test_a_part_that_was_complete(server, tmp_path):
    (tmp_path/"a.bin.part").write_bytes(BODY)
    assert fetch(archive(server, "x", tmp_path), tmp_path, **quiet).read_bytes() == BODY and server.asked == ["bytes=10240-"]

@pytest.mark.parametrize("path, error", [("other", ValueError), ("gone", OSError)])
def test_nothing_stays_of_a_wrong_file(server, tmp_path, path, error):
    with pytest.raises(error):
        fetch(archive(server, path, tmp_path), tmp_path/"to", **quiet)
    assert not (tmp_path/"to").exists() or not list((tmp_path/"to").iterdir())

@pytest.fixture
def offline(monkeypatch, server):
    "Addresses where nobody answers."
    server.server_close()
    monkeypatch.setattr(field, "ARCHIVES", {k: a._replace(url=f"http://127.0.0.1:{server.server_port}/x") for k, a in field.ARCHIVES.items()})

@pytest.mark.parametrize("kind, names", [("voc", ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"]), ("coco", ["annotations_trainval2014.zip", "train2014.zip", "val2014.zip"])])
@pytest.mark.parametrize("download", [True, False])
def test_without_a_network(offline, tmp_path, capsys, kind, names, download):
    assert main(["data", kind, str(tmp_path/"new"), *["--download"]*download]) == 2
    said = capsys.readouterr().err
    for n in names:
        assert n in said and next(a.md5 for a in field.ARCHIVES.values() if a.name == n) in said
    assert ("could not be fetched" in said) is download and ("--download" in said) is not download
    assert not (tmp_path/"new").exists()

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

MAKERS = {"a.tar": make_tar, "a.tgz": lambda p, m: make_tar(p, m, "w:gz"), "a.zip": make_zip}
kinds = pytest.mark.parametrize("kind", MAKERS)

@kinds
@pytest.mark.parametrize("name", ["../up", "a/../../up", "/up", "..", "a/b/../../../up", "..\\up", "C:up", "C:\\up", "a\\..\\..\\up"])
def test_no_path_leaves_the_folder(tmp_path, kind, name):
    a = MAKERS[kind](tmp_path/kind, [("fine.txt", b"fine"), (name, b"evil")])
    with pytest.raises(ValueError, match="expected paths inside"):
        unpack(a, tmp_path/"in"/"to", **quiet)
    assert [p.name for p in tmp_path.iterdir()] == [kind]        # not even the fine one

@kinds
def test_links_are_left_out(tmp_path, kind, caplog):
    (tmp_path/"safe").mkdir()
    (tmp_path/"safe"/"secret").write_text("untouched")
    target = str(tmp_path/"safe")
    a = MAKERS[kind](tmp_path/kind, [("door", tarfile.SYMTYPE, target), ("door/secret", b"evil"), ("up", tarfile.SYMTYPE, "../safe/secret"), ("up", b"evil")])
    unpack(a, tmp_path/"to", **quiet)
    assert (tmp_path/"safe"/"secret").read_text() == "untouched" and [p.name for p in (tmp_path/"safe").iterdir()] == ["secret"]
    assert not any(p.is_symlink() for p in (tmp_path/"to").rglob("*")) and caplog.text.count("left out") == 2
    assert tree(tmp_path/"to") == {"door/secret": b"evil", "up": b"evil"}   # inside, as files

@pytest.mark.parametrize("what", [tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_devices_and_hard_links_are_left_out(tmp_path, what):
    (tmp_path/"secret").write_text("untouched")
    unpack(make_tar(tmp_path/"a.tar", [("x", what, "../secret"), ("y", b"y")]), tmp_path/"to", **quiet)
    assert tree(tmp_path/"to") == {"y": b"y"} and os.stat(tmp_path/"secret").st_nlink == 1

CONTENT = {f"d{i % 3}/f{i}.bin": bytes([i])*(700*i) for i in range(9)}

@kinds
def test_every_cut_is_an_error_or_leaves_whole_files(tmp_path, kind):
    whole = MAKERS[kind](tmp_path/kind, list(CONTENT.items())).read_bytes()
    errors = 0
    for n in np.random.default_rng(0).integers(0, len(whole) - 1, 40):
        to = tmp_path/"to"
        shutil.rmtree(to, ignore_errors=True)
        (tmp_path/kind).write_bytes(whole[:n])
        try:
            unpack(tmp_path/kind, to, **quiet)
        except ValueError as e:
            errors += 1
            assert kind in str(e) and "cut short" in str(e)
        assert not to.exists() or (tree(to).items() <= CONTENT.items() and not parts(to))
    assert errors >= 38 if kind != "a.tar" else errors > 20  # a tar cut between two members looks complete: its MD5 does not

@kinds
def test_damage_inside(tmp_path, kind):
    path = MAKERS[kind](tmp_path/kind, list(CONTENT.items()))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(60):
        b = bytearray(whole)
        at = rng.integers(0, len(b), 3)
        for i in at:
            b[i] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(b))
        to = tmp_path/"to"
        shutil.rmtree(to, ignore_errors=True)
        try:
            unpack(path, to, **quiet)
            seen.add("result")
        except ValueError:
            seen.add("error")
        assert not to.exists() or not parts(to)
    assert "error" in seen
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("to", kind)) == []

@kinds
def test_a_stopped_unpacking_goes_on(tmp_path, kind, monkeypatch):
    a = MAKERS[kind](tmp_path/kind, list(CONTENT.items()))
    to = tmp_path/"to"
    real = shutil.copyfileobj
    calls = []
    def stop(src, dst, n):
        calls.append(1)
        if len(calls) == 5:
            dst.write(b"half")
            raise KeyboardInterrupt
        real(src, dst, n)
    monkeypatch.setattr(shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(a, to, **quiet)
    assert tree(to).items() < CONTENT.items() and not parts(to)
    n = len(tree(to))
    unpack(a, to, **quiet)
    assert tree(to) == CONTENT and len(calls) == 5 + len(CONTENT) - n

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
    savemat(path, dict(GTcls=dict(Boundaries=edges, Segmentation=ids, CategoriesPresent=np.unique(ids[ids > 0])[:, None])), do_compression=True)

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
        (voc/"Annotations"/f"{i}.xml").write_text("<annotation>" + "".join(f"<object><name>{o}</name><part><name>hand</name></part></object>" for o in names) + "</annotation>")
        if k < 2*n//3:
            save_mask(voc/"SegmentationClass"/f"{i}.png", np.where(rng.random(mask.shape) < .2, 255, mask).astype(np.uint8))
        if k >= 2*n//3 or k % 2:
            write_mat(sbd/"cls"/f"{i}.mat", mask)
    split = dict(train=ids[:n//3], val=ids[n//3:2*n//3])
    theirs = sorted(p.stem for p in (sbd/"cls").iterdir())
    for path, what in ((lists(voc)/"train.txt", split["train"]), (lists(voc)/"val.txt", split["val"]), (sbd/"train.txt", theirs[::2]), (sbd/"val.txt", theirs[1::2])):
        path.write_text("".join(f"{i}\n" for i in what))
    return root, voc, sbd, ids, split

def test_voc(tmp_path):
    root, voc, sbd, ids, split = mini_voc(tmp_path)
    assert build_voc(root, **quiet) == voc
    data = open_data(root, "train_aug", VOC.classes, with_masks=True)
    assert data.ids == sorted(set(ids) - set(split["val"]))
    for i in data.ids:
        own = voc/"SegmentationClass"/f"{i}.png"
        assert np.array_equal(data.read(i)[1], read_mask(own, 21) if own.exists() else sbd_mask(sbd/"cls"/f"{i}.mat"))
        assert Image.open(data.masks[i]).mode == "P"
    for i in split["val"]:
        assert np.array_equal(read_mask(voc/"SegmentationClassAug"/f"{i}.png", 21), read_mask(voc/"SegmentationClass"/f"{i}.png", 21))
    assert json.loads((lists(voc)/"tags.json").read_text()).keys() == set(ids)
    assert data.tags == read_tags(voc, data.ids, VOC.classes, "xml")
    rows = survey(root, VOC)
    assert complete(rows) and rows["train_aug"] == dict(listed=len(data), pictures=len(data), masks=len(data), tagged=len(data), published=10_582) and rows["test"]["listed"] is None
    before = tree(root)
    build_voc(root, **quiet)
    assert tree(root) == before

def test_tags_of_the_masks(tmp_path):
    root, voc, *_ = mini_voc(tmp_path)
    build_voc(root, tags_from="masks", **quiet)
    ids = open_data(root, "train_aug", VOC.classes).ids
    assert {i: read_tags(voc, ids, VOC.classes, "json")[i] for i in ids} == read_tags(voc, ids, VOC.classes, "masks")
    (lists(voc)/"tags.json").write_text(json.dumps({i: ["cat"] for i in ids}))
    build_voc(root, **quiet)
    assert read_tags(voc, ids, VOC.classes)[ids[0]] == [7]       # somebody's own tags stay
    build_voc(root, tags_from="xml", **quiet)
    tags = read_tags(voc, ids, VOC.classes, "json")
    assert {i: tags[i] for i in ids} == read_tags(voc, ids, VOC.classes, "xml")
    (lists(voc)/"tags.json").write_text("{")
    with pytest.raises(ValueError, match="tags.json: expected JSON"):
        build_voc(root, tags_from="xml", **quiet)

def test_voc_from_archives(tmp_path, monkeypatch):
    src = mini_voc(tmp_path/"src")[0]
    root = tmp_path/"root"
    root.mkdir()
    build_voc(src, **quiet)
    want = tree(src/"VOCdevkit")
    shutil.rmtree(src)
    mini_voc(src)
    def pack(name, *tops):
        with tarfile.open(root/name, "w:gz" if name.endswith("gz") else "w") as t:
            for top in tops:
                t.add(src/top, top)
        return calculate_md5(root/name)
    md5 = dict(voc=pack("VOCtrainval_11-May-2012.tar", "VOCdevkit"), sbd=pack("benchmark.tgz", "benchmark_RELEASE"))
    test = {"VOCdevkit/VOC2012/JPEGImages/t.jpg": (src/"VOCdevkit"/"VOC2012"/"JPEGImages"/"2008_000000.jpg").read_bytes(), "VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt": b"t\n"}
    make_tar(root/"VOC2012test.tar", test.items())
    md5["test"] = calculate_md5(root/"VOC2012test.tar")
    monkeypatch.setattr(field, "ARCHIVES", {k: a._replace(md5=md5.get(k, a.md5)) for k, a in field.ARCHIVES.items()})
    real = shutil.copyfileobj
    calls = []
    def stop(*a):
        calls.append(1)
        if len(calls) == 20: raise KeyboardInterrupt
        real(*a)
    monkeypatch.setattr(shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        build_voc(root, **quiet)      # in the middle of VOC: JPEGImages may be there, but not all of it
    build_voc(root, **quiet)
    assert tree(root/"VOCdevkit") == {**want, **{k.removeprefix("VOCdevkit/"): v for k, v in test.items()}}
    assert open_data(root, "test", VOC.classes, tags_from=None).ids == ["t"] and complete(survey(root, VOC))
    for a in root.glob("*.t*"):
        if not a.name.endswith("unpacked"):
            a.unlink()
    n = len(calls)
    build_voc(root, **quiet)
    assert len(calls) == n     # the archives may go

def test_killed_builds_leave_whole_files(tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    want = mini_voc(tmp_path/"want", 120)[0]
    build_voc(want, **quiet)
    root, voc, *_ = mini_voc(tmp_path/"root", 120)
    aug = voc/"SegmentationClassAug"
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(20):
        if (pid := os.fork()) == 0:
            try:
                tqdm.set_lock(threading.RLock())
                build_voc(root, **quiet)  # its own: a lock shared with this process would die held
            finally:
                os._exit(0)
        time.sleep(rng.uniform(.005, .15))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        masks = [p for p in aug.glob("*.png") if not p.name.startswith(".")]  # without what a killed process was writing
        seen.append(len(masks))
        for p in masks:
            assert read_mask(p, 21).shape == read_mask(want/aug.relative_to(root)/p.name, 21).shape
        if (lists(voc)/"train_aug.txt").exists():
            assert complete(survey(root, VOC))   # a list promises its masks
    assert seen == sorted(seen)
    build_voc(root, **quiet)
    assert {k: v for k, v in tree(root/"VOCdevkit").items() if "/." not in k} == tree(want/"VOCdevkit")

@pytest.mark.parametrize("spoil, says", [
    (lambda r, v, s: sorted((s/"cls").iterdir())[-1].unlink(), "expected a file of SBD, found none"),
    (lambda r, v, s: (s/"train.txt").write_text("../../../evil\n"), "without folder or drive"),
    (lambda r, v, s: next((v/"JPEGImages").iterdir()).unlink(), "no picture for 1 of"),
    (lambda r, v, s: (lists(v)/"val.txt").unlink(), "no such split"),
    (lambda r, v, s: shutil.rmtree(v/"Annotations"), "no such file or folder of tags"),
    (lambda r, v, s: Image.new("RGB", (99, 98)).save(v/"JPEGImages"/f"{(lists(v)/'val.txt').read_text().split()[0]}.jpg"), "of the picture's 99x98 pixels, got 13x"),
    (lambda r, v, s: Image.new("RGB", (13, 9)).save(v/"SegmentationClass"/f"{(lists(v)/'val.txt').read_text().split()[0]}.png"), "mode RGB"),
    (lambda r, v, s: shutil.rmtree(s), "benchmark.tgz")])
def test_voc_mistakes(tmp_path, spoil, says, capsys):
    root, voc, sbd, *_ = mini_voc(tmp_path)
    spoil(root, voc, sbd)
    assert main(["data", "voc", str(root)]) == 2
    assert says in capsys.readouterr().err and not list(root.rglob("evil*")) and not parts(root)

def test_sbd_elsewhere(tmp_path):
    root, voc, sbd, *_ = mini_voc(tmp_path/"a")
    (root/"benchmark_RELEASE").rename(tmp_path/"far")
    for wrong in (tmp_path, tmp_path/"nowhere"):
        with pytest.raises(FileNotFoundError, match="expected SBD's folder"):
            build_voc(root, sbd=wrong, **quiet)
    build_voc(root, sbd=tmp_path/"far", **quiet)
    assert complete(survey(root, VOC))

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
        b = bytearray(whole)
        for i in rng.integers(0, len(b), 3):
            b[i] ^= int(rng.integers(1, 256))
        path.write_bytes(bytes(b))
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
    name = lambda lo, hi: [f"p{i:05d}" for i in range(lo, hi)]
    train = name(0, 1464)
    val = name(1464, 2913)
    sbd = name(1464 - 787, 2913) + name(2913, 2913 + 11_355 - 787 - 1449)       # as the sets overlap: 9,119 of SBD alone make 10,582 + 1
    with pytest.raises(ValueError, match="10,582"):
        train_aug(train, val, sbd)
    sbd[-1] = name(0, 1)[0]
    assert len(set(sbd)) == 11_355 and len(train_aug(train, val, sbd)) == 10_582
    assert len(train_aug(train, val, sbd[:-9])) < 10_582                        # parts of the sets: whatever they give

# ---- COCO in miniature

GAPS = [k for k in range(1, 91) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
IDS = {k: i + 1 for i, k in enumerate(GAPS)}

def square(x0, x1, h): return [[x0, 0, x1, 0, x1, h, x0, h]]

def mini_coco(root, split="val", year=2014, n=5, pictures=None):
    "n pictures of 2x6 and one without objects; the first has a crowd, packed in the second."
    src = root/(pictures or f"{split}{year}")
    src.mkdir(parents=True)
    (root/"annotations").mkdir(exist_ok=True)
    images = []
    anns = []
    for i in range(1, n + 2):
        info = dict(id=i, file_name=f"COCO_{split}{year}_{i:012d}.jpg" if year == 2014 else f"{i:012d}.jpg", height=2, width=6)
        Image.fromarray(np.full((2, 6, 3), i, np.uint8)).save(src/info["file_name"])
        images.append(info)
        if i <= n:
            anns.append(dict(id=2*i, image_id=i, category_id=GAPS[i % 80], iscrowd=0, area=8., segmentation=square(0, 4, 2)))
            crowd = dict(size=[2, 6], counts=[6, 6])
            if i <= 2:
                anns.append(dict(id=2*i + 1, image_id=i, category_id=1, iscrowd=1, area=6., segmentation=crowd if i == 1 else packed(crowd)))
    write_instances(root, split, year, images, anns)
    return root

def packed(seg):
    r = rle.frPyObjects(seg, *seg["size"])
    return dict(r, counts=r["counts"].decode())

def write_instances(root, split, year, images, anns, cats=None):
    cats = cats or [dict(id=k, name=c) for k, c in zip(GAPS, COCO.classes)]
    (root/"annotations"/f"instances_{split}{year}.json").write_text(json.dumps(dict(images=images, annotations=anns, categories=cats)))

def test_coco(tmp_path):
    root = build_coco(mini_coco(mini_coco(tmp_path/"c"), "train", n=3), **quiet)
    val, train = (open_data(root, s, COCO.classes, with_masks=True) for s in ("val", "train"))
    assert len(train) == 3 and len(val) == 5 and val.ids == [f"COCO_val2014_{i:012d}" for i in range(1, 6)]   # not the sixth
    for k, i in enumerate(val.ids, 1):
        img, mask = val.read(i)
        want = np.zeros((2, 6), np.uint8)
        want[:, :4] = k + 1
        if k <= 2:
            want[:, 3:] = 1                              # the crowd is smaller
        assert np.array_equal(mask, want) and val.tags[i] == sorted({k, *([0] if k <= 2 else [])})
    assert not (root/"JPEGImages"/"COCO_val2014_000000000006.jpg").exists() and complete(survey(root, COCO))
    shutil.move(root, tmp_path/"moved")                         # links are relative
    assert open_data(tmp_path/"moved", "val", COCO.classes).read(val.ids[0])[0].shape == (2, 6, 3)

def test_coco_crowds_can_be_ignored(tmp_path):
    root = build_coco(mini_coco(tmp_path), ("val",), ignore_crowds=True, **quiet)
    val = open_data(root, "val", COCO.classes, with_masks=True)
    assert val.read(val.ids[0])[1].tolist() == [[2]*4 + [255]*2]*2 and val.tags[val.ids[0]] == [0, 1]
    build_coco(root, ("val",), tags_from="masks", **quiet)
    assert open_data(root, "val", COCO.classes).tags[val.ids[0]] == [1]

def test_coco_resumes_and_mends(tmp_path, monkeypatch):
    want = build_coco(mini_coco(tmp_path/"want"), ("val",), **quiet)
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
    build_coco(root, ("val",), workers=1, **quiet)
    assert tree(root) == tree(want) and len(calls) == 5
    before = tree(root)
    build_coco(root, ("val",), **quiet)
    assert tree(root) == before and len(calls) == 5

def test_two_processes_do_the_same(tmp_path):
    assert pickle.loads(pickle.dumps(field._voc_mask)) is field._voc_mask     # VOC's part of the same loop
    a = build_coco(mini_coco(tmp_path/"a"), ("val",), **quiet)
    b = build_coco(mini_coco(tmp_path/"b"), ("val",), workers=2, **quiet)
    assert tree(a) == tree(b)

def test_links_copies_and_second_names(tmp_path, monkeypatch):
    first = "COCO_val2014_000000000001.jpg"
    copied = build_coco(mini_coco(tmp_path/"a"), ("val",), copy=True, **quiet)/"JPEGImages"/first
    assert not copied.is_symlink() and copied.stat().st_nlink == 1
    def forbidden(*a, **k): raise OSError("a privilege is missing")
    monkeypatch.setattr(Path, "symlink_to", forbidden)
    hard = build_coco(mini_coco(tmp_path/"b"), ("val",), **quiet)/"JPEGImages"/first
    assert not hard.is_symlink() and hard.samefile(tmp_path/"b"/"val2014"/first)

@pytest.mark.parametrize("pictures", ["val2014", "images/val2014", "JPEGImages/val2014"])
def test_coco_where_others_keep_it(tmp_path, pictures):
    root = build_coco(mini_coco(tmp_path, pictures=pictures), ("val",), **quiet)
    assert len(open_data(root, "val", COCO.classes, with_masks=True)) == 5

def test_coco_2017(tmp_path):
    root = build_coco(mini_coco(tmp_path, year=2017), ("val",), **quiet)
    assert open_data(root, "val", COCO.classes).ids[0] == "000000000001"

def edit(root, f):
    path = root/"annotations"/"instances_val2014.json"
    d = json.loads(path.read_text())
    f(d)
    path.write_text(json.dumps(d))

@pytest.mark.parametrize("spoil, says", [
    (lambda r: (r/"annotations"/"instances_val2014.json").write_text('{"images": ['), "expected COCO's instances"),
    (lambda r: (r/"annotations"/"instances_val2014.json").write_text('[]'), "expected COCO's instances"),
    (lambda r: edit(r, lambda d: d.pop("categories")), "expected COCO's instances|expected the 80 classes"),
    (lambda r: edit(r, lambda d: d["images"][0].pop("file_name")), "expected COCO's instances"),
    (lambda r: edit(r, lambda d: d["images"][0].update(file_name="../../evil.jpg")), "without folder or drive"),
    (lambda r: edit(r, lambda d: d["images"][0].update(height=3)), "1.jpg: expected annotations that can be drawn.*6x2 pixels"),
    (lambda r: edit(r, lambda d: d["images"][2].update(height=3)), "of the picture's 6x2 pixels, got 6x3"),
    (lambda r: edit(r, lambda d: d["annotations"][0].update(segmentation=[[1]])), "expected annotations that can be drawn"),
    (lambda r: edit(r, lambda d: d["annotations"][0].update(segmentation=dict(size=[2, 6], counts="garbage"))), "expected annotations that can be drawn"),
    (lambda r: edit(r, lambda d: d["annotations"][0].update(segmentation=dict(size=[9**9, 9**9], counts=[1]))), "expected annotations that can be drawn"),
    (lambda r: edit(r, lambda d: d["annotations"][0].update(category_id=12)), "expected annotations that can be drawn"),
    (lambda r: edit(r, lambda d: d["annotations"][0].pop("area")), "expected annotations that can be drawn"),
    (lambda r: (r/"val2014"/"COCO_val2014_000000000003.jpg").unlink(), "no picture for 1 of 5: COCO_val2014_000000000003.jpg"),
    (lambda r: shutil.rmtree(r/"val2014"), "val2014.zip")])
def test_coco_mistakes(tmp_path, spoil, says, capsys):
    root = mini_coco(tmp_path/"root")
    spoil(root)
    assert main(["data", "coco", str(root), "--splits", "val"]) == 2
    assert re.search(says, capsys.readouterr().err) and not list(tmp_path.rglob("evil*")) and not parts(root)
    assert not (lists(root)/"val.txt").exists()

def test_complete_annotations_give_the_published_number(tmp_path):
    root = mini_coco(tmp_path)
    edit(root, lambda d: d["images"].extend(dict(id=i, file_name=f"{i}.jpg", height=2, width=6) for i in range(100, 100 + 40_504 - 6)))
    with pytest.raises(ValueError, match="expected 40,137 pictures with objects among 40,504, got 5"):
        build_coco(root, ("val",), **quiet)

def field_mask(anns, h, w):
    "coco2voc's rule, object by object: by area, and a pixel keeps its first class."
    out = np.zeros((h, w), np.int64)
    for a in sorted(anns, key=lambda a: a["area"]):
        seg = a["segmentation"]
        r = rle.merge(rle.frPyObjects(seg, h, w)) if isinstance(seg, list) else rle.frPyObjects(seg, h, w) if isinstance(seg["counts"], list) else seg
        out = np.where(out > 0, out, rle.decode(r).astype(np.int64)*IDS[a["category_id"]])
    return out

def test_overlaps_are_drawn_as_the_field_draws_them():
    rng = np.random.default_rng(0)
    for _ in range(30):
        anns = [dict(category_id=int(rng.choice(GAPS)), iscrowd=int(rng.random() < .3), area=float(rng.integers(1, 4)),  # many equal areas
                     segmentation=[rng.uniform(0, 20, 8).tolist() for _ in range(rng.integers(1, 3))]) for _ in range(rng.integers(0, 9))]
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
        for _ in range(20):
            try:
                mask = coco_mask([dict(category_id=3, area=9, segmentation=dict(size=[300, 400], counts=counts))], (300, 400), IDS)
            except ValueError as e:
                assert "end before" in str(e)
            else:
                assert set(np.unique(mask)) <= {0, 3} and (mask > 0).sum() == (4 if counts == [3, 4] else 0)

def test_an_object_without_pixels():
    assert coco_mask([dict(category_id=1, area=0, segmentation=[])], (3, 4), IDS).sum() == 0

@pytest.mark.parametrize("less", [[], [5, 5], [1, 1, 8, 8], [2., 2.]*2])
def test_polygons_without_an_area_draw_nothing(less):
    "Two points were taken for a box and ended in pycocotools with TypeError."
    triangle = [1, 1, 8, 1, 8, 8]
    def drawn(*polygons): return coco_mask([dict(category_id=3, area=9, segmentation=list(polygons))], (12, 12), IDS)
    alone = drawn(triangle)
    assert (alone == 3).sum() == 21 and not drawn(less).any() and not drawn(less, less).any()
    for both in (drawn(less, triangle), drawn(triangle, less), drawn(tuple(triangle)), drawn(np.array(triangle))):
        assert np.array_equal(both, alone)

@pytest.mark.parametrize("polygon, says", [([1, 1, 8, 1, 8], "pairs x, y, got a polygon of 5"), ([1, 1, 8, 1, 8, 8, 3], "of 7 numbers"), ([float("nan")]*6, "coordinates in a picture of 12x12 pixels, got nan"),
                                           ([1, 1, 8, 1, 8, 1e9], "got 1000000000"), ([1, 1, float("-inf"), 1, 8, 8], "got -inf"), (["a"]*6, "expected numbers"), ([[1, 1]]*6, "expected numbers"), (7, "expected polygons as lists")])
def test_polygons_that_cannot_be_drawn(polygon, says):
    "Of coordinates that are no places in a picture pycocotools fills memory until the system ends it."
    for polygons in ([polygon], [[1, 1, 8, 1, 8, 8], polygon]):
        with pytest.raises(ValueError, match=says):
            coco_mask([dict(category_id=3, area=9, segmentation=polygons)], (12, 12), IDS)

# ---- the test server

def test_a_packed_mask_goes_by_its_colours(tmp_path):
    "With its palette sorted anew, person went to the server as aeroplane."
    from weclip.data.field import _entry
    ids = np.zeros((6, 8), np.uint8)
    ids[2:5, 1:4] = 15
    Image.fromarray(voc_palette()[ids]).quantize(256, dither=0).save(tmp_path/"q.png")
    assert np.array_equal(np.asarray(Image.open(_entry(tmp_path/"q.png", "a/q.png")[1])), ids)

@pytest.fixture
def test_set(tmp_path):
    "1,456 small pictures and their masks."
    root = tmp_path/"VOC2012"
    (root/"JPEGImages").mkdir(parents=True)
    lists(root).mkdir(parents=True)
    ids = [f"2008_{i:06d}" for i in range(1456)]
    sizes = [(5, 7), (7, 5), (6, 6)]
    for k, (h, w) in enumerate(sizes):
        Image.new("RGB", (w, h)).save(tmp_path/f"{k}.jpg")
        save_mask(tmp_path/f"{k}.png", np.full((h, w), k + 18, np.uint8))
    (tmp_path/"masks").mkdir()
    for k, i in enumerate(ids):
        os.link(tmp_path/f"{k % 3}.jpg", root/"JPEGImages"/f"{i}.jpg")
        shutil.copy(tmp_path/f"{k % 3}.png", tmp_path/"masks"/f"{i}.png")
    (lists(root)/"test.txt").write_text("\n".join(ids) + "\n")
    return root, tmp_path/"masks", ids

def test_pack(test_set, tmp_path, capsys):
    root, masks, ids = test_set
    grey = Image.fromarray(np.full((5, 7), 18, np.uint8))
    grey.save(masks/f"{ids[0]}.png")     # ids without a palette: the server would take the greys for colours
    save_mask(masks/"extra.png", np.zeros((2, 2), np.uint8))
    assert main(["data", "pack", str(masks), str(tmp_path/"r.tgz"), "--data", str(root)]) == 0
    with tarfile.open(tmp_path/"r.tgz", "r:gz") as t:
        assert t.getnames() == [f"results/VOC2012/Segmentation/comp6_test_cls/{i}.png" for i in ids]
        for k in (0, 1, 1455):
            im = Image.open(t.extractfile(t.getmembers()[k]))
            assert im.mode == "P" and im.size == Image.open(root/"JPEGImages"/f"{ids[k]}.jpg").size and im.getextrema() == (k % 3 + 18,)*2
            assert np.array_equal(np.reshape(im.getpalette(), (-1, 3))[:21], voc_palette()[:21])
    with tarfile.open(pack_voc(masks, tmp_path/"5.tar.gz", root, competition="comp5", **quiet)) as t:
        assert "comp5_test_cls" in t.getnames()[9]

@pytest.mark.parametrize("spoil, says", [
    (lambda m, i: (m/f"{i}.png").unlink(), "no mask for 1 of 1,456 pictures of test"),
    (lambda m, i: save_mask(m/f"{i}.png", np.zeros((7, 6), np.uint8)), "pixels as the picture, got 6x7"),
    (lambda m, i: save_mask(m/f"{i}.png", np.full((5, 7), 255, np.uint8)), "ids up to 20, got 255"),
    (lambda m, i: save_mask(m/f"{i}.png", np.full((5, 7), 21, np.uint8)), "expected values 0..20"),
    (lambda m, i: Image.new("RGB", (7, 5)).save(m/f"{i}.png"), "mode RGB"),
    (lambda m, i: (m/f"{i}.png").write_bytes(b"x"), "cannot be read")])
def test_pack_refuses_what_the_server_would(test_set, tmp_path, capsys, spoil, says):
    root, masks, ids = test_set
    spoil(masks, ids[1200])
    assert main(["data", "pack", str(masks), str(tmp_path/"r.tgz"), "--data", str(root)]) == 2
    said = capsys.readouterr().err
    assert says in said and ids[1200] in said and not (tmp_path/"r.tgz").exists() and not parts(tmp_path)

# ---- the command

def test_check_only_counts(tmp_path, capsys):
    root, voc, *_ = mini_voc(tmp_path)
    before = tree(root)
    assert main(["data", "voc", str(root), "--check"]) == 0 and tree(root) == before          # `val` can be opened, `train` too
    build_voc(root, **quiet)
    next((voc/"SegmentationClassAug").iterdir()).unlink()
    before = tree(root)
    assert main(["data", "voc", str(root), "--check"]) == 1 and tree(root) == before
    assert "10,582" in capsys.readouterr().out
    assert main(["data", "voc", str(root)]) == 0 and main(["data", "voc", str(root), "--check"]) == 0
    assert main(["data", "coco", str(mini_coco(tmp_path/"c")), "--check"]) == 2 and "to build it: weclip data coco" in capsys.readouterr().err

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
    from weclip.world.scenes import write_scenes
    root = write_scenes(tmp_path/"scenes", train=1, val=3, workers=1)
    shutil.copy(lists(root)/"val.txt", lists(root)/"test.txt")
    assert main(["predict", str(lists(root)/"test.txt"), "--out", str(tmp_path/"masks"), "--no-crf", "--device", "cpu"]) == 0
    assert main(["data", "pack", str(tmp_path/"masks"), str(tmp_path/"r.tgz"), "--data", str(root)]) == 0
    with tarfile.open(tmp_path/"r.tgz") as t:
        assert len(t.getnames()) == 3
    capsys.readouterr()
    monkeypatch.setattr(weclip.use.commands, "LONG", 3)
    assert main(["evaluate", str(root), "--no-crf", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "3 pictures: about 0.0 hours" in said and said.index("hours") < said.index("mIoU")

# ---- evaluation of a large set

class Red(torch.nn.Module):
    "Class 1 where it is red, of COCO's 81."
    classes = COCO
    patch = 16
    def __init__(self):
        from weclip.method.config import preset
        super().__init__()
        self.cfg, self.w = preset("coco", long_side=64, scales=(1.,), tta_flip=False), torch.nn.Parameter(torch.ones(1))
    def logits(self, img):
        x = torch.nn.functional.avg_pool2d(img, 16)
        return torch.cat([x[:, :1]*0 + .5, x[:, :1]*self.w, x.new_zeros(len(x), 79, *x.shape[2:])], 1)

@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_streams(workers, tmp_path):
    "However many pictures: a few are alive at a time, and nothing but masks is written."
    from weclip.engine.infer import evaluate
    alive = weakref.WeakSet()
    most = []
    class Big(np.ndarray):
        pass                   # an array that can be counted
    class Data:
        ids = [f"p{i}" for i in range(120)]
        def __len__(self): return len(self.ids)
        def read(self, i):
            img = np.full((40, 40, 3), int(i[1:]), np.uint8).view(Big)
            lbl = np.eye(40, dtype=np.uint8).view(Big)  # an object, or nothing would be scored
            for a in (img, lbl):
                alive.add(Token(a))
            most.append(len(alive))
            return img, lbl
    class Token:                                   # dies with its array
        def __init__(self, a): a.token = self
    scores = evaluate(Red(), Data(), workers=workers, modes=("single", "crf") if workers else ("single",), out=tmp_path, progress=False)
    assert scores["single"]["miou"] >= 0 and len(most) == 120
    assert max(most[20:]) <= 2*(2*workers + 4) and max(most[60:]) <= max(most[:60])
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".png"}

# ---- the real thing

@needs_data
def test_real_voc(tmp_path):
    "The masks of the field, taken apart into a VOC and an SBD, come together as they were."
    given = DATA/"VOCdevkit"/"VOC2012"
    voc = tmp_path/"VOCdevkit"/"VOC2012"
    sbd = tmp_path/"benchmark_RELEASE"/"dataset"
    lists(voc).mkdir(parents=True)
    (sbd/"cls").mkdir(parents=True)
    (voc/"JPEGImages").symlink_to(given/"JPEGImages")
    aug, val = ((lists(given)/f"{s}.txt").read_text().split() for s in ("train_aug", "val"))
    masks = {i: read_mask(given/"SegmentationClassAug"/f"{i}.png", 21) for i in aug + val}
    train = [i for i in aug if 255 in masks[i]]                      # only VOC draws borders
    for i in train + val:
        save_mask(voc/"SegmentationClass"/f"{i}.png", masks[i])
    for i in set(aug) - set(train):
        write_mat(sbd/"cls"/f"{i}.mat", masks[i])
    for i in (*train[:5], *val[:9]):
        write_mat(sbd/"cls"/f"{i}.mat", np.zeros_like(masks[i]))  # SBD marks some of them, too, and must not win
    theirs = sorted(p.stem for p in (sbd/"cls").iterdir())
    for path, ids in ((lists(voc)/"train.txt", train), (lists(voc)/"val.txt", val), (sbd/"train.txt", theirs[:40]), (sbd/"val.txt", theirs[40:])):
        path.write_text("\n".join(ids))
    build_voc(tmp_path, tags_from="masks", **quiet)
    data = open_data(tmp_path, "train_aug", VOC.classes, with_masks=True)
    assert sorted(data.ids) == sorted(aug) and complete(survey(tmp_path, VOC))
    for i in data.ids:
        assert np.array_equal(data.read(i)[1], masks[i])
    assert open_data(tmp_path, "val", VOC.classes, tags_from=None, with_masks=True).ids == val
    onehot = read_onehot(lists(given)/"cls_labels_onehot.npy", VOC.classes)
    fewer = [i for i in data.ids if set(data.tags[i]) < set(onehot[i])]
    assert all(set(data.tags[i]) <= set(onehot[i]) for i in data.ids) and fewer    # tags name what masks show, and difficult objects besides

@needs_data
def test_real_voc_as_it_lies_there(capsys):
    before = sorted((p, p.stat().st_mtime_ns) for p in (DATA/"VOCdevkit").rglob("*"))
    assert main(["data", "voc", str(DATA)]) == 0 and main(["data", "voc", str(DATA), "--check"]) == 0
    assert sorted((p, p.stat().st_mtime_ns) for p in (DATA/"VOCdevkit").rglob("*")) == before
    assert capsys.readouterr().out.count("train_aug         70        70        70        70    10,582") == 2

@needs_data
def test_real_voc_to_the_server(tmp_path):
    given = DATA/"VOCdevkit"/"VOC2012"
    ids = (lists(given)/"val.txt").read_text().split()
    for i in ids:
        m = read_mask(given/"SegmentationClassAug"/f"{i}.png", 21)
        save_mask(tmp_path/"m"/f"{i}.png", np.where(m == 255, 0, m).astype(np.uint8))
    out = pack_voc(tmp_path/"m", tmp_path/"val.tgz", DATA, split="val", **quiet)
    with tarfile.open(out) as t:
        for m in t:
            assert np.array_equal(np.asarray(Image.open(t.extractfile(m))), read_mask(tmp_path/"m"/Path(m.name).name, 21))

@pytest.fixture(scope="module")
def real_coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    for d in ("annotations", "train2017", "val2017"):
        (root/d).symlink_to(DATA/"coco"/d)
    return build_coco(root, **quiet)

@needs_data
def test_real_coco(real_coco):
    crowds = 0
    for split in ("train", "val"):
        api = CocoAPI(DATA/"coco"/"annotations"/f"instances_{split}2017.json")
        data = open_data(real_coco, split, COCO.classes, with_masks=True)
        assert data.ids == sorted(Path(i["file_name"]).stem for i in api.imgs.values() if api.imgToAnns[i["id"]])
        for i in data.ids:
            img, mask = data.read(i)
            anns = api.imgToAnns[int(i)]
            assert np.array_equal(mask, field_mask(anns, *mask.shape)) and mask.max() <= 80
            union = np.any([api.annToMask(a) for a in anns], 0)
            assert np.array_equal(mask > 0, union)               # every claimed pixel has a class, no other has
            shown = set(np.unique(mask[mask > 0]) - 1)
            assert shown <= set(data.tags[i]) == {COCO.classes.index(api.cats[a["category_id"]]["name"]) for a in anns}
            crowds += sum(a["iscrowd"] for a in anns)
    assert crowds >= 1

@needs_data
def test_real_coco_is_evaluated(real_coco, tmp_path):
    from weclip.engine.infer import evaluate, evaluation_hours
    data = open_data(real_coco, "val", COCO.classes, tags_from=None, with_masks=True)
    assert evaluation_hours(Red(), data, ("single",), pictures=2) > 0
    assert 0 <= evaluate(Red(), data, modes=("single",), workers=0, out=tmp_path, progress=False)["single"]["miou"] < .1
    assert len(list((tmp_path/"single").iterdir())) == len(data)
