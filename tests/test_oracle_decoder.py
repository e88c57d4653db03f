"""The decoder against the authors' `SegFormerHead` and `DecoderTransformer`, Eqs. (1)-(4)."""
import json

import pytest, torch

from oracle import ORACLE, close, decoder_weights, load, needs_oracle
from weclip.method.decoder import Decoder
from weclip.engine.weights import convert_official, decoder_from_official, load_decoder

pytestmark = needs_oracle

@pytest.fixture(scope="module")
def decoder(): return decoder_from_official(decoder_weights()).eval()

def test_sizes_and_keys(decoder):
    sd = decoder_weights()
    assert sum(p.numel() for p in decoder.parameters()) == sum(v.numel() for v in sd.values()) == 5_985_045
    assert (decoder.width, len(decoder.mlps), len(decoder.phi), decoder.pred.out_features) == (768, 11, 3, 21)
    assert len(convert_official(sd)) == len(sd) == len(decoder.state_dict())

def test_weights_are_the_recorded_ones(decoder):
    stored = json.loads((ORACLE/"weights_fingerprint.json").read_text())["decoder"]
    stored = convert_official({k: torch.tensor(v, dtype=torch.float64) for k, v in stored.items()})
    ours = decoder.state_dict()
    assert stored.keys() == ours.keys()
    for k, v in ours.items():
        v = v.double()
        close(torch.stack((v.sum(), v.abs().sum(), v.flatten()[0])), stored[k], atol=1e-6, rtol=1e-9)

def test_full_checkpoint_keys():
    "All 388 entries of a released checkpoint, in shape only: the decoder's are found, the rest is left aside."
    keys = json.loads((ORACLE/"official_state_dict_keys.json").read_text())
    full = {"module." + k: torch.zeros(shape) for k, (shape, _) in keys.items()}
    assert len(full) == 388
    decoder = decoder_from_official(full)
    with pytest.raises(ValueError, match=r"pred.weight: expected \(81, 256\), got \(21, 256\)"):
        load_decoder(Decoder(n_classes=81), convert_official(full))
    with pytest.raises(ValueError, match="mlps.11"):
        load_decoder(Decoder(n_feats=12), convert_official(full))
    assert len(decoder.state_dict()) == 84

@torch.no_grad()
def test_fuse(decoder):
    "Eqs. (1)-(2) act on each token alone, so every 16th token of the stored features is enough."
    # (11, 4, 25, 768): tokens 16, 32, ... of 401; token 0 is the class token
    tokens = load("encoder_train")["feats_sub"][:, :, 1:]
    close(decoder.fuse(tokens, (5, 5)).flatten(2), load("decoder_train")["F_u"].flatten(2)[..., 15::16], atol=1e-4)

@torch.no_grad()
def test_head(decoder):
    z = load("decoder_train")
    logits = decoder.head(z["F_u"])
    close(logits, z["seg"], atol=1e-4)
    up = torch.nn.functional.interpolate(logits, (320, 320), mode="bilinear", align_corners=False)
    close(up[..., ::8, ::8], z["seg_up_sub"], atol=1e-4)

@torch.no_grad()
def test_affinity_of_fu(decoder):
    "Our F_u, through sigmoid(F_u^T F_u), on the tokens we have."
    z = load("decoder_train")
    fu = decoder.fuse(load("encoder_train")["feats_sub"][:, :, 1:], (5, 5)).flatten(2)  # (4, 256, 25)
    close(torch.sigmoid(fu.mT @ fu)[:2], z["A_f"][:, 15::16, 15::16], atol=1e-4)
    close(torch.sigmoid(z["F_u"].flatten(2)[..., ::16].mT @ z["F_u"].flatten(2)), z["A_f_rows"], atol=1e-5)
