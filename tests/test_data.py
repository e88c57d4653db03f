"""Bad input, and real photographs, for the folder reader."""
import io, json, logging, os, pickle, shutil, struct, tracemalloc, zlib
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image

from weclip.method.classes import IGNORE_INDEX, voc_palette
from weclip.data.pictures import preprocess, read_image, read_mask, save_mask
from weclip.data.voc import (
    NoObject, Stream, batches, check_files, check_objects, collate, open_data, read_onehot, read_tags)

NAMES = ("cat", "dog", "horse")
VOC = ("aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep sofa train "
       "tvmonitor").split()
DATA = Path(os.environ.get("WECLIP_DATA", Path(__file__).resolve().parents[2]/"shared"/"data"))
needs_data = pytest.mark.skipif(not (DATA/"VOCdevkit").is_dir(), reason=f"no VOC photographs at {DATA} (set WECLIP_DATA)")

@pytest.fixture
def root(tmp_path):
    "Four pictures of different sizes, tagged cat, dog, cat + dog and horse."
    root = tmp_path/"VOC2012"
    rng = np.random.default_rng(0)
    lists = root/"ImageSets"/"Segmentation"
    lists.mkdir(parents=True)
    (root/"JPEGImages").mkdir()
    tags = {"a": ["cat"], "b": ["dog"], "c": ["dog", "cat"], "d": ["horse"]}
    for i, (k, t) in enumerate(tags.items()):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(root/"JPEGImages"/f"{k}.jpg")
        ids = np.zeros((20 + i, 30), np.uint8)
        ids[-1] = IGNORE_INDEX
        for n in t:
            ids[5*NAMES.index(n):5*NAMES.index(n) + 4] = NAMES.index(n) + 1
        save_mask(root/"SegmentationClassAug"/f"{k}.png", ids)
    (lists/"train.txt").write_text("a\nb\nc\nd\n")
    (lists/"tags.json").write_text(json.dumps(tags))
    return root

def lists(root): return root/"ImageSets"/"Segmentation"
def retag(root, **tags): (lists(root)/"tags.json").write_text(json.dumps(tags))

# ---- pictures

@pytest.mark.parametrize("mode, colour, name, want", [
    ("L", 90, "x.png", (90, 90, 90)), ("1", 1, "x.png", (255, 255, 255)), ("L", 90, "x.jpg", (90, 90, 90)),
    ("LA", (90, 0), "x.png", (255, 255, 255)), ("RGBA", (255, 0, 0, 255), "x.png", (255, 0, 0)), ("RGBA", (255, 0, 0, 0), "x.png", (255, 255, 255)),
    ("RGBA", (0, 0, 0, 128), "x.webp", (127, 127, 127)), ("CMYK", (0, 255, 255, 0), "x.jpg", (255, 0, 0)), ("CMYK", (0, 0, 0, 255), "x.tif", (0, 0, 0)),
    ("I;16", 40000, "x.png", (156, 156, 156)), ("I;16", 65535, "x.tif", (255, 255, 255)), ("YCbCr", (90, 128, 128), "x.jpg", (90, 90, 90))])
def test_modes(tmp_path, mode, colour, name, want):
    Image.new(mode, (8, 6), colour).save(tmp_path/name)
    img = read_image(tmp_path/name)
    assert img.shape == (6, 8, 3) and img.dtype == np.uint8
    assert np.abs(img.astype(int) - want).max() <= 2

def test_palette_with_transparency(tmp_path):
    im = Image.new("P", (8, 6), 1)
    im.putpalette([0, 0, 0, 10, 200, 30])
    im.paste(0, (0, 0, 4, 6))
    im.save(tmp_path/"x.png", transparency=0)
    img = read_image(tmp_path/"x.png")
    assert tuple(img[0, 0]) == (255, 255, 255) and tuple(img[0, 7]) == (10, 200, 30)

@pytest.mark.parametrize("flag", range(1, 9))
def test_exif_rotation_is_obeyed(tmp_path, flag):
    upright = Image.new("RGB", (16, 8))
    upright.paste((255, 255, 255), (0, 0, 8, 4))  # light corner top left
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[flag]  # PIL transpose that the flag reverses
    exif = Image.Exif()
    exif[0x0112] = flag
    (upright if undo is None else upright.transpose(undo)).save(tmp_path/"x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path/"x.png"), np.asarray(upright))

@pytest.mark.parametrize("name, data", [("empty.jpg", b""), ("text.png", b"no picture"), ("zeros.jpg", bytes(500))])
def test_unreadable_picture(tmp_path, name, data):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*expected.*again"):
        read_image(tmp_path/name)

@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
@pytest.mark.parametrize("keep", [.2, .5, .9])
def test_truncated_picture(tmp_path, name, keep):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path/name)
    data = (tmp_path/name).read_bytes()
    (tmp_path/name).write_bytes(data[:int(keep*len(data))])
    with pytest.raises(ValueError, match=f"{name}.*expected"):
        read_image(tmp_path/name)

def test_missing_and_too_small(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jpg"):
        read_image(tmp_path/"none.jpg")
    with pytest.raises(FileNotFoundError, match="expected a picture"):
        read_image(tmp_path)
    Image.new("RGB", (40, 15)).save(tmp_path/"flat.png")
    assert read_image(tmp_path/"flat.png").shape == (15, 40, 3)
    with pytest.raises(ValueError, match="flat.png.*at least 16 pixels.*40x15"):
        read_image(tmp_path/"flat.png", min_side=16)

@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [100, 10])  # PIL only warns up to twice its limit
def test_too_large(tmp_path, monkeypatch, limit):
    Image.new("RGB", (12, 12)).save(tmp_path/"huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="huge.png.*shrink"):
        read_image(tmp_path/"huge.png")

def test_deep_pixels_without_range(tmp_path):
    Image.fromarray(np.full((4, 4), .5, np.float32)).save(tmp_path/"f.tif")
    Image.fromarray(np.full((4, 4), 1 << 20, np.int32)).save(tmp_path/"i.tif")
    for name in ("f.tif", "i.tif"):
        with pytest.raises(ValueError, match=f"{name}.*8 bits"):
            read_image(tmp_path/name)

@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), torch.zeros(3, 4, 4)])
def test_preprocess_refuses(bad):
    with pytest.raises(ValueError, match="expected .*uint8, got"):
        preprocess(bad)

def test_preprocess_of_a_batch_and_of_a_mirrored_view():
    img = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    x = preprocess(img)
    torch.testing.assert_close(preprocess(torch.tensor(img[1])), x[1])
    torch.testing.assert_close(preprocess(img[0][:, ::-1]), x[0].flip(-1))

# ---- more bits than eight

def png(samples, *chunks):
    "A PNG of 16-bit samples, (H, W) grey or (H, W, 2..4), with further chunks (name, data) before the pixels."
    h, w = samples.shape[:2]
    colour = 0 if samples.ndim == 2 else {2: 4, 3: 2, 4: 6}[samples.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    parts = [(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*p) for p in parts)

def ramp(bits, channels=0):
    "64 x 64 different pixels from 0 to the largest of so many bits."
    grey = np.linspace(0, 2**bits - 1, 64*64).round().astype(np.uint16).reshape(64, 64)
    return np.stack([grey]*channels, -1) if channels else grey

@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("kind", ["png", "tif", "int32.tif", "rgb.png"])
def test_few_bits_in_a_deep_file(tmp_path, caplog, bits, kind):
    "A photograph of 10, 12 or 14 bits in a file of 16 or 32 was divided by 256 and came out almost black."
    path = tmp_path/f"{bits}.{kind}"
    deep = ramp(bits, 3 if kind == "rgb.png" else 0)
    if kind == "rgb.png":
        path.write_bytes(png(deep))
    else:
        Image.fromarray(deep.astype(np.int32) if "32" in kind else deep).save(path)
    img = read_image(path)
    np.testing.assert_array_equal(img, deep >> bits - 8 if deep.ndim == 3 else np.stack([deep >> bits - 8]*3, -1))
    assert img.max() == 255 and f"{path.name}: its largest value is {2**bits - 1} of 65535" in caplog.text
    read_image(path)
    assert len(caplog.records) == 1  # of a file it is said once

@pytest.mark.parametrize("deep", [ramp(16), np.full((4, 4), 40000, np.uint16)])
def test_sixteen_bits_are_what_they_were(tmp_path, caplog, deep):
    Image.fromarray(deep).save(tmp_path/"x.png")
    Image.fromarray(deep).save(tmp_path/"x.tif")
    (tmp_path/"rgb.png").write_bytes(png(np.stack([deep]*3, -1)))
    for name in ("x.png", "x.tif", "rgb.png"):
        np.testing.assert_array_equal(read_image(tmp_path/name)[..., 0], deep//256)
    assert not caplog.records

def test_a_black_photograph_stays_black(tmp_path, caplog):
    "Noise of a few units in a true 16-bit photograph must not be stretched to a picture."
    noise = np.random.default_rng(0).integers(0, 100, (20, 20)).astype(np.uint16)
    Image.fromarray(noise).save(tmp_path/"noise.png")
    Image.fromarray(0*noise).save(tmp_path/"black.png")
    (tmp_path/"rgb.png").write_bytes(png(np.stack([noise]*3, -1)))
    assert not any(read_image(tmp_path/n).any() for n in ("noise.png", "black.png", "rgb.png"))
    assert "noise.png: its largest value is 99 of 65535: taken for a black picture" in caplog.text and "black.png" not in caplog.text

def test_bits_that_the_file_states(tmp_path, caplog):
    "Half-dark pictures of 12 bits: what the file says counts, not the largest value, 1000, for which 10 bits would do."
    dark = np.minimum(ramp(12), 1000)
    (tmp_path/"sbit.png").write_bytes(png(dark, (b"sBIT", b"\x0c")))
    (tmp_path/"sbit3.png").write_bytes(png(np.stack([dark]*3, -1), (b"sBIT", b"\x0c"*3)))
    Image.fromarray(dark).save(tmp_path/"said.tif", tiffinfo={281: 4095})
    Image.fromarray(dark.astype(np.int32)).save(tmp_path/"said32.tif", tiffinfo={341: 4095})
    (tmp_path/"said.pgm").write_bytes(b"P5 64 64 4095\n" + dark.astype(">u2").tobytes())
    for name in ("sbit.png", "sbit3.png", "said.tif", "said32.tif", "said.pgm"):
        assert read_image(tmp_path/name).max() == 1000//16, name
    (tmp_path/"stretched.png").write_bytes(png(dark//16*16, (b"sBIT", b"\x0c")))  # as the format asks for: 1000 is 992/65535
    assert read_image(tmp_path/"stretched.png").max() == 992//256 and not caplog.records

def test_pixels_packed_in_twelve_bits(tmp_path, caplog):
    "BitsPerSample 12: two pixels, 4095 and 2048, in three bytes."
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 1), (279, 3)]
    ifd = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", k, 3, 1, v) for k, v in tags) + bytes(4)
    (tmp_path/"x.tif").write_bytes(b"II*\0" + struct.pack("<I", 8) + ifd + b"\xff\xf8\x00")
    assert len(ifd) == 114 and read_image(tmp_path/"x.tif")[0, :, 0].tolist() == [255, 128] and not caplog.records

def test_a_tag_that_says_nothing_is_no_reason_to_refuse(tmp_path, caplog):
    Image.fromarray(ramp(12)).save(tmp_path/"x.tif", tiffinfo={281: 65535})
    assert read_image(tmp_path/"x.tif").max() == 255 and "4095" in caplog.text
    (tmp_path/"cut.png").write_bytes(png(ramp(12), (b"sBIT", b"")))
    assert read_image(tmp_path/"cut.png").max() == 255

def test_deep_colours_with_transparency(tmp_path):
    "Opaque, and of 12 bits as its colours: alpha must be stretched, too, or all would be white."
    deep = ramp(12, 4)
    deep[..., 3] = 4095
    for name, x in (("rgba.png", deep), ("la.png", deep[..., 2:])):
        (tmp_path/name).write_bytes(png(x))
    np.testing.assert_array_equal(read_image(tmp_path/"rgba.png")[..., 0], deep[..., 0] >> 4)
    assert read_image(tmp_path/"la.png").max() == 255 and read_image(tmp_path/"la.png").min() == 0

def test_five_bits_of_a_bitmap_are_not_deep(tmp_path):
    head = struct.pack("<2sIHHI IiiHHIIiiII 3I", b"BM", 66 + 32, 0, 0, 66, 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0, 0xF800, 0x7E0, 0x1F)
    (tmp_path/"x.bmp").write_bytes(head + struct.pack("<H", 2 << 11)*16)  # red 2 of 31
    assert tuple(read_image(tmp_path/"x.bmp")[0, 0]) == (16, 0, 0)

# ---- EXIF

BROKEN_EXIF = [b"\0\x08\0\x02\x01\x12\0\x03", b"Exif\0\0junkjunkjunk", b"MM\0*\0\0\0\x08\0\x05\x01", b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abcd\0\0\0\0", b"x"]

@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("kind, exif", [(k, e) for k in ("png", "jpg", "webp") for e in BROKEN_EXIF] + [("tif", BROKEN_EXIF[2])])  # Pillow writes no other TIFF
def test_pixels_count_where_exif_is_broken(tmp_path, caplog, kind, exif):
    "A sound picture was refused for an eXIf chunk that cannot be read."
    Image.new("RGB", (20, 10), "red").save(tmp_path/f"x.{kind}", exif=exif)
    assert read_image(tmp_path/f"x.{kind}").shape == (10, 20, 3)
    if kind == "png" and exif == BROKEN_EXIF[0]:
        assert "x.png: its EXIF cannot be read" in caplog.text

def turned_set(root, flag, upright_masks):
    "The set with pictures stored as `flag` says, and masks drawn on the upright pictures or on the stored ones."
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[flag]
    exif = Image.Exif()
    exif[0x0112] = flag
    for p in sorted((root/"JPEGImages").iterdir()):
        with Image.open(p) as im:
            im.load()
        (im if undo is None else im.transpose(undo)).save(p, exif=exif)
        mask = root/"SegmentationClassAug"/f"{p.stem}.png"
        if not upright_masks:
            save_mask(mask, np.asarray(Image.fromarray(read_mask(mask, 4)).transpose(undo)))
    return open_data(root, "train", NAMES, with_masks=True)

@pytest.mark.parametrize("flag", [5, 6, 7, 8])
def test_a_mask_without_the_turn_says_exif(root, flag):
    "It said that the sizes differ, not why."
    data = turned_set(root, flag, False)
    with pytest.raises(ValueError, match=r"a.png is 20x30 but .*a.jpg is 30x20; .*as stored, before the turn that its EXIF"):
        data.read("a")

@pytest.mark.parametrize("flag", [2, 3, 4])
def test_a_turn_that_sizes_do_not_show_is_said_once(root, caplog, flag):
    "Masks drawn on the picture as stored were scored upside down without a word."
    data = turned_set(root, flag, False)
    for i in data.ids:
        data.read(i)
    assert len(caplog.records) == 1 and f"a.jpg is turned as its EXIF asks for (orientation {flag})" in caplog.text

@pytest.mark.parametrize("flag", [1, 5, 6, 7, 8])
def test_masks_that_fit_upright_alone_are_read_in_silence(root, caplog, flag):
    data = turned_set(root, flag, True)
    check_files(data)
    assert all(data.read(i)[0].shape[:2] == data.read(i)[1].shape for i in data.ids) and not caplog.records

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
    save_mask(tmp_path/"m.png", np.ones((2, 2), np.uint8))
    with pytest.raises(ValueError, match="palette"):
        save_mask(tmp_path/"m.png", np.zeros((2, 2), np.uint8), np.zeros((999, 3), np.uint8))
    def stop(*_): raise OSError("disk full")
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="disk full"):
        save_mask(tmp_path/"m.png", np.zeros((2, 2), np.uint8))
    assert read_mask(tmp_path/"m.png", 2).all() and len(list(tmp_path.iterdir())) == 1

def test_bad_masks(tmp_path):
    save_mask(tmp_path/"m.png", np.array([[0, 3], [77, 255]], np.uint8))
    with pytest.raises(ValueError, match=r"m.png.*values 0..2 and 255, got \[3, 77\]"):
        read_mask(tmp_path/"m.png", 3)
    Image.fromarray(voc_palette()[np.ones((4, 4), int)]).save(tmp_path/"rgb.png")
    with pytest.raises(ValueError, match="rgb.png.*mode RGB.*not their colours"):
        read_mask(tmp_path/"rgb.png", 3)
    (tmp_path/"none.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none.png.*a mask"):
        read_mask(tmp_path/"none.png", 3)
    with pytest.raises(FileNotFoundError, match="absent.png.*a mask"):
        read_mask(tmp_path/"absent.png", 3)

def test_size_mismatch_names_both(root):
    save_mask(root/"SegmentationClassAug"/"b.png", np.zeros((30, 21), np.uint8))
    data = open_data(root, "train", NAMES, with_masks=True)
    with pytest.raises(ValueError, match=r"b.png is 21x30 but .*b.jpg is 30x21"):
        data[1]

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

@pytest.mark.parametrize("colours", [2, 3, 4, 256])
def test_colours_decide_where_the_palette_is_in_another_order(tmp_path, colours):
    "A program that sorts the palette anew kept the colours and changed the bytes: person (15) was read as aeroplane (1)."
    ids = IDS if colours > 3 else np.where(IDS == 15, 15, 0).astype(np.uint8)
    Image.fromarray(voc_palette()[ids]).quantize(colours, dither=0).save(tmp_path/"q.png")
    np.testing.assert_array_equal(read_mask(tmp_path/"q.png", 21), ids)

@pytest.mark.parametrize("value", [0, 15])
def test_a_mask_of_one_colour(tmp_path, value):
    Image.fromarray(voc_palette()[np.full((4, 4), value)]).quantize(256, dither=0).save(tmp_path/"q.png")
    assert (read_mask(tmp_path/"q.png", 21) == value).all()

def test_a_shuffled_map_of_all_256_colours(tmp_path):
    "Behind the classes it is VOC's, in front two are exchanged: no palette of somebody's own colours, but VOC's in another order."
    order = np.arange(256)
    order[[1, 15]] = 15, 1
    np.testing.assert_array_equal(read_mask(paletted(tmp_path/"m.png", IDS, voc_palette()[order]), 21), order[IDS])

@pytest.mark.parametrize("palette", [voc_palette(), voc_palette()[:21], np.zeros((256, 3), int), np.full((256, 3), 9),
                                     np.stack([np.arange(256)]*3, -1)], ids=["voc", "first 21", "black", "one colour", "grey"])
def test_palettes_whose_bytes_are_ids(tmp_path, palette):
    np.testing.assert_array_equal(read_mask(paletted(tmp_path/"m.png", IDS, palette), 21), IDS)
    np.testing.assert_array_equal(read_mask(paletted(tmp_path/"t.png", IDS, palette, transparency=0), 21), IDS)

def test_palettes_with_an_alpha_channel(tmp_path):
    im = Image.fromarray(IDS)
    im.putpalette(np.c_[voc_palette(), np.arange(256)].astype(np.uint8).tobytes(), "RGBA")
    im.save(tmp_path/"m.png")
    np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 21), IDS)

OWN = voc_palette()
OWN[1:4] = (255, 99, 71), (1, 2, 3), (70, 130, 180)

def test_the_sets_own_colours(tmp_path):
    "As the package writes them, known or not, and sorted anew by another program."
    ids = np.array([[0, 1, 2, 3, 255]], np.uint8)
    save_mask(tmp_path/"m.png", ids, OWN)
    for palette in (None, OWN):
        np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 4, palette), ids)
    Image.fromarray(OWN[ids]).quantize(256, dither=0).save(tmp_path/"q.png")
    np.testing.assert_array_equal(read_mask(tmp_path/"q.png", 4, OWN), ids)
    with pytest.raises(ValueError, match="q.png: expected VOC's palette, the class set's, or none"):
        read_mask(tmp_path/"q.png", 4)

CITY = np.array([(128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153)])

@pytest.mark.parametrize("palette", [CITY, [(120, 120, 120), (180, 120, 120), (6, 230, 230), (80, 50, 50)], np.random.default_rng(0).integers(0, 256, (256, 3))])
@pytest.mark.parametrize("n", [4, 21, 81])
def test_other_colours_are_refused(tmp_path, palette, n):
    "Their bytes may be ids or not; road, of Cityscapes, has the colour of COCO's class 21."
    for ids in (np.array([[0, 1, 2, 3]], np.uint8), np.zeros((1, 4), np.uint8)):
        with pytest.raises(ValueError, match=r"m.png: (expected VOC's palette.*byte \d+ is of colour|a palette of greys).*save them without colours: Image.fromarray"):
            read_mask(paletted(tmp_path/"m.png", ids, palette), n)

def test_grey_palettes_in_another_order(tmp_path):
    "A grey mask of ids, saved anew with a palette: byte 0 is grey 15."
    Image.fromarray(np.stack([IDS]*3, -1)).quantize(256, dither=0).save(tmp_path/"q.png")
    with pytest.raises(ValueError, match="q.png: a palette of greys.*without colours"):
        read_mask(tmp_path/"q.png", 21)
    paletted(tmp_path/"m.png", np.array([[0, 1, 2]], np.uint8), [(7, 7, 7), (0, 0, 0), (255, 255, 255)])
    with pytest.raises(ValueError, match="greys"):
        read_mask(tmp_path/"m.png", 8)                       # both 0, 1, 2 and 7, 0, 255 are ids
    np.testing.assert_array_equal(read_mask(paletted(tmp_path/"m.png", np.array([[9, 8]], np.uint8), [(0, 0, 0)]*8 + [(3, 3, 3), (0, 0, 0)]), 4), [[0, 3]])
    for shown in ([(0, 0, 0), (255, 255, 255)], [(0, 0, 0), (127, 127, 127), (255, 255, 255)]):         # black to white, to look at: the bytes
        np.testing.assert_array_equal(read_mask(paletted(tmp_path/"m.png", np.array([[0, 1]], np.uint8), shown), 3), [[0, 1]])

def test_few_bits_of_grey_are_refused(tmp_path):
    "Pillow stretches 2 and 4 bits: id 1 would be 85 or 17."
    head = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)
    def chunk(name, data): return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    (tmp_path/"m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0\x01\x01")) + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="m.png: expected a palette or 8-bit grey PNG.*L;4"):
        read_mask(tmp_path/"m.png", 81)

def test_tags_and_sets_know_their_colours(root):
    "The tags from masks, and the masks of a set, go by the class set's colours."
    for p in (root/"SegmentationClassAug").iterdir():
        Image.fromarray(OWN[read_mask(p, 4)]).quantize(256, dither=0).save(p)
    data = open_data(root, "train", NAMES, "masks", with_masks=True, palette=OWN)
    assert data.tags == {"a": [0], "b": [1], "c": [0, 1], "d": [2]} and set(np.unique(data.read("c")[1])) == {0, 1, 2, 255}
    with pytest.raises(ValueError, match="a.png: expected VOC's palette"):
        open_data(root, "train", NAMES, "masks")

# ---- masks without objects, files that break

@pytest.mark.parametrize("values", [(0, 255), (0,), (255,)])
def test_masks_without_an_object(root, values):
    "Objects marked 255 alone are ignored everywhere: such a set would score itself, and teach background."
    for p in (root/"SegmentationClassAug").iterdir():
        save_mask(p, np.resize(np.array(values, np.uint8), read_mask(p, 4).shape))
    data = open_data(root, "train", NAMES, with_masks=True)
    with pytest.raises(NoObject, match=r"no object class occurs in any of the 4 masks.*255.*ignored"):
        check_objects(data)
    save_mask(root/"SegmentationClassAug"/"c.png", np.full((22, 30), 2, np.uint8))
    check_objects(data)  # one will do

def test_every_broken_picture_is_named_at_once(root):
    "A truncated JPEG stopped a training when its turn came, with the traceback of a worker."
    check_files(open_data(root, "train", NAMES, with_masks=True), progress=False)
    b, d = (root/"JPEGImages"/f"{k}.jpg" for k in "bd")
    b.write_bytes(b.read_bytes()[:-40])
    d.write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"^2 of 4 pictures cannot be read: b.jpg, d.jpg; .*b.jpg: expected a complete picture") as e:
        check_files(open_data(root, "train", NAMES), progress=False)
    assert "\n" not in str(e.value)
    (root/"SegmentationClassAug"/"a.png").write_bytes(b"junk")
    save_mask(root/"SegmentationClassAug"/"c.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"^4 of 4 pictures or their masks cannot be read: a.jpg, b.jpg, c.jpg, d.jpg; .*a.png: expected a mask"):
        check_files(open_data(root, "train", NAMES, with_masks=True), progress=False)

@pytest.mark.parametrize("kw", [{}, dict(progressive=True), dict(subsampling=0), dict(quality=95)])
def test_an_eighth_of_a_jpeg_shows_that_it_is_cut(root, kw):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)).resize((480, 320))
    path = root/"JPEGImages"/"a.jpg"
    file = io.BytesIO()
    noise.save(file, "JPEG", **kw)
    data = open_data(root, "train", NAMES)
    for keep in (.1, .5, .9, .99, .999):
        path.write_bytes(file.getvalue()[:int(keep*len(file.getvalue()))])
        with pytest.raises(ValueError, match="^1 of 4.*a.jpg"):
            check_files(data, progress=False)
    path.write_bytes(file.getvalue())
    check_files(data, progress=False)

# ---- folders and lists

@pytest.mark.parametrize("above", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_root_may_be_above(root, tmp_path, above):
    if above == "VOCdevkit/VOC2012":
        (tmp_path/"VOCdevkit").mkdir()
        root.rename(tmp_path/above)
        above = "VOCdevkit"
    assert len(open_data(tmp_path/above, "train", NAMES)) == 4
    assert len(open_data(str(tmp_path), "train", NAMES)) == 4

def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)no such folder.*ROOT/JPEGImages/ID.jpg") as e:
        open_data(tmp_path/"none", "train", NAMES)
    assert "ImageSets/Segmentation/SPLIT.txt" in str(e.value)

@pytest.mark.parametrize("part, kw", [("JPEGImages", {}), ("ImageSets", {}), ("SegmentationClassAug", dict(with_masks=True))])
def test_incomplete_layout(root, part, kw):
    shutil.rmtree(root/part)
    with pytest.raises(FileNotFoundError, match="expected\nROOT/JPEGImages"):
        open_data(root, "train", NAMES, **kw)

def test_masks_are_opened_only_if_asked_for(root):
    shutil.rmtree(root/"SegmentationClassAug")
    assert open_data(root, "train", NAMES)[0].mask is None

def test_devkit_masks_serve_too(root):
    (root/"SegmentationClassAug").rename(root/"SegmentationClass")
    assert open_data(root, "train", NAMES, with_masks=True)[0].mask.unique().tolist() == [0, 1, 255]

def test_missing_files_are_named(root):
    (root/"JPEGImages"/"b.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no picture for 1 of 4 listed IDs: b;"):
        open_data(root, "train", NAMES)
    (lists(root)/"train.txt").write_text("a\n")
    (root/"SegmentationClassAug"/"a.png").unlink()
    with pytest.raises(FileNotFoundError, match="no mask for 1 of 1 listed IDs: a;"):
        open_data(root, "train", NAMES, with_masks=True)

def test_list_is_forgiving_about_white_space(root):
    (lists(root)/"train.txt").write_bytes(b"\xef\xbb\xbfa \r\n\r\nb\r\n")
    assert open_data(root, "train", NAMES).ids == ["a", "b"]

@pytest.mark.parametrize("text, match", [(b"", "empty list"), (b"\n \n", "empty list"), (b"a\na\n", "more than once: a"), (b"\xff\xfe\x00a", "UTF-8")])
def test_bad_lists(root, text, match):
    (lists(root)/"train.txt").write_bytes(text)
    with pytest.raises(ValueError, match=match):
        open_data(root, "train", NAMES)

ESCAPES = ["../x", "/etc/passwd", "a/b", "a\\b", "..", "C:x", "a\0"]

@pytest.mark.parametrize("bad", ESCAPES)
def test_ids_do_not_leave_the_folder(root, bad):
    retag(root, **{"a": ["cat"], bad: ["cat"]})
    with pytest.raises(ValueError, match="tags.json.*plain picture IDs"):
        open_data(root, "train", NAMES)
    np.save(lists(root)/"cls_labels_onehot.npy", {bad: np.float32([1, 0, 0])}, allow_pickle=True)
    with pytest.raises(ValueError, match="onehot.npy.*plain picture IDs"):
        open_data(root, "train", NAMES, tags_from="onehot")
    with pytest.raises(ValueError, match="split.*plain"):
        open_data(root, bad, NAMES)
    (lists(root)/"train.txt").write_text(f"a\n{bad}\n")
    with pytest.raises(ValueError, match="train.txt.*plain picture IDs"):
        open_data(root, "train", NAMES)

def test_own_pictures_may_be_png_and_jpeg(root):
    Image.new("RGBA", (9, 9)).save(root/"JPEGImages"/"b.png")  # b.jpg is there and goes first
    (root/"JPEGImages"/"a.jpg").rename(root/"JPEGImages"/"a.JPEG")
    assert [p.name for p in open_data(root, "train", NAMES).images.values()] == ["a.JPEG", "b.jpg", "c.jpg", "d.jpg"]

# ---- tags

def test_sources_agree_and_are_preferred_in_order(root):
    want = {"a": [0], "b": [1], "c": [0, 1], "d": [2]}
    assert read_tags(root, list("abcd"), NAMES) == want
    assert read_tags(root, list("abcd"), NAMES, "masks") == want
    np.save(lists(root)/"cls_labels_onehot.npy", {k: np.eye(3, dtype=np.float32)[t].sum(0) for k, t in want.items()}, allow_pickle=True)
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

def test_untagged_pictures_are_left_out_with_one_warning(root, caplog):
    retag(root, a=["cat"], b=[], c=["dog", "horse"])  # b is empty, d is unknown
    with caplog.at_level(logging.WARNING):
        data = open_data(root, "train", NAMES)
    assert data.ids == ["a", "c"]
    assert [r.getMessage() for r in caplog.records] == ["train: 2 of 4 pictures have no tag and are left out: b, d"]
    with pytest.raises(ValueError, match="2 of 4 pictures have no tag: b, d"):
        open_data(root, "train", NAMES, strict=True)
    assert len(open_data(root, "train", NAMES, tags_from=None)) == 4
    retag(root, z=["cat"])
    with pytest.raises(ValueError, match="4 of 4 pictures have no tag"):
        open_data(root, "train", NAMES)

def test_absent_class_is_a_warning(root, caplog):
    retag(root, a=["cat"], b=["cat"], c=["cat"], d=["cat"])
    with caplog.at_level(logging.WARNING):
        open_data(root, "train", NAMES)
    assert [r.getMessage() for r in caplog.records] == ["train: no picture is tagged dog, horse"]

def test_unknown_tags(root):
    retag(root, a=["hrose"])
    with pytest.raises(ValueError, match="tags.json: 'a': tag 'hrose' is not one of the 3 classes; nearest: horse"):
        open_data(root, "train", NAMES)
    retag(root, a=[7])
    with pytest.raises(ValueError, match="tag 7 is not one"):
        open_data(root, "train", NAMES)
    (root/"Annotations").mkdir()
    (root/"Annotations"/"a.xml").write_text("<annotation><object><name>zebra</name></object></annotation>")
    with pytest.raises(ValueError, match="a.xml: tag 'zebra'"):
        open_data(root, "train", NAMES, tags_from="xml")
    (root/"Annotations"/"a.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match="a.xml.*broken XML"):
        open_data(root, "train", NAMES, tags_from="xml")

@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '{"a": "cat"}', '"a"'])
def test_broken_tags_json(root, text):
    (lists(root)/"tags.json").write_text(text)
    with pytest.raises(ValueError, match="tags.json.*expected"):
        open_data(root, "train", NAMES)

# ---- the pickled tags

class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_onehot_of_any_protocol(tmp_path, protocol):
    want = {"a": np.float32([1, 0, 1]), "b": np.array([0, 1, 0], ">f8"), "c": np.array([0, 0, 1], np.uint8)}
    box = np.empty((), object)
    box[()] = want
    with open(tmp_path/"t.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=()))
        pickle.dump(box, f, protocol=protocol)
    assert read_onehot(tmp_path/"t.npy", NAMES) == {"a": [0, 2], "b": [1], "c": [2]}

def test_malicious_pickles_are_refused(root):
    path = lists(root)/"cls_labels_onehot.npy"
    mark = root/"ran"
    for evil in (Call(os.system, f"touch {mark}"), Call(eval, f"open({str(mark)!r}, 'w')"), Call(exec, f"open({str(mark)!r}, 'w')"),
                 Call(open, str(mark), "w"), Call(np.load, "x"), Call(os.mkdir, str(mark))):
        np.save(path, {"a": evil}, allow_pickle=True)
        with pytest.raises(ValueError, match="names .*use tags.json"):
            open_data(root, "train", NAMES, tags_from="onehot")
        assert not mark.exists()

def test_forged_object_arrays_are_refused(tmp_path):
    "An array of objects whose memory is given as bytes would be read as pointers by NumPy."
    forged = (b"\x80\x02cnumpy\nndarray\n0cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt"
              b"\x43\x01btR(I1\n(I3\ntcnumpy\ndtype\n(X\x02\x00\x00\x00O8\x89\x88tR(I3\nX\x01\x00\x00\x00|NNNI-1\nI-1\nI0\ntb\x89"
              b"\x43\x18" + b"A"*24 + b"tb.")
    with open(tmp_path/"f.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=()))
        f.write(forged)
    with pytest.raises(ValueError, match="OBJECT array from memory"):
        read_onehot(tmp_path/"f.npy", NAMES)

@pytest.mark.parametrize("bomb", [b"]r\0\0\x40\0.", b"\x96\0\0\0\4\0\0\0\0."], ids=["memo", "bytearray"])
def test_a_short_pickle_takes_no_memory(tmp_path, bomb):
    "A place far up in the memo, and an array that only its length is there of: 64 MiB each if believed."
    with open(tmp_path/"b.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=()))
        f.write(b"\x80\x02" + bomb)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="b.npy.*expected a pickled dict"):
            read_onehot(tmp_path/"b.npy", NAMES)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()

def test_an_id_named_twice_is_not_lost(root):
    (lists(root)/"tags.json").write_text('{"a": ["cat"], "b": ["dog"], "a": ["horse"]}')
    with pytest.raises(ValueError, match="tags.json.*more than once: a"):
        open_data(root, "train", NAMES)

@pytest.mark.parametrize("text", [b"<?xml version='1.0' encoding='hex'?><a/>", b"<?xml version='1.0' encoding='nonsense'?><a/>", b"<a>&x;</a>", b""])
def test_annotations_in_no_known_encoding(root, text):
    (root/"Annotations").mkdir()
    (root/"Annotations"/"a.xml").write_bytes(text)
    with pytest.raises(ValueError, match="a.xml.*broken XML"):
        open_data(root, "train", NAMES, tags_from="xml")

def test_long_names(root):
    with pytest.raises(ValueError, match="plain picture IDs"):
        open_data(root, "x"*5000, NAMES)
    retag(root, **{"ä"*200: ["cat"]})
    with pytest.raises(ValueError, match="plain picture IDs"):
        open_data(root, "train", NAMES)

def test_large_masks_are_refused(tmp_path, monkeypatch):
    save_mask(tmp_path/"m.png", np.zeros((12, 12), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="m.png: 12x12 pixels.*shrink"):
        read_mask(tmp_path/"m.png", 3)

def test_postscript_is_not_run(tmp_path):
    (tmp_path/"x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n{} loop\n")
    with pytest.raises(ValueError, match="x.jpg.*a program"):
        read_image(tmp_path/"x.jpg")

@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"junk"*50), lambda p: np.save(p, np.zeros((4, 3))),
                                  lambda p: np.save(p, np.array([{"a": 1}], object)), lambda p: np.save(p, ["a"], allow_pickle=True),
                                  lambda p: np.save(p, {"a": [1, 0, 0]}, allow_pickle=True), lambda p: np.save(p, {1: np.zeros(3)}, allow_pickle=True),
                                  lambda p: np.save(p, {"a": np.float32([0, .5, 0])}, allow_pickle=True)])
def test_broken_onehot(tmp_path, make):
    make(tmp_path/"t.npy")
    with pytest.raises(ValueError, match="t.npy.*expected"):
        read_onehot(tmp_path/"t.npy", NAMES)

def test_onehot_of_another_class_list(tmp_path):
    np.save(tmp_path/"t.npy", {"a": np.zeros(20, np.float32)}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"'a': expected 3 values of 0 or 1, got \(20,\)"):
        read_onehot(tmp_path/"t.npy", NAMES)
    with pytest.raises(FileNotFoundError):
        read_onehot(tmp_path/"none.npy", NAMES)

# ---- batches

def take(it, k): return [b for b, _ in zip(it, range(k))]
def same(a, b): return a.ids == b.ids and torch.equal(a.img, b.img) and torch.equal(a.lbl, b.lbl) and torch.equal(a.valid, b.valid) and a.tags == b.tags

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

def test_every_picture_once_an_epoch():
    flat = [i for b in take(Stream(7, 3, seed=5), 70) for i, _ in b]
    assert all(sorted(flat[e*7:e*7 + 7]) == list(range(7)) for e in range(30))
    assert len({tuple(flat[e*7:e*7 + 7]) for e in range(30)}) > 20
    keys = [k for b in take(Stream(7, 3, seed=5), 70) for _, k in b]
    assert len(set(keys)) == len(keys)

def test_crop_settings_and_padding(root):
    data = open_data(root, "train", NAMES, with_masks=True, crop=64, scale=(.5, .5), flip=False, norm=None)
    for b in take(batches(data, 4), 3):
        assert b.img.shape == (4, 3, 64, 64) and b.lbl.shape == b.valid.shape == (4, 64, 64)
        assert b.valid.sum((1, 2)).tolist() == [int(.5*h)*15 for h in ({"a": 20, "b": 21, "c": 22, "d": 23}[i] for i in b.ids)]
        assert (b.img.sum(1)[~b.valid] == 0).all() and (b.lbl[~b.valid] == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="scale"):
        open_data(root, "train", NAMES, crop=64, scale=(0, 1))[0]

def test_whole_pictures_of_different_sizes_cannot_be_stacked(root):
    data = open_data(root, "train", NAMES)
    with pytest.raises(ValueError, match=r"one size, got \[\(20, 30\), \(21, 30\)\]"):
        collate([data[0], data[1]])

def test_bad_file_is_named_from_a_worker(root):
    (root/"JPEGImages"/"b.jpg").write_bytes(b"junk")
    with pytest.raises(ValueError, match="b.jpg"):
        take(batches(open_data(root, "train", NAMES, crop=24), 4, workers=1), 1)

@pytest.mark.parametrize("kw", [dict(n=0, bs=4), dict(n=4, bs=0), dict(n=4, bs=3, world=2)])
def test_stream_refuses(kw):
    with pytest.raises(ValueError, match="multiple of world"):
        Stream(**kw)

# ---- real photographs

@needs_data
@pytest.mark.parametrize("split, n", [("train_aug", 70), ("val", 50)])
def test_voc_photographs(split, n):
    data = open_data(DATA, split, VOC, with_masks=True, norm=None)
    assert len(data) == n
    drawn = read_tags(DATA/"VOCdevkit"/"VOC2012", data.ids, VOC, "masks")
    shapes = set()
    for s in data:
        assert s.img.dtype == torch.uint8 and s.img.shape[1:] == s.mask.shape and max(s.mask.shape) <= 500
        shapes.add(tuple(s.mask.shape))
        assert s.tags and set(drawn[s.id]) <= set(s.tags)  # tags may also name objects too difficult to draw
    assert len(shapes) > 5

@needs_data
def test_voc_photographs_in_training_batches():
    data = open_data(DATA/"VOCdevkit", "train_aug", VOC, crop=320)
    for b in take(batches(data, 4, seed=1), 4):
        assert b.img.shape == (4, 3, 320, 320) and b.img.isfinite().all() and b.valid.any((1, 2)).all()
        black = preprocess(np.zeros((1, 1, 3), np.uint8))[:, 0, 0]
        assert torch.equal(b.img.movedim(1, -1)[~b.valid], black.expand(int((~b.valid).sum()), 3))

@needs_data
def test_voc_masks_survive_a_round_trip(tmp_path):
    src = next((DATA/"VOCdevkit"/"VOC2012"/"SegmentationClassAug").glob("*.png"))
    ids = read_mask(src, 21)
    save_mask(tmp_path/"m.png", ids)
    np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 21), ids)


@pytest.mark.parametrize("behind", [0, 255], ids=["zeros", "white"])
def test_what_stands_behind_the_classes_says_nothing(tmp_path, behind):
    "A palette filled up with zeros made 255 the background, because its colour is black."
    palette = np.full((256, 3), behind, np.uint8)
    palette[:21] = voc_palette()[:21]
    ids = np.zeros((4, 8), np.uint8)
    ids[:, 2:4] = 15
    ids[:, 5] = 255
    im = Image.fromarray(ids)
    im.putpalette(palette.tobytes())
    im.save(tmp_path/"m.png")
    np.testing.assert_array_equal(read_mask(tmp_path/"m.png", 21), ids)
