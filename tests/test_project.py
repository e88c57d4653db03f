"""The repository itself: modules in step with notebooks, the law of the floors, clean pages, docstrings, lengths, links, settings.

A check loops over all pages or modules and lists every offender at once.
"""
import ast
import configparser
import importlib
import inspect
import io
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted((ROOT/"nbs").rglob("*.ipynb"))
EXPERIMENTS = sorted((ROOT/"experiments").glob("*.ipynb"))
PAGES = NBS + EXPERIMENTS
MODULES = sorted(p for p in (ROOT/"weclip").rglob("*.py") if not p.name.startswith("_"))
NAMED = ("settings.ini", "setup.py", "_quarto.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
TEXTS = MODULES + sorted((ROOT/"tests").glob("*.py")) + [ROOT/n for n in NAMED]
INSTALL = {"demo": "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/weclip demo",
           "tests": "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python tests"}
PLACES = re.compile("(?<![\\w.])/(?:work|root|tmp|home|Users|mnt)/")  # where somebody's machine would show
LONG:dict = {}  # functions of more than 30 lines of code, and why

def cells(nb, kind=None):
    return [c for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if kind in (None, c["cell_type"])]

def source(cell): return "".join(cell["source"])

def text(nb, kind=None): return "\n".join(source(c) for c in cells(nb, kind))

def name(path): return path.relative_to(ROOT).as_posix()

def default_exp(nb):
    found = re.findall(r"^#\| default_exp +(\S+)", text(nb, "code"), re.M)
    return found[0] if found else None

def dotted(module): return ".".join(module.relative_to(ROOT/"weclip").with_suffix("").parts)

def public(module):
    mod = importlib.import_module(f"weclip.{dotted(module)}")
    return {k: getattr(mod, k) for k in mod.__all__}

# ---- the modules are what the notebooks say

def test_modules_are_exported(tmp_path):
    pytest.importorskip("nbdev", reason="needs the dev extras")
    for d in ("nbs", "weclip"):
        shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for f in ("settings.ini", "README.md"):
        shutil.copy(ROOT/f, tmp_path)
    for p in (tmp_path/"weclip").rglob("*.py"):
        if p.name != "__init__.py":
            p.unlink()
    code = "import sys; sys.path.insert(0, '.'); from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    ours, fresh = ({p.relative_to(d).as_posix(): p.read_text(encoding="utf-8") for p in (d/"weclip").rglob("*.py")} for d in (ROOT, tmp_path))
    assert sorted(ours) == sorted(fresh)
    assert not (odd := [k for k in ours if ours[k] != fresh[k]]), f"run nbdev_export: {odd}"

def test_one_notebook_per_module():
    exps = [e for e in map(default_exp, NBS) if e and e != "__main__"]  # `python -m weclip`, which MODULES leaves out with the other _names
    assert sorted(exps) == sorted(set(exps)) == sorted(map(dotted, MODULES))

# ---- the law: a module imports only from floors below its own, and in its own folder only from pages before it

FLOORS = [{"machine"}, {"method"}, {"data", "world"}, {"engine"}, {"use", "lab", "speed"}, {"cli"}, {"__main__"}]
FLOOR = {folder: i for i, folders in enumerate(FLOORS) for folder in folders}
NUMBER = {default_exp(nb): nb.stem[:2] for nb in NBS if default_exp(nb)}

def imports(module):
    "Modules of ours that a module imports, dotted, at its top or inside a function."
    package = dotted(module).split(".")[:-1]
    return imported(module.read_text(encoding="utf-8"), package)

def imported(code, package):
    "The same of a piece of code in a package, given as a list of names."
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import):
            yield from (a.name.removeprefix("weclip.") for a in n.names if a.name.startswith("weclip."))
        if not isinstance(n, ast.ImportFrom): continue
        is_ours = n.level > 0 or n.module.split(".")[0] == "weclip"
        if not is_ours: continue
        above = package[:len(package) - n.level + 1] if n.level else []
        path = [*above, *(n.module.split(".") if n.module else [])]
        name = ".".join(path[1:] if path[:1] == ["weclip"] else path)
        if name in NUMBER: yield name
        else: yield from (f"{name}.{a.name}".lstrip(".") for a in n.names)

def is_below(low, high):
    "May module `high` import module `low`?"
    a = low.split(".")[0]
    b = high.split(".")[0]
    if a == b: return NUMBER[low] < NUMBER[high]
    if b == "method": return False  # it is the paper, and imports nothing else of ours
    return FLOOR[a] < FLOOR[b]

def test_the_law_by_hand():
    assert is_below("method.config", "method.classes") and not is_below("method.rfm", "method.cam")
    assert is_below("method.model", "data.voc") and is_below("machine", "cli") and is_below("machine", "data.voc")
    assert not is_below("data.viz", "world.scenes") and not is_below("machine", "method.clip") and not is_below("cli", "use.hub")

def test_imports_are_seen_by_hand():
    code = """import weclip.use.hub, torch
from weclip.engine import infer, job
from . import cam, rfm
from ..data.voc import SegData
def late():
    from weclip.lab.runner import set_up"""
    found = ["use.hub", "engine.infer", "engine.job", "method.cam", "method.rfm", "data.voc", "lab.runner"]
    assert list(imported(code, ["method"])) == found

def test_imports_point_down():
    up = [f"{dotted(m)} imports {low}" for m in MODULES for low in imports(m) if not is_below(low, dotted(m))]
    assert not up

def test_numbers_are_inside_a_folder():
    "Two digits and no letter; the folder of a page is that of its module."
    for nb in NBS:
        folder = nb.parent.relative_to(ROOT/"nbs").as_posix()
        if folder == ".":
            assert re.fullmatch(r"[a-z]+", nb.stem), name(nb)
        else:
            assert re.fullmatch(r"\d_[a-z]+", folder) and re.fullmatch(r"\d\d_[a-z_]+", nb.stem), name(nb)
            if default_exp(nb):
                assert default_exp(nb) == f"{folder[2:]}.{nb.stem[3:]}", name(nb)
    for folder in {nb.parent for nb in NBS} - {ROOT/"nbs"}:
        numbers = [int(nb.stem[:2]) for nb in sorted(folder.glob("*.ipynb"))]
        assert numbers == list(range(len(numbers))), f"{folder.name}: {numbers}"

def test_modules_import_no_tool():
    for module in MODULES:
        tree = ast.parse(module.read_text(encoding="utf-8"))
        names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
        assert not names & {"nbdev", "IPython", "experiments", "tests"}, name(module)

def test_modules_run_no_foreign_code():
    "Neither eval nor exec, and pickles only through readers that refuse code."
    for module in MODULES:
        for n in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(n, ast.Call): continue
            call = ast.unparse(n.func)
            where = f"{name(module)}, line {n.lineno}"
            assert call not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, f"{where}: {call}"
            if call == "torch.load":
                assert "weights_only=True" in ast.unparse(n), f"{where}: torch.load without weights_only=True"
            if call.endswith("np.load"):
                assert "allow_pickle=True" not in ast.unparse(n), f"{where}: np.load of pickles"

# ---- pages

def test_pages_are_clean():
    for nb in PAGES:
        data = json.loads(nb.read_text(encoding="utf-8"))
        assert set(data["metadata"]) <= {"kernelspec"}, name(nb)
        assert len({c["id"] for c in data["cells"]}) == len(data["cells"]), f"{name(nb)}: two cells of one id"
        for c in data["cells"]:
            where = f"{name(nb)}, {c['id']}"
            assert set(c["metadata"]) <= {"tags"} and c.get("execution_count") is None, f"{where}: run nbdev_clean"
            whole = isinstance(c["source"], str) and "\n" in c["source"]
            assert not whole, f"{where}: a cell in one string is a diff that nobody can read; write the notebook with nbformat"
            for o in c.get("outputs", []):
                assert o["output_type"] != "error" and o.get("name") != "stderr", f"{where} ends in an error or a warning"
                assert not o.get("metadata") and o.get("execution_count") is None, f"{where}: run nbdev_clean"

def shown(nb):
    "All text of a page: cells and what they printed, pictures apart."
    outputs = (o for c in cells(nb) for o in c.get("outputs", []))
    prints = ("".join(t) for o in outputs for k, t in [("text", o.get("text", ""))] + list(o.get("data", {}).items()) if not k.startswith("image/"))
    return "\n".join([text(nb), *prints])

def test_nothing_names_a_machine():
    assert not [name(nb) for nb in PAGES if PLACES.search(shown(nb))]
    assert not [name(p) for p in TEXTS if PLACES.search(p.read_text(encoding="utf-8"))]

def test_pages_are_small():
    for nb in PAGES:
        pictures = [v for c in cells(nb) for o in c.get("outputs", []) for k, v in o.get("data", {}).items() if k.startswith("image/")]
        sizes = [round(len("".join(p))*.75) for p in pictures]
        assert nb.stat().st_size <= 150_000 and len(cells(nb)) <= 60 and len(pictures) <= 4, name(nb)
        assert all(n <= 40_000 for n in sizes), f"{name(nb)}: {sizes}"

def test_pages_have_title_and_subtitle():
    for nb in PAGES:
        first = cells(nb)[0]
        assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", source(first)), name(nb)
        assert len(re.findall(r"^# ", text(nb, "markdown"), re.M)) == 1, f"{name(nb)}: one title, then ## sections"

def test_imports_stand_alone():
    "A cell that imports does nothing else, because building the pages runs such cells alone."
    for nb in PAGES:
        for c in cells(nb, "code"):
            if "#| eval: false" in source(c) or re.search(r"^\s*[%!]", source(c), re.M): continue
            kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(source(c)).body}
            assert len(kinds) <= 1, f"{name(nb)}: {source(c)[:200]}"

# ---- documentation and length

def page_of(module): return next(nb for nb in NBS if default_exp(nb) == dotted(module))

def test_public_names_are_documented():
    for module in MODULES:
        said = text(page_of(module))
        for k, v in public(module).items():
            if inspect.isclass(v) or inspect.isfunction(v):
                assert inspect.getdoc(v) and v.__doc__, f"{dotted(module)}.{k} has no docstring"
            assert k.startswith("_") or re.search(rf"\b{k}\b", said), f"{dotted(module)}.{k}"

def functions():
    "Every function in the modules: (module.name, lines of code without signature, docstring and comments)."
    for m in MODULES:
        src = m.read_text(encoding="utf-8")
        code = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline)
                if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)}
        for f in ast.walk(ast.parse(src)):
            if not isinstance(f, ast.FunctionDef): continue
            body = f.body[1:] if ast.get_docstring(f) is not None else f.body
            lines = {l for s in body for l in range(s.lineno, s.end_lineno + 1)}
            yield f"{dotted(m)}.{f.name}", max(1, len(lines & code)) if body else 0

def test_functions_are_short():
    sizes = list(functions())
    assert statistics.median(n for _, n in sizes) <= 8
    assert not {k: n for k, n in sizes if n > 30}

def undocumented():
    "Parameters of public functions without a comment in the signature."
    for m in MODULES:
        src = m.read_text(encoding="utf-8")
        lines = src.splitlines()
        names = set(public(m))
        for f in ast.parse(src).body:
            if not isinstance(f, ast.FunctionDef) or f.name not in names: continue
            for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
                if "#" not in lines[a.end_lineno - 1]:
                    yield f"{dotted(m)}.{f.name}({a.arg})"

def test_parameters_are_documented(): assert not list(undocumented())

# ---- the front

def test_front_names_exist_and_load_nothing_early():
    import weclip
    for k in weclip.__all__:
        assert callable(getattr(weclip, k)), k
    code = "import weclip, sys; weclip.__version__; dir(weclip); sys.exit(bool({'torch', 'numpy', 'PIL', 'open_clip'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

# ---- pages in the site, links, settings

def strings(x):
    if isinstance(x, dict):
        x = x.values()
    if isinstance(x, str):
        yield x
    elif hasattr(x, "__iter__"):
        for y in x:
            yield from strings(y)

def test_quarto_lists_every_page():
    conf = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    assert conf["project"]["type"] == "website" and conf["execute"]["enabled"] is False
    files = [s for s in strings(conf) if re.search(r"\.(ipynb|md|qmd|css|scss|yml|png|svg)$", s) and "*" not in s]
    assert not (lost := [f for f in files if not (ROOT/f).is_file()]), f"_quarto.yml lists files that do not exist: {lost}"
    listed = [s for s in strings(conf["website"]["sidebar"]) if s.endswith(".ipynb")]
    missing = [p for nb in PAGES if (p := name(nb)) not in listed]
    assert not missing, f"add to the sidebar in _quarto.yml: {missing}"
    for folder in {Path(f).parent for f in listed if re.match(r"nbs/\d", f)}:
        chapter = [f for f in listed if Path(f).parent == folder]
        assert chapter == sorted(chapter), f"{folder}: the sidebar has another order"
    rendered = [p for pattern in conf["project"]["render"] for p in ROOT.glob(pattern)]
    assert not (lost := [name(nb) for nb in PAGES if nb not in rendered]), f"not rendered: {lost}"

MATHML = set("""alpha approx bar begin beta Big big bmod cdot cdots cos cup dots ell end epsilon eta exp frac gamma ge hat in infty kappa lambda lceil ldots le
left leftarrow lfloor ln log lVert mathcal mathrm max min mu nabla ne odot operatorname overline partial phi pi pm propto qquad quad rceil rfloor rho right Rightarrow rVert
setminus sigma sqrt sum tau text texttt tfrac theta tilde times top underbrace uparrow""".split())  # what pandoc 3.9 was seen to make MathML of; it drops or refuses \tag

def formulas(nb):
    "LaTeX between dollars, as pandoc reads them: none after a blank, none before a blank or a digit."
    md = re.sub(r"```.*?```|`[^`\n]*`", "", text(nb, "markdown"), flags=re.S)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", md, re.S)]

def test_mathematics_needs_no_network():
    "Pages carry their formulas as MathML, which browsers draw themselves; MathJax would be fetched from elsewhere."
    conf = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    assert conf["format"]["html"]["html-math-method"] == "mathml"
    assert sum(len(formulas(nb)) for nb in NBS) > 400, "formulas are no longer found"
    odd = {name(nb): bad for nb in PAGES if (bad := set(re.findall(r"\\([a-zA-Z]+)", " ".join(formulas(nb)))) - MATHML)}
    assert not odd, f"convert them with `pandoc -t html --mathml`, and add what becomes right MathML to MATHML: {odd}"

def test_pandoc_converts_every_formula():
    "By the program that Quarto itself calls."
    if not shutil.which("pandoc"):
        pytest.skip("no pandoc on this machine")
    pages = "\n\n".join(text(nb, "markdown") for nb in PAGES)
    r = subprocess.run(["pandoc", "-f", "markdown", "-t", "html", "--mathml"], input=pages, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "Could not convert" not in r.stderr, r.stderr
    assert r.stdout.count("<math") == sum(len(formulas(nb)) for nb in PAGES)

def test_index_maps_every_page():
    front = text(ROOT/"nbs"/"index.ipynb", "markdown")
    missing = [p for nb in NBS if nb.stem != "index" and f"]({(p := nb.relative_to(ROOT/'nbs').as_posix())})" not in front]
    assert not missing, f"add to the map in nbs/index.ipynb: {missing}"

def test_examples_import():
    "What the examples on the front pages import exists."
    for md in (text(ROOT/"nbs"/"index.ipynb", "markdown"), (ROOT/"README.md").read_text(encoding="utf-8")):
        for code in re.findall(r"```python\n(.*?)```", md, re.S):
            for n in ast.walk(ast.parse(code)):
                if isinstance(n, ast.ImportFrom) and n.module.startswith("weclip"):
                    assert all(hasattr(importlib.import_module(n.module), a.name) for a in n.names), ast.unparse(n)

def test_links_resolve():
    dead = []
    for page in PAGES + [ROOT/"README.md", ROOT/"CONTRIBUTING.md", ROOT/"CHANGELOG.md"]:
        md = text(page, "markdown") if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
        links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", md, flags=re.S))
        inside = [l for l in links if not re.match(r"https?:|mailto:|#|attachment:", l)]
        dead += [f"{name(page)}: {l}" for l in inside if not (page.parent/l.split("#")[0]).exists()]
    assert not dead

def settings():
    conf = configparser.ConfigParser(delimiters=["="])
    conf.read(ROOT/"settings.ini", encoding="utf-8")
    return conf["DEFAULT"]

def test_settings():
    s = settings()
    assert not {k: v for k, v in s.items() if re.search(r"\s[#;]", v)}, "a comment after a value becomes part of it"
    assert s["version"] == importlib.import_module("weclip").__version__
    assert s.getboolean("update_pyproject") is False and "tags" in s["allowed_cell_metadata_keys"].split()
    assert all(map(shlex.split, [s["requirements"]])) and not set("'\"") & set(s["dev_requirements"])
    assert {"fastcore>=1.14,<2"} <= set(shlex.split(s["requirements"])) and {"nbdev==2.4.14", "execnb<0.2"} <= set(s["dev_requirements"].split())

def test_one_version():
    version = settings()["version"]
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)

# ---- tables

def texts(page):
    "The markdown of a page: its cells and what they show, or the whole file."
    if page.suffix != ".ipynb": return [page.read_text(encoding="utf-8")]
    outputs = [o.get("data", {}) for c in cells(page) for o in c.get("outputs", [])]
    shown = ["".join(data["text/markdown"]) for data in outputs if "text/markdown" in data]
    return [source(c) for c in cells(page, "markdown")] + shown

def tables(md):
    "Each table of a text: its rows, each with the number of its cells and the line."
    md = re.sub(r"^( *)```.*?^ *```", lambda m: "\n"*m[0].count("\n"), md, flags=re.S | re.M)
    table = []
    for line in [*md.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            inside = line.strip().removeprefix("|").removesuffix("|")  # a bar in code ends a cell, too, unless it is escaped
            table.append((len(re.findall(r"(?<!\\)\|", inside)) + 1, line))
        elif table:
            yield table
            table = []

def test_rows_are_counted():
    "By hand: a head of two cells, a rule, a row of two with an escaped bar, a row of three because of a bar in code."
    md = "text\n\n| a | b |\n|---|---|\n| `x\\|y` | 2 |\n| `x|y` | 2 |\n\n```\n| no table\n```\n"
    assert [[n for n, _ in t] for t in tables(md)] == [[2, 2, 2, 3]]

PLAIN = [ROOT/n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "nbs/7_speed/measured.md", "weclip/assets/README.md")]

def test_table_rows_are_complete():
    "A row of another length than the head: nbconvert printed the front page's map as one paragraph of bars."
    for page in PAGES + PLAIN:
        for table in (t for md in texts(page) for t in tables(md)):
            assert len(table) > 1 and re.fullmatch(r"[\s|:-]+", table[1][1]), f"{name(page)}: no rule below {table[0][1]!r}"
            odd = [line for n, line in table if n != table[0][0]]
            assert not odd, f"{name(page)}: expected {table[0][0]} cells: {odd}"

# ---- the two commands

def test_ci_runs_the_second_command(): assert INSTALL["tests"] in (ROOT/".ci"/"run").read_text(encoding="utf-8").splitlines()

@pytest.mark.parametrize("which", INSTALL)
def test_readme_has_the_command(which): assert INSTALL[which] in (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
