"""The scores against the authors' `evaluate.scores`."""
import pytest, torch

from oracle import close, load, needs_oracle
from weclip.method.metrics import confusion, iou, mean_iou, scores

@pytest.fixture
def small(): return load("evaluate_small")

@needs_oracle
def test_confusion(small):
    close(confusion(small["pred"], small["gt"], 21), small["hist"], atol=0)

@needs_oracle
def test_running_sum(small):
    conf = sum(confusion(p, t, 21) for p, t in zip(small["pred"], small["gt"]))
    close(conf, small["hist"], atol=0)

@needs_oracle
def test_scores(small):
    conf = confusion(small["pred"], small["gt"], 21)
    theirs = small["iou"]
    ours = iou(conf)
    assert torch.equal(ours.isnan(), theirs.isnan())
    close(ours.nan_to_num(-1), theirs.nan_to_num(-1), atol=1e-12)
    close(torch.tensor(mean_iou(conf)), small["miou"], atol=1e-6)
    s = scores(conf, [str(i) for i in range(21)])
    for ours, theirs in (("miou", "miou"), ("pixel_acc", "pAcc"), ("mean_acc", "mAcc")):
        assert abs(s[ours] - small[theirs].item()) < 1e-12

def test_brute_force():
    torch.manual_seed(0)
    lbl = torch.randint(0, 6, (2, 17, 13))
    pred = torch.randint(0, 6, (2, 17, 13))
    lbl[lbl == 5] = 255
    conf = confusion(pred, lbl, 6)
    assert conf.tolist() == [[((lbl == t) & (pred == p)).sum().item() for p in range(6)] for t in range(6)]
    both = [((lbl == c) & (pred == c)).sum()/((lbl == c) | ((pred == c) & (lbl != 255))).sum() for c in range(5)]
    close(iou(conf)[:5], torch.stack(both), atol=1e-6)
    assert abs(mean_iou(conf) - torch.stack(both).mean().item()) < 1e-6  # class 5 is predicted but never true: left out
