"""Whoever copies only the plain forms of the method's pages has a working WeCLIP step and a prediction.

The definitions that `plain_loss` and `plain_predict` need are collected from the modules and run on their own,
without the package.
"""
import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oracle import clip_weights, decoder_weights, load, needs_oracle
from weclip.data.pictures import preprocess
from weclip.engine.weights import load_released
from weclip.speed.bench import inputs

METHOD = Path(__file__).resolve().parents[1]/"weclip"/"method"
WANTED = "plain_loss", "plain_predict"
FAST = {"FrozenCLIP", "WeCLIP", "Decoder", "gradcam", "rfm", "refine_cam", "sinkhorn", "transition", "box_mask",
        "par", "diffuse", "pseudo_labels", "total_loss", "affinity_label", "pixel_ce"}
HEAD = """from __future__ import annotations
import math
from functools import lru_cache
from math import isqrt
from itertools import product
from typing import NamedTuple
import torch
import torch.nn.functional as F
from torch import Tensor
"""

def defined():
    "Name -> (syntax tree, text) of everything that the top level of a module of the method defines."
    found = {}
    for path in sorted(METHOD.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            if isinstance(node, ast.Assign):
                names = [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            text = "\n".join(source.splitlines()[first - 1:node.end_lineno])
            for name in names:
                found[name] = node, text
    return found

def used(node):
    "Names that the code of a definition reads and does not make itself; annotations are no code."
    for n in ast.walk(node):
        for name in ("annotation", "returns"):
            if hasattr(n, name):
                setattr(n, name, None)
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
    made = {n.id for n in names if isinstance(n.ctx, ast.Store)}
    local = made | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return {n.id for n in names} - local

def plain_source():
    "The text of all definitions that the plain step and the plain prediction need."
    known = defined()
    texts = {}
    todo = list(WANTED)
    while todo:
        name = todo.pop()
        if name in texts or name not in known:
            continue
        node, texts[name] = known[name]
        todo += used(node)
    constants = [t for n, t in texts.items() if isinstance(known[n][0], ast.Assign)]
    others = [t for n, t in texts.items() if not isinstance(known[n][0], ast.Assign)]
    return texts, "\n\n".join([HEAD, *dict.fromkeys(constants), *others])

@pytest.fixture(scope="module")
def plain():
    "The copied code, run alone."
    _, source = plain_source()
    names = {}
    exec(compile(source, "plain forms", "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in WANTED})

def test_no_fast_form_is_needed():
    texts, source = plain_source()
    assert not FAST & set(texts)
    assert "weclip" not in source.replace("WeCLIP", "")
    assert len([line for line in source.splitlines() if line.strip()]) <= 400

def gradients(model, loss):
    model.decoder.zero_grad()
    loss.total.backward()
    return torch.cat([p.grad.flatten() for p in model.decoder.parameters()])

@pytest.mark.parametrize("dynamic", [False, True])
def test_a_step_is_that_of_the_model(plain, dynamic):
    model, batch, _ = inputs(quick=True, size=48)
    model.eval()
    ours = model.loss(model(batch.img, batch.tags, dynamic))
    copied = plain.plain_loss(model, batch, dynamic)
    assert torch.stack(copied).allclose(torch.stack(ours), atol=1e-3)
    assert gradients(model, copied).allclose(gradients(model, ours), atol=1e-3)

@pytest.mark.parametrize("settings", [dict(par_scale=.5), dict(alpha=1), dict(refine="none"), dict(pad_ignore=True)])
def test_what_the_plain_step_has_no_form_for_is_refused(plain, settings):
    "It gave the released losses, whatever the settings said."
    model, batch, _ = inputs(quick=True, size=48)
    model.cfg = replace(model.cfg, **settings)
    with pytest.raises(ValueError, match=f"released value of {next(iter(settings))}"):
        plain.plain_loss(model, batch)

def test_a_prediction_is_that_of_the_model(plain):
    model, batch, _ = inputs(quick=True, size=48)
    with torch.no_grad():
        ids = plain.plain_predict(model.eval(), batch.img)
        logits = model.logits(batch.img)
    enlarged = torch.nn.functional.interpolate(logits, batch.img.shape[-2:], mode="bilinear", align_corners=False)
    assert (ids == enlarged.argmax(1)).float().mean() > .999

@needs_oracle
@pytest.mark.parametrize("phase", ["pre", "post"])
def test_a_step_is_that_of_the_authors(plain, phase):
    "Their weights and pictures, and the losses that their code computed of them."
    model = load_released(clip_weights(), decoder_weights(), classes="voc")
    given = load("inputs_train")
    tags = [[c - 1 for c in row if c] for row in given["class_sets"].tolist()]
    batch = SimpleNamespace(img=preprocess(given["images"]), tags=tags)
    with torch.no_grad():
        loss = plain.plain_loss(model, batch, dynamic=phase == "post")
    seg, _, _, aff, total = load(f"loss_{phase}")["losses"]
    theirs = torch.stack([total, seg, aff]).float()
    assert torch.stack(loss).allclose(theirs, rtol=1e-3)
