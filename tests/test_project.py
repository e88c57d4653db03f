"""The repository itself: modules in step with notebooks, the law of the floors, clean pages, lengths, links, settings.

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
READ = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "nbs/7_speed/measured.md", "weclip/assets/README.md")
PLAIN = [ROOT/n for n in READ]
MODULES = sorted(p for p in (ROOT/"weclip").rglob("*.py") if not p.name.startswith("_"))
NAMED = ("settings.ini", "setup.py", "_quarto.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")
TEXTS = MODULES + sorted((ROOT/"tests").glob("*.py")) + [ROOT/n for n in NAMED]
DEMO = "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/weclip demo"
CHECKS = "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python tests"
PLACES = re.compile("(?<![\\w.])/(?:work|root|tmp|home|Users|mnt)/")  # where somebody's machine would show

def none(offenders):
    "Fail with all of them."
    found = list(offenders)
    assert not found, "\n".join(map(str, found))

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
    def modules(root):
        return {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in (root/"weclip").rglob("*.py")}
    ours = modules(ROOT)
    fresh = modules(tmp_path)
    assert sorted(ours) == sorted(fresh)
    none(f"run nbdev_export: {path}" for path in ours if ours[path] != fresh[path])

def test_one_notebook_per_module():
    exps = [e for e in map(default_exp, NBS) if e and e != "__main__"]  # MODULES leaves out `python -m weclip`
    assert sorted(exps) == sorted(set(exps)) == sorted(map(dotted, MODULES))

# ---- the law: a module imports only from floors below its own, and in its own folder only from pages before it

FLOORS = [{"machine"}, {"method"}, {"data", "world"}, {"engine"}, {"use", "lab", "speed", "beyond"}, {"cli"},
          {"__main__"}]
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
        if name in NUMBER:
            yield name
        else:
            yield from (f"{name}.{a.name}".lstrip(".") for a in n.names)

def is_below(low, high):
    "May module `high` import module `low`?"
    a = low.split(".")[0]
    b = high.split(".")[0]
    if a == b: return NUMBER[low] < NUMBER[high]
    if b == "method": return False  # it is the paper, and imports nothing else of ours
    return FLOOR[a] < FLOOR[b]

def test_the_law_by_hand():
    below = [("method.config", "method.classes"), ("method.model", "data.voc"),
             ("machine", "cli"), ("machine", "data.voc")]
    not_below = [("method.rfm", "method.cam"), ("data.viz", "world.scenes"),
                 ("machine", "method.clip"), ("cli", "use.hub")]
    none(pair for pair in below if not is_below(*pair))
    none(pair for pair in not_below if is_below(*pair))

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
    none(f"{dotted(m)} imports {low}" for m in MODULES for low in imports(m) if not is_below(low, dotted(m)))

def misnamed(nb):
    folder = nb.parent.relative_to(ROOT/"nbs").as_posix()
    if folder == ".":
        if not re.fullmatch(r"[a-z]+", nb.stem):
            yield name(nb)
        return
    if not re.fullmatch(r"\d_[a-z]+", folder) or not re.fullmatch(r"\d\d_[a-z_]+", nb.stem):
        yield name(nb)
    module = f"{folder[2:]}.{nb.stem[3:]}"
    if default_exp(nb) not in (None, module):
        yield f"{name(nb)} exports {default_exp(nb)}"

def test_numbers_are_inside_a_folder():
    "Two digits and no letter; the folder of a page is that of its module."
    none(odd for nb in NBS for odd in misnamed(nb))
    chapters = {folder: sorted(folder.glob("*.ipynb")) for folder in {nb.parent for nb in NBS} - {ROOT/"nbs"}}
    numbers = {folder.name: [int(nb.stem[:2]) for nb in chapter] for folder, chapter in chapters.items()}
    none(f"{folder}: {found}" for folder, found in numbers.items() if found != list(range(len(found))))

def test_modules_import_no_tool():
    tools = {"nbdev", "IPython", "experiments", "tests"}
    def packages(module):
        for n in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(n, ast.Import):
                yield from (a.name.split(".")[0] for a in n.names)
            elif isinstance(n, ast.ImportFrom) and n.module and not n.level:
                yield n.module.split(".")[0]
    none(f"{name(m)} imports {tool}" for m in MODULES for tool in tools & set(packages(m)))

FOREIGN = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}

def is_unsafe(call, written):
    "Does a call run what a file says?"
    if call == "torch.load": return "weights_only=True" not in written
    if call.endswith("np.load"): return "allow_pickle=True" in written
    return call in FOREIGN

def test_modules_run_no_foreign_code():
    "Neither eval nor exec, and pickles only through readers that refuse code."
    def unsafe(module):
        for n in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if isinstance(n, ast.Call) and is_unsafe(ast.unparse(n.func), ast.unparse(n)):
                yield f"{name(module)}, line {n.lineno}: {ast.unparse(n)}"
    none(odd for m in MODULES for odd in unsafe(m))

def test_unsafe_calls_are_seen_by_hand():
    calls = {"torch.load(f)": True, "torch.load(f, weights_only=True)": False,
             "np.load(f, allow_pickle=True)": True, "np.load(f)": False, "eval(x)": True}
    assert {call: is_unsafe(call.split("(")[0], call) for call in calls} == calls

# ---- pages

def unclean(nb):
    data = json.loads(nb.read_text(encoding="utf-8"))
    if not set(data["metadata"]) <= {"kernelspec"}:
        yield f"{name(nb)}: metadata"
    if len({c["id"] for c in data["cells"]}) < len(data["cells"]):
        yield f"{name(nb)}: two cells of one id"
    for c in data["cells"]:
        where = f"{name(nb)}, {c['id']}"
        outputs = c.get("outputs", [])
        is_run = any(x.get("execution_count") is not None for x in (c, *outputs))
        if is_run or not set(c["metadata"]) <= {"tags"} or any(o.get("metadata") for o in outputs):
            yield f"{where}: run nbdev_clean"
        if isinstance(c["source"], str) and "\n" in c["source"]:
            yield f"{where}: a cell in one string is a diff that nobody can read; write the notebook with nbformat"
        if any(o["output_type"] == "error" or o.get("name") == "stderr" for o in outputs):
            yield f"{where} ends in an error or a warning"

def test_pages_are_clean(): none(odd for nb in PAGES for odd in unclean(nb))

def outputs(nb):
    "What the cells of a page show, one dictionary of types for each output; printed text is one of them."
    for c in cells(nb):
        for o in c.get("outputs", []):
            shown = {"text/plain": o["text"]} if "text" in o else o.get("data", {})
            yield {kind: "".join(value) for kind, value in shown.items()}

def shown(nb):
    "All text of a page: cells and what they printed, pictures apart."
    prints = [value for o in outputs(nb) for kind, value in o.items() if not kind.startswith("image/")]
    return "\n".join([text(nb), *prints])

def test_nothing_names_a_machine():
    none(name(nb) for nb in PAGES if PLACES.search(shown(nb)))
    none(name(p) for p in TEXTS if PLACES.search(p.read_text(encoding="utf-8")))

def too_large(nb):
    pictures = [value for o in outputs(nb) for kind, value in o.items() if kind.startswith("image/")]
    sizes = [round(len(picture)*.75) for picture in pictures]  # base64 has four letters for three bytes
    counts = dict(bytes=nb.stat().st_size, cells=len(cells(nb)), pictures=len(pictures), largest=max(sizes, default=0))
    most = dict(bytes=150_000, cells=60, pictures=4, largest=150_000)
    return {what: n for what, n in counts.items() if n > most[what]}

def test_pages_are_small(): none(f"{name(nb)}: {too_large(nb)}" for nb in PAGES if too_large(nb))

def test_pages_have_title_and_subtitle():
    "One title, then ## sections."
    for_title = re.compile(r"# \S.*\n+> \S")
    first = {nb: cells(nb)[0] for nb in PAGES}
    none(name(nb) for nb, c in first.items() if c["cell_type"] != "markdown" or not for_title.match(source(c)))
    none(f"{name(nb)}: two titles" for nb in PAGES if len(re.findall(r"^# ", text(nb, "markdown"), re.M)) != 1)

def mixed(nb):
    "Cells that import and do something else."
    for c in cells(nb, "code"):
        if "#| eval: false" in source(c) or re.search(r"^\s*[%!]", source(c), re.M): continue
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(source(c)).body}
        if len(kinds) > 1:
            yield f"{name(nb)}, {c['id']}"

def test_imports_stand_alone():
    "Building the pages runs cells with imports alone."
    none(odd for nb in PAGES for odd in mixed(nb))

# ---- documentation and length

def page_of(module): return next(nb for nb in NBS if default_exp(nb) == dotted(module))

def unexplained(module):
    "Public names without a docstring, or that their page does not name."
    told = text(page_of(module))
    for k, v in public(module).items():
        needs_docstring = inspect.isclass(v) or inspect.isfunction(v)
        if needs_docstring and not v.__doc__:
            yield f"{dotted(module)}.{k} has no docstring"
        if not k.startswith("_") and not re.search(rf"\b{k}\b", told):
            yield f"{dotted(module)}.{k} is not on its page"

def test_public_names_are_documented(): none(odd for m in MODULES for odd in unexplained(m))

def functions():
    "Every function in the modules: (module.name, lines of code without signature, docstring and comments)."
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for m in MODULES:
        src = m.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(src).readline)
        code = {t.start[0] for t in tokens if t.type not in blank}
        for f in ast.walk(ast.parse(src)):
            if not isinstance(f, ast.FunctionDef): continue
            body = f.body[1:] if ast.get_docstring(f) is not None else f.body
            lines = {l for s in body for l in range(s.lineno, s.end_lineno + 1)}
            yield f"{dotted(m)}.{f.name}", max(1, len(lines & code)) if body else 0

def test_functions_are_short():
    sizes = list(functions())
    assert statistics.median(n for _, n in sizes) <= 8
    none(f"{k}: {n} lines" for k, n in sizes if n > 30)

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

def test_parameters_are_documented(): none(undocumented())

# ---- the front

def test_front_names_exist_and_load_nothing_early():
    weclip = importlib.import_module("weclip")
    none(k for k in weclip.__all__ if not callable(getattr(weclip, k)))
    loaded = "set(sys.modules) & {'torch', 'numpy', 'PIL', 'open_clip'}"
    code = f"import weclip, sys; weclip.__version__; dir(weclip); sys.exit(bool({loaded}))"
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

def quarto(): return yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))

def test_quarto_lists_every_page():
    conf = quarto()
    assert conf["project"]["type"] == "website" and conf["execute"]["enabled"] is False
    files = [s for s in strings(conf) if re.search(r"\.(ipynb|md|qmd|css|scss|yml|png|svg)$", s) and "*" not in s]
    none(f"_quarto.yml lists what does not exist: {f}" for f in files if not (ROOT/f).is_file())
    listed = [s for s in strings(conf["website"]["sidebar"]) if s.endswith(".ipynb")]
    none(f"add to the sidebar in _quarto.yml: {name(nb)}" for nb in PAGES if name(nb) not in listed)
    folders = {Path(f).parent for f in listed if re.match(r"nbs/\d", f)}
    chapters = [[f for f in listed if Path(f).parent == folder] for folder in folders]
    none(f"the sidebar has another order: {chapter}" for chapter in chapters if chapter != sorted(chapter))
    rendered = [p for pattern in conf["project"]["render"] for p in ROOT.glob(pattern)]
    none(f"not rendered: {name(nb)}" for nb in PAGES if nb not in rendered)

# what pandoc 3.9 was seen to make MathML of; it drops or refuses \tag
MATHML = set("""
alpha approx bar begin beta Big big bmod cdot cdots cos cup dots ell end epsilon eta exp frac gamma ge hat in infty
kappa lambda lceil ldots le left leftarrow lfloor ln log lVert mathcal mathrm max min mu nabla ne odot operatorname
overline partial phi pi pm propto qquad quad rceil rfloor rho right Rightarrow rVert setminus sigma sqrt sum tau
text texttt tfrac theta tilde times top underbrace uparrow
""".split())

def formulas(nb):
    "LaTeX between dollars, as pandoc reads them: none after a blank, none before a blank or a digit."
    md = re.sub(r"```.*?```|`[^`\n]*`", "", text(nb, "markdown"), flags=re.S)
    return [a or b for a, b in re.findall(r"\$\$(.+?)\$\$|(?<![\\$])\$(?=\S)([^$\n]+?)(?<=\S)\$(?!\d)", md, re.S)]

def test_mathematics_needs_no_network():
    "Pages carry their formulas as MathML, which browsers draw themselves; MathJax would be fetched from elsewhere."
    assert quarto()["format"]["html"]["html-math-method"] == "mathml"
    assert sum(len(formulas(nb)) for nb in NBS) > 400, "formulas are no longer found"
    advice = "convert with `pandoc -t html --mathml`, and add what becomes right MathML to MATHML"
    odd = {nb: set(re.findall(r"\\([a-zA-Z]+)", " ".join(formulas(nb)))) - MATHML for nb in PAGES}
    none(f"{name(nb)}: {commands}; {advice}" for nb, commands in odd.items() if commands)

def test_pandoc_converts_every_formula():
    "By the program that Quarto itself calls."
    if not shutil.which("pandoc"):
        pytest.skip("no pandoc on this machine")
    pages = "\n\n".join(text(nb, "markdown") for nb in PAGES)
    command = ["pandoc", "-f", "markdown", "-t", "html", "--mathml"]
    r = subprocess.run(command, input=pages, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "Could not convert" not in r.stderr, r.stderr
    assert r.stdout.count("<math") == sum(len(formulas(nb)) for nb in PAGES)

def test_index_maps_every_page():
    front = text(ROOT/"nbs"/"index.ipynb", "markdown")
    paths = [nb.relative_to(ROOT/"nbs").as_posix() for nb in NBS if nb.stem != "index"]
    none(f"add to the map in nbs/index.ipynb: {path}" for path in paths if f"]({path})" not in front)

def lost_imports(md):
    "Imports of ours in a page's examples that do not exist."
    for code in re.findall(r"```python\n(.*?)```", md, re.S):
        for n in ast.walk(ast.parse(code)):
            if not isinstance(n, ast.ImportFrom) or not n.module.startswith("weclip"): continue
            module = importlib.import_module(n.module)
            yield from (f"{n.module}.{a.name}" for a in n.names if not hasattr(module, a.name))

def test_examples_import():
    "What the examples on the front pages import exists."
    fronts = text(ROOT/"nbs"/"index.ipynb", "markdown"), (ROOT/"README.md").read_text(encoding="utf-8")
    none(odd for md in fronts for odd in lost_imports(md))

def markdown(page): return text(page, "markdown") if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")

def anchors(md):
    "Identifiers of the headings of a text, as pandoc makes them."
    found = []
    for heading in re.findall(r"^#+ +(.+?)\s*$", re.sub(r"```.*?```", "", md, flags=re.S), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text
        letters = re.sub(r"[^\w\s.-]", "", plain.lower())
        anchor = re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", letters)) or "section"
        found.append(f"{anchor}-{found.count(anchor)}" if anchor in found else anchor)
    return found

def test_anchors_by_hand():
    headings = ["# A page", "## 1. The form, that `runs`", "```", "# no heading", "```",
                "### See [rfm](06_rfm.ipynb)", "## A page", "## Eqs. (5)–(6)"]
    assert anchors("\n".join(headings)) == ["a-page", "the-form-that-runs", "see-rfm", "a-page-1", "eqs.-56"]

def dead_links(page):
    "Links to files that do not exist, and to headings that their page does not have."
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", markdown(page), flags=re.S))
    for link in links:
        if re.match(r"https?:|mailto:|attachment:", link): continue
        path, _, anchor = link.partition("#")
        target = (page.parent/path).resolve() if path else page
        if not target.exists():
            yield f"{name(page)}: {link}"
        elif anchor and (target.suffix not in (".ipynb", ".md") or anchor not in anchors(markdown(target))):
            yield f"{name(page)}: {link} has no such heading"

def test_links_resolve():
    none(odd for page in PAGES + PLAIN for odd in dead_links(page))

def settings():
    conf = configparser.ConfigParser(delimiters=["="])
    conf.read(ROOT/"settings.ini", encoding="utf-8")
    return conf["DEFAULT"]

def test_settings():
    s = settings()
    none(f"{k}: a comment after a value becomes part of it" for k, v in s.items() if re.search(r"\s[#;]", v))
    assert s["version"] == importlib.import_module("weclip").__version__
    assert s.getboolean("update_pyproject") is False and "tags" in s["allowed_cell_metadata_keys"].split()
    assert all(map(shlex.split, [s["requirements"]])) and not set("'\"") & set(s["dev_requirements"])
    assert "fastcore>=1.14,<2" in shlex.split(s["requirements"])
    assert {"nbdev==2.4.14", "execnb<0.2"} <= set(s["dev_requirements"].split())

def test_one_version():
    version = settings()["version"]
    assert yaml.safe_load((ROOT/"CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert re.search(rf"^## \[{re.escape(version)}\]", (ROOT/"CHANGELOG.md").read_text(encoding="utf-8"), re.M)

# ---- tables

def texts(page):
    "The markdown of a page: its cells and what they show, or the whole file."
    if page.suffix != ".ipynb": return [page.read_text(encoding="utf-8")]
    printed = [o["text/markdown"] for o in outputs(page) if "text/markdown" in o]
    return [source(c) for c in cells(page, "markdown")] + printed

def tables(md):
    "Each table of a text: its rows, each with the number of its cells and the line."
    md = re.sub(r"^( *)```.*?^ *```", lambda m: "\n"*m[0].count("\n"), md, flags=re.S | re.M)
    table = []
    for line in [*md.splitlines(), ""]:
        if line.lstrip().startswith("|"):
            inside = line.strip().removeprefix("|").removesuffix("|")  # a bar in code ends a cell, unless it is escaped
            table.append((len(re.findall(r"(?<!\\)\|", inside)) + 1, line))
        elif table:
            yield table
            table = []

def test_rows_are_counted():
    "By hand: a head of two cells, a rule, a row of two with an escaped bar, a row of three because of a bar in code."
    md = "text\n\n| a | b |\n|---|---|\n| `x\\|y` | 2 |\n| `x|y` | 2 |\n\n```\n| no table\n```\n"
    assert [[n for n, _ in t] for t in tables(md)] == [[2, 2, 2, 3]]

def incomplete(page):
    for table in (t for md in texts(page) for t in tables(md)):
        n, head = table[0]
        if len(table) < 2 or not re.fullmatch(r"[\s|:-]+", table[1][1]):
            yield f"{name(page)}: no rule below {head!r}"
        yield from (f"{name(page)}: expected {n} cells: {line}" for cells, line in table if cells != n)

def test_table_rows_are_complete():
    "A row of another length than the head: nbconvert printed the front page's map as one paragraph of bars."
    none(odd for page in PAGES + PLAIN for odd in incomplete(page))

# ---- the two commands

def test_the_commands_are_told_and_run():
    readme = (ROOT/"README.md").read_text(encoding="utf-8").splitlines()
    assert DEMO in readme and CHECKS in readme
    assert CHECKS in (ROOT/".ci"/"run").read_text(encoding="utf-8").splitlines()
