"""benchmarks/resume_drill.py: copies of a trial, one of them killed, have the same bits."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jepa_cluster.config import TrialConfig
from jepa_cluster.trial.directory import Root, TrialDir

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import resume_drill  # noqa: E402


@pytest.mark.slow  # make gpu runs it, too
def test_a_drill_of_a_trial_prints_that_no_bit_differs(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """Two kills of two ranks; the trial itself gets no attempt."""
    config = tiny_config(**{"optim.steps": 8})
    trial = Root(tmp_path).trial_of(config)
    trial.create(config)
    script = str(BENCHMARKS / "resume_drill.py")
    command = [sys.executable, script, str(trial.path), "--steps", "6", "--kills", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "second copy: all ranks are killed after step 4" in done.stdout
    assert "rows are identical after 3 attempts, resumed from" in done.stdout
    assert done.stdout.rstrip().endswith("PASSED")
    assert trial.attempts() == []


def test_kills_are_at_distinct_steps_between_start_and_end() -> None:
    """As many as asked for, or as many as there are steps."""
    for start, length, count in itertools.product((0, 7), range(1, 14), range(6)):
        kills = resume_drill.kill_steps(start, start + length, count)
        assert len(kills) == min(count, length - 1)
        assert kills == sorted(set(kills))
        assert set(kills) <= set(range(start + 1, start + length))


def two_copies(config: TrialConfig, folder: Path) -> list[TrialDir]:
    """Two trials of one config, in the roots `alone` and `killed`."""
    trials: list[TrialDir] = []
    for name in ("alone", "killed"):
        trial = Root(folder / name).trial_of(config)
        trial.create(config)
        trials.append(trial)
    return trials


KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("codes", "problem"),
    [
        ([[0, 0], [KILLED, KILLED], [KILLED, 76], [0, 0]], ""),
        (
            [[0, 0], [KILLED, KILLED], [0, 0]],
            "the copy was not killed after step 4; it ended with exit codes 0, 0",
        ),
        (
            [[0, 0], [KILLED, KILLED], [KILLED, KILLED], [1, 76]],
            "the copy that was killed ended with exit codes 1, 76",
        ),
        ([[75, 75]], "the copy that was not interrupted ended with exit codes 75, 75"),
    ],
    ids=["as planned", "no kill", "an error", "^C"],
)
def test_a_drill_that_did_not_go_as_planned_gives_the_reason(
    codes: list[list[int]], problem: str, tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """The exit codes of each attempt give the reason why there is no verdict."""
    alone, killed = two_copies(tiny_config(), tmp_path)
    seen: list[tuple[str, int | None]] = []

    def attempt(trial: TrialDir, kill_after: int | None) -> list[int]:
        seen.append((trial.root.path.name, kill_after))
        return codes[len(seen) - 1]

    found = resume_drill.train_copies(alone, killed, [2, 4], attempt, lambda line: None)
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
    planned = [("alone", None), ("killed", 2), ("killed", 4), ("killed", None)]
    assert seen == planned[: len(codes)]


def test_copies_without_the_checkpoint_are_not_compared(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """No verdict is neither passed nor failed, and has a reason."""
    copies = two_copies(tiny_config(), tmp_path)
    found = resume_drill.compare(copies[0], copies[1], 6)
    problem = "no checkpoint of step 6 in copy alone and killed"
    assert found == {"passed": None, "problem": problem}
    assert resume_drill.describe(found) == f"no verdict: {problem}"
