import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(__file__))

import pytest
import torch

def pytest_terminal_summary(terminalreporter):
    "Why tests were skipped, each reason once."
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple)]
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in skipped)
    for why, n in reasons.most_common():
        terminalreporter.write_line(f"{n} skipped: {why}")

@pytest.fixture(scope="session")
def encoded():
    "The authors' train batch through the frozen encoder: dict(clip, model, img, enc), the last 11 maps included."
    from oracle import clip_weights, load
    from weclip.method.clip import FrozenCLIP
    from weclip.engine.weights import load_clip
    clip = load_clip(clip_weights())
    model = FrozenCLIP(clip)
    mean = torch.tensor([123.675, 116.28, 103.53])
    std = torch.tensor([58.395, 57.12, 57.375])
    img = ((load("inputs_train")["images"].float() - mean)/std).movedim(-1, 1).contiguous()
    return dict(clip=clip, model=model, img=img, enc=model.encode(img, n_attn=11))

@pytest.fixture(scope="session")
def text(encoded):
    "Unit text features of VOC's prompts, from the authors' token ids: foreground (20, 512), background (25, 512)."
    from oracle import load
    from weclip.method.clip import encode_tokens
    return {k: encode_tokens(encoded["clip"], load("text")[f"voc_{k}_tokens"].long()) for k in ("fg", "bg")}
