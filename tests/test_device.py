"""What would make a card wait, or starve it: host waits and launches of every step, counted on a device that is not
there, and the table of them that the page on speed shows."""
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from fake_device import missing, run

TABLE = Path(__file__).resolve().parents[1]/"nbs"/"7_speed"/"launches.json"
LAUNCHES = 1200  # a step
IN_HALF = 1400   # in mixed precision: autocast casts every weight and most inputs, each by an operation of its own
WRITE = "python tests/launches.py --write"

def stored(): return json.loads(TABLE.read_text())

def is_other_pytorch(): return stored()["torch"] != torch.__version__.split("+")[0]

@cache
def counted():
    "What a process on the fake device says."
    reason = missing()
    if reason:
        pytest.skip(reason)
    done = run(TABLE.parents[2]/"tests"/"launches.py", "--json", capture_output=True, text=True)
    found = json.loads(done.stdout) if done.returncode == 0 else None
    if is_other_pytorch() and (found is None or found["missed"]):
        pytest.skip(f"the fake device is made for PyTorch {stored()['torch']}, and fails with {torch.__version__}")
    assert found, done.stderr
    return found

def offenders(what, is_one):
    "Cases that are over a limit, with the first places."
    return {row["case"]: row[what][:5] for row in counted()["rows"] if is_one(row)}

def waits_allowed(row): return 2 if "fp16" in row["case"] else 1

def launches_allowed(row): return IN_HALF if "16" in row["case"] else LAUNCHES

def is_tiny(row):
    "The tiny CLIP's own training: its optimiser, Muon, takes one matrix after the other, open_clip's text tower waits."
    return "tiny" in row["case"]

def test_the_log_sees_launches_waits_and_mixed_devices(): assert not counted()["missed"]

def test_every_case_runs(): assert not offenders("error", lambda row: "error" in row)

def test_no_operation_mixes_devices(): assert not offenders("mixed", lambda row: row["mixed"])

def test_the_host_waits_at_most_once_a_step_and_twice_in_half_precision():
    assert not offenders("waits_at", lambda row: row["waits"] > waits_allowed(row) and not is_tiny(row))

def test_a_step_has_few_launches():
    assert not offenders("lines", lambda row: row["launches"] > launches_allowed(row) and not is_tiny(row))

def test_the_stored_table_is_what_is_counted():
    now = counted()["table"]
    if is_other_pytorch():
        pytest.skip(f"launches.json was counted with PyTorch {stored()['torch']}, here is {torch.__version__}")
    assert stored() == now, f"write it again: {WRITE}"
