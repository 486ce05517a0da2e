"""What a node failure and a preemption cost a real trial, in steps and in seconds."""

from collections.abc import Callable

import pytest

Scenario = Callable[[str], dict[str, float]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_power_cut_under_the_real_trainer(scenario: Scenario) -> None:
    """Only the steps since the newest commit are trained twice."""
    cost = scenario("a_power_cut_under_the_real_trainer")
    print(
        f"power cut: {cost['steps']} steps trained twice, {cost['seconds']:.0f} s between two steps"
    )
    assert cost["start"] > 0
    assert 0 <= cost["steps"] < 400


def test_a_rank_that_is_killed_while_the_other_waits_for_it(scenario: Scenario) -> None:
    """The attempt is recorded as lost, and the job requeued, before srun kills the other rank."""
    cost = scenario("a_rank_that_is_killed_while_the_other_waits_for_it")
    assert cost["start"] > 0


def test_preemption_by_the_high_partition_under_the_real_trainer(scenario: Scenario) -> None:
    """No step is lost: the checkpoint is of the step at which the ranks agreed to leave."""
    cost = scenario("preemption_by_the_high_partition_under_the_real_trainer")
    steps = cost["steps"]
    print(f"preemption: {steps} steps trained twice, {cost['seconds']:.0f} s between two steps")
    assert cost["start"] > 0
    assert cost["steps"] == 0


def test_a_stopped_trial_continues_on_another_number_of_nodes(scenario: Scenario) -> None:
    """With the history of a trial that stayed; sums are rounded differently."""
    found = scenario("a_stopped_trial_continues_on_another_number_of_nodes")
    assert found["start"] > 0
    assert found["rows"] >= 5
    assert found["difference"] < 1e-2
