"""What the shipped weights must be able to do, on 150 pictures of the dev split that neither has seen."""
import pytest
import torch

from weclip.machine import ASSETS
from weclip.method.classes import SCENES
from weclip.data.voc import open_data
from weclip.world.scenes import write_scenes
from weclip.world.tinyclip import average_precision, tiny_clip, zero_shot
from weclip.engine.weights import build, load_model
from weclip.engine.infer import evaluate
from weclip.engine.pseudo import score_stages

pytestmark = pytest.mark.slow

@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=0, val=0, dev=150)
    return open_data(root, "dev", SCENES.classes, with_masks=True, norm="clip")

def test_zero_shot(dev):
    scores = zero_shot(tiny_clip(), [dev.read(i)[0] for i in dev.ids])
    truth = torch.tensor([[c in dev.tags[i] for c in range(len(SCENES.classes))] for i in dev.ids])
    assert average_precision(scores, truth).mean() >= .85

def test_refinement_before_training(dev):
    miou = {k: s["miou"] for k, s in score_stages(build("tiny"), dev, progress=False).items()}
    assert miou["pseudo"] >= .45 and miou["pseudo"] >= miou["initial+PAR"] + .08, miou

def test_shipped_decoder(dev):
    model = load_model(ASSETS/"scenes-decoder.safetensors")
    scores = evaluate(model, dev, modes=("single",), progress=False)["single"]
    assert scores["miou"] >= .45, scores["miou"]

def test_size():
    assert (ASSETS/"weclip-tiny.safetensors").stat().st_size <= 8e6
