"""Damaged and hostile files for every reader.

`python tests/fuzz.py FOLDER` writes two lines per input to FOLDER/log.jsonl, before and after,
and keeps in FOLDER/bad what went wrong.
"""
import faulthandler
import io
import json
import logging
import pickle
import random
import re
import resource
import signal
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file

import weclip.method.model
from weclip.speed import bench
from weclip.method.classes import voc_palette
from weclip.data.pictures import read_image, read_mask, save_mask
from weclip.data.voc import get_classes, open_data, read_onehot
from weclip.data.own import find_images, findings, rows_csv
from weclip.engine.weights import load_model, read_weights, save_model
from weclip.engine.train import load_checkpoint, optimiser, save_checkpoint

NAMES = ("cat", "dog", "horse")
SECONDS = 10  # of processor time per input, of memory for all
GIB = 3

# ---- how a file breaks

def flip(b, r):
    b = bytearray(b)
    for k in r.choices(range(len(b)), k=r.choice([1, 1, 2, 8, 64])):
        b[k] ^= 1 << r.randrange(8)
    return bytes(b)

def flip_head(b, r):
    k = min(len(b), r.choice([32, 128, 600]))
    return flip(b[:k], r) + b[k:]

def cut(b, r): return b[:r.randrange(len(b))]
def cut_head(b, r): return b[r.randrange(1, len(b)):]

def drop(b, r):
    i, j = sorted(r.choices(range(len(b) + 1), k=2))
    return b[:i] + b[min(j, i + 400):]

def repeat(b, r):
    i, j = sorted(r.choices(range(len(b) + 1), k=2))
    return b[:j] + b[i:]

def fill(b, r):
    i = r.randrange(len(b))
    n = r.choice([1, 2, 4, 16])
    return b[:i] + r.choice([b"\0", b"\xff", b"\x7f"])*n + b[i + n:]

def fill_head(b, r):
    k = min(len(b), 200)
    return fill(b[:k], r) + b[k:]

def noise(b, r):
    i = r.randrange(len(b))
    return b[:i] + r.randbytes(r.choice([1, 7, 100])) + b[i:]

def number(b, r):
    "A large number where a 4-byte one could be."
    i = r.randrange(max(1, min(len(b), 300) - 4))
    order = r.choice("<>")
    large = r.choice([0, 1, 65535, 1 << 20, 1 << 31, (1 << 32) - 1])
    return b[:i] + struct.pack(order + "I", large) + b[i + 4:]

def size(b, r):
    "Another size in the header of a PNG (with its checksum), JPEG, GIF or BMP."
    h, w = (r.choice([0, 1, 7, 5000, 9400, 20000, 65500, 1 << 24, (1 << 31) - 1]) for _ in "hw")
    if b[:4] == b"\x89PNG":
        head = b[12:16] + struct.pack(">II", w, h) + b[24:29]
        return b[:12] + head + struct.pack(">I", zlib.crc32(head)) + b[33:]
    frame = re.search(rb"\xff[\xc0-\xc2]\0.", b, re.S)
    if b[:2] == b"\xff\xd8" and frame:
        return b[:frame.end() + 1] + struct.pack(">HH", h & 65535, w & 65535) + b[frame.end() + 5:]
    if b[:3] == b"GIF": return b[:6] + struct.pack("<HH", w & 65535, h & 65535) + b[10:]
    if b[:2] == b"BM": return b[:18] + struct.pack("<II", w, h) + b[26:]
    return number(b, r)

BYTES = (flip, flip, flip_head, cut, cut_head, drop, repeat, fill, fill_head, noise, number)

WORDS = [
    "\0", "\ufeff", "NaN", "-Infinity", "1e999", "null", "true", "{}", "[]", '""', "'", "\"", "\\", "\\ud800",
    "../../etc/passwd", "/etc/passwd", "C:\\x", "..", "a", "b", "cat", "CAT", " cat ", "zebra", "0", "-1",
    "9"*5000, "x"*300, "ä", "\u2028", "\x0c", "\x1b[31m", "\ud7ff", "[", "]", "{", "}", ":", ",", "#", "&a",
    "*a", "!!python/object/apply:os.system [true]", "!!set {a}", "!!timestamp 2001-01-01", "2001-01-01", "no",
    "~", "---", "...", "- ", "? ", "<<: *a", "%YAML 9.9\n---\n", "<", ">", "&amp;", "&lt;", "&x;", "<!--",
    "-->", "<![CDATA[", "</name>", "<name/>", "<object>",
    "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]>", "<?xml version='1.0' encoding='utf-7'?>", "\n",
    "\r", "\t"]

def word(b, r):
    i = r.randrange(len(b) + 1)
    return b[:i] + r.choice(WORDS).encode("utf-8", "surrogatepass") + b[i:]

def swap(b, r):
    parts = re.split(rb"(\W+)", b)
    i = r.randrange(len(parts))
    return b"".join(parts[:i] + [r.choice(WORDS).encode("utf-8", "surrogatepass")] + parts[i + 1:])

def line(b, r):
    rows = b.splitlines(True)
    i, j = r.choices(range(len(rows)), k=2)
    rows.insert(i, rows[j])
    return b"".join(rows)

def encoding(b, r):
    other = r.choice(["utf-16", "utf-16-le", "utf-32", "utf-7", "cp037", "utf-8-sig"])
    return b.decode("utf-8", "replace").encode(other, "replace")

TEXT = (flip, cut, drop, repeat, noise, word, word, word, swap, swap, swap, line, encoding)

def mutants(b, how, n, seed):
    "`n` broken copies, from one to three mutations each."
    for k in range(n):
        r = random.Random(f"{seed} {k}")
        x = b
        names = []
        for f in r.choices(how, k=r.choice([1, 1, 1, 2, 3])):
            if x:
                x = f(x, r)
                names.append(f.__name__)
        yield "+".join(names), x

# ---- the sound files

def pictures():
    "File name -> bytes, one of every kind that is read."
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize((40, 30), Image.Resampling.BICUBIC)
    grey = rgb.convert("L")
    deep = Image.fromarray(rng.integers(0, 65536, (30, 40)).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    turned[0x010F] = "maker"
    turned.get_ifd(0x8769)[0x9003] = "2001:01:01 00:00:00"
    frames = [rgb.rotate(90*k) for k in range(3)]
    def made(im, kind, **kw):
        f = io.BytesIO()
        im.save(f, kind, **kw)
        return f.getvalue()
    cmyk = rgb.convert("CMYK")
    twelve = np.asarray(deep) >> 4
    twelve_bits = Image.fromarray(twelve)
    moving = dict(save_all=True, append_images=frames)
    return {
        "base.jpg": made(rgb, "JPEG"),
        "progressive.jpg": made(rgb, "JPEG", progressive=True),
        "grey.jpg": made(grey, "JPEG"),
        "cmyk.jpg": made(cmyk, "JPEG"),
        "turned.jpg": made(rgb, "JPEG", exif=turned),
        "turned.png": made(rgb, "PNG", exif=turned),
        "base.png": made(rgb, "PNG"),
        "deep.png": made(deep, "PNG"),
        "twelve.png": made(twelve_bits, "PNG"),
        "twelve.tif": made(twelve_bits, "TIFF", tiffinfo={281: 4095}),
        "rgb16.png": rgb16(twelve),
        "palette.png": made(rgb.quantize(16), "PNG", transparency=3),
        "alpha.png": made(rgb.convert("RGBA"), "PNG"),
        "bit.png": made(rgb.convert("1"), "PNG"),
        "moving.png": made(rgb, "PNG", **moving),
        "moving.gif": made(rgb, "GIF", **moving),
        "moving.webp": made(rgb, "WEBP", **moving),
        "base.webp": made(rgb, "WEBP"),
        "base.bmp": made(rgb, "BMP"),
        "lzw.tif": made(rgb, "TIFF", compression="tiff_lzw"),
        "cmyk.tif": made(cmyk, "TIFF"),
        "deep.tif": made(deep, "TIFF")}

def rgb16(grey):
    "A PNG of three equal channels with 16 bits, and its own word that 12 of them count."
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + np.stack([row]*3, -1).astype(">u2").tobytes() for row in grey)
    head = struct.pack(">IIBBBBB", *grey.shape[::-1], 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head), chunk(b"sBIT", b"\x0c"*3), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

def make_root(folder):
    "Three tagged pictures in VOC2012 layout."
    lists = folder/"ImageSets"/"Segmentation"
    lists.mkdir(parents=True)
    (folder/"JPEGImages").mkdir()
    (folder/"Annotations").mkdir()
    for k, i in enumerate("abc"):
        Image.new("RGB", (8, 6), (k, 9, 9)).save(folder/"JPEGImages"/f"{i}.jpg")
    (lists/"train.txt").write_text("a\nb\nc\n")
    tags = dict(a=["cat"], b=["dog", "cat"], c=["horse"])
    (lists/"tags.json").write_text(json.dumps(tags, indent=0))
    thing = "\t<object>\n\t\t<name>{}</name>\n\t\t<difficult>0</difficult>\n\t</object>\n"
    for i, names in tags.items():
        objects = "".join(thing.format(n) for n in names)
        xml = f"<annotation>\n\t<filename>{i}.jpg</filename>\n{objects}</annotation>\n"
        (folder/"Annotations"/f"{i}.xml").write_text(xml)
    return folder

def onehot(protocol, n=3):
    "A pickled dict as the field's repositories share it."
    box = np.empty((), object)
    box[()] = {i: np.eye(3, dtype=np.float32)[k % 3] for k, i in enumerate("abc" if n == 3 else map(str, range(n)))}
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=()))
    pickle.dump(box, f, protocol=protocol)
    return f.getvalue()

YAML = b"""name: street
classes:
- {name: van, prompt: van delivery truck}
- traffic sign
- name: helmet
background: [road, sky]
template: a photo of a {}.
"""
def multiplying(name, before):
    "A line that names nine copies of the name before it."
    return b"%c: &%c [%s]\n" % (name, name, b",".join([b"*%c" % before]*9))

PYTHON_YAML = [
    b"classes: 5", b"classes: {a: b}", b"classes: abc", b"classes: [[a]]", b"classes: [{name: [a]}]",
    b"classes: [a]\nbackground: sky", b"classes: [a]\nbackground: 3", b"classes: [a]\nbackground: [1]",
    b"classes: [a]\ntemplate: 7", b"classes: [a]\ntemplate: '{} {x}'", b"classes: [a]\ntemplate: '{} {'",
    b"classes: [a]\nname: [x]", b"5: a\nb: c", b"- a", b"a", b"", b"\xff", b"{"*3000, b"["*100_000,
    b"classes: [a", b"classes: &a [*a]",
    b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(multiplying(98 + k, 97 + k) for k in range(20)),
    b"classes: !!python/object/apply:os.system [true]", b"classes:\n" + b"- x\n"*3000,
    b"classes: [" + b"a,"*3 + b"]"]
JSON = [
    b"["*200_000, b'{"a":'*100_000, b'{"a": ["cat"], "a": ["dog"]}', b"9"*100_000, b'{"a": [["cat"]]}',
    b'{"a": [{"x": 1}]}', b'{"a": [1e999]}', b'{"\\ud800": ["cat"]}', b'{"a": ["\\ud800"]}',
    b'{"' + b"x"*5000 + b'": ["cat"]}', b"\xff\xfe{\0}\0"]
ENTITIES = b"".join(b"<!ENTITY x%d '%s'>" % (k + 1, b"&x%d;" % k*10) for k in range(9))
ONE_NAME = b"<annotation><object><name>&x9;</name></object></annotation>"
BOMB = b"<!DOCTYPE a [<!ENTITY x0 'cat'>" + ENTITIES + b"]>" + ONE_NAME
XML = [
    BOMB, b"<a>"*200_000,
    b"<annotation><object><name/></object></annotation>",
    b"<?xml version='1.0' encoding='nonsense'?><annotation/>",
    b"<?xml version='1.0' encoding='utf-32'?><annotation/>",
    b"<?xml version='1.0' encoding='hex'?><annotation/>",
    b"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&x;</name></object></annotation>",
    "<annotation><object><name>cat</name></object></annotation>".encode("utf-16")]
TABLES = {
    "tags.csv": b'file,tags\na.jpg,cat\n"b, c.jpg","cat;dog"\nd.png,\n',
    "semicolons.csv": b'"a, b.jpg";cat;dog\nc.jpg;dog\n',
    "hot.csv": b"image_id,cat,dog,split\na.jpg,1,0,train\nb.jpg,1,1,val\n",
    "one.csv": b"filename,defect\na.jpg,1\nb.jpg,0\n"}
CSV = [
    b"sep=;\n", b"sep=;\nfile;tags\na;b", b"\n"*1000, b'"', b'""', b",", b";", b"\t", b"0,1", b"file",
    b"file,tags", b"file,file\n1,0", b",,\n1,1,0", b"cat,dog\n1,0", b"file,cat\n1,1\n0,0",
    b"file,cat,cat\na,1,0", b"a,b\n" + b"1,0\n"*3000, "a.jpg,cat".encode("utf-16-le"), b'"' + b"x"*200_000,
    b"," * 100_000,
    b"file," + b"c,"*5000 + b"d\na," + b"1,"*5000 + b"0",
    (b'"a",'*300 + b"\n")*30]
FILE_NAMES = [
    "a", "a.jpg", "a.jfif", ".jpg", "a.", "a..jpg", "a b.jpg", "a\nb.jpg", "a\x1b[31m.jpg", "\udcff.jpg",
    "a\\b.jpg", "caf\u00e9.jpg", "cafe\u0301.jpg", "x"*250 + ".jpg", "a.HEIC", "Thumbs.db", "._a.jpg",
    "-a.jpg", "CON.jpg", "a.123", "%s.jpg", "{}.jpg", "sound.png"]
LISTS = [
    b"a\x0cb", "a\u2028b".encode(), b"a\0b", b"\xef\xbb\xbfa\n", b"x"*5000, ("ä"*300).encode(), b"a\n"*100_000,
    b"a b c", b"a.jpg\n", b"./a", b"a\r\nb"]
PICTURES = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n{} loop\n",
    b"P6 40 30 255\n", b"P6 99999 99999 255\n" + b"x"*99, b"%PDF-1.4",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>"]

# ---- the readers, and what a result has to be

def picture(path):
    img = read_image(path)
    with Image.open(path) as im:
        upright = im.size
        try:
            upright = ImageOps.exif_transpose(im).size
        except Exception:
            pass  # EXIF that cannot be read turns nothing
    assert img.dtype == np.uint8 and img.shape == (*upright[::-1], 3), f"{img.shape} for {upright}"

def mask(path):
    ids = read_mask(path, 4)
    assert ids.dtype == np.uint8 and ids.ndim == 2 and set(np.unique(ids)) <= {0, 1, 2, 3, 255}

class Said(logging.Handler):
    "Collects what is logged."
    def __init__(self):
        super().__init__()
        self.lines = []
    def emit(self, record): self.lines.append(record.getMessage())

def folder(source, listed=("a", "b", "c")):
    "Opens the folder of a file of tags; every listed picture has tags, or is named as left out."
    def read(path):
        root = next(p for p in path.parents if (p/"JPEGImages").is_dir())
        said = Said()
        logging.getLogger("weclip.data.voc").addHandler(said)
        try:
            data = open_data(root, "train", NAMES, source)
        finally:
            logging.getLogger("weclip.data.voc").removeHandler(said)
        left = [i for line in said.lines if "left out: " in line for i in line.split("left out: ")[1].split(", ")]
        assert sorted([*left, *data.ids]) == sorted(listed or data.ids), f"{listed} are {data.ids} and, said so, {left}"
        for t in data.tags.values():
            assert t and t == sorted(set(t)) and set(t) <= {0, 1, 2}
    return read

def tags_json(path):
    folder("json")(path)
    tags = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=lambda kv: kv)
    assert len({k for k, _ in tags}) == len(tags), "of an ID named twice, one entry was dropped"

def classes(path):
    c = get_classes(path)
    texts = c.name, c.template, *c.names, *c.prompts, *c.background
    assert all(isinstance(w, str) and w for w in texts)
    assert len(c.fg_texts) == c.n_classes - 1 and len(c.bg_texts) == len(c.background)

def table(path):
    for name, tags in rows_csv(path):
        assert name and all(isinstance(t, str) and t for t in tags)

def own_folder(path):
    "A folder of files of any name and content, beside links."
    try:
        found = find_images(path.parents[1], "folders")
    except (ValueError, FileNotFoundError) as e:
        raise type(e)(f"{path}: {e}") from e  # it speaks of the folder
    "".join(findings(found)).encode()
    assert found.images and set(found.images) == set(found.tags)

def hot(path):
    for i, t in read_onehot(path, NAMES).items():
        assert isinstance(i, str) and set(t) <= {0, 1, 2}

def models(tmp):
    "Sound checkpoint files: name -> (bytes, reader)."
    model = bench.inputs(quick=True, size=32)[0]
    opt = optimiser(model, model.cfg)
    for p in model.decoder.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    clip = {f"visual.{k}": v for k, v in model.clip.visual.state_dict().items()}
    def without_reading(backbone, cfg, classes, arch, decoder=None):
        return weclip.method.model.WeCLIP(model.clip, model.text_fg, model.text_bg, classes, cfg, decoder)
    weclip.engine.weights.build = without_reading  # no file of a real backbone
    save_model(tmp/"m.safetensors", model, "tiny")
    save_checkpoint(tmp/"c.pt", model, opt, 3, [[0, 1., 1., 1., .1]])
    torch.save({"state_dict": model.decoder.state_dict()}, tmp/"d.pth")
    torch.save(model.decoder.state_dict(), tmp/"old.pth", _use_new_zipfile_serialization=False)
    torch.save(clip, tmp/"clip.pt")
    save_file({k: v.contiguous() for k, v in clip.items()}, tmp/"clip.safetensors")
    warnings.simplefilter("ignore")
    def run(path):
        i, history = load_checkpoint(path, model, optimiser(model, model.cfg))
        assert isinstance(i, int) and 0 <= i <= model.cfg.iters and isinstance(history, list)
    def tensors(path):
        assert all(isinstance(name, str) for name in read_weights(path))
    foreign = dict.fromkeys(("d.pth", "old.pth", "clip.pt", "clip.safetensors"), tensors)
    return {"m.safetensors": load_model, "c.pt": run, **foreign}

# ---- running them

# a list may also be right and the folder wrong
ELSEWHERE = re.compile(r"\S*/JPEGImages: no picture for \d|train: 3 of 3 pictures have no tag: a, b, c")

class Slow(BaseException):
    "An input took too long."

def attempt(read, path):
    "(outcome, message) of a reader: ok, refused, or what is wrong."
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        read(path)
        return "ok", ""
    except (ValueError, FileNotFoundError) as e:
        is_named = str(e).startswith(str(path)) or ELSEWHERE.match(str(e))
        return ("refused", str(e)[:200]) if is_named else ("nameless", f"{type(e).__name__}: {e}"[:300])
    except AssertionError as e:
        return "wrong", str(e)[:300]
    except Slow:
        return "slow", ""
    except BaseException as e:
        return "other", f"{type(e).__module__}.{type(e).__name__}: {e}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

def inputs(tmp):
    "(kind, reader, path, mutations, bytes) of every input; the path is where it has to lie."
    def binary(kind, read, path, b, how, n):
        yield from ((kind, read, path, *m) for m in [("", b), *mutants(b, how, n, path.name)])
    for name, b in pictures().items():
        yield from binary("picture", picture, tmp/name, b, (*BYTES, size, size), 60)
    for k, b in enumerate(PICTURES):
        yield "picture", picture, tmp/f"made{k}.jpg", f"made {k}", b
    ids = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    save_mask(tmp/"mask.png", ids)
    Image.fromarray(ids).save(tmp/"grey.png")
    Image.fromarray(voc_palette()[ids]).quantize(256, dither=0).save(tmp/"sorted.png")
    for p in (tmp/"mask.png", tmp/"grey.png", tmp/"sorted.png"):
        yield from binary("mask", mask, p, p.read_bytes(), (*BYTES, size, size), 90)
    def text(kind, read, path, made, n):
        b = path.read_bytes()
        by_hand = [(f"made {k}", x) for k, x in enumerate(made)]
        yield from ((kind, read, path, *m) for m in [("", b), *by_hand, *mutants(b, TEXT, n, kind)])
        path.write_bytes(b)
    root = make_root(tmp/"voc")
    lists = root/"ImageSets"/"Segmentation"
    yield from text("tags.json", tags_json, lists/"tags.json", JSON, 250)
    yield from text("split", folder("json", ()), lists/"train.txt", LISTS, 150)
    yield from text("annotation", folder("xml"), root/"Annotations"/"b.xml", XML, 200)
    for protocol in (2, 4):
        for n in (3, 300):
            yield from binary("onehot", hot, tmp/f"hot{protocol}_{n}.npy", onehot(protocol, n), (*BYTES, word), 90)
    for name, b in TABLES.items():
        (tmp/name).write_bytes(b)
        yield from text("csv", table, tmp/name, CSV if name == "tags.csv" else (), 100)
    sound = pictures()["base.jpg"]
    for k, name in enumerate(FILE_NAMES):
        here = tmp/"own"/str(k)/"p"/"cat"
        here.mkdir(parents=True)
        (here/"sound.jpg").write_bytes(sound)
        for link, to in (("loop", here.parent), ("self", here/"self"), ("gone.jpg", here/"nowhere")):
            (here/link).symlink_to(to)
        yield "own", own_folder, here/name, "" if k < 3 else f"name {k}", sound
        seed = name.encode("utf-8", "replace").decode()
        yield from (("own", own_folder, here/name, *m) for m in mutants(sound, BYTES, 4, seed))
    (tmp/"street.yaml").write_bytes(YAML)
    yield from text("classes", classes, tmp/"street.yaml", PYTHON_YAML, 250)
    for name, read in models(tmp).items():
        b = (tmp/name).read_bytes()
        heads = [(f"head {m}", x + b[3000:]) for m, x in mutants(b[:3000], (*BYTES, swap, word), 40, name)]
        yield from (("checkpoint", read, tmp/name, *m) for m in [("", b), *mutants(b, BYTES, 40, name), *heads])

def arm():
    def slow(*_): raise Slow
    signal.signal(signal.SIGVTALRM, slow)

def main(tmp):
    arm()
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    logging.disable(logging.NOTSET)
    logging.getLogger("weclip.data.voc").propagate = False
    with open(tmp/"log.jsonl", "w") as log:
        for kind, read, path, what, data in inputs(tmp):
            path.write_bytes(data)
            log.write(json.dumps(dict(kind=kind, file=path.name, what=what)) + "\n")
            log.flush()
            start = resource.getrusage(resource.RUSAGE_SELF)
            outcome, message = attempt(read, path)
            end = resource.getrusage(resource.RUSAGE_SELF)
            seconds = round(end.ru_utime - start.ru_utime, 2)
            mib = (end.ru_maxrss - start.ru_maxrss)//1024
            told = dict(outcome=outcome, message=message, seconds=seconds, mib=mib)
            log.write(json.dumps(told) + "\n")
            log.flush()
            if outcome not in ("ok", "refused"):
                (tmp/"bad").mkdir(exist_ok=True)
                (tmp/"bad"/f"{path.name} {what}").write_bytes(data)

if __name__ == "__main__":
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1])*1024
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB*2**30,)*2)
    resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
    main(Path(sys.argv[1]))
