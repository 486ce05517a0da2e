"""Which trials a submit starts, from the trials of the sweep file and their states."""

from hypothesis import given
from hypothesis import strategies as st

from jepa_cluster.sweep.reconcile import reconcile
from jepa_cluster.trial.status import STATES, State

NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True)


def test_every_state_has_one_action():
    """Only new and interrupted trials are started."""
    plan = reconcile(STATES, {state: state for state in STATES})
    assert plan.trials("submit") == ["new"]
    assert plan.trials("resume") == ["interrupted"]
    assert set(plan.trials("keep")) == {"queued", "requeued", "running", "unknown"}
    assert set(plan.trials("leave")) == {"stopped", "failed"}
    assert plan.trials("done") == ["done"]


@given(NAMES, st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from(STATES)))
def test_a_second_submit_starts_nothing(wanted: list[str], seen: dict[str, State]):
    """Every wanted trial has exactly one action."""
    plan = reconcile(wanted, seen)
    after: dict[str, State] = {**seen, **dict.fromkeys(plan.start, "queued")}
    assert not reconcile(wanted, after).start
    assert list(plan.by_name) == wanted
    assert not set(plan.dropped) & set(wanted)
