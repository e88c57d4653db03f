"""Files of weights from strangers: nothing in them is run, and nothing they name leads out of their folder."""
import hashlib, json, os, pickle, re, zipfile
from typing import Tuple

import numpy as np, open_clip, pytest, torch
from safetensors.torch import save_file

from weclip.method.decoder import Decoder
from weclip.data.voc import read_onehot
from weclip.engine import weights
from weclip.engine.weights import (
    build, decoder_from_official, describe, frozen_weights, has_encoder, load_clip,
    load_model, load_released, read_model, read_weights, save_model, write_model)
from weclip.engine.train import load_checkpoint, optimiser, save_checkpoint
from weclip.speed.bench import TINY, inputs

class Call:
    "Pickles as a call."
    def __init__(self, f, *args):
        self.f = f
        self.args = args
    def __reduce__(self): return self.f, self.args

def payloads(mark):
    "Ways to have a pickle create `mark`."
    path = str(mark)
    return [Call(os.system, f"touch {path}"), Call(eval, f"open({path!r}, 'w')"), Call(open, path, "w"),
            Call(os.mkdir, path), Call(torch.save, torch.ones(1), path), Call(torch.from_file, path, True, 4),
            Call(np.save, path, np.ones(1))]

def bare(path, x): path.write_bytes(pickle.dumps(x, 2))
def zipped(path, x): torch.save(dict(state_dict=dict(weight=x)), path)
def old(path, x): torch.save(dict(weight=x), path, _use_new_zipfile_serialization=False)
def array(path, x):
    box = np.empty((), object)
    box[()] = {"a": x}
    with open(path, "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|O", fortran_order=False, shape=()))
        pickle.dump(box, f)
def scripted(path, x):
    "A pickle in the place of an archive's list of modules."
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/constants.pkl", pickle.dumps((), 2))
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data.pkl", pickle.dumps(x, 2))

def resume(path):
    model = inputs(quick=True, size=32)[0]
    load_checkpoint(path, model, optimiser(model, model.cfg))

READERS = {"weights": read_weights, "clip": load_clip, "resume": resume, "model": load_model,
           "onehot": lambda p: read_onehot(p, ("a",)), "released": lambda p: load_released({}, p)}

def refusal(read, *args):
    "What a call says when it raises `ValueError`; none where it does not."
    try:
        read(*args)
    except ValueError as e:
        return str(e)

@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.parametrize("write", [bare, zipped, old, array, scripted], ids=lambda f: f.__name__)
def test_pickles_are_not_run(tmp_path, write):
    mark = tmp_path/"ran"
    wrong = []
    for suffix in (".pt", ".pth", ".npy", ".safetensors", ""):
        path = tmp_path/f"evil{suffix}"
        for k, x in enumerate(payloads(mark)):
            write(path, x)
            for name, read in READERS.items():
                told = refusal(read, path)
                if mark.exists() or "evil" not in (told or ""):
                    wrong.append((suffix, k, name, told, mark.exists()))
    assert not wrong

def test_these_payloads_would_do_something(tmp_path):
    for k in range(len(payloads(tmp_path))):
        mark = tmp_path/f"ran{k}"
        bare(tmp_path/"evil.pt", payloads(mark)[k])
        pickle.loads((tmp_path/"evil.pt").read_bytes())
        assert mark.exists() or mark.with_suffix(".npy").exists(), k

class Hostile(torch.nn.Module):
    "Writes a file when it is restored."
    def __init__(self, mark:str):
        super().__init__()
        self.mark = mark
        self.weight = torch.nn.Parameter(torch.ones(2))
    def forward(self, x): return x
    @torch.jit.export
    def __getstate__(self): return self.mark, self.weight, self.training
    @torch.jit.export
    def __setstate__(self, state:Tuple[str, torch.Tensor, bool]):
        self.mark = state[0]
        self.weight = state[1]
        self.training = torch.from_file(state[0], True, 9).numel() > 3

@pytest.mark.filterwarnings("ignore")
def test_a_damaged_archive_is_no_weights(tmp_path):
    "A zip file whose list of contents is broken; it cannot even be asked whether it is TorchScript."
    path = tmp_path/"d.pth"
    torch.save({"w": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03", 1))
    with pytest.raises(ValueError, match="d.pth: expected weights, got a damaged file"):
        read_weights(path)

def test_archives_are_not_run(tmp_path):
    torch.jit.script(Hostile(str(tmp_path/"ran"))).save(tmp_path/"evil.pt")
    for read in (read_weights, load_clip, load_model, resume):
        with pytest.raises(ValueError, match="evil"):
            read(tmp_path/"evil.pt")
        assert not (tmp_path/"ran").exists()
    torch.jit.load(tmp_path/"evil.pt")
    assert (tmp_path/"ran").exists()  # as it would have been

@pytest.mark.filterwarnings("ignore")
def test_a_traced_clip_is_read_as_published(tmp_path, monkeypatch):
    "OpenAI publishes a traced model, with its mask as a tensor that is no weight; nobody else's archive is opened."
    torch.manual_seed(0)
    as_theirs = dict(TINY, quick_gelu=True)
    clip = open_clip.CLIP(**as_theirs).eval()
    (tmp_path/"tiny-traced.json").write_text(json.dumps(as_theirs))
    open_clip.add_model_config(tmp_path/"tiny-traced.json")
    example = torch.randn(1, 3, 32, 32), torch.randint(0, 9, (1, 8))
    torch.jit.trace(clip, example, check_trace=False).save(tmp_path/"clip.pt")
    with pytest.raises(ValueError, match="none that OpenAI published"):
        read_weights(tmp_path/"clip.pt")
    digest = hashlib.sha256((tmp_path/"clip.pt").read_bytes()).hexdigest()
    monkeypatch.setattr("weclip.engine.weights.published_archives", lambda: {digest})
    archive = read_weights(tmp_path/"clip.pt")
    assert all(archive[k].equal(v) for k, v in clip.state_dict().items())
    assert set(archive) - set(clip.state_dict()) <= {"attn_mask"}
    back = load_clip(tmp_path/"clip.pt", "tiny-traced").state_dict()
    assert all(back[k].equal(v) for k, v in clip.state_dict().items())
    torch.save({"state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}}, tmp_path/"wrapped.pt")
    assert set(read_weights(tmp_path/"wrapped.pt")) == set(clip.state_dict())

# ---- what a file names

@pytest.fixture(scope="module")
def model(): return inputs(quick=True, size=32)[0]

def described(path, model, **change):
    "A model file whose description was changed."
    save_model(path, model)
    about, state = read_model(path)
    save_file(state, path, metadata=dict(weclip=json.dumps({**about, **change})))
    return path

def test_a_backbone_elsewhere_is_not_read(tmp_path, model, monkeypatch):
    followed = []
    monkeypatch.setattr("weclip.engine.weights.build", lambda backbone, *_: followed.append(backbone))
    monkeypatch.chdir(tmp_path)
    (tmp_path/"models"/"sub").mkdir(parents=True)
    for p in ("clip.pt", "models/sub/clip.pt", "laion2b_s32b_b79k"):
        (tmp_path/p).write_bytes(b"x")
    names = ("../clip.pt", "/etc/passwd", "sub/clip.pt", "..\\clip.pt", "C:\\clip.pt", "\\\\server\\clip.pt", "..", ".",
             "", "a\0b", "x"*5000, "laion2b_s32b_b79k", "clip.pt")
    for name in names:
        with pytest.raises(FileNotFoundError, match="neither a tag nor a file beside it; give its weights"):
            load_model(described(tmp_path/"models"/"m.safetensors", model, backbone=name))
    assert not followed

def test_a_backbone_beside_the_model_is_read(tmp_path, model, monkeypatch):
    seen = []
    def build(backbone, cfg, classes, arch):
        seen.append(backbone)
        return model
    monkeypatch.setattr("weclip.engine.weights.build", build)
    (tmp_path/"clip.pt").write_bytes(b"x")
    path = described(tmp_path/"m.safetensors", model, backbone="/somewhere/else/clip.pt")
    load_model(path)
    load_model(path, "given.pt")
    load_model(described(path, model, backbone="openai"))
    assert seen == [str(tmp_path/"clip.pt"), "given.pt", "openai"]

SETTINGS = dict(lr="x"), dict(unknown=1), dict(d=10**9), dict(layers=10**9), dict(heads=0)  # changes of a model's own
DESCRIPTIONS = (
    dict(config=[]), dict(config=None), dict(classes=None), dict(classes={}), dict(classes=["a"]),
    dict(classes=dict(name="a", classes=["a"], prompts=[1])), dict(backbone=None, classes=3),
    dict(fingerprint=None, config=1))

def test_a_description_that_is_none(tmp_path, model):
    path = tmp_path/"m.safetensors"
    config = read_model(described(path, model))[0]["config"]
    changes = [*DESCRIPTIONS, *(dict(config={**config, **settings}) for settings in SETTINGS)]
    told = [(change, refusal(load_model, described(path, model, **change))) for change in changes]
    assert not [pair for pair in told if "m.safetensors: expected a model" not in (pair[1] or "")]

def test_a_header_that_is_no_description(tmp_path, model):
    path = tmp_path/"m.safetensors"
    wrong = []
    for text in ("[]", "5", "null", "{", "["*100_000, '"a"', "{}"):
        save_file(model.decoder.state_dict(), path, metadata=dict(weclip=text))
        told = refusal(load_model, path)
        if "m.safetensors" not in (told or ""):
            wrong.append((text[:9], told))
    assert not wrong

def lost_moment(s): s["opt"]["state"][99] = s["opt"]["state"].pop(0)

BREAKS = {
    "no about": lambda s: s.pop("about"), "no opt": lambda s: s.pop("opt"), "i is a text": lambda s: s.update(i="x"),
    "i is negative": lambda s: s.update(i=-1), "i is too large": lambda s: s.update(i=10**9),
    "no history": lambda s: s.update(history=None), "no config": lambda s: s["about"].pop("config"),
    "no fingerprint": lambda s: s["about"].pop("fingerprint"), "no groups": lambda s: s["opt"].pop("param_groups"),
    "a moment of nothing": lost_moment, "no moment": lambda s: s["opt"]["state"].update({0: {}, 99: {}}),
    "a moment's shape": lambda s: s["opt"]["state"][0].update(exp_avg=torch.ones(1)),
    "one weight more": lambda s: s["decoder"].update(more=torch.ones(1)),
    "a weight that is a number": lambda s: s["decoder"].update({"pred.bias": 3}),
    "no decoder": lambda s: s.update(decoder=[])}

def one_step(model):
    "The optimiser of a model after a step."
    opt = optimiser(model, model.cfg)
    for p in model.decoder.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    return opt

@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_checkpoint_is_placed_as_a_new_optimiser_would_be(tmp_path, monkeypatch):
    "Step counters on a card would be asked for one by one in every step; meta stands for the card."
    model = inputs(quick=True, size=32)[0]
    opt = one_step(model)
    opt.param_groups[0]["fused"] = True
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")  # as if written on a card
        save_checkpoint(tmp_path/"c.pt", model, opt, 3, [])
    model.decoder.to("meta")
    model.text_fg = model.text_fg.to("meta")
    opt = optimiser(model, model.cfg)
    load_checkpoint(tmp_path/"c.pt", model, opt)
    places = {(name, x.device.type) for state in opt.state.values() for name, x in state.items()}
    assert places == {("step", "cpu"), ("exp_avg", "meta"), ("exp_avg_sq", "meta")}
    assert opt.param_groups[0]["fused"] is None and len(opt.state) == len([*model.decoder.parameters()])

def test_a_checkpoint_that_lacks_something(tmp_path):
    model = inputs(quick=True, size=32)[0]
    path = tmp_path/"c.pt"
    save_checkpoint(path, model, one_step(model), 3, [])
    resume(path)
    whole = path.read_bytes()
    wrong = []
    for what, break_it in BREAKS.items():
        path.write_bytes(whole)
        state = torch.load(path, weights_only=True)
        break_it(state)
        torch.save(state, path)
        told = refusal(resume, path)
        if "c.pt" not in (told or ""):
            wrong.append((what, told))
    assert not wrong

def test_a_released_file_of_something_else_is_named(tmp_path):
    cases = [({"decoder.x": 3}, "of tensors"), ({"state_dict": 5}, "of tensors"), ([1], "state dict"),
             ({"x": torch.ones(1)}, "decoder"), ({"about": {}}, "model.safetensors"),
             ({"decoder_fts_fuse.linears_modulelist.0.proj.weight": torch.ones(2, 3)}, "weights")]
    wrong = []
    for state, says in cases:
        torch.save(state, tmp_path/"d.pth")
        told = refusal(load_released, {}, tmp_path/"d.pth")
        if not re.search(f"d.pth: expected.*{says}", told or ""):
            wrong.append((state, told))
    assert not wrong

# ---- the authors' decoder

MLPS = (("mlps.", "decoder_fts_fuse.linears_modulelist."), (".0.weight", ".proj.weight"), (".0.bias", ".proj.bias"),
        (".2.weight", ".proj_2.weight"), (".2.bias", ".proj_2.bias"))
OTHERS = (("conv.", "decoder_fts_fuse.linear_fuse."), ("pred.", "decoder.linear_pred."),
          ("phi.", "decoder.transformer.resblocks."), (".qkv.", ".attn.in_proj_"), (".proj.", ".attn.out_proj."),
          (".up.", ".mlp.c_fc."), (".down.", ".mlp.c_proj."))

def as_released(decoder):
    "A decoder's weights under the authors' names, inside a model that was trained on several GPUs."
    out = {"module.encoder.x": torch.ones(1)}
    for k, v in decoder.state_dict().items():
        name = k
        for ours, theirs in MLPS if k.startswith("mlps.") else OTHERS:
            name = name.replace(ours, theirs)
        out[f"module.{name}"] = v[..., None, None] if k in ("conv.weight", "pred.weight") else v  # 1x1 convolutions
    return out

def test_released_weights_keep_their_sizes_and_values():
    torch.manual_seed(0)
    ours = Decoder(width=12, n_feats=3, n_classes=5, d=8, layers=2, heads=2)
    got = decoder_from_official(as_released(ours), heads=2).eval()
    assert all(v.equal(got.state_dict()[k]) for k, v in ours.state_dict().items()) and len(got.mlps) == 3
    tokens = [torch.randn(1, 6, 12) for _ in range(3)]
    assert got(tokens, (2, 3)).logits.equal(ours.eval()(tokens, (2, 3)).logits)

MISFITS = [
    (lambda s: s.pop("module.decoder.linear_pred.weight"), "expected the weights ['pred.weight']"),
    (lambda s: s.pop("module.decoder.linear_pred.bias"), "pred.bias: expected (5,), got nothing"),
    (lambda s: s.update({"module.decoder.other": torch.ones(2)}), "decoder.other: expected nothing, got (2,)"),
    (lambda s: s.update({"module.decoder_fts_fuse.linear_fuse.bias": torch.ones(9)}),
     "conv.bias: expected (8,), got (9,)")]

def test_released_weights_that_do_not_fit_are_named():
    wrong = []
    for change, says in MISFITS:
        state = as_released(Decoder(width=12, n_feats=3, n_classes=5, d=8, layers=2, heads=2))
        change(state)
        told = refusal(decoder_from_official, state, 2)
        if says not in (told or ""):
            wrong.append((says, told))
    assert not wrong

def test_a_fingerprint_is_of_all_weights_and_the_activation():
    "It was of three tensors: an encoder fine-tuned in its attention passed for the original."
    model = build("tiny")
    mark = frozen_weights(model)
    old = frozen_weights(model, former=True)
    def made_on(mark, arch=None): return has_encoder(model, dict(fingerprint=mark, arch=arch))
    assert made_on(mark) and made_on(old) and mark != old
    assert made_on(mark, "ViT-B-16") and not made_on(old, "ViT-B-16")  # which may have another activation
    with torch.no_grad():
        model.clip.blocks[3].attn.in_proj_weight[0, 0] += 1
    assert not made_on(mark) and made_on(old)
    with torch.no_grad():
        model.clip.blocks[3].attn.in_proj_weight[0, 0] -= 1
    assert frozen_weights(build("tiny")) == mark
    other = build("tiny")
    for block in other.clip.blocks:
        block.mlp.gelu = torch.nn.GELU()
    assert frozen_weights(other) != mark

def test_a_model_is_built_and_kept_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = build("tiny")
        save_model(tmp_path/"model.safetensors", model)
        assert frozen_weights(load_model(tmp_path/"model.safetensors")) == frozen_weights(build("tiny"))

def test_a_model_with_the_former_fingerprint_is_opened(tmp_path):
    model = build("tiny")
    about = dict(describe(model), fingerprint=frozen_weights(model, former=True))
    write_model(tmp_path/"model.safetensors", about, model.decoder.state_dict())
    assert load_model(tmp_path/"model.safetensors").logits(torch.zeros(1, 3, 64, 64)).isfinite().all()
    write_model(tmp_path/"model.safetensors", dict(about, fingerprint="0"*12), model.decoder.state_dict())
    with pytest.raises(ValueError, match="expected the backbone tiny"):
        load_model(tmp_path/"model.safetensors")

def test_openais_file_is_not_read_with_the_other_activation(tmp_path, monkeypatch):
    (tmp_path/"clip.pt").write_bytes(b"")
    monkeypatch.setattr(weights, "read_weights", lambda path: {})
    monkeypatch.setattr(weights, "_is_published", lambda path: True)
    with pytest.raises(ValueError, match="expected ViT-B-16-quickgelu"):
        weights.load_clip(tmp_path/"clip.pt", "ViT-B-16")
    with pytest.raises(ValueError, match="another architecture"):  # the right one goes on to its tensors
        weights.load_clip(tmp_path/"clip.pt", "ViT-B-16-quickgelu")
