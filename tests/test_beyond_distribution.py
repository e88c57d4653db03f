"""The affinity of class distributions: by hand, against loops, without NaN, frozen where it is CLIP's."""
import math
from dataclasses import replace
import open_clip, pytest, torch
import weclip.beyond.distribution as beyond
from torch import nn
from weclip.beyond.distribution import (
    agreement, clip_distributions, decoder_distributions, dense_features, plain_agreement)
from weclip.method.classes import ClassSet
from weclip.method.clip import FrozenCLIP
from weclip.method.config import preset
from weclip.method.model import WeCLIP
from weclip.engine.cache import FrozenCache
from weclip.engine.job import open_training
from weclip.engine.train import train
from weclip.engine.weights import build, load_model
from weclip.data.voc import batches
from weclip.world.scenes import write_scenes
from weclip.cli import main

SMALL = dict(iters=4, switch=0, warmup=1, bs=3, d=32, layers=1, heads=2)

def model(**settings): return build("tiny", preset("scenes", **{**SMALL, "affinity": "distribution", **settings}))

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=6, val=0, workers=1)

@pytest.fixture(scope="module")
def batch(root):
    m = model()
    return next(batches(open_training(m, root, "train"), 3, seed=1))

def tower(**vision):
    "A small encoder with random weights, and texts."
    torch.manual_seed(0)
    about = dict(image_size=32, layers=4, width=32, head_width=16, patch_size=8, **vision)
    text = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    clip = FrozenCLIP(open_clip.CLIP(16, about, text).eval())
    return clip, nn.functional.normalize(torch.randn(5, 16), dim=1)

def toy(n_feats, **vision):
    clip, text = tower(**vision)
    cfg = preset("scenes", n_feats=n_feats, n_static=3, n_dynamic=2, d=16, layers=1, heads=2,
                 affinity="distribution", pool=clip.pools)
    return WeCLIP(clip, text[:3], text[3:], ClassSet("toy", ("a", "b", "c"), ("a", "b", "c")), cfg).eval()

def jsd(p, q):
    "With Python's own numbers, from the definition by Kullback and Leibler."
    mixed = [(a + b)/2 for a, b in zip(p, q)]
    def kl(p): return sum(a*math.log(a/m) for a, m in zip(p, mixed) if a)
    return (kl(p) + kl(q))/2

def test_all_pairs_are_what_the_definition_says():
    torch.manual_seed(0)
    p = (3*torch.randn(2, 9, 5)).softmax(-1)
    p[0, :3] = torch.eye(5)[:3]
    p[1, 4] = torch.tensor([.5, .5, 0, 0, 0])
    for form in (plain_agreement, agreement):
        found = form(p)
        want = [[[1 - jsd(a, b)/math.log(2) for b in image] for a in image] for image in p.double().tolist()]
        assert (found - torch.tensor(want)).abs().max() < 2e-6
        assert found.min() >= 0 and found.max() <= 1
        assert found[0, 0, 1] == 0 and (found.diagonal(dim1=1, dim2=2) > 1 - 1e-6).all()

def test_blocks_do_not_change_values_or_gradients(monkeypatch):
    torch.manual_seed(0)
    logits = (5*torch.randn(2, 23, 6)).requires_grad_()
    weight = torch.randn(2, 23, 23)
    def results(form):
        loss = (weight*form(logits.softmax(-1))).sum()
        return loss.detach(), torch.autograd.grad(loss, logits)[0]
    want = results(plain_agreement)
    for room in (1, 1000, 10**6):
        monkeypatch.setitem(beyond.ROOM, "cpu", room)
        found = results(agreement)
        assert (found[0] - want[0]).abs() < 1e-4 and (found[1] - want[1]).abs().max() < 1e-5

def test_no_block_is_larger_than_it_may_be(monkeypatch):
    sizes = []
    real = beyond.entropy
    monkeypatch.setattr(beyond, "entropy", lambda p, dim=-1: sizes.append(p.numel()) or real(p, dim))
    monkeypatch.setitem(beyond.ROOM, "cpu", 20_000)
    agreement(torch.rand(2, 50, 8).softmax(-1))
    assert max(sizes) <= 20_000 < 2*50*50*8 and len(sizes) == 3

def test_certain_distributions_have_a_finite_gradient():
    logits = torch.tensor([[[300., 0, 0], [0, 300, 0], [300, 0, 0], [0, 0, 0]]], requires_grad=True)
    assert (logits.softmax(-1) == 0).any()
    for form in (plain_agreement, agreement):
        aff = form(logits.softmax(-1))
        assert aff[0, 0, 1] == 0 and aff[0, 0, 2] == 1
        gradient, = torch.autograd.grad(aff.sum(), logits)
        assert gradient.isfinite().all() and gradient[0, 3].abs().max() > 1e-3

def test_features_are_clips_own_where_a_patch_is_alone():
    "A sequence of one token attends to nothing but itself: there the value path is the block's attention."
    for vision in ({}, dict(final_ln_after_pool=True), dict(pool_type="avg"), dict(ls_init_value=.3)):
        clip, _ = tower(**vision)
        x = torch.randn(2, 7, clip.width)
        block = clip.blocks[-1]
        with torch.no_grad():
            a = block.ln_1(x).flatten(0, 1)[:, None]
            y = clip.visual.ln_post(block.ls_1(block.attn(a, a, a, need_weights=False)[0])[:, 0])
            want = nn.functional.normalize(y @ clip.visual.proj, dim=-1)
            assert (dense_features(clip, x).flatten(0, 1) - want).abs().max() < 1e-5, vision

def test_distributions_are_those_of_the_last_blocks_input(batch):
    m = model().eval()
    with torch.no_grad():
        out = m(batch.img, batch.tags)
        tokens = m.clip.encode(batch.img, m.clip.n_blocks - 1).tokens[-1][:, 1:]
        texts = torch.cat([m.text_fg, m.text_bg])
        want = (m.clip.scale*dense_features(m.clip, tokens) @ texts.T).softmax(-1)
        assert (clip_distributions(m, out) - want).abs().max() < 1e-5
        assert (out.aff - plain_agreement(want)).abs().max() < 1e-5
        sharper = model(**{"affinity.tau": 50.}).eval()
        sharp = (50*dense_features(m.clip, tokens) @ texts.T).softmax(-1)
        assert (sharper(batch.img, batch.tags).aff - plain_agreement(sharp)).abs().max() < 1e-5

def test_more_or_fewer_blocks_than_needed():
    img = torch.randn(1, 3, 32, 40)
    both = [toy(n) for n in (3, 4)]  # of 4 blocks: the input of the last, and its output, too
    found = [m(img, [[0, 2]]).aff for m in both]
    assert found[0].equal(found[1])
    m = toy(2)
    with pytest.raises(ValueError, match="n_feats >= 3 of 4 blocks, got 2; set n_feats, or affinity.of=decoder"):
        m(img, [[0, 2]])

def test_the_decoders_distributions_are_of_its_logits(batch):
    m = model(**{"affinity.of": "decoder"}).eval()
    out = m(batch.img, batch.tags)
    logits = out.logits.flatten(2).mT
    assert (out.aff - plain_agreement(logits.softmax(-1))).abs().max() < 1e-5
    assert (decoder_distributions(m, out.fu, 3.) - (3*logits).softmax(-1)).abs().max() < 1e-5
    with pytest.raises(ValueError, match="unknown affinity.of: 'clips'; did you mean 'clip'"):
        model(**{"affinity.of": "clips"})(batch.img, batch.tags)

def test_with_a_second_backbone_clip_has_its_own_tokens_and_the_decoder_two_halves(batch):
    m = model().eval()
    with torch.no_grad():
        out = m(batch.img, batch.tags)
        second = torch.randn(len(batch.img), 5, 5, 24)
        of_both = out._replace(tokens=(out.tokens[-1], second))  # block 11 of 12, and another tower's
        assert m.cfg.n_feats == 11 and clip_distributions(m, of_both).equal(clip_distributions(m, out))
        other = torch.randn_like(out.fu)
        logits = (m.decoder.head(out.fu) + m.decoder.head(other))/2
        found = decoder_distributions(m, torch.cat([out.fu, other], 1))
        assert (found - logits.flatten(2).mT.softmax(-1)).abs().max() < 1e-6
        m.cfg = replace(m.cfg, n_feats=12)                       # then the only one is the last block's output
        with pytest.raises(ValueError, match="expected the decoder to read the input of the last block"):
            clip_distributions(m, of_both)

def weights_after(root, out, **settings):
    m = model(**settings)
    train(m, open_training(m, root, "train"), out, progress=False)
    return torch.cat([p.detach().flatten() for p in m.decoder.parameters()])

def test_lambda_is_idle_where_the_distributions_are_clips(root, tmp_path):
    idle = [weights_after(root, tmp_path/f"clip{lam}", lam=lam) for lam in (0., .1, 5.)]
    assert idle[0].equal(idle[1]) and idle[0].equal(idle[2])
    of_decoder = {"affinity.of": "decoder"}
    alive = [weights_after(root, tmp_path/f"decoder{lam}", lam=lam, **of_decoder) for lam in (0., 5.)]
    assert not alive[0].equal(alive[1])

def test_kept_features_give_the_same_affinity(root, tmp_path):
    m = model(views=1)
    data = open_training(m, root, "train")
    kept = FrozenCache(tmp_path, m, data, progress=False)
    some = next(batches(data, 3, 1, views=1))
    both = [m.eval()(some.img, some.tags, frozen=frozen).aff for frozen in (kept(some), None)]
    assert (both[0] - both[1]).abs().max() < 2e-2 and both[0].dtype == torch.float32

def test_a_command_trains_with_it_and_the_file_remembers(root, tmp_path):
    words = ["train", str(root), "--out", str(tmp_path/"run"), "--plugin", "weclip.beyond.distribution", "--profile",
             "scenes", "--clip", "tiny", "--device", "cpu", "--train-split", "train", "--set", *(f"{k}={v}" for k, v in
             SMALL.items()), "affinity=distribution", "affinity.of=decoder", "affinity.tau=2."]
    assert main(words) == 0
    cfg = load_model(tmp_path/"run"/"model.safetensors").cfg
    assert (cfg.affinity, cfg.options) == ("distribution", (("affinity.of", "decoder"), ("affinity.tau", 2.)))
