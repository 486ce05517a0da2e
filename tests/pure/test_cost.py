"""The cost of trials: measured by other trials, or from FLOPs."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_trials import config

from jepa_cluster.ijepa.flops import parameters
from jepa_cluster.launch.cluster import cost, profile
from jepa_cluster.sweep.resolve import Trial, new_name
from jepa_cluster.trial.directory import Root, TrialDir

LOCAL = profile.load_profile(Path("local"))


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    settings = config("vit_a", (0.15, 0.2), 0, 60)
    trial = Root(tmp_path).trial_of(settings)
    trial.create(settings)
    return trial


def write_attempt(
    trial: TrialDir,
    steps: int,
    seconds: dict[str, float],
    outside: float = 0.0,
) -> None:
    """Write an attempt of one rank: its seconds in each phase, and those outside of all phases."""
    number = trial.claim({"started": 1, "world": 1})
    total = sum(seconds.values()) + outside
    record = {
        "ended": 1 + round(1000 * total),
        "start_step": 0,
        "end_step": steps,
        "seconds": seconds,
    }
    trial.amend(number, record)


def hour_long(model: str, steps: int) -> Trial:
    """Make a trial whose time limit is an hour."""
    made = config(model, (0.15, 0.2), 0, steps)
    return Trial(new_name({}, 0, made), {}, 0, made, 60)


# 60 steps of a second, two probes of 5 s, and a start of 30 s with the 6 s outside of phases
OUTSIDE = 6.0
SECONDS = {
    "init": 20.0,
    "compile": 4.0,
    "train": 50.0,
    "data": 9.0,
    "checkpoint": 1.0,
    "probe": 10.0,
}


def test_a_shorter_trial_costs_fewer_steps_but_the_same_start_and_probes(
    tmp_path: Path, trial: TrialDir
):
    write_attempt(trial, 60, SECONDS, OUTSIDE)
    (found,) = cost.estimate_costs(Root(tmp_path), LOCAL, [hour_long("vit_a", 20)]).values()
    assert found.basis == "measured, 1 trial"
    assert found.hours * 3600 == pytest.approx(20 + 30 + 10)


def test_two_measurements_give_their_mean_and_a_spread(tmp_path: Path, trial: TrialDir):
    """The second trial takes twice as long per step."""
    write_attempt(trial, 60, SECONDS, OUTSIDE)
    settings = config("vit_a", (0.15, 0.2), 1, 60)
    slow = Root(tmp_path).trial_of(settings)
    slow.create(settings)
    write_attempt(slow, 60, {**SECONDS, "train": 110.0}, OUTSIDE)
    (found,) = cost.estimate_costs(Root(tmp_path), LOCAL, [hour_long("vit_a", 20)]).values()
    assert found.hours * 3600 == pytest.approx(70)
    assert found.spread * 3600 > 10


def test_a_canary_measures_the_cost_of_its_model_and_shape(tmp_path: Path, trial: TrialDir):
    """It has 20 steps of 0.5 s, a start of 10 s and one probe of 4 s; a trial has two probes."""
    root = Root(tmp_path)
    canary = root.trial(f"canary.ask-ts.A.0123456789ab.{trial.name}")
    canary.create(trial.read_config())
    seconds = {
        "init": 9.0,
        "compile": 1.0,
        "train": 6.0,
        "data": 4.0,
        "probe": 4.0,
    }
    write_attempt(canary, 20, seconds)
    trials = [hour_long("vit_a", 60), hour_long("vit_c", 60)]
    same, other = cost.estimate_costs(root, LOCAL, trials).values()
    assert same.basis == "measured, 1 trial"
    assert same.hours * 3600 == pytest.approx(60 * 0.5 + 10 + 2 * 4)
    assert cost.measured_hours(canary) == pytest.approx(same.hours)
    assert other.basis.startswith("FLOPs")
    assert cost.measured_hours(trial) is None


def test_a_class_exceeds_the_budget_only_above_the_limit():
    """The cost of other resource classes counts too."""
    expected = {
        "hours": 1.0,
        "cost": 10.0,
        "others": 5.0,
        "limit": 30,
        "unit": "GPU-h",
    }
    assert not cost.budget_problem(expected, 2.5)
    assert "35 GPU-h" in cost.budget_problem(expected, 3.0)
    assert not cost.budget_problem({**expected, "limit": None}, 99.0)


def test_the_longest_save_of_trials_like_it_and_the_size_of_its_checkpoints(trial: TrialDir):
    """Weights and two moments of what is trained, and the target encoder, in four bytes each."""
    write_attempt(trial, 60, {"train": 60.0})
    trial.amend(1, {"save_seconds": 95.5})
    planned = hour_long("vit_a", 60)
    estimate = cost.estimate_costs(trial.root, profile.Profile("local"), [planned])[planned.name]
    assert estimate.save_seconds == 95.5
    recipe = planned.config.recipe
    count = parameters(recipe)
    trained, target = 3 * (count.encoder + count.predictor), count.encoder
    assert cost.checkpoint_bytes(recipe) == 4 * (trained + target)
    runtime = replace(planned.config.runtime, keep_checkpoints=3, milestones=(10, 20))
    config_with = replace(planned.config, runtime=runtime)
    assert cost.kept_checkpoints(replace(planned, config=config_with)) == 5
