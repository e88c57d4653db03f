"""The losses against the authors' `get_seg_loss`, `get_aff_loss` and `cams_to_affinity_label`, Eqs. (9)-(10)."""
import numpy as np, pytest, torch

from oracle import close, load, needs_oracle
from weclip.method.losses import (
    aff_loss_ce, aff_loss_l1, affinity_label, seg_loss_balanced, total_loss, upsample, window)

pytestmark = needs_oracle

@pytest.fixture
def small():
    "Random labels with 255 and the logits drawn with the stored seed."
    z = load("loss_small")
    logits = torch.from_numpy(np.random.RandomState(int(z["logits_seed"])).randn(2, 21, 96, 112)).float()
    return z, logits.requires_grad_(), z["label"].long()

def test_window():
    z = load("loss_small")
    close(window(6, 7, 2, torch.device("cpu")), z["mask_r2"], atol=0)
    close(window(20, 20, 8, torch.device("cpu")).sum(1), z["mask_r8_rowsum"], atol=0)

def test_affinity_label_and_loss(small):
    z, _, lbl = small
    aff_lbl = affinity_label(lbl, (6, 7), radius=2)
    close(aff_lbl, z["aff_label"], atol=0)
    assert (aff_lbl == 1).sum() + 1 == z["pos"] and (aff_lbl == 0).sum() + 1 == z["neg"]
    close(aff_loss_l1(z["pred"], aff_lbl), z["aff_loss"], atol=0, rtol=1e-6)

def test_seg_loss(small):
    z, logits, lbl = small
    loss = seg_loss_balanced(logits, lbl)
    loss.backward()
    close(loss, z["seg_loss"], atol=0, rtol=1e-6)
    close(logits.grad[..., ::8, ::8], z["seg_grad_sub"], atol=1e-9, rtol=1e-5)

def test_seg_loss_without_foreground(small):
    "The authors' value is NaN; their gradient is finite and ours equals it."
    z, logits, lbl = small
    loss = seg_loss_balanced(logits, torch.zeros_like(lbl))
    loss.backward()
    assert z["seg_loss_all_bg"].isnan() and loss.isfinite()
    close(logits.grad[..., ::8, ::8], z["seg_grad_all_bg_sub"], atol=1e-9, rtol=1e-5)

@pytest.mark.parametrize("phase", ["pre", "post"])
def test_train_batch(phase):
    z = load(f"loss_{phase}")
    out = load("decoder_train")
    lbl = load(f"rfm_{phase}")["labels"].long()
    aff_lbl = affinity_label(lbl, (20, 20), radius=8)
    close(aff_lbl, z["aff_label"], atol=0)
    pos_neg = torch.stack([(aff_lbl == 1).sum(), (aff_lbl == 0).sum()]) + 1
    assert pos_neg.tolist() == z["pos_neg"].tolist()
    fu = out["F_u"].flatten(2)
    seg, bg, fg, aff, total = z["losses"]
    ours = total_loss(out["seg"], torch.sigmoid(fu.mT @ fu), lbl, (20, 20), lam=.1, radius=8)
    close(ours.seg, seg, atol=0, rtol=1e-5)
    close(ours.aff, aff, atol=0, rtol=1e-5)
    close(ours.total, total, atol=0, rtol=1e-5)
    logits = upsample(out["seg"], (320, 320))
    one_side = lambda keep: 2*seg_loss_balanced(logits, lbl.masked_fill(~keep, 255))  # the other side empty
    close(one_side(lbl == 0), bg, atol=0, rtol=1e-5)
    close(one_side(lbl > 0), fg, atol=0, rtol=1e-5)

def test_prediction_bias_gradient():
    "d L_seg / d bias of the prediction layer is the sum of the gradient in the logits, over pictures and tokens."
    z = load("loss_pre")
    out = load("decoder_train")
    lbl = load("rfm_pre")["labels"].long()
    logits = out["seg"].clone().requires_grad_()
    seg_loss_balanced(upsample(logits, (320, 320)), lbl).backward()
    close(logits.grad.sum((0, 2, 3)), z["grad__decoder.linear_pred.bias"], atol=1e-6, rtol=1e-4)

def test_cross_entropy_affinity_is_pytorchs(small):
    z, _, lbl = small
    aff_lbl = affinity_label(lbl, (6, 7), radius=2)
    keep = aff_lbl != 255
    theirs = torch.nn.functional.binary_cross_entropy(z["pred"][keep], aff_lbl[keep].float())
    close(aff_loss_ce(z["pred"], aff_lbl), theirs, atol=1e-6)
