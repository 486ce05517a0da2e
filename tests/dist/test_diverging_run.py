"""Training that diverges or collapses ends the attempt with evidence, interrupted or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials
from support.attempts import assert_same_bits, history
from support.faulty_rank import FAULTS, Fault, dump

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
    "optim.divergence": {
        "enabled": True,
        "target_std": 0.0,
        "rankme": 0.0,
        "spike": 0.97,
        "patience": 1000,
    },
}


def set_runtime(
    trial: TrialDir,
    **changes: Any,
) -> None:
    config = trial.read_config()
    trial.create(replace(config, runtime=replace(config.runtime, **changes)))


def failure(trial: TrialDir) -> str:
    """Return the error that FAILED.json and the newest attempt's record both hold."""
    failed = read_json(trial.failed)
    record = trial.attempts()[-1]
    assert failed is not None
    assert failed["cause"] == record["cause"] == "diverged"
    assert failed["attempt"] == record["attempt"]
    assert failed["error"] == record["error"]
    assert record["exit"] == ExitCode.ERROR
    return failed["error"]


def write_plan(trial: TrialDir) -> None:
    """Make the trial the only one of the sweep `hot`."""
    entry = {
        "name": trial.name,
        "id": trial.read_config().id,
        "point": {},
        "seed": 0,
        "class": "c0",
        "label": "tiny s0",
        "steps": 40,
        "hours": 0.01,
        "world": 2,
    }
    plan = {
        "sweep": "hot",
        "question": "Too hot?",
        "axes": [],
        "classes": [],
        "submitted": 1,
        "trials": [entry],
    }
    sweep = trial.root.sweep("hot")
    sweep.path.mkdir(parents=True)
    write_json(sweep.plan, plan)


def tag_and_status(
    uri: str,
    tag: str,
) -> tuple[str, str]:
    """A tag of the only run in MLflow, and the status of that run."""
    query = (
        "select t.value, r.status from runs r join tags t on t.run_uuid = r.run_uuid"
        f" where t.key = '{tag}'"
    )
    (row,) = fake_trials.rows(uri, query)
    return row


def test_a_huge_learning_rate_ends_the_trial_as_diverged_with_its_evidence(
    launch: Callable,
    new_trial: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The target collapses for four steps.

    FAILED.json, the record, `why` and MLflow say so; nothing is tried again.

    Stopped in the middle of the suspicion and resumed, the same trial ends at the same step with
    the same evidence.
    """
    alone = new_trial("alone", **HUGE_RATE)
    stopped = new_trial("stopped", **HUGE_RATE)
    assert launch(alone).wait() == [ExitCode.ERROR] * 2
    spread = {row.step: row.values["target_std"] for row in read(alone).rows if row.step}
    last = max(spread)
    first = last - 3
    assert spread[first - 1] >= FLAT
    for step in range(first, last + 1):
        assert spread[step] < FLAT
    expected = (
        f"diverged at step {last}: target_std {spread[last]:.3g}, at least 0.3 expected; "
        f"suspicious since step {first}; newest checkpoint from before: step {first - 1}"
    )
    assert failure(alone).splitlines()[0] == expected
    assert alone.committed()[-1] == read(alone).settled == first - 1

    write_plan(alone)
    monkeypatch.setenv("JEPA_ROOT", str(alone.root.path))
    cli.main(["why", "hot", "0", "--json"])
    (why,) = json.loads(capsys.readouterr().out)
    assert why["state"] == "failed"
    assert why["cause"] == "diverged"
    assert why["rule"] == "not run again by itself"
    assert expected in why["evidence"]
    assert "optim.lr" in why["hint"]
    assert "optim.clip" in why["hint"]
    uri = f"sqlite:///{alone.root.path}/mlflow.db"
    assert sync.sync(alone.root, uri=uri).states == {"failed": 1}
    assert tag_and_status(uri, "jepa.cause") == ("diverged", "FAILED")
    error, _ = tag_and_status(uri, "jepa.error")
    assert expected in error
    assert max(step for _, step in fake_trials.stored(uri)[alone.name]) == first - 1

    set_runtime(stopped, stop_after=first + 1)
    assert launch(stopped).wait() == [ExitCode.DONE] * 2
    # The attempt had to leave, so it saved a suspicious step.
    assert stopped.committed()[-1] == first + 1
    set_runtime(stopped, stop_after=0)
    assert launch(stopped).wait() == [ExitCode.ERROR] * 2
    assert failure(stopped).splitlines()[0] == expected
    assert history(stopped)[:first] == history(alone)


def test_non_finite_gradients_change_no_weight_and_end_the_trial(
    launch: Callable, new_trial: Callable
) -> None:
    """With a huge weight decay every later gradient is NaN and counted, until the verdict."""
    divergence = {"enabled": True, "patience": 3}
    trial = new_trial(**{"optim.weight_decay": 1e30, "optim.divergence": divergence})
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    found = read(trial)
    skipped = [row.values.get("skipped_steps", 0) for row in found.rows]
    assert [number for number in skipped if number] == [1, 2, 3]
    events = [event["event"] for event in found.events]
    assert events.count("non_finite_step") == 3
    assert "gradient norm nan" in failure(trial)
    assert trial.attempts()[-1]["seconds"]["lost"] > 0, "no commit covers what was trained"


def test_a_probe_finds_a_collapse(launch: Callable, new_trial: Callable) -> None:
    """No slow target and a high rate: RankMe is low at the first probe of trained weights."""
    fast = {
        "optim.lr": 0.03,
        "optim.momentum": 0.01,
        "optim.final_momentum": 0.01,
        "optim.warmup_steps": 10,
        "optim.steps": 60,
        "optim.divergence": {"enabled": True, "rankme": 1.8},
        "runtime.probe_every": 20,
    }
    trial = new_trial(**fast)
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    assert failure(trial).startswith("diverged at step 20: RankMe 1.")
    assert "suspicious since step 20; no checkpoint from before" in failure(trial)
    assert "probe/rankme" in read(trial).rows[-1].values


@pytest.mark.parametrize(("rank", "code"), [(0, ExitCode.ERROR), (1, ExitCode.DONE)])
def test_all_ranks_judge_the_rankme_of_rank_0(
    launch: Callable,
    new_trial: Callable,
    tmp_path: Path,
    rank: int,
    code: ExitCode,
) -> None:
    """One rank finds other eigenvalues than the other: they end alike, as rank 0 says."""
    settings = {
        "optim.divergence": {"enabled": True, "rankme": 1.01, "target_std": 0.0},
        "runtime.probe_every": 2,
        "runtime.hang_seconds": 20.0,
    }
    trial = new_trial(**settings)
    collapse = Fault("measure", rank, "collapse", str(tmp_path / "marker"), skip=1)
    assert launch(trial, **{FAULTS: dump([collapse])}).wait() == [code] * 2
    rankme = [
        row.values["probe/rankme"] for row in read(trial).rows if "probe/rankme" in row.values
    ]
    assert (rankme[-1] == 1.0) == (rank == 0)


def suspicious_steps(
    trial: TrialDir,
    detector: DivergenceDetector,
) -> list[int]:
    """Steps at which the detector is suspicious when it observes the trial's rows."""
    steps: list[int] = []
    for row in read(trial).rows[1:]:
        detector.observe(row.step, row.values["grad_norm"], row.values["target_std"])
        if detector.suspicious_steps:
            steps.append(row.step)
    return steps


def test_a_suspicious_step_is_not_saved_and_a_kill_changes_no_judgement(
    launch: Callable, new_trial: Callable, tmp_path: Path
) -> None:
    """Every step is a milestone, but a step with a gradient above 0.97 of the mean is not saved.

    Killed in between, the trial ends with the same bits, checkpoints and state of the detector.
    """
    every = {**SUSPECTS_SOME, "runtime.milestone_every": 1}
    alone = new_trial("alone", **every)
    killed = new_trial("killed", **every)
    assert launch(alone).wait() == [0, 0]
    kills: list[Fault] = []
    for rank in range(2):
        marker = str(tmp_path / f"killed-{rank}")
        kills.append(Fault("set_lr_and_decay", rank, "SIGKILL", marker, skip=30))
    assert launch(killed, **{FAULTS: dump(kills)}).wait() == [-9, -9]
    assert launch(killed).wait() == [0, 0]
    assert killed.attempts()[1]["start_step"] > 20
    assert_same_bits(alone, killed)

    detector = DivergenceDetector(DivergenceConfig(**SUSPECTS_SOME["optim.divergence"]))
    suspicious = suspicious_steps(alone, detector)
    assert 2 < len(suspicious) < 20
    saved = set(range(1, 41)) - set(suspicious) | {40}  # the last step is always saved
    assert alone.committed() == killed.committed() == sorted(saved)
    for trial in (alone, killed):
        manifest = read_manifest(trial.checkpoint(40))
        assert isinstance(manifest, Manifest)
        assert manifest.detector == detector.state()

    step = next(step for step in suspicious if step < 39)
    later = next(step for step in range(step + 1, 41) if step not in suspicious)
    late = new_trial("late", **SUSPECTS_SOME, **{"runtime.milestones": [step]})
    assert launch(late).wait() == [0, 0]
    # A suspicious milestone is saved at the next step that is not suspicious.
    assert late.committed() == [later, 40]
