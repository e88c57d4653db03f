"""Frozen features on disk: the same learning and the same scores, computed once, all or nothing."""
import numpy as np, pytest, torch
import weclip.engine.cache as c
from weclip.machine import FEATURES
from weclip.method import seams
from weclip.method.batch import group
from weclip.method.cam import gradcam
from weclip.method.clip import FrozenCLIP
from weclip.method.config import preset
from weclip.method.model import WeCLIP
from weclip.data.pictures import preprocess
from weclip.data.voc import batches, open_data
from weclip.world.scenes import write_scenes
from weclip.engine.weights import build
from weclip.engine.cache import FrozenCache, KeptTokens, cache_files
from weclip.engine.train import train
from weclip.engine.infer import evaluate
from weclip.engine.job import open_training

@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=6, val=2, workers=1)

SMALL = dict(iters=4, switch=2, warmup=1, bs=3, d=32, layers=1, heads=2, views=2)

def model(**settings): return build("tiny", preset("scenes", **{**SMALL, **settings}))

def training_set(root, m): return open_training(m, root, "train")

def refuse(*a, **kw): raise AssertionError("the encoder was asked again")

def test_a_training_learns_the_same_from_kept_features(root, tmp_path):
    before = torch.cat([p.detach().flatten() for p in model().decoder.parameters()])
    after = []
    for cache in (None, tmp_path/"cache"):
        m = model()
        train(m, training_set(root, m), tmp_path/f"run{len(after)}", cache=cache)
        after.append(torch.cat([p.detach().flatten() for p in m.decoder.parameters()]))
    assert (after[0] - after[1]).norm() < .05*(after[0] - before).norm() and not after[0].equal(before)

def test_what_is_kept_is_not_computed_again(root, tmp_path, monkeypatch):
    m = model()
    train(m, training_set(root, m), tmp_path/"first", cache=tmp_path/"cache")
    monkeypatch.setattr(c, "_encode_rows", refuse)
    for settings in (dict(lam=0.), dict(refine="none", layers=2)):  # what the decoder and its losses are is no matter
        other = model(**settings)
        train(other, training_set(root, other), tmp_path/f"{settings}", cache=tmp_path/"cache")
    other = model(crop=96)
    with pytest.raises(AssertionError, match="asked again"):
        train(other, training_set(root, other), tmp_path/"crop", cache=tmp_path/"cache")

def test_masks_need_tokens_alone(root, tmp_path):
    m = model(supervised=True)
    data = training_set(root, m)
    kept = FrozenCache(tmp_path, m, data, progress=False)
    assert {p.name.split("-")[0] for p in tmp_path.glob("*.npy")} == {"tokens"} == set(cache_files(tmp_path, m, data))
    batch = next(batches(data, 3, 1, views=2))
    got = kept(batch)
    want = m.tokens(batch.img)
    assert got.grid == want.grid
    assert all((a - b).abs().max() < 2e-2 for a, b in zip(got.tokens, want.tokens, strict=True))

def test_a_stopped_filling_leaves_nothing(root, tmp_path, monkeypatch):
    m = model(views=6)  # 36 crops, 32 at a time
    real = c._encode_rows
    calls = []
    def dying(*a):
        calls.append(a)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a)
    monkeypatch.setattr(c, "_encode_rows", dying)
    with pytest.raises(KeyboardInterrupt):
        FrozenCache(tmp_path, m, training_set(root, m), progress=False)
    assert not [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"]
    kept = FrozenCache(tmp_path, m, training_set(root, m), progress=False)
    assert kept.arrays["tokens"].shape[0] == 36 and np.isfinite(kept.arrays["cam"]).all() and len(calls) == 4

def test_other_code_is_another_file(root, tmp_path, monkeypatch):
    "A changed CAM was trained on the old one's files: only settings named them."
    m = model()
    data = training_set(root, m)
    before = cache_files(tmp_path, m, data)
    assert cache_files(tmp_path, m, data) == before
    def edited(*args): return seams.paper_cam(*args)
    edited.__module__ = "__main__"  # a page that was edited, whose function takes part
    with monkeypatch.context() as patch:
        patch.setitem(seams._FUNCTIONS["cam"], "gradcam", edited)
        after = cache_files(tmp_path, m, data)
        assert after["cam"] != before["cam"] and after["tokens"] == before["tokens"]
    monkeypatch.setattr(c, "feature_digest", lambda: "of other code")
    assert not set(cache_files(tmp_path, m, data).values()) & set(before.values())
    tokens = KeptTokens(tmp_path, m).folder
    monkeypatch.undo()
    assert KeptTokens(tmp_path, m).folder != tokens

def test_all_that_makes_a_feature_is_in_its_name():
    named = {f"weclip.{module}" for module in FEATURES}
    makers = (WeCLIP.encode, WeCLIP.cams, WeCLIP.tokens, seams.paper_cam, gradcam, FrozenCLIP.encode, preprocess, group,
              open_data, c._encode_rows)
    assert {maker.__module__ for maker in makers} <= named

def test_complete_features_may_lie_where_nobody_may_write(root, tmp_path, monkeypatch):
    m = model()
    data = training_set(root, m)
    FrozenCache(tmp_path, m, data, progress=False)
    monkeypatch.setattr(c, "FileLock", refuse)
    assert set(FrozenCache(tmp_path, m, data, progress=False).arrays) >= {"tokens", "cam"}

def test_regions_written_again_in_a_folder_are_seen(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path/name).write_bytes(b"1")
    before = c._stamps(tmp_path)
    (tmp_path/"b.png").write_bytes(b"12")
    assert c._stamps(tmp_path) != before and len(before) == 2 and c._stamps(tmp_path/"a.png") == before[:1]

def test_without_fixed_crops_there_is_nothing_to_keep(root, tmp_path):
    m = model(views=0)
    with pytest.raises(ValueError, match="views: expected at least one"):
        FrozenCache(tmp_path, m, training_set(root, m))

def test_scores_from_kept_tokens(root, tmp_path, monkeypatch):
    m = model().eval()
    data = open_data(root, "val", m.classes.classes, None, with_masks=True, norm=m.cfg.norm)
    def scores(x): return {k: s["miou"] for k, s in evaluate(x, data, modes=("single", "ms"), progress=False).items()}
    want = scores(m)
    kept = KeptTokens(tmp_path, m)
    assert scores(kept) == pytest.approx(want, abs=5e-3)
    assert len([*kept.folder.glob("*.npy")]) > len(data)
    monkeypatch.setattr(m, "tokens", refuse)
    assert scores(KeptTokens(tmp_path, m)) == pytest.approx(want, abs=5e-3)
    with pytest.raises(AssertionError, match="asked again"):
        kept.logits(torch.zeros(1, 3, 32, 32))
