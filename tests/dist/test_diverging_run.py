"""Training that really diverges or collapses ends the attempt with its evidence, wherever it was interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from support import fake_trials
from support.attempts import assert_same_bits, history

from jepa_cluster import cli
from jepa_cluster.config import DivergenceConfig
from jepa_cluster.errors import ExitCode
from jepa_cluster.tracking import sync
from jepa_cluster.training.checkpoint_files import Manifest, read_manifest
from jepa_cluster.training.divergence import DivergenceDetector
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import read

FLAT = 0.3  # target_std below which the tiny encoder has collapsed; it begins at 0.47
HUGE_RATE = {
    "optim.lr": 1.0,
    "optim.steps": 40,
    "optim.divergence": {"enabled": True, "target_std": FLAT, "rankme": 0.0, "patience": 4},
    "runtime.milestone_every": 1,
}
SUSPECTS_SOME = {
    "optim.steps": 40,
    "optim.divergence": {"enabled": True, "target_std": 0.0, "rankme": 0.0, "spike": 0.97, "patience": 1000},
}


def set_runtime(trial: TrialDir, **changes: Any) -> None:
    config = trial.read_config()
    trial.create(replace(config, runtime=replace(config.runtime, **changes)))


def failure(trial: TrialDir) -> str:
    """What FAILED.json and the newest attempt's record say alike."""
    failed, record = read_json(trial.failed), trial.attempts()[-1]
    assert failed is not None
    assert (failed["cause"], failed["attempt"]) == ("diverged", record["attempt"])
    assert (record["cause"], record["exit"]) == ("diverged", ExitCode.ERROR)
    assert failed["error"] == record["error"]
    return failed["error"]


def test_a_huge_learning_rate_ends_the_trial_as_diverged_with_its_evidence(
    launch: Callable,
    new_trial: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target collapses for four steps. FAILED.json, the record, `why` and MLflow say so; nothing is tried again.

    Stopped in the middle of the suspicion and resumed, the same trial ends at the same step with the same evidence.
    """
    alone, stopped = new_trial("alone", **HUGE_RATE), new_trial("stopped", **HUGE_RATE)
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    spread = {row.step: row.values["target_std"] for row in read(alone).rows if row.step}
    last = max(spread)
    first = last - 3
    assert all((spread[step] < FLAT) == (step >= first) for step in range(first - 1, last + 1))
    expected = (
        f"diverged at step {last}: target_std {spread[last]:.3g}, at least 0.3 expected; "
        f"suspicious since step {first}; newest checkpoint from before: step {first - 1}"
    )
    assert failure(alone).splitlines()[0] == expected
    assert alone.committed()[-1] == read(alone).settled == first - 1

    plan = {"sweep": "hot", "question": "Too hot?", "axes": [], "classes": [], "submitted": 1}
    entry = {"name": alone.name, "id": alone.read_config().id, "point": {}, "seed": 0, "class": "c0"}
    entry |= {"label": "tiny s0", "steps": 40, "hours": 0.01, "world": 2}
    alone.root.sweep("hot").path.mkdir(parents=True)
    write_json(alone.root.sweep("hot").plan, {**plan, "trials": [entry]})
    monkeypatch.setenv("JEPA_ROOT", str(alone.root.path))
    cli.main(["why", "hot", "0", "--json"])
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["state"], said["cause"], said["rule"]) == ("failed", "diverged", "not run again by itself")
    assert expected in said["evidence"]
    assert "optim.lr" in said["hint"] and "optim.clip" in said["hint"]
    uri = f"sqlite:///{alone.root.path}/mlflow.db"
    assert sync.sync(alone.root, uri=uri).states == {"failed": 1}
    query = "select t.value, r.status from runs r join tags t on t.run_uuid = r.run_uuid where t.key = '{}'"
    assert fake_trials.rows(uri, query.format("jepa.cause")) == [("diverged", "FAILED")]
    (error,) = fake_trials.rows(uri, query.format("jepa.error"))
    assert expected in error[0]
    assert max(step for _, step in fake_trials.stored(uri)[alone.name]) == first - 1

    set_runtime(stopped, stop_after=first + 1)
    assert launch(stopped).wait() == [ExitCode.DONE] * 2
    assert stopped.committed()[-1] == first + 1, "a checkpoint of a suspicious step, since the attempt had to leave"
    set_runtime(stopped, stop_after=0)
    assert launch(stopped).wait() == [ExitCode.ERROR] * 2
    assert failure(stopped).splitlines()[0] == expected
    assert history(stopped)[:first] == history(alone)


def test_gradients_that_are_not_finite_change_no_weight_and_become_a_verdict(
    launch: Callable, new_trial: Callable
) -> None:
    """A weight decay beyond all bounds: every later gradient is NaN and counted, until the verdict."""
    divergence = {"enabled": True, "patience": 3}
    trial = new_trial(**{"optim.weight_decay": 1e30, "optim.divergence": divergence})
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    found = read(trial)
    skipped = [row.values["skipped_steps"] for row in found.rows if row.values.get("skipped_steps")]
    assert skipped == [1, 2, 3]
    assert sum(event["event"] == "non_finite_step" for event in found.events) == 3
    assert "gradient norm nan" in failure(trial)
    assert trial.attempts()[-1]["seconds"]["lost"] > 0, "no commit covers what was trained"


def test_a_probe_finds_a_collapse(launch: Callable, new_trial: Callable) -> None:
    """No slow target and a high rate: RankMe is low at the first probe of trained weights."""
    fast = {"optim.lr": 0.03, "optim.momentum": 0.01, "optim.final_momentum": 0.01, "optim.warmup_steps": 10}
    divergence = {"enabled": True, "rankme": 1.8}
    trial = new_trial(**fast, **{"optim.steps": 60, "optim.divergence": divergence, "runtime.probe_every": 20})
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    assert failure(trial).startswith("diverged at step 20: RankMe 1.")
    assert "suspicious since step 20; no checkpoint from before" in failure(trial)
    assert "probe/rankme" in read(trial).rows[-1].values


def test_a_suspicious_step_is_not_saved_and_a_kill_changes_no_judgement(launch: Callable, new_trial: Callable) -> None:
    """Gradients above 0.97 of the mean are suspicious here, and every step is a milestone: only the others are saved.

    Killed in between, the trial ends with the same bits, checkpoints and state of the detector.
    """
    every = {**SUSPECTS_SOME, "runtime.milestone_every": 1}
    alone, killed = new_trial("alone", **every), new_trial("killed", **every)
    assert launch(alone).wait() == [0, 0]
    set_runtime(killed, kill_after=30)
    assert launch(killed).wait() == [-9, -9]
    set_runtime(killed, kill_after=None)
    assert launch(killed).wait() == [0, 0]
    assert killed.attempts()[1]["start_step"] > 20
    assert_same_bits(alone, killed)

    detector = DivergenceDetector(DivergenceConfig(**SUSPECTS_SOME["optim.divergence"]))
    suspicious = []
    for row in read(alone).rows[1:]:
        detector.observe(row.step, row.values["grad_norm"], row.values["target_std"])
        if detector.suspicious_steps:
            suspicious.append(row.step)
    assert 2 < len(suspicious) < 20
    saved = [step for step in range(1, 41) if step not in suspicious or step == 40]
    assert alone.committed() == killed.committed() == saved, "the last step is saved in any case"
    for trial in (alone, killed):
        manifest = read_manifest(trial.checkpoint(40))
        assert isinstance(manifest, Manifest) and manifest.detector == detector.state()

    step = next(step for step in suspicious if step < 39)
    later = next(step for step in range(step + 1, 41) if step not in suspicious)
    late = new_trial("late", **SUSPECTS_SOME, **{"runtime.milestones": [step]})
    assert launch(late).wait() == [0, 0]
    assert late.committed() == [later, 40], "a milestone that is suspicious is saved at the next step that is not"
