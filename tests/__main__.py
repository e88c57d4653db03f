"""All checks of the project, in order, up to the first that fails: `python tests`, with the `dev` extras installed.

`python tests --all` also runs what takes long: slow cells of the pages, the gates of the shipped weights, leaks of
memory, killed runs, all of the fuzzing.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("nbs", "experiments", "weclip")
COVERED = 93  # percent of the package's lines that pages and tests together have to run
WORKERS = str(min(2, os.cpu_count() or 1))
ONE_THREAD = dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # of each worker: together they fill the cores
done = []  # (what has passed, seconds)

def environment():
    "The tools of this interpreter and the modules of this checkout, whatever else is activated."
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    ours = dict(PATH=path, PYTHONPATH=str(ROOT), VIRTUAL_ENV=sys.prefix)  # IPython adds the packages of VIRTUAL_ENV
    return {**os.environ, **ours}

def run(*cmd, **env):
    "Run a command in the project's folder; end everything if it fails."
    print("$", *cmd, flush=True)
    try:
        status = subprocess.run(cmd, cwd=ROOT, env={**environment(), **env}).returncode
    except FileNotFoundError:
        sys.exit(f"FAILED: no {cmd[0]} beside {sys.executable}; install the tools with: pip install -e '.[dev]'")
    passed = ", ".join(what for what, _ in done) or "nothing"
    if status:
        sys.exit(f"FAILED: {' '.join(cmd)} (exit code {status}); passed before it: {passed}")

def contents():
    "Every file that is under version control or would be, by path."
    paths = [ROOT/"README.md"]
    for folder in FOLDERS:
        paths += sorted((ROOT/folder).rglob("*"))
    left_out = {"__pycache__", ".ipynb_checkpoints", "runs"}
    files = [p for p in paths if p.is_file() and not left_out & set(p.parts)]
    return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in files}

def unchanged(before, why):
    after = contents()
    odd = [name for name in sorted({*before, *after}) if before.get(name) != after.get(name)]
    if odd:
        sys.exit(f"FAILED: {why}: {', '.join(odd)}")

def measured(folder):
    "Environment in which every Python process notes the lines of the package that it runs, workers and children too."
    core = {"COVERAGE_CORE": "sysmon"} if sys.version_info >= (3, 12) else {}  # cheaper, where Python has it
    return dict(COVERAGE_PROCESS_START=str(ROOT/"pyproject.toml"), COVERAGE_FILE=os.path.join(folder, "lines"), **core)

class Check:
    "Time a block; if it comes to its end, it has passed."
    def __init__(self, what): self.what = what

    def __enter__(self): self.start = time.perf_counter()

    def __exit__(self, kind, error, trace):
        if kind: return
        seconds = time.perf_counter() - self.start
        done.append((self.what, seconds))
        print(f"ok: {self.what}, {seconds:.0f} s\n", flush=True)

def checks(lines, everything):
    with Check("export and clean leave no diff"):
        before = contents()
        run("nbdev_export")
        run("nbdev_clean")
        run("nbdev_clean", "--fname", "experiments")
        unchanged(before, "the modules were not exported from the notebooks, or the notebooks not cleaned; "
                          "this is done now, review and commit")
    with Check("ruff"):
        run(sys.executable, "-m", "ruff", "check", "weclip", "tests")
    with Check("types"):
        run(sys.executable, "-m", "mypy")
    with Check(f"{len(list((ROOT/'nbs').rglob('*.ipynb')))} notebooks run"):
        before = contents()
        slow_cells = ["--flags", "slow"] if everything else []
        run("nbdev_test", "--n_workers", WORKERS, "--timing", *slow_cells, **ONE_THREAD, **lines)
        unchanged(before, "a notebook wrote into the project")
    with Check("quick grid: every cell of experiments/ run"):
        before = contents()
        run(sys.executable, "tests/grid.py")  # its lines are not noted: it would take a tenth longer
        unchanged(before, "the quick grid wrote into the project")
    with Check("all tests" if everything else "tests, without the slow ones"):
        which = ["-m", "slow or not slow"] if everything else []
        workers = ["-n", WORKERS, "--dist", "loadfile"]
        run(sys.executable, "-m", "pytest", "-q", *workers, *which, "tests", **ONE_THREAD, **lines)
    with Check(f"at least {COVERED} % of the package's lines were run"):
        file = {"COVERAGE_FILE": lines["COVERAGE_FILE"]}
        run(sys.executable, "-m", "coverage", "combine", "--quiet", **file)
        run(sys.executable, "-m", "coverage", "report", "--show-missing", f"--fail-under={COVERED}", **file)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="also what takes long")
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        checks(measured(folder), args.all)
    for what, seconds in [*done, ("in all", time.perf_counter() - start)]:
        print(f"{seconds:5.0f} s  {what}")

if __name__ == "__main__":
    main()
