"""GradCAM of all pairs at once against the authors' one call per image and class (float32)."""
import pytest, torch
from oracle import close, load, needs_oracle
from weclip.method.batch import pairs
from weclip.method.cam import gradcam

pytestmark = needs_oracle

@pytest.fixture(scope="module")
def cams(encoded, text):
    tags = [[int(c) - 1 for c in row if c] for row in load("inputs_train")["class_sets"]]
    img_idx, tag_idx = pairs(tags)
    enc = encoded["enc"]
    found = gradcam(encoded["model"], enc.tokens[-1], enc.grid, text["fg"], text["bg"], img_idx, tag_idx)
    return found, img_idx, tag_idx

def compact(rows):
    "Drop the classes an image does not have, as the authors' rows do."
    keep = [r[torch.isfinite(r)] for r in rows]
    return torch.nn.utils.rnn.pad_sequence(keep, batch_first=True, padding_value=torch.nan)

def same(ours, theirs, atol):
    assert torch.equal(ours.isnan(), theirs.isnan())
    close(ours.nan_to_num(), theirs.nan_to_num(), atol)

def test_scores(cams):
    c = cams[0]
    z = load("cam_train")
    same(compact(c.logits), z["logits"], 2e-4)
    same(compact(c.scores.where(c.logits.isfinite(), torch.inf)), z["scores"], 1e-5)

def test_image_vector(cams, encoded):
    v = encoded["model"].visual
    e = torch.nn.functional.normalize(v.ln_post(cams[0].out[:, 1:]).mean(1) @ v.proj, dim=-1)
    close(e[cams[1]], load("cam_train")["img_embed"], 1e-5)

@pytest.mark.parametrize("ours, theirs, rel", (("weights", "weights", 2e-5), ("raw", "rawcam", 1e-4)))
def test_gradient(cams, ours, theirs, rel):
    a = getattr(cams[0], ours)
    b = load("cam_train")[theirs]
    scale = b.abs().flatten(1).amax(1).view(-1, *[1]*(b.ndim - 1))  # tiny: relative to each pair's largest
    close(a/scale, b/scale, rel)

def test_cam(cams): close(cams[0].cam, load("cam_train")["gray"], 1e-4)

def test_activations(encoded):
    a = encoded["model"].blocks[-1].ln_1(encoded["enc"].tokens[-1])[:, 1:, ::16].mT.unflatten(-1, (20, 20))
    close(a, load("cam_train")["acts_sub"], 1e-4)

def test_last_attention(cams):
    z = load("encoder_train")
    attn = cams[0].attn
    close(attn[:, 15::16], z["attn_rows"][11, :, 1:, 1:], 1e-6)
    close(attn[1], z["attn_img1_f16"][11, 1:, 1:], 3e-4, 1e-3)
    close(attn.double().sum((-2, -1)), z["attn_mass"][11], 2e-3)

@pytest.fixture(scope="module")
def val(encoded, text):
    "A test picture of 375x500 pixels, resized as for validation: 24x32 patches."
    z = load("val_375x500")
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    img = ((z["image"].float() - mean)/std).movedim(-1, 0)[None]
    img = torch.nn.functional.interpolate(img, size=z["in_hw"].tolist(), mode="bilinear", align_corners=False)
    enc = encoded["model"].encode(img, n_attn=11)
    idx = pairs([[int(c) - 1 for c in z["class_set"]]])
    return img, enc, gradcam(encoded["model"], enc.tokens[-1], enc.grid, text["fg"], text["bg"], *idx)

def test_val_encoder(val):
    img, enc, cams = val
    z = load("val_375x500")
    close(img[0, :, ::8, ::8], z["x_sub"], 1e-5)
    close(enc.tokens[-1][0, ::16], z["feat11_sub"], 2e-4)
    attn = torch.cat([enc.attn[0], cams.attn])
    close(attn[:, 47::48], z["attn_rows"][:, 1:, 1:], 1e-6)

def test_val_cam(val):
    cams = val[2]
    z = load("val_375x500")
    same(compact(cams.scores.where(cams.logits.isfinite(), torch.inf)), z["scores"], 1e-5)
    scale = z["rawcam"].abs().amax((1, 2), keepdim=True)
    close(cams.raw/scale, z["rawcam"]/scale, 1e-4)
    close(cams.cam, z["gray"], 1e-4)
