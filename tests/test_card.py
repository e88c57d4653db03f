"What a training asks of a graphics card, on a machine without one: objects that say they are on a card take its place."
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weclip.method.config import preset
from weclip.data.voc import SegData
from weclip.world import classifier
from weclip.engine import job, train as page
from weclip.engine.parallel import ALONE
from weclip.use import commands

def stand_in(device="cuda"):
    "A model of which the settings, the device and a decoder are known."
    place = torch.device(device)
    text = SimpleNamespace(device=place, is_cuda=place.type == "cuda")
    return SimpleNamespace(cfg=preset("voc"), text_fg=text, decoder=nn.Linear(2, 2), n_learnable=lambda: 6)

@pytest.fixture
def calls(monkeypatch):
    "(name, device) of what was set for a card."
    seen = []
    for name in ("set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None, name=name: seen.append((name, str(device))))
    return seen

def test_batches_are_locked_for_the_card_that_trains(calls, monkeypatch):
    monkeypatch.setattr(page, "batches", lambda *args, pin, **kwargs: pin)
    data = SegData({}, {}, ())
    found = {device: page.feed_of(stand_in(device), data) for device in ("cpu", "cuda:0", "cuda:1")}
    assert found == {"cpu": False, "cuda:0": True, "cuda:1": True}
    assert calls == [("set_device", "cuda:1")]

def test_memory_is_counted_from_the_start_of_the_training_on_its_card(calls, tmp_path):
    for device in ("cpu", "cuda:1"):
        job.watch(None, stand_in(device), tmp_path, "tiny")
    assert calls == [("reset_peak_memory_stats", "cuda:1")]

def test_one_kernel_for_all_parameters():
    found = [page.optimiser(stand_in(device), preset("voc")) for device in ("cpu", "cuda")]
    assert [opt.param_groups[0]["fused"] for opt in found] == [None, True]

def test_a_step_without_a_scale_makes_none(monkeypatch):
    made = []
    monkeypatch.setattr(torch.amp, "GradScaler", made.append)
    model = stand_in("cpu")
    opt = page.optimiser(model, model.cfg)
    def loss(model, batch, dynamic): return SimpleNamespace(total=model.decoder(torch.ones(2)).sum()), None
    before = model.decoder.weight.detach().clone()
    page.train_step(model, opt, None, 100, loss)
    assert not made and not model.decoder.weight.equal(before)

def test_a_card_gets_as_many_readers_as_keep_up(monkeypatch):
    monkeypatch.setattr(job, "pace", lambda *_: (.4, .1))
    found = {}
    for cores in (16, 4):
        monkeypatch.setattr(job, "cores_here", lambda cores=cores: cores)
        found[cores] = [job._readers(stand_in(), None, workers) for workers in (0, 1, 2)]
    assert found == {16: [5, 5, 2], 4: [3, 3, 2]}
    assert [job._readers(stand_in("cpu"), None, workers) for workers in (0, 1, 2)] == [0, 0, 2]

def test_the_command_chooses_its_readers(monkeypatch, tmp_path, capsys):
    took = []
    monkeypatch.setattr(job, "cores_here", lambda: 4)
    data = SegData({"a": tmp_path/"a.jpg"}, {}, ("cat",))
    def keep(model, data, out, resume, loss, workers, **kwargs): took.append(workers)
    monkeypatch.setattr(commands, "pace", lambda *_: (.4, .1))
    monkeypatch.setattr(commands, "join", lambda device: (ALONE, device))
    monkeypatch.setattr(commands, "open_source", lambda *args, device, **kwargs: (stand_in(device), data))
    monkeypatch.setattr(commands, "train_model", keep)
    monkeypatch.setattr(commands, "save_model", lambda *_: None)
    told = []
    for device, workers in (("cuda", None), ("cuda", 2), ("cuda", 0), ("cpu", None)):
        commands.train(out=tmp_path/"run", device=device, workers=workers)
        told.append(capsys.readouterr().out)
    assert took == [3, 2, 0, 1]
    advice = "5 would keep up (--workers 5), but there are only 4 cores"
    assert [advice in text for text in told] == [True]*4

def test_the_card_asked_for_is_the_one_looked_at(monkeypatch):
    cards = {"cuda:0": (7, 5), "cuda:1": (8, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: cards[str(device)])
    assert [classifier.has_bf16(device) for device in cards] == [False, True]
