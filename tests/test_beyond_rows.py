"""Every row of table `beyond`, shortened: trained, stopped and gone on with, scored, kept, loaded and used."""
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import weclip
from test_project import ROOT, imports
from weclip.machine import CODE
from weclip.method.config import to_dict
from weclip.method.seams import METHOD, PLACES, foreign, is_registered, origin, registered
from weclip.method import seams
from weclip.engine.cache import cache_files
from weclip.engine.job import open_training, run_job
from weclip.engine.supervised import loss_for
from weclip.engine.train import train
from weclip.engine.weights import load_model
from weclip.lab.beside import model_of_run, regions_beside
from weclip.lab.plan import BEYOND, SUCCESSORS, TABLES, THE_PAPERS, Grid, changes, row_run, run_code, run_config
from weclip.lab.results import keep_run, read_results, result_file, run_rows
from weclip.world.scenes import write_scenes

TABLE = TABLES["beyond"]
QUICK = Grid(seeds=(1,), quick=True)
SMALL = dict(d=16, layers=1, crop=64, iters=4, switch=2, dropout=0.)
LABELS = [row.label for row in TABLE.rows]

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    "Folder of runs, with the classifier and the superpixels that rows share."
    return tmp_path_factory.mktemp("beyond")

@pytest.fixture(scope="module")
def root(out): return write_scenes(out/"scenes", train=16, val=3)

def config_of(label):
    row = TABLE.rows[LABELS.index(label)]
    cfg = run_config(row_run(TABLE, row, QUICK))
    return replace(cfg, **{**SMALL, "switch": min(SMALL["switch"], cfg.switch)})

def parts(label, root, out, folder):
    "Model, masks and training set of a row."
    cfg = config_of(label)
    model = model_of_run("tiny", cfg, out, folder, quick=True)
    regions = regions_beside(cfg, root, out, ("train", "val"))
    return model, regions, open_training(model, root, "train", regions=regions)

@pytest.mark.parametrize("label", LABELS)
def test_a_row_trains_stops_goes_on_is_scored_and_loads(label, root, out, tmp_path):
    def stop(i, _):
        if i == 1: raise KeyboardInterrupt
    model, regions, data = parts(label, root, out, tmp_path/"whole")
    expected = train(model, data, tmp_path/"whole", loss=loss_for(model.cfg), log_every=1, progress=False)
    stopped, _, data = parts(label, root, out, tmp_path/"stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, tmp_path/"stopped", loss=loss_for(model.cfg), log_every=1, progress=False, on_step=stop)
    scored = parts(label, root, out, tmp_path/"stopped")[0]
    run_job(scored, root, tmp_path/"stopped", modes=("single",), resume=True, regions=regions, sheet=1,
            say=lambda text: None)
    assert len(expected) == 4 and all(np.isfinite(step).all() for step in expected)
    whole = {name: p.detach() for name, p in model.decoder.named_parameters()}
    for name, p in scored.decoder.named_parameters():
        assert p.equal(whole[name]), name
    result = json.loads((tmp_path/"stopped/results.json").read_text())
    found = {score["mode"]: score["miou"] for score in result["scores"]}
    assert {"initial", "refined", "pseudo", "single"} <= set(found) and all(0 <= x <= 1 for x in found.values())
    loaded = load_model(tmp_path/"stopped/model.safetensors")
    picture = Image.open(next((root/"JPEGImages").glob("val_00000*")))
    predicted = weclip.predict(picture, loaded)
    assert predicted.shape == picture.size[::-1]
    assert np.array_equal(predicted, weclip.predict(picture, scored.eval()))

def test_rows_change_what_they_say():
    changed = {label: set(changes(TABLE, row, QUICK)[0]) for label, row in zip(LABELS, TABLE.rows)}
    assert changed == {label: set(settings) for label, settings, _ in BEYOND}
    names = {row_run(TABLE, row, QUICK).name for row in TABLE.rows}
    assert len(names) == len(LABELS)
    learning = {"lr", "iters", "bs", "wd", "crop", "d", "layers", "seed"}
    assert not {label: fields & learning for label, fields in changed.items() if fields & learning}

def test_the_second_backbone_is_in_the_models_folder_under_its_name_alone(root, out, tmp_path):
    model, _, _ = parts("second backbone", root, out, tmp_path/"run")
    assert dict(model.cfg.options)["model.second_weights"] == "classifier.safetensors"
    assert (tmp_path/"run/classifier.safetensors").is_file() and str(tmp_path) not in json.dumps(to_dict(model.cfg))

def test_kept_features_of_rows_share_what_is_the_same(root, out, tmp_path):
    "Crops are everybody's, tokens those of one encoder, attention and CAM those of one CAM."
    files = {}
    for label in ("WeCLIP", "softmax on the CAM", "surgery CAM", "superpixels vote", "second backbone"):
        model, _, data = parts(label, root, out, tmp_path/label)
        model.cfg = replace(model.cfg, views=1)
        files[label] = cache_files("cache", model, data)
    paper = files["WeCLIP"]
    assert files["softmax on the CAM"] == paper
    assert {k: v for k, v in files["superpixels vote"].items() if k != "regions"} == paper
    surgery = files["surgery CAM"]
    assert {k for k in paper if surgery[k] != paper[k]} == {"attn", "cam"}
    plus = files["second backbone"]
    assert {k for k in paper if plus[k] == paper[k]} == {"img", "box"} and "second" in plus

# ---- the code behind a result

def test_the_papers_functions_are_those_of_its_pages():
    "What the plan knows without PyTorch is what is registered."
    for place in PLACES:
        is_registered(place, "?")  # imports the successors' pages
        own = {name for name in registered(place)
               if origin(seams._FUNCTIONS[place][name])[0].startswith(METHOD)}
        assert own == set(THE_PAPERS[place]), place

def test_a_row_counts_the_code_of_its_functions():
    for row in TABLE.rows:
        cfg = run_config(row_run(TABLE, row, QUICK))
        assert (run_code(cfg) == run_code(config_of("WeCLIP"))) == (not foreign(cfg)), row.label
        assert set(foreign(cfg).values()) <= {f"weclip.{name}" for name in SUCCESSORS}, row.label

def test_the_successors_code_is_whole():
    "Every module of the package that they import counts, theirs or the method's, but for files and words."
    known = {*CODE, *SUCCESSORS, "machine", "method.config"}
    files = {name: ROOT/"weclip"/f"{name.replace('.', '/')}.py" for name in SUCCESSORS}
    odd = {name: set(imports(file)) - known for name, file in files.items()}
    assert not {name: more for name, more in odd.items() if more}

def test_results_of_other_code_are_stale(tmp_path, monkeypatch):
    from weclip.lab.results import _invented
    grid = QUICK._replace(results=tmp_path)
    runs = [row_run(TABLE, row, grid) for row in TABLE.rows[:2]]
    for run in runs:
        keep_run(result_file(tmp_path, "scenes"), run_rows(_invented(run)))
    assert all(isinstance(found, dict) for found in read_results(tmp_path, runs).values())
    monkeypatch.setattr("weclip.lab.plan.SUCCESSORS", ["beyond.surgery"])  # as if another page had changed
    paper, successor = (read_results(tmp_path, runs)[run.name] for run in runs)
    assert isinstance(paper, dict) and successor.startswith("stale: made by code")
