"""Docstrings are plain statements, and all that users import has one."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "bltjax"
CLAUSES = {"What", "Of", "Those", "As", "That", "How", "Whether", "Where", "Which", "If", "When"}
PUBLIC = ["api.py", "sharding.py", "vocabulary.py", *sorted((PACKAGE / "config").glob("*.py"))]


def described(path, node):
    """A line on a definition: its place, its name, the first line of its docstring."""
    place = f"{path.relative_to(PACKAGE.parent)}:{getattr(node, 'lineno', 1)}"
    first_line = (ast.get_docstring(node) or "no docstring").splitlines()[0]
    return f"{place} {getattr(node, 'name', 'module')}: {first_line}"


def test_first_lines_are_no_clauses():
    """ "What a model sees" is a riddle, "Returns the bytes that a model sees" is a statement."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first_word = re.match(r"\W*(\w*)", ast.get_docstring(node) or "")[1]
                wrong += [described(path, node)] * (first_word in CLAUSES)
    assert not wrong, "docstrings that begin with a clause:\n" + "\n".join(wrong)


def public(node):
    """Yields a module or class, and all in it that has a public name."""
    yield node
    for inner in node.body:
        is_public = not getattr(inner, "name", "_").startswith("_")
        if is_public and isinstance(inner, ast.ClassDef):
            yield from public(inner)
        elif is_public and isinstance(inner, ast.FunctionDef):
            yield inner


def test_all_that_users_import_is_documented():
    paths = [PACKAGE / name for name in PUBLIC]
    found = [(path, node) for path in paths for node in public(ast.parse(path.read_text()))]
    wrong = [described(path, node) for path, node in found if not ast.get_docstring(node)]
    assert not wrong, "public names without a docstring:\n" + "\n".join(wrong)
