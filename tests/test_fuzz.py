"""Damaged and hostile files give a result, or a ValueError or FileNotFoundError that names them.

Never a crash, a hang, a silent loss or another error.
"""
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="limits of memory and processor time need a Unix")
import fuzz

KINDS = ("picture", "mask", "tags.json", "split", "annotation", "onehot", "csv", "own", "classes", "checkpoint")

@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    "Every input with its outcome; they are read in a process of its own, which may crash."
    tmp = tmp_path_factory.mktemp("fuzz")
    env = {**os.environ, "PYTHONPATH": str(Path(fuzz.__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, fuzz.__file__, str(tmp)], capture_output=True, text=True, env=env)
    lines = [json.loads(line) for line in (tmp/"log.jsonl").read_text().splitlines()]
    assert done.returncode == 0, f"ended by {done.returncode} at {lines[-1]}: {done.stderr[-1500:]}"
    return [{**a, **b} for a, b in zip(lines[::2], lines[1::2], strict=True)]

def test_there_are_enough(rows):
    assert len(rows) >= 2000 and {r["kind"] for r in rows} == set(KINDS)
    assert len({(r["kind"], r["file"]) for r in rows if r["kind"] == "picture"}) >= 19

def test_a_result_or_an_error_that_names_the_file(rows):
    odd = [r for r in rows if r["outcome"] not in ("ok", "refused")]
    odd += [r for r in rows if r["what"] == "" and r["outcome"] != "ok"]  # a sound file was refused
    counts = Counter(r["kind"] for r in odd)
    assert not odd, f"{counts}: {odd[:10]}"
    outcomes = {kind: {r["outcome"] for r in rows if r["kind"] == kind and r["what"]} for kind in KINDS}
    assert not {kind: seen for kind, seen in outcomes.items() if seen != {"ok", "refused"}}

def test_none_takes_long_or_much_memory(rows):
    assert max(r["seconds"] for r in rows) < fuzz.SECONDS and max(r["mib"] for r in rows) < 1536

def loop(path):
    while True:
        pass

def silent(path): raise AssertionError("lost")
def nameless(path): raise ValueError("no name")
def other(path): return {}["key"]
def named(path): raise ValueError(f"{path}: expected")

def test_it_would_be_noticed(monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", .05)
    fuzz.arm()
    readers = {loop: "slow", silent: "wrong", nameless: "nameless", other: "other", named: "refused", str: "ok"}
    assert {read: fuzz.attempt(read, Path("x"))[0] for read in readers} == readers
