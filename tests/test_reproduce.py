"""The page "Reproduce 74.9", rehearsed: its command on drawn pictures under VOC's names leaves the files that it lists.

The notebooks are executed in one process of their own, without kernels and with short settings in the place of the
profile's; everything else is what a person with a card and photographs runs.
"""
import ast
import json
import math
import os
import shlex
import shutil
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import yaml
from PIL import Image

from oracle import load, needs_oracle
from weclip.cli import main
from weclip.data.pictures import save_mask
from weclip.engine.job import score
from weclip.engine.train import learning_rate
from weclip.engine.weights import load_model
from weclip.lab.plan import Grid, plan
from weclip.method.classes import SCENES, VOC
from weclip.method.config import preset
from weclip.world.scenes import draw_split, scene_tags

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT/"nbs"/"0_tour"/"03_reproduce.ipynb"
FORM = ROOT/".github"/"ISSUE_TEMPLATE"/"reproduction.yml"
NOTEBOOKS = ("01_run.ipynb", "table1.ipynb", "table4.ipynb")
NAMES = dict(bird="bird", car="car", cup="bottle", flower="pottedplant", house="boat", lamp="tvmonitor", train="train")
LISTS = dict(train_aug=("train", 8), val=("val", 3), test=("test", 2))  # VOC's list: drawn split, pictures

# ---- the page

def cells(kind):
    found = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]

def on_page(name):
    "The value of a literal that a cell of the page assigns."
    statements = [s for code in cells("code") for s in ast.parse(code).body if isinstance(s, ast.Assign)]
    return next(ast.literal_eval(s.value) for s in statements if ast.unparse(s.targets[0]) == name)

def functions():
    "What the page imports and defines, without running its cells."
    known = (ast.Import, ast.ImportFrom, ast.FunctionDef)
    body = [s for code in cells("code") for s in ast.parse(code).body if isinstance(s, known)]
    names = {}
    exec(compile(ast.Module(body, []), str(PAGE), "exec"), names)
    return names

# ---- the folder of photographs

def draw_as_voc(voc):
    "Drawn pictures with VOC's layout, lists, names of pictures and classes; test has neither masks nor annotations."
    for name in ("JPEGImages", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (voc/name).mkdir(parents=True)
    for year, (split, (drawn, count)) in enumerate(LISTS.items(), 2007):
        ids = [f"{year}_{i:06}" for i in range(count)]
        (voc/"ImageSets"/"Segmentation"/f"{split}.txt").write_text("".join(f"{i}\n" for i in ids))
        for i, name in enumerate(ids):
            scene = draw_split(drawn, i)
            Image.fromarray(scene.img).save(voc/"JPEGImages"/f"{name}.jpg")
            if split != "test":
                annotate(voc, name, scene)

def annotate(voc, name, scene):
    "Mask and annotation of a drawn picture, each of its classes as one of VOC's."
    ids = np.arange(256, dtype=np.uint8)
    for k, drawn in enumerate(SCENES.classes, 1):
        ids[k] = 1 + VOC.classes.index(NAMES[drawn])
    save_mask(voc/"SegmentationClass"/f"{name}.png", ids[scene.lbl])
    objects = "".join(f"<object><name>{NAMES[tag]}</name></object>" for tag in scene_tags(scene))
    (voc/"Annotations"/f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")

# ---- the rehearsal

def execute_here():
    "Let papermill execute notebooks in this process."
    import nbformat
    from execnb.shell import CaptureShell
    from papermill.engines import Engine, papermill_engines
    class Here(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **settings):
            shell = CaptureShell()
            for cell in nb_man.nb.cells:
                if cell.cell_type != "code": continue
                cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
                if shell.exc: return
    papermill_engines.register(None, Here)

def compare(folder, listed, runs):
    "Files of the page's list that are not there, and files that it does not list."
    patterns = [name.replace("FULL", runs[0]).replace("PLAIN", runs[1]) for name in listed]
    files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    made = [f for f in files if f not in NOTEBOOKS and not f.endswith(".lock")]
    missing = [f"missing: {p}" for p in patterns if not any(fnmatch(f, p) for f in made)]
    return missing + [f"not listed: {f}" for f in made if not any(fnmatch(f, p) for p in patterns)]

def commands(model):
    "What the page says besides, on the rehearsal's data and model."
    assert main(["data", "voc", ".", "--check"]) == 0
    assert not main(["evaluate", "VOCdevkit/VOC2012", "--checkpoint", str(model), "--device", "cpu"])
    assert score(load_model(model), "VOCdevkit/VOC2012", "val", ["ms"], settings=dict(round_to=16))["ms"]["miou"] >= 0
    assert main(["data", "voc", ".", "--tags-from", "masks"]) == 0
    pictures = "VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt"
    if not Path(pictures).is_file(): return
    predict = ["predict", pictures, "--checkpoint", str(model), "--drop", "0", "--out", "test", "--device", "cpu"]
    assert main(predict) == 0 and not main(["data", "pack", "test", "test.tgz", "--data", "VOCdevkit/VOC2012"])
    assert Path("test.tgz").is_file()

def rehearse(folder, clip, short, has_test):
    "Everything that the page says, in a folder; what it left, for the test to look at."
    os.chdir(folder)
    voc = Path("VOCdevkit", "VOC2012")
    draw_as_voc(voc)
    if not has_test:
        (voc/"ImageSets"/"Segmentation"/"test.txt").unlink()
    built = main(["data", "voc", "."])
    Path("weclip.toml").write_text(f'voc = "{voc.as_posix()}"\nclip = "{clip}"\n')
    Path("experiments").mkdir()
    for name in NOTEBOOKS:
        shutil.copy(ROOT/"experiments"/name, "experiments")
    execute_here()
    with patch("weclip.lab.plan._shared", lambda profile, quick, length=None: short):
        status = main([*shlex.split(on_page("command"))[1:], "--device", "cpu", "--workers", "1"])
        runs = [run.name for run in plan(["table1", "table4"], Grid("voc", (1,)))]
    page = functions()
    out = Path("experiments", "runs")
    listed = [name for name in on_page("files") if has_test or "voc-test" not in name]
    log = page["read_log"](out/runs[0], (1, short["iters"]), last=short["iters"])
    commands(out/runs[0]/"model.safetensors")
    stages = {} if clip == "tiny" else page["label_scores"](voc, "val", clip, "cpu", n=1)
    return dict(
        built=built, status=status, files=compare(Path("experiments"), listed, runs), log=log,
        results=json.loads((out/runs[0]/"results.json").read_text()), notebook=(out/f"{runs[0]}.ipynb").read_text(),
        stages=list(stages))

def in_a_process(*given):
    "A rehearsal in a process of its own, since notebooks leave traces in the one that executes them."
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(rehearse, *given).result()

def check(left, clip):
    assert (left["built"], left["status"], left["files"]) == (0, 0, [])
    assert f"training on {LISTS['train_aug'][1]} pictures" in left["notebook"]
    assert left["results"]["n_train"] == LISTS["train_aug"][1] and left["results"]["backbone"] == clip
    assert {"train_minutes", "peak_gib", "config", "python", "torch"} <= set(left["results"])

TINY = dict(iters=2, switch=1, warmup=1, bs=2, crop=32, long_side=64, par_iters=2, d=16, layers=1, heads=2)
SHORT = dict(iters=20, switch=6, warmup=2, crop=96, long_side=128)

def test_a_small_rehearsal_without_the_servers_pictures(tmp_path):
    "Whoever has no account at the server trained for hours, and got no score, because the list of test was missing."
    left = in_a_process(tmp_path, "tiny", TINY, False)
    check(left, "tiny")
    assert "test: its list or a picture is not here" in left["notebook"]
    assert {s["split"] for s in left["results"]["scores"]} == {"val"}

@pytest.mark.slow
def test_a_rehearsal_with_the_papers_backbone(tmp_path):
    "ViT-B/16 with random weights, 20 iterations; the losses start where the page says."
    left = in_a_process(tmp_path, "random", SHORT, True)
    check(left, "random")
    assert left["stages"] == ["initial", "initial+PAR", "refined", "pseudo"]
    _, _, seg, aff, _, _ = (x.strip() for x in left["log"].splitlines()[2].strip("|").split("|"))
    assert abs(float(seg) - math.log(21)) < .05 and abs(float(aff) - .5) < .05

# ---- what the page says

@needs_oracle
def test_numbers_of_the_authors_trainer():
    seg, aff, _, _ = load("optim")["trace"].T.tolist()
    def listed(losses): return " and ".join(", ".join(f"{x:.2f}" for x in losses).rsplit(", ", 1))
    assert f"segmentation losses of {listed(seg)} and affinity losses of {listed(aff)}" in "\n".join(cells("markdown"))
    rates = {int(row[0]): row[4] for row in load("optim")["lr_table"].tolist()}
    ours = {i: learning_rate(i, preset("voc")) for i in (0, 50, 5_000, 29_999)}
    assert all(math.isclose(rates[i], rate, rel_tol=1e-9) for i, rate in ours.items())

def test_the_record_of_others_is_summed_up():
    without = [x for row in on_page("record") for x in row[2]]
    with_crf = [x for row in on_page("record") for x in row[3]]
    said = f"{min(without)} to {max(without)} without CRF, and {min(with_crf)} to {max(with_crf)} with it"
    assert said in "\n".join(cells("markdown"))

def test_the_form_asks_for_what_the_page_lists():
    form = yaml.safe_load(FORM.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    fields = {part["id"]: part for part in form["body"] if part["type"] != "markdown"}
    assert list(fields) == list(on_page("asked"))
    assert all(part["type"] in ("input", "textarea") and part["attributes"]["label"] for part in fields.values())
    assert [name for name, part in fields.items() if part.get("validations")] == ["command", "results"]
    assert fields["command"]["attributes"]["placeholder"] == on_page("command")
    assert form["name"] in "\n".join(cells("markdown"))
