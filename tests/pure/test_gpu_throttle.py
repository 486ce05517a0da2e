"""What Slurm must change about the arrays of a sweep, so that they keep the cap of GPUs."""

import pytest

from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.launch.worker.gpu_throttle import LiveArray, decide


def live(
    states: str, parallel: int = 9, waiting: str = "", held: str = "", dependency: str = ""
) -> LiveArray:
    """Make array 7 whose trials a, b, ... are running (R), pending (P) or gone (-)."""
    trials = "abcdefgh"[: len(states)]
    slurm_states = {"R": "RUNNING", "P": "PENDING"}
    tasks: dict[str, Task] = {}
    for index, state in enumerate(states):
        if state in slurm_states:
            task = Task("7", index, "x", slurm_states[state], dependency=dependency)
            tasks[trials[index]] = task
    record = {
        "job": "7",
        "trials": list(trials),
        "nodes": 1,
        "procs_per_node": 2,
        "parallel": parallel,
        "held": list(held),
    }
    return LiveArray(record, tasks, list(waiting))


OTHER = LiveArray(
    {
        "job": "8",
        "trials": ["z"],
        "nodes": 1,
        "procs_per_node": 2,
        "parallel": 1,
    },
    {"z": Task("8", None, "y", "RUNNING")},
)


@pytest.mark.parametrize(
    ("array", "cap", "parallel", "commands"),
    [
        (live("RPP", 3), None, 3, []),
        (live("RPP", 3), 4, 1, [("update", "JobId=7", "ArrayTaskThrottle=1")]),
        (live("PP", 1), 2, 0, [("update", "JobId=7_[0,1]", "Dependency=afterany:8")]),
        (live("PP", 0, dependency="afterany:8(unfulfilled)"), 2, 0, []),
        (
            live("-P", 0, dependency="afterok:5(unfulfilled),afterany:8(unfulfilled)"),
            4,
            1,
            [
                ("update", "JobId=7", "ArrayTaskThrottle=1"),
                ("update", "JobId=7_[1]", "Dependency=afterok:5"),
            ],
        ),
        (
            live("P", 0, dependency="afterok:5(failed)"),
            2,
            0,
            [
                ("update", "JobId=7", "Dependency=afterok:5,afterany:8"),
            ],
        ),
        (live("PPP", 3, waiting="abc", held="abc"), None, 3, []),
        (live("PPP", 3, waiting="b", held="abc"), None, 3, [("release", "7_[0,2]")]),
        (
            live("PPP", 0, waiting="b", held="ab"),
            6,
            2,
            [
                ("update", "JobId=7", "ArrayTaskThrottle=2"),
                ("release", "7_[0]"),
            ],
        ),
        (
            live("PP", 0, held="a", waiting=""),
            2,
            0,
            [
                ("update", "JobId=7_[0,1]", "Dependency=afterany:8"),
                ("release", "7_[0]"),
            ],
        ),
        (live("RP", 2, held="a"), None, 2, [("release", "7_[0]")]),
    ],
)
def test_the_commands_that_change_an_array(
    array: LiveArray, cap: int | None, parallel: int, commands: list[tuple[str, ...]]
):
    """Another array runs one task of two GPUs. Values that are right are not set again."""
    (found,) = [rest for one, *rest in decide([OTHER, array], cap) if one is array]
    assert found == [parallel, commands]


def test_throttles_are_lowered_before_others_are_raised():
    """So the cap is never exceeded."""
    raised = live("PPPP", 1)
    lowered = live("PPPP", 4)
    assert [array for array, *_ in decide([raised, lowered], 10)] == [lowered, raised]
