"""The sentences we ask CLIP are, token for token, those of the released code."""
import pytest, torch
from oracle import load, needs_oracle
from weclip.method.classes import COCO, VOC

@needs_oracle
@pytest.mark.parametrize("classes,name", [(VOC, "voc"), (COCO, "coco")])
@pytest.mark.parametrize("kind", ["fg", "bg"])
def test_tokens(classes, name, kind):
    from open_clip.tokenizer import SimpleTokenizer
    tokens = SimpleTokenizer()(getattr(classes, f"{kind}_texts"))
    assert torch.equal(tokens, load("text")[f"{name}_{kind}_tokens"].long())
