"""The whole grid with next to no training, from nothing to the last cell of every page of experiments/.

`python tests/grid.py`, with a folder to keep it. A kernel would spend most of its time on importing PyTorch, so
the notebooks are executed by forks of one process that has imported it; each still has a fresh process to itself,
though modules that IMPORTED names are loaded already: an `import` of one of them that a page forgot is not noticed.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import papermill
from execnb.shell import CaptureShell
from papermill.engines import Engine, papermill_engines

from weclip.cli import main
from weclip.lab.claims import answers, in_points
from weclip.lab.plan import Grid, plan
from weclip.lab.results import collect, put_between, read_results

EXPERIMENTS = Path(__file__).resolve().parents[1]/"experiments"
ALONE = ("01_run",)  # executed for each training
# what a page says instead of what it lacks
MISSING = ("Not drawn:", "Not measured:", "not measured |", "No results yet", "No row has a score",
           "No run has a score")

# what the notebooks import, and scikit-learn's lazy parts
IMPORTED = ("__main__", "weclip.engine.job", "weclip.lab.runner", "weclip.world.classifier", "sklearn.manifold",
            "sklearn.model_selection", "matplotlib.figure", "timm")
FORKS = get_context("forkserver")

def executed(notebook, folder):
    "A notebook with its outputs, those of a failing cell included; the process that executes it ends afterwards."
    os.chdir(folder)
    # no module of the tests, which Python puts in front for a script of theirs
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    shell = CaptureShell(mpl_format="png")
    codes = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    for count, cell in enumerate(codes, 1):
        cell.outputs = [nbformat.from_dict(output) for output in shell.run(cell.source)]
        cell.execution_count = count
        if shell.exc: break
    return notebook

class Forked(Engine):
    "A way for papermill to execute notebooks, without kernels."
    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **settings):
        "Have the manager's notebook executed."
        with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
            nb_man.nb = pool.submit(executed, nb_man.nb, EXPERIMENTS.parent).result()

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

def ours(results):
    "The full method's mIoU of Table 4, from the run's result."
    cells = collect("table4", Grid(results=results, quick=True))
    return next(c["mean"] for c in cells if c["label"] == "decoder + RFM" and c["column"] == "val")

def claim_on_the_page(results):
    "The line of the claim that Table 4 answers, as far as one seed goes."
    points = in_points(answers(Grid(results=results, quick=True), "table4")[0].ours.mean)
    return f"refinement (RFM) helps | Table 4 | +6.2 | {points} | – to – | 1 | undecided |"

def number_on_the_page(out, results):
    "Does the page of Table 4 print the numbers that the runs gave?"
    page = (out/"table4.ipynb").read_text(encoding="utf-8")
    expected = (f"| decoder + RFM | 74.9 | {ours(results):.1f}", claim_on_the_page(results))
    return [f"table4.ipynb: {x!r} is not on it" for x in expected if x not in page]

def block_of_the_readme(out, results):
    "The page of results once more, as after a real run: it fills the block of a README."
    readme = out/"README.md"
    text = (EXPERIMENTS.parent/"README.md").read_text(encoding="utf-8")
    readme.write_text(put_between(text, "", "results"), encoding="utf-8")
    given = dict(quick=True, out=str(out), results=str(results), readme=str(readme))
    papermill.execute_notebook(EXPERIMENTS/"results.ipynb", out/"readme.ipynb", given, progress_bar=False)
    line = claim_on_the_page(results)
    return [] if line in readme.read_text(encoding="utf-8") else [f"README.md: {line!r} is not in its block"]

def grid(folder):
    "Run it all in a folder; returns what is wrong, one text each."
    os.chdir(EXPERIMENTS.parent)  # where the README types `weclip tables`
    os.environ.update(WECLIP_CACHE=str(folder/"cache"), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    FORKS.set_forkserver_preload(IMPORTED)
    papermill_engines.register(None, Forked)
    out = folder/"runs"
    results = folder/"results"
    out.mkdir(parents=True, exist_ok=True)
    where = ["--workers", "2", "--device", "cpu", "--out", str(out), "--results", str(results)]
    status = main(["tables", "--quick", *where])
    if status: return [f"weclip tables --quick: exit code {status}"]
    runs = plan((), Grid(quick=True))
    wrong = [f"{name}: {r}" for name, r in read_results(results, runs).items() if isinstance(r, str)]
    pages = [p.stem for p in sorted(EXPERIMENTS.glob("*.ipynb")) if p.stem not in ALONE]
    for name in [*(run.name for run in runs), *pages]:
        wrong += unfinished(out/f"{name}.ipynb")
    return wrong + number_on_the_page(out, results) + block_of_the_readme(out, results)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d:
        wrong = grid(Path(sys.argv[1] if len(sys.argv) > 1 else d).resolve())
    sys.exit("\n".join(wrong) or 0)
