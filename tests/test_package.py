"""The source distribution: builds, unpacks, installs and runs without the repository and without a network."""
import importlib.util, os, shutil, subprocess, sys, tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""
PREDICT = """
import weclip
import numpy as np
print(weclip.__file__)
print(weclip.predict(np.zeros((40, 50, 3), np.uint8), crf=False).shape)
"""

def assets(package): return {p.name for p in (package/"assets").iterdir()}

def run(*cmd, cwd, **env):
    "Run Python on the copy, out of sight of coverage, which would count the copy's lines as lines that nobody runs."
    unmeasured = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, *map(str, cmd)]
    done = subprocess.run(command, cwd=cwd, env={**unmeasured, "PYTHONPATH": "", **env},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout.strip()

@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    "The source distribution of a copy of the repository, unpacked."
    pytest.importorskip("setuptools", reason="needs setuptools, which builds the distribution")
    d = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT/"weclip", d/"repo"/"weclip", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT/"tests", d/"repo"/"tests", ignore=shutil.ignore_patterns("__pycache__"))
    for p in ROOT.iterdir():
        if p.is_file():
            shutil.copy(p, d/"repo")
    name = run("-c", BUILD, "build_sdist", d/"dist", cwd=d/"repo").splitlines()[-1]
    with tarfile.open(d/"dist"/name) as tar:
        tar.extractall(d)
    return d/name.removesuffix(".tar.gz")

def test_the_sdist_holds_what_it_is_built_from(unpacked):
    "`setup.py` reads settings.ini, which was not in the archive: a KeyError, and nothing could be installed."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "MANIFEST.in"):
        assert (unpacked/name).is_file(), name
    modules, packed = ({p.relative_to(d).as_posix() for p in (d/"weclip").rglob("*.py")} for d in (ROOT, unpacked))
    assert packed == modules
    assert assets(unpacked/"weclip") == assets(ROOT/"weclip")
    assert not (unpacked/"tests").exists(), "tests need the notebooks, which are not in it"
    here, there = (run("setup.py", "--version", cwd=d).splitlines()[-1] for d in (ROOT, unpacked))
    assert here == there
    assert run(unpacked/"setup.py", "--name", cwd=unpacked.parent).splitlines()[-1] == "weclip"  # from any folder

def test_setup_without_its_settings_names_them(unpacked, tmp_path):
    shutil.copy(unpacked/"setup.py", tmp_path)
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode and "settings.ini" in done.stderr.splitlines()[-1]

def test_the_sdist_installs_and_predicts(unpacked, tmp_path):
    for name in ("pip", "wheel"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"needs {name}, and no network is asked for it")
    site = tmp_path/"site"
    how = ("--no-deps", "--no-build-isolation", "--no-index", "--target", site)
    run("-m", "pip", "install", *how, unpacked, cwd=tmp_path)
    assert assets(site/"weclip") == assets(ROOT/"weclip")
    where, shape = run("-c", PREDICT, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(where).parents[1] == site and shape == "(40, 50)"
    assert "predict" in run("-m", "weclip", "--help", cwd=tmp_path, PYTHONPATH=str(site))
