"""Image towers of other shapes, models as folders and as programs: on random weights, small enough for a laptop."""
import json, logging, socket

import numpy as np, open_clip, pytest, torch, torch.nn.functional as F
from PIL import Image
from weclip.method.config import Config, preset, run_name
from weclip.method.classes import SCENES, ClassSet
from weclip.method.batch import pairs
from weclip.method.clip import FrozenCLIP
from weclip.method.cam import ROWS, gradcam
from weclip.method.model import WeCLIP, tf32
from weclip.data.pictures import preprocess, read_mask
from weclip.data.voc import Batch
from weclip.world.scenes import write_scenes
from weclip.engine.weights import (
    ARCH, PLAIN, arch_config, build, describe, load_model, plain_vit, read_model, save_model, write_model)
from weclip.engine.train import optimiser, train_step
from weclip.use.hub import FILES, from_pretrained, save_pretrained
from weclip.use.segmentation import predict
from weclip.cli import main

TEXT = dict(context_length=77, width=32, heads=2, layers=1)  # the text tower is not what is tested

# ---- names

def test_every_name_is_accepted_or_told_why_not():
    "The config is judged as the tower would be, and a refusal says what to take instead."
    accepted = []
    for name in open_clip.list_models():
        try:
            cfg = arch_config(name)
        except ValueError as e:
            assert name in str(e) and PLAIN in str(e)
            continue
        with torch.device("meta"):
            vision = {**cfg["vision_cfg"], "layers": 1}
            clip = open_clip.CLIP(cfg["embed_dim"], vision, TEXT, cfg.get("quick_gelu", False))
        plain_vit(clip.visual)
        accepted.append(name)
    expected = {ARCH, "ViT-B-16", "ViT-B-32", "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14",
                "ViT-L-14-CLIPA"}
    assert expected <= set(accepted)
    for part in ("SigLIP", "RN50", "convnext", "EVA", "ViTamin", "MobileCLIP", "PE-Core", "coca_ViT"):
        assert not [n for n in accepted if part in n]

REFUSED = {"RN101": "a ResNet, which has no attention", "ViT-B-16-SigLIP2": "pools its patches by attention",
           "coca_ViT-B-32": "pools its patches by attention", "EVA02-L-14": "timm's",
           "ViT-B/61": "did you mean ViT-B-16", "local-dir:somewhere": "expected one of",
           "hf-hub:someone/model": "expected one of"}

def test_a_refused_name_is_one_line(tmp_path, capsys):
    wrong = []
    for name, why in REFUSED.items():
        status = main(["train", "nowhere", "--arch", name, "--out", str(tmp_path/"run"), "--device", "cpu"])
        err = capsys.readouterr().err
        if status != 2 or why not in err or len(err.strip().splitlines()) != 1 or (tmp_path/"run").exists():
            wrong.append((name, status, err))
    assert not wrong

# ---- towers: real width, heads, patch and parts; few blocks, small grid

TOWERS = ("ViT-B-32", "ViT-L-14", "ViT-H-14", "ViT-L-14-CLIPA", "ViT-M-16-alt")

def shrink(name, layers=3, grid=4):
    "A CLIP with the tower of `name`, `layers` blocks deep."
    cfg = arch_config(name)
    vision = cfg["vision_cfg"]
    vision |= dict(layers=layers, image_size=grid*vision["patch_size"])
    torch.manual_seed(0)
    return open_clip.CLIP(32, vision, TEXT, cfg.get("quick_gelu", False)).eval()

def autograd_cam(visual, x, text, n_fg, img_idx, tag_idx, rows):
    "Scores' gradients at ln_1 of the last block, through open_clip's own forward."
    block = visual.transformer.resblocks[-1]
    grads = []
    kept = []
    hook = block.ln_1.register_forward_hook(lambda mod, args, out: kept.append(out.requires_grad_()))
    for i, t in zip(img_idx, tag_idx):
        z = block(x[i:i+1])[:, rows]
        pooled = visual.ln_post(z.mean(1)) if visual.final_ln_after_pool else visual.ln_post(z).mean(1)
        u = F.normalize(pooled @ visual.proj, dim=-1)
        columns = sorted(tag_idx[img_idx == i].tolist()) + list(range(n_fg, len(text)))
        p = (u @ text[columns].T/.07).softmax(-1)[0, columns.index(int(t))]
        grads.append(torch.autograd.grad(p, kept[-1])[0][0, 1:].mean(0))
    hook.remove()
    return torch.stack(grads)

@pytest.mark.parametrize("name", TOWERS)
def test_tower(name):
    clip = shrink(name)
    v = arch_config(name)["vision_cfg"]
    tower = FrozenCLIP(clip, name)
    patch = v["patch_size"]
    heads = v["width"]//v.get("head_width", 64)
    assert (tower.patch, tower.width, tower.heads, tower.n_blocks) == (patch, v["width"], heads, 3)

    img = torch.randn(2, 3, 4*patch, 4*patch)  # the grid it was built for: open_clip's own features
    z = tower.encode(img, 3).tokens[-1]
    with torch.no_grad():
        u = tower.image_vector(z[:, ROWS[tower.pools]]) @ tower.visual.proj
    torch.testing.assert_close(u, clip.encode_image(img), rtol=1e-4, atol=1e-4)

    text = F.normalize(torch.randn(7, 32), dim=-1)
    img_idx, tag_idx = pairs([[2, 0], [1]])
    enc = tower.encode(torch.randn(2, 3, 3*patch + 5, 5*patch))  # another grid, and pixels beyond the last patch
    assert enc.grid == (3, 5)
    for pool in ROWS if tower.pools == "cls" else ["patches"]:
        cams = gradcam(tower, enc.tokens[-1], enc.grid, text[:4], text[4:], img_idx, tag_idx, pool)
        want = autograd_cam(clip.visual, enc.tokens[-1], text, 4, img_idx, tag_idx, ROWS[pool])
        assert cams.cam.shape == (3, 3, 5) and want.std() > 0
        torch.testing.assert_close(cams.weights/want.std(), want/want.std(), rtol=1e-3, atol=1e-3)

    classes = ClassSet("toy", tuple("abcd"), tuple("abcd"))
    cfg = preset("voc", n_blocks=3, patch=patch, d=16, heads=2, layers=1, par_iters=1, long_side=4*patch + 3)
    model = WeCLIP(tower, text[:4], text[4:], classes, cfg).eval()
    assert cfg.n_feats == 2 and cfg.crop % patch == 0
    with torch.no_grad():
        out = model(img, [[2, 0], [1]])
    assert out.logits.shape == (2, 5, 4, 4) and out.pseudo.shape == (2, 4*patch, 4*patch) and len(out.tokens) == 2
    photo = np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8)
    assert predict(photo, model, crf=False).shape == (61, 83)

def test_a_tower_that_pools_patches_has_no_class_token_score():
    tower = FrozenCLIP(shrink("ViT-L-14-CLIPA", layers=2))
    text = torch.zeros(1, 32)
    with pytest.raises(ValueError, match="class token was not trained"):
        WeCLIP(tower, text, text, ClassSet("toy", ("a",), ("a",)), preset("voc", n_blocks=2, patch=14, pool="cls"))

# ---- how many blocks are read

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "The name of a narrow ViT-L/14 of 24 blocks, registered with open_clip."
    path = tmp_path_factory.mktemp("arch")/"narrow-L-14.json"
    vision = dict(image_size=56, patch_size=14, width=48, head_width=16, layers=24)
    path.write_text(json.dumps(dict(embed_dim=24, vision_cfg=vision, text_cfg=TEXT)))
    open_clip.add_model_config(path)
    return path.stem

def test_blocks_read_of_a_deeper_tower(small, caplog):
    assert build("random", arch=small).cfg.n_feats == 23 and not caplog.records  # without settings: for the tower
    with caplog.at_level(logging.WARNING):
        model = build("random", preset("voc"), arch=small)
    assert model.cfg.n_feats == len(model.decoder.mlps) == 11  # with settings: as they are, and logged
    assert "11 of this tower's 24 blocks" in caplog.text and "n_blocks=24, patch=14" in caplog.text
    assert preset("voc", "paper", n_blocks=24).n_feats == 24
    assert preset("voc", n_blocks=24, n_feats=7).n_feats == 7
    with pytest.raises(ValueError, match="at most the encoder's 24 blocks, got 25"):
        build("random", preset("voc", n_feats=25), arch=small)

def test_later_fields_rename_no_run():
    assert run_name(preset("scenes", seed=1)) == "24856c245e" and run_name(Config(switch=9145)) == "f2e87176da"
    others = {}, dict(amp="bf16"), dict(amp="fp16"), dict(clip_grad=1.), dict(tf32=True)
    assert len({run_name(preset("scenes", seed=1, **settings)) for settings in others}) == 5

def test_equal_settings_are_one_run():
    "A zero of --set dropout=0 is an integer: it named another run than dropout=0."
    plain = run_name(Config())
    same = (dict(par_scale=1), dict(scales=(1, .75)), dict(crf_pos=(3., 3.)), dict(lam=.1))
    for settings in same:
        assert run_name(Config(**settings)) == plain and Config(**settings) == Config()
    for name in ("dropout", "lam", "cam_floor"):
        assert run_name(Config(**{name: 0})) == run_name(Config(**{name: 0.}))
    options = [run_name(Config(loss="plus", options=(("loss.dice", value),))) for value in (1, 1., 2, 1.5)]
    assert options[0] == options[1] and len(set(options)) == 3
    assert type(Config(scale=(1, 2)).scale[0]) is float and type(Config(crf_bi=(64., 5, 4)).crf_bi[0]) is int

def test_a_class_set_without_background_words_is_refused():
    "The only tag of a picture then has the score 1, and a CAM without a gradient."
    pets = ClassSet("pets", ("cat", "dog"), ("cat", "dog"))
    with pytest.raises(ValueError, match="background"):
        build("tiny", preset("scenes"), pets)
    model = build("tiny")
    with pytest.raises(ValueError, match="text_bg: expected at least one background word"):
        WeCLIP(model.clip, model.text_fg, model.text_bg[:0], model.classes, model.cfg)

# ---- TF32

def precision():
    "What the program has set for convolutions and for products."
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision

def old_words():
    "The same by PyTorch's older names, which raise where the two disagree."
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()

def heirs():
    "What the switches become where the program sets the one above them all."
    for value in ("tf32", "ieee"):
        torch.backends.fp32_precision = value
        yield precision()
    torch.backends.fp32_precision = "none"

@pytest.fixture
def high():
    "A program that asks for TF32 itself."
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")

def test_tf32_leaves_no_switch_set():
    before = precision(), old_words(), list(heirs())
    for is_allowed in (False, True):
        with tf32(is_allowed):
            assert precision() == (("ieee", "tf32")[is_allowed],)*2
        assert (precision(), old_words(), list(heirs())) == before
    for above in ("tf32", "ieee"):
        torch.backends.fp32_precision = above
        for is_allowed in (False, True):
            with tf32(is_allowed):
                assert precision() == (("ieee", "tf32")[is_allowed],)*2
        torch.backends.fp32_precision = "none"
        assert (precision(), old_words(), list(heirs())) == before

def watched(model):
    "The settings that the encoder, the decoder and its backward pass meet, as they run."
    seen = set()
    def note(*_): seen.add(precision())
    model.clip.visual.conv1.register_forward_pre_hook(note)
    model.decoder.register_forward_pre_hook(note)
    for p in model.decoder.parameters():
        p.register_hook(note)
    return seen

def calls_of(model):
    "A training step and what else multiplies, by name."
    img = torch.rand(2, 3, 112, 112)
    tags = [[0, 2], [1]]
    opt = optimiser(model, model.cfg)
    batch = Batch(["a", "b"], img, tags, None, torch.ones(2, 112, 112, dtype=torch.bool))
    return {
        "step": lambda: train_step(model, opt, batch, 400), "forward": lambda: model(img, tags),
        "logits": lambda: model.logits(img), "encode": lambda: model.encode(img, tags, 2),
        "tokens": lambda: model.tokens(img)}

def test_tf32_is_as_set_within_a_step_and_as_before_after_it(high):
    before = precision(), old_words()
    for is_allowed, wanted in ((False, "ieee"), (True, "tf32")):
        model = build("tiny", preset("scenes", d=16, layers=1, n_feats=2, par_iters=1, tf32=is_allowed)).train()
        seen = watched(model)
        for name, call in calls_of(model).items():
            seen.clear()
            call()
            assert (name, seen) == (name, {(wanted, wanted)})
            assert (name, precision(), old_words()) == (name, *before)
        with pytest.raises(ValueError, match="0-based"):
            model(torch.rand(1, 3, 112, 112), [[99]])
        assert (precision(), old_words()) == before

# ---- the command

@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    "A short training on a tower by name."
    d = tmp_path_factory.mktemp("run")
    root = write_scenes(d/"scenes", train=4, val=2, workers=1)
    assert main(["train", str(root), "--train-split", "train", "--out", str(d/"out"), "--profile", "scenes",
                 "--clip", "random", "--arch", small, "--device", "cpu", "--amp", "bf16",
                 "--set", "iters=2", "switch=1", "warmup=1", "d=16", "layers=1", "heads=2", "bs=2", "par_iters=2"]) == 0
    return root, d/"out"/"model.safetensors"

def test_the_file_knows_its_tower(small, run, tmp_path, capsys):
    root, path = run
    about, _ = read_model(path)
    assert about["arch"] == small
    assert [about["config"][name] for name in ("n_feats", "crop", "amp")] == [23, 112, "bf16"]
    model = ["--checkpoint", str(path), "--out", str(tmp_path), "--device", "cpu"]
    assert main(["predict", str(root/"JPEGImages"), *model, "--no-crf"]) == 0
    p = next((root/"JPEGImages").iterdir())
    assert read_mask(tmp_path/f"{p.stem}.png", 9).shape == np.asarray(Image.open(p)).shape[:2]
    capsys.readouterr()
    assert main(["predict", str(p), *model, "--clip", "tiny"]) == 2
    assert "it was trained on the backbone random" in capsys.readouterr().err

def test_a_file_of_before_towers_had_names(tmp_path):
    model = build("tiny", preset("scenes", d=16, layers=1, n_feats=2)).eval()
    about = describe(model)
    del about["arch"]
    for field in ("amp", "clip_grad", "tf32"):
        del about["config"][field]
    write_model(tmp_path/"old.safetensors", about, model.decoder.state_dict())
    again = load_model(tmp_path/"old.safetensors")
    assert again.cfg == model.cfg and all(a.equal(b) for a, b in zip(again.parameters(), model.parameters()))

# ---- folders and the Hub

@pytest.fixture
def offline(monkeypatch):
    "Whoever opens a connection fails."
    def refuse(*a, **kw): raise AssertionError("a connection was opened")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)

def test_folder_round_trip_offline(run, tmp_path, offline, capsys):
    root, path = run
    def record(mode, miou, iou): return dict(split="val", mode=mode, settings={}, miou=miou, iou=iou)
    scores = [record("single", .25, {}), record("crf", .5, {"bird": .75})]
    (path.parent/"results.json").write_text(json.dumps(dict(scores=scores, val_split="val", n_val=2)))
    shared = tmp_path/"shared"
    assert main(["hub", "--checkpoint", str(path), "--out", str(shared), "--license", "mit"]) == 0
    assert sorted(p.name for p in shared.iterdir()) == sorted(FILES)
    card = (shared/"README.md").read_text()
    lines = ("license: mit", "| 1 | bird | 75.0 |", "| scales + flip + DenseCRF | 50.0 |", "| `amp` | `bf16` | `off` |",
             "narrow-L-14, weights `random`")
    assert not [line for line in lines if line not in card]
    a = load_model(path)
    b = from_pretrained(shared)
    assert a.cfg == b.cfg and a.classes == b.classes and all(x.equal(y) for x, y in zip(a.parameters(), b.parameters()))
    picture = next((root/"JPEGImages").iterdir())
    predict_it = ["predict", str(picture), "--out", str(tmp_path/"masks"), "--no-crf", "--device", "cpu"]
    assert main([*predict_it, "--checkpoint", str(shared)]) == 0
    capsys.readouterr()
    assert main([*predict_it, "--checkpoint", "hf:nobody/nothing"]) == 2
    assert "nobody/nothing: expected a folder" in capsys.readouterr().err

def test_only_the_three_files_are_sent(run, tmp_path, offline, monkeypatch, capsys):
    calls = []
    class Client:
        def __init__(self, token): calls.append(token)
        def create_repo(self, repo_id, private, exist_ok): calls.append((repo_id, private, exist_ok))
        def upload_folder(self, repo_id, folder_path, allow_patterns, commit_message):
            calls.append((repo_id, folder_path, allow_patterns))
            return "https://address"
    monkeypatch.setattr("weclip.use.hub.HfApi", Client)
    out = tmp_path/"shared"
    for more, private in (([], True), (["--public"], False)):
        calls.clear()
        assert main(["hub", "--checkpoint", str(run[1]), "--out", str(out), "--push", "somebody/birds", *more]) == 0
        assert calls == [None, ("somebody/birds", private, True), ("somebody/birds", str(out), list(FILES))]
        assert "sent: https://address" in capsys.readouterr().out

ELSEWHERE = [(dict(backbone="clip.pt"), "a file called 'clip.pt'"),
             (dict(backbone="random", arch="hf-hub:someone/model"), "expected one of"),
             (dict(backbone="random", arch="local-dir:here"), "expected one of"),
             (dict(config=dict(os="system")), "unknown settings"), (dict(format="weclip-9"), "weclip-9")]

def test_a_description_from_elsewhere_opens_nothing(tmp_path, offline):
    model = build("tiny", preset("scenes", d=16, layers=1, n_feats=2))
    folder = save_pretrained(model, tmp_path/"model")
    whole = json.loads((folder/"config.json").read_text())
    wrong = []
    for change, says in ELSEWHERE:
        about = {**whole, **change}
        write_model(folder/"model.safetensors", about, model.decoder.state_dict())
        (folder/"config.json").write_text(json.dumps(about))
        try:
            from_pretrained(folder)
            wrong.append((change, "opened"))
        except ValueError as e:
            if says not in str(e):
                wrong.append((change, e))
    assert not wrong

def test_machine_paths_stay_here(tmp_path):
    model = build("tiny", preset("scenes", d=16, layers=1, n_feats=2, classes="secret/place/mine.yaml"), SCENES)
    folder = save_pretrained(model, tmp_path/"model", backbone="secret/place/ViT-B-16.pt")
    assert not [f for f in FILES if b"secret" in (folder/f).read_bytes()]

# ---- programs

@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_program_of_a_tower(small, tmp_path, suffix, capsys):
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason="ONNX needs the onnx extra")
    cfg = preset("scenes", d=16, layers=1, n_feats=2, long_side=0)  # 0: the network sees the picture's own pixels
    model = build("random", cfg, arch=small)
    photo = np.random.default_rng(1).integers(0, 256, (47, 74, 3), dtype=np.uint8)
    with torch.no_grad():
        mean = model.eval().logits(preprocess(photo)[None]).mean((0, 2, 3))
        model.decoder.pred.bias.sub_(mean)  # no class wins everywhere
    path = tmp_path/"model.safetensors"
    save_model(path, model)
    assert main(["export", "--checkpoint", str(path), "--out", str(tmp_path/f"m{suffix}"), "--device", "cpu"]) == 0
    assert "100.00 %" in capsys.readouterr().out
    want = predict(photo, model.eval(), scales=(1.,), flip=False, crf=False)
    run = _program(tmp_path/f"m{suffix}")
    logits, mask = run(photo[None])
    assert logits.shape == (1, model.classes.n_classes, 3, 5) and mask.dtype == np.uint8
    assert (mask[0] == want).mean() > .999 and len(np.unique(mask)) > 1

def _program(path):
    "A program without this package: array in, arrays out."
    if path.suffix == ".onnx":
        import onnxruntime
        session = onnxruntime.InferenceSession(str(path))
        return lambda img: session.run(None, dict(img=img))
    program = torch.export.load(path).module()
    return lambda img: tuple(t.detach().numpy() for t in program(torch.from_numpy(img)))

def test_a_program_that_differs_is_not_written(tmp_path, capsys):
    assert main(["export", "--out", str(tmp_path/"m.pt2"), "--tol", "-1", "--device", "cpu"]) == 2
    assert "not written" in capsys.readouterr().err and not list(tmp_path.iterdir())
