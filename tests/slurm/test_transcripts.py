"""docs/transcripts.md shows what the commands print: made here, and compared here.

Two transcripts are the same when they differ only in times, ids, nodes, amounts of disk and line
breaks.
"""

import os
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "transcripts.md"
ACCEPT = "ACCEPT=1 python -m pytest tests/slurm/test_transcripts.py"
HEAD = f"""\
# What you type and what you see

Made by a test, not typed: a private Slurm of two nodes (slurm/testcluster), the real command line,
and a stub in place of the trainer.
`{ACCEPT}` makes this page again.
"""
BEFORE = {
    "jepa doctor --node": (
        "Is this cluster as its profile says? (The disk is this small machine's.)"
    ),
    "jepa plan ask.yaml": "What would it cost? Nothing is changed.",
    "jepa submit ask.yaml --yes": "",
    "jepa status ask": (
        "A little later: the first trial of each class has a bug, the second runs, the third waits."
    ),
    "jepa why ask model=vit_ti seed=0": "",
}
CHANGING = (  # what may differ between two runs
    (r"\b[0-9a-f]{7,16}\b", "<id>"),
    (r"\b[\d.]+\s+[kMGT]B\b", "<size>"),
    (r"<?(\d+(\.\d+)?e-\d+|\d+\.\d+)", "<number>"),
    (r"\bline \d+|job \d+|\b\d+_\d\b|[+-]\d+ s\b", "<count>"),
    (r"\bn[12]\b", "<node>"),  # Slurm chooses one of two equal nodes
    (r"(\$JEPA_ROOT) on \w+", r"\1"),
    (r"(?m)^(ok|NO)(\s+free disk.*?<size>).*$", r"\2"),
    (r"\s+", " "),
)


def without_changing(text: str) -> str:
    for pattern, instead in CHANGING:
        text = re.sub(pattern, instead, text)
    return text


def page(transcripts: dict[str, str]) -> str:
    parts = [HEAD, f"```yaml\n# ask.yaml\n{transcripts['ask.yaml']}```\n"]
    for command, introduction in BEFORE.items():
        if introduction:
            parts.append(f"{introduction}\n")
        parts.append(f"```console\n$ {command}\n{transcripts[command]}```\n")
    return "\n".join(parts)


def test_the_transcripts_in_docs_are_what_the_commands_print(transcripts: dict[str, str]) -> None:
    """plan, submit, status, why and doctor on a real Slurm print docs/transcripts.md."""
    made = page(transcripts)
    if os.environ.get("ACCEPT"):
        PAGE.write_text(made)
    kept = PAGE.read_text()
    hint = f"the commands print something else now; if it is right:\n{ACCEPT}"
    assert without_changing(kept) == without_changing(made), hint
