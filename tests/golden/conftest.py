"""`golden(name, text)`: compare with tests/golden/files/<name>, or replace it when ACCEPT is set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

FILES = Path(__file__).parent / "files"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """The test fails when the text differs from the accepted one; the message ends with the command that accepts it."""

    def compare(name: str, text: str) -> None:
        path = FILES / name
        if os.environ.get("ACCEPT"):
            path.write_text(text)
            return
        accepted = path.read_text() if path.exists() else ""
        if text != accepted:
            lines = difflib.unified_diff(accepted.splitlines(), text.splitlines(), "accepted", "now", lineterm="")
            command = f"ACCEPT=1 python -m pytest {request.node.nodeid}"
            pytest.fail("\n".join([*lines, "", f"if this is what you meant to change: {command}"]), pytrace=False)

    return compare
