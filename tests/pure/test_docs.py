"""Links of the documentation resolve, and docs/where-is-what.md names functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]+)(?:#[^)]*)?\)")


def names_in(path: Path) -> set[str]:
    """Return the names of functions and classes, and of methods as Class.method."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    names.add(f"{node.name}.{member.name}")
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_to_files_resolve(page: Path) -> None:
    for _, target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_functions_of_the_five_walks_are_in_the_linked_files() -> None:
    page = REPO / "docs" / "where-is-what.md"
    links = LINK.findall(page.read_text())
    assert len(links) >= 10
    for name, target in links:
        assert name in names_in((page.parent / target).resolve()), (name, target)
