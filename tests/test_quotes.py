"""What the pages quote of the paper: numbers of equations, sections, tables and references, the letters of shapes."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT/"nbs").rglob("*.ipynb")) + sorted((ROOT/"experiments").glob("*.ipynb")) + [ROOT/"README.md"]
CITED = {
    "CLIP-ES": {29}, "GradCAM": {29, 41}, "AFA": {39}, "Sinkhorn": {42}, "ToCo": {40}, "MCTformer": {52},
    "reproduced by": {33}}
SECTIONS = {"1", "2.1", "2.2", "3.1", "3.2", "3.3", "3.4", "4.1", "4.2", "4.3", "4.4", "4.5", "5"}
PRINTED = {  # as in the paper, blanks apart
    1: r"F^l_{new} = W^1_{fc}(\mathrm{ReLU}(W^2_{fc}(F^l_{init})))",
    3: r"P = \mathrm{Conv}(\phi(F_u))\uparrow",
    4: r"A_f = \mathrm{Sigmoid}(F_u^T F_u)",
    5: r"S^l = \sum_{i=1}^{hw}\sum_{j=1}^{hw} A_f(i,j) - A_s^l(i,j)",
    7: r"R = \frac{A_f}{N_m}\sum_{l=1}^{N} G^l_e A_s^l",
    8: r"M_f^c = (\frac{R_{nor} + R_{nor}^T}{2})^{\alpha} \cdot M_\mathrm{init}^c",
    9: r"\hat A = \mathrm{Oh}(M_p)^T\mathrm{Oh}(M_p)",
    10: r"\mathcal{L} = \mathcal{L}_{ce}(P, M_p\uparrow) + \lambda\mathcal{L}_{ce}(A_f, \hat A)"}

def text(page):
    if page.suffix != ".ipynb": return page.read_text(encoding="utf-8")
    return "\n\n".join("".join(c["source"]) for c in json.loads(page.read_text(encoding="utf-8"))["cells"])

def numbered(page):
    "Displayed equations with a number: (number, formula)."
    for shown in re.findall(r"\$\$(.+?)\$\$", text(page), re.S):
        for formula, number in re.findall(r"(.+?),?\s*\\qquad\s*\\text\{\((.+?)\)\}", shown, re.S):
            yield number, formula

def plain(formula):
    "Without blanks and the sizes of brackets."
    return re.sub(r"\\[,;! ]|\\[Bb]ig|\s", "", formula)

def test_references_have_their_numbers():
    "GradCAM was cited as [33], which is Dataset Diffusion, of Table 7."
    wrong = []
    for page in PAGES:
        for name, numbers in CITED.items():
            for cited in re.findall(rf"{name}(?:, \w+'\d\d)? \[([\d, ]+)\]", text(page)):
                if not {int(n) for n in cited.split(",")} <= numbers:
                    wrong.append(f"{page.name}: {name} [{cited}]")
    assert not wrong

def test_gradcam_is_of_section_3_3():
    "It stood as §3.2, which is the decoder."
    lines = [f"{page.name}: {line}" for page in PAGES for line in text(page).splitlines()]
    assert not [line for line in lines if re.search(r"GradCAM|\bCAMs?\b", line) and "§3.2" in line]

def test_numbers_are_of_the_paper():
    "Ten equations, five figures, seven tables, five chapters."
    wrong = []
    for page in PAGES:
        said = text(page)
        pairs = re.findall(r"\bEqs?\. ?\(?(\d+)\)?(?:(?:-| and |, )\(?(\d+)\b)?", said)
        found = {
            "equations": {int(n) for pair in pairs for n in pair if n} - set(range(1, 11)),
            "tables": {int(n) for n in re.findall(r"\bTables? (\d+)", said)} - set(range(1, 8)),
            "figures": {int(n) for n in re.findall(r"\bFig(?:\.|ures?) (\d+)", said)} - set(range(1, 6)),
            "sections": set(re.findall(r"§(\d(?:\.\d)?)", said)) - SECTIONS}
        wrong += [f"{page.name}: {kind} {sorted(numbers)}" for kind, numbers in found.items() if numbers]
    assert not wrong

def test_equations_are_as_printed_and_numbered_once():
    """Eq. (7) stood with its sum up to N_m, and the paper was blamed for it; Eq. (8) carried its number twice, once
    with a mask that it does not print; Eq. (10) stood with and without its arrow."""
    wrong = []
    for page in PAGES:
        found = [*numbered(page)]
        numbers = [number for number, _ in found]
        if len(numbers) != len(set(numbers)):
            wrong.append(f"{page.name}: a number twice in {numbers}")
        wrong += [f"{page.name}: ({n}) is more than a number" for n in numbers if not n.isdecimal()]
        for number, formula in found:
            printed = PRINTED.get(int(number)) if number.isdecimal() else None
            if printed and plain(formula) != plain(printed):
                wrong.append(f"{page.name}: ({number}) {formula}")
    assert not wrong

def test_every_equation_is_shown():
    shown = {int(n) for page in PAGES for n, _ in numbered(page)}
    assert shown == set(range(1, 11))

def test_pairs_are_counted_by_k():
    "P is the prediction; the (image, tag) pairs had the same letter."
    wrong = []
    for page in PAGES:
        outside = re.sub(r"\$\$.+?\$\$|\$[^$\n]+\$", "", text(page), flags=re.S)
        wrong += [f"{page.name}: {line}" for line in re.findall(r"\(P\b.*|\bP \(?(?:image|pairs).*", outside)]
    assert not wrong
