"""The sentences we ask CLIP are, token for token, those of the released code."""
import torch
from oracle import load, needs_oracle
from weclip.method.classes import COCO, VOC

@needs_oracle
def test_tokens():
    from open_clip.tokenizer import SimpleTokenizer
    tokenizer = SimpleTokenizer()
    expected = load("text")
    odd = []
    for classes in (VOC, COCO):
        for kind, texts in (("fg", classes.fg_texts), ("bg", classes.bg_texts)):
            name = f"{classes.name}_{kind}_tokens"
            if not torch.equal(tokenizer(texts), expected[name].long()):
                odd.append(name)
    assert not odd
