"""The fixture `golden`: compare a text with a file, or replace the file when ACCEPT is set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "files"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Call `golden(name, text)` to compare the text with tests/golden/files/<name>.

    A test fails if they differ. Its message ends with the command that accepts the change.
    """

    def compare(name: str, text: str) -> None:
        path = FILES / name
        if os.environ.get("ACCEPT"):
            path.write_text(text)
            return
        accepted = path.read_text() if path.exists() else ""
        if text == accepted:
            return
        before = accepted.splitlines()
        after = text.splitlines()
        difference = "\n".join(difflib.unified_diff(before, after, "accepted", "now", lineterm=""))
        command = f"ACCEPT=1 python -m pytest {request.node.nodeid}"
        pytest.fail(f"{difference}\n\nto accept this change: {command}", pytrace=False)

    return compare
