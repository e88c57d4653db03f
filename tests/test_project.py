"""The repository itself: modules in step with notebooks, clean pages, import order, docstrings, lengths, links, settings."""
import ast, configparser, importlib, inspect, io, json, re, shlex, shutil, statistics, subprocess, sys, tokenize
from pathlib import Path

import pytest, yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted((ROOT/"nbs").glob("*.ipynb"))
EXPERIMENTS = sorted((ROOT/"experiments").glob("*.ipynb"))
MODULES = sorted(p for p in (ROOT/"weclip").glob("*.py") if not p.name.startswith("_"))
TEXTS = MODULES + sorted((ROOT/"tests").glob("*.py")) + [ROOT/n for n in ("settings.ini", "setup.py", "_quarto.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff")]
INSTALL = {"demo": "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/weclip demo",
           "tests": "python3 -m venv .venv && .venv/bin/pip install -q -e '.[dev]' && .venv/bin/python tests"}
PLACES = re.compile("(?<![\\w.])/(?:work|root|tmp|home|Users|mnt)/")  # where somebody's machine would show
LONG = {"cli.parser": "one line per argument of the command; a list, with nothing to follow"}  # functions of more than 30 lines of code, and why

name = lambda p: p.stem
pages = pytest.mark.parametrize("nb", NBS + EXPERIMENTS, ids=name)
modules = pytest.mark.parametrize("module", MODULES, ids=name)

def cells(nb, kind=None): return [c for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if kind in (None, c["cell_type"])]
def source(cell): return "".join(cell["source"])
def text(nb, kind=None): return "\n".join(source(c) for c in cells(nb, kind))
def exported(nb): return "\n".join(source(c) for c in cells(nb, "code") if re.search(r"^#\| exporti?s?\b", source(c), re.M))
def default_exp(nb): return (re.findall(r"^#\| default_exp +(\w+)", text(nb, "code"), re.M) or [None])[0]
def public(module):
    mod = importlib.import_module(f"weclip.{module.stem}")
    return {k: getattr(mod, k) for k in mod.__all__}

# ---- the modules are what the notebooks say

def test_modules_are_exported(tmp_path):
    pytest.importorskip("nbdev", reason="needs the dev extras")
    for d in ("nbs", "weclip"): shutil.copytree(ROOT/d, tmp_path/d, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for f in ("settings.ini", "README.md"): shutil.copy(ROOT/f, tmp_path)
    for p in (tmp_path/"weclip").glob("*.py"):
        if p.name != "__init__.py": p.unlink()
    code = "import sys; sys.path.insert(0, '.'); from nbdev.export import nb_export; from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    ours, fresh = ({p.name: p.read_text(encoding="utf-8") for p in (d/"weclip").glob("*.py")} for d in (ROOT, tmp_path))
    assert sorted(ours) == sorted(fresh)
    assert not (odd := [k for k in ours if ours[k] != fresh[k]]), f"run nbdev_export: {odd}"

def test_one_notebook_per_module():
    exps = [e for e in map(default_exp, NBS) if e and e != "__main__"]  # `python -m weclip`, which MODULES leaves out with the other _names
    assert sorted(exps) == sorted(set(exps)) == [m.stem for m in MODULES]

# ---- pages

@pages
def test_page_is_clean(nb):
    data = json.loads(nb.read_text(encoding="utf-8"))
    assert set(data["metadata"]) <= {"kernelspec"}
    assert len({c["id"] for c in data["cells"]}) == len(data["cells"])
    for c in data["cells"]:
        assert set(c["metadata"]) <= {"tags"}, f"run nbdev_clean: {c['metadata']}"
        for o in c.get("outputs", []):
            assert o["output_type"] != "error" and o.get("name") != "stderr", f"{c['id']} ends in an error or a warning"
            assert not o.get("metadata") and o.get("execution_count") is None
        assert c.get("execution_count") is None, f"run nbdev_clean: {c['id']}"

@pages
def test_page_is_stored_by_lines(nb):
    "As Jupyter stores it; a cell in one string is a diff that nobody can read."
    odd = [c["id"] for c in json.loads(nb.read_text(encoding="utf-8"))["cells"] if isinstance(c["source"], str) and "\n" in c["source"]]
    assert not odd, f"rewrite it with nbformat: import nbformat as n; n.write(n.read('{nb.name}', 4), '{nb.name}')"

def shown(nb):
    "All text of a page: cells and what they printed, pictures apart."
    outputs = (o for c in cells(nb) for o in c.get("outputs", []))
    prints = ("".join(t) for o in outputs for k, t in [("text", o.get("text", ""))] + list(o.get("data", {}).items()) if not k.startswith("image/"))
    return "\n".join([text(nb), *prints])

@pages
def test_page_names_no_machine(nb): assert not PLACES.findall(shown(nb))

@pytest.mark.parametrize("file", TEXTS, ids=lambda p: p.name)
def test_text_names_no_machine(file): assert not PLACES.findall(file.read_text(encoding="utf-8"))

@pages
def test_page_is_small(nb):
    pictures = [v for c in cells(nb) for o in c.get("outputs", []) for k, v in o.get("data", {}).items() if k.startswith("image/")]
    assert nb.stat().st_size <= 150_000 and len(cells(nb)) <= 60 and len(pictures) <= 4
    assert all(len("".join(p))*3/4 <= 40_000 for p in pictures), [round(len("".join(p))*.75) for p in pictures]

@pages
def test_page_has_title_and_subtitle(nb):
    first = cells(nb)[0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S.*\n+> \S", source(first))
    assert len(re.findall(r"^# ", text(nb, "markdown"), re.M)) == 1, "one title, then ## sections"

@pages
def test_imports_stand_alone(nb):
    "A cell that imports does nothing else, because building the pages runs such cells alone."
    for c in cells(nb, "code"):
        if "#| eval: false" in source(c) or re.search(r"^\s*[%!]", source(c), re.M): continue
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in ast.parse(source(c)).body}
        assert len(kinds) <= 1, source(c)[:200]

# ---- a notebook imports only those below it

def uses(code):
    "Modules of weclip that `code` imports."
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.ImportFrom):
            if n.level: yield from [n.module.split(".")[0]] if n.module else [a.name for a in n.names]
            elif n.module == "weclip": yield from (a.name for a in n.names)
            elif n.module and n.module.startswith("weclip."): yield n.module.split(".")[1]
        elif isinstance(n, ast.Import): yield from (a.name.split(".")[1] for a in n.names if a.name.startswith("weclip."))

def number(nb): return nb.stem.split("_")[0]  # "13", or "13b" for a page that came between

NUMBER = {default_exp(nb): number(nb) for nb in NBS if default_exp(nb)}

@pytest.mark.parametrize("nb", [nb for nb in NBS if default_exp(nb)], ids=name)
def test_imports_point_down(nb):
    code = "\n".join(s for c in cells(nb, "code") if not re.search(r"^\s*[%!]", s := source(c), re.M))
    own = default_exp(nb)
    late = [f"{NUMBER[m]}_{m}" for m in set(uses(code)) if m in NUMBER and NUMBER[m] >= number(nb) and m != own]
    assert not late, f"imports from {late}"

@modules
def test_module_imports_no_tool(module):
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    assert not names & {"nbdev", "IPython", "experiments", "tests"}

@modules
def test_module_runs_no_foreign_code(module):
    "Neither eval nor exec, and pickles only through readers that refuse code."
    for n in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(n, ast.Call): continue
        call = ast.unparse(n.func)
        assert call not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"}, f"line {n.lineno}: {call}"
        if call == "torch.load": assert "weights_only=True" in ast.unparse(n), f"line {n.lineno}: torch.load without weights_only=True"
        if call.endswith("np.load"): assert "allow_pickle=True" not in ast.unparse(n), f"line {n.lineno}: np.load of pickles"

# ---- documentation and length

@modules
def test_public_names_are_documented(module):
    for k, v in public(module).items():
        if inspect.isclass(v) or inspect.isfunction(v): assert inspect.getdoc(v) and v.__doc__, f"{module.stem}.{k} has no docstring"
        assert k.startswith("_") or re.search(rf"\b{k}\b", text(ROOT/"nbs"/f"{NUMBER[module.stem]}_{module.stem}.ipynb"))

def functions():
    "Every function in the modules: (module.name, lines of code without signature, docstring and comments)."
    for m in MODULES:
        src = m.read_text(encoding="utf-8"); tree = ast.parse(src)
        code = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(src).readline)
                if t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)}
        for f in ast.walk(tree):
            if not isinstance(f, ast.FunctionDef): continue
            body = f.body[1:] if ast.get_docstring(f) is not None else f.body
            lines = {l for s in body for l in range(s.lineno, s.end_lineno + 1)}
            yield f"{m.stem}.{f.name}", max(1, len(lines & code)) if body else 0

def test_functions_are_short():
    sizes = list(functions())
    assert statistics.median(n for _, n in sizes) <= 8
    assert not {k: n for k, n in sizes if n > 30 and k not in LONG}

def undocumented():
    "Parameters of public functions without a comment in the signature."
    for m in MODULES:
        src = m.read_text(encoding="utf-8"); lines = src.splitlines(); names = set(public(m))
        for f in ast.parse(src).body:
            if not isinstance(f, ast.FunctionDef) or f.name not in names: continue
            for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
                if "#" not in lines[a.end_lineno - 1]: yield f"{m.stem}.{f.name}({a.arg})"

def test_parameters_are_documented(): assert not list(undocumented())

# ---- pages in the site, links, settings

def strings(x):
    if isinstance(x, dict): x = x.values()
    if isinstance(x, str): yield x
    elif hasattr(x, "__iter__"):
        for y in x: yield from strings(y)

def test_quarto_lists_every_page():
    conf = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    assert conf["project"]["type"] == "website" and conf["execute"]["enabled"] is False
    files = [s for s in strings(conf) if re.search(r"\.(ipynb|md|qmd|css|scss|yml|png|svg)$", s) and "*" not in s]
    assert not (lost := [f for f in files if not (ROOT/f).is_file()]), f"_quarto.yml lists files that do not exist: {lost}"
    listed = set(strings(conf["website"]["sidebar"]))
    missing = [p for nb in NBS + EXPERIMENTS if (p := nb.relative_to(ROOT).as_posix()) not in listed]
    assert not missing, f"add to the sidebar in _quarto.yml: {missing}"

MATHML = set("""alpha approx bar begin beta Big big bmod cdot cdots cos cup dots ell end epsilon eta exp frac gamma ge hat in infty kappa lambda lceil ldots le
left leftarrow lfloor ln log lVert mathcal mathrm max min mu nabla ne odot operatorname overline phi pi pm propto qquad quad rceil rfloor rho right Rightarrow rVert
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
    odd = {nb.name: bad for nb in NBS + EXPERIMENTS if (bad := set(re.findall(r"\\([a-zA-Z]+)", " ".join(formulas(nb)))) - MATHML)}
    assert not odd, f"convert them with `pandoc -t html --mathml`, and add what becomes right MathML to MATHML: {odd}"

def test_pandoc_converts_every_formula():
    "By the program that Quarto itself calls."
    if not shutil.which("pandoc"): pytest.skip("no pandoc on this machine")
    pages = "\n\n".join(text(nb, "markdown") for nb in NBS + EXPERIMENTS)
    r = subprocess.run(["pandoc", "-f", "markdown", "-t", "html", "--mathml"], input=pages, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "Could not convert" not in r.stderr, r.stderr
    assert r.stdout.count("<math") == sum(len(formulas(nb)) for nb in NBS + EXPERIMENTS)

def test_index_maps_every_page():
    front = text(ROOT/"nbs"/"index.ipynb", "markdown")
    assert not (missing := [nb.name for nb in NBS if nb.stem != "index" and f"]({nb.name})" not in front]), f"add to the map in nbs/index.ipynb: {missing}"

def test_index_names_what_there_is():
    front = text(ROOT/"nbs"/"index.ipynb", "markdown")
    for stem, names in re.findall(r"\]\((\d\d[a-z]?_\w+)\.ipynb\) *\|[^|]*\|([^|\n]*)\|", front):
        module = default_exp(ROOT/"nbs"/f"{stem}.ipynb")
        exports = importlib.import_module(f"weclip.{module}").__all__ if module else []
        assert not (odd := set(re.findall(r"`(\w+)`", names)) - set(exports)), f"{stem} does not export {odd}"

@pytest.mark.parametrize("page", [ROOT/"nbs"/"index.ipynb", ROOT/"README.md"], ids=name)
def test_examples_import(page):
    "What the examples on the front pages import exists."
    md = text(page, "markdown") if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", md, re.S):
        for n in ast.walk(ast.parse(code)):
            if isinstance(n, ast.ImportFrom) and n.module.startswith("weclip"):
                assert all(hasattr(importlib.import_module(n.module), a.name) for a in n.names), ast.unparse(n)

@pytest.mark.parametrize("page", NBS + EXPERIMENTS + [ROOT/"README.md", ROOT/"CONTRIBUTING.md", ROOT/"CHANGELOG.md"], ids=name)
def test_links_resolve(page):
    md = text(page, "markdown") if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
    links = [l for l in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", md, flags=re.S)) if not re.match(r"https?:|mailto:|#|attachment:", l)]
    assert not (dead := [l for l in links if not (page.parent/l.split("#")[0]).exists()]), dead

def settings():
    conf = configparser.ConfigParser(delimiters=["="]); conf.read(ROOT/"settings.ini", encoding="utf-8")
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

PLAIN = [ROOT/n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "nbs/measured.md", "weclip/assets/README.md")]

@pytest.mark.parametrize("page", NBS + EXPERIMENTS + PLAIN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_table_rows_are_complete(page):
    "A row of another length than the head: nbconvert printed the front page's map as one paragraph of bars."
    for md in texts(page):
        for table in tables(md):
            assert len(table) > 1 and re.fullmatch(r"[\s|:-]+", table[1][1]), f"no rule below {table[0][1]!r}"
            assert not (odd := [line for n, line in table if n != table[0][0]]), f"expected {table[0][0]} cells: {odd}"

# ---- the two commands

def test_ci_runs_the_second_command(): assert INSTALL["tests"] in (ROOT/".ci"/"run").read_text(encoding="utf-8").splitlines()

@pytest.mark.parametrize("which", INSTALL)
def test_readme_has_the_command(which):
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    if not readme.strip(): pytest.skip("README.md is still empty")
    assert INSTALL[which] in readme.splitlines()
