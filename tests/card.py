"""On a machine with a GPU, in at most eight minutes and without a network: the tests that ask it, and what runs cost.

    python tests/card.py --pack FOLDER [--python 3.12]   # where pip works: what the other machine may lack
    python tests/card.py --out OUT --packed FOLDER       # there; with --device cpu --quick: does everything run?
    python tests/card.py --keep OUT                      # put the numbers beside those of a processor, for the pages

The machine needs PyTorch 2.4 or newer, torchvision, timm, matplotlib, tensorboard and scikit-learn; everything else
travels in FOLDER, at most 64 MiB, with the outputs of the authors' code. Each part has its own limit of time. Its text
is in OUT/<part>.txt, numbers of the tests in OUT/notes.jsonl and those of `weclip bench` in OUT/measured.json; all are
written as they come, so that a part that is cut off leaves what it has. OUT/card.json says how each part ended.
"""
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
WHEELS = "open_clip_torch", "ftfy", "wcwidth", "regex", "fastcore", "pytest", "pluggy", "iniconfig", "pygments"
MOST = 64*2**20  # bytes of all that travels

# --- what travels -----------------------------------------------------------------------------------------------

def unpack_wheels(site, python):
    "The versions that are installed here, for another Python."
    names = [f"{name}=={version(name)}" for name in WHEELS]
    with TemporaryDirectory() as folder:
        how = "--no-deps", "--only-binary=:all:", "--python-version", python, "--dest", folder, "--quiet"
        subprocess.run([sys.executable, "-m", "pip", "download", *how, *names], check=True)
        for wheel in Path(folder).glob("*.whl"):
            shutil.unpack_archive(wheel, site, "zip")

def pack(folder, python):
    sys.path.insert(0, str(Path(__file__).parent))
    from oracle import ORACLE
    unpack_wheels(folder/"site-packages", python)
    shutil.copytree(ORACLE, folder/"oracle", copy_function=shutil.copyfile, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size/2**20:.1f} MiB")
    if size > MOST:
        sys.exit(f"expected at most {MOST/2**20:.0f} MiB")

# --- on the machine ---------------------------------------------------------------------------------------------

def parts(out, device, quick):
    "Name -> limit in seconds, arguments of Python, further environment."
    bench = ["-m", "weclip", "bench", "--device", device, "--out", out/"measured.json"]
    tests = ["-m", "pytest", "-v", "-m", "cuda", "-p", "no:cacheprovider", ROOT/"tests"/"test_cuda.py"]
    fixed = dict(WECLIP_DEVICE=device, WECLIP_NOTES=out/"notes.jsonl", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    return dict(tests=(120, tests, fixed), bench=(360, [*bench, "--quick", "--repeats", 1] if quick else bench, {}))

def environment(packed, more):
    "This checkout and what travelled, before what is installed."
    paths = [ROOT, *([packed/"site-packages"] if packed else []), os.environ.get("PYTHONPATH", "")]
    ours = dict(PYTHONPATH=os.pathsep.join(map(str, paths)), PYTHONUNBUFFERED="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
                HF_HUB_OFFLINE="1")
    if packed:
        ours["WECLIP_ORACLE"] = packed/"oracle"
    return {**os.environ, **{name: str(value) for name, value in (ours | more).items()}}

def run(limit, args, env, file):
    "How a part ended, and after how many seconds."
    start = time.perf_counter()
    with open(file, "w", encoding="utf-8") as text:
        process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env=env, stdout=text,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(limit)
            ended = f"failed (exit code {status})" if status else "ok"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with its loading processes
            process.wait()
            ended = f"cut off after {limit} s"
    return dict(ended=ended, seconds=round(time.perf_counter() - start, 1))

def measure(out, packed, device, quick):
    out.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (limit, args, more) in parts(out, device, quick).items():
        file = out/f"{name}.txt"
        found[name] = run(limit, args, environment(packed, more), file)
        (out/"card.json").write_text(json.dumps(found, indent=1) + "\n")
        last = file.read_text(encoding="utf-8").splitlines()[-40:]
        print(f"== {name}: {found[name]['ended']}, {found[name]['seconds']} s", *last, sep="\n", flush=True)
    return all(part["ended"] == "ok" for part in found.values())

def keep(out):
    sys.path.insert(0, str(ROOT))
    from weclip.speed.bench import _store
    notes = out/"notes.jsonl"
    lines = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
    tests = {name: found for line in lines for name, found in json.loads(line).items()}
    for kind, result in json.loads((out/"measured.json").read_text()).items():
        _store(ROOT/"nbs"/"7_speed"/"measured.json", kind, dict(result, tests=tests) if tests else result)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--pack", type=Path, metavar="FOLDER", help="collect what the other machine may lack")
    what.add_argument("--out", type=Path, help="measure, and write here")
    what.add_argument("--keep", type=Path, metavar="OUT", help="put what was measured beside the pages")
    parser.add_argument("--python", default=THIS_PYTHON, help="version of Python on the other machine")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="what --pack collected")
    parser.add_argument("--device", default="cuda", help="as PyTorch names it")
    parser.add_argument("--quick", action="store_true", help="a tiny encoder, to see that everything runs")
    args = parser.parse_args()
    if args.pack: return pack(args.pack.resolve(), args.python)
    if args.keep: return keep(args.keep)
    packed = args.packed and args.packed.resolve()
    sys.exit(0 if measure(args.out.resolve(), packed, args.device, args.quick) else 1)

if __name__ == "__main__":
    main()
