"""The whole grid with next to no training, from nothing to the last cell of every page of experiments/.

`python tests/grid.py`, with a folder to keep it.
"""
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import papermill

from weclip.lab.plan import Grid, plan
from weclip.lab.results import collect, put_between, read_results

EXPERIMENTS = Path(__file__).resolve().parents[1]/"experiments"
ALONE = ("01_run", "02_gates")  # a run is executed for each training, the gates are no table
# what a page says instead of what it lacks
MISSING = ("Not drawn: ", "Not measured: ", "No results yet", "No pair of rows has",
           "is written when the run is made here")

def unfinished(path):
    "What is wrong with an executed page: cells that did not run, that failed, or that say there is nothing to show."
    if not path.is_file(): return [f"{path.name}: missing"]
    wrong = []
    for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip(): continue
        if cell["execution_count"] is None:
            wrong.append(f"{path.name}: cell {k} was not executed")
        shown = json.dumps(cell["outputs"], ensure_ascii=False)
        wrong += [f"{path.name}: cell {k} failed" for o in cell["outputs"] if o["output_type"] == "error"]
        wrong += [f"{path.name}: cell {k} has nothing to show ({text!r})" for text in MISSING if text in shown]
    return wrong

def gates(out, results):
    "The page of the gates, which is no table; it executes three runs of its own."
    given = dict(quick=True, out=str(out), results=str(results), cache="")
    page = "02_gates.ipynb"
    papermill.execute_notebook(EXPERIMENTS/page, out/page, given, progress_bar=False, cwd=EXPERIMENTS)

def ours(results):
    "The full method's mIoU of Table 4, from the run's result."
    cells = collect("table4", Grid(results=results, quick=True))
    return next(c["mean"] for c in cells if c["label"] == "decoder + RFM" and c["column"] == "val")

def number_on_the_page(out, results):
    "Does the page of Table 4 print the number that the run gave?"
    page = (out/"table4.ipynb").read_text(encoding="utf-8")
    expected = (f"| decoder + RFM | 74.9 | {ours(results):.1f}", "No row has two seeds")
    return [f"table4.ipynb: {x!r} is not on it" for x in expected if x not in page]

def block_of_the_readme(out, results):
    "The page of results once more, as after a real run: it fills the block of a README."
    readme = out/"README.md"
    text = (EXPERIMENTS.parent/"README.md").read_text(encoding="utf-8")
    readme.write_text(put_between(text, "", "results"), encoding="utf-8")
    given = dict(quick=True, out=str(out), results=str(results), readme=str(readme))
    papermill.execute_notebook(EXPERIMENTS/"results.ipynb", out/"readme.ipynb", given, progress_bar=False)
    line = f"Table 4](experiments/table4.ipynb), decoder + RFM | 74.9 | {ours(results):.1f}"
    return [] if line in readme.read_text(encoding="utf-8") else [f"README.md: {line!r} is not in its block"]

def grid(folder):
    "Run it all in a folder; returns what is wrong, one text each."
    os.environ["WECLIP_CACHE"] = str(folder/"cache")
    out = folder/"runs"
    results = folder/"results"
    out.mkdir(parents=True, exist_ok=True)
    where = ["--workers", "2", "--device", "cpu", "--out", str(out), "--results", str(results)]
    command = [sys.executable, "-m", "weclip", "tables", "--quick", *where]
    with ThreadPoolExecutor(1) as pool:  # the gates' kernels wait for each other, one core would idle
        beside = pool.submit(gates, out, results)
        status = subprocess.run(command, cwd=EXPERIMENTS.parent).returncode
        beside.result()
    if status: return [f"weclip tables --quick: exit code {status}"]
    runs = plan((), Grid(quick=True))
    wrong = [f"{name}: {r}" for name, r in read_results(results, runs).items() if isinstance(r, str)]
    pages = [p.stem for p in sorted(EXPERIMENTS.glob("*.ipynb")) if p.stem not in ALONE]
    for name in [*(run.name for run in runs), "02_gates", *pages]:
        wrong += unfinished(out/f"{name}.ipynb")
    return wrong + number_on_the_page(out, results) + block_of_the_readme(out, results)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d:
        wrong = grid(Path(sys.argv[1] if len(sys.argv) > 1 else d).resolve())
    sys.exit("\n".join(wrong) or 0)
