"""What stands behind every table: distinct runs, the paper's numbers, results told from missing ones.

`grid.py` runs all tables from nothing to their pages, `test_claims.py` looks at the pages as they are stored.
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
from weclip.lab.compare import difference_table, draw_differences
from weclip.lab.plan import (
    BLIND, DIFFERENCES, DRAWN, LONG, QUICK, QUICK_SIZES, SHORT, SNAPSHOTS, TABLES, Grid, base, keeps_features, plan,
    run_config, run_parameters, table_seeds)
from weclip.lab.results import (
    _invented, collect, figure_run, from_text, has_files, in_text, keep_arrays, keep_run, keep_table, kept_arrays,
    kept_rows, kept_table, number, number_table, put_between, read_results, read_rows, read_runs, result_file, run_rows,
    show)

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
    snapshots = [f"snapshot-{round(part*LONG['iters']):06d}.safetensors" for part in SNAPSHOTS]
    assert full[0].files == ("model.safetensors", *snapshots, "masks/ms") and full[1].files == full[0].files[:-1]

def test_a_run_keeps_the_same_snapshots_whichever_table_asks():
    "Otherwise a run that Table 4 has finished could not serve Figure 3."
    tables = "table1", "table4", "figure3", "differences", "refining_maps_over_time"
    runs = [run for table in tables for run in plan([table], ONE_SEED)]
    assert {run.snapshots for run in runs if run.settings == LONG} == {(300, 1200, 2100)}
    assert {run.snapshots for run in runs if run.settings == SHORT} == {(30, 120, 210)}

def test_a_run_serves_the_same_lines_whichever_table_asks():
    "The lines are stored with its scores."
    whole = {run.name: set(run.used_by) for run in plan()}
    wrong = [f"{table}: {run.name}: {run.used_by}" for table in TABLES if table != "figure5" and table != "table2"
             for run in plan([table]) if set(run.used_by) != whole[run.name]]
    assert not wrong

def test_no_more_seeds_than_a_table_takes():
    wanted = {"table4": (1, 2, 3, 4, 5), "differences": (1, 2, 3), "table2": (1, 2, 3), "figure4": (1,)}
    assert {name: table_seeds(TABLES[name]) for name in wanted} == wanted
    assert table_seeds(TABLES["differences"], Grid(seeds=(4, 2))) == (4, 2)
    assert table_seeds(TABLES["table4"], Grid(quick=True)) == (1,)

def test_rows_that_change_evaluation_are_scores_of_the_full_run():
    full = next(r for r in plan(["differences"], ONE_SEED) if "differences: released code" in r.used_by)
    evaluated = "not mirrored", "own size", "sizes rounded to whole patches"
    assert {f"differences: {label}" for label in evaluated} <= set(full.used_by)
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

def write(folder, run, miou, **other):
    keep_run(result_file(folder, run.profile), run_rows(_invented(run, miou, **other)))

@pytest.fixture
def results(tmp_path):
    for r in plan(["table4"], Grid(seeds=(1, 2))):
        is_unrefined = "refine" in r.settings
        write(tmp_path, r, .3 + r.seed/100 if is_unrefined else .5 + r.seed/50)
    return tmp_path

def changed(folder, run, how):
    "Change a run's rows of results."
    file = result_file(folder, "scenes")
    rows = [row for row in read_rows(file)[0] if row["run"] == run.name]
    how(rows)
    keep_run(file, rows)

def first(**changes):
    "A change of a run's first row, the score val/ms."
    return lambda rows: rows[0].update(changes)

SPOILT = (  # what happened to the rows of a run, and how it is called
    ("no minutes", lambda rows: [row.update(minutes="") for row in rows], "damaged: could not convert"),
    ("rows of two codes", first(code="0"*12), "damaged: its rows disagree"),
    ("an unknown mode", first(prediction="mss"), "damaged: unknown mode"),
    ("an unknown setting", first(evaluation="lr=1.0"), "damaged: unknown evaluation"),
    ("a setting without a value", first(evaluation="tta_flip"), "damaged: "),
    ("a text", first(miou="fifty"), "damaged: could not convert"),
    ("more than everything", first(miou="5000"), "damaged: score val/ms is no mIoU"),
    ("no number", first(miou=""), "damaged: score val/ms is no mIoU"),
    ("not a number", first(miou="nan"), "damaged: score val/ms is no mIoU"),
    ("a score twice", lambda rows: rows.append(dict(rows[0])), "damaged: score val/ms stands twice"),
    ("other code", lambda rows: [row.update(code="0"*12) for row in rows], "stale: made by code 000000000000"),
    ("a score under other settings", first(evaluation="tta_flip=false"), "missing: score val/ms"),
    ("a missing score", lambda rows: rows.pop(0), "missing: score val/ms"))

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

def test_lines_cut_short_spoil_no_other(results):
    file = result_file(results, "scenes")
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *(line[:-20] for line in lines[:2]), *lines[2:]]))
    runs = plan(["table4"], Grid(seeds=(1, 2)))
    read = read_results(results, runs)
    assert sorted(map(type, read.values()), key=str) == [dict]*3 + [str]
    assert "damaged: scenes.csv: no result on line 2, 3" in read.values()
    spoilt = next(r for r in runs if isinstance(read[r.name], str))
    write(results, spoilt, .5)  # which mends the file
    assert all(isinstance(r, dict) for r in read_results(results, runs).values()) and not read_rows(file)[1]

def test_results_of_another_clip_are_stale(tmp_path):
    "A rehearsal with random weights counted as finished when the real ones had come."
    grid = Grid("voc", (1, 2, 3), tmp_path)
    runs = plan(["table4"], grid)
    for run in runs:
        write(tmp_path, run, .5, backbone="random" if run.seed == 3 else "ViT-B-16.pt")
    read = read_results(tmp_path, runs)
    other = {run.seed for run in runs if isinstance(read[run.name], str)}
    assert other == {3} and "stale: made with the CLIP 'random', not with 'ViT-B-16.pt'" in read.values()
    assert list(collect("table4", grid)[0]["values"]) == [1, 2]
    assert all("not with 'openai'" in why for why in read_results(tmp_path, runs, clip="openai").values())
    drawn = plan(["table4"], Grid(results=tmp_path))[0]
    write(tmp_path, drawn, .5)
    assert isinstance(read_results(tmp_path, [drawn])[drawn.name], dict)

def test_a_spread_is_never_printed_as_none():
    assert [number(.0215, .0041), number(74.9, .03), number(74.9, .3), number(5., 0.), number(.996, .04)] == [
        "0.02 ± 0.004", "74.9 ± 0.03", "74.9 ± 0.3", "5.0 ± 0.0", "1.00 ± 0.04"]

def test_a_row_without_labels_may_come_first():
    "Full supervision makes no labels: two rows that had been trained for minutes were lost."
    runs = [dict(row="masks", seed=1, prediction=80.), dict(row="tags", seed=1, prediction=50., labels=47.)]
    assert "| tags | 50.0 | -30.0 | 47.0 |  |" in difference_table(runs)
    assert "| masks | 80.0 | +30.0 |  |  |" in difference_table(runs, "tags")
    for shown in (difference_table, draw_differences):
        with pytest.raises(ValueError, match="did you mean 'tags'"):
            shown(runs, "tag")

def test_what_is_no_table_is_damaged_and_replaced(tmp_path):
    run, _ = plan(["table4"], ONE_SEED)
    texts = "", "\n", "\0\0", "run,seed\nx,1\n", "<html>\n<body>\n"
    odd = []
    for text in texts:
        (tmp_path/"scenes.csv").write_text(text)
        read = read_results(tmp_path, [run])[run.name]
        rows, damaged = read_rows(tmp_path/"scenes.csv")
        if rows or read != (f"damaged: {damaged}" if damaged else "missing"):
            odd.append((text, read))
        write(tmp_path, run, .5)
        if not isinstance(read_results(tmp_path, [run])[run.name], dict):
            odd.append((text, "not replaced"))
    assert not odd

def test_kept_tables_are_told_from_missing_stale_and_damaged(tmp_path):
    grid = Grid(results=tmp_path)
    assert kept_table("labels", grid, "this") == "Not measured: labels-scenes: missing. Filled by `this`."
    made = keep_table("labels", grid, ["", "seed 1"], [["end", "50.00"], ["static", "48,5"]])
    assert made == kept_table("labels", grid, "this") == number_table(["", "seed 1"], kept_rows("labels", grid)[1])
    file = tmp_path/"labels-scenes.csv"
    whole = file.read_text()
    spoilt = {"": "damaged: ", whole.replace(",code", ",other"): "damaged: ", whole + "end,51\n": "damaged: ",
              whole.replace(code_digest(), "0"*12): "stale: made by code 000000000000"}
    odd = []
    for text, reason in spoilt.items():
        file.write_text(text)
        head, rows, why = kept_rows("labels", grid)
        if rows or head or not why.startswith(reason) or why not in kept_table("labels", grid, "this"):
            odd.append((text, why))
    assert not odd
    others = grid._replace(quick=True), grid._replace(recipe="paper"), grid._replace(profile="voc")
    assert {kept_rows("labels", other)[2] for other in others} == {"missing"}

def test_kept_arrays_of_a_figure(tmp_path, monkeypatch):
    grid = Grid(results=tmp_path)
    assert kept_arrays("figure4", grid) == ({}, "missing")
    keep_arrays("figure4", grid, iou=[.5, .25])
    assert {name: x.tolist() for name, x in kept_arrays("figure4", grid)[0].items()} == dict(iou=[.5, .25])
    monkeypatch.setattr("weclip.lab.results.code_digest", lambda: "0"*12)
    arrays, why = kept_arrays("figure4", grid)
    assert not arrays and why == f"stale: made by code {code_digest()}, this is 000000000000"
    file, = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:40])
    assert kept_arrays("figure4", grid) == ({}, "damaged: BadZipFile")

def test_settings_as_a_cell_of_a_table():
    for settings in {}, dict(layers=1, refine="none"), dict(long_side=0, round_to=16), dict(seg_loss="ce"):
        assert from_text(in_text(settings)) == settings

def test_a_split_without_masks_and_a_timed_run_have_rows(tmp_path):
    "VOC's test split is predicted, not scored; Table 3 alone asks for no score."
    run, = plan(["table1"], Grid("voc", (1,)))
    scores = [{**score._asdict(), "miou": .5} for score in run.scores if score.split != "test"]
    keep_run(result_file(tmp_path, "voc"), run_rows(_invented(run, blind=["test"], scores=scores)))
    found = read_results(tmp_path, [run])[run.name]
    assert found["blind"] == ["test"] and set(found["scores"].values()) == {50.}
    cells = collect("table1", Grid("voc", (1,), tmp_path))
    assert {c["missing"] for c in cells if c["label"] == "WeCLIP" and "test" in c["column"]} == {"no masks"}
    keep_run(result_file(tmp_path, "voc"), run_rows(_invented(run, scores=[])))
    timed, = plan(["table3"], Grid("voc", (1,)))
    assert read_results(tmp_path, [timed])[timed.name]["train_minutes"] == 2

def test_an_empty_table_of_results_is_not_damaged(tmp_path):
    assert read_rows(tmp_path/"scenes.csv") == ([], "")
    (tmp_path/"scenes.csv").write_text("\n")
    assert read_rows(tmp_path/"scenes.csv") == ([], "")

def add(folder, number):
    run = plan(["table4"], ONE_SEED)[0]
    for k in range(5):
        write(folder, run, number/10, name=f"{number}-{k}")

def test_runs_that_end_together_all_keep_their_results(tmp_path):
    context = get_context("fork")
    workers = [context.Process(target=add, args=(tmp_path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    runs, damaged = read_runs(result_file(tmp_path, "scenes"))
    assert list(runs) == [f"{number}-{k}" for number in range(4) for k in range(5)] and not damaged
    assert {name: run["scores"]["val/ms"] for name, run in runs.items()} == {n: 10*int(n[0]) for n in runs}

def test_a_missing_result_names_the_command_that_fills_it(tmp_path):
    page = show("table4", Grid("voc", (2,), tmp_path, "paper"))
    assert "Filled by `weclip tables table4 --profile voc --recipe paper --seeds 2`." in page

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

def test_ours_stands_below_the_paper(results):
    write(results, plan(["table1"], ONE_SEED)[0], .5)
    lines = show("table1", Grid(seeds=(1,), results=results)).splitlines()
    k = next(i for i, x in enumerate(lines) if ", the paper's |" in x)
    assert lines[k:k + 2] == ["| WeCLIP (ViT, I+L), the paper's | 74.9 | 76.4 | 75.2 | 77.2 |",
                              "| **WeCLIP, ours** | 50.0 | 50.0 | 50.0 | 50.0 |"]
    folded = lines.index("<details><summary>24 other methods, as the paper prints them</summary>")
    others = [line for line in lines[folded + 3:] if line.startswith("| ")][1:]
    assert folded > k and len(others) == 24 and "</details>" in lines

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
    files = [*(ROOT/"weclip"/"lab").glob("*.py"), *EXPERIMENTS.glob("*.ipynb")]
    said = "".join(p.read_text(encoding="utf-8") for p in files).replace("\\n", "")
    assert not [text for text in MISSING if text.strip(" |:") not in said]
