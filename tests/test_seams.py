"""Functions of one's own in the five places of a training step: trained, kept, resumed, refused where unknown."""
import importlib, json, os, shutil, subprocess, sys
from dataclasses import replace
import pytest, torch
from safetensors import safe_open
from weclip.method.config import Config, preset
from weclip.method.par import pseudo_labels
from weclip.method.seams import PLACES, check_seams, foreign, register, registered
from weclip.method import seams
from weclip.method.decoder import Decoder
from weclip.method.model import WeCLIP
from weclip.data.voc import open_data
from weclip.engine.weights import build, load_model, save_model
from weclip.engine.cache import cache_files
from weclip.engine.train import train
from weclip.world.scenes import write_scenes
from weclip.lab.compare import _one_run
from weclip.cli import main

PLUGIN = '''
import torch
from collections import namedtuple
from weclip.method.par import pseudo_labels
from weclip.method.seams import paper_loss, register

@register("cam", "middle")
def middle(model, tokens, grid, img_idx, tag_idx, most, *, sharpness=1.):
    y, x = (torch.linspace(-1, 1, n) for n in grid)
    hill = torch.exp(-sharpness*(y[:, None]**2 + x**2))
    return hill.expand(len(img_idx), *grid).clone()

@register("affinity", "cosine_of_mine")
def cosine(model, fu, frozen, *, floor=0.):
    fu = torch.nn.functional.normalize(fu.flatten(2), dim=1)
    return (fu.mT @ fu).clamp(min=floor, max=1)

@register("refine", "along_the_decoder")
def along(model, frozen, aff, logits, dynamic, most):
    rows = aff[frozen.img_idx]
    return (rows/rows.sum(-1, keepdim=True) @ frozen.cam.flatten(1)[..., None])[..., 0].view_as(frozen.cam)

@register("labels", "no_par")
def no_par(model, cam_ref, img, frozen, logits, size, most, regions):
    return pseudo_labels(cam_ref, img, frozen.img_idx, frozen.tag_idx, size, 1., 0, (1,), most)

More = namedtuple("More", "total seg aff extra")

@register("loss", "with_extra")
def with_extra(model, out, i, whole, *, weight=.5):
    total, seg, aff = paper_loss(model, out, i, whole)
    extra = out.logits.square().mean()
    return More(total + weight*extra, seg, aff, extra)
'''
MINE = dict(cam="middle", affinity="cosine_of_mine", refine="along_the_decoder", labels="no_par", loss="with_extra")
CHOSEN = [f"{place}={name}" for place, name in MINE.items()]
FAST = ["--profile", "scenes", "--clip", "tiny", "--device", "cpu", "--train-split", "train",
        "--set", "iters=4", "switch=2", "warmup=1", "d=32", "layers=1", "heads=2", *CHOSEN, "loss.weight=2",
        "cam.sharpness=3."]

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("seams")/"scenes", train=16, val=2, workers=1)

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Where somebody works: a module of theirs, and the run."
    folder = tmp_path_factory.mktemp("mine")
    (folder/"my_seams.py").write_text(PLUGIN)
    return folder

@pytest.fixture(scope="module")
def run(root, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", str(root), "--out", "run", "--plugin", "my_seams", *FAST]) == 0
    return folder/"run"

def by_itself(folder, *words):
    "The command in a fresh process, without the plugin unless it is named."
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(folder), *sys.path) if p)}
    done = subprocess.run([sys.executable, "-m", "weclip", *words], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr.strip().splitlines()

def test_a_run_notes_names_options_and_modules(run):
    with safe_open(run/"model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["weclip"])
    assert {place: about["config"][place] for place in MINE} == MINE
    assert about["config"]["options"] == [["cam.sharpness", 3.], ["loss.weight", 2]]
    assert about["modules"] == dict.fromkeys(MINE, "my_seams")

def test_the_model_says_what_its_functions_make(run, root):
    model = load_model(run/"model.safetensors")
    data = open_data(root, "val", model.classes.classes, "auto", norm="clip")
    sample = data[0]
    out = model(sample.img[None, :, :64, :80], [sample.tags])
    h, w = out.grid
    y, x = (torch.linspace(-1, 1, n) for n in (h, w))
    torch.testing.assert_close(out.cam[0], torch.exp(-3*(y[:, None]**2 + x**2)))
    assert out.cams.out is not None and out.attn[:, -1].sum(-1).max() <= 1.001  # the model ran the last block itself
    rows = out.aff[out.img_idx]
    spread = torch.einsum("kij,kj->ki", rows/rows.sum(-1, keepdim=True), out.cam.flatten(1)).view_as(out.cam)
    torch.testing.assert_close(out.cam_ref, spread)
    labels = pseudo_labels(spread, sample.img[None, :, :64, :80], out.img_idx, out.tag_idx, (64, 80), 1., 0, (1,))
    assert out.pseudo.equal(labels)
    total, seg, aff, extra = model.loss(out, 3)
    torch.testing.assert_close(total, seg + model.cfg.lam*aff + 2*extra)

def test_a_stopped_run_goes_on_with_them(run, folder, root, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    model = load_model(run/"model.safetensors")
    data = open_data(root, "train", model.classes.classes, "auto", crop=model.cfg.crop, scale=model.cfg.scale,
                     norm="clip")
    def stop(i, _):
        if i == 1: raise KeyboardInterrupt
    for out, on_step in (("whole", None), ("stopped", stop)):
        torch.manual_seed(0)
        fresh = build("tiny", model.cfg)
        try:
            history = train(fresh, data, tmp_path/out, log_every=1, progress=False, on_step=on_step)
        except KeyboardInterrupt:
            history = train(fresh, data, tmp_path/out, resume=True, log_every=1, progress=False)
        if out == "whole":
            expected = history
    assert history == expected and len(history) == 4

def test_the_board_has_what_a_loss_adds(run):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    board = events.EventAccumulator(str(run/"tensorboard"))
    board.Reload()
    assert {"loss", "seg", "aff", "extra", "lr"} <= set(board.Tags()["scalars"])

def test_an_unknown_function_is_named_with_its_module_and_nothing_is_imported(run, folder, root):
    mark = folder/"imported"
    (folder/"my_seams.py").write_text(PLUGIN + f"\nopen({str(mark)!r}, 'w').close()\n")
    picture = next((root/"JPEGImages").glob("*val_00000*"))
    words = ["predict", str(picture), "--checkpoint", "run/model.safetensors", "--out", "masks", "--no-crf",
             "--device", "cpu"]
    status, lines = by_itself(folder, *words)
    assert status == 2 and len(lines) == 1 and not mark.exists(), lines
    for says in ("its cam is 'middle'", "the module 'my_seams' registers", "--plugin"):
        assert says in lines[0]
    status, lines = by_itself(folder, *words, "--plugin", "my_seams")
    assert status == 0 and mark.exists() and (folder/"masks").is_dir(), lines

def test_a_plugin_that_is_not_there_is_one_line(capsys, root, tmp_path):
    assert main(["train", str(root), "--out", str(tmp_path/"run"), "--plugin", "not_there", *FAST]) == 2
    assert "--plugin not_there: expected a module" in capsys.readouterr().err
    assert not (tmp_path/"run"/"checkpoint.pt").exists()

def test_options_are_told_apart_on_disk(root, run):
    "Features that another CAM makes lie in other files; the paper's names are as they were."
    def files(**settings):
        model = build("tiny", preset("scenes", **settings))
        data = open_data(root, "train", model.classes.classes, "auto", crop=112)
        return {what: path.name for what, path in cache_files("x", model, data).items()}
    plain = files()
    assert files(affinity="cosine_of_mine", loss="with_extra") == plain
    other = files(cam="middle")
    sharper = files(cam="middle", **{"cam.sharpness": 9.})
    assert other["tokens"] == plain["tokens"] and len({x["cam"] for x in (plain, other, sharper)}) == 3

@register("model", "shallow")
def shallow(clip, text_fg, text_bg, classes, cfg, decoder=None):
    "Whatever the settings say, it reads three blocks."
    decoder = decoder or Decoder(width=clip.width, n_feats=3, n_classes=classes.n_classes, d=cfg.d, layers=cfg.layers,
                                 heads=cfg.heads)
    return WeCLIP(clip, text_fg, text_bg, classes, replace(cfg, n_feats=3), decoder)

def test_a_model_of_ones_own_comes_back_from_its_file(tmp_path):
    model = build("tiny", preset("scenes", model="shallow"))
    model.cfg = replace(model.cfg, n_feats=11)
    save_model(tmp_path/"model.safetensors", model)
    again = load_model(tmp_path/"model.safetensors")
    assert all(a.equal(b) for a, b in zip(again.decoder.parameters(), model.decoder.parameters(), strict=True))

def test_a_comparison_names_a_function_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cam: expected one of"):
        _one_run(preset("scenes", cam="nobody"), tmp_path, tmp_path, False)

def test_a_comparison_knows_the_successors(root, tmp_path):
    "In a process that has imported none of them."
    code = ("from pathlib import Path; from weclip.lab.compare import _one_run, compare_config\n"
            "cfg = compare_config(dict(cam='surgery', bs=2), 1, 2)\n"
            f"print(_one_run(cfg, Path({str(root)!r}), Path({str(tmp_path)!r}), False))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0

def test_every_default_is_registered_and_of_the_method():
    cfg = Config()
    assert foreign(cfg) == {}
    for place in PLACES:
        assert getattr(cfg, place) in registered(place)

@pytest.mark.parametrize("place", PLACES)
def test_a_function_of_other_arguments_is_refused(place):
    with pytest.raises(ValueError, match=f"{place} 'odd': expected a function of \\({PLACES[place][0]}"):
        register(place, "odd", lambda only: only)
    assert "odd" not in registered(place)

def test_names_of_others_are_not_taken():
    def thief(model, fu, frozen): return fu
    with pytest.raises(ValueError, match="taken by weclip.method.seams.paper_affinity"):
        register("affinity", "sigmoid", thief)
    check_seams(Config())

def defined(module, name):
    "A function as a module, or a page that is run, would define it."
    def function(model, fu, frozen): return fu
    function.__module__ = module
    function.__qualname__ = name
    return function

def test_a_page_that_is_run_leaves_the_exported_function_in_its_place(monkeypatch):
    monkeypatch.setitem(seams._FUNCTIONS, "affinity", dict(seams._FUNCTIONS["affinity"]))
    exported = defined("weclip.beyond.page", "mine")
    page = defined("__main__", "mine")
    for first, second in ((exported, page), (page, exported)):
        seams._FUNCTIONS["affinity"].pop("of_page", None)
        register("affinity", "of_page", first)
        register("affinity", "of_page", second)
        assert seams._FUNCTIONS["affinity"]["of_page"] is exported
    with pytest.raises(ValueError, match="taken by weclip.beyond.page.mine"):
        register("affinity", "of_page", defined("__main__", "another"))
    again = defined("__main__", "again")
    register("affinity", "of_cell", defined("__main__", "again"))
    register("affinity", "of_cell", again)  # the cell is run once more
    assert seams._FUNCTIONS["affinity"]["of_cell"] is again

def test_an_edited_page_takes_part_itself(monkeypatch):
    monkeypatch.setitem(seams._FUNCTIONS, "affinity", dict(seams._FUNCTIONS["affinity"]))
    exported = defined("weclip.beyond.page", "mine")
    def edited(model, fu, frozen): return 2*fu
    edited.__module__ = "__main__"
    edited.__qualname__ = "mine"
    for first, second in ((exported, edited), (edited, exported)):
        seams._FUNCTIONS["affinity"].pop("of_page", None)
        register("affinity", "of_page", first)
        register("affinity", "of_page", second)
        assert seams._FUNCTIONS["affinity"]["of_page"] is edited
    assert "2*fu" in seams.sources(preset("scenes", affinity="of_page"))["affinity"]

def test_a_change_in_what_a_function_calls_is_another_source(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(seams._FUNCTIONS, "affinity", dict(seams._FUNCTIONS["affinity"]))
    texts = []
    for factor in (1, 2):
        (tmp_path/f"helped_{factor}.py").write_text(
            f"def helper(fu): return {factor}*fu\n\ndef function(model, fu, frozen): return helper(fu)\n")
        register("affinity", f"helped_{factor}", importlib.import_module(f"helped_{factor}").function)
        texts += seams.sources(preset("scenes", affinity=f"helped_{factor}")).values()
    assert len(texts) == len(set(texts)) == 2
    typed:dict = {}
    exec("def typed(model, fu, frozen): return fu", typed)  # keeps no source
    typed["typed"].__module__ = "__main__"
    register("affinity", "typed", typed["typed"])
    assert "typed" in seams.sources(preset("scenes", affinity="typed"))["affinity"]

def test_a_checkpoint_names_the_module_of_another_function(run, root, capsys, tmp_path):
    shutil.copytree(run, tmp_path/"run")
    plain = FAST[:FAST.index("cam=middle")]
    words = ["train", str(root), "--out", str(tmp_path/"run"), "--resume", *plain]
    assert main(words) == 2
    assert "cam was 'middle' of the module 'my_seams', now 'gradcam'" in capsys.readouterr().err
