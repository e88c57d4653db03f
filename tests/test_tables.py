"""What stands behind every table: distinct runs, the paper's numbers, results told from missing ones.

`grid.py` runs all tables from nothing to their pages.
"""
import ast
import json
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest

from grid import MISSING, unfinished
from test_project import imports
from weclip.machine import CODE, code_digest, syntax
from weclip.method.config import MENDED, PAPER, PROFILES, Score
from weclip.lab.paper import TABLE4, TABLE5, TABLE6
from weclip.lab.plan import (
    BLIND, DIFFERENCES, DRAWN, QUICK, QUICK_SIZES, SHORT, SNAPSHOTS, TABLES, Grid, base, keeps_features, plan,
    run_config, run_parameters)
from weclip.lab.results import (
    collect, effects, figure_run, has_files, _invented, keep_line, kept_table, put_between, read_lines, read_results,
    result_file, show, summary, verdicts)

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = ROOT/"experiments"
ONE_SEED = Grid(seeds=(1,))

def cells(name): return json.loads((EXPERIMENTS/name).read_text(encoding="utf-8"))["cells"]

def parameters(name):
    tagged = [c for c in cells(name) if "parameters" in c["metadata"].get("tags", ())]
    assert len(tagged) == 1, f"{name}: expected one cell tagged parameters, got {len(tagged)}"
    return {t.id for s in ast.parse("".join(tagged[0]["source"])).body for t in s.targets}

def test_results_are_read_without_pytorch():
    code = "import sys, weclip.lab.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

# ---- the plan

def test_rows_that_are_one_run_are_trained_once():
    names = ["table1", "table3", "table4", "table5", "table6", "figure3", "figure4"]
    runs = plan(names, Grid(seeds=(1, 2)))
    full = [r for r in runs if "table1: WeCLIP" in r.used_by]
    assert [r.seed for r in full] == [1, 2]
    assert {"table3: WeCLIP", "table4: decoder + RFM", "table5: 3 layers", "table6: A_f G A_s"} <= set(full[0].used_by)
    assert len(runs) == 2*(1 + 1 + 4 + 4)  # full, unrefined, four depths, four maps
    predictions = [Score(split, mode) for split in ("test", "val") for mode in ("crf", "ms")]
    assert full[0].scores == (*predictions, Score("val", "pseudo"))
    snapshots = [f"snapshot-{round(part*SHORT['iters']):06d}.safetensors" for part in SNAPSHOTS]
    assert full[0].files == ("model.safetensors", *snapshots, "masks/ms") and not full[1].files

def test_a_run_keeps_the_same_snapshots_whichever_table_asks():
    "Otherwise a run that Table 4 has finished could not serve Figure 3."
    runs = [r for t in ("table1", "table4", "figure3", "differences") for r in plan([t], ONE_SEED)]
    assert {r.snapshots for r in runs if r.settings == SHORT} == {(30, 120, 210)}

def test_rows_that_change_evaluation_are_scores_of_the_full_run():
    full = next(r for r in plan(["differences"], ONE_SEED) if "differences: released code" in r.used_by)
    assert {"differences: not mirrored", "differences: own size", "differences: sizes rounded to whole patches"} <= set(full.used_by)
    changed = [score.settings for score in full.scores if score.settings]
    assert changed == [{"long_side": 0}, {"round_to": 16}, {"tta_flip": False}]

def test_differences_cover_the_recipes():
    "Every field in which a recipe differs is one row of its own; n_static is not read where the paper's switch is 0."
    single = {k for _, settings, _ in DIFFERENCES if len(settings) == 1 for k in settings}
    assert {*PAPER, *MENDED} - {"n_static"} <= single and {"signed", "dropout", "par_iters"} <= single

def test_plans_of_all_profiles():
    wrong = []
    for profile in ("scenes", "voc", "coco"):
        runs = plan((), Grid(profile, (1,)))
        names = {r.name for r in runs}
        quick = plan((), Grid(profile, quick=True))
        checks = {
            "a run twice": len(names) == len(runs),
            "a run without a score": all(r.scores or r.used_by == ("table3: WeCLIP",) for r in runs),
            "quick runs more than one seed": len(quick) == len(plan((), Grid(profile, (1,), quick=True))),
            "quick runs whole data": {r.sizes for r in quick} == {QUICK_SIZES},
            # COCO's switch lies at half of its run, but not of four iterations
            "quick has more rows": len(quick) <= len(runs) + 1,
            "quick runs share names with others": not {r.name for r in quick} & names,
            "quick runs are long": all(run_config(r).iters <= 4*QUICK["iters"] for r in quick)}
        wrong += [f"{profile}: {what}" for what, holds in checks.items() if not holds]
    assert not wrong

def test_photographs_run_as_the_paper_says():
    voc = run_config(plan(["table1"], Grid("voc"))[0])
    coco = run_config(plan(["table2"], Grid("coco"))[0])
    assert (voc.iters, voc.bs, voc.crop, coco.iters, coco.bs) == (30_000, 4, 320, 80_000, 4)
    assert BLIND["voc"] == ("test",) and plan(["table1"], Grid("voc"))[0].sizes == ()

def test_features_are_kept_where_rows_share_them():
    others = ("12 blocks to the decoder", "10 blocks to the decoder", "last 10 attention maps",
              "ImageNet's normalisation", "faint CAMs ignored", "all of the paper's choices", "all slips mended")
    not_kept = {r.used_by[0] for r in plan((), ONE_SEED) if not keeps_features(r)}
    assert not_kept == {"table2: WeCLIP", *(f"differences: {x}" for x in others)}

# ---- the paper's numbers, a few typed a second time

PUBLISHED = (
    ("table1", "BECO", {"val + CRF": 73.7, "test + CRF": 73.5}),
    ("table1", "S-BCE", {"val + CRF": 68.1, "test + CRF": 70.4}),
    ("table1", "TSCD", {"val + CRF": 67.3, "test + CRF": 67.5}),
    ("table1", "WeCLIP", {"val": 74.9, "val + CRF": 76.4, "test": 75.2, "test + CRF": 77.2}),
    ("table2", "SIPE", {"val + CRF": 43.6}),
    ("table2", "SLRNet", {"val + CRF": 35.0}),
    ("table2", "WeCLIP", {"val": 46.4, "val + CRF": 47.1}),
    ("table3", "ToCo", {"training, h": 4, "memory, GiB": ">24"}),
    ("table3", "WeCLIP", {"training, h": 4.5, "memory, GiB": 6.2}),
    ("table7", "SegNeXt", {"learnable, M": 13.9, "test": 85.3}),
    ("table7", "WeCLIP", {"learnable, M": 5.7, "val": 81.6, "test": 81.1}))

def test_published():
    wrong = []
    for table, label, paper in PUBLISHED:
        row = next(r for r in TABLES[table].rows if r.label.startswith(label))
        if row.paper != paper:
            wrong.append(f"{table}, {label}: {row.paper}, not {paper}")
    assert not wrong

def test_published_ablations():
    values = {t: [r.paper["val"] for r in TABLES[t].rows] for t in ("table4", "table5", "table6")}
    assert values == {"table4": [68.7, 74.9], "table5": [73.2, 74.4, 74.9, 72.6, 70.3],
                      "table6": [65.7, 71.8, 72.3, 74.3, 74.9]}
    assert [len([r for r in TABLES[t].rows if r.settings is None]) for t in ("table1", "table2")] == [24, 18]

# ---- results and missing ones

def write(folder, run, miou):
    keep_line(result_file(folder, run.profile), _invented(run, miou))

@pytest.fixture
def results(tmp_path):
    for r in plan(["table4"], Grid(seeds=(1, 2))):
        is_unrefined = "refine" in r.settings
        write(tmp_path, r, .3 + r.seed/100 if is_unrefined else .5 + r.seed/50)
    return tmp_path

def changed(folder, run, how):
    "Change a run's line of results."
    line = read_lines(result_file(folder, "scenes"))[0][run.name]
    how(line)
    keep_line(result_file(folder, "scenes"), line)

SPOILT = (  # what happened to a line, and how it is called
    ("no memory", lambda r: r.pop("peak_gib"), "damaged: no proper peak_gib"),
    ("no minutes", lambda r: r.pop("minutes"), "damaged: no proper minutes"),
    ("null for a list", lambda r: r.update(blind=None), "damaged: no proper blind"),
    ("scores by their names", lambda r: r.update(scores={"val/ms": dict(miou=.5)}), "damaged: no proper scores"),
    ("a score without its split", lambda r: r["scores"][0].pop("split"), "damaged: expected a score with split"),
    ("an unknown mode", lambda r: r["scores"][0].update(mode="mss"), "damaged: unknown mode"),
    ("an unknown setting", lambda r: r["scores"][0].update(settings=dict(lr=1)), "damaged: unknown evaluation"),
    ("a text", lambda r: r["scores"][0].update(miou="50"), "damaged: score val/ms is no mIoU"),
    ("a percentage", lambda r: r["scores"][0].update(miou=50), "damaged: score val/ms is no mIoU"),
    ("no number", lambda r: r["scores"][0].update(miou=None), "damaged: score val/ms is no mIoU"),
    ("other code", lambda r: r.update(code="0"*12), "stale: made by code 000000000000"),
    ("another setting", lambda r: r["config"].update(wd=1.), "stale: made with wd 1.0"),
    ("a score under other settings", lambda r: r["scores"][0].update(settings=dict(tta_flip=False)),
     "missing: score val/ms"),
    ("a missing score", lambda r: r["scores"].pop(0), "missing: score val/ms"))

def test_stale_damaged_and_missing_are_told_apart(results):
    grid = Grid(seeds=(1, 2), results=results)
    bad, *others = plan(["table4"], grid)
    wrong = []
    for what, how, reason in SPOILT:
        write(results, bad, .5)
        changed(results, bad, how)
        read = read_results(results, [bad, *others])
        cell = collect("table4", grid)[0]
        page = show("table4", grid)
        kind = reason.partition(":")[0]
        checks = {
            "reason": str(read[bad.name]).startswith(reason),
            "others are usable": all(isinstance(read[r.name], dict) for r in others),
            "the other seed counts": list(cell["values"]) == [2],
            "told in the cell": cell["missing"].startswith(f"seed 1: {reason}"),
            "told on the page": f"- {reason}" in page,
            "the command": ("--seeds 2 --rerun-stale`" in page) == (kind == "stale")}
        wrong += [f"{what}: {check}: {read[bad.name]!r}" for check, holds in checks.items() if not holds]
    assert not wrong

def test_a_line_cut_short_spoils_no_other(results):
    file = result_file(results, "scenes")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0][:-20], *lines[1:]]))
    runs = plan(["table4"], Grid(seeds=(1, 2)))
    read = read_results(results, runs)
    assert sorted(map(type, read.values()), key=str) == [dict]*3 + [str]
    assert "damaged: scenes.jsonl: no result on line 1" in read.values()
    first = next(r for r in runs if isinstance(read[r.name], str))
    write(results, first, .5)  # which mends the file
    assert all(isinstance(r, dict) for r in read_results(results, runs).values()) and not read_lines(file)[1]

def test_a_kept_table_without_its_rows_is_damaged(tmp_path):
    "It raised a KeyError on the page."
    grid = Grid(results=tmp_path)
    keep_line(result_file(tmp_path, "tables"), dict(name="why-table5-scenes", code=code_digest()))
    assert "damaged: no head, rows in its line" in kept_table("why-table5", grid, "this")

def test_an_empty_table_of_results_is_not_damaged(tmp_path):
    (tmp_path/"scenes.jsonl").write_text("\n")
    assert read_lines(tmp_path/"scenes.jsonl") == ({}, "")

def add(folder, number):
    for k in range(5):
        keep_line(result_file(folder, "scenes"), dict(name=f"{number}-{k}", x=number))

def test_runs_that_end_together_all_keep_their_results(tmp_path):
    context = get_context("fork")
    workers = [context.Process(target=add, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines, damaged = read_lines(result_file(tmp_path, "scenes"))
    assert list(lines) == [f"{number}-{k}" for number in range(4) for k in range(5)] and not damaged

def test_a_missing_result_names_the_command_that_fills_it(tmp_path):
    page = show("table4", Grid("voc", (2,), tmp_path, "paper"))
    assert "Filled by `weclip tables table4 --profile voc --recipe paper --seeds 2`." in page

def test_a_setting_that_differs_is_one_line(results):
    changed(results, plan(["table4"], ONE_SEED)[0], lambda r: r["config"].update(wd=1., lr=1.))
    assert "made with lr 1.0, not 0.002, wd 1.0, not" in show("table4", Grid(seeds=(1,), results=results))

def finish(folder, code):
    "What a run leaves that has come to its end: pictures, its scores, and whose code it was."
    (folder/"masks"/"ms").mkdir(parents=True, exist_ok=True)
    (folder/"results.json").touch()
    (folder/"code.txt").write_text(code)

def test_files_of_a_figure_are_looked_for_only_if_asked(results, tmp_path):
    grid = Grid(seeds=(1,), results=results)
    run = plan(["figure4"], grid)[0]
    folder = tmp_path/"runs"/run.name
    def found(): return read_results(results, [run], tmp_path/"runs")[run.name]
    assert isinstance(read_results(results, [run])[run.name], dict)
    assert found() == f"missing: {run.name}/masks/ms, results.json"
    told = figure_run("figure4", grid, tmp_path/"runs")[1]
    assert told == f"Not drawn: {found()}. Filled by `weclip tables figure4 --profile scenes --seeds 1`."
    (folder/"masks"/"ms").mkdir(parents=True)
    assert found() == f"missing: {run.name}/results.json"  # stopped while it wrote the masks
    finish(folder, "f"*12)
    assert found() == f"missing: what {run.name} holds was made by other code"
    finish(folder, code_digest())
    assert isinstance(found(), dict) and figure_run("figure4", grid, tmp_path/"runs") == (run, None)
    assert has_files(run, ["masks/ms"], results, tmp_path/"runs")
    assert not has_files(run, ["masks/ms", "model.safetensors"], results, tmp_path/"runs")

def test_verdicts_use_the_spread(results):
    grid = Grid(seeds=(1, 2), results=results)
    assert "**Appears** (1 of 1): decoder + RFM over decoder" in verdicts("table4", grid)
    assert "**Not resolved**" in verdicts("table4", grid._replace(seeds=(1,)))  # one seed has no spread
    assert "| 74.9 | 53.0 ± 1.4 | -21.9 |" in summary(grid)

def test_effects_are_told_against_the_first_row(results):
    """Four rows whose two seeds are 2, 1, 1 and 1 points apart: s = sqrt(3.5/4) = .935 with 4 degrees of freedom, and
    3.50 s sqrt(2/2) = 3.3 is the bound for two such rows."""
    grid = Grid(seeds=(1, 2), results=results)
    for r in plan(["differences"], grid):
        for label, miou in {"weight decay 1e-3": .4, "plain cross-entropy": .505}.items():
            if f"differences: {label}" in r.used_by:
                write(results, r, miou + r.seed/100)
    lines = [line for line in effects("differences", grid).splitlines() if line.startswith("| ")]
    by_label = {line.split(" (")[0].removeprefix("| "): line for line in lines}
    assert by_label["weight decay 1e-3"].endswith("| 41.5 ± 0.7 | -11.5 | 3.3 | yes |")
    assert by_label["plain cross-entropy"].endswith("| 52.0 ± 0.7 | -1.0 | 3.3 | no |")
    assert by_label["COCO in batches of 8"].endswith("| 53.0 ± 1.4 | the same run |  |  |")  # no COCO's batches
    assert by_label["own size"].endswith("| – | – | – | – |")  # another evaluation, which nobody has made

def test_ours_stands_below_the_paper(results):
    write(results, plan(["table1"], ONE_SEED)[0], .5)
    lines = show("table1", Grid(seeds=(1,), results=results)).splitlines()
    k = next(i for i, x in enumerate(lines) if ", the paper's |" in x)
    assert lines[k:k + 3] == ["| WeCLIP (ViT, I+L), the paper's | 74.9 | 76.4 | 75.2 | 77.2 |",
                              "| **WeCLIP, ours** | 50.0 | 50.0 | 50.0 | 50.0 |",
                              "| difference | -24.9 | -26.4 | -25.2 | -27.2 |"]

def test_digest_is_of_all_that_a_number_can_depend_on():
    """The modules that the job imports, and those they import; left out are settings, which name the run, and what only
    shows or plans."""
    seen = set()
    todo = {"engine.job"}
    while todo:
        module = todo.pop()
        seen.add(module)
        todo |= set(imports(ROOT/"weclip"/f"{module.replace('.', '/')}.py")) - seen
    unread = {"machine", "method.config", "data.viz", "data.field"}  # the last packs masks for a server
    assert seen - set(CODE) == unread
    assert set(CODE) <= seen
    assert syntax(ast.parse("x = f(1)  # a")) == syntax(ast.parse("x = f(\n    1)")) != syntax(ast.parse("x = f(2)"))
    # Python 3.12.0 and 3.12.1 put an empty text behind {b}
    assert "Constant" not in json.dumps(syntax(ast.parse("f'{a:{b}}'")))

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
    try:
        code_digest.cache_clear()
        assert code_digest() == before
        moved["method.losses"] = moved["method.losses"].replace("seg + lam*pair", "seg - lam*pair")
        code_digest.cache_clear()
        assert code_digest() != before
    finally:
        code_digest.cache_clear()  # later tests ask for the digest of the code as it is

# ---- the notebooks

def test_notebooks_take_the_parameters():
    wanted = {"profile", "seeds", "recipe", "results", "out", "root", "device", "quick"}
    lacking = {t.name: wanted - parameters(f"{t.name}.ipynb") for t in TABLES.values()}
    assert not {name: lost for name, lost in lacking.items() if lost}

def test_a_run_takes_what_is_planned():
    assert set(run_parameters(plan(["table1"], ONE_SEED)[0])) <= parameters("01_run.ipynb")

def test_profiles_have_data():
    assert set(DRAWN) <= set(PROFILES) and {p for t in TABLES.values() for p in t.data.values()} <= set(PROFILES)
    assert base("scenes12").classes == "scenes12"

def test_readme_has_the_block():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    assert put_between(text, "new", "results").count("new\n<!-- /results -->") == 1

# ---- what is committed

SHOWN = [t.name for t in TABLES.values() if t.rows and t.columns and not t.name.startswith("figure")]

def stored(name, call):
    "The Markdown that a page shows below the cell that begins with a call."
    cell, = [c for c in cells(name) if c["cell_type"] == "code" and "".join(c["source"]).startswith(call)]
    return "".join("".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", ()))

@pytest.fixture(scope="session")
def committed():
    "The grid of the committed results, which have to be of this code."
    grid = Grid(results=EXPERIMENTS/"results")
    if not result_file(grid.results, "scenes").is_file():
        pytest.skip("the results of the tables are not here")
    had = read_results(grid.results, plan())
    stale = [n for n, r in had.items() if isinstance(r, str) and r.startswith("stale")]
    if stale:
        pytest.fail(f"{len(stale)} of {len(had)} committed results were made by other code or settings, the first "
                    f"is {stale[0]}: {had[stale[0]]}. Renew them: `weclip tables --rerun-stale`, then with `--seeds 5` "
                    "table4 table5 table6 depth_and_overfitting refining_maps_over_time", pytrace=False)
    return grid

def five_seeds(grid): return grid._replace(seeds=(1, 2, 3, 4, 5))

def test_committed_tables_are_sorted_and_whole():
    for file in (EXPERIMENTS/"results").iterdir():
        if file.name.startswith("."): continue  # locks
        lines, damaged = read_lines(file)
        assert file.suffix == ".jsonl" and not damaged and list(lines) == sorted(lines)
        assert len(file.read_text(encoding="utf-8").splitlines()) == len(lines)

def test_every_run_of_the_scenes_is_committed(committed):
    assert not {n: r for n, r in read_results(committed.results, plan()).items() if isinstance(r, str)}

def test_stored_pages_show_the_committed_results(committed):
    wrong = []
    for name in SHOWN:
        call = "effects" if name == "differences" else "show"
        made = effects(name, committed) if name == "differences" else show(name, committed)
        on_results = call if name in ("differences", "seeds") else "table"
        for page, cell in ((f"{name}.ipynb", call), ("results.ipynb", on_results)):
            if stored(page, f'{cell}("{name}"') != made:
                wrong.append(f"{page}: {name}")
    assert not wrong

def test_stored_verdicts_and_the_block_of_the_readme(committed):
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    wrong = []
    for name in ("table4", "table5", "table6", "depth_and_overfitting", "refining_maps_over_time"):
        made = verdicts(name, five_seeds(committed))
        for page, call in ((f"{name}.ipynb", "verdicts"), ("results.ipynb", "verdict")):
            if stored(page, f'{call}("{name}"') != made:
                wrong.append(f"{page}: {name}")
        in_words = made.partition("| pair")[0].strip().replace("\n\n", " ")
        if name.startswith("table") and in_words not in readme:
            wrong.append(f"README.md: {name}")
    assert not wrong
    assert summary(committed) in readme

def test_the_grid_notices_what_a_page_lacks(tmp_path):
    code = dict(cell_type="code", source=["1"], metadata={}, outputs=[])
    shown = dict(output_type="execute_result", data={"text/plain": [f"'{MISSING[0]}missing'"]})
    def look(*cells):
        (tmp_path/"page.ipynb").write_text(json.dumps(dict(cells=cells)))
        return unfinished(tmp_path/"page.ipynb")
    failed = {**code, "execution_count": 1, "outputs": [dict(output_type="error", ename="E")]}
    blank = {**code, "source": [], "execution_count": None}
    assert unfinished(tmp_path/"none.ipynb") == ["none.ipynb: missing"]
    assert look({**code, "execution_count": 1}, blank, dict(cell_type="markdown", source=["x"])) == []
    assert look({**code, "execution_count": None}) == ["page.ipynb: cell 0 was not executed"]
    assert look(failed) == ["page.ipynb: cell 0 failed"]
    lacking = look({**code, "execution_count": 2, "outputs": [shown]})
    assert lacking == [f"page.ipynb: cell 0 has nothing to show ({MISSING[0]!r})"]

def test_the_grid_knows_what_pages_say_of_missing_results():
    "Each text stands in the code or on the page that says it, or the grid would look for what nobody says any more."
    files = [ROOT/"weclip"/"lab"/"results.py", *EXPERIMENTS.glob("*.ipynb")]
    said = "".join(p.read_text(encoding="utf-8") for p in files).replace("\\n", "")
    assert not [text for text in MISSING if text.strip() not in said]

# ---- what the pages say of the numbers in words

def row_of(text, label):
    "A line of a Markdown table as texts, its label apart."
    line, = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return [part.strip() for part in line.strip("|").split("|")][1:]

def kept(committed, name): return read_lines(result_file(committed.results, "tables"))[0][name]["rows"]
def first_number(text): return float(text.split()[0])

def false_claims(claims): return [claim for claim, holds in claims.items() if not holds]

def test_the_reading_on_the_page_of_results(committed):
    "What it says of the verdicts, the longer runs and the gap."
    texts = ["".join(c["source"]) for c in cells("results.ipynb")]
    told = next(text for text in texts if text.startswith("How to read it: "))
    said = {t: verdicts(t, five_seeds(committed)) for t in ("table4", "table5", "table6", "depth_and_overfitting", "refining_maps_over_time")}
    one, ten, long = (float(said[t].split("resolved from ")[1].split()[0]) for t in ("table4", "table6", "refining_maps_over_time"))
    pair = [first_number(x) for x in row_of(said["refining_maps_over_time"], "A_f G A_s over A_s")[:2]]
    gaps = [first_number(row[2]) for row in kept(committed, "why-table5-scenes")]
    assert not false_claims({
        "bound of Table 4": f"at a bound of {one}." in told,
        "bound of Table 6": f"from {ten} points on" in told,
        "refinement is worth 15 points": "| +6.2 | +15." in said["table4"] and "resolved, 15 points" in told,
        "refinement is resolved": "**Appears** (1 of 1)" in said["table4"],
        "A_s is ahead of A_f": "**Appears** (1 of 10): A_s over A_f." in said["table6"],
        "the others are not": "**Not resolved** (9 of 10)" in said["table6"],
        "the full map is 3.4 below": "| A_f G A_s over A_s | +3.1 | -3.4 |" in said["table6"] and "3.4 points" in told,
        "no depth is": all("**Not resolved** (10 of 10)" in said[t] for t in ("table5", "depth_and_overfitting")),
        "level in longer runs": "**Not resolved** (1 of 1)" in said["refining_maps_over_time"],
        "their numbers": f"(+{pair[1]:.1f} points, bound {long})" in told,
        "the paper's lead is ruled out": pair[0] == 3.1 and pair[1] + long < 3.1,
        "gaps of five to six points": 5 <= min(gaps) and max(gaps) < 6.5 and "five to six points" in told})

def test_readings_of_single_pages(committed):
    "Table 6's curves, the settings that stand out, what depth and length change."
    every = five_seeds(committed)
    effect = {c["label"]: c["mean"] for c in collect("differences", committed)}
    released = effect["released code"]
    one_pair = float(row_of(stored("seeds.ipynb", "spread ="), "3 ")[0])
    far = sorted(effect, key=effect.get)
    curves = {row[0]: [[float(x) for x in text.split(" ± ")] for text in row[1:]]
              for row in kept(committed, "why-table6-time-scenes")}
    static = curves["A_s"][0][0]
    learnt = [curves[label] for label in ("A_f", "A_f A_s", "A_f G A_s")]
    gaps = [[first_number(x) for x in row[1:4]] for row in kept(committed, "why-table5-scenes")]
    depth = {c["label"]: c["mean"] for c in collect("depth_and_overfitting", every) if c["column"] == "val"}
    means = [*depth.values()]
    favour = [deep > shallow for k, deep in enumerate(means) for shallow in means[:k]]
    length = stored("refining_maps_over_time.ipynb", "def rows(table)")
    labels = [first_number(row_of(length, label)[0]) for label in ("300 iterations", "1,000 iterations")]
    change, bound = (float(x.strip("()")) for x in row_of(length, "change with length")[1].split())
    score = {(t, c["label"]): c["mean"] for t in ("table6", "refining_maps_over_time") for c in collect(t, every) if c["column"] == "val"}
    assert not false_claims({
        "ours 1: nothing is resolved": "| yes |" not in effects("differences", committed),
        "ours 1: farthest below": far[0] == "plain cross-entropy",
        "ours 1: farthest above": far[-1] == "affinity loss: cross-entropy",
        "ours 1: beyond the bound of one pair": min(released - effect[far[0]], effect[far[-1]] - released) > one_pair,
        "Table 6: labels with A_f begin below": all(curve[0][0] < static for curve in learnt),
        "Table 6: then scatter more than they lead": all(curve[1][0] - static < curve[1][1] for curve in learnt),
        "Table 6: later lead by more": all(curve[2][0] - static > curve[2][1] for curve in learnt),
        "ours 3: the gap opens": all(opened > 4 > many for many, _, opened in gaps),
        "ours 3: deeper is rather better": sum(favour) >= 9,
        "ours 4: the difference changes": change > bound,
        "ours 4: from behind": score["table6", "A_f G A_s"] < score["table6", "A_s"],
        "ours 4: not by better labels": labels[1] <= labels[0],
        "ours 4: the static map's rise, too": score["refining_maps_over_time", "A_s"] > score["table6", "A_s"]})

def test_the_papers_differences_on_the_page_of_the_spread():
    text = "".join(cells("seeds.ipynb")[-1]["source"])
    def differences(table):
        values = sorted(table.values())
        return sorted(round(b - a, 1) for k, b in enumerate(values) for a in values[:k])
    four, five, six = map(differences, (TABLE4, TABLE5, TABLE6))
    few = sum(x <= 2 for x in six)
    assert few == 3 and f"are {six[0]} to {six[-1]} points in Table 6 (three of its ten at most 2.0)" in text
    assert f"{five[0]} to {five[-1]} in Table 5 and {four[0]} in Table 4" in text
