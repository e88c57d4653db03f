"""What must hold whatever the numbers.

Bounds, symmetry, order of images and classes, padding, batches, dtype and device, constant input.
"""
import functools
import itertools

import numpy as np, open_clip, torch, torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close

from weclip.method.config import preset
from weclip.method.batch import group, minmax, pairs, slots
from weclip.method.clip import FrozenCLIP
from weclip.method.cam import gradcam
from weclip.method.rfm import (
    affinity_map, box_mask, components, disagreement, gate, gated_mean, is_dynamic, refine_cam, refining_map, rfm,
    sinkhorn, transition)
from weclip.method.par import (
    affinity, diffuse, offsets, par, plain_par, pseudo_labels, upsample_cam, winner, with_background)
from weclip.method.losses import aff_loss_ce, aff_loss_l1, affinity_label, seg_loss_balanced, seg_loss_ce, total_loss
from weclip.method.metrics import confusion, iou, mean_iou, scores
from weclip.data.pictures import NORMS, crop_pad, preprocess, random_crop
from weclip.engine.infer import fit_size, mask_stream, multi_scale_logits

settings.register_profile("weclip", deadline=None, derandomize=True, database=None, max_examples=50,
                          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("weclip")

DEVICES = ["meta", "cuda"] if torch.cuda.is_available() else ["meta"]  # "meta" has no numbers
seeds = st.integers(0, 2**31)
small = st.integers(1, 5)
floats = st.sampled_from([torch.float32, torch.float64])
kinds = st.sampled_from(["random", "ties", "zeros", "ones", "one", "tiny"])

def values(shape, seed, kind="random", dtype=torch.float64):
    "Numbers in [0, 1]: random, from a coarse scale, constant, a single one, or all next to nothing."
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one = torch.zeros_like(x)
    one.view(-1)[seed % max(x.numel(), 1):][:1] = 1
    return dict(random=x, ties=(4*x).round()/4, zeros=x*0, ones=x*0 + 1, one=one, tiny=x*1e-12)[kind].to(dtype)

def ints(shape, seed, high, ignored=0.):
    "Class ids below `high`, a share of them replaced by 255."
    gen = torch.Generator().manual_seed(seed)
    x = torch.randint(high, shape, generator=gen)
    return x.masked_fill(torch.rand(shape, generator=gen) < ignored, 255)

def shuffled(n, seed): return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
def stochastic(shape, seed, kind, dtype=torch.float64):
    x = values(shape, seed, kind, dtype) + 1e-3
    return x/x.sum(-1, keepdim=True)

@st.composite
def tagged(draw, n_classes=4):
    "Tags of up to four images, some without any, or of eight."
    n = draw(st.sampled_from([1, 2, 3, 4, 8]))
    of_image = st.lists(st.integers(0, n_classes - 1), unique=True, max_size=3)
    return draw(st.lists(of_image, min_size=n, max_size=n).filter(any))

def rows_of(tags, order):
    "Rows that the pairs of `tags` take when the images are put in `order`."
    first = np.cumsum([0] + [len(t) for t in tags])
    return [r for i in order for r in range(first[i], first[i + 1])]

# ---- pairs and CAM

@functools.lru_cache
def clip(dtype=torch.float32):
    torch.manual_seed(0)
    return FrozenCLIP(open_clip.CLIP(16, dict(image_size=32, layers=2, width=32, head_width=16, patch_size=8),
                                     dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)).to(dtype))

def cams(img, tags, pool="patches", text=None, dtype=torch.float32, n_bg=2):
    text = F.normalize(values((4 + n_bg, 16), 5).to(dtype) - .5, dim=-1) if text is None else text
    enc = clip(dtype).encode(img.to(dtype))
    return gradcam(clip(dtype), enc.tokens[-1], enc.grid, text[:-n_bg], text[-n_bg:], *pairs(tags), pool)

def images(n, seed, kind="random", side=32, dtype=torch.float32):
    return 2*values((n, 3, side, side), seed, kind, dtype) - 1

pools = st.sampled_from(["patches", "cls"])

@given(tagged(), seeds)
def test_pairs_do_not_depend_on_order_or_repetition(tags, seed):
    mixed = [[t[j] for j in shuffled(len(t), seed)]*2 for t in tags]
    for a, b in zip(pairs(tags), pairs(mixed)):
        assert a.equal(b)
    img_idx, tag_idx = pairs(tags)
    rows = list(zip(img_idx.tolist(), tag_idx.tolist()))
    assert sorted(rows) == rows and len(rows) == sum(map(len, tags))

@given(tagged(), seeds)
def test_groups_are_undone_and_add_nothing(tags, seed):
    img_idx, _ = pairs(tags)
    x = values((len(img_idx), 3), seed) + 1
    g = group(x, img_idx, len(tags))
    assert g[img_idx, slots(img_idx)].equal(x) and (g != 0).all(2).sum() == len(x)

@given(tagged(), seeds, kinds, pools)
def test_cams_are_bounded_and_scores_are_shares(tags, seed, kind, pool):
    c = cams(images(len(tags), seed, kind), tags, pool)
    assert c.cam.min() >= 0 and c.cam.max() <= 1 and c.raw.isfinite().all() and c.weights.isfinite().all()
    assert (c.cam.amax((1, 2))[c.raw.amax((1, 2)) > 1e-3] > .99).all()  # stretched
    assert_close(c.scores.sum(1), torch.ones(len(c.scores)))
    for row, i in zip(c.scores[:, :4], pairs(tags)[0]):
        assert set(row.nonzero().flatten().tolist()) <= set(tags[i])

@given(tagged(), seeds, pools)
def test_cams_of_a_batch_are_those_of_its_images(tags, seed, pool):
    img = images(len(tags), seed, dtype=torch.float64)
    whole = cams(img, tags, pool, dtype=torch.float64)
    i = pairs(tags)[0]
    alone = [cams(x[None], [t], pool, dtype=torch.float64) for x, t in zip(img, tags) if t]
    assert_close(whole.cam, torch.cat([c.cam for c in alone]), atol=1e-9, rtol=0)
    assert_close(whole.scores, torch.cat([c.scores for c in alone]))
    assert_close(whole.attn[i.unique()], torch.cat([c.attn for c in alone]))

@given(tagged(), seeds, pools)
def test_cams_follow_the_order_of_images_and_classes(tags, seed, pool):
    img = images(len(tags), seed, dtype=torch.float64)
    text = F.normalize(values((6, 16), 5) - .5, dim=-1)
    tags = [sorted(t) for t in tags]
    base = cams(img, tags, pool, text, torch.float64)
    order = shuffled(len(tags), seed)
    moved = cams(img[order], [tags[i] for i in order], pool, text, torch.float64)
    assert_close(moved.cam, base.cam[rows_of(tags, order)], atol=1e-9, rtol=0)
    perm = shuffled(4, seed)                                  # class perm[j] is now called j
    name = perm.argsort().tolist()
    renamed = torch.cat([text[:4][perm], text[4:]])
    other = cams(img, [[name[t] for t in ts] for ts in tags], pool, renamed, torch.float64)
    a, ta = pairs(tags)
    b, tb = pairs([[name[t] for t in ts] for ts in tags])
    where = {(i, perm[t].item()): k for k, (i, t) in enumerate(zip(b.tolist(), tb.tolist()))}
    assert_close(base.cam, other.cam[[where[k] for k in zip(a.tolist(), ta.tolist())]], atol=1e-9, rtol=0)

@given(tagged(n_classes=3), seeds)
def test_a_class_without_a_tag_does_not_compete(tags, seed):
    img = images(len(tags), seed, dtype=torch.float64)
    text = F.normalize(values((6, 16), 5) - .5, dim=-1)
    with_it = cams(img, tags, text=text, dtype=torch.float64)
    without = cams(img, tags, text=text[[0, 1, 2, 4, 5]], dtype=torch.float64)
    assert_close(with_it.cam, without.cam, atol=1e-12, rtol=0)

def test_cams_keep_dtype_and_survive_a_constant_picture():
    failed = []
    for dtype, pool in itertools.product([torch.float32, torch.float64], ["patches", "cls"]):
        c = cams(torch.zeros(1, 3, 32, 40), [[0, 3]], pool, dtype=dtype)
        is_right = {x.dtype for x in c} == {dtype} and c.cam.shape == (2, 4, 5) and c.cam.isfinite().all()
        if not is_right:
            failed.append((dtype, pool))
    assert not failed

@given(st.tuples(small, small, small), seeds, kinds, st.floats(.1, 1e3), st.floats(-10, 10))
def test_minmax(shape, seed, kind, gain, shift):
    x = values(shape, seed, kind)
    y = minmax(x)
    assert y.min() >= 0 and y.max() <= 1 and ((y == 0).all((1, 2)) == (x.amax((1, 2)) == x.amin((1, 2)))).all()
    if kind in ("random", "ties"):
        assert_close(minmax(gain*x + shift), y, atol=1e-4, rtol=1e-4)  # up to the 1e-7 in the denominator
    assert_close(y, torch.cat([minmax(one[None]) for one in x]))

# ---- RFM

@given(st.tuples(small, small, small, small), seeds, kinds, floats)
def test_affinity_is_symmetric_and_a_share(shape, seed, kind, dtype):
    fu = (20*values(shape, seed, kind, dtype) - 10)
    a = affinity_map(fu)
    assert a.dtype == dtype and a.min() >= 0 and a.max() <= 1 and (a.diagonal(dim1=1, dim2=2) >= .5).all()
    assert_close(a, a.mT)
    assert_close(a, torch.cat([affinity_map(f[None]) for f in fu]))
    chan = shuffled(shape[1], seed)
    tok = shuffled(a.shape[1], seed)
    assert_close(affinity_map(fu[:, chan]), a)
    assert_close(affinity_map(fu.flatten(2)[:, :, tok].unflatten(2, shape[2:])), a[:, tok][:, :, tok])

@given(st.integers(1, 4), st.integers(1, 6), small, seeds, kinds, floats)
def test_disagreement(b, n, l, seed, kind, dtype):
    aff = values((b, l, l), seed, kind, dtype)
    attn = values((b, n, l, l), seed + 1, dtype=dtype)
    s = disagreement(aff, attn)
    d = disagreement(aff, attn, signed=False)
    assert s.dtype == torch.float64 and s.shape == (b, n) and (d >= s.abs() - 1e-4).all()
    assert_close(disagreement(aff, aff[:, None]), s.new_zeros(b, 1))
    assert_close(disagreement(aff, aff[:, None], False), s.new_zeros(b, 1))
    order = shuffled(n, seed)
    assert_close(disagreement(aff, attn[:, order]), s[:, order])
    assert_close(disagreement(aff, attn[:, order], False), d[:, order])

@given(st.integers(1, 4), st.integers(1, 8), seeds, kinds, st.integers(-50, 50))
def test_gate(b, n, seed, kind, shift):
    s = (64*values((b, n), seed, kind)).round()  # whole numbers: sums and shifts are exact
    keep = gate(s)
    assert keep.any(1).all() and keep.equal(n*s <= s.sum(1, keepdim=True))
    assert keep.gather(1, s.argmin(1, keepdim=True)).all()
    order = shuffled(n, seed)
    assert gate(s + shift).equal(keep) and gate(s[:, order]).equal(keep[:, order]) and gate(s[:1]).equal(keep[:1])

@given(st.integers(1, 3), st.integers(1, 5), small, seeds, st.booleans())
def test_gated_mean(b, n, l, seed, none):
    attn = values((b, n, l, l), seed)
    keep = values((b, n), seed + 1) > (2 if none else .4)
    m = gated_mean(attn, keep)
    assert m.isfinite().all() and m.min() >= 0 and (m <= attn.amax(1) + 1e-9).all()
    for i in range(b):
        assert_close(m[i], attn[i][keep[i]].sum(0)/max(keep[i].sum().item(), 1), rtol=2e-5, atol=0)

SWITCHES = [dict(dynamic=False), {}, dict(signed=False), dict(use_aff=False), dict(use_gate=False),
            dict(use_attn=False), dict(use_aff=False, use_gate=False)]

@given(st.integers(1, 3), st.integers(1, 9), small, seeds, kinds, st.sampled_from(SWITCHES))
def test_refining_map(b, n, l, seed, kind, kw):
    aff = values((b, l, l), seed, kind)
    attn = values((b, n, l, l), seed + 1)
    kw = {**kw, "n_static": min(n, 8), "n_dynamic": min(n, 6)}
    r = refining_map(attn, aff, **kw)
    assert r.shape == (b, l, l) and r.min() >= 0 and r.max() <= 1
    assert_close(r, torch.cat([refining_map(attn[i:i+1], aff[i:i+1], **kw) for i in range(b)]))
    tok = shuffled(l, seed)
    assert_close(refining_map(attn[:, :, tok][..., tok], aff[:, tok][..., tok], **kw), r[:, tok][..., tok])
    switches = [kw.get(name, True) for name in ("dynamic", "use_aff", "use_gate")]
    used = kw["n_dynamic" if is_dynamic(*switches) else "n_static"]
    other = attn.clone()
    other[:, :-used] = 1
    assert_close(refining_map(other, aff, **kw), r)  # maps further back do not count

@given(st.integers(1, 3), small, seeds, kinds, st.floats(1e-3, 1e3), floats)
def test_sinkhorn(b, l, seed, kind, gain, dtype):
    r = values((b, l, l), seed, kind, dtype)
    t = sinkhorn(r)
    assert t.dtype == dtype and t.min() >= 0 and t.isfinite().all()
    assert_close(t.sum(2), (r.sum(2) > 0).to(dtype))           # rows sum to 1, empty ones stay empty
    assert (t.eq(0) == r.eq(0)).all()
    assert_close(sinkhorn(r*gain), t, rtol=1e-4, atol=1e-5)
    tok = shuffled(l, seed)
    assert_close(sinkhorn(r[:, tok][..., tok]), t[:, tok][..., tok])
    assert_close(sinkhorn(r[:1]), t[:1])
    if kind in ("random", "ones"):
        assert ((sinkhorn(r + .1, 60).sum(1) - 1).abs() < 1e-3).all()

@given(st.integers(1, 3), small, seeds, kinds, st.integers(1, 3))
def test_transition(b, l, seed, kind, alpha):
    r = values((b, l, l), seed, kind)
    t = transition(r, alpha=alpha)
    assert t.isfinite().all() and t.min() >= 0
    assert_close(t, t.mT)
    assert_close(transition(r, alpha=1) @ transition(r, alpha=1), transition(r))
    tok = shuffled(l, seed)
    assert_close(transition(r[:, tok][..., tok], alpha=alpha), t[:, tok][..., tok])
    assert_close(transition(torch.ones_like(r)), torch.full_like(r, 1/l))

def regions(fg):
    "Sets of 8-connected patches, found by walking."
    left = {(y, x) for y, x in fg.nonzero().tolist()}
    found = []
    while left:
        todo = [left.pop()]
        seen = set()
        while todo:
            y, x = todo.pop()
            seen.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            todo += near
        found.append(seen)
    return found

@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), seeds, st.floats(.1, .9))
def test_components_are_connected_regions(p, h, w, seed, share):
    fg = values((p, h, w), seed) < share
    for one, name in zip(fg, components(fg)):
        by_name = {}
        for y, x in one.nonzero().tolist():
            by_name.setdefault(name[y, x].item(), set()).add((y, x))
        assert sorted(map(sorted, by_name.values())) == sorted(map(sorted, regions(one)))

@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), seeds, kinds, st.floats(0, .95))
def test_boxes(p, h, w, seed, kind, thr):
    cam = values((p, h, w), seed, kind, torch.float32)
    box = box_mask(cam, thr, open_border=False)
    grey = (cam*255).floor()
    strong = grey > (thr*grey.amax((1, 2), keepdim=True).double()).floor()
    for got, one in zip(box, strong):                         # the union of the regions' boxes, by walking
        want = torch.zeros_like(got)
        for r in regions(one):
            ys, xs = zip(*r)
            want[min(ys):max(ys) + 1, min(xs):max(xs) + 1] = True
        assert got.equal(want)
    border = box.clone()
    border[:, -1] = False
    border[:, :, -1] = False
    assert box_mask(cam, thr).equal(border)
    assert box_mask(cam.flip(2), thr, False).equal(box.flip(2)) and box_mask(cam.mT, thr, False).equal(box.mT)
    assert not (box_mask(cam, min(1, thr + .2), False) & ~box).any()

@given(tagged(), st.integers(1, 4), st.integers(1, 4), seeds, kinds)
def test_refined_cams(tags, h, w, seed, kind):
    img_idx, _ = pairs(tags)
    cam = values((len(img_idx), h, w), seed, kind)
    l = h*w
    all_in = torch.ones_like(cam, dtype=torch.bool)
    one = torch.eye(l, dtype=cam.dtype).expand(len(tags), l, l)
    trans = transition(values((len(tags), l, l), seed + 1))
    assert_close(refine_cam(cam, one, all_in, img_idx), cam)
    assert (refine_cam(cam, trans, ~all_in, img_idx) == 0).all()
    r = refine_cam(cam, trans, all_in, img_idx)
    assert r.min() >= 0 and (r.amax((1, 2)) <= cam.amax((1, 2))*trans.sum(2).amax(1)[img_idx] + 1e-9).all()
    assert_close(refine_cam(3*cam, trans, all_in, img_idx), 3*r)
    assert_close(r.flatten(1), torch.stack([trans[i] @ c.flatten() for i, c in zip(img_idx, cam)]))

sides = st.integers(1, 4)

@given(tagged(), sides, sides, st.integers(1, 8), seeds, kinds, st.sampled_from(SWITCHES), floats)
def test_rfm_of_a_batch(tags, h, w, n, seed, kind, kw, dtype):
    i, _ = pairs(tags)
    l = h*w
    cam = values((len(i), h, w), seed, kind, dtype)
    attn = stochastic((len(tags), n, l, l), seed + 1, "random", dtype)
    aff = affinity_map(values((len(tags), 3, h, w), seed + 2, dtype=dtype) - .5).requires_grad_()
    kw = {**kw, "n_static": min(n, 8), "n_dynamic": min(n, 6)}
    out = rfm(cam, attn, aff, i, **kw)
    assert out.dtype == dtype and out.shape == cam.shape and not out.requires_grad
    assert out.isfinite().all() and out.min() >= 0
    alone = [rfm(cam[i == b], attn[b:b+1], aff[b:b+1], i[i == b]*0, **kw) for b in i.unique()]
    assert_close(out, torch.cat(alone), rtol=1e-4, atol=1e-5)
    order = shuffled(len(tags), seed)
    rows = rows_of(tags, order)
    moved = rfm(cam[rows], attn[order], aff[order], pairs([tags[b] for b in order])[0], **kw)
    assert_close(moved, out[rows], rtol=1e-4, atol=1e-5)
    assert_close(rfm(cam, attn, aff, i, k=4, **kw), out)

# ---- PAR and pseudo labels

NEAR = (1, 2)

@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), seeds, kinds, floats)
def test_par_weights(b, h, w, seed, kind, dtype):
    img = values((b, 3, h, w), seed, kind, dtype)
    a = affinity(img, NEAR)
    assert a.dtype == dtype and a.shape == (b, 16, h, w) and a.min() >= 0
    assert_close(a.sum(1), torch.full((b, h, w), 1.01, dtype=dtype))
    assert_close(a, torch.cat([affinity(i[None], NEAR) for i in img]))
    assert_close(affinity(img[:, [2, 0, 1]], NEAR), a)
    if kind == "random" and dtype is torch.float64:
        assert_close(affinity(3*img + 5, NEAR), a, rtol=1e-4, atol=1e-5)  # neither brightness nor contrast counts
    mirror = [offsets(NEAR).index((dy, -dx)) for dy, dx in offsets(NEAR)]
    assert_close(affinity(img.flip(3), NEAR), a[:, mirror].flip(3), rtol=1e-4, atol=1e-6)

@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), seeds, kinds, st.integers(0, 3))
def test_par(b, k, h, w, seed, kind, iters):
    img = values((b, 3, h, w), seed, kind)
    masks = values((b, k, h, w), seed + 1)
    out = par(img, masks, iters, NEAR)
    grow = 1.01**iters
    assert out.isfinite().all()
    assert (out >= grow*masks.amin((2, 3), keepdim=True) - 1e-9).all()
    assert (out <= grow*masks.amax((2, 3), keepdim=True) + 1e-9).all()
    assert_close(par(img, torch.ones_like(masks), iters, NEAR), torch.full_like(masks, grow))
    assert_close(par(img, 2*masks + .5, iters, NEAR), 2*out + .5*grow)
    order = shuffled(b, seed)
    chan = shuffled(k, seed)
    assert_close(par(img[order], masks[order][:, chan], iters, NEAR), out[order][:, chan])
    assert_close(par(img.flip(2), masks.flip(2), iters, NEAR), out.flip(2))
    assert_close(diffuse(masks, affinity(img, NEAR), NEAR), par(img, masks, 1, NEAR))

@given(st.integers(1, 3), small, small, st.integers(1, 9), st.integers(1, 9), seeds, kinds)
def test_upsampled_cams_and_background(p, h, w, H, W, seed, kind):
    up = upsample_cam(7*values((p, h, w), seed, kind) - 3, (H, W))
    assert up.shape == (p, H, W) and up.min() >= 0 and up.max() <= 1
    s = with_background(up[None])
    assert_close(s[:, 0] + s[:, 1:].amax(1), torch.ones(1, H, W, dtype=s.dtype))

@given(tagged(), seeds, kinds, kinds, st.sampled_from([1, .5]), st.integers(0, 2))
def test_pseudo_labels(tags, seed, kind, pixels, par_scale, iters):
    i, t = pairs(tags)
    size = (9, 7)
    tags = [sorted(x) for x in tags]
    cam = values((len(i), 3, 4), seed, kind)
    img = values((len(tags), 3, *size), seed + 1, pixels)
    label = functools.partial(pseudo_labels, size=size, par_scale=par_scale, iters=iters, dilations=NEAR)
    out = label(cam, img, i, t)
    assert out.shape == (len(tags), *size) and out.dtype == torch.long
    for lbl, ts in zip(out, tags):
        assert set(lbl.unique().tolist()) <= {0, *(x + 1 for x in ts)}
    if kind in ("zeros", "ones"):
        assert (out == 0).all()     # a constant CAM points at nothing
    assert label(cam, img, i, t, k=4).equal(out)
    if kind == "random" and pixels == "random":               # elsewhere scores may be equal and rounding decides
        order = shuffled(len(tags), seed)
        assert label(cam[rows_of(tags, order)], img[order], *pairs([tags[b] for b in order])).equal(out[order])
        for b, ts in enumerate(tags):
            assert label(cam[i == b], img[b:b+1], *pairs([ts])).equal(out[b:b+1])

@given(tagged(), seeds)
def test_the_winner_has_the_largest_score(tags, seed):
    i, t = pairs(tags)
    most = max(map(len, tags))
    scores = values((len(tags), 1 + most, 3, 3), seed)
    for s, w, ts in zip(scores, winner(scores, i, t), map(sorted, tags)):
        ids = torch.tensor([0] + [x + 1 for x in ts])
        assert w.equal(ids[s[:len(ids)].argmax(0)])

# ---- affinity label and losses

shares = st.sampled_from([0., .5, 1.])

@given(st.integers(1, 3), small, small, st.integers(1, 3), seeds, st.sampled_from([0., .3, 1.]), st.integers(0, 3))
def test_affinity_labels(b, h, w, zoom, seed, ignored, radius):
    lbl = ints((b, h*zoom, w*zoom), seed, 5, ignored)
    a = affinity_label(lbl, (h, w), radius)
    assert a.shape == (b, h*w, h*w) and a.equal(a.mT) and set(a.unique().tolist()) <= {0, 1, 255}
    known = lbl[:, ::zoom, ::zoom].flatten(1) != 255
    assert (a.diagonal(dim1=1, dim2=2) == torch.where(known, 1, 255)).all() and (a[~known] == 255).all()
    new = torch.cat([shuffled(5, seed) + 10, torch.full((251,), 255)])  # other names for the classes
    assert affinity_label(new[lbl], (h, w), radius).equal(a)
    assert affinity_label(lbl[:1], (h, w), radius).equal(a[:1])
    wide = F.pad(lbl, (0, 2*zoom, 0, zoom), value=255)        # padding joins nothing
    inner = torch.arange((h + 1)*(w + 2)).view(h + 1, w + 2)[:h, :w].flatten()
    b_ = affinity_label(wide, (h + 1, w + 2), radius)
    assert b_[:, inner][..., inner].equal(a) and (b_ != 255).sum() == (a != 255).sum()
    assert not ((a != 255) & (affinity_label(lbl, (h, w), 0) == 255)).any()

seg_losses = st.sampled_from([seg_loss_ce, seg_loss_balanced])
aff_losses = st.sampled_from([aff_loss_l1, aff_loss_ce])

@given(seg_losses, st.integers(1, 3), st.integers(2, 4), small, small, seeds, shares, st.sampled_from([1, 1e4]))
def test_seg_losses(loss, b, c, h, w, seed, ignored, size):
    x = (size*(2*values((b, c, h, w), seed) - 1)).requires_grad_()
    lbl = ints((b, h, w), seed, c, ignored)
    v = loss(x, lbl)
    g, = torch.autograd.grad(v, x)
    assert v.ndim == 0 and v >= 0 and v.isfinite() and g.isfinite().all()
    assert (g.movedim(1, -1)[lbl == 255] == 0).all() and (v == 0 if (lbl == 255).all() else True)
    order = shuffled(b, seed)
    assert_close(loss(x[order], lbl[order]), v)
    assert_close(loss(F.pad(x, (0, 2, 1, 0), value=3.), F.pad(lbl, (0, 2, 1, 0), value=255)), v)
    assert_close(loss(torch.cat([x, x]), torch.cat([lbl, lbl])), v)
    assert_close(loss(x + 7, lbl), v)
    perm = torch.cat([torch.tensor([0]), 1 + shuffled(c - 1, seed)]) if loss is seg_loss_balanced else shuffled(c, seed)
    name = torch.cat([perm.argsort(), torch.full((256 - c,), 255)])
    assert_close(loss(x[:, perm], name[lbl]), v)
    right = F.one_hot(lbl.clamp(max=c - 1), c).movedim(-1, 1)
    assert loss(x.detach() + 1e3*size*right, lbl) <= v.detach() + 1e-9

@given(seg_losses, st.integers(2, 4), st.integers(2, 3), seeds)
def test_seg_loss_of_a_batch_is_the_mean_where_shares_are_equal(loss, b, c, seed):
    x = 6*values((b, c, 2, 4), seed) - 3
    lbl = torch.stack([torch.arange(8).view(2, 4) % c]*b)
    assert_close(loss(x, lbl), torch.stack([loss(i[None], l[None]) for i, l in zip(x, lbl)]).mean())

@given(aff_losses, st.integers(1, 3), small, seeds, kinds, shares)
def test_aff_losses(loss, b, l, seed, kind, ignored):
    a = values((b, l, l), seed, kind).requires_grad_()
    lbl = ints((b, l, l), seed, 2, ignored).to(torch.uint8)
    v = loss(a, lbl)
    g, = torch.autograd.grad(v, a)
    assert v.ndim == 0 and v >= 0 and v.isfinite() and g.isfinite().all() and (g[lbl == 255] == 0).all()
    assert (g[lbl == 1] <= 0).all() and (g[lbl == 0] >= 0).all() and (loss is aff_loss_ce or v <= 1)
    assert_close(loss(a.flip(0).mT, lbl.flip(0).mT), v)
    assert_close(loss(F.pad(a, (0, 1, 0, 2), value=.3), F.pad(lbl, (0, 1, 0, 2), value=255)), v)
    assert loss((lbl == 1).to(a.dtype), lbl) == 0
    if loss is aff_loss_ce:
        assert_close(loss(torch.cat([a, a]), torch.cat([lbl, lbl])), v)

@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), seeds, floats, shares, st.sampled_from([0, .1, 2.]))
def test_total_loss(b, h, w, seed, dtype, ignored, lam):
    x, fu = (values((b, n, h, w), seed, dtype=dtype).requires_grad_() for n in (3, 2))
    pseudo = ints((b, 2*h, 3*w), seed, 3, ignored)
    v = total_loss(x, affinity_map(fu), pseudo, (h, w), lam=lam)
    assert_close(v.total, v.seg + lam*v.aff)
    assert v.total.dtype == dtype
    g = torch.autograd.grad(v.total, (x, fu))
    assert all(i.isfinite().all() for i in (*v, *g)) and (ignored < 1 or all((i == 0).all() for i in (*v, *g)))
    order = shuffled(b, seed)
    assert_close(tuple(total_loss(x[order], affinity_map(fu[order]), pseudo[order], (h, w), lam=lam)), tuple(v))

# ---- metrics

integers = st.sampled_from([torch.uint8, torch.int32, torch.long])

@given(st.integers(1, 5), st.integers(0, 60), seeds, st.sampled_from([0., .3, 1.]), integers)
def test_confusion(c, n, seed, ignored, dtype):
    pred = ints((n,), seed, c)
    lbl = ints((n,), seed + 1, c, ignored)
    m = confusion(pred.to(dtype), lbl.to(dtype), c)
    assert m.shape == (c, c) and m.dtype == torch.long and m.min() >= 0
    assert m.tolist() == [[int(((lbl == t) & (pred == p)).sum()) for p in range(c)] for t in range(c)]
    order = shuffled(n, seed)
    half = n//2
    assert confusion(pred[order], lbl[order], c).equal(m)
    assert (confusion(pred[:half], lbl[:half], c) + confusion(pred[half:], lbl[half:], c)).equal(m)  # batches add up
    assert confusion(F.pad(pred, (0, 9)), F.pad(lbl, (0, 9), value=255), c).equal(m)
    perm = shuffled(c, seed)
    name = torch.cat([perm.argsort(), torch.full((256 - c,), 255)])
    assert confusion(name[pred], name[lbl], c).equal(m[perm][:, perm])

@given(st.integers(1, 5), st.integers(1, 60), seeds, st.booleans())
def test_iou(c, n, seed, sparse):
    pred = ints((n,), seed, 1 if sparse else c)
    lbl = ints((n,), seed + 1, c)
    m = confusion(pred, lbl, c)
    v = iou(m)
    miou = mean_iou(m)
    assert ((v >= 0) & (v <= 1) | v.isnan()).all() and 0 <= miou <= 1
    for k in range(c):
        a, b = (set((x == k).nonzero().flatten().tolist()) for x in (pred, lbl))
        assert (v[k].isnan() if not a | b else abs(v[k].item() - len(a & b)/len(a | b)) < 1e-12)
    assert_close(iou(m.T), v, equal_nan=True)
    assert_close(iou(3*m), v, equal_nan=True)
    assert mean_iou(confusion(lbl, lbl, c)) == 1
    perm = shuffled(c, seed)
    assert abs(mean_iou(m[perm][:, perm]) - miou) < 1e-12
    s = scores(m, list(map(str, range(c))))
    assert 0 <= s["pixel_acc"] <= 1 and 0 <= s["mean_acc"] <= 1
    assert abs(s["pixel_acc"] - (pred == lbl).double().mean()) < 1e-12

# ---- pictures

@given(st.lists(small, max_size=2), small, small, seeds, st.sampled_from(list(NORMS)))
def test_preprocess(batch, h, w, seed, norm):
    img = ints((*batch, h, w, 3), seed, 256).to(torch.uint8)
    x = preprocess(img, norm)
    assert x.dtype == torch.float32 and x.shape == (*batch, 3, h, w) and x.equal(preprocess(img.numpy(), norm))
    mean, std = (torch.tensor(v) for v in NORMS[norm])
    assert ((x.movedim(-3, -1)*std + mean)*255).round().to(torch.uint8).equal(img)
    assert preprocess(img.flip(-2), norm).equal(x.flip(-1))
    if batch:
        assert torch.stack([preprocess(i, norm) for i in img]).equal(x)

u = st.floats(0, 1, exclude_max=True)

@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), u, u, seeds)
def test_windows(h, w, size, uy, ux, seed):
    img = 1 + ints((h, w), seed, 200).numpy().astype(np.uint8)
    out, (y0, y1, x0, x1) = crop_pad(img, size, uy, ux)
    assert out.shape == (size, size) and 0 <= y0 < y1 <= size and 0 <= x0 < x1 <= size
    assert (y1 - y0, x1 - x0) == (min(h, size), min(w, size))
    assert (out != 0).sum() == (y1 - y0)*(x1 - x0) and (out[y0:y1, x0:x1] != 0).all()  # the rest is fill
    view = np.lib.stride_tricks.sliding_window_view(img, (y1 - y0, x1 - x0))
    assert (view == out[y0:y1, x0:x1]).all((2, 3)).any()  # and the box a piece of the picture
    a, b = crop_pad(np.stack([img]*3, -1), size, uy, ux)
    assert b == (y0, y1, x0, x1) and (a == out[..., None]).all()

dozen = st.integers(1, 12)

@given(dozen, dozen, dozen, st.booleans(), st.sampled_from([(1., 1.), (.3, 2.)]), seeds)
def test_random_crops(h, w, size, flip, scale, seed):
    mask = ints((h, w), seed, 255).numpy().astype(np.uint8)
    img = np.stack([mask]*3, -1)
    c = random_crop(img, size, scale, flip, np.random.default_rng(seed), mask)
    y0, y1, x0, x1 = c.box
    assert c.img.shape == (size, size, 3) and c.mask.shape == (size, size) and c.img.dtype == c.mask.dtype == np.uint8
    out = np.ones((size, size), bool)
    out[y0:y1, x0:x1] = False
    assert (c.mask[out] == 255).all() and (c.img[out] == 0).all() and (c.mask[~out] != 255).all()
    if scale == (1., 1.):
        assert (c.img[~out] == c.mask[~out][:, None]).all()          # both went the same way
    again = random_crop(img, size, scale, flip, np.random.default_rng(seed), mask)
    assert (again.img == c.img).all() and (again.mask == c.mask).all() and again.box == c.box
    mirrored = random_crop(img[:, ::-1], size, scale, False, np.random.default_rng(seed))
    if flip and np.random.default_rng(seed).random(4)[1] < .5:
        assert abs(mirrored.img.astype(int) - c.img).max() <= 1

class Colours(torch.nn.Module):
    "Scores of a patch from its mean colour, with dropout that must stay off."
    def __init__(self, c=3, patch=4, **kw):
        super().__init__()
        self.patch = patch
        self.cfg = preset("voc", **kw)
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, c, 1).double()
        self.drop = torch.nn.Dropout(.5)
    def logits(self, img): return self.drop(self.conv(F.avg_pool2d(img.double(), self.patch)))

scale_sets = st.sampled_from([(1.,), (1., .75), (.75,), (.5, 1., 1.5)])

few = st.integers(1, 3)

@given(few, few, few, seeds, scale_sets, st.booleans(), st.sampled_from([1, 4]))
def test_multi_scale_logits(b, h, w, seed, scales, flip, round_to):
    model = Colours(round_to=round_to).train()
    img = values((b, 3, 16*h, 16*w), seed)
    out = multi_scale_logits(model, img, scales, flip)
    assert out.shape == (b, 3, 4*h, 4*w) and out.dtype == torch.float32
    assert model.training and not out.requires_grad
    assert_close(out, torch.cat([multi_scale_logits(model, i[None], scales, flip) for i in img]))
    assert_close(out, multi_scale_logits(model, img, scales + scales[::-1], flip))   # a mean, in any order
    assert_close(out, torch.stack([multi_scale_logits(model, img, (s,), flip) for s in scales]).mean(0))
    mirrored = multi_scale_logits(model, img.flip(3), scales, flip).flip(3)
    assert_close(mirrored, out)
    if scales == (1.,) and not flip:
        assert_close(out, model.eval().logits(img).float())
    flat = torch.full_like(img, .25)
    assert_close(multi_scale_logits(model, flat, scales, flip), model.eval().logits(flat).float(), rtol=1e-4, atol=1e-5)
    perm = shuffled(3, seed)
    other = Colours(round_to=round_to)
    with torch.no_grad():
        for p, q in zip(other.conv.parameters(), model.conv.parameters()):
            p.copy_(q[perm])
    assert_close(multi_scale_logits(other, img, scales, flip), out[:, perm])

def test_the_mirror_image_takes_part():
    class Sided(Colours):
        def logits(self, img): return super().logits(img)*torch.linspace(0, 1, img.shape[-1]//self.patch)
    model = Sided().eval()
    img = values((1, 3, 16, 16), 0)
    one, two = (multi_scale_logits(model, img, (1.,), f) for f in (False, True))
    assert_close(two, (one + model.logits(img.flip(3)).flip(3).float())/2)
    assert_close(multi_scale_logits(model, img.flip(3), (1.,), True).flip(3), two) and not one.equal(two)

@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0, 24, 64]), st.sampled_from([1, 4, 16]), seeds)
def test_predictions(h, w, long_side, round_to, seed):
    img = ints((h, w, 3), seed, 256).numpy().astype(np.uint8)
    model = Colours(long_side=long_side, round_to=round_to)
    [(_, masks)] = mask_stream(model, [(0, img)], ("ms",))
    ids = masks["ms"]
    assert ids.shape == (h, w) and ids.dtype == np.uint8 and ids.max() < 3
    H, W = fit_size((h, w), long_side, round_to, 4)
    assert min(H, W) >= 4 and (round_to == 1 or not (H % round_to or W % round_to))
    assert (H - W)*(h - w) > 0 or H == W  # the longer side stays the longer one
    assert h != w or H == W
    if long_side and round_to == 1:
        assert max(H, W) in (long_side - 1, long_side)

# ---- dtype and device follow the input

def on(device):
    "Every function with tensors of `device`; those made inside must be there, too."
    x = functools.partial(torch.rand, device=device)
    i = torch.zeros(2, dtype=torch.long, device=device)
    attn = x(1, 7, 12, 12)
    aff = x(1, 12, 12)
    cam = x(2, 3, 4)
    img = x(1, 3, 9, 8)
    masks = x(1, 2, 9, 8)
    lbl = torch.zeros(1, 6, 8, dtype=torch.long, device=device)
    byte = torch.zeros(6, 8, 3, dtype=torch.uint8, device=device)
    return {
        "affinity_map": lambda: affinity_map(x(1, 3, 3, 4)),
        "disagreement": lambda: disagreement(aff, attn),
        "gate": lambda: gate(x(1, 4)),
        "refining_map": lambda: refining_map(attn, aff, n_static=7),
        "sinkhorn": lambda: sinkhorn(aff),
        "transition": lambda: transition(aff),
        "components": lambda: components(cam > .5),
        "box_mask": lambda: box_mask(cam),
        "rfm": lambda: rfm(cam, attn, aff, i, k=2),
        "minmax": lambda: minmax(cam),
        "group": lambda: group(cam, i, 1, 2),
        "affinity": lambda: affinity(img, NEAR),
        "par": lambda: par(img, masks, 2, NEAR),
        "pseudo_labels": lambda: pseudo_labels(cam, img, i, i, (9, 8), iters=1, dilations=NEAR, k=2),
        "affinity_label": lambda: affinity_label(lbl, (3, 4)),
        "total_loss": lambda: total_loss(x(1, 5, 3, 4), aff, lbl, (3, 4)).total,
        "seg_loss_ce": lambda: seg_loss_ce(x(1, 5, 6, 8), lbl),
        "aff_loss_ce": lambda: aff_loss_ce(aff, affinity_label(lbl, (3, 4))),
        "iou": lambda: iou(x(3, 3)),
        "preprocess": lambda: preprocess(byte)}

def test_device_follows_the_input():
    "All that fail are named, with the device they left or the error they met."
    failed = []
    for device in DEVICES:
        for name, call in on(device).items():
            try:
                found = call().device.type
            except (RuntimeError, NotImplementedError) as e:
                found = f"{type(e).__name__}: {e}"
            if found != device:
                failed.append(f"{name} on {device}: {found}")
    assert not failed, "\n".join(failed)

def of_kind(dtype):
    "Functions that keep the precision of what they are given."
    def x(*shape): return torch.rand(*shape).to(dtype)
    both = torch.ones(1, 3, dtype=torch.bool)
    inside = torch.ones(1, 2, 2, dtype=torch.bool)
    lbl = torch.zeros(1, 2, 2, dtype=torch.long)
    return {
        "affinity_map": affinity_map(x(1, 3, 2, 2)),
        "gated_mean": gated_mean(x(1, 3, 4, 4), both),
        "refining_map": refining_map(x(1, 3, 4, 4), x(1, 4, 4), n_static=3, n_dynamic=3),
        "sinkhorn": sinkhorn(x(1, 4, 4)),
        "minmax": minmax(x(2, 3, 3)),
        "refine_cam": refine_cam(x(1, 2, 2), x(1, 4, 4), inside, torch.tensor([0])),
        "par": par(x(1, 3, 4, 4), x(1, 2, 4, 4), 1, NEAR),
        "upsample_cam": upsample_cam(x(1, 2, 2), (4, 4)),
        "seg_loss_ce": seg_loss_ce(x(1, 3, 2, 2), lbl),
        "aff_loss_l1": aff_loss_l1(x(1, 2, 2), torch.ones(1, 2, 2)),
        "aff_loss_ce": aff_loss_ce(x(1, 2, 2), torch.ones(1, 2, 2))}

def test_dtype_follows_the_input():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        results = of_kind(dtype)
        assert not [name for name, out in results.items() if out.dtype != dtype or not out.isfinite().all()], dtype

def test_par_of_a_flat_picture_is_finite_in_every_precision():
    "Padding is black: in float16 the plain form, which a GPU runs, divided 0 by 0 on half of such a crop."
    half = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    half[:, :, 10:] = 0
    lone = torch.zeros(1, 3, 24, 24)
    lone[..., 12, 12] = 1  # no neighbour is like it
    masks = torch.rand(1, 2, 24, 24, generator=torch.Generator().manual_seed(1))
    for img in (half, lone):
        want = plain_par(img, masks, 2, (1, 2, 4))
        for dtype, eps in ((torch.float16, .02), (torch.bfloat16, .1)):
            for form in (plain_par, par):
                got = form(img.to(dtype), masks.to(dtype), 2, (1, 2, 4))
                assert got.dtype == dtype and got.isfinite().all() and (got.float() - want).abs().max() < eps
