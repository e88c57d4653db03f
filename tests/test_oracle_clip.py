"""The frozen encoder against the authors' (float32): text features, position embedding, tokens, attention."""
import pytest, torch
from oracle import clip_weights, close, load, needs_oracle
from weclip.method.clip import encode_tokens, resize_pos
from weclip.engine.weights import load_clip

pytestmark = needs_oracle

@pytest.mark.parametrize("k", ("voc_fg", "voc_bg", "coco_fg", "coco_bg"))
def test_text(encoded, k):
    close(encode_tokens(encoded["clip"], load("text")[f"{k}_tokens"].long()), load("text")[f"{k}_feat"], 2e-6)

def test_prompts(encoded):
    "Our words through open_clip's tokenizer are the authors' token ids."
    from open_clip.tokenizer import SimpleTokenizer
    assert torch.equal(SimpleTokenizer()(["a clean origami aeroplane."])[0], load("text")["voc_fg_tokens"][0].long())

def test_position_embedding():
    pos = resize_pos(clip_weights()["visual.positional_embedding"], (20, 20))
    close(pos[::8], load("encoder_train")["pos_emb_20x20"], 1e-6)

def test_normalised_images(encoded): close(encoded["img"][..., ::8, ::8], load("inputs_train")["norm_sub"], 1e-5)

def test_tokens(encoded):
    z = load("encoder_train")
    enc = encoded["enc"]
    assert enc.grid == (20, 20) and len(enc.tokens) == 11
    close(torch.stack(enc.tokens)[:, :, ::16], z["feats_sub"], 1e-4)
    close(enc.tokens[-1][0], z["feat11_img0"], 2e-4)   # the stored values are 1.1e-4 from a float64 run, ours 5e-6

def test_attention(encoded):
    z = load("encoder_train")
    attn = encoded["enc"].attn
    close(attn[:, :, 15::16].transpose(0, 1), z["attn_rows"][:11, :, 1:, 1:], 1e-6)   # token 16 of 401 is patch 15
    close(attn[1], z["attn_img1_f16"][:11, 1:, 1:], 3e-4, 1e-3)                          # stored in float16
    close(attn.double().sum((-2, -1)).T, z["attn_mass"][:11], 2e-3)

def test_tokens_do_not_depend_on_reading_attention(encoded):
    enc = encoded["model"].encode(encoded["img"][:1])
    close(enc.tokens[-1], encoded["enc"].tokens[-1][:1], 5e-5)

def test_other_architecture_is_refused():
    with pytest.raises(ValueError, match="another architecture"):
        load_clip(clip_weights(), "ViT-B-32-quickgelu")
