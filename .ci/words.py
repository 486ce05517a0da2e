#!/usr/bin/env python3
"""List the uses of words that this project does not use, in code, comments, docs, help and tests.

    python .ci/words.py        exit with 1 when there is one

Each of them hides the actor or the action; docs/vocabulary.md has the words to use instead.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

WORDS = (
    "told", "said", "mend", "oftener", "for ever", "at work", "dealt", "a person", "somebody",
    "hangs on", "stands", "bird", "wish",
)  # fmt: skip
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".js", ".html", ".css", ".sh", ".txt")
PATTERN = re.compile(rf"\b({'|'.join(WORDS)})\b", re.IGNORECASE)


def main() -> int:
    root = Path(__file__).parents[1]
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True)
    found = 0
    for name in tracked.stdout.splitlines():
        path = root / name
        if not name.endswith(SUFFIXES) or path == Path(__file__).resolve() or not path.is_file():
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in PATTERN.finditer(line):
                print(f"{name}:{number}: '{match[0]}': {line.strip()[:100]}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
