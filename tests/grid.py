"""The whole grid with next to no training, from nothing to the last cell of every page of experiments/: `python tests/grid.py`, with a folder to keep it."""
import json, os, subprocess, sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import papermill

from weclip.lab.plan import collect, plan
from weclip.lab.results import put_between

EXPERIMENTS = Path(__file__).resolve().parents[1]/"experiments"
ALONE = ("01_run", "02_gates")  # a run is executed for each training, the gates are no table
# what a page says instead of what it lacks
HOLES = ("Not drawn: ", "Not measured: ", "No results yet", "No pair of rows has", "is written when the run is made here")

def unfinished(path):
    "What is wrong with an executed page: cells that did not run, that failed, or that say there is nothing to show."
    if not path.is_file(): return [f"{path.name}: missing"]
    wrong = []
    for k, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip(): continue
        if cell["execution_count"] is None: wrong.append(f"{path.name}: cell {k} was not executed")
        shown = json.dumps(cell["outputs"], ensure_ascii=False)
        wrong += [f"{path.name}: cell {k} failed" for o in cell["outputs"] if o["output_type"] == "error"]
        wrong += [f"{path.name}: cell {k} has nothing to show ({hole!r})" for hole in HOLES if hole in shown]
    return wrong

def gates(out, results):
    "The page of the gates, which is no table; it executes three runs of its own."
    where = dict(out=str(out), results=str(results), cache="")
    papermill.execute_notebook(EXPERIMENTS/"02_gates.ipynb", out/"02_gates.ipynb", dict(quick=True, **where), progress_bar=False, cwd=EXPERIMENTS)

def ours(results):
    "The full method's mIoU of Table 4, from the run's file."
    return next(c["mean"] for c in collect("table4", folder=results, quick=True) if c["label"] == "decoder + RFM" and c["column"] == "val")

def number_on_the_page(out, results):
    "Does the page of Table 4 print the number that the run's file holds?"
    page = (out/"table4.ipynb").read_text(encoding="utf-8")
    return [f"table4.ipynb: {x!r} is not on it" for x in (f"| decoder + RFM | 74.9 | {ours(results):.1f}", "No row has two seeds") if x not in page]

def block_of_the_readme(out, results):
    "The page of results once more, as after a real run: it fills the block of a README."
    readme = out/"README.md"; readme.write_text(put_between((EXPERIMENTS.parent/"README.md").read_text(encoding="utf-8"), "", "results"), encoding="utf-8")
    papermill.execute_notebook(EXPERIMENTS/"results.ipynb", out/"readme.ipynb", dict(quick=True, out=str(out), results=str(results), readme=str(readme)), progress_bar=False)
    line = f"Table 4](experiments/table4.ipynb), decoder + RFM | 74.9 | {ours(results):.1f}"
    return [] if line in readme.read_text(encoding="utf-8") else [f"README.md: {line!r} is not in its block"]

def grid(tmp):
    "Run it all in a folder; returns what is wrong, one text each."
    os.environ["WECLIP_CACHE"] = str(tmp/"cache")
    out, results = tmp/"runs", tmp/"results"; out.mkdir(parents=True, exist_ok=True)
    cmd = [sys.executable, "-m", "weclip", "tables", "--quick", "--workers", "2", "--device", "cpu", "--out", str(out), "--results", str(results)]
    with ThreadPoolExecutor(1) as pool:  # the gates' kernels wait for each other, one core would idle
        beside = pool.submit(gates, out, results)
        status = subprocess.run(cmd, cwd=EXPERIMENTS.parent).returncode
        beside.result()
    if status: return [f"weclip tables --quick: exit code {status}"]
    runs = [r.name for r in plan(quick=True)]
    wrong = [f"{n}.json: missing" for n in runs if not (results/f"{n}.json").is_file()]
    wrong += sum((unfinished(out/f"{n}.ipynb") for n in [*runs, "02_gates", *(p.stem for p in sorted(EXPERIMENTS.glob("*.ipynb")) if p.stem not in ALONE)]), [])
    return wrong + number_on_the_page(out, results) + block_of_the_readme(out, results)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d: wrong = grid(Path(sys.argv[1] if len(sys.argv) > 1 else d).resolve())
    sys.exit("\n".join(wrong) or 0)
