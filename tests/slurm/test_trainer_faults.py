"""What a node's death and a preemption cost a trial of the real trainer, in steps and in seconds."""

from collections.abc import Callable

import pytest

Scenario = Callable[[str], dict[str, float]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_power_cut_under_the_real_trainer(scenario: Scenario) -> None:
    """Only steps since the newest commit are trained twice."""
    cost = scenario("a_power_cut_under_the_real_trainer")
    print(f"power cut: {cost['steps']} steps trained twice, {cost['seconds']:.0f} s between two steps")
    assert cost["start"] > 0 and 0 <= cost["steps"] < 400


def test_preemption_by_the_high_partition_under_the_real_trainer(scenario: Scenario) -> None:
    """No step is lost: the checkpoint is of the very step at which the ranks agreed to leave."""
    cost = scenario("preemption_by_the_high_partition_under_the_real_trainer")
    print(f"preemption: {cost['steps']} steps trained twice, {cost['seconds']:.0f} s between two steps")
    assert cost["start"] > 0 and cost["steps"] == 0
