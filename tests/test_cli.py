"""The command as a stranger uses it: training, stopping, resuming, predicting, and every kind of mistake."""
import json, os, shutil, subprocess, sys
from argparse import SUPPRESS
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from weclip.data.pictures import read_mask, save_mask
from weclip.world.scenes import write_scenes
from weclip.use.segmentation import SHIPPED
from weclip.cli import COMMANDS, main, read_arguments

FAST = ["--set", "iters=6", "switch=3", "warmup=2", "d=32", "layers=1", "heads=2", "--device", "cpu"]
TINY = ["--profile", "scenes", "--clip", "tiny"]

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=12, val=4, workers=1)

@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert main(["demo", "--data", str(root), "--train-split", "train", "--out", str(out), *TINY, *FAST]) == 0
    return out

@pytest.fixture
def one_core(monkeypatch):
    "Where a few pictures are drawn here, not in fresh processes that cost more than the drawing."
    monkeypatch.setattr("os.cpu_count", lambda: 1)

def miou_of(run):
    "mIoU by mode, from a run's results."
    records = json.loads((run/"results.json").read_text())["scores"]
    return {record["mode"]: record["miou"] for record in records}

def test_a_run_leaves_everything_behind(run):
    for f in ("model.safetensors", "checkpoint.pt", "results.json", "examples.png", "masks/crf/val_00000.png"):
        assert (run/f).is_file(), f
    r = json.loads((run/"results.json").read_text())
    assert set(miou_of(run)) == {"initial", "initial+PAR", "refined", "pseudo", "single", "ms", "crf"}
    assert r["n_val"] == 4

def test_same_seed_same_table(root, run, tmp_path):
    main(["demo", "--data", str(root), "--train-split", "train", "--out", str(tmp_path), *TINY, *FAST])
    assert miou_of(tmp_path) == miou_of(run)

def test_masks_have_the_pictures_size_and_stem(root, run, tmp_path):
    args = ["--checkpoint", str(run/"model.safetensors"), "--out", str(tmp_path), "--no-crf", "--device", "cpu"]
    assert main(["predict", str(root/"JPEGImages"), *args]) == 0
    for p in (root/"JPEGImages").iterdir():
        assert read_mask(tmp_path/f"{p.stem}.png", 8).shape == np.asarray(Image.open(p)).shape[:2]

def test_evaluate_repeats_the_scores_of_the_run(root, run, tmp_path, capsys):
    args = ["--checkpoint", str(run/"model.safetensors"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["evaluate", str(root), *args]) == 0
    miou = miou_of(run)
    out = capsys.readouterr().out
    facts = json.loads((tmp_path/"scores.json").read_text())
    assert {r["mode"]: r["miou"] for r in facts["scores"]} == {k: miou[k] for k in ("single", "ms", "crf")}
    first = facts["scores"][0]
    assert (facts["val_split"], facts["n_val"], facts["drop"]) == (first["split"], 4, 0) and first["settings"] == {}
    hub = ["hub", "--checkpoint", str(run/"model.safetensors"), "--results", str(tmp_path/"scores.json")]
    assert main([*hub, "--out", str(tmp_path/"model")]) == 0
    card = (tmp_path/"model"/"README.md").read_text()
    assert f"| scales + flip + DenseCRF | {100*miou['crf']:.1f} |" in card
    assert "Of 4 pictures, the list val." in card and "split: val" in card
    assert main([*hub, "--out", str(tmp_path/"model")]) == 0  # the same card again
    (tmp_path/"model"/"README.md").write_text("of another model")
    capsys.readouterr()
    assert main([*hub, "--out", str(tmp_path/"model")]) == 2
    assert "delete it to have one written with these scores" in capsys.readouterr().err
    assert main([*hub[:3], "--out", str(tmp_path/"model")]) == 0
    assert "the card of before is kept" in capsys.readouterr().out
    crf, = (line for line in out.splitlines() if "DenseCRF" in line)
    assert crf.endswith(f" {100*miou['crf']:.1f}") and "background" in out
    for p in (run/"masks"/"crf").iterdir():
        assert p.read_bytes() == (tmp_path/"masks"/"crf"/p.name).read_bytes()

def test_a_card_tells_which_pictures_were_scored_and_how(root, run, tmp_path):
    args = ["--checkpoint", str(run/"model.safetensors"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["evaluate", str(root), *args, "--val-split", "train", "--drop", ".5"]) == 0
    hub = ["hub", "--checkpoint", str(run/"model.safetensors"), "--results", str(tmp_path/"scores.json")]
    assert main([*hub, "--out", str(tmp_path/"model")]) == 0
    card = (tmp_path/"model"/"README.md").read_text()
    assert "the list train." in card and "split: train" in card
    assert "| scales + flip + DenseCRF, without labels below 0.5 of the strongest |" in card

def bytes_of(folder): return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def test_label_maps_replace_no_picture_and_no_mask(root, tmp_path, capsys):
    "pseudo --images p --out p wrote label maps over pictures that were PNGs, and over VOC's own masks."
    shutil.copytree(root, tmp_path/"voc")
    (tmp_path/"p").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path/"p"/"a.png")
    (tmp_path/"tags.csv").write_text("a.png,car\n")
    own = ["pseudo", "--images", str(tmp_path/"p"), "--tags", str(tmp_path/"tags.csv"), "--clip", "tiny"]
    voc = ["pseudo", str(tmp_path/"voc"), "--train-split", "train", *TINY]
    regions = tmp_path/"voc"/"SegmentationClassAug"
    shutil.copytree(regions, tmp_path/"q")  # masks that vote, a map for each picture
    before = bytes_of(tmp_path)
    for args, out, says in ((own, tmp_path/"p", "expected a folder outside of --images"),
                            (voc, regions, "holds the data's own masks"),
                            ([*voc, "--masks", str(tmp_path/"q")], tmp_path/"q", "holds the data's own masks")):
        assert main([*args, "--out", str(out), "--device", "cpu"]) == 2
        assert says in capsys.readouterr().err and bytes_of(tmp_path) == before
    listed = str(tmp_path/"voc"/"ImageSets"/"Segmentation"/"train.txt")
    assert main(["predict", listed, "--out", str(regions), "--no-crf", "--device", "cpu"]) == 2
    assert "holds the data's own masks" in capsys.readouterr().err and bytes_of(tmp_path) == before
    mine = tmp_path/"voc"/"SegmentationClassPseudo"  # no folder of the data's own
    for _ in range(2):
        assert main([*voc, "--out", str(mine), "--device", "cpu"]) == 0

def test_label_maps_of_a_trained_model_follow_set(root, run, tmp_path, capsys):
    "Everything but --checkpoint was read, checked and thrown away: box_thr had no effect on the label maps."
    model = str(run/"model.safetensors")
    args = ["pseudo", str(root), "--train-split", "train", "--checkpoint", model, "--device", "cpu"]
    assert main([*args, "--out", str(tmp_path/"a")]) == 0  # the CLIP is the one that is noted
    assert main([*args, "--out", str(tmp_path/"b"), "--set", "refine=none", "par_iters=1"]) == 0
    maps = [[p.read_bytes() for p in sorted((tmp_path/out).iterdir())] for out in "ab"]
    assert len(maps[0]) == len(maps[1]) and maps[0] != maps[1]
    voting = ["--masks", str(root/"SegmentationClassAug"), "--set", "labels.min_share=.6"]
    assert main([*args, "--out", str(tmp_path/"voted"), *voting]) == 0
    for odd, says in ((["--set", "d=32"], "expected a setting of the labels"),
                      (["--recipe", "paper"], "expected no --profile"),
                      (["--profile", "coco"], "expected no --profile"),
                      (["--set", "affinity=mine"], "expected one of")):
        assert main([*args, "--out", str(tmp_path/"c"), *odd]) == 2
        assert says in capsys.readouterr().err

def test_options_that_would_do_nothing_are_refused(root, tmp_path, capsys):
    own = ["train", "--images", str(root/"JPEGImages"), "--tags", "folders", "--clip", "tiny"]
    shipped = ["pseudo", str(root), "--checkpoint", str(SHIPPED), "--classes", "coco"]
    for args, says in ((["demo", "--recipe", "paper"], "--recipe: expected --data"),
                       (["demo", "--data", str(root), "--train", "5"], "--train, --val: expected the built-in scenes"),
                       (shipped, "expected no classes beside it"),
                       (["demo", "--clip", "openai"], "--clip: expected --data"),
                       ([*own, "--tags-from", "xml"], "expected a folder in VOC2012 layout"),
                       ([*own, "--train-split", "train"], "expected a folder in VOC2012 layout")):
        assert main([*args, "--out", str(tmp_path/"run")]) == 2
        assert says in capsys.readouterr().err and not (tmp_path/"run").exists()

def test_nothing_is_written_among_the_pictures_of_a_class_each(root, tmp_path, monkeypatch, capsys):
    "inspect --images . wrote its sheets below the pictures, and with --tags folders `runs` was a class from then on."
    for name in ("cat", "dog"):
        (tmp_path/name).mkdir()
        Image.new("RGB", (64, 64), "red").save(tmp_path/name/"a.png")
    monkeypatch.chdir(tmp_path)
    own = ["--images", ".", "--tags", "folders", "--clip", "random"]
    for args in (["inspect", *own], ["pseudo", *own, "--out", "labels"]):
        assert main(args) == 2 and "expected a folder outside of --images" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat", "dog"]

def test_scenes_are_put_there_as_a_whole(tmp_path, monkeypatch, capsys):
    few = ["--train", "1", "--val", "1", "--dev", "0", "--test", "0"]
    (tmp_path/"real").mkdir()
    (tmp_path/"link").symlink_to("real")
    assert main(["scenes", "--out", str(tmp_path/"link"), *few]) == 0
    assert (tmp_path/"link").is_symlink() and (tmp_path/"real"/"scenes.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert main(["scenes", "--out", ".", *few]) == 2 and "name a folder inside" in capsys.readouterr().err

def test_without_pydensecrf_the_command_names_its_own_option(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path/"a.png")
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    args = ["predict", str(tmp_path/"a.png"), "--out", str(tmp_path/"masks"), "--device", "cpu"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "pip install" in said and "--no-crf" in said and "crf=False" not in said
    assert main([*args, "--no-crf"]) == 0

def test_ctrl_c_while_pytorch_is_imported(monkeypatch, capsys):
    "It ended in a TypeError: the name of the folder had not been read yet."
    import weclip.cli as cli
    def stop(*args): raise KeyboardInterrupt
    monkeypatch.setattr(cli, "read_arguments", stop)
    for name in ("train", "demo", "predict"):
        assert main([name]) == 130 and f"weclip {name}: interrupted" in capsys.readouterr().err

def test_strict_refuses_pictures_without_tags_of_either_kind_of_data(root, tmp_path, capsys):
    shutil.copytree(root, tmp_path/"voc")
    tags = tmp_path/"voc"/"ImageSets"/"Segmentation"/"tags.json"
    facts = json.loads(tags.read_text())
    facts[next(name for name in facts if name.startswith("train"))] = []
    tags.write_text(json.dumps(facts))
    for command in ("train", "inspect", "pseudo"):
        args = [command, str(tmp_path/"voc"), "--train-split", "train", *TINY, "--out", str(tmp_path/command)]
        assert main([*args, "--strict"]) == 2
        assert "tag" in capsys.readouterr().err

def test_an_option_given_twice_counts_twice_and_none_is_guessed(capsys):
    words = ["data", "--out", "o", "--set", "lr=1e-3", "--set", "switch=0", "bs=2"]
    assert read_arguments("train", words)["set"] == ["lr=1e-3", "switch=0", "bs=2"]
    assert read_arguments("predict", ["a.jpg", "--out", "o"])["format"] == ("png",)
    twice = ["a.jpg", "--out", "o", "--format", "coco", "--format", "polygons"]
    assert read_arguments("predict", twice)["format"] == ["coco", "polygons"]
    with pytest.raises(SystemExit):
        read_arguments("tables", ["table4", "--seed", "2"])
    assert "unrecognized arguments: --seed 2" in capsys.readouterr().err

@pytest.fixture
def spoilt(root, tmp_path):
    "A copy of the folder, to be damaged."
    return Path(shutil.copytree(root, tmp_path/"spoilt"))

def hide_objects(folder, masks="*.png"):
    "Masks without an object: what was one is ignored."
    for mask in (folder/"SegmentationClassAug").glob(masks):
        save_mask(mask, np.where(read_mask(mask, 8) > 0, 255, 0).astype(np.uint8))

SUPERVISED = ["--set", "supervised=True", *FAST[1:]]

def test_pictures_that_cannot_be_read_are_named_before_the_first_iteration(spoilt, tmp_path, capsys):
    "A truncated JPEG ended a training when its turn came, with 30 lines of a worker."
    for k in (3, 7):
        p = spoilt/"JPEGImages"/f"train_{k:05d}.jpg"
        p.write_bytes(p.read_bytes()[:-60])
    common = ["--train-split", "train", "--out", str(tmp_path/"run"), *TINY]
    bad = []
    folder = str(spoilt)
    for command in (["train", folder, *FAST], ["train", folder, *SUPERVISED], ["demo", "--data", folder, *FAST]):
        status = main([*command, *common])
        err = capsys.readouterr().err
        lines = [line for line in err.splitlines() if "cannot be read" in line]
        told = len(lines) == 1 and "2 of 12 pictures" in lines[0] and "train_00003.jpg, train_00007.jpg" in lines[0]
        if status == 0 or not told or "Traceback" in err or (tmp_path/"run"/"checkpoint.pt").exists():
            bad.append((command, err))
    assert not bad, bad

def test_what_is_scored_later_is_read_before_the_training(spoilt, tmp_path, capsys):
    args = ["demo", "--data", str(spoilt), "--train-split", "train", "--out", str(tmp_path/"run"), *TINY, *FAST]
    p = spoilt/"JPEGImages"/"val_00002.jpg"
    whole = p.read_bytes()
    p.write_bytes(whole[:-60])
    assert main(args) != 0 and "1 of 4 pictures or their masks cannot be read: val_00002.jpg" in capsys.readouterr().err
    p.write_bytes(whole)
    hide_objects(spoilt, "val*.png")
    assert main(args) != 0 and "no object class occurs in any of the 4 masks" in capsys.readouterr().err
    assert not (tmp_path/"run"/"checkpoint.pt").exists()

def test_masks_that_would_score_themselves(spoilt, run, tmp_path, capsys):
    hide_objects(spoilt)
    bad = []
    for command in (["evaluate", str(spoilt), "--checkpoint", str(run/"model.safetensors"), "--device", "cpu"],
                    ["train", str(spoilt), "--train-split", "train", *TINY, *SUPERVISED]):
        status = main([*command, "--out", str(tmp_path/"out")])
        told = "no object class occurs in any of the" in capsys.readouterr().err
        if status == 0 or not told or (tmp_path/"out"/"scores.json").exists():
            bad.append(command)
    assert not bad, bad

def test_demo_draws_its_data_and_starts_afresh(tmp_path, monkeypatch, capsys, one_core):
    monkeypatch.setenv("WECLIP_CACHE", str(tmp_path/"cache"))
    args = ["demo", "--train", "12", "--val", "2", "--out", str(tmp_path/"run"), "--no-crf", *FAST]
    assert main(args) == 0
    first = json.loads((tmp_path/"run"/"results.json").read_text())
    assert (tmp_path/"cache"/"scenes-12-2"/"JPEGImages").is_dir() and (first["n_train"], first["n_val"]) == (12, 2)
    scored = miou_of(tmp_path/"run")
    assert "ms" in scored and "crf" not in scored
    assert "training on 12 pictures" in capsys.readouterr().out
    assert main(args) == 0  # where `train` would refuse
    assert miou_of(tmp_path/"run") == scored

def test_demo_of_a_folder_takes_a_second_backbone(tmp_path, capsys, one_core):
    few = ["--train", "4", "--val", "2", "--test", "1"]
    assert main(["scenes", "--out", str(tmp_path/"data"), *few]) == 0
    args = ["demo", "--data", str(tmp_path/"data"), "--train-split", "train", "--profile", "scenes", "--no-crf",
            "--recipe", "plus", "--out", str(tmp_path/"run"), *FAST]
    assert main(args) != 0 and "give one as --second" in capsys.readouterr().err
    assert main([*args, "--second", "tiny"]) == 0
    options = json.loads((tmp_path/"run"/"results.json").read_text())["config"]["options"]
    assert dict(options)["model.second"] == "tiny"

def test_scenes_are_those_of_the_seed(tmp_path, capsys, one_core):
    few = ["--train", "2", "--val", "1", "--test", "1"]
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert main(["scenes", "--out", str(tmp_path/name), *few, "--seed", seed]) == 0
    assert str(tmp_path/"c") in capsys.readouterr().out
    def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")}
    assert files(tmp_path/"a") == files(tmp_path/"b") != files(tmp_path/"c")
    assert len((tmp_path/"a"/"ImageSets"/"Segmentation"/"train.txt").read_text().split()) == 2

@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
def test_networks_of_no_training_are_those_of_the_seed(tmp_path, capsys, one_core):
    from safetensors.torch import load_file
    from weclip.world.classifier import load_classifier, new_classifier
    from weclip.world.tinyclip import new_tiny
    few = ["--samples", "0", "--pictures", "2", "--seed", "3", "--device", "cpu"]
    assert main(["tinyclip", "--out", str(tmp_path/"tiny"), *few]) == 0
    assert main(["classifier", "--out", str(tmp_path/"other"), *few]) == 0
    shipped, other = capsys.readouterr().out.split()
    stored = load_file(f"{shipped}/weclip-tiny.safetensors")
    new = new_tiny(3).state_dict()
    assert set(stored) == set(new) and all(v.equal(new[k].half()) for k, v in stored.items())
    a = load_classifier(other).head
    b = new_classifier(3).head
    assert a.weight.equal(b.weight.half().float())
    assert not a.weight.equal(new_classifier(4).head.weight.half().float())
    assert main(["classifier", "--out", str(tmp_path/"other"), *few]) == 0  # nothing is left to train, nothing changes
    assert load_classifier(other).head.weight.equal(a.weight)

def test_resume_reaches_the_same_weights(root, run, tmp_path, monkeypatch):
    import weclip.engine.train as t
    steps = []
    real = t.train_step
    def stop_at_three(model, opt, batch, i, loss, *more):
        if len(steps) == 3: raise KeyboardInterrupt
        steps.append(i)
        return real(model, opt, batch, i, loss, *more)
    args = ["train", str(root), "--train-split", "train", "--out", str(tmp_path), *TINY, *FAST]
    monkeypatch.setattr(t, "train_step", stop_at_three)
    assert main(args) == 130
    monkeypatch.setattr(t, "train_step", real)
    assert main(args) == 2          # never silently over a stopped run
    assert main([*args, "--resume"]) == 0
    a, b = (torch.load(d/"checkpoint.pt", weights_only=True)["decoder"] for d in (run, tmp_path))
    assert all(a[k].equal(b[k]) for k in a)

def test_stages_of_pseudo_labels(root, tmp_path):
    args = ["--train-split", "val", "--out", str(tmp_path), *TINY, "--stages", "--device", "cpu"]
    assert main(["pseudo", str(root), *args]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"initial", "initial+PAR", "refined", "pseudo"}

HELP = """
import sys, time
import weclip.cli as cli
start = time.perf_counter()
try:
    cli.main(["--help"])
except SystemExit:
    pass
seconds = time.perf_counter() - start
print(sorted({"torch", "numpy", "PIL", "matplotlib", "weclip.use"} & set(sys.modules)), seconds < .5)
"""

def test_help_is_quick_and_quiet():
    "It took 4 to 8 seconds and 900 MB, and printed a warning of PyTorch's about CUDA."
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.splitlines()[-1] == "[] True"
    assert all(f"  {name} " in done.stdout for name in COMMANDS)

def test_every_option_has_help_and_the_list_tells_of_every_command():
    from weclip.cli import load, parser_of
    for name, (_, about) in COMMANDS.items():
        assert load(name).__doc__ and about
        shown = [a for a in parser_of(name)._actions if a.help != SUPPRESS]
        assert all(a.help and not a.help.startswith(" (") for a in shown), name

def test_a_device_is_picked_and_named(root, tmp_path, capsys):
    assert main(["predict", str(root/"JPEGImages"/"val_00000.jpg"), "--out", str(tmp_path), "--no-crf"]) == 0
    picked = "cuda" if torch.cuda.is_available() else "cpu"
    assert capsys.readouterr().err.startswith(f"computing on {picked} (")

BASE_ONLY = """
import sys
from weclip.cli import EXTRAS
for modules in EXTRAS.values(): sys.modules.update(dict.fromkeys(modules))  # as if they were not installed
from weclip.cli import main
print(main(sys.argv[1:]))
"""

def test_the_base_is_enough_for_the_demo_and_a_missing_extra_is_named(tmp_path):
    env = {**os.environ, "WECLIP_CACHE": str(tmp_path/"cache")}
    small = ["--train", "2", "--val", "1", "--out", str(tmp_path/"run"), "--no-crf", *FAST]
    bad = []
    for args, status, says in ((["demo", *small], 0, ""), (["app"], 2, "pip install 'weclip[app]'"),
                               (["tables", "--dry-run"], 2, "pip install 'weclip[lab]'")):
        done = subprocess.run([sys.executable, "-c", BASE_ONLY, *args], capture_output=True, text=True, env=env)
        if done.stdout.splitlines()[-1:] != [str(status)] or says not in done.stderr or "Traceback" in done.stderr:
            bad.append((args, done.stdout[-500:], done.stderr[-2000:]))
    assert not bad, bad

def test_mistakes_are_one_line(root, tmp_path, capsys):
    pictures = str(root/"JPEGImages")
    data = [str(root), "--train-split", "train"]
    mistakes = (
        (["train", "nowhere", *TINY], "nowhere: no such folder"),
        (["evaluate", str(root), "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["evaluate", str(root), "--val-split", "test"], "no such split (found: train, val)"),
        (["predict", str(root/"scenes.json")], "cannot be read"),
        (["predict", pictures, "--checkpoint", str(root/"scenes.json")], "damaged or foreign"),
        (["train", *data, *TINY, "--classes", "voc"], "is not one of the 20 classes"),
        (["train", *data, "--profile", "scenes", "--clip", "nowhere.pt"], "nowhere.pt"))
    bad = []
    for args, says in mistakes:
        status = main([*args, "--out", str(tmp_path), "--device", "cpu"])
        err = capsys.readouterr().err
        if status not in (1, 2) or says not in err or "Traceback" in err:
            bad.append((args, status, err))
    assert not bad, bad

def test_a_model_of_another_backbone_is_refused(root, run, tmp_path, capsys):
    from safetensors.torch import save_file
    from weclip.engine.weights import read_model
    about, state = read_model(run/"model.safetensors")
    about["fingerprint"] = "0"*12
    save_file(state, tmp_path/"other.safetensors", metadata=dict(weclip=json.dumps(about)))
    args = ["--checkpoint", str(tmp_path/"other.safetensors"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["predict", str(root/"JPEGImages"), *args]) == 2
    assert "expected the backbone" in capsys.readouterr().err
