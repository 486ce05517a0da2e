"""What is forgiven and how often; memory that was full; what a canary means for its class."""

from pathlib import Path
from typing import Any

import pytest
from support.fake_trials import config

from jepa_cluster.launch.cluster import cost
from jepa_cluster.launch.cluster import profile as resources
from jepa_cluster.launch.scheduler import diagnosis, facts, failures, retry_policy, slurm
from jepa_cluster.sweep.points import RETRIES
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json

FULL = {"cause": "error", "error": "torch.OutOfMemoryError: CUDA out of memory", "ended": 2, "started": 1}
LOST: dict[str, Any] = {"started": 1, "job_id": "7"}  # no end: nobody recorded why


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    made = config("vit_a", (0.15, 0.2), 0, 60)
    found = Root(tmp_path).trial(made.name)
    found.create(made)
    return found


def attempted(trial: TrialDir, *records: dict[str, Any]) -> list[dict[str, Any]]:
    for record in records:
        trial.claim(record)
    return trial.attempts()


def test_full_memory_halves_the_micro_batch_within_the_budget_and_no_more(trial: TrialDir):
    """The failure is forgotten, the recipe stays; the second time it is for a person."""
    before = trial.read_config()
    attempted(trial, FULL)
    write_json(trial.failed, {"cause": "error", "error": FULL["error"]})
    assert retry_policy.apply_retry(trial, RETRIES)
    write_json(trial.failed, {"cause": "error", "error": FULL["error"]})
    assert retry_policy.apply_retry(trial, RETRIES), "the other rank, whose memory was full in the same moment"
    after = trial.read_config()
    assert after.runtime.micro_batch == before.recipe.optim.batch // 2 and after.id == before.id
    assert not trial.failed.exists()
    attempted(trial, FULL)
    write_json(trial.failed, {"cause": "error", "error": FULL["error"]})
    assert not retry_policy.apply_retry(trial, RETRIES) and trial.failed.exists()


def test_a_broken_machine_is_forgiven_within_the_budget_of_nodes(trial: TrialDir):
    """The trial may go on elsewhere; where nobody has said how often, a person decides."""
    broken = {**FULL, "error": "RuntimeError: CUDA error: uncorrectable ECC error encountered"}
    attempted(trial, broken)
    write_json(trial.failed, {"cause": "error", "error": broken["error"]})
    assert not retry_policy.apply_retry(trial, {}) and trial.failed.exists()
    found = retry_policy.apply_retry(trial, {**RETRIES, "node": 1})
    assert found is not None and found.cause == "node" and not trial.failed.exists()
    attempted(trial, broken)
    assert not retry_policy.apply_retry(trial, {**RETRIES, "node": 1})


def test_a_user_error_is_never_relieved(trial: TrialDir):
    """Nothing about it can be changed by us."""
    attempted(trial, {**FULL, "error": "RuntimeError: a bug of the user's"})
    assert not retry_policy.apply_retry(trial, {**RETRIES, "error": 9})


@pytest.mark.parametrize(
    ("records", "over"),
    [
        ([LOST] * 5, False),  # Slurm itself brought the same job back: it costs nothing
        ([{**LOST, "job_id": str(i)} for i in range(3)], True),
        ([{**LOST, "job_id": str(i)} for i in range(2)], False),
        ([{"cause": "preempted", "ended": 1}] * 9, False),  # making room is free
        ([*({**LOST, "job_id": str(i)} for i in range(3)), {"cause": "error", "ended": 1, "forgiven": True}], False),
    ],
)
def test_what_is_tried_too_often_is_left_to_a_person(records: list[dict[str, Any]], over: bool, trial: TrialDir):
    """retries.killed is 2 here. Preemptions and Slurm's own requeues do not count, nor what `jepa retry` forgave."""
    told = retry_policy.exhausted_budget(attempted(trial, *records), {**RETRIES, "killed": 2})
    assert bool(told) == over and (not over or "retries.killed allows 2" in told)


def measured(trial: TrialDir, steps: int) -> None:
    """An attempt of these steps at half a second each, after a start of ten seconds and a probe of four."""
    seconds = {"init": 9.0, "compile": 1.0, "train": 0.3 * steps, "data": 0.2 * steps, "probe": 4.0}
    number = trial.claim({"started": 1, "world": 1})
    ended = 1 + round(1000 * sum(seconds.values()))
    trial.amend(number, {"ended": ended, "start_step": 0, "end_step": steps, "seconds": seconds})


def test_a_measured_price_has_start_and_probes_once_however_short_the_trial(tmp_path: Path, trial: TrialDir):
    """60 steps of a second, a start of 30 s, two probes of 5 s: a third of the steps costs 20 + 30 + 10 s. With a
    second trial that took twice as long a step, the mean, and a bar that reaches beyond both."""
    seconds = {"init": 20.0, "compile": 4.0, "train": 50.0, "data": 9.0, "checkpoint": 1.0, "probe": 10.0}
    trial.claim({"started": 0, "world": 1})
    record = {"started": 1, "ended": 100_001, "start_step": 0, "end_step": 60, "world": 1, "seconds": seconds}
    trial.amend(1, record)
    short = Trial({}, 0, config("vit_a", (0.15, 0.2), 0, 20), 60)
    profile = resources.load_profile(Path("local"))
    (found,) = cost.estimate_costs(Root(tmp_path), profile, [short]).values()
    assert found.basis == "measured, 1 trial" and found.hours * 3600 == pytest.approx(20 + 30 + 10)
    slow = Root(tmp_path).trial(config("vit_a", (0.15, 0.2), 1, 60).name)
    slow.create(config("vit_a", (0.15, 0.2), 1, 60))
    slow.claim({"started": 0, "world": 1})
    slow.amend(1, {**record, "ended": 160_001, "seconds": {**seconds, "train": 110.0}})
    (found,) = cost.estimate_costs(Root(tmp_path), profile, [short]).values()
    assert found.hours * 3600 == pytest.approx(70) and found.spread * 3600 > 10


def test_a_canary_measures_the_price_of_its_model_and_shape(tmp_path: Path, trial: TrialDir):
    """60 steps of 0.5 s, a start of 10 s, two probes of 4 s. Another model has its price by FLOPs."""
    root = Root(tmp_path)
    canary = root.trial(f"canary.ask-ts.A.0123456789ab.{trial.name}")
    canary.create(trial.read_config())
    measured(canary, 20)
    others = [Trial({}, 0, config(m, (0.15, 0.2), 0, 60), 60) for m in ("vit_a", "vit_c")]
    same, other = cost.estimate_costs(root, resources.load_profile(Path("local")), others).values()
    assert same.basis == "measured, 1 trial" and same.hours * 3600 == pytest.approx(60 * 0.5 + 10 + 2 * 4)
    assert cost.measured_hours(canary) == pytest.approx(same.hours) and other.basis.startswith("FLOPs")
    assert cost.measured_hours(trial) is None


def test_a_class_exceeds_the_budget_only_above_the_limit():
    """Other classes count with their own price."""
    expected = {"hours": 1.0, "cost": 10.0, "others": 5.0, "limit": 30, "unit": "GPU-h"}
    assert not cost.exceeds_budget(expected, 2.5) and "35 GPU-h" in cost.exceeds_budget(expected, 3.0)
    assert not cost.exceeds_budget({**expected, "limit": None}, 99.0)


def test_a_trial_that_left_the_queue_too_often_is_failed_until_a_person_forgives_it(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """The scheduler knows nothing more of it; three lost jobs, two allowed. `why` names the budget."""
    root, record = trial.root, {"name": "jepa.s.A.1", "trials": [trial.name], "job": "7", "submitted": 1}
    root.sweep("s").arrays.mkdir(parents=True)
    write_json(root.sweep("s").arrays / "jepa.s.A.1.json", {**record, "nodes": 1, "procs_per_node": 1})
    write_json(root.sweep("s").plan, {"retries": {**RETRIES, "killed": 2}})
    monkeypatch.setattr(slurm, "squeue", lambda names: [])  # pyright: ignore[reportUnknownLambdaType]
    monkeypatch.setattr(slurm, "sacct", lambda names, since: None)  # pyright: ignore[reportUnknownLambdaType]
    attempted(trial, *({**LOST, "job_id": str(i)} for i in range(3)))
    seen = facts.query_status(root, [trial.name]).trials[trial.name]
    assert seen.state == "failed" and "retries.killed allows 2" in seen.note
    row = {"name": trial.name, "index": 0, "state": seen.state, "note": seen.note, "label": "x"}
    assert diagnosis.explain_trial(root, "s", row)["rule"] == "retries.killed is used up"
    trial.amend(3, {"forgiven": True})
    assert facts.query_status(root, [trial.name]).states == {trial.name: "interrupted"}


def test_why_a_stopped_trial_stands_is_that_somebody_stopped_it(tmp_path: Path, trial: TrialDir):
    """Whatever its last attempt died of: it does not run again by itself."""
    trial.claim({"started": 1})
    row = {"name": trial.name, "index": 0, "state": "stopped", "note": "cancelled in Slurm: jepa resume", "label": "x"}
    found = diagnosis.explain_trial(Root(tmp_path), "s", row)
    assert (found["cause"], found["evidence"]) == ("stopped", "cancelled in Slurm: jepa resume")
    assert found["rule"] == "stays stopped until jepa resume" and found["hint"] == "jepa resume s 0"


def test_why_a_trial_without_time_to_save_says_what_is_trained_again():
    """It made room all the same, and that is free; but not with a checkpoint of its own."""
    late = {"cause": "preempted", "error": "SIGTERM: left with the commit of step 40; no time to save", "attempt": 1}
    assert "left with the commit of step 40" in failures.classify_attempt(late).summary
    assert failures.classify_attempt({**late, "error": "SIGTERM"}).summary == "preempted after saving a checkpoint"
