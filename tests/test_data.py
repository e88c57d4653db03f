"""Bad input, and real photographs, for the readers of pictures, masks and folders.

A case goes through all inputs of a kind and names every one that is wrong.
"""
import ast
import io
import json
import logging
import os
import pickle
import re
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path
from reprlib import repr as short

import numpy as np
import pytest
import torch
from PIL import Image

from weclip.method.classes import IGNORE_INDEX, VOC, voc_palette
from weclip.data import pictures
from weclip.data.pictures import NORMS, preprocess, read_image, read_mask, save_mask
from weclip.data.voc import (
    NoObject, Stream, batches, check_files, check_objects, collate, open_data, read_onehot, read_tags)

NAMES = ("cat", "dog", "horse")
TAGS = {"a": ["cat"], "b": ["dog"], "c": ["dog", "cat"], "d": ["horse"]}
ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("WECLIP_DATA", ROOT.parent/"shared"/"data"))
needs_data = pytest.mark.skipif(
    not (DATA/"VOCdevkit").is_dir(), reason=f"no VOC photographs at {DATA} (set WECLIP_DATA)")
UNDO = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF flag -> transpose of Pillow that it reverses

def make_folder(root):
    "Four pictures of different sizes, tagged cat, dog, cat + dog and horse."
    rng = np.random.default_rng(0)
    lists(root).mkdir(parents=True)
    (root/"JPEGImages").mkdir()
    for i, (k, tags) in enumerate(TAGS.items()):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(root/"JPEGImages"/f"{k}.jpg")
        ids = np.zeros((20 + i, 30), np.uint8)
        ids[-1] = IGNORE_INDEX
        for name in tags:
            first = 5*NAMES.index(name)
            ids[first:first + 4] = NAMES.index(name) + 1
        save_mask(root/"SegmentationClassAug"/f"{k}.png", ids)
    (lists(root)/"train.txt").write_text("a\nb\nc\nd\n")
    retag(root, **TAGS)
    return root

@pytest.fixture
def root(tmp_path): return make_folder(tmp_path/"VOC2012")

@pytest.fixture(autouse=True)
def forget_warnings(monkeypatch):
    "Each file is warned of once a process; a test starts afresh."
    monkeypatch.setattr(pictures, "_WARNED", {})

def lists(root): return root/"ImageSets"/"Segmentation"

def retag(root, **tags): (lists(root)/"tags.json").write_text(json.dumps(tags))

def refusal(f, *args, **kw):
    "The error that a call ends in, as 'ValueError: its text'; '' if it ends well."
    try:
        f(*args, **kw)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""

def other_than(expected, f, *args, **kw):
    "What a call ended in, in a list, unless it is the error expected: a pattern such as 'ValueError: .*its text'."
    found = refusal(f, *args, **kw)
    return [] if re.match(expected, found) else [(found or "no error", expected, short([args, kw]))]

# ---- pictures

MODES = [  # mode, colour, file, what is read
    ("L", 90, "x.png", (90, 90, 90)),
    ("1", 1, "x.png", (255, 255, 255)),
    ("L", 90, "x.jpg", (90, 90, 90)),
    ("LA", (90, 0), "x.png", (255, 255, 255)),
    ("RGBA", (255, 0, 0, 255), "x.png", (255, 0, 0)),
    ("RGBA", (255, 0, 0, 0), "x.png", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 128), "x.webp", (127, 127, 127)),
    ("CMYK", (0, 255, 255, 0), "x.jpg", (255, 0, 0)),
    ("CMYK", (0, 0, 0, 255), "x.tif", (0, 0, 0)),
    ("I;16", 40000, "x.png", (156, 156, 156)),
    ("I;16", 65535, "x.tif", (255, 255, 255)),
    ("YCbCr", (90, 128, 128), "x.jpg", (90, 90, 90))]

def test_modes(tmp_path):
    odd = []
    for mode, colour, name, want in MODES:
        Image.new(mode, (8, 6), colour).save(tmp_path/name)
        img = read_image(tmp_path/name)
        is_right = img.shape == (6, 8, 3) and img.dtype == np.uint8 and np.abs(img.astype(int) - want).max() <= 2
        if not is_right:
            odd.append((mode, colour, name, img[0, 0].tolist()))
    assert not odd

def test_palette_with_transparency(tmp_path):
    im = Image.new("P", (8, 6), 1)
    im.putpalette([0, 0, 0, 10, 200, 30])
    im.paste(0, (0, 0, 4, 6))
    im.save(tmp_path/"x.png", transparency=0)
    img = read_image(tmp_path/"x.png")
    assert tuple(img[0, 0]) == (255, 255, 255) and tuple(img[0, 7]) == (10, 200, 30)

def turned(im, flag):
    "A picture as it is stored under an EXIF flag, and the EXIF."
    exif = Image.Exif()
    exif[0x0112] = flag
    return (im if UNDO[flag] is None else im.transpose(UNDO[flag])), exif

def test_exif_rotation_is_obeyed(tmp_path):
    upright = Image.new("RGB", (16, 8))
    upright.paste((255, 255, 255), (0, 0, 8, 4))  # light corner top left
    odd = []
    for flag in UNDO:
        stored, exif = turned(upright, flag)
        stored.save(tmp_path/"x.png", exif=exif)
        if not np.array_equal(read_image(tmp_path/"x.png"), np.asarray(upright)):
            odd.append(flag)
    assert not odd

def test_unreadable_and_truncated_pictures(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n{} loop\n"
    bad = {"empty.jpg": b"", "text.png": b"no picture", "zeros.jpg": bytes(500), "program.jpg": postscript}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("jpg", "png"):
        noise.save(tmp_path/f"x.{kind}")
        data = (tmp_path/f"x.{kind}").read_bytes()
        bad |= {f"{keep}.{kind}": data[:int(keep*len(data))] for keep in (.2, .5, .9)}
    odd = []
    for name, data in bad.items():
        (tmp_path/name).write_bytes(data)
        odd += other_than(f"ValueError: .*{name}.*expected.*again", read_image, tmp_path/name)
    odd += other_than("ValueError: .*a program", read_image, tmp_path/"program.jpg")
    assert not odd

def test_missing_and_flat_pictures(tmp_path):
    Image.new("RGB", (40, 1)).save(tmp_path/"flat.png")
    assert read_image(tmp_path/"flat.png").shape == (1, 40, 3)
    odd = other_than("FileNotFoundError: .*none.jpg", read_image, tmp_path/"none.jpg")
    odd += other_than("FileNotFoundError: .*expected a picture", read_image, tmp_path)
    assert not odd

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_large(tmp_path, monkeypatch):
    Image.new("RGB", (12, 12)).save(tmp_path/"huge.png")
    save_mask(tmp_path/"m.png", np.zeros((12, 12), np.uint8))
    odd = []
    for limit in (100, 10):  # Pillow only warns up to twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        odd += other_than("ValueError: .*huge.png.*shrink", read_image, tmp_path/"huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    odd += other_than("ValueError: .*m.png: 12x12 pixels.*shrink", read_mask, tmp_path/"m.png", 3)
    assert not odd

def test_deep_pixels_without_range(tmp_path):
    Image.fromarray(np.full((4, 4), .5, np.float32)).save(tmp_path/"f.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path/"i.tif")
    odd = []
    for name in ("f.tif", "i.tif"):
        odd += other_than(f"ValueError: .*{name}.*8 bits", read_image, tmp_path/name)
    assert not odd

def test_preprocess():
    "Refusals; a batch and a mirrored view."
    odd = []
    bad = [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32),
           torch.zeros(3, 4, 4)]
    for img in bad:
        odd += other_than("ValueError: .*expected .*uint8, got", preprocess, img)
    assert not odd
    img = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    x = preprocess(img)
    assert torch.equal(preprocess(torch.tensor(img[1])), x[1])
    assert torch.equal(preprocess(img[0][:, ::-1]), x[0].flip(-1))

def test_every_byte_is_normalised_to_the_last_bit():
    "As NumPy divides single precision, channels last in memory: what a GPU is to compute, too."
    every = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    photo = np.random.default_rng(0).integers(0, 256, (2, 375, 500, 3), dtype=np.uint8)
    wrong = []
    for norm, rows in NORMS.items():
        mean, std = np.array(rows, np.float32)
        for img in (every[None], photo, photo[:, :7, ::2]):
            x = preprocess(img, norm, "cpu")
            expected = (img.astype(np.float32)/np.float32(255) - mean)/std
            as_read = x.movedim(-3, -1)
            if not np.array_equal(as_read.numpy(), expected) or not as_read.is_contiguous():
                wrong.append((norm, img.shape))
    assert not wrong

# ---- more bits than eight

def chunk(name, data):
    checksum = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)

def png(samples, *chunks):
    "A PNG of 16-bit samples, (H, W) grey or (H, W, 2..4), with further chunks (name, data) before the pixels."
    h, w = samples.shape[:2]
    colour = 0 if samples.ndim == 2 else {2: 4, 3: 2, 4: 6}[samples.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    head = struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)
    parts = [(b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

def ramp(bits, channels=0):
    "64 x 64 different pixels from 0 to the largest of so many bits."
    grey = np.linspace(0, 2**bits - 1, 64*64).round().astype(np.uint16).reshape(64, 64)
    return np.stack([grey]*channels, -1) if channels else grey

def test_few_bits_in_a_deep_file(tmp_path, caplog):
    "A photograph of 10, 12 or 14 bits in a file of 16 or 32 was divided by 256 and came out almost black."
    odd = []
    for kind in ("png", "tif", "int32.tif", "rgb.png"):
        for bits in (8, 10, 12, 14):
            path = tmp_path/f"{bits}.{kind}"
            grey = ramp(bits)
            if kind == "rgb.png":
                path.write_bytes(png(ramp(bits, 3)))
            else:
                Image.fromarray(grey.astype(np.int32) if "32" in kind else grey).save(path)
            caplog.clear()
            img = read_image(path)
            read_image(path)  # of a file, the warning comes once
            is_right = np.array_equal(img, np.stack([grey >> bits - 8]*3, -1)) and img.max() == 255
            warning = f"{path.name}: its largest value is {2**bits - 1} of 65535"
            if not is_right or len(caplog.records) != 1 or warning not in caplog.text:
                odd.append((path.name, int(img.max()), caplog.messages))
    assert not odd

def test_sixteen_bits_are_what_they_were(tmp_path, caplog):
    odd = []
    for deep in (ramp(16), np.full((4, 4), 40000, np.uint16)):
        Image.fromarray(deep).save(tmp_path/"x.png")
        Image.fromarray(deep).save(tmp_path/"x.tif")
        (tmp_path/"rgb.png").write_bytes(png(np.stack([deep]*3, -1)))
        for name in ("x.png", "x.tif", "rgb.png"):
            if not np.array_equal(read_image(tmp_path/name)[..., 0], deep//256):
                odd.append((name, deep.max()))
    assert not odd and not caplog.records

def test_a_black_photograph_stays_black(tmp_path, caplog):
    "Noise of a few units in a true 16-bit photograph must not be stretched to a picture."
    noise = np.random.default_rng(0).integers(0, 100, (20, 20)).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path/"noise.png")
    Image.fromarray(0*noise).save(tmp_path/"black.png")
    (tmp_path/"rgb.png").write_bytes(png(np.stack([noise]*3, -1)))
    assert not [name for name in ("noise.png", "black.png", "rgb.png") if read_image(tmp_path/name).any()]
    assert "noise.png: its largest value is 99 of 65535: taken for a black picture" in caplog.text
    assert "black.png" not in caplog.text

def test_bits_that_the_file_states(tmp_path, caplog):
    "Half-dark pictures of 12 bits: what the file states counts, not the largest value, 1000, which needs only 10 bits."
    dark = np.minimum(ramp(12), 1000)
    (tmp_path/"sbit.png").write_bytes(png(dark, (b"sBIT", b"\x0c")))
    (tmp_path/"sbit3.png").write_bytes(png(np.stack([dark]*3, -1), (b"sBIT", b"\x0c"*3)))
    Image.fromarray(dark).save(tmp_path/"said.tif", tiffinfo={281: 4095})
    Image.fromarray(dark.astype(np.int32)).save(tmp_path/"said32.tif", tiffinfo={341: 4095})
    (tmp_path/"said.pgm").write_bytes(b"P5 64 64 4095\n" + dark.astype(">u2").tobytes())
    stretched = dark//16*16  # as the format asks for: 1000 is 992/65535
    (tmp_path/"stretched.png").write_bytes(png(stretched, (b"sBIT", b"\x0c")))
    want = dict.fromkeys(("sbit.png", "sbit3.png", "said.tif", "said32.tif", "said.pgm"), 1000//16)
    want["stretched.png"] = 992//256
    assert {name: read_image(tmp_path/name).max() for name in want} == want and not caplog.records

def test_tags_that_say_nothing_are_no_reason_to_refuse(tmp_path, caplog):
    Image.fromarray(ramp(12)).save(tmp_path/"x.tif", tiffinfo={281: 65535})
    assert read_image(tmp_path/"x.tif").max() == 255 and "4095" in caplog.text
    (tmp_path/"cut.png").write_bytes(png(ramp(12), (b"sBIT", b"")))
    assert read_image(tmp_path/"cut.png").max() == 255

def test_pixels_packed_in_twelve_or_in_five_bits(tmp_path, caplog):
    "BitsPerSample 12: two pixels, 4095 and 2048, in three bytes. The five bits of a bitmap are not deep."
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 3)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", k, 3, 1, v) for k, v in tags) + bytes(4)
    (tmp_path/"x.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + ifd + b"\xff\xf8\x00")
    assert len(ifd) == 114 and read_image(tmp_path/"x.tif")[0, :, 0].tolist() == [255, 128] and not caplog.records
    fields = 66 + 32, 0, 0, 66, 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F
    head = struct.pack("<2sIHHI IiiHHIIiiII 3I", b"BM", *fields)
    (tmp_path/"x.bmp").write_bytes(head + struct.pack("<H", 2 << 11)*16)  # red 2 of 31
    assert tuple(read_image(tmp_path/"x.bmp")[0, 0]) == (16, 0, 0)

def test_deep_colours_with_transparency(tmp_path):
    "Opaque, and of 12 bits as its colours: alpha must be stretched, too, or all would be white."
    deep = ramp(12, 4)
    deep[..., 3] = 4095
    for name, x in (("rgba.png", deep), ("la.png", deep[..., 2:])):
        (tmp_path/name).write_bytes(png(x))
    np.testing.assert_array_equal(read_image(tmp_path/"rgba.png")[..., 0], deep[..., 0] >> 4)
    assert read_image(tmp_path/"la.png").max() == 255 and read_image(tmp_path/"la.png").min() == 0

# ---- EXIF

BROKEN_EXIF = [
    b"\0\x08\0\x02\x01\x12\0\x03",
    b"Exif\0\0junkjunkjunk",
    b"MM\0*\0\0\0\x08\0\x05\x01",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd\0\0\0\0",
    b"x"]

@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_pixels_count_where_exif_is_broken(tmp_path, caplog):
    "A sound picture was refused for an eXIf chunk that cannot be read."
    files = [(kind, exif) for kind in ("png", "jpg", "webp") for exif in BROKEN_EXIF]
    files.append(("tif", BROKEN_EXIF[2]))  # Pillow writes no other TIFF
    odd = []
    for i, (kind, exif) in enumerate(files):
        path = tmp_path/f"{i}.{kind}"
        Image.new("RGB", (20, 10), "red").save(path, exif=exif)
        if read_image(path).shape != (10, 20, 3):
            odd.append((kind, exif))
    assert not odd and "0.png: its EXIF cannot be read" in caplog.text

def turned_set(root, flag, upright_masks):
    "A folder with pictures stored as `flag` says, and masks drawn on the upright pictures or on the stored ones."
    make_folder(root)
    for path in sorted((root/"JPEGImages").iterdir()):
        with Image.open(path) as im:
            im.load()
        stored, exif = turned(im, flag)
        stored.save(path, exif=exif)
        mask = root/"SegmentationClassAug"/f"{path.stem}.png"
        if not upright_masks:
            save_mask(mask, np.asarray(Image.fromarray(read_mask(mask, 4)).transpose(UNDO[flag])))
    return open_data(root, "train", NAMES, with_masks=True)

def test_a_mask_without_the_turn_says_exif(tmp_path):
    "The error said that the sizes differ, not why."
    odd = []
    for flag in (5, 6, 7, 8):
        data = turned_set(tmp_path/str(flag), flag, False)
        expected = "ValueError: .*a.png is 20x30 but .*a.jpg is 30x20; .*as stored, before the turn that its EXIF"
        odd += other_than(expected, data.read, "a")
    assert not odd

def test_a_turn_that_sizes_do_not_show_is_warned_of_once(tmp_path, caplog):
    "Masks drawn on the picture as stored were scored upside down without a word."
    odd = []
    for flag in (2, 3, 4):
        caplog.clear()
        data = turned_set(tmp_path/str(flag), flag, False)
        for i in data.ids:
            data.read(i)
        warning = f"a.jpg is turned as its EXIF asks for (orientation {flag})"
        if len(caplog.records) != 1 or warning not in caplog.text:
            odd.append((flag, caplog.messages))
    assert not odd

def test_masks_that_fit_upright_alone_are_read_in_silence(tmp_path, caplog):
    odd = []
    for flag in (1, 5, 6, 7, 8):
        data = turned_set(tmp_path/str(flag), flag, True)
        check_files(data)
        odd += [(flag, i) for i in data.ids if data.read(i)[0].shape[:2] != data.read(i)[1].shape]
    assert not odd and not caplog.records

def test_a_mask_is_turned_by_its_own_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[1, 2, 3]], np.uint8)).save(tmp_path/"m.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 4), [[1], [2], [3]])

# ---- masks

def test_masks_keep_every_id(tmp_path):
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    save_mask(tmp_path/"new"/"m.png", ids)
    assert Image.open(tmp_path/"new"/"m.png").mode == "P"
    np.testing.assert_array_equal(read_mask(tmp_path/"new"/"m.png", 255), ids)
    assert [p.name for p in (tmp_path/"new").iterdir()] == ["m.png"]  # nothing half-written is left
    Image.fromarray(ids).save(tmp_path/"grey.png")
    np.testing.assert_array_equal(read_mask(tmp_path/"grey.png", 255), ids)

def test_failed_save_leaves_the_old_mask(tmp_path, monkeypatch):
    path = tmp_path/"m.png"
    zeros = np.zeros((2, 2), np.uint8)
    save_mask(path, zeros + 1)
    with pytest.raises(ValueError, match="palette"):
        save_mask(path, zeros, np.zeros((999, 3), np.uint8))
    def stop(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="disk full"):
        save_mask(path, zeros)
    assert read_mask(path, 2).all() and len(list(tmp_path.iterdir())) == 1

def test_bad_masks(tmp_path, root):
    save_mask(tmp_path/"m.png", np.array([[0, 3], [77, 255]], np.uint8))
    Image.fromarray(voc_palette()[np.ones((4, 4), int)]).save(tmp_path/"rgb.png")
    (tmp_path/"none.png").write_bytes(b"")
    bad = {"m.png": r"ValueError: .*m.png.*values 0..2 and 255, got \[3, 77\]",
           "rgb.png": "ValueError: .*rgb.png.*mode RGB.*not their colours",
           "none.png": "ValueError: .*none.png.*a mask",
           "absent.png": "FileNotFoundError: .*absent.png.*a mask"}
    odd = []
    for name, expected in bad.items():
        odd += other_than(expected, read_mask, tmp_path/name, 3)
    save_mask(root/"SegmentationClassAug"/"b.png", np.zeros((30, 21), np.uint8))
    data = open_data(root, "train", NAMES, with_masks=True)
    odd += other_than("ValueError: .*b.png is 21x30 but .*b.jpg is 30x21", data.__getitem__, 1)
    assert not odd

# ---- colours of masks

IDS = np.zeros((30, 40), np.uint8)
IDS[5:20, 5:20] = 15
IDS[22:, :9] = 255
IDS[0, 0] = 1

def paletted(path, ids, palette, **kw):
    im = Image.fromarray(ids)
    im.putpalette(list(np.ravel(palette).tolist()))
    im.save(path, **kw)
    return path

def sorted_anew(path, ids, n=256, palette=None):
    "A mask by a program that keeps the colours and stores the palette in an order of its own."
    colours = voc_palette() if palette is None else palette
    Image.fromarray(colours[ids]).quantize(n, dither=0).save(path)
    return path

def test_colours_decide_where_the_palette_is_in_another_order(tmp_path):
    "The bytes of such a mask are others: person (15) was read as aeroplane (1)."
    few = np.where(IDS == 15, 15, 0).astype(np.uint8)
    masks = {2: few, 3: few, 4: IDS, 256: IDS}
    read = {n: read_mask(sorted_anew(tmp_path/"q.png", ids, n), 21) for n, ids in masks.items()}
    odd = [n for n, ids in masks.items() if not np.array_equal(read[n], ids)]
    for value in (0, 15):  # a mask of one colour
        mask = read_mask(sorted_anew(tmp_path/"q.png", np.full((4, 4), value)), 21)
        if (mask != value).any():
            odd.append(f"all {value}")
    assert not odd
    order = np.arange(256)  # behind the classes VOC's palette, in front two exchanged: VOC's in another order
    order[[1, 15]] = 15, 1
    path = paletted(tmp_path/"m.png", IDS, voc_palette()[order])
    np.testing.assert_array_equal(read_mask(path, 21), order[IDS])

def test_palettes_whose_bytes_are_ids(tmp_path):
    palettes = {"voc": voc_palette(), "first 21": voc_palette()[:21], "black": np.zeros((256, 3), int),
                "one colour": np.full((256, 3), 9), "grey": np.stack([np.arange(256)]*3, -1)}
    for behind in (0, 255):  # filled up with zeros, the palette made 255 the background, because its colour is black
        palettes[f"voc, then {behind}"] = np.full((256, 3), behind)
        palettes[f"voc, then {behind}"][:21] = voc_palette()[:21]
    masks = {}
    for name, palette in palettes.items():
        masks[name] = paletted(tmp_path/f"{name}.png", IDS, palette)
        masks[f"{name}, transparent"] = paletted(tmp_path/f"{name} t.png", IDS, palette, transparency=0)
    im = Image.fromarray(IDS)
    im.putpalette(np.c_[voc_palette(), np.arange(256)].astype(np.uint8).tobytes(), "RGBA")
    im.save(tmp_path/"rgba.png")
    masks["with an alpha channel"] = tmp_path/"rgba.png"
    assert not [name for name, path in masks.items() if not np.array_equal(read_mask(path, 21), IDS)]

OWN = voc_palette()
OWN[1:4] = (255, 99, 71), (1, 2, 3), (70, 130, 180)

def test_the_sets_own_colours(tmp_path):
    "As the package writes them, known or not, and sorted anew by another program."
    ids = np.array([[0, 1, 2, 3, 255]], np.uint8)
    save_mask(tmp_path/"m.png", ids, OWN)
    for palette in (None, OWN):
        np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 4, palette), ids)
    path = sorted_anew(tmp_path/"q.png", ids, palette=OWN)
    np.testing.assert_array_equal(read_mask(path, 4, OWN), ids)
    with pytest.raises(ValueError, match="q.png: expected VOC's palette, the class set's, or none"):
        read_mask(path, 4)

def test_other_colours_are_refused(tmp_path):
    "Their bytes may be ids or not; road, of Cityscapes, has the colour of COCO's class 21."
    city = [(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153)]
    ade = [(120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 3))
    expected = (r"ValueError: .*m.png: (expected VOC's palette.*byte \d+ is of colour|a palette of greys)"
                ".*save them without colours: Image.fromarray")
    odd = []
    for palette in (city, ade, noise):
        for ids in (np.array([[0, 1, 2, 3]], np.uint8), np.zeros((1, 4), np.uint8)):
            path = paletted(tmp_path/"m.png", ids, palette)
            for n_classes in (4, 21, 81):
                odd += other_than(expected, read_mask, path, n_classes)
    assert not odd

def test_grey_palettes_in_another_order(tmp_path):
    "A grey mask of ids, saved anew with a palette: byte 0 is grey 15."
    greys = np.stack([np.arange(256, dtype=np.uint8)]*3, -1)
    path = sorted_anew(tmp_path/"q.png", IDS, palette=greys)
    odd = other_than("ValueError: .*q.png: a palette of greys.*without colours", read_mask, path, 21)
    path = paletted(tmp_path/"m.png", np.array([[0, 1, 2]], np.uint8), [(7, 7, 7), (0, 0, 0), (255, 255, 255)])
    odd += other_than("ValueError: .*greys", read_mask, path, 8)  # both 0, 1, 2 and 7, 0, 255 are ids
    assert not odd
    only_greys = [(0, 0, 0)]*8 + [(3, 3, 3), (0, 0, 0)]
    path = paletted(tmp_path/"m.png", np.array([[9, 8]], np.uint8), only_greys)
    np.testing.assert_array_equal(read_mask(path, 4), [[0, 3]])
    black_white = [(0, 0, 0), (255, 255, 255)]
    for shown in (black_white, [(0, 0, 0), (127, 127, 127), (255, 255, 255)]):  # to look at: the bytes are the ids
        path = paletted(tmp_path/"m.png", np.array([[0, 1]], np.uint8), shown)
        np.testing.assert_array_equal(read_mask(path, 3), [[0, 1]])

def test_few_bits_of_grey_are_refused(tmp_path):
    "Pillow stretches 2 and 4 bits: id 1 would be 85 or 17."
    head = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0\x01\x01")), (b"IEND", b"")]
    (tmp_path/"m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    with pytest.raises(ValueError, match="m.png: expected a palette or 8-bit grey PNG.*L;4"):
        read_mask(tmp_path/"m.png", 81)

def test_tags_and_sets_know_their_colours(root):
    "The tags from masks, and the masks of a set, go by the class set's colours."
    for path in (root/"SegmentationClassAug").iterdir():
        sorted_anew(path, read_mask(path, 4), palette=OWN)
    data = open_data(root, "train", NAMES, "masks", with_masks=True, palette=OWN)
    assert data.tags == {"a": [0], "b": [1], "c": [0, 1], "d": [2]}
    assert set(np.unique(data.read("c")[1])) == {0, 1, 2, 255}
    with pytest.raises(ValueError, match="a.png: expected VOC's palette"):
        open_data(root, "train", NAMES, "masks")

# ---- masks without objects, files that break

def test_masks_without_an_object(root):
    "Objects marked 255 alone are ignored everywhere: such a set would score itself, and teach background."
    masks = root/"SegmentationClassAug"
    shapes = {path: read_mask(path, 4).shape for path in masks.iterdir()}
    data = open_data(root, "train", NAMES, with_masks=True)
    odd = []
    for values in ((0, 255), (0,), (255,)):
        for path, shape in shapes.items():
            save_mask(path, np.resize(np.array(values, np.uint8), shape))
        odd += other_than("NoObject: no object class occurs in any of the 4 masks.*255.*ignored", check_objects, data)
        save_mask(masks/"c.png", np.full((22, 30), 2, np.uint8))
        check_objects(data)  # one will do
    assert not odd and issubclass(NoObject, ValueError)

def test_every_broken_picture_is_named_at_once(root):
    "A truncated JPEG stopped a training run when its turn came, with the traceback of a worker."
    check_files(open_data(root, "train", NAMES, with_masks=True), progress=False)
    b, d = (root/"JPEGImages"/f"{k}.jpg" for k in "bd")
    b.write_bytes(b.read_bytes()[:-40])
    d.write_bytes(b"junk")
    expected = r"^2 of 4 pictures cannot be read: b.jpg, d.jpg; .*b.jpg: expected a complete picture"
    with pytest.raises(ValueError, match=expected) as e:
        check_files(open_data(root, "train", NAMES), progress=False)
    assert "\n" not in str(e.value)
    (root/"SegmentationClassAug"/"a.png").write_bytes(b"junk")
    save_mask(root/"SegmentationClassAug"/"c.png", np.zeros((2, 2), np.uint8))
    expected = (r"^4 of 4 pictures or their masks cannot be read: a.jpg, b.jpg, c.jpg, d.jpg; "
                ".*a.png: expected a mask")
    with pytest.raises(ValueError, match=expected):
        check_files(open_data(root, "train", NAMES, with_masks=True), progress=False)

def test_an_eighth_of_a_jpeg_shows_that_it_is_cut(root):
    noise = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    large = Image.fromarray(noise).resize((480, 320))
    path = root/"JPEGImages"/"a.jpg"
    data = open_data(root, "train", NAMES)
    odd = []
    for kw in ({}, dict(progressive=True), dict(subsampling=0), dict(quality=95)):
        file = io.BytesIO()
        large.save(file, "JPEG", **kw)
        whole = file.getvalue()
        for keep in (.1, .5, .9, .99, .999):
            path.write_bytes(whole[:int(keep*len(whole))])
            fault = other_than("ValueError: 1 of 4.*a.jpg", check_files, data, progress=False)
            odd += [(kw, keep, *found) for found in fault]
        path.write_bytes(whole)
        check_files(data, progress=False)
    assert not odd

# ---- folders and lists

def test_root_may_be_above(root, tmp_path):
    for above in (".", "VOC2012"):
        assert len(open_data(tmp_path/above, "train", NAMES)) == 4, above
    assert len(open_data(str(tmp_path), "train", NAMES)) == 4
    (tmp_path/"VOCdevkit").mkdir()
    root.rename(tmp_path/"VOCdevkit"/"VOC2012")
    for above in (".", "VOCdevkit"):
        assert len(open_data(tmp_path/above, "train", NAMES)) == 4, above

def test_incomplete_layout(tmp_path):
    found = refusal(open_data, tmp_path/"none", "train", NAMES)
    assert re.match("(?s)FileNotFoundError: .*no such folder.*ROOT/JPEGImages/ID.jpg", found)
    assert "ImageSets/Segmentation/SPLIT.txt" in found
    odd = []
    for part, kw in (("SegmentationClassAug", dict(with_masks=True)), ("ImageSets", {}), ("JPEGImages", {})):
        root = make_folder(tmp_path/part)
        shutil.rmtree(root/part)
        odd += other_than("FileNotFoundError: .*expected\nROOT/JPEGImages", open_data, root, "train", NAMES, **kw)
    assert not odd

def test_masks_are_opened_only_if_asked_for_and_may_be_the_devkits(root):
    (root/"SegmentationClassAug").rename(root/"SegmentationClass")
    data = open_data(root, "train", NAMES, with_masks=True)
    assert data[0].mask.unique().tolist() == [0, 1, 255]
    shutil.rmtree(root/"SegmentationClass")
    assert open_data(root, "train", NAMES)[0].mask is None

def test_missing_files_are_named(root):
    (root/"JPEGImages"/"b.jpg").unlink()
    odd = other_than("FileNotFoundError: .*no picture for 1 of 4 listed IDs: b;", open_data, root, "train", NAMES)
    (lists(root)/"train.txt").write_text("a\n")
    (root/"SegmentationClassAug"/"a.png").unlink()
    odd += other_than("FileNotFoundError: .*no mask for 1 of 1 listed IDs: a;",
                      open_data, root, "train", NAMES, with_masks=True)
    assert not odd

def test_lists(root):
    "White space is forgiven, nothing else."
    path = lists(root)/"train.txt"
    path.write_bytes(b"\xef\xbb\xbfa \r\n\r\nb\r\n")
    assert open_data(root, "train", NAMES).ids == ["a", "b"]
    bad = {b"": "empty list", b"\n \n": "empty list", b"a\na\n": "more than once: a", b"\xff\xfe\x00a": "UTF-8"}
    odd = []
    for text, fault in bad.items():
        path.write_bytes(text)
        odd += other_than(f"ValueError: .*{fault}", open_data, root, "train", NAMES)
    assert not odd

def save_onehot(root, tags): np.save(lists(root)/"cls_labels_onehot.npy", tags, allow_pickle=True)

def test_ids_do_not_leave_the_folder(root):
    odd = []
    for bad in ("../x", "/etc/passwd", "a/b", "a\\b", "..", "C:x", "a\0"):
        retag(root, **{"a": ["cat"], bad: ["cat"]})
        save_onehot(root, {bad: np.float32([1, 0, 0])})
        (lists(root)/"train.txt").write_text("a\n")
        odd += other_than("ValueError: .*tags.json.*plain picture IDs", open_data, root, "train", NAMES)
        odd += other_than("ValueError: .*onehot.npy.*plain picture IDs", open_data, root, "train", NAMES, "onehot")
        odd += other_than("ValueError: .*split.*plain", open_data, root, bad, NAMES)
        (lists(root)/"train.txt").write_text(f"a\n{bad}\n")
        odd += other_than("ValueError: .*train.txt.*plain picture IDs", open_data, root, "train", NAMES)
    (lists(root)/"train.txt").write_text("a\n")
    odd += other_than("ValueError: .*plain picture IDs", open_data, root, "x"*5000, NAMES)
    retag(root, **{"ä"*200: ["cat"]})
    odd += other_than("ValueError: .*plain picture IDs", open_data, root, "train", NAMES)
    assert not odd

def test_own_pictures_may_be_png_and_jpeg(root):
    Image.new("RGBA", (9, 9)).save(root/"JPEGImages"/"b.png")  # b.jpg is there and goes first
    (root/"JPEGImages"/"a.jpg").rename(root/"JPEGImages"/"a.JPEG")
    files = open_data(root, "train", NAMES).images.values()
    assert [path.name for path in files] == ["a.JPEG", "b.jpg", "c.jpg", "d.jpg"]

# ---- tags

def test_sources_agree_and_are_preferred_in_order(root):
    want = {"a": [0], "b": [1], "c": [0, 1], "d": [2]}
    assert read_tags(root, list("abcd"), NAMES) == want
    assert read_tags(root, list("abcd"), NAMES, "masks") == want
    save_onehot(root, {k: np.eye(3, dtype=np.float32)[t].sum(0) for k, t in want.items()})
    (root/"Annotations").mkdir()
    for k, t in want.items():
        objects = "".join(f"<object><name>{NAMES[i]}</name><part><name>head</name></part></object>" for i in t*2)
        (root/"Annotations"/f"{k}.xml").write_text(f"<annotation>{objects}</annotation>")
    assert read_tags(root, list("abcd"), NAMES, "onehot") == read_tags(root, list("abcd"), NAMES, "xml") == want
    retag(root, a=["horse"])
    assert read_tags(root, ["a"], NAMES) == {"a": [2]}
    (lists(root)/"tags.json").unlink()
    assert read_tags(root, ["a"], NAMES) == want  # the whole one-hot file
    (lists(root)/"cls_labels_onehot.npy").unlink()
    assert read_tags(root, ["a"], NAMES) == {"a": [0]}  # one annotation
    shutil.rmtree(root/"Annotations")
    with pytest.raises(FileNotFoundError, match="no tags.*tags.json.*onehot.*Annotations"):
        read_tags(root, ["a"], NAMES)  # masks are no fallback

def test_own_source(root):
    data = open_data(root, "train", NAMES, tags_from=lambda root, ids, names: {i: [2] for i in ids[:2]})
    assert data.ids == ["a", "b"] and data[0].tags == [2]

def test_untagged_pictures_and_absent_classes_are_one_warning_each(root, caplog):
    retag(root, a=["cat"], b=[], c=["dog", "horse"])  # b is empty, d is unknown
    with caplog.at_level(logging.WARNING):
        data = open_data(root, "train", NAMES)
        assert data.ids == ["a", "c"]
        assert caplog.messages == ["train: 2 of 4 pictures have no tag and are left out: b, d"]
        caplog.clear()
        retag(root, a=["cat"], b=["cat"], c=["cat"], d=["cat"])
        open_data(root, "train", NAMES)
        assert caplog.messages == ["train: no picture is tagged dog, horse"]

def test_untagged_pictures_are_refused_where_nothing_would_be_left(root):
    retag(root, a=["cat"], b=[], c=["dog", "horse"])
    odd = other_than("ValueError: .*2 of 4 pictures have no tag: b, d", open_data, root, "train", NAMES, strict=True)
    assert len(open_data(root, "train", NAMES, tags_from=None)) == 4
    retag(root, z=["cat"])
    odd += other_than("ValueError: .*4 of 4 pictures have no tag", open_data, root, "train", NAMES)
    assert not odd

def test_unknown_tags(root):
    retag(root, a=["hrose"])
    odd = other_than("ValueError: .*tags.json: 'a': tag 'hrose' is not one of the 3 classes; nearest: horse",
                     open_data, root, "train", NAMES)
    retag(root, a=[7])
    odd += other_than("ValueError: .*tag 7 is not one", open_data, root, "train", NAMES)
    assert not odd

def test_broken_tags_json(root):
    odd = []
    for text in ("", "{", "[1, 2]", '{"a": "cat"}', '"a"'):
        (lists(root)/"tags.json").write_text(text)
        odd += other_than("ValueError: .*tags.json.*expected", open_data, root, "train", NAMES)
    (lists(root)/"tags.json").write_text('{"a": ["cat"], "b": ["dog"], "a": ["horse"]}')
    odd += other_than("ValueError: .*tags.json.*more than once: a", open_data, root, "train", NAMES)
    assert not odd

def test_broken_annotations(root):
    path = root/"Annotations"/"a.xml"
    path.parent.mkdir()
    unknown = b"<annotation><object><name>zebra</name></object></annotation>"
    broken = [b"<annotation>", b"<?xml version='1.0' encoding='hex'?><a/>",
              b"<?xml version='1.0' encoding='nonsense'?><a/>", b"<a>&x;</a>", b""]
    bad = {unknown: "a.xml: tag 'zebra'"} | dict.fromkeys(broken, "a.xml.*broken XML")
    odd = []
    for text, fault in bad.items():
        path.write_bytes(text)
        odd += other_than(f"ValueError: .*{fault}", open_data, root, "train", NAMES, "xml")
    assert not odd

# ---- the pickled tags

class Call:
    def __init__(self, f, *args):
        self.f = f
        self.args = args
    def __reduce__(self): return self.f, self.args

def write_npy(path, pickled):
    "A file of `np.save` with a pickle of any content."
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="|O", fortran_order=False, shape=()))
        file.write(pickled)
    return path

def test_onehot_of_any_protocol(tmp_path):
    tags = {"a": np.float32([1, 0, 1]), "b": np.array([0, 1, 0], ">f8"), "c": np.array([0, 0, 1], np.uint8)}
    box = np.empty((), object)
    box[()] = tags
    odd = []
    for protocol in range(5):
        path = write_npy(tmp_path/"t.npy", pickle.dumps(box, protocol))
        found = read_onehot(path, NAMES)
        if found != {"a": [0, 2], "b": [1], "c": [2]}:
            odd.append((protocol, found))
    assert not odd

def test_malicious_pickles_are_refused(root):
    mark = root/"ran"
    program = f"open({str(mark)!r}, 'w')"
    evil = [Call(os.system, f"touch {mark}"), Call(eval, program), Call(exec, program), Call(open, str(mark), "w"),
            Call(np.load, "x"), Call(os.mkdir, str(mark))]
    odd = []
    for call in evil:
        save_onehot(root, {"a": call})
        odd += other_than("ValueError: .*names .*use tags.json", open_data, root, "train", NAMES, "onehot")
        if mark.exists():
            odd.append((call.f, "ran"))
    assert not odd

def test_forged_object_arrays_are_refused(tmp_path):
    "An array of objects whose memory is given as bytes would be read as pointers by NumPy."
    forged = (b"\x80\x02cnumpy\nndarray\n0cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt"
              b"\x43\x01btR(I1\n(I3\ntcnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\n"
              b"I0\ntb\x89\x43\x18" + b"A"*24 + b"tb.")
    with pytest.raises(ValueError, match="OBJECT array from memory"):
        read_onehot(write_npy(tmp_path/"f.npy", forged), NAMES)

def test_a_short_pickle_takes_no_memory(tmp_path):
    "A place far up in the memo, and an array that only its length is there of: 64 MiB each if believed."
    bombs = {"memo": b"]r\0\0\x40\0.", "bytearray": b"\x96\0\0\0\4\0\0\0\0."}
    odd = []
    for name, bomb in bombs.items():
        path = write_npy(tmp_path/"b.npy", b"\x80\x02" + bomb)
        tracemalloc.start()
        try:
            odd += other_than("ValueError: .*b.npy.*expected a pickled dict", read_onehot, path, NAMES)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if peak >= 2**22:
            odd.append((name, peak))
    assert not odd

def test_broken_onehot(tmp_path):
    bad = {"empty": b"", "junk": b"junk"*50}
    arrays = {"numbers": np.zeros((4, 3)), "a list of dicts": np.array([{"a": 1}], object), "a list": ["a"],
              "lists": {"a": [1, 0, 0]}, "a key that is a number": {1: np.zeros(3)},
              "halves": {"a": np.float32([0, .5, 0])}}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        bad[name] = file.getvalue()
    path = tmp_path/"t.npy"
    odd = other_than("FileNotFoundError: ", read_onehot, path, NAMES)
    for name, data in bad.items():
        path.write_bytes(data)
        odd += [(name, *found) for found in other_than("ValueError: .*t.npy.*expected", read_onehot, path, NAMES)]
    np.save(path, {"a": np.zeros(20, np.float32)}, allow_pickle=True)  # another class list
    odd += other_than(r"ValueError: .*'a': expected 3 values of 0 or 1, got \(20,\)", read_onehot, path, NAMES)
    assert not odd

# ---- batches

def take(it, k): return [b for b, _ in zip(it, range(k))]

def same(a, b):
    has_same_lists = a.ids == b.ids and a.tags == b.tags
    return has_same_lists and all(torch.equal(x, y) for x, y in ((a.img, b.img), (a.lbl, b.lbl), (a.valid, b.valid)))

def test_batches_do_not_depend_on_workers_start_or_processes(root):
    data = open_data(root, "train", NAMES, with_masks=True, crop=24)
    whole = take(batches(data, 2, seed=3), 5)
    torch.manual_seed(0)
    np.random.seed(0)
    assert all(map(same, take(batches(data, 2, seed=3, workers=2), 5), whole))
    assert all(map(same, take(batches(data, 2, seed=3, start=2, workers=1), 3), whole[2:]))
    for rank in (0, 1):
        for half, b in zip(take(batches(data, 2, seed=3, rank=rank, world=2), 5), whole):
            assert half.ids == b.ids[rank::2] and torch.equal(half.img, b.img[rank::2])
    assert not all(map(same, take(batches(data, 2, seed=4), 5), whole))

def test_batches_come_in_page_locked_memory(root, monkeypatch):
    "With and without reading processes; a batch without masks, too."
    pinned = []
    def pin_memory(x, *_):
        pinned.append(tuple(x.shape))
        return x.clone()
    card = dict(is_available=lambda: True, current_accelerator=lambda: torch.device("cuda"),
                current_device_index=lambda: 0, set_device_index=lambda _: None)
    for name, answer in card.items():
        monkeypatch.setattr(torch.accelerator, name, answer)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    wrong = []
    for has_masks in (False, True):
        data = open_data(root, "train", NAMES, with_masks=has_masks, crop=24)
        for workers in (0, 1):
            pinned.clear()
            got = take(batches(data, 2, seed=3, workers=workers, pin=True), 1)
            whole = take(batches(data, 2, seed=3), 1)
            tensors = [(2, 3, 24, 24), *[(2, 24, 24)]*(1 + has_masks)]
            if pinned[:len(tensors)] != tensors or not torch.equal(got[0].img, whole[0].img):
                wrong.append((has_masks, workers, pinned))
    assert not wrong

def test_every_picture_once_an_epoch():
    stream = sum(take(Stream(7, 3, seed=5), 70), [])  # thirty epochs
    indices = [i for i, _ in stream]
    epochs = {tuple(indices[7*e:7*e + 7]) for e in range(30)}
    assert not [order for order in epochs if sorted(order) != list(range(7))]
    assert len(epochs) > 20
    assert len({key for _, key in stream}) == len(stream)

def test_crop_settings_and_padding(root):
    data = open_data(root, "train", NAMES, with_masks=True, crop=64, scale=(.5, .5), flip=False, norm=None)
    heights = {"a": 20, "b": 21, "c": 22, "d": 23}
    for b in take(batches(data, 4), 3):
        assert b.img.shape == (4, 3, 64, 64) and b.lbl.shape == b.valid.shape == (4, 64, 64)
        assert b.valid.sum((1, 2)).tolist() == [int(.5*heights[i])*15 for i in b.ids]
        assert (b.img.sum(1)[~b.valid] == 0).all() and (b.lbl[~b.valid] == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="scale"):
        open_data(root, "train", NAMES, crop=64, scale=(0, 1))[0]

def test_batches_and_streams_refuse(root):
    data = open_data(root, "train", NAMES)
    odd = other_than(r"ValueError: .*one size, got \[\(20, 30\), \(21, 30\)\]", collate, [data[0], data[1]])
    for kw in (dict(n=0, bs=4), dict(n=4, bs=0), dict(n=4, bs=3, world=2)):
        odd += other_than("ValueError: .*multiple of world", Stream, **kw)
    assert not odd

def test_bad_file_is_named_from_a_worker(root):
    (root/"JPEGImages"/"b.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match="b.jpg"):
        take(batches(open_data(root, "train", NAMES, crop=24), 4, workers=1), 1)

# ---- real photographs

@needs_data
def test_voc_photographs():
    for split, n in (("train_aug", 70), ("val", 50)):
        data = open_data(DATA, split, VOC.classes, with_masks=True, norm=None)
        assert len(data) == n
        drawn = read_tags(DATA/"VOCdevkit"/"VOC2012", data.ids, VOC.classes, "masks")
        shapes = set()
        odd = []
        for s in data:
            shapes.add(tuple(s.mask.shape))
            is_picture = s.img.dtype == torch.uint8 and s.img.shape[1:] == s.mask.shape and max(s.mask.shape) <= 500
            is_tagged = s.tags and set(drawn[s.id]) <= set(s.tags)  # tags may also name objects too difficult to draw
            if not (is_picture and is_tagged):
                odd.append(s.id)
        assert not odd and len(shapes) > 5

@needs_data
def test_voc_photographs_in_training_batches():
    data = open_data(DATA/"VOCdevkit", "train_aug", VOC.classes, crop=320)
    black = preprocess(np.zeros((1, 1, 3), np.uint8))[:, 0, 0]
    for b in take(batches(data, 4, seed=1), 4):
        assert b.img.shape == (4, 3, 320, 320) and b.img.isfinite().all() and b.valid.any((1, 2)).all()
        assert torch.equal(b.img.movedim(1, -1)[~b.valid], black.expand(int((~b.valid).sum()), 3))

@needs_data
def test_voc_masks_survive_a_round_trip(tmp_path):
    source = next((DATA/"VOCdevkit"/"VOC2012"/"SegmentationClassAug").glob("*.png"))
    ids = read_mask(source, 21)
    save_mask(tmp_path/"m.png", ids)
    np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 21), ids)

# ---- what draws

def test_matplotlib_and_tensorboard_are_loaded_where_they_draw_or_record():
    odd = []
    for module in sorted((ROOT/"weclip").rglob("*.py")):
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            is_import = isinstance(node, (ast.Import, ast.ImportFrom))
            if is_import and re.search("matplotlib|tensorboard", ast.unparse(node)):
                odd.append(f"{module.name}: {ast.unparse(node)}")
    assert not odd
