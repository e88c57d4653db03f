"""What would spoil the page of `tinyclip`: the shipped encoder's training, stopped and continued, on a few pictures."""
import json

import numpy as np
import pytest
import torch

import weclip.world.tinyclip as tinyclip
from weclip.world.classifier import class_logits, load_classifier, new_classifier, train_classifier
from weclip.world.tinyclip import pretraining_set, save_tiny, tiny_clip, train_tiny, zero_shot

pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
FEW = dict(n_pictures=8, bs=4, horizon=64, cool=8, full_share=.5, every=1, workers=1)

def test_a_stopped_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = train_tiny(tmp_path/"whole", samples=16, **FEW).state_dict()
    real = tinyclip.batch
    def dying(data, step, *rest):
        if step == 2: raise KeyboardInterrupt
        return real(data, step, *rest)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tinyclip, "batch", dying)
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as if written on a card
        train_tiny(tmp_path/"parts", samples=16, **FEW)
    parts = train_tiny(tmp_path/"parts", samples=16, **FEW)
    assert all(v.equal(whole[k]) for k, v in parts.state_dict().items()) and not parts.training
    log = (tmp_path/"parts"/"log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4]
    shipped = tiny_clip().state_dict()
    assert not any(v.equal(shipped[k]) for k, v in whole.items() if k.endswith("c_fc.weight"))
    save_tiny(parts, tmp_path/"shipped")
    assert {p.name for p in (tmp_path/"shipped").iterdir()} == {"weclip-tiny.json", "weclip-tiny.safetensors"}

def test_zero_shot_computes_where_the_model_is():
    model = tiny_clip().to("meta")
    seen = []
    for part in (model.token_embedding, model.visual.conv1):
        part.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].device.type))
    scores = zero_shot(model, [np.zeros((90, 120, 3), np.uint8)])
    assert [*seen, scores.device.type] == ["meta"]*3

def test_pictures_are_drawn_once(tmp_path):
    a = pretraining_set(tmp_path, 4, workers=1)
    stamp = (tmp_path/"img.npy").stat().st_mtime_ns
    b = pretraining_set(tmp_path, 4, workers=1)
    assert (a["img"] == b["img"]).all() and (tmp_path/"img.npy").stat().st_mtime_ns == stamp and a["facts"].any()

def test_the_classifier_is_stored_as_it_was_trained(tmp_path):
    model = train_classifier(tmp_path, 16, **FEW)
    stored = load_classifier(tmp_path/"classifier.safetensors")
    img = torch.rand(2, 3, 112, 112)
    assert (class_logits(stored, img) - class_logits(model, img)).abs().max() < 1e-2  # half precision
    assert not model.head.weight.equal(new_classifier(0).head.weight) and not stored.training
    losses = [json.loads(line)["loss"] for line in (tmp_path/"log.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and all(.3 < x < 1.5 for x in losses)  # of a guess: log 2
    with pytest.raises(FileNotFoundError, match="weclip classifier"):
        load_classifier(tmp_path/"nowhere.safetensors")
