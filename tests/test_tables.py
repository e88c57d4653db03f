"""What stands behind every table: distinct runs, the paper's numbers, results told from holes. `grid.py` runs all tables from nothing to their pages."""
import ast, json
from pathlib import Path
from types import SimpleNamespace

import pytest

from grid import HOLES, unfinished
from test_project import imports
from weclip.machine import CODE, code_digest, syntax
from weclip.method.config import MENDED, PAPER, PROFILES, read_mode, to_dict
from weclip.lab.plan import (
    BLIND, DIFFERENCES, DRAWN, GRID, QUICK, QUICK_SIZES, SNAPSHOTS, TABLES, base, collect, keeps_features, plan,
    read_results, run_config, run_parameters)
from weclip.lab.results import effects, figure_run, put_between, show, summary, verdicts

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT/"experiments"

def cells(name): return json.loads((EXPERIMENTS/name).read_text(encoding="utf-8"))["cells"]
def parameters(name):
    tagged = [c for c in cells(name) if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1, f"{name}: expected one cell tagged parameters, got {len(tagged)}"
    return {t.id for s in ast.parse("".join(tagged[0]["source"])).body for t in s.targets}

# ---- the plan

def test_rows_that_are_one_run_are_trained_once():
    runs = plan(["table1", "table3", "table4", "table5", "table6", "figure3", "figure4"], seeds=(1, 2))
    full = [r for r in runs if "table1: WeCLIP" in r.used_by]
    assert [r.seed for r in full] == [1, 2]
    assert {"table3: WeCLIP", "table4: decoder + RFM", "table5: 3 layers", "table6: A_f G A_s"} <= set(full[0].used_by)
    assert len(runs) == 2*(1 + 1 + 4 + 4)  # full, unrefined, four depths, four maps
    assert set(full[0].scores) == {(s, m) for s in ("val", "test") for m in ("ms", "crf")} | {("val", "pseudo")}
    assert full[0].files == ("model.safetensors", *(f"snapshot-{round(s*GRID['iters']):06d}.safetensors" for s in SNAPSHOTS), "masks/ms") and not full[1].files

def test_a_run_keeps_the_same_snapshots_whichever_table_asks():
    "Otherwise a run that Table 4 has finished could not serve Figure 3."
    assert {r.snapshots for t in ("table1", "table4", "figure3", "ours1") for r in plan([t], seeds=(1,)) if r.settings == GRID} == {(30, 120, 210)}

def test_rows_that_change_evaluation_are_scores_of_the_full_run():
    full = next(r for r in plan(["ours1"], seeds=(1,)) if "ours1: released code" in r.used_by)
    assert {"ours1: not mirrored", "ours1: own size", "ours1: sizes rounded to whole patches"} <= set(full.used_by)
    assert {read_mode(m)[1].popitem() for _, m in full.scores if ":" in m} == {("tta_flip", False), ("long_side", 0), ("round_to", 16)}

def test_differences_cover_the_recipes():
    "Every field in which a recipe differs is one row of its own; n_static is not read where the paper's switch is 0."
    single = {k for _, settings, _ in DIFFERENCES if len(settings) == 1 for k in settings}
    assert {*PAPER, *MENDED} - {"n_static"} <= single and {"signed", "dropout", "par_iters"} <= single

@pytest.mark.parametrize("profile", ["scenes", "voc", "coco"])
def test_plans_of_all_profiles(profile):
    runs = plan((), profile, seeds=(1,))
    assert len({r.name for r in runs}) == len(runs) and all(r.scores or r.used_by == ("table3: WeCLIP",) for r in runs)
    quick = plan((), profile, quick=True)
    assert len(quick) == len(plan((), profile, seeds=(1,), quick=True)) and {r.sizes for r in quick} == {QUICK_SIZES}
    assert len(quick) <= len(runs) + 1  # COCO's switch lies at half of its run, but not of four iterations
    assert not {r.name for r in quick} & {r.name for r in runs} and all(run_config(r).iters <= 4*QUICK["iters"] for r in quick)

def test_photographs_run_as_the_paper_says():
    voc, coco = run_config(plan(["table1"], "voc", seeds=(1,))[0]), run_config(plan(["table2"], "coco", seeds=(1,))[0])
    assert (voc.iters, voc.bs, voc.crop, coco.iters, coco.bs) == (30_000, 4, 320, 80_000, 4)
    assert BLIND["voc"] == ("test",) and plan(["table1"], "voc", seeds=(1,))[0].sizes == ()

def test_features_are_kept_where_rows_share_them():
    kept = {r.used_by[0] for r in plan(seeds=(1,)) if not keeps_features(r)}
    assert kept == {"table2: WeCLIP", *(f"ours1: {x}" for x in ("12 blocks to the decoder", "10 blocks to the decoder", "last 10 attention maps", "ImageNet's normalisation",
                                                                  "faint CAMs ignored", "all of the paper's choices", "all slips mended"))}

# ---- the paper's numbers, a few typed a second time

@pytest.mark.parametrize("table, label, paper", [
    ("table1", "BECO", {"val + CRF": 73.7, "test + CRF": 73.5}), ("table1", "S-BCE", {"val + CRF": 68.1, "test + CRF": 70.4}),
    ("table1", "TSCD", {"val + CRF": 67.3, "test + CRF": 67.5}), ("table1", "WeCLIP", {"val": 74.9, "val + CRF": 76.4, "test": 75.2, "test + CRF": 77.2}),
    ("table2", "SIPE", {"val + CRF": 43.6}), ("table2", "SLRNet", {"val + CRF": 35.0}), ("table2", "WeCLIP", {"val": 46.4, "val + CRF": 47.1}),
    ("table3", "ToCo", {"training, h": 4, "memory, GiB": ">24"}), ("table3", "WeCLIP", {"training, h": 4.5, "memory, GiB": 6.2}),
    ("table7", "SegNeXt", {"learnable, M": 13.9, "test": 85.3}), ("table7", "WeCLIP", {"learnable, M": 5.7, "val": 81.6, "test": 81.1})])
def test_published(table, label, paper):
    assert next(r for r in TABLES[table].rows if r.label.startswith(label)).paper == paper

def test_published_ablations():
    values = {t: [r.paper["val"] for r in TABLES[t].rows] for t in ("table4", "table5", "table6")}
    assert values == {"table4": [68.7, 74.9], "table5": [73.2, 74.4, 74.9, 72.6, 70.3], "table6": [65.7, 71.8, 72.3, 74.3, 74.9]}
    assert [len([r for r in TABLES[t].rows if r.settings is None]) for t in ("table1", "table2")] == [24, 18]
    for t in ("table4", "table5", "table6"): assert [r.label for r in TABLES[t].rows if r.settings in ({}, dict(layers=3))] and max(values[t]) == 74.9

# ---- results and holes

def write(folder, run, miou):
    facts = dict(config=to_dict(run_config(run)), seed=run.seed, code=code_digest(), train_minutes=2, minutes=3, peak_gib=1., n_learnable=1)
    (folder/f"{run.name}.json").write_text(json.dumps(dict(**facts, scores={f"{s}/{m}": dict(miou=miou) for s, m in run.scores})))

@pytest.fixture
def results(tmp_path):
    for r in plan(["table4"], seeds=(1, 2)): write(tmp_path, r, .3 + r.seed/100 if "refine" in r.settings else .5 + r.seed/50)
    return tmp_path

def damage(path, how):
    r = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20] if how == "cut" else "[]" if how == "list" else json.dumps(how(r) or r))

@pytest.mark.parametrize("how, reason", [
    ("cut", "damaged"), ("list", "damaged"), (lambda r: r.pop("peak_gib") and None, "damaged"), (lambda r: r.pop("minutes") and None, "damaged"), (lambda r: r.update(blind=None), "damaged"), (lambda r: r["scores"].update({"val/ms": dict(miou="50")}), "damaged"),
    (lambda r: r.update(code="0"*12), "stale"), (lambda r: r["config"].update(wd=1.), "stale"), (lambda r: r["scores"].pop("val/ms") and None, "missing")])
def test_stale_damaged_and_missing_are_told_apart(results, how, reason):
    runs = plan(["table4"], seeds=(1, 2)); bad = runs[0]
    damage(results/f"{bad.name}.json", how)
    read = read_results(results, runs)
    assert read[bad.name].startswith(reason) and (reason == "missing" or f"{bad.name}.json" in read[bad.name])
    assert all(isinstance(read[r.name], dict) for r in runs[1:])  # one bad file spoils no other
    cell = collect("table4", seeds=(1, 2), folder=results)[0]
    assert (cell["n"], list(cell["values"])) == (1, [2]) and cell["hole"].startswith(f"seed 1: {reason}")
    page = show("table4", seeds=(1, 2), folder=results, recipe="released")
    assert f"- {reason}" in page and ("--seeds 2 --rerun-stale`" in page) == (reason == "stale")

def test_a_hole_names_the_command_that_fills_it(tmp_path):
    assert "Filled by `weclip tables table4 --profile voc --recipe paper --seeds 2`." in show("table4", "voc", (2,), tmp_path, "paper")

def test_a_setting_that_differs_is_one_line(results):
    run = plan(["table4"], seeds=(1,))[0]
    damage(results/f"{run.name}.json", lambda r: r["config"].update(wd=1., lr=1.))
    assert "made with lr 1.0, not 0.002, wd 1.0, not" in show("table4", seeds=(1,), folder=results)

def finish(folder, code):
    "What a run leaves that has come to its end: pictures, its scores, and whose code it was."
    (folder/"masks"/"ms").mkdir(parents=True, exist_ok=True); (folder/"results.json").touch(); (folder/"code.txt").write_text(code)

def test_files_of_a_figure_are_looked_for_only_if_asked(results, tmp_path):
    run = plan(["figure4"], seeds=(1,))[0]; folder = tmp_path/"runs"/run.name
    def found(): return read_results(results, [run], tmp_path/"runs")[run.name]
    assert isinstance(read_results(results, [run])[run.name], dict)
    assert found() == f"missing: {run.name}/masks/ms, results.json"
    (folder/"masks"/"ms").mkdir(parents=True)
    assert found() == f"missing: {run.name}/results.json"  # stopped while it wrote the masks
    finish(folder, "f"*12); assert found() == f"missing: what {run.name} holds was made by other code"
    finish(folder, code_digest()); assert isinstance(found(), dict)

def test_verdicts_use_the_spread(results):
    assert "**Appears** (1 of 1): decoder + RFM over decoder" in verdicts("table4", seeds=(1, 2), folder=results)
    assert "**Not resolved**" in verdicts("table4", seeds=(1,), folder=results)  # one seed has no spread
    assert "| 74.9 | 53.0 ± 1.4 | -21.9 |" in summary(seeds=(1, 2), folder=results)

def test_effects_are_told_against_the_first_row(results):
    "Four rows whose two seeds are 2, 1, 1 and 1 points apart: s = sqrt(3.5/4) = .935 with 4 degrees of freedom, and 3.50 s sqrt(2/2) = 3.3 is the bound for two such rows."
    for r in plan(["ours1"], seeds=(1, 2)):
        for label, miou in {"weight decay 1e-3": .4, "plain cross-entropy": .505}.items():
            if f"ours1: {label}" in r.used_by: write(results, r, miou + r.seed/100)
    lines = {x.split(" (")[0].removeprefix("| "): x for x in effects("ours1", seeds=(1, 2), folder=results).splitlines() if x.startswith("| ")}
    assert lines["weight decay 1e-3"].endswith("| 41.5 ± 0.7 | -11.5 | 3.3 | yes |") and lines["plain cross-entropy"].endswith("| 52.0 ± 0.7 | -1.0 | 3.3 | no |")
    assert lines["COCO in batches of 8"].endswith("| 53.0 ± 1.4 | the same run |  |  |")  # the scenes' batches are no COCO's
    assert lines["own size"].endswith("| – | – | – | – |")                               # another evaluation, which nobody has made

def test_ours_stands_below_the_paper(results):
    write(results, plan(["table1"], seeds=(1,))[0], .5)
    lines = show("table1", seeds=(1,), folder=results).splitlines()
    k = next(i for i, x in enumerate(lines) if ", the paper's |" in x)
    assert lines[k:k + 3] == ["| WeCLIP (ViT, I+L), the paper's | 74.9 | 76.4 | 75.2 | 77.2 |", "| **WeCLIP, ours** | 50.0 | 50.0 | 50.0 | 50.0 |",
                              "| difference | -24.9 | -26.4 | -25.2 | -27.2 |"]

def test_a_figure_says_what_it_lacks(results, tmp_path):
    run, hole = figure_run("figure4", seeds=(1,), folder=results, out=tmp_path/"runs")
    assert hole == f"Not drawn: missing: {run.name}/masks/ms, results.json. Filled by `weclip tables figure4 --profile scenes --seeds 1`."
    finish(tmp_path/"runs"/run.name, code_digest())
    assert figure_run("figure4", seeds=(1,), folder=results, out=tmp_path/"runs") == (run, None)

def test_digest_is_of_all_that_a_number_can_depend_on():
    "The modules that the job imports, and those they import; left out are settings, which name the run, and what only shows or plans."
    seen, todo = set(), {"engine.job"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= set(imports(ROOT/"weclip"/f"{module.replace('.', '/')}.py")) - seen
    assert seen - set(CODE) == {"machine", "method.config", "data.viz"} and set(CODE) <= seen
    assert syntax(ast.parse("x = f(1)  # a")) == syntax(ast.parse("x = f(\n    1)")) != syntax(ast.parse("x = f(2)"))
    assert "Constant" not in json.dumps(syntax(ast.parse("f'{a:{b}}'")))  # Python 3.12.0 and 3.12.1 put an empty text behind {b}

def test_digest_does_not_ask_in_which_module_a_function_stands(monkeypatch):
    "A move from one page to another, or another import line, made every stored result stale."
    code_digest.cache_clear()
    before = code_digest()
    moved = {}
    for name in CODE:
        moved[name] = (ROOT/"weclip"/f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    cut = moved["method.metrics"].index("\n# %%")  # all of metrics goes to the end of losses
    moved["method.losses"] += moved["method.metrics"][cut:]
    moved["method.metrics"] = '"Moved."\nfrom .losses import scores\n'
    class Folder:
        def __truediv__(self, name):
            return SimpleNamespace(read_text=lambda encoding: moved[name.removesuffix(".py").replace("/", ".")])
    monkeypatch.setattr("weclip.machine.files", lambda package: Folder())
    code_digest.cache_clear()
    assert code_digest() == before
    moved["method.losses"] = moved["method.losses"].replace("+", "-", 1)
    code_digest.cache_clear()
    assert code_digest() != before
    code_digest.cache_clear()

# ---- the notebooks

@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.name)
def test_notebooks_take_the_parameters(table):
    assert {"profile", "seeds", "recipe", "results", "out", "root", "device", "quick"} <= parameters(table.notebook)

def test_a_run_takes_what_is_planned():
    assert set(run_parameters(plan(["table1"], seeds=(1,))[0])) <= parameters("01_run.ipynb")

def test_profiles_have_data():
    assert set(DRAWN) <= set(PROFILES) and {p for t in TABLES.values() for p in t.data.values()} <= set(PROFILES)
    assert base("scenes12").classes == "scenes12"

def test_readme_has_the_block():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert put_between(text, "new", "results").count("new\n<!-- /results -->") == 1

# ---- what is committed

def stored(name, call):
    "The Markdown that a page shows below the cell that begins with a call."
    cell, = [c for c in cells(name) if c["cell_type"] == "code" and "".join(c["source"]).startswith(call) or f"\n{call}" in "".join(c["source"])]
    return "".join("".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", ()))

@pytest.fixture(scope="session")
def committed():
    "The folder of the committed results, if they are of this code."
    had = read_results(EXPERIMENTS/"results", plan())
    if old := [n for n, r in had.items() if isinstance(r, str) and r.startswith("stale")]: pytest.skip(f"{len(old)} of {len(had)} committed results are of other code; `weclip tables --rerun-stale` renews them")
    return EXPERIMENTS/"results"

def test_every_run_of_the_scenes_is_committed(committed):
    assert not {n: r for n, r in read_results(committed, plan()).items() if isinstance(r, str)}

@pytest.mark.parametrize("name", [t.name for t in TABLES.values() if t.rows and t.columns and not t.name.startswith("figure")])
def test_stored_pages_show_the_committed_results(committed, name):
    made = effects(name, folder=committed) if name == "ours1" else show(name, folder=committed)
    for page in (f"{name}.ipynb", "results.ipynb"): assert stored(page, f'{"effects" if name == "ours1" else "show"}("{name}"') == made, page

def test_stored_verdicts_and_the_block_of_the_readme(committed):
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    for name in ("table4", "table5", "table6", "ours3", "ours4"):
        made = verdicts(name, seeds=(1, 2, 3, 4, 5), folder=committed)
        for page in (f"{name}.ipynb", "results.ipynb"): assert stored(page, f'verdicts("{name}"') == made, page
        if name.startswith("table"): assert made.partition("| pair")[0].strip().replace("\n\n", " ") in readme
    assert summary(folder=committed) in readme

def test_the_grid_notices_what_a_page_lacks(tmp_path):
    code = dict(cell_type="code", source=["1"], metadata={}, outputs=[])
    shown = dict(output_type="execute_result", data={"text/plain": [f"'{HOLES[0]}missing'"]})
    def look(*cells):
        (tmp_path/"page.ipynb").write_text(json.dumps(dict(cells=cells)))
        return unfinished(tmp_path/"page.ipynb")
    assert unfinished(tmp_path/"none.ipynb") == ["none.ipynb: missing"]
    assert look({**code, "execution_count": 1}, {**code, "source": [], "execution_count": None}, dict(cell_type="markdown", source=["x"])) == []
    assert look({**code, "execution_count": None}) == ["page.ipynb: cell 0 was not executed"]
    assert look({**code, "execution_count": 1, "outputs": [dict(output_type="error", ename="E")]}) == ["page.ipynb: cell 0 failed"]
    assert look({**code, "execution_count": 2, "outputs": [shown]}) == [f"page.ipynb: cell 0 has nothing to show ({HOLES[0]!r})"]

def test_the_grid_knows_the_texts_of_holes():
    "Each stands in the code or the page that says it; otherwise the grid would look for what nobody says any more."
    said = "".join(p.read_text(encoding="utf-8") for p in [ROOT/"weclip"/"lab"/"results.py", *EXPERIMENTS.glob("*.ipynb")]).replace("\\n", "")
    assert not [hole for hole in HOLES if hole.strip() not in said]

def test_the_reading_on_the_page_is_of_the_stored_numbers(committed):
    "What the page of results says in words of the verdicts, the longer runs and the gap."
    told = next(text for text in map("".join, (c["source"] for c in cells("results.ipynb"))) if text.startswith("How to read it: "))
    said = {t: verdicts(t, seeds=(1, 2, 3, 4, 5), folder=committed) for t in ("table4", "table5", "table6", "ours3", "ours4")}
    one, ten, long = (float(said[t].split("resolved from ")[1].split()[0]) for t in ("table4", "table6", "ours4"))
    assert f"at a bound of {one}." in told and f"from {ten} points on" in told
    assert "**Appears** (1 of 1)" in said["table4"] and "| +6.2 | +15." in said["table4"]
    assert "**Appears** (1 of 10): A_s over A_f." in said["table6"] and "**Not resolved** (9 of 10)" in said["table6"] and "| A_f G A_s over A_s | +3.1 | -3.4 |" in said["table6"]
    assert all("**Not resolved** (10 of 10)" in said[t] for t in ("table5", "ours3")) and "**Not resolved** (1 of 1)" in said["ours4"]
    pair = next(line.split(" | ") for line in said["ours4"].splitlines() if line.startswith("| A_f G A_s over A_s"))
    assert f"(+{float(pair[2]):.1f} points, bound {long})" in told and float(pair[2]) + long < 3.1
    gaps = [float(row[2].split()[0]) for row in json.loads((committed/"why-table5-scenes.json").read_text(encoding="utf-8"))["rows"]]
    assert 5 <= min(gaps) and max(gaps) < 6.5
