"""Normalisation against the authors' code."""
from oracle import close, load, needs_oracle
from weclip.data.pictures import preprocess

@needs_oracle
def test_preprocess():
    z = load("inputs_train")
    close(preprocess(z["images"])[:, :, ::8, ::8], z["norm_sub"], atol=1e-6)
