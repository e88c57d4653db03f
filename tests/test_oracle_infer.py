"""Sizes, network input and DenseCRF against the outputs of the authors' code."""
import json

import torch
from oracle import ORACLE, close, load, needs_oracle
from weclip.data.pictures import preprocess
from weclip.engine.infer import dense_crf, fit, fit_size

@needs_oracle
def test_long_sides_that_lose_a_pixel():
    theirs = json.loads((ORACLE/"long_side_511_sizes.json").read_text())
    ours = [n for n in range(64, 2049) if max(fit_size((n//2, n), 512)) == 511]
    assert ours == theirs
    assert all(max(fit_size((n//2, n), 512, 16)) == 512 for n in theirs)

@needs_oracle
def test_network_input():
    val = load("val_375x500")
    img = fit(torch.as_tensor(preprocess(val["image"].numpy(), "imagenet"))[None], 512, 1, 16)
    assert list(img.shape[2:]) == val["in_hw"].tolist()
    close(img[0, :, ::8, ::8], val["x_sub"], 1e-5)

@needs_oracle
def test_dense_crf():
    z = load("crf_small")
    close(torch.from_numpy(dense_crf(z["image"].numpy(), z["prob"].numpy())), z["Q"], 1e-4)
