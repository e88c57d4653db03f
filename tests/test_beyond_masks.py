"""Masks without classes: read, cropped with their pictures, voted in, kept, and refused where they do not fit."""
import json, shutil
import numpy as np, pytest, torch
from PIL import Image
import weclip.beyond.masks as beyond
import weclip.engine.cache as cache
from weclip.beyond.masks import plain_vote, vote
from weclip.method.config import preset
from weclip.method.metrics import confusion, scores
from weclip.method.par import pseudo_labels
from weclip.data.pictures import random_crop, read_mask, read_regions, save_regions, smallest_first
from weclip.data.voc import batches, open_data
from weclip.engine.cache import FrozenCache
from weclip.engine.job import open_training, run_job
from weclip.engine.pseudo import preview, score_stages
from weclip.engine.train import train, weak_loss
from weclip.engine.weights import build, load_model
from weclip.world.scenes import write_scenes
from weclip.cli import main

SMALL = dict(iters=4, switch=2, warmup=1, bs=3, d=32, layers=1, heads=2)

def model(**settings): return build("tiny", preset("scenes", **{**SMALL, "labels": "vote", **settings}))

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("masks")/"scenes", train=6, val=2, workers=1)

@pytest.fixture(scope="module")
def regions(root, tmp_path_factory):
    "Squares of 16 pixels for every picture."
    folder = tmp_path_factory.mktemp("regions")
    for file in (root/"SegmentationClassAug").glob("*.png"):
        height, width = read_mask(file, 8).shape
        y, x = np.mgrid[:height, :width]//16
        save_regions(folder/file.name, 1 + 100*y + x)
    return folder

# ---- voting

def test_the_vote_is_the_plain_one_for_many_shapes():
    rng = torch.Generator().manual_seed(0)
    off = []
    for k in range(200):
        size = (1 + k % 3, *torch.randint(1, 12, (2,), generator=rng).tolist())
        labels = torch.randint(0, 2 + k % 4, size, generator=rng)
        labels[torch.rand(size, generator=rng) < .1] = 255
        ids = torch.randint(0, 1 + k % 7, size, generator=rng)*(2**24 - 1 if k % 5 == 0 else 1)
        share = (0, .3, .5, .75)[k % 4]
        if not vote(labels, ids, share).equal(plain_vote(labels, ids, share)):
            off.append((k, size, share))
    assert not off

def test_a_region_has_one_class_or_keeps_its_labels():
    rng = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (2, 9, 9), generator=rng)
    ids = torch.randint(0, 6, (2, 9, 9), generator=rng)
    voted = vote(labels, ids)
    for image, region in torch.cartesian_prod(torch.arange(2), torch.arange(1, 6)).tolist():
        inside = ids[image] == region
        counts = labels[image, inside].bincount()
        is_won = counts.max() > .5*inside.sum()
        want = counts.argmax().expand(int(inside.sum())) if is_won else labels[image, inside]
        assert voted[image, inside].equal(want)
    assert voted[ids == 0].equal(labels[ids == 0])

def test_the_registered_function_votes_on_the_labels_of_par(root, regions):
    m = model().eval()
    data = open_training(m, root, "train", regions=regions)
    batch = next(batches(data, 3, seed=1))
    out = m(batch.img, batch.tags, regions=batch.regions)
    cfg = m.cfg
    size = tuple(batch.img.shape[-2:])
    par = pseudo_labels(out.cam_ref, batch.img, out.img_idx, out.tag_idx, size, cfg.par_scale, cfg.par_iters,
                        cfg.par_dilations)
    assert out.pseudo.equal(plain_vote(par, batch.regions)) and not out.pseudo.equal(par)
    clear = model(**{"labels.min_share": .9}).eval()
    again = clear(batch.img, batch.tags, regions=batch.regions).pseudo
    changed = [(pseudo != par).sum() for pseudo in (again, out.pseudo)]
    assert again.equal(plain_vote(par, batch.regions, .9)) and changed[0] < changed[1]

def test_without_regions_or_with_others_a_sentence_is_said():
    m = model().eval()
    img = torch.zeros(1, 3, 32, 32)
    for ids in (None, torch.zeros(1, 16, 16).long()):
        with pytest.raises(ValueError, match=r"labels 'vote': expected regions, \(1, 32, 32\).*--masks DIR"):
            m(img, [[0]], regions=ids)

# ---- from the folder to the batch

def test_all_three_forms_of_sam_are_one(tmp_path):
    rng = np.random.default_rng(0)
    masks = [rng.random((7, 9)) < share for share in (.2, .6, .9)]
    (tmp_path/"a").mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(255*mask.astype(np.uint8)).save(tmp_path/"a"/f"{i}.png")
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rows = [coco.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    rows = [dict(segmentation=dict(size=[7, 9], counts=row["counts"].decode())) for row in rows]
    (tmp_path/"b.json").write_text(json.dumps(rows))
    want = smallest_first(masks, (7, 9))
    save_regions(tmp_path/"c.png", want)
    for name in ("a", "b.json", "c.png"):
        assert (read_regions(tmp_path/name, (7, 9)) == want).all(), name
    assert (want[masks[0]] == 3).all() and (want[masks[2] & ~masks[1] & ~masks[0]] == 1).all()

def test_maps_are_read_from_any_mode_of_a_png(tmp_path):
    ids = np.arange(56, dtype=np.uint8).reshape(7, 8)*4
    palette = Image.fromarray(ids)
    palette.putpalette(np.random.default_rng(0).integers(0, 255, 768, dtype=np.uint8).tobytes())
    images = {"grey": (Image.fromarray(ids), ids), "palette": (palette, ids),
              "deep": (Image.fromarray(ids.astype(np.uint16)*290), ids.astype(np.int64)*290),
              "bits": (Image.fromarray(ids > 100), ids > 100),
              "colours": (Image.fromarray(np.stack([ids, ids//2, ids//4], -1)),
                          ids + 256*(ids//2).astype(np.int64) + 65536*(ids//4).astype(np.int64))}
    for name, (image, want) in images.items():
        image.save(tmp_path/f"{name}.png")
        assert (read_regions(tmp_path/f"{name}.png", ids.shape) == want).all(), name
    Image.fromarray(ids).save(tmp_path/"lossy.png", "JPEG")
    with pytest.raises(ValueError, match="lossy.png: expected a PNG of ids.*, got JPEG L"):
        read_regions(tmp_path/"lossy.png", ids.shape)

def test_run_lengths_of_a_large_mask_are_read_as_coco_writes_them(tmp_path):
    coco = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    y, x = np.mgrid[:300, :400]
    for k, mask in enumerate([(x - 200)**2 + (y - 150)**2 < 9000, x > 399, y >= 0, (x//7 + y//90) % 2 == 0]):
        row = coco.encode(np.asfortranarray(mask, np.uint8))
        row = dict(segmentation=dict(size=row["size"], counts=row["counts"].decode()))
        (tmp_path/f"{k}.json").write_text(json.dumps([row]))
        assert ((read_regions(tmp_path/f"{k}.json", (300, 400)) == 1) == mask).all(), k

def test_regions_are_cropped_as_masks_are(root, regions):
    seen = set()
    for k in range(20):
        rng = np.random.default_rng(k)
        h, w = rng.integers(5, 40, 2)
        ids = rng.integers(0, 255, (h, w), dtype=np.uint8)
        img = np.repeat(ids[..., None], 3, 2)
        crop = random_crop(img, 24, (.5, 2), True, np.random.default_rng(k), ids, ids.astype(np.int32) + 70_000)
        want = np.where(crop.mask == 255, 0, crop.mask.astype(np.int32) + 70_000)
        assert crop.regions.dtype == np.int32 and (crop.regions == want).all()
        seen.add(bool((crop.mask == 255).any()))
    assert seen == {True, False}  # with padding and without

def test_batches_carry_regions_and_other_processes_read_the_same(root, regions):
    data = open_training(model(), root, "train", regions=regions)
    here, there = (next(batches(data, 3, seed=1, workers=n)) for n in (0, 1))
    assert here.regions.dtype == torch.long and here.regions.shape == here.img.shape[:1] + here.img.shape[2:]
    assert here.regions.equal(there.regions) and (here.regions[~here.valid] == 0).all()
    assert next(batches(open_training(model(), root, "train"), 3, seed=1)).regions is None

def test_what_is_missing_or_of_another_size_is_named_before_a_run(root, regions, tmp_path):
    m = model()
    with pytest.raises(FileNotFoundError, match="no regions for 6 of 6 pictures"):
        open_training(m, root, "train", regions=tmp_path)
    for file in regions.glob("train_*.png"):
        save_regions(tmp_path/file.name, np.ones((9, 9), int))
    fault = "6 of 6 pictures or their regions cannot be read.* is 9x9, but its picture is"
    with pytest.raises(ValueError, match=fault):
        open_training(m, root, "train", regions=tmp_path)

# ---- in a run

def test_a_run_learns_from_the_vote_and_the_same_from_kept_crops(root, regions, tmp_path, monkeypatch):
    after = {}
    for name, kept in (("vote", None), ("kept", tmp_path/"cache"), ("par", None)):
        m = model(views=2, labels=name if name == "par" else "vote")
        train(m, open_training(m, root, "train", regions=regions), tmp_path/name, cache=kept, progress=False)
        after[name] = torch.cat([p.detach().flatten() for p in m.decoder.parameters()])
    far = (after["vote"] - after["par"]).norm()
    assert 0 < far and (after["vote"] - after["kept"]).norm() < .5*far

def test_kept_regions_are_those_of_the_crops_and_new_files_are_new_ones(root, regions, tmp_path):
    m = model(views=2)
    data = open_training(m, root, "train", regions=regions)
    kept = FrozenCache(tmp_path/"kept", m, data, progress=False)
    for read, made in zip(range(4), zip(batches(kept.data, 3, 1, views=2), batches(data, 3, 1, views=2))):
        assert made[0].regions.equal(made[1].regions), read
    other = tmp_path/"other"
    for file in regions.glob("train_*.png"):
        save_regions(other/file.name, read_regions(file, Image.open(file).size[::-1]) + 1)
    moved = open_training(m, root, "train", regions=other)
    names = [cache.cache_files(tmp_path, m, some) for some in (data, moved, open_training(m, root, "train"))]
    assert names[0]["regions"] != names[1]["regions"] and "regions" not in names[2]
    assert all(names[0][key] == some[key] for some in names[1:] for key in ("tokens", "img", "box", "cam", "attn"))

def test_stages_and_previews_vote(root, regions):
    m = model().eval()
    about = dict(with_masks=True, norm=m.cfg.norm)
    data = open_data(root, "val", m.classes.classes, regions=regions, **about)
    image = data.read("val_00000")[0]
    ids = data.read_regions("val_00000", image.shape[:2])
    label = preview(m, image, data.tags["val_00000"], stages=("pseudo",), regions=ids)[1]["pseudo"]
    counts = [label[torch.from_numpy(ids == region)].unique().numel() for region in np.unique(ids)]
    assert sum(n == 1 for n in counts) > .8*len(counts)  # few squares have no winner
    plain = model(labels="par").eval()
    found = [score_stages(some, data, progress=False, stages=("pseudo", "refined")) for some in (m, plain)]
    assert found[0]["refined"]["miou"] == found[1]["refined"]["miou"]
    counts = 0
    for name in data.ids:
        image, mask = data.read(name)
        label = preview(plain, image, data.tags[name], stages=("pseudo",))[1]["pseudo"]
        ids = torch.from_numpy(data.read_regions(name, mask.shape)).long()
        counts += confusion(plain_vote(label[None], ids[None])[0], torch.from_numpy(mask), 8)
    assert found[0]["pseudo"]["miou"] == scores(counts, m.classes.names)["miou"] != found[1]["pseudo"]["miou"]

FAST = ["--profile", "scenes", "--clip", "tiny", "--device", "cpu", "--train-split", "train"]
SET = ["--set", *(f"{name}={value}" for name, value in SMALL.items())]

def test_commands_take_a_folder_of_masks(root, regions, tmp_path, capsys):
    masks = ["--masks", str(regions)]
    assert main(["pseudo", str(root), "--out", str(tmp_path/"voted"), *masks, *FAST]) == 0
    assert main(["pseudo", str(root), "--out", str(tmp_path/"plain"), *FAST]) == 0
    files = sorted((tmp_path/"voted").glob("*.png"))
    pairs = [[read_mask(folder/file.name, 8) for folder in (tmp_path/"voted", tmp_path/"plain")] for file in files]
    clear = [*masks, *FAST, "--set", "labels.min_share=.9"]
    assert main(["pseudo", str(root), "--out", str(tmp_path/"clear"), *clear]) == 0
    ids = [read_regions(regions/file.name, voted.shape) for file, (voted, _) in zip(files, pairs)]
    assert len(files) == 6 and any((voted != plain).any() for voted, plain in pairs)
    for file, region_of, (voted, plain) in zip(files, ids, pairs):
        maps = [torch.from_numpy(a).long()[None] for a in (plain, region_of)]
        assert (voted == plain_vote(*maps)[0].numpy()).all()
        assert (read_mask(tmp_path/"clear"/file.name, 8) == plain_vote(*maps, .9)[0].numpy()).all()
    assert main(["train", str(root), "--out", str(tmp_path/"run"), *masks, *FAST, *SET]) == 0
    trained = load_model(tmp_path/"run"/"model.safetensors")
    assert trained.cfg.labels == "vote"
    capsys.readouterr()
    assert main(["train", str(root), "--out", str(tmp_path/"bad"), "--masks", str(tmp_path), *FAST, *SET]) == 2
    assert "no regions for 6 of 6 pictures" in capsys.readouterr().err

def test_own_pictures_take_masks_too(root, regions, tmp_path):
    tags = tmp_path/"tags.json"
    tags.write_text((root/"ImageSets"/"Segmentation"/"tags.json").read_text())
    words = ["--images", str(root/"JPEGImages"), "--tags", str(tags), "--clip", "tiny", "--classes", "scenes",
             "--profile", "scenes", "--device", "cpu", "--masks", str(regions)]
    assert main(["train", *words, "--out", str(tmp_path/"run"), *SET]) == 0
    assert load_model(tmp_path/"run"/"model.safetensors").cfg.labels == "vote"

def test_the_loss_of_a_step_reads_the_regions(root, regions, monkeypatch):
    m = model().train()
    batch = next(batches(open_training(m, root, "train", regions=regions), 3, seed=1))
    seen = []
    real = beyond.vote
    monkeypatch.setattr(beyond, "vote", lambda labels, ids, share: seen.append(ids) or real(labels, ids, share))
    weak_loss(m, batch, 0)
    assert seen[0].equal(batch.regions)

def test_a_job_scores_the_labels_after_the_vote(root, regions, tmp_path):
    found = {}
    for labels in ("vote", "par"):
        m = model(labels=labels)
        found[labels] = run_job(m, root, tmp_path/labels, modes=("single",), say=str, sheet=1, regions=regions)
    assert found["vote"]["pseudo"] != found["par"]["pseudo"]
    assert found["vote"]["initial+PAR"] == found["par"]["initial+PAR"]
    with pytest.raises(ValueError, match="labels 'vote': expected regions"):
        run_job(model(), root, tmp_path/"none", modes=("single",), say=str, sheet=0)

def test_regions_that_scoring_needs_are_looked_for_before_the_training(root, regions, tmp_path):
    of_training = tmp_path/"regions"
    of_training.mkdir()
    for name in open_data(root, "train", (), tags_from=None).ids:
        shutil.copy(regions/f"{name}.png", of_training)
    with pytest.raises(FileNotFoundError, match="no regions for"):
        run_job(model(), root, tmp_path/"run", modes=("single",), say=str, sheet=0, regions=of_training)
    assert not (tmp_path/"run"/"checkpoint.pt").exists()
