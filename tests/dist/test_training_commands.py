"""`jepa train`, `jepa probe` in a script: one document on stdout, no other output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.attempts import Ranks

from jepa_cluster import cli
from jepa_cluster.config import TrialConfig
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


def test_a_trial_is_trained_and_probed_with_a_document_each(
    jepa: Callable[..., Any], tiny_config: Callable[..., TrialConfig], tmp_path: Path
) -> None:
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
    (found,) = jepa("probe", str(trial.path), "--images", "64")
    assert found["trial"] == trial.name
    assert found["step"] == 8
    assert 0 <= found["attentive_top1"] <= 1


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


def test_a_self_test_that_fails_is_printed_and_not_the_end_of_the_attempt_before(
    tiny_config: Callable[..., TrialConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(**{"runtime.device": "cuda"})
    trial = Root(tmp_path).trial_of(config)
    trial.create(config)
    trial.claim({"started": 1, "launch": "earlier"})
    trial.end_attempt(1, {"cause": "preempted", "ended": 2, "error": "of the attempt before"})
    code = cli.main(["train", "--trial", str(trial.path), "--json"])
    end = json.loads(capsys.readouterr().out)
    assert (code, end["exit"], end["cause"], end["attempts"]) == (76, 76, "node", 1)
    assert "torch sees no GPU here" in end["error"]
