"""WeCLIP+ against the outputs of its authors' code, and a second backbone in everything that a model goes through."""
import importlib.util
from dataclasses import replace

import pytest, torch
import weclip

from oracle import PLUS, close, load, needs_plus
from weclip.beyond.plus import FrozenSecond, convert_plus, load_released_plus, resample, vit_tokens
from weclip.beyond.rfm_plus import cross_loss
from weclip.cli import main
from weclip.data.voc import open_data
from weclip.engine.cache import KeptTokens
from weclip.engine.infer import evaluate, network_input
from weclip.engine.job import open_training
from weclip.engine.pseudo import preview
from weclip.engine.train import learning_rate, optimiser, train
from weclip.engine.weights import build, convert_official, load_model, save_model
from weclip.method.config import preset
from weclip.method.losses import affinity_label, upsample
from weclip.method.seams import check_seams
from weclip.use.export import export
from weclip.use.hub import from_pretrained, save_pretrained
from weclip.world.classifier import train_classifier
from weclip.world.scenes import write_scenes

MEAN = torch.tensor([123.675, 116.28, 103.53])
STD = torch.tensor([58.395, 57.12, 57.375])
NORMS = 1e-4  # of gradients, relative

@pytest.fixture(scope="module")
def weights():
    "The authors' parts with seeded weights: CLIP, DINOv2, decoder."
    spec = importlib.util.spec_from_file_location("weights_recipe_plus", PLUS/"weights_recipe_plus.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe.make_clip_exact_state_dict(), recipe.make_dino_state_dict(), recipe.make_plus_decoder_state_dict()

@pytest.fixture(scope="module")
def model(weights):
    return load_released_plus(*weights)

def inputs(z):
    "Normalised pictures, tags, and where our pairs (classes ascending) stand among the authors' (as annotated)."
    images = load("inputs_train")["images"][z["image_index"]].float()
    annotated = [list(dict.fromkeys(c - 1 for c in row if c)) for row in z["xml_classes"].tolist()]
    pairs = [(i, c) for i, classes in enumerate(annotated) for c in sorted(classes)]
    order = [pairs.index((i, c)) for i, classes in enumerate(annotated) for c in classes]
    return ((images - MEAN)/STD).movedim(-1, 1).contiguous(), annotated, order

@pytest.fixture(scope="module")
def step(model):
    "A training forward of iteration 0, and the arrays to compare with."
    z = load("plus_train", PLUS)
    img, tags, order = inputs(z)
    return model(img, tags), z, order

def ours(name):
    "Our name of one of the authors' parameters."
    [key] = convert_official({name.removeprefix("dino_"): torch.zeros(1)})
    return f"second.{key}" if name.startswith("dino_") else key

def check_gradients(model, z):
    norms = {name: p.grad.norm() for name, p in model.decoder.named_parameters()}
    assert len(norms) == len(z["grad_names"]) == 50
    for name, norm in zip(z["grad_names"], z["grad_norms"]):
        close(norms[ours(str(name))], norm, atol=0, rtol=NORMS)

def check_losses(losses, theirs):
    seg, aff, of_clip, of_dino, dice, total = theirs.tolist()
    expected = torch.tensor([total, seg, aff, of_clip + of_dino, dice], dtype=torch.double)
    close(torch.stack(losses).detach(), expected, atol=0, rtol=1e-5)

@needs_plus
def test_the_second_backbone(model, weights):
    z = load("plus_train", PLUS)
    timm_positions = load("plus_train_timm_pos", PLUS)
    img, _, _ = inputs(z)
    close(upsample(img, (308, 308))[:, :, ::7, ::7], z["dino_in_sub"], 1e-5)
    vit = model.second.tower
    close(resample(vit.pos_embed[:, 1:], (22, 22), .1)[0, 7::8], z["dino_pos_sub"][1:], 1e-6)
    seen = model.second(img)
    assert seen.shape == (2, 22, 22, 384) and not seen.requires_grad
    close(seen.flatten(1, 2)[:, ::4], z["dino_tokens_sub"], 1e-4)
    other = vit_tokens(vit, upsample(img, (308, 308)))
    close(other.flatten(1, 2)[:, ::16], timm_positions["dino_tokens_sub"], 1e-4)
    assert (seen - other).abs().max() > .01

@needs_plus
def test_features_scores_and_affinity(step):
    out, z, _ = step
    own, _ = out.tokens
    close(own[:, 15::16], z["feat11_sub"][:, 1:], 1e-4)
    close(out.fu[:, :256], z["F_clip"], 1e-4)
    close(out.fu[:, 256:], z["F_dino"], 1e-4)
    close(out.logits_clip, z["seg_clip"], 1e-3)
    close(out.logits_second, z["seg_dino"], 1e-3)
    close(out.logits.softmax(1), z["P"], 1e-4)
    close(out.aff[0], z["A_f_img0"], 1e-5)
    close(out.aff[:, ::16], z["A_f_rows"], 1e-5)

@needs_plus
def test_cams_that_leave_block_11_out_their_refinement_and_labels(step, model):
    out, z, order = step
    assert torch.equal(out.tag_idx[order], z["keys"].long())
    assert torch.equal(out.img_idx[order], z["instance_image"].long())
    close(out.cams.raw[order], z["rawcam"], 1e-7)
    close(out.cam[order], z["gray"], 1e-4)
    close(out.attn[:, :, ::16], z["attn_rows"], 1e-5)
    close(out.cam_ref[order], z["refined"], 1e-4)
    wrong = out.pseudo != z["labels"]
    assert wrong.float().mean() <= 1e-4
    pair_labels = affinity_label(out.pseudo, out.grid, model.cfg.radius)
    assert (pair_labels != z["aff_label"]).float().mean() <= 1e-4

@needs_plus
def test_the_plain_cam_is_weclips(model, step):
    "With the block in: the rows of these two pictures in the method's own arrays."
    _, z, order = step
    img, tags, _ = inputs(z)
    before = model.cfg
    model.cfg = replace(before, cam="gradcam")
    found = model.encode(img, tags, 1).cam
    model.cfg = before
    close(found, load("cam_train")["gray"][1:6], 1e-4)

@needs_plus
@pytest.mark.parametrize("i, name", [(0, "plus_train"), (18_000, "plus_train"), (18_001, "plus_train_selflabel")])
def test_losses_and_gradients(step, model, i, name):
    out, _, _ = step
    z = load(name, PLUS)
    model.decoder.zero_grad()
    losses = model.loss(out, i)
    check_losses(losses, z["losses"])
    losses.total.backward(retain_graph=True)
    check_gradients(model, z)

@needs_plus
def test_a_step_with_timms_positions(model):
    z = load("plus_train_timm_pos", PLUS)
    img, tags, _ = inputs(load("plus_train", PLUS))
    model.second.offset = 0.
    with torch.no_grad():
        out = model(img, tags)
    model.second.offset = .1
    close(out.logits_second, z["seg_dino"], 1e-3)
    assert (out.pseudo != z["labels"]).float().mean() <= 1e-4
    check_losses(model.loss(out, 0), z["losses"])

@needs_plus
@pytest.mark.slow
def test_prediction(model):
    z = load("plus_infer", PLUS)
    image = z["image"].numpy()
    img = network_input(model, image)
    close(img[0, :, ::8, ::8], z["x_sub"], 1e-5)
    with torch.no_grad():
        both = model(torch.cat([img, img.flip(-1)]))
    close(both.logits_clip, z["seg_clip_s1"], 1e-3)
    close(both.logits_second, z["seg_dino_s1"], 1e-3)
    close(both.logits[:1], z["segs"], 1e-3)
    _, maps = preview(model, image, sorted({c - 1 for c in z["xml_classes"].tolist()}), True, ["pseudo"])
    assert (maps["pseudo"] != z["cam_label"]).float().mean() <= 1e-4
    seen = weclip.predict(image, model, scales=(1.0, 1.5), flip=True, crf=False)
    close(seen.logits[None], z["msc_segs"], 1e-3)
    assert (torch.from_numpy(seen.ids) != z["pred"]).float().mean() <= 1e-4

@needs_plus
@pytest.mark.slow
def test_the_front_reads_files(weights, model, tmp_path):
    files = [tmp_path/f"{name}.pt" for name in ("clip", "dinov2", "decoder")]
    for file, state in zip(files, weights):
        torch.save(state, file)
    loaded = weclip.load_released_plus(*files)
    for name, p in loaded.decoder.state_dict().items():
        assert torch.equal(p, model.decoder.state_dict()[name]), name
    assert loaded.second.fingerprint() == model.second.fingerprint()
    save_model(tmp_path/"model.safetensors", loaded)
    again = load_model(tmp_path/"model.safetensors")  # finds both backbones beside it
    img = torch.randn(1, 3, 32, 48)
    assert torch.equal(again.logits(img), loaded.logits(img))
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match="second_weights"):
        load_model(tmp_path/"model.safetensors")

@needs_plus
def test_other_positions_are_those_that_the_settings_tell(weights):
    again = load_released_plus(*weights, **{"model.positions": "timm"})
    assert again.second.offset == 0 and dict(again.cfg.options)["model.positions"] == "timm"

@needs_plus
def test_the_learning_rates_and_the_parameters_that_learn(model):
    for profile in ("voc", "coco"):
        cfg = preset(profile, "plus")
        rows = load("plus_lr", PLUS)[f"{profile}_table"].tolist()
        for i, *_, lr in rows:
            if i >= cfg.iters: continue  # after the last iteration
            assert learning_rate(int(i), cfg) == pytest.approx(lr, rel=1e-9), (profile, i)
    n_tensors, lr, wd = load("plus_train", PLUS)["groups"][3].tolist()
    [group] = optimiser(model, model.cfg).param_groups
    assert (len(group["params"]), group["lr"], group["weight_decay"]) == (n_tensors, lr, wd)

@needs_plus
def test_what_does_not_belong_to_the_checkpoint_is_refused(weights):
    clip, dino, decoder = weights
    with pytest.raises(ValueError, match="load_released"):
        convert_plus({name: v for name, v in decoder.items() if not name.startswith("dino")})
    with pytest.raises(ValueError, match="state dict of a DINOv2"):
        load_released_plus(clip, clip, decoder)
    with pytest.raises(ValueError, match="expected 81 classes"):
        load_released_plus(clip, dino, decoder, "coco")
    wide = {name: v for name, v in dino.items()} | {"cls_token": torch.zeros(1, 1, 768)}
    with pytest.raises(ValueError, match="vit_base_patch14_dinov2, got others"):
        load_released_plus(clip, wide, decoder)

# --- on the scenes: a second backbone in everything that a model goes through

OTHERS = {  # a tower on CLIP's own grid, and one on another grid
    "tiny": {"model.second": "tiny"},
    "timm": {"model.second": "vit_tiny_patch16_224", "model.second_weights": "random"}}
SMALL = dict(iters=4, warmup=1, bs=3, d=32, layers=1, heads=2, views=2)

@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("plus")/"scenes", train=6, val=2, workers=1)

def scenes_model(which="timm", **settings):
    return build("tiny", preset("scenes", "plus", **{**SMALL, **settings}, **OTHERS[which]))

def learnt(model): return torch.cat([p.detach().flatten() for p in model.decoder.parameters()])

def run(model, root, out, **how):
    return train(model, open_training(model, root, "train"), out, log_every=1, progress=False, **how)

@pytest.mark.parametrize("which", OTHERS)
def test_a_run_is_stopped_resumed_kept_and_scored(which, root, tmp_path):
    whole = scenes_model(which)
    before = learnt(whole)
    history = run(whole, root, tmp_path/"whole")
    def stop(i, _):
        if i == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(scenes_model(which), root, tmp_path/"stopped", on_step=stop)
    resumed = scenes_model(which)
    assert run(resumed, root, tmp_path/"stopped", resume=True) == history
    assert learnt(resumed).equal(learnt(whole)) and not learnt(whole).equal(before)
    cached = scenes_model(which)
    run(cached, root, tmp_path/"cached", cache=tmp_path/"cache")
    assert (learnt(cached) - learnt(whole)).norm() < .05*(learnt(whole) - before).norm()
    assert {p.name.split("-")[0] for p in (tmp_path/"cache").glob("*.npy")} >= {"tokens", "second", "attn", "cam"}
    pictures = open_data(root, "val", whole.classes.classes, None, with_masks=True, norm="clip")
    scored = [evaluate(m, pictures, crf=False, progress=False) for m in (whole, *[KeptTokens(tmp_path, whole)]*2)]
    assert all(s["ms"]["pixel_acc"] == pytest.approx(scored[0]["ms"]["pixel_acc"], abs=1e-3) for s in scored)

def test_a_model_comes_back_from_its_file_and_its_folder(tmp_path):
    model = scenes_model()
    img = torch.randn(1, 3, 64, 88)
    save_model(tmp_path/"model.safetensors", model)
    save_pretrained(model, tmp_path/"hub")
    for again in (load_model(tmp_path/"model.safetensors"), from_pretrained(tmp_path/"hub")):
        assert type(again) is type(model) and again.cfg == model.cfg
        assert again.logits(img).equal(model.eval().logits(img))
    with pytest.raises(ValueError, match=r"expected the backbone .*\+"):  # as long as a fingerprint of two
        load_model(tmp_path/"model.safetensors", second_weights=model.second.tower.state_dict() | {
            "pos_embed": torch.zeros_like(model.second.tower.pos_embed)})
    plain = build("tiny", preset("scenes"))
    save_model(tmp_path/"plain.safetensors", plain)
    with pytest.raises(ValueError, match="which has none"):
        load_model(tmp_path/"plain.safetensors", second_weights="some.pt")

def test_a_folder_for_others_names_no_place_of_this_machine(tmp_path):
    torch.save(FrozenSecond("vit_tiny_patch16_224", "random").tower.state_dict(), tmp_path/"second.pt")
    options = {"model.second": "vit_tiny_patch16_224", "model.second_weights": str(tmp_path/"second.pt")}
    model = build("tiny", preset("scenes", "plus", **SMALL, **options))
    folder = save_pretrained(model, tmp_path/"hub")
    assert str(tmp_path) not in (folder/"config.json").read_text()
    assert "weights `tiny` and `vit" in (folder/"README.md").read_text()
    with pytest.raises(FileNotFoundError, match="second_weights"):
        from_pretrained(folder)
    again = from_pretrained(folder, second_weights=tmp_path/"second.pt")
    assert again.second.fingerprint() == model.second.fingerprint()
    (tmp_path/"second.pt").rename(folder/"second.pt")
    assert from_pretrained(folder).second.fingerprint() == model.second.fingerprint()

def test_the_classifier_of_the_scenes_is_a_second_backbone(tmp_path):
    with pytest.raises(ValueError, match="weclip classifier"):
        FrozenSecond("classifier")
    with pytest.raises(FileNotFoundError, match="weclip classifier"):
        FrozenSecond("classifier", tmp_path/"classifier.safetensors")
    train_classifier(tmp_path, 16, n_pictures=8, bs=8, horizon=16, cool=8, workers=1)
    second = FrozenSecond("classifier", tmp_path/"classifier.safetensors")
    model = build("tiny", preset("scenes", "plus", **SMALL), second=second)
    seen = model.eval()(torch.randn(1, 3, 64, 80), [[0]])
    assert seen.tokens[1].shape == (1, 8, 10, 128) and seen.logits_second.isfinite().all()
    assert dict(model.cfg.options)["model.second_weights"] == str(tmp_path/"classifier.safetensors")
    assert second.fingerprint() != FrozenSecond("tiny").fingerprint()

def test_a_seed_is_a_decoder_whatever_the_second_backbone():
    "A tower that is built, loaded or seeded on the way draws none of the decoder's numbers."
    def decoder(seed, second, weights=""):
        options = {"model.second": second, "model.second_weights": weights}
        return learnt(build("tiny", preset("scenes", "plus", seed=seed, **SMALL, **options)))
    assert decoder(1, "classifier", "random").equal(decoder(1, "tiny"))
    assert not decoder(1, "classifier", "random").equal(decoder(2, "classifier", "random"))

def test_tokens_of_the_last_block_are_its_own_when_the_cam_skips_one():
    img = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    model = build("tiny", preset("scenes", cam="gradcam_skip", n_feats=12)).eval()
    close(model.encode(img, [[0]], 6).tokens[-1], model.tokens(img).tokens[-1], 1e-5)

def test_padding_takes_no_part_in_the_cross_loss():
    a, b = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ignored = torch.zeros(1, 4, 8, dtype=torch.bool)
    ignored[..., 4:] = True
    padded = [torch.cat([x, 9*torch.rand_like(x)], -1) for x in (a, b)]
    assert cross_loss(*padded, (4, 8), ignored=ignored).item() == pytest.approx(cross_loss(a, b, (4, 4)).item())
    assert cross_loss(*padded, (4, 8)).item() != pytest.approx(cross_loss(a, b, (4, 4)).item())

def test_parts_of_the_recipe_can_be_replaced():
    "The recipe's options go with the functions that they belong to; others stay."
    for replaced, left in ((dict(loss="plus"), {}), (dict(loss="plus2"), {"loss.empty": "zero"}),
                           (dict(refine="rfm"), {"loss.empty": "zero"})):
        cfg = preset("voc", "plus", **replaced)
        check_seams(cfg)
        assert dict(cfg.options) == left
    assert "refine.boxes" not in dict(preset("coco", "plus", refine="rfm").options)

def test_a_checkpoint_brings_its_second_backbone_to_every_command(root, tmp_path):
    train_classifier(tmp_path/"classifier", 16, n_pictures=8, bs=8, horizon=16, cool=8, workers=1)
    weights = tmp_path/"classifier"/"classifier.safetensors"
    cfg = preset("scenes", "plus", **SMALL, **{"model.second": "classifier"})
    save_model(tmp_path/"model.safetensors", build("tiny", cfg, second_weights=str(weights)))
    weights = weights.rename(tmp_path/"elsewhere.safetensors")
    words = ["pseudo", str(root), "--train-split", "val", "--clip", "tiny", "--device", "cpu",
             "--out", str(tmp_path/"labels"), "--checkpoint", str(tmp_path/"model.safetensors"),
             "--second-weights", str(weights)]
    assert main(words) == 0
    assert len(list((tmp_path/"labels").glob("*.png"))) == 2

def test_another_second_backbone_is_not_resumed(root, tmp_path):
    run(scenes_model("tiny"), root, tmp_path, on_step=None)
    with pytest.raises(ValueError, match="options was"):
        run(scenes_model("timm"), root, tmp_path, resume=True)

@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"])
def test_programs(name, tmp_path):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
    dinov2 = {"model.second": "vit_small_patch14_dinov2", "model.second_weights": "random"}
    for options in (OTHERS["tiny"], OTHERS["timm"], dinov2):
        model = build("tiny", preset("scenes", "plus", **SMALL, **options)).eval()
        off = export(model, tmp_path/name)
        assert off["pixels"] > .999, options

def test_the_command_knows_it_without_a_plugin(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fast = ["--profile", "scenes", "--clip", "tiny", "--device", "cpu", "--train-split", "train", "--recipe", "plus",
            "--set", "iters=2", "warmup=1", "d=32", "layers=1", "heads=2", "bs=2"]
    assert main(["train", str(root), "--out", "run", "--second", "tiny", *fast]) == 0
    picture = next((root/"JPEGImages").glob("*.jpg"))
    assert main(["predict", str(picture), "--checkpoint", "run/model.safetensors", "--out", "masks", "--no-crf"]) == 0
    assert len(list((tmp_path/"masks").iterdir())) == 1
    for words, says in ((fast, "give one as --second"), ([*fast, "--second", "resnet18"], "plain ViT"),
                        (["--second", "tiny"], "--recipe plus")):
        assert main(["train", str(root), "--out", "bad", *words]) != 0
        assert says in capsys.readouterr().err
