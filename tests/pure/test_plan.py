"""What a trial of a plan still needs."""

import pytest

from jepa_cluster.launch.submit.plan import remaining_gpu_hours
from jepa_cluster.records import PlannedTrial


@pytest.mark.parametrize(
    ("begins", "step", "gpu_hours"),
    [
        (0, 0, 8.0),
        (0, 25, 6.0),
        (0, 100, 0.0),
        (80, 0, 8.0),  # a branch that has not begun: its estimate is that of its own 20 steps
        (80, 90, 4.0),
        (80, 100, 0.0),
    ],
)
def test_a_trial_needs_the_part_of_its_estimate_that_is_left(
    begins: int, step: int, gpu_hours: float
):
    """It has four processes for two hours. A branch trains only the steps after its begin."""
    trial: PlannedTrial = {
        "name": "x",
        "id": "x",
        "label": "x",
        "point": {},
        "seed": 0,
        "class": "A",
        "world": 4,
        "steps": 100,
        "hours": 2.0,
        "trunk": "trunk" if begins else None,
        "begins": begins,
    }
    assert remaining_gpu_hours(trial, step) == pytest.approx(gpu_hours)
