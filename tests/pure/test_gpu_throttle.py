"""Throttles, holds and dependencies of the arrays of one sweep, without a Slurm."""

from pathlib import Path

import pytest
from support.fake_trials import config

from jepa_cluster.launch.scheduler import facts, slurm
from jepa_cluster.launch.scheduler.facts import StatusSnapshot
from jepa_cluster.launch.scheduler.slurm import Task
from jepa_cluster.launch.worker import gpu_throttle
from jepa_cluster.launch.worker.gpu_throttle import LiveArray, decide
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.status import TrialStatus


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
def test_slurm_is_asked_to_change_only_what_is_not_right_yet(
    array: LiveArray, cap: int | None, parallel: int, commands: list[tuple[str, ...]]
):
    """Another array runs one task of two GPUs."""
    (found,) = [rest for one, *rest in decide([OTHER, array], cap) if one is array]
    assert found == [parallel, commands]


def test_arrays_are_lowered_before_others_are_raised():
    """So the cap is never exceeded."""
    raised = live("PPPP", 1)
    lowered = live("PPPP", 4)
    assert [array for array, *_ in decide([raised, lowered], 10)] == [lowered, raised]


STEP = 40
ARRAY = "jepa.forked.A.00000001"


@pytest.fixture
def trunk(tmp_path: Path) -> TrialDir:
    """Make a trunk and one array with two branches that begin at a step of it and are held."""
    root = Root(tmp_path)
    made = config("vit_a", (0.15, 0.2), 0, 60)
    trunk = root.trial_of(made)
    trunk.create(made)
    folder = root.sweep("forked")
    folder.arrays.mkdir(parents=True)
    record = {
        "name": ARRAY,
        "job": "7",
        "trials": ["x", "y"],
        "nodes": 1,
        "procs_per_node": 1,
        "held": ["x", "y"],
        "branches": {"x": [trunk.name, STEP], "y": [trunk.name, STEP]},
        "parallel": 2,
        "submitted": 1,
    }
    write_json(folder.array(ARRAY), record)
    return trunk


def pending(reason: str = "(JobHeldUser)") -> list[Task]:
    return [Task("7", index, ARRAY, "PENDING", reason) for index in (0, 1)]


def states_of_trunks(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Let Slurm and the files say that every trunk is in this state."""

    def query_status(root: Root, names: set[str]) -> StatusSnapshot:
        return StatusSnapshot({name: TrialStatus(state) for name in names})

    monkeypatch.setattr(facts, "query_status", query_status)


@pytest.mark.parametrize(
    ("state", "waiting"),
    [
        ("running", ["x", "y"]),
        ("queued", ["x", "y"]),
        ("new", ["x", "y"]),
        ("unknown", ["x", "y"]),
        ("interrupted", []),
        ("stopped", []),
        ("failed", []),
    ],
)
def test_branches_wait_for_a_trunk_that_may_still_commit_their_step(
    trunk: TrialDir, monkeypatch: pytest.MonkeyPatch, state: str, waiting: list[str]
):
    """A trunk that has ended releases its branches, which train from step 0."""
    states_of_trunks(monkeypatch, state)
    (array,) = gpu_throttle.live_arrays(trunk.root, "forked", pending())
    assert array.waiting == waiting
    assert array.releasable == [name for name in ("x", "y") if name not in waiting]


def test_a_committed_step_releases_the_branches_of_every_sweep(
    trunk: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """One command releases them, and the record no longer lists them as held."""
    states_of_trunks(monkeypatch, "running")
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(slurm, "squeue", lambda names: pending() if list(names) else [])
    monkeypatch.setattr(slurm, "run_program", lambda *words: asked.append(words) or "")
    gpu_throttle.release_branches(trunk)
    assert not asked
    trunk.checkpoint(STEP).mkdir(parents=True)
    gpu_throttle.release_branches(trunk)
    assert asked == [("scontrol", "release", "7_[0,1]")]
    record = read_json(trunk.root.sweep("forked").array(ARRAY))
    assert record is not None
    assert record["held"] == []
    assert record["parallel"] == 2


def test_a_branch_that_the_user_released_counts_as_running(
    trunk: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    states_of_trunks(monkeypatch, "running")
    first, second = pending()
    running = Task(first.job, first.index, first.name, "RUNNING")
    (array,) = gpu_throttle.live_arrays(trunk.root, "forked", [running, second])
    assert array.waiting == ["y"]
    assert array.demand.tasks == 1
    assert array.demand.running == 1


def test_a_row_without_an_index_is_about_all_tasks_and_another_job_is_not_of_the_array(
    trunk: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    """Slurm cuts long lists of indices off. Another user's job may have the name of ours."""
    states_of_trunks(monkeypatch, "running")
    other = Task("8", None, ARRAY, "RUNNING")
    (array,) = gpu_throttle.live_arrays(
        trunk.root, "forked", [Task("7", None, ARRAY, "PENDING"), other]
    )
    assert list(array.tasks) == ["x", "y"]
    assert array.pending == ["x", "y"]


def test_the_stored_cap_replaces_the_limit_of_the_sweep(tmp_path: Path):
    root = Root(tmp_path)
    root.sweep("s").path.mkdir(parents=True)
    assert gpu_throttle.gpu_cap(root, "s") is None
    write_json(root.sweep("s").plan, {"limits": {"gpus_in_flight": 64}})
    assert gpu_throttle.gpu_cap(root, "s") == 64
    gpu_throttle.store_cap(root, "s", 8)
    assert gpu_throttle.gpu_cap(root, "s") == 8


def test_a_sweep_without_a_cap_and_without_held_branches_asks_slurm_nothing(
    trunk: TrialDir, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(slurm, "squeue", lambda names: pytest.fail("squeue was called"))
    array = trunk.root.sweep("forked").array(ARRAY)
    write_json(array, {**(read_json(array) or {}), "held": []})
    assert gpu_throttle.rebalance(trunk.root, "forked") == {}
