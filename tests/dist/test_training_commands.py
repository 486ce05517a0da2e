"""`jepa train`, `jepa drill`, `jepa probe` in a script: one document on stdout, no other output."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.attempts import Ranks

from jepa_cluster import cli
from jepa_cluster.cli.training import format_result
from jepa_cluster.config import TrialConfig
from jepa_cluster.training import resume_drill
from jepa_cluster.trial.directory import Root, TrialDir


@pytest.fixture
def jepa(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """jepa(*words): run a command that must succeed and return its document."""

    def run(*words: str) -> Any:
        capsys.readouterr()
        code = cli.main([*words, "--json"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return json.loads(printed.out)

    return run


def test_a_trial_is_drilled_trained_and_probed_with_a_document_each(
    jepa: Callable[..., Any], tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
    """The drill kills copies, leaves the trial unchanged and reports that the bits are equal."""
    config = tiny_config(**{"optim.steps": 8})
    trial = Root(tmp_path).trial_of(config)
    trial.create(config)
    end = jepa("train", "--trial", str(trial.path))
    assert end["cause"] == "done"
    assert end["step"] == 8
    assert end["exit"] == 0
    assert end["error"] == ""
    assert end["metrics"]
    again = jepa("train", "--trial", str(trial.path))
    assert again["attempts"] == 1, "it is done: nothing is trained again"
    # The drill is of a finished trial, from an earlier step.
    verdict = jepa("drill", str(trial.path), "--steps", "6", "--kills", "2")
    assert verdict["passed"] is True
    assert not verdict["differ"]
    assert verdict["rows_identical"]
    assert verdict["kills"] == [2, 4]
    assert verdict["attempts"] == 3
    for start, kill in zip(verdict["resumed_from"], verdict["kills"], strict=True):
        assert 0 <= start <= kill
    assert verdict["start"] == 0
    assert verdict["end"] == 6
    assert verdict["trial"] == trial.name
    assert len(trial.attempts()) == 1
    (found,) = jepa("probe", str(trial.path), "--images", "64")
    assert found["trial"] == trial.name
    assert found["step"] == 8
    assert 0 <= found["attentive_top1"] <= 1


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

    def attempt(trial: TrialDir) -> list[int]:
        seen.append((trial.root.path.name, trial.read_config().runtime.kill_after))
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
    assert format_result(found) == f"no verdict: {problem}"


def test_an_attempt_that_begins_at_stop_after_stops_there(
    launch: Callable[..., Ranks], new_trial: Callable[..., TrialDir]
) -> None:
    """It trains no step beyond `stop_after`, and exits with 0 as the first attempt did."""
    trial = new_trial(**{"runtime.stop_after": 5})
    for _ in range(2):
        assert launch(trial).wait() == [0, 0]
    assert trial.committed()[-1] == 5
    for attempt, start in zip(trial.attempts(), (0, 5), strict=True):
        assert attempt["cause"] == "stopped"
        assert attempt["start_step"] == start
        assert attempt["end_step"] == 5
