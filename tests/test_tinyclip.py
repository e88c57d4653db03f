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
    file = tmp_path/"4_0"/"img.npy"
    stamp = file.stat().st_mtime_ns
    other = pretraining_set(tmp_path, 4, seed=1, workers=1)
    fewer = pretraining_set(tmp_path, 3, workers=1)
    b = pretraining_set(tmp_path, 4, workers=1)
    assert (a["img"] == b["img"]).all() and file.stat().st_mtime_ns == stamp and a["facts"].any()
    assert not (a["img"] == other["img"]).all() and (fewer["img"] == a["img"][:3]).all()

def rates_of(folder, samples, monkeypatch, **how):
    "Learning rates of a training, relative to their peak."
    rates = []
    real = tinyclip._save
    def seen(folder, step, bs, model, parts, *rest):
        rates.append(parts[0].param_groups[0]["lr"]/parts[0].defaults["lr"])
        return real(folder, step, bs, model, parts, *rest)
    with monkeypatch.context() as patch:
        patch.setattr(tinyclip, "_save", seen)
        train_tiny(folder, samples, n_pictures=8, bs=4, every=1, full_share=.5, workers=1, **how)
    return rates

def test_a_training_of_any_length_learns_and_is_cooled(tmp_path, monkeypatch):
    "One that was shorter than the full one was cooled down to 0 from its first step, or divided by 0."
    for samples in (16, 32):
        rates = rates_of(tmp_path/str(samples), samples, monkeypatch)
        steps = samples//4
        assert len(rates) == steps and min(rates[:-1]) > 0 and rates[-1] == 0
        rising = [step/200 for step in range(2, steps + 2)]  # of the warm-up
        assert rates[:steps//2 - 1] == pytest.approx(rising[:steps//2 - 1], rel=1e-3)
    longer = rates_of(tmp_path/"longer", 64, monkeypatch, horizon=16)
    assert min(longer[:-1]) > 0  # a cosine that ended at 16 samples would be 0 from there on

def test_a_cool_down_begins_before_the_end(tmp_path):
    with pytest.raises(ValueError, match="cool: expected fewer than the 16 samples"):
        train_tiny(tmp_path, samples=16, **FEW | dict(cool=16))
    with pytest.raises(ValueError, match="samples: expected at least one step of 4, got 3"):
        train_tiny(tmp_path, samples=3, **FEW)
    assert not list(tmp_path.iterdir())  # before anything is drawn
    by_default = {name: value for name, value in FEW.items() if name != "cool"}
    train_tiny(tmp_path, samples=8, **by_default)

def test_a_checkpoint_of_another_training_is_not_continued(tmp_path):
    train_tiny(tmp_path, samples=8, **FEW | dict(cool=4))
    train_tiny(tmp_path, samples=16, **FEW)  # longer: goes on
    with pytest.raises(ValueError, match="seed was 0, now 1"):
        train_tiny(tmp_path, samples=16, seed=1, **FEW)
    with pytest.raises(ValueError, match="model was new_tiny, now new_classifier"):
        train_classifier(tmp_path, 16, **FEW)

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
