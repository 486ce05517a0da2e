"""The whole path on real parts: the command line, job arrays on real Slurm, FSDP training over two nodes, MLflow."""

import json
import sqlite3

from support.login_node import LoginNode, causes, every_step_once
from support.slurm_scenarios import REAL_STEPS as STEPS


def test_usr2_and_an_external_requeue_lose_no_step_and_repeat_none(real_sweep: LoginNode) -> None:
    """Both are done; what was warned went on where it had stopped."""
    warned, requeued = real_sweep.trials("real_sweep")
    assert causes(warned) == ["preempted", "done"]
    assert causes(requeued)[-1] == "done" and len(causes(requeued)) == 2
    second = warned.attempts()[1]
    assert second["start_step"] == warned.attempts()[0]["end_step"] >= 10
    for trial, world in ((warned, 4), (requeued, 2)):
        assert every_step_once(trial, STEPS), real_sweep.evidence()
        assert [record["world"] for record in trial.attempts()] == [world, world]


def test_a_kill_in_the_middle_of_a_save_leaves_the_checkpoint_before_it_to_begin_from(real_sweep: LoginNode) -> None:
    """A checkpoint was half written: the next attempt took the newest whole one, and swept up the rest."""
    _, requeued = real_sweep.trials("real_sweep")
    half = json.loads((requeued.path / "half.json").read_text())
    assert any(name.startswith(".step-") for name in half["there"])
    first, second = requeued.attempts()
    assert first.get("cause") is None and "ended" not in first
    assert second["start_step"] == max(half["committed"]) > 0, real_sweep.evidence()
    assert not [p for p in requeued.checkpoints.iterdir() if p.name.startswith(".")]


def test_submitting_twice_submits_nothing_and_editing_code_and_conf_changes_nothing_in_queued_trials(
    real_sweep: LoginNode,
) -> None:
    """One array for each resource class; every attempt ran the code of the moment of submission."""
    one, other = real_sweep.arrays("real_sweep")
    assert sorted(one["trials"] + other["trials"]) == sorted(t.name for t in real_sweep.trials("real_sweep"))
    codes = {record["code"] for trial in real_sweep.trials("real_sweep") for record in trial.attempts()}
    assert codes == {one["code"]} == {other["code"]}
    assert {trial.read_config().recipe.model.patch for trial in real_sweep.trials("real_sweep")} == {8}


def test_mlflow_holds_one_run_a_trial_with_every_step_once(real_sweep: LoginNode) -> None:
    """`jepa sync`, twice, into SQLite; then counted in the database itself."""
    store = real_sweep.folder / "mlflow.db"
    for _ in range(2):
        real_sweep.jepa("sync", "real_sweep", "--uri", f"sqlite:///{store}")
    with sqlite3.connect(store) as db:
        query = "SELECT run_uuid, step, count(*) FROM metrics WHERE key = 'loss' GROUP BY run_uuid, step"
        points = db.execute(query).fetchall()
    runs = {run for run, _, _ in points}
    assert len(runs) == 2
    for run in runs:
        assert sorted((step, times) for r, step, times in points if r == run) == [(s, 1) for s in range(1, STEPS + 1)]
