"""GradCAM of all pairs at once against the authors' one call per image and class (float32)."""
import pytest, torch
from oracle import close, load, needs_oracle
from weclip.cam import gradcam, pairs

pytestmark = needs_oracle

@pytest.fixture(scope="module")
def cams(encoded, text):
    tags = [[int(c) - 1 for c in row if c] for row in load("inputs_train")["class_sets"]]
    img_idx, tag_idx = pairs(tags)
    return gradcam(encoded["model"], encoded["enc"].tokens[-1], encoded["enc"].grid, text["fg"], text["bg"], img_idx, tag_idx), img_idx, tag_idx

def compact(rows):
    "Drop the classes an image does not have, as the authors' rows do."
    keep = [r[torch.isfinite(r)] for r in rows]
    return torch.nn.utils.rnn.pad_sequence(keep, batch_first=True, padding_value=torch.nan)

def same(ours, theirs, atol):
    assert torch.equal(ours.isnan(), theirs.isnan())
    close(ours.nan_to_num(), theirs.nan_to_num(), atol)

def test_scores(cams):
    c, z = cams[0], load("cam_train")
    same(compact(c.logits), z["logits"], 2e-4)
    same(compact(c.scores.where(c.logits.isfinite(), torch.inf)), z["scores"], 1e-5)

def test_image_vector(cams, encoded):
    v = encoded["model"].visual
    e = torch.nn.functional.normalize(v.ln_post(cams[0].out[:, 1:]).mean(1) @ v.proj, dim=-1)
    close(e[cams[1]], load("cam_train")["img_embed"], 1e-5)

@pytest.mark.parametrize("ours, theirs, rel", (("weights", "weights", 2e-5), ("raw", "rawcam", 1e-4)))
def test_gradient(cams, ours, theirs, rel):
    a, b = getattr(cams[0], ours), load("cam_train")[theirs]
    scale = b.abs().flatten(1).amax(1).view(-1, *[1]*(b.ndim - 1))     # values are tiny: compare relative to each pair's largest
    close(a/scale, b/scale, rel)

def test_cam(cams): close(cams[0].cam, load("cam_train")["gray"], 1e-4)

def test_activations(encoded):
    a = encoded["model"].blocks[-1].ln_1(encoded["enc"].tokens[-1])[:, 1:, ::16].mT.unflatten(-1, (20, 20))
    close(a, load("cam_train")["acts_sub"], 1e-4)

def test_last_attention(cams):
    z, attn = load("encoder_train"), cams[0].attn
    close(attn[:, 15::16], z["attn_rows"][11, :, 1:, 1:], 1e-6)
    close(attn[1], z["attn_img1_f16"][11, 1:, 1:], 3e-4, 1e-3)
    close(attn.double().sum((-2, -1)), z["attn_mass"][11], 2e-3)
