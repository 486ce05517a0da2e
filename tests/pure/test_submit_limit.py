"""A limit on jobs in the queue: a part of a sweep is submitted, and the rest is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jepa_cluster import cli
from jepa_cluster.trial.directory import Root

PROFILE = """
kind: slurm
partition: gpu
cpus_per_proc: 2
time: 1h
"""
# sbatch accepts as many tasks as the file `room` says, and squeue shows those as waiting.
PROGRAM = f"""\
#!{sys.executable}
import re, sys
from pathlib import Path

here = Path(__file__).parent
name = Path(__file__).name
queue = here / "queue"
if name == "sbatch":
    text = Path(sys.argv[-1]).read_text()
    array = re.search(r"--array=0-(\\d+)", text)
    tasks = int(array[1]) + 1 if array else 1
    job = re.search(r"--job-name=(\\S+)", text)[1]
    rows = queue.read_text().splitlines()
    if len(rows) + tasks > int((here / "room").read_text()):
        sys.exit("sbatch: error: AssocMaxSubmitJobLimit\\n"
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy "
            "(job submit limit, user's size and/or time limits)")
    number = len(rows) + 1
    for task in range(tasks):
        id = f"{{number}}_{{task}}" if array else number
        rows.append(f"{{id}}|{{job}}|PENDING|Priority|||N/A|(null)")
    queue.write_text("".join(row + "\\n" for row in rows))
    print(number)
elif name == "squeue":
    print(queue.read_text(), end="")
"""


@pytest.fixture
def set_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], object]:
    """Install the programs of a Slurm that accepts so many tasks of this user."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "queue").touch()
    for name in ("sbatch", "squeue", "scontrol", "scancel", "sinfo"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    (folder / "mine.yaml").write_text(PROFILE)
    return lambda tasks: (programs / "room").write_text(str(tasks))


def test_a_part_of_a_sweep_is_submitted_and_the_rest_at_the_next_submit(
    folder: Path, set_room: Callable[[int], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two arrays of two trials, where three may wait, then none more, then all."""

    def submit() -> tuple[int, str]:
        code = cli.main(["submit", "ask.yaml", "--cluster", "mine.yaml", "--yes"])
        printed = capsys.readouterr()
        return code, " ".join((printed.out + printed.err).split())

    sweep = Root(folder / "root").sweep("ask")
    set_room(3)
    code, text = submit()
    assert code == 0
    assert "started 3 trials; 1 trial more than Slurm accepts in the queue, submit again" in text
    submitted = arrays(sweep.arrays)
    assert sorted(map(len, submitted.values())) == [1, 2]

    code, text = submit()
    assert code != 0
    assert "nothing was submitted: sbatch: " in text
    assert "AssocMaxSubmitJobLimit" in text
    assert "hint: submit again when some of your jobs have ended" in text
    assert arrays(sweep.arrays) == submitted
    assert len(list(sweep.intents.iterdir())) == len(submitted)

    set_room(9)
    code, text = submit()
    assert code == 0
    assert "started 1 trial" in text
    names = [name for trials in arrays(sweep.arrays).values() for name in trials]
    assert sorted(names) == sorted(trial["name"] for trial in sweep.planned())


def arrays(folder: Path) -> dict[str, Any]:
    """Return the trials of each array that was submitted."""
    found: dict[str, Any] = {}
    for file in folder.iterdir():
        found[file.name] = json.loads(file.read_text())["trials"]
    return found
