"""What would spoil the page of `supervised`: that nothing of the weak branch runs, that a stopped run resumes,
and that padding does not count."""
from dataclasses import replace
import numpy as np, open_clip, pytest, torch
import weclip.method.seams
from weclip.method.config import preset
from weclip.method.classes import SCENES
from weclip.method.clip import FrozenCLIP
from weclip.method.losses import seg_loss_ce, upsample
from weclip.method.model import WeCLIP
from weclip.data.pictures import save_mask
from weclip.data.voc import Batch, SegData, open_data
from weclip.world.scenes import write_scenes
from weclip.engine.train import train, weak_loss
from weclip.engine.supervised import loss_for, supervised_loss
from weclip.engine.pseudo import score_stages

def toy(**kw):
    torch.manual_seed(0)
    vision = dict(image_size=32, layers=4, width=32, head_width=16, patch_size=8)
    words = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    clip = open_clip.CLIP(16, vision, words).eval()
    small = dict(n_feats=3, d=16, layers=1, heads=2, crop=32, bs=2, iters=6, warmup=2)
    cfg = preset("scenes", **{**dict(supervised=True), **small, **kw})
    text = torch.nn.functional.normalize(torch.randn(14, 16), dim=1)
    return WeCLIP(FrozenCLIP(clip), text[:7], text[7:], SCENES, cfg)

def random_batch(n=2, size=32):
    gen = torch.Generator().manual_seed(1)
    lbl = torch.randint(0, 8, (n, size, size), generator=gen)
    img = torch.randn(n, 3, size, size, generator=gen)
    return Batch(["a"]*n, img, [[]]*n, lbl, torch.ones_like(lbl, dtype=torch.bool))

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp("supervised")/"scenes", train=4, val=0, workers=1)
    return open_data(root, "train", SCENES.classes, tags_from=None, with_masks=True, crop=32, norm="clip")

def test_runs_nothing_of_the_weak_branch(monkeypatch):
    def refuse(*a, **k): raise AssertionError("called")
    for name in ("gradcam", "rfm", "pseudo_labels", "affinity_map", "total_loss"):
        monkeypatch.setattr(weclip.method.seams, name, refuse)
    monkeypatch.setattr("weclip.engine.weights.text_features", refuse)
    losses, out = supervised_loss(toy(), random_batch())
    assert out.cam is None and losses.aff == 0 and losses.total is losses.seg

def test_is_the_cross_entropy_of_the_prediction():
    for n_feats in (3, 4):  # 4: the last block too, the paper's N
        model = toy(n_feats=n_feats).eval()
        batch = random_batch()
        losses, out = supervised_loss(model, batch)
        assert out.logits.equal(model.logits(batch.img)), n_feats
        up = upsample(out.logits, (32, 32))
        torch.testing.assert_close(losses.seg, torch.nn.functional.cross_entropy(up, batch.lbl))
        assert losses.seg.equal(seg_loss_ce(up, batch.lbl)), n_feats

def test_functions_that_only_tags_need_are_refused():
    assert loss_for(preset("scenes", supervised=True)) is supervised_loss
    with pytest.raises(ValueError, match="expected no function that only tags need, got .'cam=surgery', 'loss=plus'."):
        loss_for(preset("scenes", supervised=True, cam="surgery", loss="plus"))

def test_unlabelled_pixels_carry_no_gradient():
    model = toy().eval()
    batch = random_batch()
    batch.lbl[:, :16] = 255
    other = batch._replace(lbl=batch.lbl.clone())
    other.lbl[1] = 255
    alone = batch._replace(img=batch.img[:1], lbl=batch.lbl[:1])
    without = supervised_loss(model, other)[0].total  # image 1 does not count
    torch.testing.assert_close(without, supervised_loss(model, alone)[0].total)
    empty = batch._replace(lbl=torch.full_like(batch.lbl, 255))
    loss = supervised_loss(model, empty)[0].total
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in model.decoder.parameters())

def interrupt(i, _):
    "Ctrl-C after the second step."
    if i == 1: raise KeyboardInterrupt

def test_trains_and_resumes(data, tmp_path):
    whole = toy()
    parts = toy()
    loss = loss_for(whole.cfg)
    history = train(whole, data, tmp_path/"whole", loss=loss, progress=False, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(parts, data, tmp_path/"parts", loss=loss, progress=False, on_step=interrupt)
    parts = toy()
    train(parts, data, tmp_path/"parts", loss=loss, resume=True, progress=False)
    for a, b in zip(whole.decoder.parameters(), parts.decoder.parameters()):
        assert a.equal(b)
    h = np.array(history)
    assert h.shape == (6, 5) and (h[:, 1] == h[:, 2]).all() and (h[:, 3] == 0).all()

def test_a_run_keeps_its_supervision(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(toy(), data, tmp_path, loss=supervised_loss, progress=False, on_step=interrupt)
    with pytest.raises(ValueError, match="supervised was True"):
        train(toy(supervised=False), data, tmp_path, loss=weak_loss, resume=True, progress=False)

def test_what_the_settings_call_supervised_learns_from_no_tag(data, tmp_path):
    "The default loss is the one that learns from tags: a number of Table 7 would have been one of Table 4."
    with pytest.raises(ValueError, match="expected that of full supervision"):
        train(toy(), data, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())

def test_a_run_keeps_its_words(data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(toy(), data, tmp_path, loss=supervised_loss, progress=False, on_step=interrupt)
    others = dict(template="a drawing of a {}.", prompts=SCENES.prompts[::-1], background=("sky",))
    for name, words in others.items():
        other = toy()
        other.classes = replace(SCENES, **{name: words})
        with pytest.raises(ValueError, match=f"expected the {name} of the run"):
            train(other, data, tmp_path, loss=supervised_loss, resume=True, progress=False)

def test_masks_without_an_object_teach_nothing(data, tmp_path):
    "Objects marked 255 alone: training ran on background, and label maps were scored on it, without a word."
    masks = {i: tmp_path/f"{i}.png" for i in data.ids}
    says = f"no object class occurs in any of the {len(data)} masks.*255"
    for values in ((0, 255), (0,), (255,)):
        for i, p in masks.items():
            save_mask(p, np.resize(np.array(values, np.uint8), data.read(i)[1].shape))
        spoilt = SegData(data.images, dict.fromkeys(data.ids, [0]), data.names, masks, crop=32, norm="clip")
        for model in (toy(), toy(supervised=False)):
            with pytest.raises(ValueError, match=says):
                train(model, spoilt, tmp_path/"run", loss=supervised_loss, progress=False)
        with pytest.raises(ValueError, match=says):
            score_stages(toy(), spoilt, progress=False)
        assert not (tmp_path/"run").exists(), values

def test_needs_masks():
    with pytest.raises(ValueError, match="with_masks=True"):
        supervised_loss(toy(), random_batch()._replace(lbl=None))

def test_the_settings_choose():
    assert loss_for(preset("voc", supervised=True)) is supervised_loss and loss_for(preset("voc")) is weak_loss
