"""Tables in a terminal of 80 columns: one line per row, whatever the labels."""

import os
import pty
import struct
import subprocess
import sys
from contextlib import suppress
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ

import pytest
from rich.console import Console
from rich.text import Text
from support import fake_trials

from jepa_cluster.cli import table
from jepa_cluster.trial.directory import Root

LABELS = [f"a_model_with_a_name_of_a_lab ts=.15-.2 ta=.75-1.5 lr=.0005 s{n}" for n in range(3)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Make a sweep of three models, two mask axes, and labels as long as those of a lab."""
    root = Root(tmp_path)
    trials = fake_trials.sweep(
        root,
        "mask_by_size",
        scales=fake_trials.SCALES[:2],
        aspects=fake_trials.ASPECTS,
        steps=(20, 40),
    )
    for number, trial in enumerate(trials):
        if number % 5:
            fake_trials.run(trial, every=20, kill=number % 7 == 0)
    return tmp_path


def in_terminal(
    folder: Path,
    *words: str,
    width: int = 80,
) -> list[str]:
    """Return the lines that jepa prints in a terminal of this width, and 24 lines."""
    leader, terminal = pty.openpty()
    ioctl(terminal, TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    command = [sys.executable, "-m", "jepa_cluster", *words, "--root", str(folder)]
    child = subprocess.Popen(command, stdout=terminal, stderr=terminal)
    os.close(terminal)
    printed = b""
    with suppress(OSError):  # the end, on Linux
        while piece := os.read(leader, 65536):
            printed += piece
    os.close(leader)
    assert child.wait() == 0, printed.decode()
    lines = printed.decode().split("\r\n")
    return [Text.from_ansi(line).plain for line in lines]


@pytest.mark.parametrize(
    "words", [("status",), ("scaling", "--offline")], ids=["status", "scaling"]
)
def test_a_trial_is_one_line_of_80_columns(
    root: Path,
    words: tuple[str, ...],
):
    verb, *options = words
    lines = in_terminal(root, verb, "mask_by_size", *options)
    assert max(len(line) for line in lines if not line.startswith(("page: ", "picture: "))) <= 80
    assert [line for line in lines if "vit_b ts=.15-.2 ta=.75-1.5 steps=20 s0" in line]


def shown(
    monkeypatch: pytest.MonkeyPatch,
    width: int,
    optional: tuple[str, ...] = ("class", ">loss"),
    note: str = "",
) -> list[str]:
    """Return the lines of a table with long labels at this width."""
    made = Console(width=width)
    monkeypatch.setattr(table, "console", lambda: made)
    heads = ("trial", "class", "state", ">loss", "note")
    rows = [[label, "c0", "done", "0.3413", note] for label in LABELS]
    with made.capture() as printed:
        made.print(table.one_line_table(heads, rows, "trial", optional))
    return printed.get().splitlines()


def test_empty_columns_and_then_optional_ones_are_left_out(monkeypatch: pytest.MonkeyPatch):
    heads = [shown(monkeypatch, width)[0].split() for width in (120, 80, 72)]
    assert heads == [
        ["trial", "class", "state", "loss"],
        ["trial", "state", "loss"],
        ["trial", "state"],
    ]


def test_a_long_label_is_cut_in_its_middle(monkeypatch: pytest.MonkeyPatch):
    lines = shown(monkeypatch, 50)
    assert max(map(len, lines)) <= 50
    assert lines[1].startswith("a_model_with_a_name_o…")
    assert [line.split()[-2] for line in lines[1:]] == ["s0", "s1", "s2"]


def test_a_label_without_room_is_left_out_where_it_is_optional(monkeypatch: pytest.MonkeyPatch):
    assert shown(monkeypatch, 14, ("trial", "class", ">loss"))[0].split() == ["state"]


def test_a_long_note_is_cut_before_a_label(monkeypatch: pytest.MonkeyPatch):
    """Optional columns give way to twenty characters of it."""
    note = "RuntimeError: " + "a bug of the user's " * 9
    for width in (160, 100):
        lines = shown(monkeypatch, width, note=note)
        assert max(map(len, lines)) == width
        assert LABELS[1] in lines[2]
        assert lines[2].endswith("…")
    assert lines[0].split() == ["trial", "state", "loss", "note"]
