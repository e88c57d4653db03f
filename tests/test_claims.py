"""What the README and the pages of experiments/ show and say is what the stored results give.

Intervals and verdicts are computed once more, by another path; every page whose numbers need no model is executed again
and compared with what is stored; what pages say in words is a function of the results, one a page. A page that nobody
holds, or that two functions hold, fails.
"""
import ast
import base64
import csv
import math
import re
from collections import Counter
from contextlib import chdir
from functools import cache
from io import BytesIO
from statistics import mean, stdev

import pytest
from PIL import Image
from hypothesis import assume, given, strategies as st
from scipy.stats import ttest_rel

from test_properties import settings  # their profile
from test_tables import EXPERIMENTS, ROOT, cells, write
from weclip.machine import code_digest
from weclip.method.classes import COCO, SCENES, SCENES12, VOC
from weclip.method.config import preset
from weclip.method.seams import own_settings
from weclip.data.voc import open_data
from weclip.world.scenes import write_scenes
from weclip.beyond.rfm_plus import plus_loss
from weclip.engine.weights import build
from weclip.engine.train import train
from weclip.engine.infer import evaluate
from weclip.engine.job import open_training
from weclip.lab import claims
from weclip.lab.claims import (
    CLAIMS, VERDICTS, Answer, Cell, Claim, Effect, answer_table, answers, effect_table, in_points, interval,
    row_effects, scores_of, tally, verdict)
from weclip.lab.paper import TABLE4, TABLE5, TABLE6, WECLIP
from weclip.lab.plan import (
    BEYOND, FEW, SHORT, SIZES, SUCCESSORS, TABLES, Grid, asked, plan, run_config, table_seeds)
from weclip.lab.results import (
    in_text, keep_run, keep_table, kept_arrays, kept_rows, read_results, read_rows, result_file)

RESULTS = EXPERIMENTS/"results"
GRID = Grid(results=RESULTS)
PAGES = sorted(path.stem for path in EXPERIMENTS.glob("*.ipynb"))
assert settings

# ---- intervals and verdicts, whatever the numbers

points = st.integers(-50_000, 50_000).map(lambda n: n/1000)

@st.composite
def two_rows(draw):
    seeds = draw(st.lists(st.integers(1, 9), min_size=2, max_size=6, unique=True))
    return tuple({seed: draw(points) for seed in seeds} for _ in range(2))

@st.composite
def effects(draw):
    low, high = sorted((draw(points), draw(points)))
    return Effect((low + high)/2, low, high, 3)

@given(effects(), st.integers(1, 9_000).map(lambda n: n/1000))
def test_every_interval_has_one_of_four_verdicts(ours, size):
    holds = dict(zero=ours.low <= 0 <= ours.high, size=ours.low <= size <= ours.high)
    cases = (ours.low > 0, holds["zero"] and not holds["size"], ours.high < 0, holds["zero"] and holds["size"])
    assert sum(cases) == 1 and verdict(ours, size) == VERDICTS[cases.index(True)]
    without = verdict(ours)
    assert without == ("undecided" if cases[1] else verdict(ours, size))

def test_one_seed_decides_nothing():
    told = [verdict(interval({1: a}, {1: 50.}), 3.) for a in (10., 50., 51., 90.)]
    assert told == ["undecided"]*4

@given(two_rows(), points)
def test_an_interval_moves_with_its_rows(rows, shift):
    a, b = rows
    ours = interval(a, b)
    moved = interval({seed: x + shift for seed, x in a.items()}, b)
    assert moved[:3] == pytest.approx([x + shift for x in ours[:3]], abs=1e-6)
    turned = interval(b, a)
    assert turned[:3] == pytest.approx((-ours.mean, -ours.high, -ours.low), abs=1e-6)
    other_order = interval(dict(reversed(a.items())), {**b, 99: 7.})  # a seed of one row alone is not read
    assert other_order == ours

@given(two_rows())
def test_intervals_are_those_of_the_paired_t_test(rows):
    a, b = rows
    differences = [a[seed] - b[seed] for seed in a]
    assume(max(differences) - min(differences) > .01)
    other = ttest_rel([*a.values()], [*b.values()]).confidence_interval(.95)
    assert interval(a, b)[1:3] == pytest.approx((other.low, other.high), abs=1e-6)

# ---- answers by hand

def test_answers_of_invented_runs(tmp_path):
    "Differences 19.5, 20 and 20.5 with, then without a third seed of one row; a table that nobody has run."
    grid = Grid(seeds=(1, 2, 3), results=tmp_path)
    for run in plan(["table4"], grid):
        miou = .3 + run.seed/200 if "refine" in run.settings else .49 + run.seed/100
        write(tmp_path, run, miou)
    helps, = answers(grid, "table4")
    assert helps.verdict == "same direction" and helps.ours.seeds == 3 and helps.ours.mean == pytest.approx(20)
    assert helps.ours.high - 20 == pytest.approx(4.3027*.5/3**.5, abs=1e-3)
    line = "| refinement (RFM) helps | Table 4 | +6.2 | +20.0 | +18.8 to +21.2 | 3 | same direction |"
    assert answer_table([helps]).splitlines()[-1] == line
    assert {a.verdict for a in answers(grid, "table6")} == {"not measured"}
    assert answers(grid._replace(seeds=(1,)), "table4")[0].verdict == "undecided"

def test_a_profile_without_some_tables_has_no_answers_of_them(tmp_path):
    assert {a.verdict for a in answers(Grid("coco", results=tmp_path))} == {"not measured"}

def test_rows_are_compared_with_the_first(tmp_path):
    "A row that is the first's run is left out; another evaluation, which nobody has made, is not measured."
    grid = Grid(seeds=(1, 2), results=tmp_path)
    for run in plan(["differences"], grid):
        miou = .4 if "differences: weight decay 1e-3" in run.used_by else .505
        if not any(score.settings for score in run.scores):
            write(tmp_path, run, miou + run.seed/100)
    for run in plan(["table2", "refining_maps_over_time"], grid):
        if "differences: released code" in run.used_by:
            write(tmp_path, run, .51 + run.seed/50)
    found = {a.claim.text: a for a in row_effects("differences", grid)}
    assert "COCO in batches of 8" not in found and "released code" not in found
    assert found["weight decay 1e-3"].ours.mean == pytest.approx(-12.5)
    assert found["own size"].verdict == "not measured"

def test_a_kept_table_answers_by_seed(tmp_path):
    grid = Grid(results=tmp_path)
    keep_table("labels", grid, ["", "seed 2", "seed 1"], [["10 %", "48.00", "47.00"], ["end", "50.00", "50.00"]])
    claim = Claim("labels improve", "Figure 3", Cell("labels", "end"), Cell("labels", "10 %"), None)
    found, missing = answers(grid, [claim, claim._replace(behind=Cell("labels", "static"))])
    assert found.ours[::3] == (2.5, 2) and missing.verdict == "not measured"

def test_claims_are_of_the_paper_and_told_apart():
    front = [claim for claim in CLAIMS if claim.front]
    assert len(front) <= 12 and len({claim.text for claim in CLAIMS}) == len(CLAIMS)
    printed = {table: {row.label: row.paper for row in TABLES[table].rows} for table in TABLES}
    odd = []
    for claim in CLAIMS:
        if claim.paper is None: continue
        ahead, behind = (printed[cell.table][cell.row][cell.column] for cell in (claim.ahead, claim.behind))
        if claim.paper <= 0 or claim.paper != round(ahead - behind, 1):
            odd.append(claim)
    assert not odd

# ---- the stored results

@cache
def had_results():
    return read_results(RESULTS, plan())

@pytest.fixture(scope="session")
def committed():
    "The grid of the committed results, which have to be of this code."
    had = had_results()
    stale = [name for name, found in had.items() if isinstance(found, str) and found.startswith("stale")]
    if stale:
        pytest.fail(f"{len(stale)} of {len(had)} committed results were made by other code, the first is {stale[0]}: "
                    f"{had[stale[0]]}. Renew them: `weclip tables --rerun-stale`", pytrace=False)
    return GRID

@pytest.fixture(scope="session")
def complete(committed):
    "The same, with every run of the plan."
    had = had_results()
    lost = {name: found for name, found in had.items() if isinstance(found, str)}
    if lost:
        name, why = next(iter(lost.items()))
        pytest.fail(f"{len(lost)} of {len(had)} runs have no result, the first is {name}: {why}. "
                    "Fill them: `weclip tables`", pytrace=False)
    unkept = [name for name in ("compactness", "figure5") if kept_rows(name, committed)[2]]
    if unkept or kept_arrays("figure5", committed)[1]:
        pytest.fail("Figure 5 is not kept, and its page would train a network: `weclip tables figure5`", pytrace=False)
    of_beyond = ("beyond-steps", "beyond-classes", "beyond-affinities", "beyond-halves")
    if any(kept_rows(name, committed, *SUCCESSORS)[2] for name in of_beyond):
        pytest.fail("The steps of `beyond` are not kept, and its page would compute them: `weclip tables beyond`",
                    pytrace=False)
    return committed

def test_every_run_of_the_scenes_is_committed(complete): pass

def test_stored_tables_open_in_one_line():
    "As pandas would read them: one header of different names, lines of its length, numbers where numbers belong."
    files = sorted(RESULTS.glob("*.csv"))
    odd = [file.name for file in RESULTS.iterdir() if file.suffix not in (".csv", ".npz", ".png", ".lock")]
    for file in files:
        head, *lines = csv.reader(file.read_text(encoding="utf-8").splitlines())
        if len(set(head)) != len(head) or {len(line) for line in lines} != {len(head)}:
            odd.append(f"{file.name}: two columns of one name, or lines that are longer or shorter than the header")
        scores = [k for k, name in enumerate(head) if name == "miou" or name.startswith("iou: ")]
        odd += [f"{file.name}: {line[k]!r}" for line in lines for k in scores if line[k] and not is_percent(line[k])]
        counts = [k for k, name in enumerate(head) if name in ("seed", "pictures", "iterations", "learnable")]
        odd += [f"{file.name}: {line[k]!r}" for line in lines for k in counts if not line[k].isdigit()]
    assert not odd and {"scenes.csv", "scenes12.csv"} <= {file.name for file in files}

def is_percent(text): return math.isfinite(float(text)) and 0 <= float(text) <= 100

def test_stored_results_are_whole_sorted_and_of_one_code(tmp_path):
    for profile in "scenes", "scenes12":
        file = result_file(RESULTS, profile)
        rows, damaged = read_rows(file)
        assert rows and not damaged
        assert code_digest() in {row["code"] for row in rows} <= {code_digest(), code_digest(*SUCCESSORS)}
        again = tmp_path/file.name
        again.write_bytes(file.read_bytes())
        keep_run(again, [row for row in rows if row["run"] == rows[0]["run"]])
        assert again.read_bytes() == file.read_bytes(), f"{file.name} is not as it is written"

def test_stored_results_know_what_they_serve():
    "And no row belongs to a run that no table asks for."
    serves = {run.name: "; ".join(run.used_by) for run in plan()}
    rows = [row for profile in ("scenes", "scenes12") for row in read_rows(result_file(RESULTS, profile))[0]]
    odd = {row["run"]: row["serves"] for row in rows if row["serves"] != serves.get(row["run"])}
    assert not odd

# ---- the same numbers by another path

def by_hand(cell):
    "Scores of a claim's cell by seed: from the rows that serve its line, or from a table that a page has kept."
    if cell.table not in TABLES:
        with open(RESULTS/f"{cell.table}-scenes.csv", encoding="utf-8") as file:
            row = next(row for row in csv.DictReader(file) if row[""] == cell.row)
        return {int(name.split()[1]): float(x) for name, x in row.items() if name.startswith("seed ")}
    table = TABLES[cell.table]
    row, = [row for row in table.rows if row.label == cell.row and row.settings is not None]
    score = asked(table, row, GRID)[cell.column]
    wanted = dict(split=score.split, prediction=score.mode, evaluation=in_text(score.settings))
    found = {}
    with open(RESULTS/"scenes.csv", encoding="utf-8") as file:
        for stored in csv.DictReader(file):
            is_served = f"{cell.table}: {cell.row}" in stored["serves"].split("; ")
            if is_served and all(stored[name] == value for name, value in wanted.items()):
                found[int(stored["seed"])] = float(stored["miou"])
    return found

def told_by_hand(claim):
    "What stands behind a claim in a table of answers: paper, ours, interval, seeds, verdict."
    paper = "no number" if claim.paper is None else f"{claim.paper:+.1f}"
    ahead, behind = map(by_hand, (claim.ahead, claim.behind))
    seeds = sorted(ahead.keys() & behind.keys())
    if not seeds: return [paper, "–", "– to –", "0", "not measured"]
    test = ttest_rel([ahead[seed] for seed in seeds], [behind[seed] for seed in seeds])
    low, high = test.confidence_interval(.95)
    holds_paper = claim.paper is None or low <= claim.paper <= high
    told = "undecided" if holds_paper or len(seeds) == 1 else "paper's size excluded"
    if low > 0 or high < 0:
        told = "same direction" if low > 0 else "opposite"
    mean = sum(ahead[seed] - behind[seed] for seed in seeds)/len(seeds)
    ends = " to ".join(map(in_points, (low, high)))
    return [paper, in_points(mean), ends, str(len(seeds)), told]

def line_of(claim, told): return "| " + " | ".join([claim.text, claim.where, *told]) + " |"

def answer_line(claim): return line_of(claim, told_by_hand(claim))

TURNED = {"same direction": "higher", "opposite": "lower"}

def effect_line(claim):
    "The line of a row of which the paper says nothing."
    _, *told, outcome = told_by_hand(claim)
    return line_of(claim, [*told, TURNED.get(outcome, outcome)])

def test_answers_by_another_path(committed):
    "Every claim of the list and every row of the page of differences, as far as there are results."
    everything = [*answers(committed), *row_effects("differences", committed), *row_effects("beyond", committed)]
    found = [a for a in everything
             if a.claim.ahead.table in TABLES or not kept_rows(a.claim.ahead.table, committed)[2]]
    odd = []
    for a in found:
        is_claim = a.claim in CLAIMS
        line = (answer_table if is_claim else effect_table)([a]).splitlines()[-1]
        by_hand = answer_line(a.claim) if is_claim else effect_line(a.claim)
        if line != by_hand:
            odd.append((line, by_hand))
    assert not odd and len(found) > 30

# ---- what the stored pages show

NEED_MODELS = ("01_run",)

def shown(cell):
    "Markdown or text that a cell shows as stored; None: a picture, or nothing."
    outputs = [o["data"] for o in cell["outputs"] if "data" in o]
    for kind in "text/markdown", "text/plain":
        texts = ["".join(data[kind]) for data in outputs if kind in data and "image/png" not in data]
        if texts: return texts[-1]
    return None

def run_cell(source, names):
    "Execute a cell; what its last line gives."
    *body, last = ast.parse(source).body
    is_shown = isinstance(last, ast.Expr)
    exec(compile(ast.Module(body if is_shown else [*body, last], []), "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if is_shown else None

def executed_again(page, out):
    "Cells of a page with the text that they give now, and the page's claims; nothing is trained or written."
    names = {}
    outputs = []
    with chdir(EXPERIMENTS):
        for cell in cells(f"{page}.ipynb"):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "write_text" in source: continue
            made = run_cell(source, names)
            names["out"] = str(out)  # where neither runs nor models are found
            stored = shown(cell)
            if stored is not None or isinstance(made, str):
                outputs.append((source, stored, str(made) if hasattr(made, "_repr_markdown_") else repr(made)))
    return outputs, [*CLAIMS, *(a.claim for a in names.get("found", ()) if isinstance(a, Answer))]

@pytest.fixture(scope="session")
def again(complete, tmp_path_factory):
    "Page -> `executed_again`, without drawing forests and the like."
    with pytest.MonkeyPatch.context() as patch:
        for name in "forest", "side_by_side":
            patch.setattr(claims, name, lambda *drawn: None)
        out = tmp_path_factory.mktemp("no")/"runs"
        return {page: executed_again(page, out) for page in PAGES if page not in NEED_MODELS}

def test_stored_pages_show_what_their_code_gives(again):
    odd = []
    for page, (outputs, _) in again.items():
        for source, stored, made in outputs:
            if source.startswith(("STAGES", "BLOCKS")): continue  # tell which models are here
            if stored != made:
                odd.append(f"{page}: {source.splitlines()[-1]}")
    assert not odd

def printed_answers(text):
    "The lines of a text's tables of answers."
    return [line for line in text.splitlines() if line.startswith("| ") and line.strip(" |").endswith(
        (*VERDICTS, "higher", "lower", "not measured"))]

def test_the_block_of_the_readme(complete):
    block = (ROOT/"README.md").read_text(encoding="utf-8").split("results -->")[1]
    front = [claim for claim in CLAIMS if claim.front]
    assert printed_answers(block) == [answer_line(claim) for claim in front]
    assert tally([Answer(claim, None, told_by_hand(claim)[-1]) for claim in CLAIMS]) in block
    assert "experiments/results/claims-scenes.png" in block and (RESULTS/"claims-scenes.png").is_file()

DRAWS = ("forest(", "side_by_side(", "quantise(")

def test_stored_figures_are_pictures_wide_enough_to_read(complete):
    "And no cell that draws has stored the text `<Figure ...>`; the list of colours is as narrow as its words."
    odd = []
    for page in PAGES:
        for cell in cells(f"{page}.ipynb"):
            last = "".join(cell["source"]).rstrip().splitlines()[-1:]
            if cell["cell_type"] != "code" or not last or not any(name in last[0] for name in DRAWS): continue
            pictures = [o["data"]["image/png"] for o in cell["outputs"] if "image/png" in o.get("data", {})]
            widths = [Image.open(BytesIO(base64.b64decode("".join(picture)))).width for picture in pictures]
            if len(widths) != 1 or (min(widths) < 900 and "legend(" not in last[0]):
                odd.append(f"{page}: {last[0]}: {widths}")
    assert not odd

def test_commands_name_tables_that_there_are():
    names = {*TABLES, "results"}
    texts = {file: file.read_text(encoding="utf-8") for file in (ROOT/"README.md", *ROOT.glob("nbs/*/*.ipynb"))}
    texts |= {EXPERIMENTS/page: words(page) for page in PAGES}
    odd = [f"{file.name}: {name}" for file, text in texts.items()
           for told in re.findall(r"`?weclip tables ([\w ]*)", text) for name in told.split() if name not in names]
    assert not odd

def test_parameters_name_the_profiles_that_a_page_takes():
    wanted = {page: " | ".join(TABLES[page].profiles) for page in PAGES if page in TABLES}
    odd = [page for page, profiles in wanted.items()
           if not any(f"# data set: {profiles}" in "".join(cell["source"]) for cell in cells(f"{page}.ipynb"))]
    assert not odd

def test_every_printed_answer_is_that_of_the_results(again):
    "By the other path, wherever a page prints the answer to a claim."
    odd = []
    count = 0
    for page, (outputs, asked_here) in again.items():
        known = {(claim.text, claim.where): claim for claim in asked_here}
        for source, stored, _ in outputs:
            if not source.startswith(("answer_table(", "effect_table(")): continue
            expected = effect_line if source.startswith("effect_table(") else answer_line
            lines = printed_answers(stored or "")
            count += len(lines)
            if not lines:
                odd.append(f"{page}: no answers are stored")
            for line in lines:
                claim = known[tuple(part.strip() for part in line.strip("|").split(" | ")[:2])]
                if line != expected(claim):
                    odd.append(f"{page}: {line}")
    assert not odd and count > 2*len(CLAIMS)

# ---- what the pages say: of the paper and the settings, then of the results

SAYS = []   # (page, function of its words)
FOUND = []  # (page, function of its words and the grid)

def says(page): return lambda check: SAYS.append((page, check)) or check
def found(page): return lambda check: FOUND.append((page, check)) or check

def words(page):
    return "\n\n".join("".join(c["source"]) for c in cells(f"{page}.ipynb") if c["cell_type"] == "markdown")

def percents(values): return [f"{x:.1f}" for x in values]
def in_order(values, text): return re.search(r".*?".join(map(re.escape, values)), text, re.S) is not None

@cache
def runs_of(table): return plan([table])

def config_of(table): return run_config(runs_of(table)[0])
def lengths_of(*tables): return sorted({run_config(run).iters for table in tables for run in runs_of(table)})

def visits(iterations, batch, pictures): return f"{iterations*batch/pictures:.1f} times"

@says("01_run")
def _(text):
    parameters = "".join(cells("01_run.ipynb")[2]["source"])
    train_size, val, _ = SIZES
    return {"as many scenes as in the tables": in_order([f"train = {train_size}", f"val = {val}"], parameters)}

@says("table1")
def _(text):
    row = WECLIP["table1"]
    first, second = (percents([row[split], row[f"{split} + CRF"]]) for split in ("val", "test"))
    return {"numbers": in_order([first[0], second[0], first[1], second[1]], text)}

@says("table2")
def _(text): return {"numbers": in_order([*percents(WECLIP["table2"].values()), f"{len(COCO.classes)} classes"], text)}

@says("table3")
def _(text):
    hours, memory = WECLIP["table3"].values()
    return {"numbers": in_order([f"{hours} hours", f'"{memory}G"'], text),
            "in GiB": f"its {memory} are {memory*1e9/2**30:.1f} GiB" in text}

@says("table4")
def _(text): return {"numbers": all(x in text for x in percents(TABLE4.values()))}

@says("table5")
def _(text): return {"numbers": in_order(percents(TABLE5.values()), text)}

@says("table6")
def _(text):
    cfg = config_of("table6")
    return {"numbers": in_order(percents(TABLE6.values()), text),
            "switch": f"first {cfg.switch:,} of {cfg.iters:,} iterations" in text,
            "maps": in_order([f"last {cfg.n_static} attention maps", f"with attention take the last {cfg.n_dynamic}."],
                             text)}

@says("table7")
def _(text):
    million, val, test = WECLIP["table7"].values()
    return {"numbers": in_order([f"{million} M", f"{val} %", f"{test} %"], text)}

@says("figure3")
def _(text): return {"stages": "as it was after a part of the training and at its end" in text}

@says("figure4")
def _(text): return {"what is shown": in_order(["three best", "three around the median", "three worst"], text)}

@says("figure5")
def _(text): return {"the last block that the decoder reads": f"block {config_of('table1').n_feats}" in text}

@says("results")
def _(text): return {"no number of results in words": not re.search(r"\d points", text)}

@says("seeds")
def _(text): return {"no number of results in words": not re.search(r"\d points", text)}

@says("differences")
def _(text):
    paper = preset("voc")
    return {"switch of the code": f"{paper.switch + 1:,}th of {paper.iters:,}" in text,
            "seeds": f"three seeds after {config_of('differences').iters} iterations" in text}

@says("depth_and_overfitting")
def _(text):
    cfg = config_of("depth_and_overfitting")
    paper = preset("voc")
    long = config_of("table5")
    return {"the paper's visits": in_order(["10,582", visits(paper.iters, paper.bs, 10_582)], text),
            "Table 5's": in_order(["12,800", visits(long.iters, long.bs, SIZES[0])], text),
            "here": in_order([f"/ {FEW[0]}", visits(cfg.iters, cfg.bs, FEW[0])], text)}

@says("refining_maps_over_time")
def _(text):
    lengths = lengths_of("refining_maps_over_time", "table6")
    last = config_of("table6")
    return {"lengths": in_order([f"runs of {lengths[0]}", f"of {lengths[1]:,}", f"of {lengths[2]:,}"], text),
            "switch": f"after {100*last.switch//last.iters} %" in text}

@says("beyond")
def _(text):
    changed = {label: dict(settings) for label, settings, _ in BEYOND}
    boxes = changed["surgery CAM, its boxes"]["box_thr"]
    late = own_settings(plus_loss)["self_from"]
    lines = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][1:]
    return {"every row is told": lines == [*changed][1:],
            "boxes": f"{boxes} of its maximum, where the paper has {config_of('beyond').box_thr}" in text,
            "self labels": f"in the last {round(100*(1 - late))} % of the training" in text,
            "pictures": "all 500 pictures of val" in text}

def signed(ours):
    "A difference as a page would say it, with signs."
    return f"{in_points(ours.mean)} points ({ends(ours)})"

def ends(ours): return f"{in_points(ours.low)} to {in_points(ours.high)}"
def unsigned(ours):
    "A difference as a page would say it, without signs."
    near, far = sorted((abs(ours.low), abs(ours.high)))
    return f"{abs(ours.mean):.1f} points ({near:.1f} to {far:.1f})"

def centre(values): return mean(values.values())
def scatter(values): return stdev(values.values())

def verdicts(table, grid):
    "Claim -> its answer, for those that ask about a table."
    return {a.claim.text: a for a in answers(grid, table)}

@found("table1")
def _(text, grid):
    val, test = (verdicts("table1", grid)[f"DenseCRF adds, {split}"] for split in ("val", "test"))
    return {"val and test": in_order([signed(val.ours), "on val", signed(test.ours), "on test"], text),
            "more than the paper's": val.ours.mean > val.claim.paper and test.ours.mean > test.claim.paper,
            "both": {val.verdict, test.verdict} == {"same direction"},
            "narrow": max(a.ours.high - a.ours.low for a in (val, test)) < 1}

@found("table2")
def _(text, grid):
    seven = scores_of("differences", grid)["released code", "val"]
    return {"seven classes at its length": f"score {centre(seven):.1f} ± {scatter(seven):.1f} " in text,
            "the same runs but for the classes": lengths_of("table2") == lengths_of("differences")
                                                 and TABLES["table2"].sizes == TABLES["differences"].sizes
                                                 and len(seven) == len(table_seeds(TABLES["table2"])) == 3}

@found("table4")
def _(text, grid):
    helps, = answers(grid, "table4")
    score = scores_of("table4", grid)
    rows = "decoder", "decoder + RFM"
    labels = [centre(score[row, "pseudo labels"]) for row in rows]
    above = [centre(score[row, "val"]) - x for row, x in zip(rows, labels)]
    return {"verdict": helps.verdict == "same direction" and signed(helps.ours) in text,
            "far more": helps.ours.low > 2*helps.claim.paper,
            "labels": in_order([f"{x:.1f} %" for x in labels], text.split("On the scenes the")[1]),
            "above its labels": min(above) > 0 and f"by {above[0]:.1f} and by {above[1]:.1f} points" in text}

@found("table5")
def _(text, grid):
    depths = "1 layer", "2 layers", "4 layers", "5 layers"
    told = [verdicts("table5", grid)[f"three layers beat {depth}"] for depth in depths]
    four, five = (f"from {ends(a.ours)}" for a in told[2:])
    return {"all hold zero": all(a.ours.low <= 0 <= a.ours.high for a in told),
            "excluded": [a.verdict for a in told] == ["undecided"]*2 + ["paper's size excluded"]*2,
            "intervals": in_order([four, five], text)}

@found("table6")
def _(text, grid):
    told = verdicts("table6", grid)
    affinity = told["affinity adds to attention"]
    both = told["affinity and filter add to attention"]
    on_attention = told["the filter G adds to attention"]
    on_both = told["the filter G adds to affinity and attention"]
    alone = told["attention beats affinity alone"]
    score = scores_of("table6", grid)
    learnt, fixed = ([scatter(score[row, "val"]) for row in rows]
                     for rows in (("A_f", "A_f A_s", "A_f G A_s"), ("A_s", "G A_s")))
    return {"affinity": affinity.verdict == "same direction" and signed(affinity.ours) in text,
            "with the filter": both.verdict == "same direction" and signed(both.ours) in text,
            "filter": on_both.verdict == "undecided" and f"from {ends(on_both.ours)}" in text,
            "filter on attention": on_attention.verdict == "opposite" and unsigned(on_attention.ours) in text,
            "alone": alone.verdict == "paper's size excluded" and f"(from {ends(alone.ours)})" in text,
            "paper": in_order([f"+{a.claim.paper}" for a in (affinity, both)], text.split("The decoder's affinity")[1]),
            "maps": config_of("table6").n_static == 8 and config_of("table6").n_dynamic == 6,
            "scatter": min(learnt) > max(fixed) and in_order(
                [f"by {min(learnt):.1f} to {max(learnt):.1f} points", f"{min(fixed):.1f} to {max(fixed):.1f}"], text)}

@found("table7")
def _(text, grid):
    masks, = answers(grid, "table7")
    of_masks, of_tags = (scatter(scores_of(table, grid)["WeCLIP", "val"]) for table in ("table7", "table1"))
    return {"verdict": masks.verdict == "same direction" and signed(masks.ours) in text,
            "more than twice": masks.ours.low > 2*masks.claim.paper,
            "scatter": f"{of_masks:.1f} points with masks, {of_tags:.1f} with tags" in text and 5*of_masks < of_tags}

@found("refining_maps_over_time")
def _(text, grid):
    score = scores_of("table6", grid) | scores_of("refining_maps_over_time", grid)
    def ours(column):
        return [interval(score[f"A_f G A_s{length}", column], score[f"A_s{length}", column])
                for length in (", 300 iterations", ", 1,000 iterations", "")]
    predictions = ours("val")
    labels = ours("pseudo labels")
    return {"verdicts": [verdict(x) for x in predictions] == ["opposite", "undecided", "same direction"],
            "sizes": in_order(
                [unsigned(predictions[0]), f"from {ends(predictions[1])}", unsigned(predictions[2])], text),
            "labels": all(x.low <= 0 < x.mean for x in labels)
                      and "by {:.1f}, {:.1f} and {:.1f} points".format(*(x.mean for x in labels)) in text}

@found("differences")
def _(text, grid):
    answered = row_effects("differences", grid)
    off = [a for a in answered if a.verdict in ("higher", "lower")]
    best = answered[0]
    count = f"one of the {len(answered)} intervals lies off zero"
    return {"one": [a.claim.text for a in off] == ["plain cross-entropy"] and count in text,
            "its size": f"costs {unsigned(off[0].ours)}" in text,
            "the largest gain": best.claim.text == "affinity loss: cross-entropy",
            "its interval": in_order([in_points(best.ours.mean), f"from {in_points(best.ours.low)} to "
                                      f"{in_points(best.ours.high)}"], text)}

def cells_by_class(label):
    "Class -> IoU of a row's predictions on val, in percent, in the mean over its seeds; by hand from the stored rows."
    with open(RESULTS/"scenes.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if f"beyond: {label}" in line["serves"].split("; ")
                 and (line["split"], line["prediction"]) == ("val", "ms")]
    names = [name for name in lines[0] if name.startswith("iou: ") and lines[0][name]]
    return {name.removeprefix("iou: "): mean(float(line[name]) for line in lines) for name in names}

def kept_lines(name, grid):
    "Label -> texts of a table that the page beyond the paper keeps."
    return {label: numbers for label, *numbers in kept_rows(name, grid, *SUCCESSORS)[1]}

def side_of_0(text):
    "Is an interval, as the page keeps it, `+0.8 (+0.6 to +0.9)`, on one side of 0? 1: above, -1: below, 0: neither."
    low, high = map(float, re.search(r"\((\S+) to (\S+)\)", text).groups())
    return (low > 0) - (high < 0)

@found("beyond")
def _(text, grid):
    answered = [{a.claim.text: a for a in row_effects("beyond", grid, column)} for column in ("val", "pseudo labels")]
    val, labels = ({row: a.ours for row, a in of_column.items()} for of_column in answered)
    decided = {row: tuple(of_column[row].verdict for of_column in answered) for row in val}
    measured = {"surgery CAM": ("lower", "undecided"),  # predictions, labels
                "surgery CAM, its boxes": ("lower", "lower"),
                "softmax on the CAM": ("undecided", "undecided"),
                "softmax, Dice": ("undecided", "undecided"),
                "softmax, Dice, self labels": ("undecided", "undecided"),
                "second backbone": ("lower", "undecided"),
                "cosine affinity, per batch": ("lower", "undecided"),
                "cosine affinity, per picture": ("lower", "undecided"),
                "distribution affinity of CLIP": ("lower", "lower"),
                "distribution affinity of the decoder": ("lower", "lower"),
                "superpixels vote": ("undecided", "undecided"),
                "softmax, superpixels vote": ("undecided", "undecided")}
    surgery, boxes, softmax, dice, plus, second, of_batch, cosine, distribution, decoders, votes, best = measured
    told = {row: in_order(sizes, text) for row, sizes in (
        (surgery, [f"costs {unsigned(val[surgery])}", f"({ends(labels[surgery])})"]),
        (boxes, [f"{unsigned(val[boxes])} with its own boxes"]),
        (softmax, [signed(val[softmax]), signed(labels[softmax])]),
        (dice, [signed(val[dice]), signed(labels[dice])]),
        (plus, [signed(val[plus]), signed(labels[plus])]),
        (votes, [signed(val[votes]), signed(labels[votes])]),
        (best, [signed(labels[best]), signed(val[best])]),
        (second, [f"costs {unsigned(val[second])}", signed(labels[second])]),
        (of_batch, [f"costs {unsigned(val[of_batch])}", signed(labels[of_batch])]),
        (cosine, [f"costs the same, {unsigned(val[cosine])}", signed(labels[cosine])]),
        (distribution, [f"costs {unsigned(val[distribution])}", f"labels {unsigned(labels[distribution])}"]),
        (decoders, [f"costs {unsigned(val[decoders])}", f"labels {unsigned(labels[decoders])}"]))}

    steps = kept_lines("beyond-steps", grid)
    start = float(steps[surgery][0]) - float(steps["WeCLIP"][0])
    sides = {row: side_of_0(numbers[-1]) for row, numbers in steps.items() if row in val}
    alone = kept_lines("beyond-classes", grid)
    spread = kept_lines("beyond-affinities", grid)
    car, train = (SCENES.names.index(name) for name in ("car", "train"))  # columns, the first is the share
    nothing = spread["no affinity, G A_s"]
    first, last = ([float(x) - float(y) for x, y in zip(alone[f"{kind}, surgery CAM"], alone[f"{kind}, WeCLIP"])]
                   for kind in ("initial CAM", "pseudo labels"))
    cup, lamp = (SCENES.names.index(name) for name in ("cup", "lamp"))
    def in_words(row): return steps[row][-1].replace(" (", " points (")
    halves = kept_lines("beyond-halves", grid)
    without, of_clip, of_other, both, agree = (numbers[0].split(" ± ")[0] for numbers in halves.values())

    of_paper = cells_by_class("WeCLIP")
    more = {name: x - of_paper[name] for name, x in cells_by_class(surgery).items()}
    others = [x for name, x in more.items() if name not in ("cup", "lamp")]
    helped = [name for row in (distribution, decoders) for name, x in cells_by_class(row).items() if x > of_paper[name]]
    static, *own = (f"{centre(scores_of(table, grid)[row, 'val']):.1f} %"
                    for table, row in (("table6", "A_s"), ("beyond", distribution), ("beyond", decoders)))
    of_cosine = [{name: of_paper[name] - x for name, x in cells_by_class(row).items()} for row in (of_batch, cosine)]
    worst = [sorted(less, key=less.get, reverse=True)[:2] for less in of_cosine]
    others_of_cosine = [x for less in of_cosine for name, x in less.items() if name not in ("train", "flower")]
    of_second = sorted((x - of_paper[name], name) for name, x in cells_by_class(second).items())
    less, low, high = re.findall(r"\d+\.\d", steps[decoders][-1])
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    def with_ends(effect): return f"{in_points(effect.mean)} points, {ends(effect)}"
    return told | {
        "readme": in_order(["none of twelve rows is ahead", f"costs {unsigned(val[second])}", with_ends(val[plus]),
                            with_ends(val[votes]).replace(" points", ""), f"costs {unsigned(val[surgery])}"], readme),
        "measured": {row for row, effect in val.items() if effect.seeds} == set(measured)
                    and "All twelve rows are measured" in text,
        "verdicts": {row: decided[row] for row in measured} == measured,
        "none is ahead": "higher" not in [of_val for of_val, _ in decided.values()],
        "steps": in_order([f"{start:.1f} points better", in_words(surgery)], text),
        "the cup alone starts worse": [k for k, x in enumerate(first) if x < 0 and k] == [cup],
        "classes alone": in_order([f"lost {-last[cup]:.0f} points", f"won {last[lamp]:.0f}"], text),
        "classes": in_order([f"lose {-more['cup']:.0f} points", f"gain {more['lamp']:.0f}"], text)
                   and max(map(abs, others)) < 2.2 and "within 2.1 points" in text,
        "worse than no affinity": in_order([static, *own], text) and helped == ["cup", "cup"]
                                  and f"{steps[distribution][1]} % in place of {steps['WeCLIP'][1]} %" in text,
        "the train, the flower": worst == [["train", "flower"]]*2 and in_order(
            ["loses most, {:.1f} points and {:.1f}".format(*(less["train"] for less in of_cosine)),
             "flower, {:.1f} and {:.1f}".format(*(less["flower"] for less in of_cosine)),
             f"no other class more than {max(others_of_cosine):.1f}",
             f"level, {in_words(cosine)}, and no less of the train"], text)
            and float(spread[cosine][train]) >= float(spread["WeCLIP"][train]),
        "classes of two backbones": in_order(
            ["The {1} loses most, {0:.1f} points".format(-of_second[0][0], of_second[0][1]),
             "then the {1}, {0:.1f}".format(-of_second[1][0], of_second[1][1]),
             "the {1} gains {0:.1f}".format(*of_second[-1])], text),
        "the best two": all({*sorted({*of_row} - {best}, key=lambda row: of_row[row].mean)[-2:]} == {softmax, votes}
                            for of_row in (val, labels))
                        and max(labels, key=lambda row: labels[row].mean) == best,
        "errors put right": in_order(
            [f"right {steps[softmax][3]} % of its errors in place of {steps['WeCLIP'][3]} %",
             f"With the vote it is {steps[best][3]} %, with the vote alone {steps[votes][3]} %",
             f"without an affinity it is {steps['no affinity, G A_s'][3]} %"], text),
        "halves": {side_of_0(numbers[-1]) for numbers in halves.values() if numbers[-1]} == {0} and in_order(
            [f"predicts {both} % in place of {without} % at one scale",
             halves["their mean"][-1].replace(" (", " points ("),
             f"the halves alone {of_clip} % and {of_other} %", f"agree on {agree} % of the pixels",
             "{} % and {} %".format(*(f"{centre(scores_of('beyond', grid)[row, 'val']):.1f}"
                                      for row in (second, plus)))], text),
        "spread": float(nothing[0]) < 34 and float(nothing[0]) < float(spread[distribution][0]) and in_order(
            [f"learned affinity keeps {spread['WeCLIP'][0]} %", f"{spread[decoders][0]} % stays",
             f"cosines {spread[cosine][0]} % stays"], text),
        "large objects": in_order([f"{spread[distribution][car]} % of the car is found in place of "
                                   f"{spread['WeCLIP'][car]} %", f"the train {spread[distribution][train]} % in place "
                                   f"of {spread['WeCLIP'][train]} %"], text),
        "the best alone": [row for row, side in sides.items() if side > 0] == [votes] and in_words(votes) in text,
        "the worst alone": [row for row, side in sides.items() if side < 0] == [
            distribution, decoders] and f"loses {less} points ({high} to {low})" in text
            and f"CLIP's by {steps[distribution][-1].split()[0].strip('-')} points" in text}

@found("figure3")
def _(text, grid):
    ahead, improve = answers(grid, "labels")
    label = {stage: values for (stage, _), values in scores_of("labels", grid).items()}
    rising = sum(label["end"][seed] > x for seed, x in label["40 %"].items())
    count = next(word for word, n in NUMBERS.items() if n == rising)
    return {"undecided": {ahead.verdict, improve.verdict} == {"undecided"},
            "sizes": in_order([signed(ahead.ours), signed(improve.ours)], text),
            "seeds": f"rise for {count} of the five seeds" in text and len(label["end"]) == 5,
            "above the initial CAM's": centre(label["static"]) > centre(label["initial"]) + 20}

@found("figure5")
def _(text, grid):
    compact, neighbours = answers(grid, "compactness")
    _, lines, _ = kept_rows("figure5", grid)
    nearest = {name: float(accuracy.split(" ± ")[0]) for name, _, accuracy in lines}
    ahead = {block: nearest[f"classifier, block {block}"] - nearest[f"CLIP, block {block}"] for block in (3, 9, 11, 12)}
    return {"silhouettes": compact.verdict == "undecided" and f"by {compact.ours.mean:.1f} hundredths" in text,
            "all are negative": all(float(x.split(" ± ")[0]) < 0 for _, x, _ in lines),
            "neighbours": neighbours.verdict == "opposite" and f"for {-neighbours.ours.mean:.1f} points more" in text,
            "by block": min(ahead[9], ahead[11], ahead[12]) > 4 and f"in block 3 for {ahead[3]:.1f} more" in text}

@found("depth_and_overfitting")
def _(text, grid):
    score = scores_of("depth_and_overfitting", grid)
    labels = [row.label for row in TABLES["depth_and_overfitting"].rows]
    gaps = {}
    for label in labels:
        on_others = score[label, "val, one scale"]
        gaps[label] = {seed: x - on_others[seed] for seed, x in score[label, "training pictures, one scale"].items()}
    wider = {label: interval(gaps[label], gaps["1 layer"]) for label in labels[1:]}
    off = [label for label, ours in wider.items() if ours.low > 0 or ours.high < 0]
    fall = interval(score["3 layers", "val"], score["5 layers", "val"])
    size = round(TABLE5[3] - TABLE5[5], 1)
    return {"three layers": off == ["3 layers"] and f"by {wider['3 layers'].mean:.1f} points over one" in text,
            "the fall is excluded": fall.high < size and fall.low < 0 < fall.high and f"fall of {size} points" in text}

def test_every_page_is_held_once():
    count = Counter(page for page, _ in SAYS)
    assert {page: count[page] for page in [*PAGES, *count]} == dict.fromkeys(PAGES, 1)
    assert max(Counter(page for page, _ in FOUND).values()) == 1

def false_claims(checks, *given):
    return [f"{page}: {what}" for page, check in checks for what, holds in check(words(page), *given).items()
            if not holds]

def test_what_the_pages_say_of_paper_and_settings(): assert not false_claims(SAYS)

def test_what_the_pages_say_of_finished_tables(committed):
    finished = [(page, check) for page, check in FOUND if TABLES[page].length == SHORT]
    assert len(finished) == 4 and not false_claims(finished, committed)

def test_what_the_pages_say_of_the_results(complete): assert not false_claims(FOUND, complete)

def test_no_page_speaks_of_bounds_and_resolved_pairs():
    "Words of a test that is gone: against a bound, of all pairs of rows."
    odd = [f"{page}: {word}" for page in PAGES for word in ("resolved", "Not resolved", "bound for")
           if word in words(page)]
    assert not odd

# ---- what differs from the paper's setting

NUMBERS = {"one": 1, "two": 2, "three": 3, "five": 5, "seven": 7, "twelve": 12, "twenty": 20, "eighty": 80}
WHOSE = dict(results="table1", seeds="seeds", figure3="table4")  # page -> table whose runs it shows; others: their own
NOTE = re.compile(
    r"drawn pictures of (?P<classes>\w+) classes in place of (?P<photographs>\w+)'s photographs of (?P<many>\w+); .*"
    r"a decoder of width (?P<width>\d+) in place of (?P<wide>\d+); "
    r"(?P<iterations>[\d, and]+) iterations of (?P<batch>\d+) crops of (?P<crop>\d+) pixels"
    r"(?:, (?P<pictures>\d+) pictures,)? in place of (?P<paper>[\d,]+ of \d+ of \d+); "
    r"(?P<seeds>\w+) seeds?; (?P<views>\w+) fixed crops? per picture; PAR at half size; .*?\."
    r"(?: With `profile = \"(?P<profile>\w+)\"` everything is as in the released code\.|$)")

def note_of(page):
    "What a page's note says, in numbers."
    told = NOTE.search("".join(cells(f"{page}.ipynb")[1]["source"]))
    if not told: return {}
    found = {k: NUMBERS.get(text, text) for k, text in told.groupdict().items()}
    numbers = ("width", "wide", "batch", "crop")
    iterations = [int(x.replace(",", "")) for x in re.split(r", (?=\d)| and ", found.pop("iterations"))]
    return found | {k: int(found[k]) for k in numbers} | dict(iterations=iterations)

def note_by_hand(page):
    "The same from plan and presets."
    table = TABLES[WHOSE.get(page, page)]
    cfg = config_of(table.name)
    lengths = lengths_of(table.name, *(["table6"] if page == "refining_maps_over_time" else []))
    photographs = "coco" if cfg.classes == "scenes12" else "voc"
    paper = preset(photographs, "paper")
    return dict(
        classes=len((SCENES12 if cfg.classes == "scenes12" else SCENES).classes), photographs=photographs.upper(),
        many=len((COCO if photographs == "coco" else VOC).classes), width=cfg.d, wide=paper.d, iterations=lengths,
        batch=cfg.bs, crop=cfg.crop, paper=f"{paper.iters:,} of {paper.bs} of {paper.crop}",
        pictures=str(table.sizes[0]) if table.sizes == FEW else None, seeds=len(table_seeds(table)), views=cfg.views,
        profile=photographs if photographs in table.profiles else None)

def test_every_page_begins_with_what_differs():
    begin = "**Notes: what differs from the paper's setting.** On the scenes: "
    odd = []
    for page in PAGES:
        if page == "01_run": continue
        second = cells(f"{page}.ipynb")[1]
        if second["cell_type"] != "markdown" or not "".join(second["source"]).startswith(begin):
            odd.append(f"{page}: no note")
        elif page != "figure5" and note_of(page) != note_by_hand(page):
            odd.append(f"{page}: {note_of(page)}, not {note_by_hand(page)}")
    assert not odd
    assert {run_config(run).par_scale for run in plan()} == {.5} and preset("voc").par_scale == 1

# ---- from scratch

@pytest.mark.slow
def test_refinement_helps(tmp_path):
    "Three seeds on 400 scenes, 80 iterations: labels from refined CAMs against labels from the initial ones."
    root = write_scenes(tmp_path/"scenes", train=400, val=60)
    scores = {"rfm": {}, "none": {}}
    for seed in 1, 2, 3:
        for refine in scores:
            cfg = preset("scenes", seed=seed, iters=80, switch=24, warmup=15, refine=refine)
            model = build("tiny", cfg)
            data = open_training(model, root, "train")
            train(model, data, tmp_path/f"{seed}-{refine}", cache=tmp_path/"cache", progress=False)
            val = open_data(root, "val", SCENES.classes, with_masks=True, norm=cfg.norm)
            scores[refine][seed] = 100*evaluate(model, val, modes=("single",), progress=False)["single"]["miou"]
    ours = interval(scores["rfm"], scores["none"])
    assert verdict(ours, round(TABLE4["decoder + RFM"] - TABLE4["decoder"], 1)) == "same direction", (ours, scores)
