"""Links in the documentation resolve, and the functions that docs/where-is-what.md names exist there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)")


def names_in(path: Path) -> set[str]:
    """Functions, classes, and methods as Class.method."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for _, target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_functions_of_the_five_walks_are_where_the_links_say() -> None:
    page = REPO / "docs" / "where-is-what.md"
    links = LINK.findall(page.read_text())
    assert len(links) >= 10
    wrong = [(name, target) for name, target in links if name not in names_in((page.parent / target).resolve())]
    assert not wrong
