"""What one backbone can take from WeCLIP+, against the outputs of its authors' code."""
import pytest, torch

from oracle import PLUS, close, load, needs_plus
from weclip.beyond.rfm_plus import cross_loss, dice_loss, hard_label, plain_dice
from weclip.method.losses import affinity_label, aff_loss_l1, seg_loss_balanced

pytestmark = needs_plus

DICE = {  # name of the value -> label, its gradient where it was stored, and which mendings are on
    "dice": ("label", "grad_sub", {}),
    "dice_no_ignore": ("label_no_ignore", "grad_no_ignore_sub", {}),
    "dice_masked": ("label", None, dict(ignored="masked")),
    "dice_masked_present": ("label", None, dict(ignored="masked", over="present")),
    "dice_no_ignore_present": ("label_no_ignore", None, dict(over="present"))}

@pytest.mark.parametrize("form", [plain_dice, dice_loss])
def test_dice(form):
    z = load("plus_dice_small", PLUS)
    for name, (which, grad, mendings) in DICE.items():
        lbl = z[which].long()
        logits = z["logits"].clone().requires_grad_()
        loss = form(logits, lbl, **mendings)
        loss.backward()
        close(loss, z[name], atol=0, rtol=3e-7)
        assert torch.equal(lbl, z[which].long()), f"{name}: the label was changed"
        if grad:
            close(logits.grad[..., ::2, ::2], z[grad], atol=1e-9)

def test_dice_as_released_changes_the_label_and_ours_does_not():
    "255 became class 21 in the caller's tensor."
    z = load("plus_dice_small", PLUS)
    assert torch.equal(z["label_after"], z["label"].masked_fill(z["label"] == 255, 21))
    assert not torch.equal(z["label_after"], z["label"])

def two_heads(z):
    "Scores of both heads, with gradient."
    return [z[f"seg_{head}"].clone().requires_grad_() for head in ("clip", "dino")]

def test_cross_labels():
    z = load("plus_losses_small", PLUS)
    assert torch.equal(hard_label(z["seg_dino"], (96, 96)), z["target_of_clip"].long())
    assert torch.equal(hard_label(z["seg_clip"], (96, 96)), z["target_of_dino"].long())

def total_of(z, a, b, lbl, **cross):
    "The trainer's loss before self labels; (total, cross-pseudo loss)."
    aff = aff_loss_l1(z["A_f"], affinity_label(z["pseudo_label"].long(), (6, 6), 2))
    mean = (a + b)/2
    both = cross_loss(a, b, (96, 96), **cross)
    return seg_loss_balanced(mean, lbl) + .1*aff + .1*both + dice_loss(mean, lbl), both

def test_cross_loss():
    z = load("plus_losses_small", PLUS)
    a, b = two_heads(z)
    total, both = total_of(z, a, b, z["pseudo_label"].long())
    total.backward()
    close(both, z["losses"][2] + z["losses"][3], atol=0, rtol=1e-6)
    close(total, z["losses"][5], atol=0, rtol=1e-6)
    close(a.grad, z["grad_clip"], atol=1e-7)
    close(b.grad, z["grad_dino"], atol=1e-7)

@pytest.mark.parametrize("empty", ["nan", "zero"])
def test_cross_loss_with_an_empty_side(empty):
    "No pixel of one head is background: the released loss is not a number, its gradient is sound."
    z = load("plus_losses_small", PLUS)
    a, b = two_heads(z)
    no_background = b - 50*torch.eye(21)[0].view(1, 21, 1, 1)
    total, both = total_of(z, a, no_background, z["pseudo_label"].long(), empty=empty)
    total.backward()
    assert both.isnan() == total.isnan() == (empty == "nan")
    close(a.grad, z["nobg_grad_clip"], atol=1e-7)
    close(b.grad, z["nobg_grad_dino"], atol=1e-7)
