"""What happens to everybody some day: terminals that know few letters, closed pipes, full disks, foreign folders,
missing cards, no network. One line each."""
import errno, io, json, logging, os, shlex, stat, subprocess, sys
from pathlib import Path

import numpy as np, pytest, torch
from PIL import Image
from safetensors import SafetensorError

import weclip.cli as cli
import weclip.use.commands as commands
from weclip.machine import Steady
from weclip.world.scenes import write_scenes
from weclip.engine.weights import build, save_model
from weclip.use.outputs import FORMATS
from weclip.use.segmentation import SHIPPED
from weclip.cli import main, trouble

ROOT = Path(__file__).resolve().parents[1]
FAST = ["--set", "iters=6", "switch=3", "warmup=2", "bs=2", "d=32", "layers=1", "heads=2", "--device", "cpu"]
TINY = ["--profile", "scenes", "--clip", "tiny"]
CLASSES = """
name: mine
classes: [cup, {name: Łódź, prompt: boat}, {name: 猫, prompt: dog}]
template: a {}.
background: [grass]
"""

@pytest.fixture(scope="module")
def root(tmp_path_factory): return write_scenes(tmp_path_factory.mktemp("data")/"scenes", train=6, val=2)

@pytest.fixture(scope="module")
def mine(tmp_path_factory, root):
    "A model and a data set whose classes have letters that ASCII lacks; one of the classes occurs nowhere."
    d = tmp_path_factory.mktemp("mine")
    (d/"classes.yaml").write_text(CLASSES, encoding="utf-8")
    from weclip.data.voc import get_classes
    from weclip.method.config import preset
    classes = get_classes(d/"classes.yaml")
    cfg = preset("scenes", d=16, layers=1, heads=2, classes=classes.name)
    save_model(d/"model.safetensors", build("tiny", cfg, classes))
    for sub in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (d/"voc"/sub).mkdir(parents=True)
    for k in range(2):
        Image.new("RGB", (32, 32), "red").save(d/"voc"/"JPEGImages"/f"{k}.jpg")
        Image.fromarray(np.full((32, 32), k, np.uint8)).save(d/"voc"/"SegmentationClassAug"/f"{k}.png")
    lists = d/"voc"/"ImageSets"/"Segmentation"
    (lists/"val.txt").write_text("0\n1\n")
    (lists/"tags.json").write_text(json.dumps({"0": ["cup"], "1": ["Łódź"]}))
    return d

def is_one_line(err, *words):
    "Is standard error as a command may leave it: no traceback, and a last line that says this?"
    line = err.strip().splitlines()[-1]
    return "Traceback" not in err and line.startswith("weclip ") and all(w in line for w in words)

def one_line(err, *words): assert is_one_line(err, *words), err

def hidden(folder):
    return [p for p in Path(folder).rglob("*") if p.name.startswith(".") or p.name.endswith(".part")]

# ---- output never loses a result

LIMITED = {"ascii": dict(PYTHONIOENCODING="ascii"), "cp1252": dict(PYTHONIOENCODING="cp1252"),
           "C": dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")}
ONE_CORE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

def command(args, **env):
    "A command in a process of its own."
    words = [sys.executable, "-m", "weclip", *map(str, args)]
    return subprocess.run(words, env={**os.environ, **ONE_CORE, **env}, capture_output=True, timeout=240)

def test_scores_survive_a_terminal_with_few_letters(mine, tmp_path):
    "`evaluate` failed on a class name it could not print, after hours, and wrote nothing."
    wrong = []
    for kind, env in LIMITED.items():
        out = tmp_path/kind
        done = command(["evaluate", mine/"voc", "--checkpoint", mine/"model.safetensors", "--out", out, "--no-crf",
                        "--device", "cpu"], **env)
        is_told = b"\\u732b" in done.stdout or b"\\u0141" in done.stdout
        if done.returncode or b"Traceback" in done.stderr or not is_told:
            wrong.append((kind, done))
            continue
        facts = json.loads((out/"scores.json").read_text(encoding="utf-8"))
        iou, = (record["iou"] for record in facts["scores"] if record["mode"] == "ms")
        if iou["猫"] not in (None, 0):
            wrong.append((kind, iou))
    assert not wrong

def test_predict_and_inspect_survive_it_too(mine, tmp_path):
    (tmp_path/"p").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path/"p"/"猫.jpg")
    ascii_alone = {**LIMITED["ascii"], "PYTHONUTF8": "1"}
    done = command(["predict", tmp_path/"p", "--checkpoint", mine/"model.safetensors", "--out", tmp_path/"masks",
                    "--device", "cpu"], **ascii_alone)
    assert done.returncode == 0 and (tmp_path/"masks"/"猫.png").is_file(), done.stderr[-2000:]
    done = command(["inspect", mine/"voc", "--train-split", "val", "--clip", "tiny", "--classes", mine/"classes.yaml",
                    "--profile", "scenes", "--sheet", "1", "--out", tmp_path/"look", "--device", "cpu"], **ascii_alone)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads((tmp_path/"look"/"inspect.json").read_text(encoding="utf-8"))
    assert seen["classes"][1]["name"] == "Łódź" and len(list((tmp_path/"look"/"cams").iterdir())) == 2

def test_every_command_prints_on_a_terminal_with_few_letters(root, mine, tmp_path, monkeypatch):
    "Signs such as ≥ in the report of `bench`, and folders with names of all alphabets in the others."
    out = tmp_path/"Łódź-猫"
    raw = io.BytesIO()
    monkeypatch.setattr("weclip.speed.bench.bench", lambda **kw: {})
    monkeypatch.setattr("weclip.speed.bench.report", lambda r: "a ≥ b")
    monkeypatch.setattr(commands, "survey", lambda *a: {})
    monkeypatch.setattr(commands, "counts_table", lambda rows: str(out))
    monkeypatch.setenv("WECLIP_CACHE", str(tmp_path/"é"))
    lines = (["bench"],
             ["data", "voc", root, "--check"],
             ["tables", "table4", "--dry-run", "--out", out, "--results", out],
             ["scenes", "--train", "1", "--val", "0", "--out", out/"s"],
             ["hub", "--checkpoint", mine/"model.safetensors", "--out", out/"h"],
             ["pseudo", root, "--train-split", "val", *TINY, "--out", out/"p"],
             ["train", root, "--train-split", "train", *TINY, *FAST, "--out", out/"t"],
             ["demo", "--train", "2", "--val", "1", "--out", out/"d", "--no-crf", *FAST])
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # few pictures are drawn here
    for args in lines:
        narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", narrow)
        assert main([*map(str, args)]) in (0, 1), args
        raw.write(narrow.buffer.getvalue())
    said = raw.getvalue()
    assert b"a \\u2265 b" in said and said.count(b"\\u0141\\xf3d\\u017a") >= 5
    assert all((out/n).exists() for n in ("s/scenes.json", "h/README.md", "p", "t/model.safetensors", "d/results.json"))

def closed_pipe(args):
    "A command whose reader is gone: status and standard error."
    r, w = os.pipe()
    os.close(r)
    done = subprocess.run([sys.executable, "-m", "weclip", *map(str, args)], env={**os.environ, **ONE_CORE},
                          stdout=w, stderr=subprocess.PIPE, text=True, timeout=240)
    os.close(w)
    return done.returncode, done.stderr

def test_a_closed_pipe_loses_no_result(root, mine, tmp_path):
    "`weclip train ... | head -1` ended at its second line; `evaluate | head` before it wrote its scores."
    train = ["train", root, "--train-split", "train", "--out", tmp_path/"run", *TINY, *FAST]
    evaluate = ["evaluate", mine/"voc", "--checkpoint", mine/"model.safetensors", "--out", tmp_path, "--no-crf",
                "--device", "cpu"]
    left = [(train, tmp_path/"run"/"model.safetensors"), (evaluate, tmp_path/"scores.json"), (["--help"], tmp_path)]
    wrong = []
    for args, path in left:
        status, err = closed_pipe(args)
        if status or "BrokenPipe" in err or not path.exists():
            wrong.append((args, status, err))
    assert not wrong

def test_a_steady_stream_takes_everything():
    raw = io.BytesIO()
    narrow = Steady(io.TextIOWrapper(raw, encoding="latin-1", newline=""))
    print("é Ł \udce9 猫", file=narrow, flush=True)
    assert raw.getvalue() == b"\xe9 \\u0141 \\udce9 \\u732b\n" and narrow.encoding == "latin-1"
    gone = io.StringIO()
    gone.close()
    print("nobody", file=Steady(gone), flush=True)
    with open("/dev/full", "w") if Path("/dev/full").exists() else pytest.skip("no /dev/full") as full:
        stream = Steady(full)
        print("x"*100_000, file=stream, flush=True)
        print("x", file=stream, flush=True)

# ---- files and folders

def test_out_that_cannot_be_a_folder_is_told_before_any_work(root, tmp_path, capsys, monkeypatch):
    "NotADirectoryError and FileExistsError ended in a traceback, after the model was read or the training done."
    (tmp_path/"notes.txt").write_text("mine")
    for name in ("open_checkpoint", "build"):
        monkeypatch.setattr(commands, name, lambda *a: pytest.fail("work began before --out was looked at"))
    for out in (tmp_path/"notes.txt", tmp_path/"notes.txt"/"below"/"masks"):
        for args in (["predict", root/"JPEGImages"], ["evaluate", root], ["train", root, *TINY],
                     ["pseudo", root, *TINY], ["scenes"], ["inspect", root, *TINY], ["demo", "--data", root],
                     ["hub", "--checkpoint", SHIPPED]):
            assert main([*map(str, args), "--out", str(out), "--device", "cpu"]) == 2
            one_line(capsys.readouterr().err, f"--out {out}: expected a folder to write into", "notes.txt is none")
    for args in (["export"], ["bench"]):
        assert main([*args, "--out", str(tmp_path), "--device", "cpu"]) == 2
        one_line(capsys.readouterr().err, "expected the name of a file to write, got a folder")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path/"notes.txt").read_text() == "mine"

def test_a_folder_of_somebody_else(root, tmp_path, capsys, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, *a, **kw: Path(p) != tmp_path and real(p, *a, **kw))
    assert main(["predict", str(root/"JPEGImages"), "--out", str(tmp_path/"masks"), "--device", "cpu"]) == 2
    one_line(capsys.readouterr().err, "may not be written by this user")

def raising(e):
    def f(*a, **kw): raise e
    return f

TOO_MUCH = "CUDA out of memory. Tried to allocate 2 GiB\n(GPU 0)"
NO_MEMORY = ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
             "you tried to allocate 9 bytes.")
MACHINE = [
    (PermissionError(errno.EACCES, "Permission denied", "/else/masks"),
     ("/else/masks: Permission denied", "name another folder")),
    (OSError(errno.ENOSPC, "No space left on device", "masks/a.png"),
     ("masks/a.png: No space left on device", "the disk is full")),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), ("the disk is full", "quota")),
    (OSError(errno.EROFS, "Read-only file system", "/cdrom/x"), ("/cdrom/x: Read-only file system",)),
    (OSError(errno.EMFILE, "Too many open files", "x"), ("ulimit -n",)),
    (MemoryError(), ("out of memory", "--batch 1")),
    (torch.cuda.OutOfMemoryError(TOO_MUCH), ("out of memory", "--batch 1", "--set bs=")),
    (RuntimeError(NO_MEMORY), ("out of memory",)),
    (RuntimeError("DataLoader worker (pid 77) is killed by signal: Killed."), ("killed", "--workers"))]

@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="as another user there is no need to pretend")
def test_errors_of_the_machine_are_one_line(root, capsys, monkeypatch):
    "All of these were tracebacks."
    wrong = []
    for e, words in MACHINE:
        monkeypatch.setattr(commands, "open_data", raising(e))
        status = main(["evaluate", str(root), "--device", "cpu"])
        err = capsys.readouterr().err
        if status != 2 or not is_one_line(err, *words):
            wrong.append((e, status, err))
    assert not wrong

def test_a_mistake_of_the_package_keeps_its_traceback(root, monkeypatch):
    for e in (KeyError("x"), RuntimeError("shapes do not match")):
        monkeypatch.setattr(commands, "open_data", raising(e))
        with pytest.raises(type(e)):
            main(["evaluate", str(root), "--device", "cpu"])

WRITERS = {
    "png": ("PIL.Image.Image.save", OSError(errno.ENOSPC, "No space left on device")),
    "safetensors": ("weclip.engine.weights.save_file",
                    SafetensorError("I/O error: No space left on device (os error 28)")),
    "torch": ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 832 vs 790"))}

@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(kind, root, tmp_path, capsys, monkeypatch):
    "Pillow, safetensors and PyTorch each raise something else; the command showed it all."
    where, e = WRITERS[kind]
    def half(*args, **kw):
        path = next(a for a in args if isinstance(a, (str, Path)))
        Path(path).write_bytes(b"half")
        raise e
    predict = ["predict", root/"JPEGImages", "--no-crf", "--device", "cpu"]
    train = ["train", root, "--train-split", "train", *TINY, *FAST]
    monkeypatch.setattr(where, half)
    assert main([*map(str, predict if kind == "png" else train), "--out", str(tmp_path/"out")]) == 2
    one_line(capsys.readouterr().err, "the disk is full")
    kinds = {p.suffix for p in tmp_path.rglob("*")}
    assert not hidden(tmp_path) and not {".png", ".safetensors"} & kinds
    assert kind != "torch" or ".pt" not in kinds

@pytest.fixture
def small_disk(tmp_path):
    "A file system of 64 kB, where one can be mounted."
    (tmp_path/"disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path/"disk")]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield tmp_path/"disk"
    subprocess.run(["umount", "--lazy", str(tmp_path/"disk")], check=True)  # a thread may still hold a file of it

def test_on_a_disk_that_is_full(small_disk, root, capsys, monkeypatch):
    "A program for torch.export aborted the whole process, TensorBoard's thread printed a traceback before our line."
    program = torch.export.export(torch.nn.Linear(200, 200), (torch.ones(1, 200),))  # larger than the disk
    monkeypatch.setattr("weclip.use.export.export_program", lambda *a: program)
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # few pictures are drawn here
    wrong = []
    for args in (["export", "--out", small_disk/"model.pt2", "--device", "cpu"],
                 ["train", root, "--train-split", "train", "--out", small_disk/"run", *TINY, *FAST],
                 ["scenes", "--out", small_disk/"scenes", "--train", "40", "--val", "0"],
                 ["hub", "--checkpoint", SHIPPED, "--out", small_disk/"hub"],
                 ["predict", root/"JPEGImages", "--no-crf", "--format", "overlay", "coco",
                  "--out", small_disk/"masks"]):
        status = main([*map(str, args)])
        err = capsys.readouterr().err
        if status != 2 or not is_one_line(err, "the disk is full") or hidden(small_disk):
            wrong.append((args, status, err[-3000:], hidden(small_disk)))
        subprocess.run(["find", str(small_disk), "-mindepth", "1", "-delete"], check=True)
    assert not wrong

def test_one_mask_that_cannot_be_written_costs_no_other(root, tmp_path, capsys, monkeypatch):
    "A picture with a name of 255 bytes is legal, its polygons' file would have 259; a run of thousands ended there."
    (tmp_path/"p").mkdir()
    for name in ("a", "x"*251, "z", "é"*125):
        Image.new("RGB", (9, 9), "red").save(tmp_path/"p"/f"{name}.jpg")
    args = ["predict", str(tmp_path/"p"), "--out", str(tmp_path/"masks"), "--no-crf", "--device", "cpu"]
    formats = [["png"], ["overlay"], ["coco"]]
    for f in formats:
        assert main([*args, "--format", *f, "--confidence"]) == 0, f
    capsys.readouterr()
    assert main([*args, "--format", "png", "overlay", "polygons", "coco", "--confidence"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("skipped:") == 2 and "x"*251 in err and "expected at most 255" in err
    assert sorted(p.stem for p in (tmp_path/"masks"/"polygons").iterdir()) == ["a", "z"] and not hidden(tmp_path)
    masks, confidence = ([*(tmp_path/"masks").glob(what)] for what in ("*.png", "confidence/*"))
    assert len(masks) == len(confidence) == 4

def test_a_training_without_tensorboard_is_told_once(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main(["train", str(root), "--train-split", "train", *TINY, *FAST, "--out", str(tmp_path/"run")]) == 0
    assert caplog.text.count("TensorBoard is not installed") == 1
    assert (tmp_path/"run"/"checkpoint.pt").is_file() and not (tmp_path/"run"/"tensorboard").exists()

# ---- devices

def test_a_device_that_is_not_there_is_told_at_once(root, tmp_path, capsys, monkeypatch):
    "A traceback, or pages of it, after model and data had been read."
    for name in ("open_checkpoint", "build"):
        monkeypatch.setattr(commands, name, lambda *a: pytest.fail("a model was made first"))
    wrong = []
    for device in ("gpu", "cuda:77", "meta", "mps", "cpu:x"):
        for args in (["predict", root/"JPEGImages"], ["train", root, *TINY], ["demo"], ["tinyclip"]):
            status = main([*map(str, args), "--out", str(tmp_path/"out"), "--device", device])
            err = capsys.readouterr().err
            if status != 2 or not is_one_line(err, f"--device {device}: expected a device of this machine, cpu"):
                wrong.append((device, args, status, err))
    assert not wrong and not list(tmp_path.iterdir())

def test_a_card_without_a_driver_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda: expected a device of this machine, cpu"):
        cli.check_device("cuda")
    cli.check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cli.check_device("cuda")
    cli.check_device("cuda:1")
    with pytest.raises(ValueError, match="cpu, cuda, cuda:0, cuda:1"):
        cli.check_device("cuda:2")

# ---- the Hub

class Answer(Exception):
    "As huggingface_hub's HTTP errors: an answer with a status."
    def __init__(self, status, text):
        super().__init__(text)
        self.response = type("R", (), dict(status_code=status))
Answer.__module__ = "huggingface_hub.errors"
class ConnectError(Exception):
    "As httpx raises it without a network; no OSError."
ConnectError.__module__ = "httpx"

def hub_errors():
    "What the Hub's client raises, and what is told of it."
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled
    offline = OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled.")
    return {"offline": (offline, "HF_HUB_OFFLINE"),
            "network": (ConnectError("[Errno -2] Name or service not known"), "check the network"),
            "timeout": (TimeoutError("timed out"), "check the network"),
            "401": (Answer(401, "401 Client Error\nInvalid username or password."), "hf auth login"),
            "token": (LocalTokenNotFoundError("Token is required"), "hf auth login"),
            "403": (Answer(403, "403 Forbidden"), "may not write"),
            "name": (HFValidationError("Repo id must use alphanumeric chars"), "USER/NAME"),
            "500": (Answer(500, "500 Server Error"), "status 500")}

def test_what_the_hub_refuses_is_one_line_and_the_folder_stays(tmp_path, capsys, monkeypatch):
    "`hub --push` without a network, a login or a proper name: a traceback of some library."
    wrong = []
    for kind, (e, says) in hub_errors().items():
        api = type("Api", (), dict(create_repo=raising(e)))
        monkeypatch.setattr("weclip.use.hub.HfApi", lambda token=None, api=api: api)
        folder = tmp_path/kind
        status = main(["hub", "--checkpoint", str(SHIPPED), "--out", str(folder), "--push", "user/name"])
        out, err = capsys.readouterr()
        is_told = "written:" in out and is_one_line(err, "user/name: ", says, "can be sent again")
        names = sorted(p.name for p in folder.iterdir())
        if status != 2 or not is_told or names != ["README.md", "config.json", "model.safetensors"]:
            wrong.append((kind, status, names, out, err))
    assert not wrong

def test_a_checkpoint_that_the_hub_does_not_give_is_one_line(root, tmp_path, capsys, monkeypatch):
    wrong = []
    for kind in ("offline", "network", "timeout", "401", "name", "500"):
        monkeypatch.setattr("weclip.use.hub.snapshot_download", raising(hub_errors()[kind][0]))
        status = main(["predict", str(root/"JPEGImages"), "--checkpoint", "hf:user/name", "--out", str(tmp_path),
                       "--device", "cpu"])
        err = capsys.readouterr().err
        if status != 2 or not is_one_line(err, "user/name: expected a folder, or user/name of a model on the Hugging"):
            wrong.append((kind, status, err))
    assert not wrong

def test_scores_with_null_make_a_card(mine, tmp_path, capsys):
    "A class that occurs nowhere has no IoU: null in scores.json, and `weclip hub` stumbled over it."
    model = str(mine/"model.safetensors")
    scores = tmp_path/"scores.json"
    def record(mode, miou, iou): return dict(split="val", mode=mode, settings={}, miou=miou, iou=iou)
    records = [record("ms", None, {}), record("single", .25, {"cup": None})]
    iou = {"background": .5, "cup": None, "猫": None}
    contents = [([record("ms", .5, iou)], "| scales + flip | 50.0 |"), (records[:1], "Not given."),
                (records, "| one scale | 25.0 |"), ([], "Not given.")]
    for k, (content, row) in enumerate(contents):
        scores.write_text(json.dumps(dict(scores=content, val_split="val", n_val=2)))
        out = tmp_path/f"m{k}"
        hub = ["hub", "--checkpoint", model, "--results", str(scores), "--out", str(out)]
        assert main(hub) == 0, capsys.readouterr().err
        card = (out/"README.md").read_text(encoding="utf-8")
        assert row in card and "nan" not in card.lower() and "猫" in card
    numberless = json.dumps(dict(scores=[dict(split="val", mode="ms", settings={})], val_split="val"))
    for text in ("[1, 2]", '{"ms": 3}', "no json", '{"ms": {}}', '{"scores": []}', '{"scores": 3, "val_split": "val"}',
                 '{"scores": [{"ms": 1}], "val_split": "val"}', numberless):
        scores.write_text(text)
        hub = ["hub", "--checkpoint", model, "--results", str(scores), "--out", str(tmp_path/"bad")]
        assert main(hub) == 2
        one_line(capsys.readouterr().err, "scores.json: expected results.json or scores.json")
    assert not (tmp_path/"bad").exists()

# ---- resume

def test_resume_says_what_is_there(root, tmp_path, capsys):
    "--resume with nothing to resume began anew without a word; after a finished run `train` spoke of a stopped one."
    args = ["train", str(root), "--train-split", "train", *TINY, *FAST, "--out", str(tmp_path/"run")]
    assert main([*args, "--resume"]) == 2
    one_line(capsys.readouterr().err, "run: expected checkpoint.pt of a stopped run, found no such folder",
             "leave resume (--resume) out")
    (tmp_path/"run").mkdir()
    (tmp_path/"run"/"notes.txt").touch()
    demo = ["demo", "--out", str(tmp_path/"run"), *FAST]
    for more in (args, demo, [*demo, "--data", str(root), "--train-split", "train", *TINY]):
        assert main([*more, "--resume"]) == 2
        one_line(capsys.readouterr().err, "expected checkpoint.pt of a stopped run, found notes.txt")
    assert [p.name for p in (tmp_path/"run").iterdir()] == ["notes.txt"]
    assert main(args) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path/"run").glob("*.*")}
    capsys.readouterr()
    assert main(args) == 2
    one_line(capsys.readouterr().err, "found a finished run (6 of 6 iterations)", "choose another folder")
    assert main([*args, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "the run is finished (6 of 6 iterations); nothing was left to train" in out
    assert "s each on" not in out and "Traceback" not in err
    assert {p.name: p.read_bytes() for p in (tmp_path/"run").glob("*.*")} == before

def test_a_stopped_run_says_how_far_it_is(root, tmp_path, capsys, monkeypatch):
    import weclip.engine.train as t
    real = t.train_step
    seen = []
    def stop(*a, **kw):
        if len(seen) == 2: raise KeyboardInterrupt
        seen.append(1)
        return real(*a, **kw)
    monkeypatch.setattr(t, "train_step", stop)
    args = ["train", str(root), "--train-split", "train", *TINY, *FAST, "--out", str(tmp_path/"run")]
    assert main(args) == 130
    one_line(capsys.readouterr().err, "interrupted; --resume continues it")
    monkeypatch.setattr(t, "train_step", real)
    assert main(args) == 2
    one_line(capsys.readouterr().err, "found a stopped run (2 of 6 iterations); continue it with resume (--resume)")
    (tmp_path/"run"/"checkpoint.pt").write_bytes(b"x")
    assert main(args) == 2
    one_line(capsys.readouterr().err, "cannot be read")
    assert main([*args, "--resume"]) == 2
    one_line(capsys.readouterr().err, "damaged")

def test_a_finished_demo_is_scored_for_what_is_asked(root, tmp_path, capsys):
    "The masks, the pictures or the code may be others than when it was scored; the training is not repeated."
    args = ["demo", "--data", str(root), "--train-split", "train", "--out", str(tmp_path), *TINY, *FAST, "--no-crf"]
    assert main(args) == 0
    before = (tmp_path/"model.safetensors").read_bytes()
    (tmp_path/"results.json").unlink()
    capsys.readouterr()
    assert main([*args, "--resume"]) == 0
    assert "the training is finished (6 of 6 iterations); it is scored again" in capsys.readouterr().out
    assert (tmp_path/"model.safetensors").read_bytes() == before and (tmp_path/"results.json").is_file()

def test_output_that_is_lost_is_told(root, tmp_path):
    "`evaluate > /dev/full` ended well without a word, and the scores were nowhere."
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    words = [sys.executable, "-m", "weclip", "evaluate", str(root), "--no-crf", "--device", "cpu"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "standard output cannot be written" in done.stderr

def test_a_command_without_standard_error_works(root, tmp_path):
    "tqdm wrote to None where a service has closed the stream, and nothing was predicted."
    words = [sys.executable, "-m", "weclip", "predict", root/"JPEGImages", "--out", tmp_path/"masks", "--no-crf",
             "--device", "cpu"]
    line = shlex.join(map(str, words)) + " 2>&-"
    assert subprocess.run(["sh", "-c", line], stdout=subprocess.DEVNULL).returncode == 0
    assert list((tmp_path/"masks").glob("*.png"))

def test_an_empty_option_is_told(root, tmp_path, capsys):
    "An unset variable of the shell: a traceback, and masks in the current folder."
    for option in ("--device", "--out"):
        args = {"--out": str(tmp_path/"masks"), "--device": "cpu", option: ""}
        words = [x for pair in args.items() for x in pair]
        assert main(["predict", str(root/"JPEGImages"), *words]) == 2
        assert option in capsys.readouterr().err and not (tmp_path/"masks").exists()

def test_what_was_handled_before_is_not_the_reason():
    "A mistake of this package inside `except ValueError` was told as the user's."
    try:
        try:
            int("abc")
        except ValueError:
            len(3)
    except TypeError as e:
        assert trouble(e) == ""

def test_a_name_is_no_reason():
    assert "disk" not in trouble(ValueError("data/EFBIG No space left/x.jpg: expected a picture, got text"))

def test_a_command_leaves_no_handler_behind(root, tmp_path):
    "The handler of the first call wrote into a stream that was closed, so later warnings reached nobody."
    before = list(logging.getLogger().handlers)
    main(["predict", str(tmp_path/"nowhere"), "--out", str(tmp_path/"m"), "--device", "cpu"])
    assert logging.getLogger().handlers == before

def test_only_a_training_is_told_to_resume(root, tmp_path, capsys, monkeypatch):
    advice = dict(predict="the masks that are there are whole", evaluate="no scores were written",
                  pseudo="the label maps", inspect="interrupted")
    for f in ("open_checkpoint", "build"):
        monkeypatch.setattr(commands, f, raising(KeyboardInterrupt()))
    wrong = []
    for name, says in advice.items():
        data = root/"JPEGImages" if name == "predict" else root
        more = TINY if name in ("pseudo", "inspect") else []
        status = main([name, str(data), "--out", str(tmp_path), "--device", "cpu", *more])
        err = capsys.readouterr().err
        if status != 130 or not is_one_line(err, "interrupted", says) or "--resume" in err:
            wrong.append((name, status, err))
    assert not wrong

# ---- the umask decides

@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_the_umask_decides_over_every_file(mask, root, tmp_path, monkeypatch):
    "model.safetensors lay as 0600 beside others of 0644: in a shared folder nobody else could read it."
    import open_clip  # noqa: F401
    from weclip.use.app import examples
    from weclip.speed.bench import _store
    from weclip.world.tinyclip import save_tiny, tiny_clip
    old = os.umask(mask)
    try:
        model = tmp_path/"run"/"model.safetensors"
        train = ["train", root, "--train-split", "train", *TINY, *FAST, "--out", tmp_path/"run"]
        hub = ["hub", "--checkpoint", model, "--out", tmp_path/"hub"]
        export = ["export", "--checkpoint", model, "--out", tmp_path/"model.pt2", "--device", "cpu"]
        predict = ["predict", root/"JPEGImages"/"val_00000.jpg", "--out", tmp_path/"masks", "--format", *FORMATS,
                   "--confidence", "--no-crf", "--device", "cpu"]
        look = ["inspect", root, "--train-split", "train", *TINY, "--sheet", "1", "--out", tmp_path/"look",
                "--device", "cpu"]
        for args in (train, hub, export, predict, look):
            assert main([*map(str, args)]) == 0, args
        save_tiny(tiny_clip(), tmp_path/"tiny")
        write_scenes(tmp_path/"scenes", train=1, val=1)
        examples(tmp_path/"app")
        monkeypatch.setattr("weclip.speed.bench.report", lambda r: "fast")
        _store(tmp_path/"bench"/"measured.json", "cpu", dict(x=float("nan")))
    finally:
        os.umask(old)
    odd = {str(p.relative_to(tmp_path)): oct(stat.S_IMODE(p.stat().st_mode)) for p in tmp_path.rglob("*")
           if stat.S_IMODE(p.stat().st_mode) != ((0o777 if p.is_dir() else 0o666) & ~mask)}
    assert not odd and len(list(tmp_path.rglob("*"))) > 30

def test_the_exception_behind_is_looked_at():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "x.pt")
        except OSError:
            raise KeyError("while tidying up") from None
    except KeyError as e:
        assert "the disk is full" in trouble(e)
    assert trouble(KeyError("a bug")) == "" and json.dumps(trouble(ValueError("two\nlines"))) == '"two lines"'

def test_what_is_missing_at_the_end_is_missed_before_the_training(root, tmp_path, monkeypatch):
    "DenseCRF was first looked for when a training of hours had ended; so was a list that is only predicted."
    import weclip.engine.job as job
    from weclip.method.config import Score, preset
    model = build("tiny", preset("scenes", iters=4, switch=2, bs=2, d=16, layers=1, heads=2, warmup=1, par_iters=1))
    def trained(*args, **kw): raise AssertionError("trained first")
    def no_crf(): raise ImportError("DenseCRF needs pydensecrf")
    monkeypatch.setattr(job, "train", trained)
    monkeypatch.setattr(job, "_densecrf", no_crf)
    ms = [Score("val", "ms")]
    for k, (error, says, how) in enumerate((
            (ImportError, "pydensecrf", {}),
            (FileNotFoundError, "server.txt", dict(scores=[*ms, Score("server", "ms")], blind=["server"])),
            (FileNotFoundError, "nowhere.txt", dict(scores=ms, val_split="nowhere")),
            (ValueError, "longside", dict(scores=[Score("val", "ms", dict(longside=5))])))):
        with pytest.raises(error, match=says):
            job.run_job(model, root, tmp_path/str(k), say=len, **how)

def test_results_name_the_code_that_was_imported(root, tmp_path, monkeypatch):
    "Files that were edited while a run went on gave its result their digest."
    import weclip.engine.job as job
    from weclip.method.config import preset
    now = dict(code="before", revision="before")
    monkeypatch.setattr(job, "code_digest", lambda: now["code"])
    monkeypatch.setattr(job, "revision", lambda: now["revision"])
    def edit(*args): now.update(code="after", revision="after")
    cfg = preset("scenes", iters=2, switch=1, bs=2, d=16, layers=1, heads=2, warmup=1, par_iters=1)
    job.run_job(build("tiny", cfg), root, tmp_path, modes=("single",), sheet=0, say=edit)
    result = json.loads((tmp_path/"results.json").read_text())
    assert (result["code"], result["revision"]) == ("before", "before") and now["code"] == "after"

def test_labels_can_be_looked_at_during_a_training(root):
    "It left the model in evaluation mode, without dropout and mixed precision, for the rest of the run."
    from weclip.engine.pseudo import preview, score_stages
    from weclip.data.voc import open_data
    model = build("tiny").train()
    modes = [module.training for module in model.modules()]
    data = open_data(root, "val", model.classes.classes, "auto", with_masks=True, norm="clip")
    preview(model, data.read(data.ids[0])[0], data.tags[data.ids[0]])
    score_stages(model, data, progress=False, stages=("pseudo",))
    assert [module.training for module in model.modules()] == modes and model.training

def test_a_snapshot_that_a_full_disk_cost_is_written_when_the_run_goes_on(root, tmp_path, monkeypatch):
    "In the middle of a run and after its last step; both are what a run without trouble keeps."
    import weclip.engine.job as job
    from weclip.method.config import preset, snapshot_file
    from weclip.engine.weights import load_model
    def go(out, resume=False):
        cfg = preset("scenes", iters=4, switch=2, bs=2, d=16, layers=1, heads=2, warmup=1, par_iters=1)
        job.run_job(build("tiny", cfg), root, out, scores=[], snapshots=[2, 4], sheet=0, resume=resume, say=len)
    go(tmp_path/"whole")
    real = job.save_model
    for k in (2, 4):
        out = tmp_path/str(k)
        def full(path, *args, k=k, **kw):
            if path.name == snapshot_file(k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(path, *args, **kw)
        monkeypatch.setattr(job, "save_model", full)
        with pytest.raises(OSError):
            go(out)
        monkeypatch.setattr(job, "save_model", real)
        assert job.run_found(out) == (k, 4) and not (out/snapshot_file(k)).exists()
        go(out, resume=True)
        for done in (2, 4):
            kept, wanted = (load_model(d/snapshot_file(done)).decoder.state_dict() for d in (out, tmp_path/"whole"))
            assert all(v.equal(wanted[name]) for name, v in kept.items()), (k, done)
