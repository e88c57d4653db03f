"""What one backbone can take from WeCLIP+, against the outputs of its authors' code."""
from types import SimpleNamespace

import pytest, torch

from oracle import PLUS, close, load, needs_plus
from weclip.beyond.rfm_plus import (
    PlusLosses, allowed_classes, cross_loss, dice_loss, hard_label, plain_dice, plain_rfm_p, plain_self_label,
    plus_loss, rfm_p, self_label)
from weclip.method.batch import minmax
from weclip.method.config import preset
from weclip.method.losses import upsample
from weclip.method.rfm import affinity_map, refine_cam, refining_map, transition
from weclip.method.seams import check_seams, own_settings, seam
from weclip.data.voc import open_data
from weclip.engine.train import load_checkpoint, train
from weclip.engine.weights import build
from weclip.world.scenes import write_scenes

SETS = {  # data set -> settings as released
    "voc": preset("voc", switch=0, refine="rfm_p", loss="plus"),
    "coco": preset("coco", switch=0, refine="rfm_p", loss="plus", n_dynamic=8,
                   **{"refine.boxes": True, "loss.self_from": .5})}

def small_rfm(name):
    "(arrays, `Frozen`, A_f, scores whose softmax is P) of a data set."
    z = load("plus_rfm_small", PLUS)
    tag_idx = z[f"{name}__keys"].long()  # on VOC in the order of the annotation
    frozen = SimpleNamespace(cam=z[f"{name}__cams"], attn=z["attn"][None, :, 1:, 1:], tag_idx=tag_idx,
                             img_idx=torch.zeros_like(tag_idx))
    return z, frozen, affinity_map(z["F"].view(1, 512, 6, 7)), z[f"{name}__P"].log()[None]

@needs_plus
@pytest.mark.parametrize("name", SETS)
def test_rfm_p(name):
    z, frozen, aff, logits = small_rfm(name)
    cfg = SETS[name]
    close(aff[0], z["A_f"], atol=1e-6)
    r = refining_map(frozen.attn, aff, n_dynamic=cfg.n_dynamic)
    close(r[0], z[f"{name}__R"], atol=1e-6)
    close(transition(r)[0], z[f"{name}__T"], atol=1e-6)
    model = SimpleNamespace(cfg=cfg, clip=SimpleNamespace(n_blocks=12))
    refined = seam(cfg, "refine")(model, frozen, aff, logits, True, 3)
    close(refined, z[f"{name}__refined"], atol=1e-7)
    close(upsample(minmax(refined)[None], (96, 112))[0, :, ::4, ::4], z[f"{name}__hires_sub"], atol=1e-4)
    plain = plain_rfm_p(frozen.cam, frozen.attn[:, -cfg.n_dynamic:], aff, logits, frozen.img_idx, frozen.tag_idx,
                        cfg.box_thr if name == "coco" else None)
    close(plain, z[f"{name}__refined"], atol=1e-7)
    other = rfm_p(model, frozen, aff, logits, True, 3, boxes=name == "voc")  # of the other data set
    assert (other - z[f"{name}__refined"]).abs().max() > 1e-3

@needs_plus
def test_cam_times_p_of_a_training():
    "The first picture's transition matrix is stored in full, of the others every 16th row."
    z = load("plus_train", PLUS)
    img_idx = z["instance_image"].long()
    logits = (z["seg_clip"] + z["seg_dino"])/2
    p = logits.softmax(1)[img_idx, z["keys"].long() + 1]
    close(p, z["P"][img_idx, z["keys"].long() + 1], atol=1e-5)
    close(z["gray"]*p, z["cam_times_P"], atol=1e-5)
    of_first = img_idx == 0
    ours = refine_cam(z["gray"][of_first], z["T_img0"][None], p[of_first], img_idx[of_first])
    close(ours, z["refined"][of_first], atol=1e-5)

DICE = {  # name of the value -> label, its gradient where it was stored, and which mendings are on
    "dice": ("label", "grad_sub", {}),
    "dice_no_ignore": ("label_no_ignore", "grad_no_ignore_sub", {}),
    "dice_masked": ("label", None, dict(ignored="masked")),
    "dice_masked_present": ("label", None, dict(ignored="masked", over="present")),
    "dice_no_ignore_present": ("label_no_ignore", None, dict(over="present"))}

@needs_plus
@pytest.mark.parametrize("form", [plain_dice, dice_loss])
def test_dice(form):
    z = load("plus_dice_small", PLUS)
    for name, (which, grad, mendings) in DICE.items():
        lbl = z[which].long()
        logits = z["logits"].clone().requires_grad_()
        loss = form(logits, lbl, **mendings)
        loss.backward()
        close(loss, z[name], atol=0, rtol=3e-7)
        assert torch.equal(lbl, z[which].long()), f"{name}: the label was changed, which only the released code does"
        if grad:
            close(logits.grad[..., ::2, ::2], z[grad], atol=1e-9)

def two_heads(z):
    "Scores of both heads, with gradient."
    return [z[f"seg_{head}"].clone().requires_grad_() for head in ("clip", "dino")]

@needs_plus
def test_cross_labels():
    z = load("plus_losses_small", PLUS)
    assert torch.equal(hard_label(z["seg_dino"], (96, 96)), z["target_of_clip"].long())
    assert torch.equal(hard_label(z["seg_clip"], (96, 96)), z["target_of_dino"].long())

def total_of(z, a, b, i=0, empty="nan"):
    "(total, cross-pseudo loss, `PlusLosses`) of two heads at an iteration, as the trainer adds them up."
    model = SimpleNamespace(cfg=preset("voc", radius=2))
    out = SimpleNamespace(logits=(a + b)/2, aff=z["A_f"].clone().requires_grad_(), grid=(6, 6),
                          pseudo=z["pseudo_label"].long())
    losses = plus_loss(model, out, i)
    both = cross_loss(a, b, (96, 96), empty=empty)
    total = losses.total + .1*both
    total.backward()
    assert torch.equal(out.pseudo, z["pseudo_label"].long())
    return total, both, losses, out.aff.grad

@needs_plus
@pytest.mark.parametrize("i,when", [(0, ""), (18_000, ""), (18_001, "_self")])
def test_losses(i, when):
    "The first of 30,000 iterations with self labels is the one after 18,000, counted from 0."
    z = load("plus_losses_small", PLUS)
    a, b = two_heads(z)
    total, both, losses, aff_grad = total_of(z, a, b, i)
    seg, aff, cross_a, cross_b, dice, whole = z[f"losses{when}"]
    close(torch.stack([losses.seg, losses.aff, losses.dice]), torch.stack([seg, aff, dice]), atol=0, rtol=1e-6)
    close(both, cross_a + cross_b, atol=0, rtol=1e-6)
    close(total, whole, atol=0, rtol=1e-6)
    close(a.grad, z[f"grad_clip{when}"], atol=1e-7)
    close(b.grad, z[f"grad_dino{when}"], atol=1e-7)
    close(aff_grad, z[f"grad_A_f{when}"], atol=1e-9)

@needs_plus
@pytest.mark.parametrize("form", [plain_self_label, self_label])
def test_self_labels(form):
    z = load("plus_losses_small", PLUS)
    lbl = z["pseudo_label"].long()
    new = form((z["seg_clip"] + z["seg_dino"])/2, lbl)
    assert torch.equal(new, z["label_used_self"].long()) and not torch.equal(new, lbl)
    z = load("plus_train", PLUS)
    late = load("plus_train_selflabel", PLUS)
    new = form((z["seg_clip"] + z["seg_dino"])/2, z["labels"].long())
    assert (new != late["labels"]).float().mean() < 1e-4

@needs_plus
@pytest.mark.parametrize("i", [0, 18_001])
def test_losses_of_a_training(i):
    z = load("plus_train", PLUS)
    out = SimpleNamespace(logits=(z["seg_clip"] + z["seg_dino"])/2, pseudo=z["labels"].long(), grid=(20, 20),
                          aff=affinity_map(torch.cat([z["F_clip"], z["F_dino"]], 1)))
    losses = plus_loss(SimpleNamespace(cfg=preset("voc")), out, i)
    seg, aff, cross_a, cross_b, dice, _ = load("plus_train_selflabel" if i else "plus_train", PLUS)["losses"]
    close(torch.stack([losses.seg, losses.aff, losses.dice]), torch.stack([seg, aff, dice]), atol=0, rtol=1e-5)
    close(cross_loss(z["seg_clip"], z["seg_dino"], (320, 320)), cross_a + cross_b, atol=0, rtol=1e-5)

@needs_plus
@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_cross_loss_with_an_empty_side(empty):
    "No pixel of one head is background: the released loss is not a number, its gradient is sound."
    z = load("plus_losses_small", PLUS)
    a, b = two_heads(z)
    no_background = b - 50*torch.eye(21)[0].view(1, 21, 1, 1)
    total, both, _, _ = total_of(z, a, no_background, empty=empty)
    assert both.isnan() == total.isnan() == (empty == "nan")
    close(a.grad, z["nobg_grad_clip"], atol=1e-7)
    close(b.grad, z["nobg_grad_dino"], atol=1e-7)

def test_settings():
    "Both data sets as released, one setting for each of three changes, and names that nobody has."
    for cfg in SETS.values():
        check_seams(cfg)
    assert own_settings(rfm_p) == dict(boxes=False)
    assert own_settings(plus_loss) == dict(dice=1., dice_over="all", dice_ignored="masked", self_labels=True,
                                           self_thr=.75, self_from=.6, self_within="all")
    assert PlusLosses._fields == ("total", "seg", "aff", "dice")
    with pytest.raises(ValueError, match="option of the loss"):
        check_seams(preset("voc", loss="plus", **{"loss.dise": 1.}))

def test_self_labels_keep_to_what_they_may():
    "Ignored pixels stay ignored; with the tags alone no other class appears."
    torch.manual_seed(0)
    lbl = torch.randint(0, 3, (4, 16, 16)).masked_fill(torch.rand(4, 16, 16) < .2, 255)
    scores = 5*torch.randn(4, 9, 4, 4)
    out = SimpleNamespace(logits=scores, pseudo=lbl, img_idx=torch.tensor([0, 2, 2]), tag_idx=torch.tensor([4, 0, 7]))
    allowed = allowed_classes(out, "tags")
    assert [row.nonzero()[:, 0].tolist() for row in allowed] == [[0, 5], [0], [0, 1, 8], [0]]
    assert allowed_classes(out, "all") is None
    for may_be, classes in ((None, set(range(9))), (allowed, {0, 1, 5, 8})):
        new = self_label(scores, lbl, allowed=may_be)
        assert torch.equal(new == 255, lbl == 255)
        assert set(new[new != lbl].tolist()) == classes

def test_dice_in_parts_is_the_dice_of_the_batch():
    "Three processes with parts of unequal size: their values and gradients sum to those of the batch."
    torch.manual_seed(0)
    lbl = torch.randint(0, 7, (6, 16, 16)).masked_fill(torch.rand(6, 16, 16) < .1, 255)
    scores = torch.randn(6, 9, 4, 4, dtype=torch.float64)
    for over, ignored in (("all", "counted"), ("present", "masked")):
        one = scores.clone().requires_grad_()
        want = dice_loss(one, lbl, over, ignored)
        want.backward()
        pieces = list(zip(scores.split([3, 2, 1]), lbl.split([3, 2, 1])))
        told = []
        for piece in pieces:
            sums = []
            dice_loss(*piece, over, ignored, whole=lambda x, sums=sums: sums.append(x) or x)
            told.append(sums)
        whole = [sum(parts) for parts in zip(*told)]
        many = scores.clone().requires_grad_()
        values = []
        for x, y in zip(many.split([3, 2, 1]), lbl.split([3, 2, 1])):
            answers = iter(whole)
            values.append(dice_loss(x, y, over, ignored, whole=lambda _, answers=answers: next(answers)))
        sum(values).backward()
        close(sum(values), want, atol=1e-12)
        close(many.grad, one.grad, atol=1e-12)

SMALL = dict(iters=5, warmup=2, d=16, layers=1, heads=2, bs=2, crop=48, n_feats=4, par_iters=2, switch=0)

def stop(i, _):
    if i == 2: raise KeyboardInterrupt

def test_a_run_stopped_and_continued_is_one_run(tmp_path):
    "With all three: P, Dice, and self labels in the last two of five iterations."
    root = write_scenes(tmp_path/"scenes", train=4, val=1, workers=1)
    cfg = preset("scenes", refine="rfm_p", loss="plus", **SMALL, **{"loss.self_thr": .3, "refine.boxes": True})
    def run(folder, **kw):
        model = build("tiny", cfg)
        data = open_data(root, "train", model.classes.classes, "auto", crop=cfg.crop, norm=cfg.norm)
        return model, train(model, data, tmp_path/folder, log_every=1, progress=False, **kw)
    model, history = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", on_step=stop)
    again, continued = run("parts", resume=True)
    assert continued == history and len(history) == 5
    assert all(map(torch.equal, model.decoder.state_dict().values(), again.decoder.state_dict().values()))
    plain = build("tiny", preset("scenes", **SMALL))
    with pytest.raises(ValueError, match="refine was 'rfm_p' of the module 'weclip.beyond.rfm_plus', now 'rfm'"):
        load_checkpoint(tmp_path/"whole"/"checkpoint.pt", plain, None)
