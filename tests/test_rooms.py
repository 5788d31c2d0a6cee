"""The rooms of the program: which there are, and which may know of which, as the README's table says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "selfupdate").glob("*.py")}


def storeys() -> dict[str, int]:
    """Return the row of the table in which each module stands."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n| module | what it is |\n")[2]
    rows = [re.findall(r"`([a-z_0-9]+)`", row.split("|")[1]) for row in table.partition("\n\n")[0].splitlines()]
    listed = [(name, number) for number, names in enumerate(rows) for name in names]
    assert len(dict(listed)) == len(listed)
    return dict(listed)


def imports(text: str) -> set[str]:
    """Return the modules of this program that a module names, be it for its annotations alone."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == "selfupdate":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("selfupdate."):
            found.add(node.module.split(".")[1])
    return found & SOURCE.keys()


def test_each_module_is_listed_once() -> None:
    assert storeys().keys() == SOURCE.keys() - {"__init__"}


def test_imports_point_down_only() -> None:
    """No module knows of one above it, and within a row none of each other."""
    of = storeys()
    upward = [(module, other) for module in of for other in imports(SOURCE[module]) if of[other] < of[module]]
    assert upward == []
    beside = {(module, other) for module in of for other in imports(SOURCE[module]) if of[other] == of[module]}
    assert {(module, other) for module, other in beside if (other, module) in beside} == set()
