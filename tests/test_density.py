"""How dense code may be: at most 120 columns (100 on the pages of the method) and one statement a line, for readers."""
import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DONE = ("nbs", "nbs/0_tour", "nbs/1_method", "nbs/2_data", "nbs/3_world", "nbs/4_engine", "nbs/5_use", "nbs/6_lab", "nbs/7_speed", "experiments")
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
        is_text = any(isinstance(s, (ast.List, ast.Tuple, ast.JoinedStr)) or isinstance(s, ast.Constant) and isinstance(s.value, str) for s in sides)
        is_bool = any(isinstance(s, (ast.Compare, ast.BoolOp)) or isinstance(s, ast.UnaryOp) and isinstance(s.op, ast.Not) for s in sides)
        if is_text and is_bool:
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

RULES = {
    "x = 1; y = 2": "two statements in one line",
    "for x in y: print(x)": "a block in one line; only `if ...: raise / return / continue / break` may be",
    "if x: y = 1": "a block in one line; only `if ...: raise / return / continue / break` may be",
    "a, b = 1, 2": "two assignments in one line",
    "a = b = 1": "two assignments in one line",
    "f'{a if b else c}'": "a condition or a comprehension inside an f-string",
    "a if b else (c if d else e)": "a conditional expression in another",
    "'s'*(n > 1)": "a text or list times a truth value"}

@pytest.mark.parametrize("code", RULES)
def test_rules_find(code): assert [what for _, what in faults(code, 120)] == [RULES[code]]

@pytest.mark.parametrize("code", ["a, b = b, a", "a, b = f(x)", "def f(x): return x + 1", "x = (m > 0)*y", "if x:\n    y = 1\nelse:\n    y = 2"])
def test_rules_allow(code): assert not list(faults(code, 120))

def pages():
    return [nb for folder in DONE for nb in sorted((ROOT/folder).glob("*.ipynb"))]

def test_pages_can_be_read_aloud():
    found = []
    for nb in pages():
        columns = 100 if nb.parent.name == "1_method" else 120
        for cell in json.loads(nb.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                found += [f"{nb.name} {cell['id']}:{line}: {what}" for line, what in faults("".join(cell["source"]), columns)]
    assert not found, "\n".join(found)
