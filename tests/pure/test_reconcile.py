"""Wanted against seen; arrays and their shares; pointing at trials; reading failures. All pure."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jepa_cluster.errors import ConfigError
from jepa_cluster.launch.cluster.arrays import ArrayDemand, allocate_tasks, make_arrays
from jepa_cluster.launch.cluster.profile import ResourceClass, class_letters
from jepa_cluster.launch.scheduler import failures
from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.trial.status import STATES, State

NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True)


def test_every_state_has_one_action():
    """And only these are handed over: what is new, and what was interrupted."""
    plan = reconcile(STATES, {s: s for s in STATES})
    assert plan.submit == ("new",) and plan.resume == ("interrupted",)
    assert set(plan.keep) == {"queued", "cooling", "running", "unknown"}
    assert set(plan.leave) == {"stopped", "failed"} and plan.done == ("done",)


@given(NAMES, st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(STATES)))
def test_doing_a_plan_leaves_nothing_to_do(wanted: list[str], seen: dict[str, State]):
    """Idempotent, whatever the world looks like; nothing is lost, nothing is wanted twice."""
    plan = reconcile(wanted, seen)
    after: dict[str, State] = {**seen, **dict.fromkeys(plan.start, "queued")}
    assert not reconcile(wanted, after).start
    parts = [*plan.submit, *plan.resume, *plan.keep, *plan.leave, *plan.done]
    assert sorted(parts) == sorted(wanted) and not set(plan.dropped) & set(wanted)


A, B = ResourceClass(1, 8, 60), ResourceClass(4, 8, 120)


def test_one_array_a_class_cut_at_the_longest():
    """Order is kept; the smallest class comes first."""
    trials = {f"t{i}": (B if i % 3 == 0 else A) for i in range(9)}
    arrays = make_arrays(trials, class_letters(trials.values()), longest=4)
    assert [(a.letter, a.trials) for a in arrays] == [
        ("A", ("t1", "t2", "t4", "t5")), ("A", ("t7", "t8")), ("B", ("t0", "t3", "t6")),
    ]  # fmt: skip


LOADS = st.builds(
    lambda world, left, part: ArrayDemand(world, left, int(left * part)),
    st.integers(1, 64),
    st.integers(1, 50),
    st.floats(0, 1),
)


@given(st.lists(LOADS, min_size=1, max_size=6), st.integers(1, 600))
def test_shares_keep_the_cap_and_leave_no_gpu_idle_that_fits(arrays: list[ArrayDemand], cap: int):
    """However much runs already: what may start from now on keeps under the cap, or nothing may start."""
    given_ = allocate_tasks(arrays, cap)
    assert all(0 <= n <= a.tasks for a, n in zip(arrays, given_, strict=True))
    at_most = sum(a.world * max(a.running, n) for a, n in zip(arrays, given_, strict=True))
    now = sum(a.world * a.running for a in arrays)
    assert at_most <= max(cap, now)
    if now == 0:
        rest = cap - at_most
        assert all(n == a.tasks or a.world > rest for a, n in zip(arrays, given_, strict=True))


def test_what_a_drained_array_leaves_goes_to_the_others():
    """And an array that runs more than its part gives way as its tasks end, never at once."""
    assert allocate_tasks([ArrayDemand(8, 10), ArrayDemand(8, 10)], 64) == [4, 4]
    assert allocate_tasks([ArrayDemand(8, 1, 1), ArrayDemand(8, 10, 4)], 64) == [1, 7]
    # No room yet; behind the first until some have ended
    assert allocate_tasks([ArrayDemand(8, 10, 8), ArrayDemand(8, 10)], 64) == [4, 0]
    assert allocate_tasks([ArrayDemand(8, 10, 6), ArrayDemand(8, 10)], 64) == [4, 2]
    assert allocate_tasks([ArrayDemand(64, 3), ArrayDemand(8, 10)], 64) == [1, 0]


ROWS = [
    {
        "index": i, "name": f"{m}-ts.1-s{s}-{i:012x}", "id": f"{i + 10:012x}", "label": f"{m} .1-.15 s{s}",
        "class": "A", "seed": s, "state": "failed" if i % 2 else "done",
        "point": {"model": m, "mask.target_scale": [0.1, 0.15]},
    }
    for i, (m, s) in enumerate((m, s) for m in ("vit_s", "vit_l") for s in (0, 1))
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], [0, 1, 2, 3]),
        (["model=vit_l"], [2, 3]),
        (["model=vit_l", "seed=0"], [2]),
        (["state=failed,running"], [1, 3]),
        (["target_scale=.1-.15", "!state=failed"], [0, 2]),
        (["mask.target_scale=.1*"], [0, 1, 2, 3]),
        (["1", "3"], [1, 3]),
        (["vit_s"], [0, 1]),
        (["!vit_s"], [2, 3]),
        (["00000000000c"], [2]),
    ],
)
def test_one_grammar_points_at_trials(words: list[str], found: list[int]):
    """Pairs narrow, bare words widen, ! takes away."""
    assert [r["index"] for r in select(ROWS, words)] == found


def test_a_selection_that_means_nothing_says_so():
    """Instead of doing nothing, or everything."""
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        select(ROWS, ["modle=vit_s"])
    with pytest.raises(ConfigError, match="no trial matches"):
        select(ROWS, ["seed=7"])


@pytest.mark.parametrize(
    ("record", "state", "log", "cause"),
    [
        ({"cause": "preempted"}, "COMPLETED", "", "preempted"),
        ({}, "TIMEOUT", "", "timeout"),
        ({}, "NODE_FAIL", "", "node"),
        ({}, "OUT_OF_MEMORY", "", "host_oom"),
        ({}, "CANCELLED by 1000", "", "stopped"),
        ({}, "", "", "unknown"),
        ({"cause": "error", "error": "CUDA out of memory. Tried to allocate"}, "FAILED", "", "gpu_oom"),
        ({"cause": "error", "error": "ZeroDivisionError"}, "FAILED", "", "error"),
        ({"cause": "error", "error": "DataLoader worker (pid 7) is killed by signal: Killed. "}, "", "", "host_oom"),
        ({"cause": "error", "error": "No module named torch"}, "", "ModuleNotFoundError: No module", "error"),
        ({}, "FAILED", "ModuleNotFoundError: No module named 'torch'", "infrastructure"),
        ({"cause": "hang"}, "", "", "hang"),
    ],
)
def test_the_end_of_an_attempt_is_read_from_what_is_known(record: dict[str, str], state: str, log: str, cause: str):
    """The attempt's own word first, then signs in the log, then Slurm's word."""
    assert failures.classify_attempt(record, state, log).cause == cause


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([0, 0], "done"),
        ([-9, 1], "killed"),
        ([1, -9], "error"),
        ([1, 75], "preempted"),
        ([77, 0], "fenced"),
        ([139], "unknown"),
    ],
)
def test_the_first_end_counts_and_a_clean_word_outweighs_noise(codes: list[int], cause: str):
    """A killed rank makes the others complain; that is not the cause."""
    assert failures.classify_exit_codes(codes).cause == cause


def test_every_cause_has_a_rule():
    """`why` can always answer."""
    assert set(get_args(failures.Cause)) == set(failures.RULES)
