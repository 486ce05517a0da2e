"""`jepa train`, `jepa drill`, `jepa probe` as a script would call them: one document on stdout, all else on stderr."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.attempts import Ranks

from jepa_cluster.cli.training import format_result
from jepa_cluster.config import TrialConfig
from jepa_cluster.training import resume_drill
from jepa_cluster.trial.directory import Root, TrialDir


def jepa(*words: str) -> Any:
    """The document, of a command that must end well."""
    command = [sys.executable, "-m", "jepa_cluster", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_trial_is_drilled_trained_and_probed_with_a_document_each(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """The drill kills copies and leaves the trial as it was; bit by bit the same is what it says."""
    config = tiny_config(**{"optim.steps": 8})
    trial = Root(tmp_path).trial(config.name)
    trial.create(config)
    end = jepa("train", "--trial", str(trial.path))
    assert (end["cause"], end["step"], end["exit"], end["error"]) == ("done", 8, 0, "") and end["metrics"]
    assert jepa("train", "--trial", str(trial.path))["attempts"] == 1, "it is done: nothing is trained again"
    verdict = jepa(
        "drill", str(trial.path), "--steps", "6", "--kills", "2"
    )  # of a finished trial, from an earlier step
    assert verdict["passed"] is True and not verdict["differ"] and verdict["rows_identical"]
    assert (verdict["kills"], verdict["attempts"], len(verdict["resumed_from"])) == ([2, 4], 3, 2)
    assert all(0 <= begun <= kill for begun, kill in zip(verdict["resumed_from"], verdict["kills"], strict=True))
    assert (verdict["start"], verdict["end"], verdict["trial"]) == (0, 6, trial.name) and len(trial.attempts()) == 1
    (found,) = jepa("probe", str(trial.path), "--images", "64")
    assert found["trial"] == trial.name and found["step"] == 8 and 0 <= found["attentive_top1"] <= 1


def test_kills_are_at_distinct_steps_between_start_and_end() -> None:
    """As many as asked for, or as many as there are steps."""
    for start, length, count in itertools.product((0, 7), range(1, 14), range(6)):
        kills = resume_drill.kill_steps(start, start + length, count)
        assert len(kills) == min(count, length - 1) == len(set(kills)) and kills == sorted(kills)
        assert all(start < step < start + length for step in kills)


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
    """Exit codes of each attempt -> why there is no verdict. A healthy trial is never blamed."""
    config = tiny_config()
    alone, killed = (Root(tmp_path / name).trial(config.name) for name in ("alone", "killed"))
    for trial in (alone, killed):
        trial.create(config)
    seen: list[tuple[str, int | None]] = []

    def attempt(trial: TrialDir) -> list[int]:
        seen.append((trial.root.path.name, trial.read_config().runtime.kill_after))
        return codes[len(seen) - 1]

    found = resume_drill.train_copies(alone, killed, [2, 4], attempt, lambda line: None)
    assert found.startswith(problem) and bool(found) == bool(problem)
    assert seen == [("alone", None), ("killed", 2), ("killed", 4), ("killed", None)][: len(codes)]


def test_copies_without_the_checkpoint_are_not_compared(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """No verdict is neither passed nor failed, and says why."""
    config = tiny_config()
    copies = [Root(tmp_path / name).trial(config.name) for name in ("alone", "killed")]
    for trial in copies:
        trial.create(config)
    found = resume_drill.compare(copies[0], copies[1], 6)
    assert found == {"passed": None, "problem": "no checkpoint of step 6 in copy alone and killed"}
    assert format_result(found) == "no verdict: no checkpoint of step 6 in copy alone and killed"


def test_an_attempt_that_begins_at_stop_after_stops_there(
    launch: Callable[..., Ranks], new_trial: Callable[..., TrialDir]
) -> None:
    """It does not train beyond the step at which it should have stopped, and ends with exit code 0 as the first."""
    trial = new_trial(**{"runtime.stop_after": 5})
    for _ in range(2):
        assert launch(trial).wait() == [0, 0]
    assert trial.committed()[-1] == 5
    assert [(a["cause"], a["start_step"], a["end_step"]) for a in trial.attempts()] == [
        ("stopped", 0, 5),
        ("stopped", 5, 5),
    ]
