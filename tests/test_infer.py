"""What would spoil the page of `infer`: pools of processes, abandoned streams, odd sizes."""
import sys

import numpy as np, pytest, torch
import torch.nn.functional as F
from weclip.classes import ClassSet
from weclip.config import preset
from weclip.infer import evaluate, multi_scale_logits, predict, predict_stream

class Toy(torch.nn.Module):
    "Classes by colour, with dropout that must stay off."
    classes = ClassSet("toy", ("red", "blue"), ("red", "blue"))
    def __init__(self, patch=16, **settings):
        super().__init__()
        self.patch, self.cfg = patch, preset("voc", **{"long_side": 96, **settings})
        self.conv, self.drop = torch.nn.Conv2d(3, 3, 1), torch.nn.Dropout(.5)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([[0., 0, 0], [4, 0, -4], [-4, 0, 4]])[..., None, None])
            self.conv.bias.copy_(torch.tensor([1., 0, 0]))
    def logits(self, img): return self.drop(self.conv(F.avg_pool2d(img, self.patch)))

def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [(f"p{i}", rng.integers(0, 255, (20 + 7*i, 90 - 9*i, 3)).astype(np.uint8)) for i in range(n)]

@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stream_equals_one_by_one(workers):
    model, samples = Toy(), pictures(6)
    got = list(predict_stream(model, iter(samples), workers=workers))
    assert [k for k, _ in got] == [k for k, _ in samples]
    for (_, ids), (_, image) in zip(got, samples): assert np.array_equal(ids, predict(model, image))

def test_stream_is_bounded_and_may_be_left():
    read = []
    def samples():
        for k, p in pictures(9): read.append(k); yield k, p
    results = predict_stream(Toy(), samples(), workers=1)
    assert next(results)[0] == "p0" and len(read) == 3
    results.close()
    assert len(read) == 3

def test_stream_reports_the_picture_that_fails():
    with pytest.raises(ValueError, match="expected"): list(predict_stream(Toy(), [("a", np.zeros((3, 3, 4), np.uint8))], workers=1))

def test_modes_share_forwards():
    class Counting(Toy):
        seen = 0
        def logits(self, img): self.seen += len(img); return super().logits(img)
    model = Counting()
    data = [(k, p, np.indices(p.shape[:2]).sum(0) % 3) for k, p in pictures(3)]  # every class, or IoU is NaN
    rows = evaluate(model, data, workers=0, progress=False)
    assert model.seen == 3*2*2  # pictures, scales, mirror images
    assert list(rows) == ["single", "ms", "crf"]
    for mode in rows: assert evaluate(Toy(), data, modes=(mode,), workers=0, progress=False)[mode] == rows[mode]

def test_data_sets_are_read_whole():
    class Data:  # as SegData: ids, and a picture with its mask by id
        ids = ["p0", "p1"]
        def read(self, i): img = dict(pictures(2))[i]; return img, np.indices(img.shape[:2]).sum(0) % 3
    triples = [(i, *Data().read(i)) for i in Data.ids]
    kw = dict(crf=False, progress=False)
    assert evaluate(Toy(), Data(), **kw) == evaluate(Toy(), triples, **kw)

def test_single_without_scale_one():
    data = [(k, p, np.indices(p.shape[:2]).sum(0) % 3) for k, p in pictures(3)]  # every class, or IoU is NaN
    a, b = (evaluate(Toy(scales=s), data, modes=("single", "ms"), progress=False) for s in ((1., .75), (.5, .75)))
    assert a["single"] == b["single"]

@pytest.mark.parametrize("round_to", [1, 16])
@pytest.mark.parametrize("hw", [(1, 1), (1, 40), (5, 700), (3000, 20), (17, 31), (333, 499)])
def test_odd_sizes(hw, round_to):
    ids = predict(Toy(round_to=round_to), np.full((*hw, 3), (200, 10, 10), np.uint8))
    assert ids.shape == hw and ids.dtype == np.uint8 and (ids == 1).all()

@pytest.mark.parametrize("patch", [8, 14, 32])
def test_other_patches(patch):
    model = Toy(patch, round_to=16, long_side=0)
    img = torch.rand(2, 3, 3*patch, 4*patch)
    assert multi_scale_logits(model, img, (1., .75, 1.5), True).shape == (2, 3, 3, 4)

def test_flip_is_undone():
    img = torch.randn(2, 3, 32, 64)
    model = Toy().train()
    torch.testing.assert_close(*(multi_scale_logits(model, img, (1.,), flip) for flip in (True, False)))
    assert model.training

def test_without_pydensecrf(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    image = pictures(1)[0][1]
    assert predict(Toy(), image, crf=False).shape == image.shape[:2]
    with pytest.raises(ImportError, match="crf=False"): predict(Toy(), image)
    with pytest.raises(ImportError, match="crf=False"): predict_stream(Toy(), [("a", image)])
