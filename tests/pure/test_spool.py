"""The rows of a trial: which attempt they count for, and which of them are settled."""

from pathlib import Path

import pytest
from test_config import plain

from jepa_cluster.config import config_from_dict
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.spool import History, Row, Spool, merge, read


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    config = config_from_dict(plain())
    trial = Root(tmp_path).trial_of(config)
    trial.create(config)
    return trial


def steps_and_losses(history: History) -> list[tuple[int, float]]:
    return [(row.step, row.values["loss"]) for row in history.rows]


def steps(rows: list[Row]) -> list[int]:
    return [row.step for row in rows]


def test_rows_up_to_a_commit_are_settled_and_the_rest_is_not(trial: TrialDir):
    """The row of step 0 counts like any other."""
    spool = Spool(trial, 1)
    for step in range(5):
        spool.log(step, {"loss": step})
    spool.commit(3)
    history = read(trial)
    assert steps(history.rows) == [0, 1, 2, 3, 4]
    assert steps(history.settled_rows) == [0, 1, 2, 3]
    assert history.settled == 3


def test_a_later_attempt_replaces_rows_above_the_settled_step_only(trial: TrialDir):
    """Attempt 2 begins at step 2 as checkpoint 3 is damaged, but the row of step 3 is settled."""
    first = Spool(trial, 1)
    for step in range(6):
        first.log(step, {"loss": 1.0})
    first.commit(3)
    second = Spool(trial, 2, settled=2)
    for step in (3, 4):
        second.log(step, {"loss": 2.0})
    history = read(trial)
    assert steps_and_losses(history) == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]


def test_writes_of_a_superseded_attempt_are_ignored(trial: TrialDir):
    """Attempt 1 writes and commits after attempt 2 began."""
    first = Spool(trial, 1)
    first.log(1, {"loss": 1.0})
    first.commit(1)
    second = Spool(trial, 2, settled=1)
    second.log(2, {"loss": 2.0})
    first.log(2, {"loss": 9.0})
    first.log(3, {"loss": 9.0})
    first.commit(3)
    history = read(trial)
    assert steps_and_losses(history) == [(1, 1), (2, 2)]
    assert history.settled == 1


def test_a_torn_last_line_is_ignored_and_a_damaged_one_is_counted(trial: TrialDir):
    """The node failed in the middle of a write."""
    spool = Spool(trial, 1)
    spool.log(1, {"loss": 1.0})
    spool.close()
    with trial.metrics(1).open("ab") as f:
        f.write(b'{"step": 2, "t": 1, \x00\x00\n{"step": 3, "t"')
    history = read(trial)
    assert steps(history.rows) == [1]
    assert history.damaged == 1


def test_an_attempt_killed_before_its_first_line_changes_nothing():
    row = {"step": 1, "t": 1, "loss": 1.0}
    first = [{"settled": -1}, row, {"commit": 1}]
    assert merge({1: first, 2: []}).settled == 1


def test_a_spool_of_identity_version_1_may_roll_back_unsettled_rows():
    """In version 1 a checkpoint held rows above the settled step; a rollback event voids them."""
    rows = [{"step": step, "t": 0, "loss": 1.0} for step in (10, 20, 30, 40)]
    first = [{"start": 0, "settled": -1}, *rows, {"commit": 20}]
    second = [{"start": 40, "settled": 20}, {"step": 50, "t": 0, "loss": 1.0}]
    assert steps(merge({1: first, 2: second}).rows) == [10, 20, 30, 40, 50]
    rollback = {"event": "rollback", "step": 50, "to": 20}
    assert steps(merge({1: first, 2: [*second, rollback]}).rows) == [10, 20]
