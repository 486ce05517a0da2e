"""The whole path on real parts: command line, job arrays, FSDP over two nodes, MLflow."""

import json
import sqlite3
from collections import defaultdict

from support.login_node import LoginNode, causes, every_step_once
from support.slurm_scenarios import REAL_STEPS as STEPS


def test_usr2_and_an_external_requeue_lose_no_step_and_repeat_none(real_sweep: LoginNode) -> None:
    """Both are done; the one that got USR2 resumed at the step where it stopped."""
    warned, requeued = real_sweep.trials("real_sweep")
    assert causes(warned) == ["preempted", "done"]
    assert causes(requeued)[-1] == "done"
    assert len(causes(requeued)) == 2
    second = warned.attempts()[1]
    assert second["start_step"] == warned.attempts()[0]["end_step"] >= 10
    for trial, world in ((warned, 4), (requeued, 2)):
        assert every_step_once(trial, STEPS), real_sweep.evidence()
        for record in trial.attempts():
            assert record["world"] == world


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_checkpoint(
    real_sweep: LoginNode,
) -> None:
    """The next attempt used the newest complete checkpoint and removed the partial one."""
    _, requeued = real_sweep.trials("real_sweep")
    half = json.loads((requeued.path / "half.json").read_text())
    assert any(name.startswith(".step-") for name in half["there"])
    first, second = requeued.attempts()
    assert "exit" not in first  # no rank wrote its end
    assert second["start_step"] == max(half["committed"]) > 0, real_sweep.evidence()
    assert not list(requeued.checkpoints.glob(".*"))


def test_submitting_twice_submits_nothing_and_queued_trials_ignore_edits(
    real_sweep: LoginNode,
) -> None:
    """One array per resource class; every attempt ran the code as it was when submitted."""
    one, other = real_sweep.arrays("real_sweep")
    trials = real_sweep.trials("real_sweep")
    names = [trial.name for trial in trials]
    assert sorted(one["trials"] + other["trials"]) == sorted(names)
    assert one["code"] == other["code"]
    for trial in trials:
        assert trial.read_config().recipe.model.patch == 8
        for record in trial.attempts():
            assert record["code"] == one["code"]


def test_mlflow_holds_one_run_a_trial_with_every_step_once(real_sweep: LoginNode) -> None:
    """`jepa sync`, twice, into SQLite; the points are counted in the database itself."""
    store = real_sweep.folder / "mlflow.db"
    for _ in range(2):
        real_sweep.jepa("sync", "real_sweep", "--uri", f"sqlite:///{store}")
    with sqlite3.connect(store) as db:
        query = "SELECT run_uuid, step FROM metrics WHERE key = 'loss'"
        points = db.execute(query).fetchall()
    steps_of = defaultdict(list)
    for run, step in points:
        steps_of[run].append(step)
    assert len(steps_of) == 2
    for steps in steps_of.values():
        assert sorted(steps) == list(range(1, STEPS + 1))
