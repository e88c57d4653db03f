"""The whole grid with next to no training, from nothing to the last cell of every page of experiments/.

`python tests/grid.py`, with a folder to keep it. A kernel would spend most of its time on importing PyTorch, so
the notebooks are executed by forks of one process that has imported it; each still has a fresh process to itself,
though modules that IMPORTED names are loaded already: an `import` of one of them that a page forgot is not noticed.
The three runs that the page of the gates starts have kernels, as all notebooks have outside this test.
"""
import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import papermill
from execnb.shell import CaptureShell
from papermill.engines import Engine, papermill_engines

from weclip.cli import main
from weclip.lab.plan import Grid, plan
from weclip.lab.results import collect, put_between, read_results

EXPERIMENTS = Path(__file__).resolve().parents[1]/"experiments"
ALONE = ("01_run", "02_gates")  # a run is executed for each training, the gates are no table
# what a page says instead of what it lacks
MISSING = ("Not drawn: ", "Not measured: ", "No results yet", "No pair of rows has",
           "is written when the run is made here")

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
        is_gates = Path(nb_man.nb.metadata.papermill.input_path).stem == "02_gates"
        folder = EXPERIMENTS if is_gates else EXPERIMENTS.parent  # the gates look for the notebook of a run beside them
        with ProcessPoolExecutor(1, mp_context=FORKS) as pool:
            nb_man.nb = pool.submit(executed, nb_man.nb, folder).result()

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
    "The page of the gates, which is no table; it executes three runs of its own, in kernels."
    given = dict(quick=True, out=str(out), results=str(results), cache="")
    page = "02_gates.ipynb"
    papermill.execute_notebook(EXPERIMENTS/page, out/page, given, progress_bar=False)

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
    os.chdir(EXPERIMENTS.parent)  # where the README types `weclip tables`
    os.environ.update(WECLIP_CACHE=str(folder/"cache"), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    FORKS.set_forkserver_preload(IMPORTED)
    papermill_engines.register(None, Forked)
    out = folder/"runs"
    results = folder/"results"
    out.mkdir(parents=True, exist_ok=True)
    where = ["--workers", "2", "--device", "cpu", "--out", str(out), "--results", str(results)]
    with ThreadPoolExecutor(1) as pool:  # the gates' kernels wait for each other, one core would idle
        beside = pool.submit(gates, out, results)
        status = main(["tables", "--quick", *where])
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
