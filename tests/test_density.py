"""How dense code may be: at most 120 columns (100 on the pages of the method) and one statement a line, for readers.

Of the pages, the tests, and the two files of the package that are written by hand. Ruff finds long lines (E501) in
the tests and semicolons (E702) in all modules. Its rule against a block in one line (E701) also refuses
`if ...: return`, so that rule and those that ruff does not have are checked here, on syntax trees.
"""
import ast
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT/"nbs").rglob("*.ipynb")), *sorted((ROOT/"experiments").glob("*.ipynb"))]
SCRIPTS = [*sorted((ROOT/"tests").glob("*.py")), ROOT/"weclip"/"__init__.py", ROOT/"setup.py"]
TEXTS = ast.List, ast.Tuple, ast.JoinedStr
SHORT = ast.Raise, ast.Return, ast.Continue, ast.Break  # may follow an `if` on its line
BLOCKS = ast.If, ast.For, ast.While, ast.With, ast.Try, ast.ExceptHandler, ast.ClassDef

def in_one_line(node):
    "The statements of a block that stand behind its colon."
    bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
    return [body[0] for body in bodies if body and body[0].lineno == node.lineno]

def is_plain_if(node):
    "`if ...: return` and its like, without an else."
    return isinstance(node, ast.If) and len(node.body) == 1 and isinstance(node.body[0], SHORT) and not node.orelse

def is_swap(node):
    "`a, b = b, a`: the same names on both sides."
    left, right = ({ast.unparse(x) for x in side.elts} for side in (node.targets[0], node.value))
    return left == right

def is_text(node): return isinstance(node, TEXTS) or isinstance(node, ast.Constant) and isinstance(node.value, str)

def is_truth(node):
    is_negation = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    return is_negation or isinstance(node, (ast.Compare, ast.BoolOp))

def crowded(node):
    "What is wrong with one node, as texts."
    if isinstance(node, BLOCKS) and in_one_line(node) and not is_plain_if(node):
        yield "a block in one line; only `if ...: raise / return / continue / break` may be"
    if isinstance(node, ast.Assign):
        both_tuples = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if len(node.targets) > 1 or both_tuples and not is_swap(node):
            yield "two assignments in one line"
    if isinstance(node, ast.JoinedStr):
        inside = [n for value in node.values for n in ast.walk(value)]
        if any(isinstance(n, (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)) for n in inside):
            yield "a condition or a comprehension inside an f-string"
    if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in ast.walk(node) if n is not node):
        yield "a conditional expression in another"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        sides = node.left, node.right
        if any(map(is_text, sides)) and any(map(is_truth, sides)):
            yield "a text or list times a truth value"

def faults(code, columns):
    "(line, what is wrong) of a piece of code."
    lines = code.split("\n")
    magic = re.compile(r"\s*[%!]")
    for number, line in enumerate(lines, 1):
        if len(line) > columns:
            yield number, f"{len(line)} columns"
    tree = ast.parse("\n".join("pass" if magic.match(line) else line for line in lines))
    for node in ast.walk(tree):
        for what in crowded(node):
            yield node.lineno, what
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if not isinstance(body, list): continue
            for first, second in zip(body, body[1:]):
                if first.end_lineno == second.lineno:
                    yield second.lineno, "two statements in one line"

NOT_PLAIN = "a block in one line; only `if ...: raise / return / continue / break` may be"
FOUND = {
    "x = 1; y = 2": "two statements in one line",
    "for x in y: print(x)": NOT_PLAIN,
    "if x: y = 1": NOT_PLAIN,
    "a, b = 1, 2": "two assignments in one line",
    "a = b = 1": "two assignments in one line",
    "f'{a if b else c}'": "a condition or a comprehension inside an f-string",
    "a if b else (c if d else e)": "a conditional expression in another",
    "'s'*(n > 1)": "a text or list times a truth value",
    f"x = {'1'*117}": "121 columns"}
ALLOWED = [
    "a, b = b, a", "a, b = f(x)", "def f(x): return x + 1", "def f(x):\n    if x: return 1", "x = (m > 0)*y",
    "if x:\n    y = 1\nelse:\n    y = 2", f"x = {'1'*116}"]

def test_the_rules_by_hand():
    told = {code: [what for _, what in faults(code, 120)] for code in [*FOUND, *ALLOWED]}
    assert told == {code: [what] for code, what in FOUND.items()} | {code: [] for code in ALLOWED}

def crowded_lines(page):
    "Faults of a page or a script, each with its place."
    columns = 100 if page.parent.name == "1_method" else 120
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb": return [f"{page.name}:{line}: {what}" for line, what in faults(text, columns)]
    cells = [(c["id"], "".join(c["source"])) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return [f"{page.name} {cell}:{line}: {what}" for cell, code in cells for line, what in faults(code, columns)]

def test_code_can_be_read_aloud():
    found = [fault for page in PAGES + SCRIPTS for fault in crowded_lines(page)]
    assert not found, "\n".join(found)
