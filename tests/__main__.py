"""All checks of the project, in order, stopping at the first that fails: `python tests` in an environment with the `dev` extras."""
import os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The tools of this interpreter and the modules of this checkout, whatever else is activated (IPython adds the packages of VIRTUAL_ENV to its path)
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}", "PYTHONPATH": str(ROOT), "VIRTUAL_ENV": sys.prefix}
FOLDERS = ("nbs", "experiments", "weclip")
COVERED = 93  # percent of the package's lines that pages and tests together have to run
done = []     # (what has passed, seconds)

def run(*cmd, **env):
    "Run a command in the project's folder; end everything if it fails."
    print("$", *cmd, flush=True)
    try: rc = subprocess.run(cmd, cwd=ROOT, env={**ENV, **env}).returncode
    except FileNotFoundError: sys.exit(f"FAILED: no {cmd[0]} beside {sys.executable}; install the tools with: pip install -e '.[dev]'")
    if rc: sys.exit(f"FAILED: {' '.join(cmd)} (exit code {rc}); passed before it: {', '.join(what for what, _ in done) or 'nothing'}")

def contents():
    "Every file that is under version control or would be, by path."
    return {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in [ROOT/"README.md", *(p for d in FOLDERS for p in sorted((ROOT/d).rglob("*")))]
            if p.is_file() and not {"__pycache__", ".ipynb_checkpoints", "runs"} & set(p.parts)}

def unchanged(before, why):
    after = contents()
    if odd := [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]:
        sys.exit(f"FAILED: {why}: {', '.join(odd)}")

def measured(tmp):
    "Environment in which every Python process notes the lines of the package that it runs, workers and their children too; settings in pyproject.toml."
    core = {"COVERAGE_CORE": "sysmon"} if sys.version_info >= (3, 12) else {}  # cheaper, where Python has it
    return dict(COVERAGE_PROCESS_START=str(ROOT/"pyproject.toml"), COVERAGE_FILE=os.path.join(tmp, "lines"), **core)

def passed(what, t0):
    done.append((what, time.perf_counter() - t0)); print(f"ok: {what}, {done[-1][1]:.0f} s\n", flush=True)

def main():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp: checks(measured(tmp))

def checks(lines):
    start = t0 = time.perf_counter(); before = contents()
    run("nbdev_export"); run("nbdev_clean")
    if any((ROOT/"experiments").glob("*.ipynb")): run("nbdev_clean", "--fname", "experiments")
    unchanged(before, "the modules were not exported from the notebooks, or the notebooks not cleaned; this is done now, review and commit")
    passed("export and clean leave no diff", t0)

    t0 = time.perf_counter()
    run(sys.executable, "-m", "ruff", "check", "weclip", "tests")
    passed("ruff", t0)

    t0 = time.perf_counter()
    run(sys.executable, "-m", "mypy")
    passed("types", t0)

    t0 = time.perf_counter(); before = contents()
    run("nbdev_test", "--n_workers", str(min(2, os.cpu_count() or 1)), "--timing", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", **lines)
    unchanged(before, "a notebook wrote into the project")
    passed(f"{len(list((ROOT/'nbs').glob('*.ipynb')))} notebooks run", t0)

    t0 = time.perf_counter(); before = contents()
    run(sys.executable, "tests/grid.py")  # its lines are not noted: starting fifty kernels would take a tenth longer
    unchanged(before, "the quick grid wrote into the project")
    passed("quick grid: every cell of experiments/ run", t0)

    t0 = time.perf_counter()
    run(sys.executable, "-m", "pytest", "-q", "tests", **lines)
    passed("tests", t0)

    t0, file = time.perf_counter(), {"COVERAGE_FILE": lines["COVERAGE_FILE"]}
    run(sys.executable, "-m", "coverage", "combine", "--quiet", **file)
    run(sys.executable, "-m", "coverage", "report", "--show-missing", f"--fail-under={COVERED}", **file)
    passed(f"at least {COVERED} % of the package's lines were run", t0)
    for what, seconds in [*done, ("in all", time.perf_counter() - start)]: print(f"{seconds:5.0f} s  {what}")

if __name__ == "__main__": main()
