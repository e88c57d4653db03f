"""ExCEL's CAM, affinity and refinement against the outputs of its authors' code, and what a reader may set of them."""
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import open_clip, pytest, torch

from oracle import PLUS, clip_weights, close, load, needs_plus
from weclip.beyond.surgery import (
    EXCEL, calibration, centred_cosines, cosine_affinity, cut_common, dense_features, excel_refine, plain_second_path,
    second_path, surgery)
from weclip.data.pictures import preprocess
from weclip.engine.weights import convert_official, decoder_from_official, load_clip
from weclip.method.batch import group, minmax, pairs
from weclip.method.classes import SCENES, VOC
from weclip.method.clip import FrozenCLIP
from weclip.method.config import preset
from weclip.method.losses import aff_loss_l1, affinity_label, seg_loss_balanced, total_loss
from weclip.method.model import WeCLIP
from weclip.method.par import pseudo_labels, upsample_cam, winner, with_background
from weclip.method.rfm import box_mask, disagreement, gate, refining_map, rfm, transition

SIX = dict(box_thr=.79, n_static=6, n_dynamic=6)  # ExCEL's settings of `rfm`
PHASES = pytest.mark.parametrize("phase", ["pre", "post"])

def stretched(s):
    "Over the tokens, as released: no epsilon."
    low, high = s.aminmax(dim=1, keepdim=True)
    return (s - low)/(high - low)

# --- given arrays ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def small():
    "A tower of seven blocks, the last five with two paths: our encoder and what the authors' gives."
    z = load("excel_tower_small", PLUS)
    vision = dict(image_size=16, patch_size=4, width=48, head_width=16, layers=7)
    words = dict(context_length=77, width=32, heads=2, layers=1)
    model = open_clip.CLIP(16, vision, words, quick_gelu=True)
    model.visual.load_state_dict({k.removeprefix("w__"): v for k, v in z.items() if k.startswith("w__")})
    clip = FrozenCLIP(model)
    return clip, clip.encode(z["x"], 7, n_attn=7), z

@needs_plus
def test_small_tower(small):
    "Both forms, without and with the learned calibration; attention maps of blocks with two paths are sums over heads."
    clip, seen, z = small
    close(torch.stack(seen.tokens), z["blocks"], 1e-5)
    heads = torch.tensor([1, 1, 3, 3, 3, 3, 3]).view(-1, 1, 1, 1)
    close(heads*seen.attn.transpose(0, 1), z["attn"][..., 1:, 1:], 1e-5)
    for end, extra in (("", None), ("_ex", calibration(z["ex_feats"]))):
        plain = plain_second_path(clip, seen.tokens[1:6], extra)
        close(torch.stack(plain), z[f"path2{end}"], 1e-4)
        y, out, attn = second_path(clip, seen.tokens[1:6], extra)
        close(y[:, 1:], plain[-1][:, 1:], 1e-5)
        close(clip.visual.ln_post(y) @ clip.visual.proj, z[f"out{end}"], 1e-4)
        close(out, z[f"blocks{end}"][-1], 1e-5)
        close(3*attn, z[f"attn{end}"][-1][:, 1:, 1:], 1e-5)
    assert (z["path2_ex"] - z["path2"]).abs().max() > 1

@needs_plus
def test_feature_surgery():
    z = load("excel_cam_small", PLUS)
    close(stretched(cut_common(z["image_features"], z["text"])), z["maps"], 1e-6)

@needs_plus
@PHASES
def test_refinement_of_given_maps(phase):
    "Heads are summed in the maps that are given here; the authors' labels are those without PAR."
    z = load("excel_rfm_small", PLUS)
    attn = z["attn"][None, :, 1:, 1:]
    aff = z["A_f"][None]
    img_idx, tag_idx = pairs([z["keys"].tolist()])
    cam = z["cam"].T[tag_idx].unflatten(-1, (6, 7))
    r = refining_map(attn, aff, phase == "post", 6, 6)
    close(r[0], z[f"{phase}__R"], 1e-6)
    close(transition(r)[0], z[f"{phase}__T"], 1e-6)
    refined = rfm(cam, attn, aff, img_idx, phase == "post", **SIX)
    close(refined, z[f"{phase}__refined"], 1e-6)
    scores = with_background(group(upsample_cam(refined, (96, 112)), img_idx, 1))
    close(scores[0, :, ::4, ::4], z[f"{phase}__par_in_sub"], 1e-5)
    assert torch.equal(winner(scores, img_idx, tag_idx)[0], z[f"{phase}__labels_no_par"].long())
    unsigned = gate(disagreement(aff, attn[:, -6:], signed=False))
    assert not torch.equal(gate(disagreement(aff, attn[:, -6:])), unsigned), "these maps should tell them apart"

@needs_plus
def test_losses():
    "An empty side counts as 0; they divide by the count plus 1e-6."
    z = load("excel_losses_small", PLUS)
    lbl = z["label"].long()
    labels = {"": lbl, "_all_bg": torch.where(lbl == 255, 255, 0), "_all_fg": torch.where(lbl == 0, 5, lbl),
              "_all_ignored": torch.full_like(lbl, 255)}
    for name, of_side in labels.items():
        logits = z["logits"].clone().requires_grad_()
        loss = seg_loss_balanced(logits, of_side)
        loss.backward()
        close(loss, z[f"seg_loss{name}"], 0, 1e-6)
        close(logits.grad[..., ::4, ::4], z[f"seg_grad_sub{name}"], 1e-9)
    aff_lbl = affinity_label(z["big_label"].long(), (6, 6), radius=2)
    close(aff_lbl, z["aff_label"], 0)
    close(aff_loss_l1(z["pred"], aff_lbl), z["aff_loss"], 0, 1e-6)
    assert torch.equal(torch.stack([(aff_lbl == 1).sum(), (aff_lbl == 0).sum()]) + 1, z["pos_neg"])

@needs_plus
def test_affinity():
    z = load("excel_pre", PLUS)
    aff = cosine_affinity(None, z["F_u"], None)
    close(aff[0], z["A_f_img0"], 1e-5)
    close(aff[:, ::16], z["A_f_rows"], 1e-5)
    close(1 - centred_cosines(z["F_u"])[0, 0, 0], z["cos_mean"], 1e-6)  # a patch's cosine with itself is 1
    alone = torch.cat([cosine_affinity(None, fu[None], None) for fu in z["F_u"]])
    close(cosine_affinity(None, z["F_u"], None, mean_over="image"), alone, 1e-6)
    assert (alone - aff).abs().max() > 1e-3

# --- the whole tower, VOC --------------------------------------------------------------------------------------------

def recipe():
    spec = importlib.util.spec_from_file_location("weights_recipe_plus", PLUS/"weights_recipe_plus.py")
    mod = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mod)
    return mod

@pytest.fixture(scope="module")
def run():
    "The authors' batch through a whole model with their weights: everything before the labels."
    z = load("excel_pre", PLUS)
    biases = load("clip_in_proj_bias", PLUS)
    names = {f"visual.transformer.resblocks.{i}.attn.in_proj_bias": biases[f"block{i}"].float() for i in range(12)}
    clip = FrozenCLIP(load_clip(clip_weights() | names))
    decoder = decoder_from_official(recipe().make_excel_decoder_state_dict(21))
    model = WeCLIP(clip, z["text"][:20], z["text"][20:], VOC, preset("voc", **EXCEL), decoder).eval()
    picture = load("inputs_train")["images"][z["image_index"]]
    img = preprocess(picture)
    tags = [[c - 1 for c in row if c] for row in z["class_sets"].tolist()]
    tokens = model.clip.encode(img).tokens
    frozen = model.encode(img, tags, 6)
    y, _, _ = second_path(model.clip, tokens[-5:])
    return SimpleNamespace(model=model, picture=picture, tokens=tokens, frozen=frozen, y=y,
                           text=torch.cat([model.text_fg, model.text_bg]), img_idx=frozen.img_idx,
                           tag_idx=frozen.tag_idx)

@needs_plus
def test_second_path(run):
    z = load("excel_pre", PLUS)
    close(torch.stack(run.frozen.tokens[6:])[:, :, ::64], z["block_out_sub"], 1e-4)
    path = torch.stack(plain_second_path(run.model.clip, run.tokens[-5:]))
    close(path[:, :, 1::64], z["path2_sub"], 1e-4)
    close(run.y[:, 1:], path[-1][:, 1:], 1e-4)

def features(run, phase):
    "Of all tokens, from the frozen encoder alone or with the decoder's features of the first forward."
    if phase == "pre": return dense_features(run.model.clip, run.y)
    extra = calibration(load("excel_pre", PLUS)["F_u"])
    return dense_features(run.model.clip, second_path(run.model.clip, run.tokens[-5:], extra)[0])

@needs_plus
@PHASES
def test_features_and_cam(run, phase):
    z = load(f"excel_{phase}", PLUS)
    f = features(run, phase)
    close(f[0], z["img_feat_img0"], 1e-5)
    close(f[:, ::64], z["img_feat_sub"], 1e-5)
    close(f.norm(dim=1), torch.ones(4, 512), 1e-5)
    maps = stretched(cut_common(f, run.text))
    close(maps[:, 1:, :20], z["cam"], 1e-4)
    if phase == "post": return
    close(maps[0], z["surgery_img0"], 1e-4)
    close(run.frozen.cam.flatten(1), z["cam"][run.img_idx, :, run.tag_idx], 1e-4)
    assert sum(run.frozen.cam.amax((1, 2)) < .99) == 2  # where the class token had the largest value

@needs_plus
@PHASES
def test_refinement(run, phase):
    "From the authors' CAM of the phase, and from the affinity of their features."
    z = load(f"excel_{phase}", PLUS)
    cam = z["cam"][run.img_idx, :, run.tag_idx].unflatten(-1, (20, 20))
    assert torch.equal(box_mask(cam, .79), z["box_mask"].bool())
    aff = cosine_affinity(None, load("excel_pre", PLUS)["F_u"], None)
    dynamic = phase == "post"
    frozen = run.frozen._replace(cam=cam)
    refined = excel_refine(run.model, frozen, aff, None, dynamic, 3)
    close(refined, z["refined"], 1e-4)
    summed = run.frozen.attn*torch.tensor([1, 12, 12, 12, 12, 12]).view(-1, 1, 1)
    close(summed.sum((2, 3)).T, load("excel_pre", PLUS)["attn_mass"][6:], 0, 1e-5)
    if dynamic:
        s = disagreement(aff, summed)
        assert torch.equal(gate(s), z["G"].bool())
        close(s, z["S"], .1)
    r = refining_map(summed, aff, dynamic, 6, 6)
    close(r[0], z["R_img0"], 1e-5)
    close(r[:, ::16], z["R_rows"], 1e-5)
    close(transition(r)[0], z["T_img0"], 1e-5)
    close(upsample_cam(refined, (320, 320))[:, ::4, ::4], z["hires_sub"], 1e-3)
    averaged = rfm(cam, run.frozen.attn, aff, run.img_idx, dynamic, **SIX)
    assert (averaged - refined).abs().max() > .01, "heads averaged: another CAM"

@needs_plus
@PHASES
def test_labels(run, phase):
    "Of four pictures, up to three tags each. The authors' PAR reads whole grey levels, ours what the network reads."
    z = load(f"excel_{phase}", PLUS)
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    normalised = (run.picture.float() - mean)/std
    cut = (normalised*std + mean).byte().float()/255
    assert (run.picture.float()/255 - cut).abs().max() > 1/256
    for guide in (cut, normalised):
        ours = pseudo_labels(z["refined"], guide.movedim(-1, 1), run.img_idx, run.tag_idx, (320, 320))
        different = (ours != z["labels"]).double().mean((1, 2))
        assert (different <= 1e-4).all(), different

@needs_plus
def test_whole_model(run):
    "What the decoder makes of the true outputs of all twelve blocks, which is the released code with its slip off."
    z = load("excel_pre", PLUS)
    with torch.no_grad():
        close(run.model.decode(run.frozen).logits, z["seg_true_blocks"], 1e-3)

def overwritten(run):
    "What the released decoder reads: the end of the second path, then blocks 9 to 12 before their MLP, then block 12."
    half = []
    for block, x in zip(run.model.clip.blocks[8:], run.tokens[7:]):
        a = block.ln_1(x)
        half.append((x + block.attn(a, a, a, need_weights=False)[0])[:, 1:])
    return [*run.frozen.tokens[:6], run.y[:, 1:], *half, run.frozen.tokens[-1]]

@needs_plus
def test_gradients(run):
    "Of a training step on the overwritten features: those of the affinity pass through the mean over the batch."
    z = load("excel_pre", PLUS)
    decoder = run.model.decoder
    with torch.no_grad():
        read = overwritten(run)
    close(torch.stack([x[:, ::64] for x in read[6:]]), z["fuse_in_sub"], 1e-4)
    fu, logits = decoder(read, (20, 20))
    close(fu.detach(), z["F_u"], 1e-4)
    close(logits.detach(), z["seg"], 1e-3)
    losses = total_loss(logits, cosine_affinity(run.model, fu, None), z["labels"].long(), (20, 20))
    ours = torch.stack([losses.seg, losses.aff, losses.total]).detach()
    close(ours, z["losses"], 0, 1e-5)
    decoder.zero_grad()
    losses.total.backward()
    norms = convert_official(dict(zip(z["grad_names"].tolist(), z["grad_norms"])))
    grads = {name: p.grad for name, p in decoder.named_parameters()}
    assert norms.keys() == grads.keys()
    for name, norm in norms.items():
        close(grads[name].double().norm(), norm, 1e-8, 1e-4)

# --- settings ----------------------------------------------------------------------------------------------------

@pytest.fixture
def tiny():
    "An untrained model of four blocks, a batch for it, and settings that fit."
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, width=32, head_width=16, layers=4)
    clip = FrozenCLIP(open_clip.CLIP(16, vision, dict(context_length=77, width=32, heads=2, layers=1)))
    texts = torch.nn.functional.normalize(torch.randn(12, 16), dim=-1)
    n_fg = SCENES.n_classes - 1
    def model(**settings):
        small = dict(n_feats=3, n_static=3, n_dynamic=3, d=16, layers=1) | settings
        return WeCLIP(clip, texts[:n_fg], texts[n_fg:], SCENES, preset("scenes", **small))
    return model, torch.randn(3, 3, 32, 40), [[1, 4], [], [0]]

def test_settings_reach_the_functions(tiny):
    "Each mending by its name in the settings of a run; and a step of training with all three."
    model, img, tags = tiny
    ours = dict(cam="surgery", affinity="cosine", refine="excel", box_thr=.79)
    options = {"cam.blocks": 2, "cam.norm_over": "channels", "cam.stretch_over": "patches",
               "affinity.mean_over": "image", "affinity.gain": 5., "refine.blocks": 2}
    released = model(**ours, **{"cam.blocks": 3, "refine.blocks": 3})
    mended = model(**ours, **options)
    mended.decoder.load_state_dict(released.decoder.state_dict())
    outs = [m.eval()(img, tags) for m in (released, mended)]
    tokens = mended.clip.encode(img).tokens
    img_idx, tag_idx = pairs(tags)
    text = torch.cat([mended.text_fg, mended.text_bg])
    for out, blocks, norm_over in zip(outs, (3, 2), ("tokens", "channels")):
        y, _, _ = second_path(mended.clip, tokens[-blocks:])
        s = cut_common(dense_features(mended.clip, y, norm_over), text)[img_idx, :, tag_idx]
        first = 0 if norm_over == "tokens" else 1  # the class token takes part in the stretch, or does not
        close(out.cam.flatten(1), minmax(s[:, None, first:])[:, 0, 1 - first:], 1e-5)
    close(outs[1].aff, cosine_affinity(None, outs[1].fu, None, gain=5., mean_over="image"), 1e-6)
    for name in ("cam", "aff", "cam_ref"):
        one, other = (getattr(out, name) for out in outs)
        assert one.isfinite().all() and (one - other).abs().max() > 1e-4, name
    mended.train()
    mended.loss(mended(img, tags)).total.backward()
    assert mended.decoder.conv.weight.grad.isfinite().all()

def test_a_tower_with_too_few_blocks_is_refused(tiny):
    model, img, tags = tiny
    with pytest.raises(ValueError, match="expected 1 to 3.*tower has 4, got 5"):
        model(cam="surgery").eval()(img, tags)

def test_maps_do_not_depend_on_the_batch(tiny):
    "Other pictures beside it and more slots than needed change no CAM; a picture without tags gets none."
    model, img, tags = tiny
    m = model(cam="surgery", **{"cam.blocks": 3})
    whole = m.clip.encode(img)
    together = surgery(m, whole.tokens, whole.grid, *pairs(tags), 9, blocks=3)
    assert together.cam.shape == (3, 4, 5) and 0 <= together.cam.min() and together.cam.max() <= 1
    last = surgery(m, m.clip.encode(img[2:]).tokens, whole.grid, *pairs(tags[2:]), 1, blocks=3)
    close(last.cam[0], together.cam[2], 1e-5)

def test_excel_is_a_preset():
    cfg = preset("voc", **EXCEL)
    assert (cfg.cam, cfg.affinity, cfg.refine, cfg.lam, cfg.iters) == ("surgery", "cosine", "excel", .1, 30_000)
    assert replace(cfg, refine="rfm").box_thr == .79
