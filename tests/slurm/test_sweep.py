"""The whole path on real parts: the command line, a job array on real Slurm, FSDP training over two nodes, MLflow."""

import sqlite3
from pathlib import Path

import pytest
from desk import Desk, causes, every_step_once
from testcluster import Cluster

STEPS = 100
TINY = (
    "model=vit_ti", "model.patch=8", "model.image=48", "model.depth=2", "model.heads=2", "model.mlp_ratio=2.0",
    "predictor.width=16", "predictor.depth=2", "predictor.heads=2", "mask.targets=2", "data=synthetic",
    f"optim.steps={STEPS}", "optim.warmup_steps=4", "optim.batch=16", "optim.precision=fp32",
    "probe.images=100", "probe.test_images=64", "runtime.log_every=1", "runtime.compile=false",
)  # fmt: skip
AXES = """\
grid:
  model.width: [32, 48]
resources:
  - {when: model.width == 32, nodes: 2, procs_per_node: 2, time: 20m}
  - {nodes: 2, procs_per_node: 1, time: 20m}
"""
PATIENCE = 400  # s; a rank imports for a dozen CPU seconds before its first step

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def night(cluster_of_the_session: Cluster, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """Two trials, over two nodes × two tasks and × one: one told USR2, one requeued by an administrator, while conf/
    and the code they were submitted from are edited; until both are done."""
    desk = Desk(cluster_of_the_session, tmp_path_factory.mktemp("sweep"), stub=False)
    desk.data.symlink_to(tiny_data)
    file = desk.sweep("night", TINY, AXES)
    warned, requeued = desk.submit(file)
    assert "nothing to do" in desk.jepa("submit", str(file), "--yes")
    (desk.clone / "jepa_cluster/training/train.py").write_text("raise SystemExit('edited while trials were queued')\n")
    (desk.clone / "conf/model/vit_ti.yaml").write_text("model: {name: edited}\n")
    desk.wait_step(requeued, 10, seconds=PATIENCE)
    desk.cluster.run("scontrol", "requeue", desk.job("night", requeued))
    desk.wait_step(warned, 10, seconds=PATIENCE)
    desk.cluster.run("scancel", "-s", "USR2", desk.job("night", warned), check=False)
    desk.wait_done([warned, requeued], PATIENCE)
    return desk


def test_usr2_and_an_external_requeue_lose_no_step_and_repeat_none(night: Desk) -> None:
    """Both are done; what was interrupted went on where it had stopped."""
    warned, requeued = night.trials("night")
    assert causes(warned) == ["preempted", "done"]
    assert causes(requeued)[-1] == "done" and len(causes(requeued)) == 2
    second = warned.attempts()[1]
    assert second["start_step"] == warned.attempts()[0]["end_step"] >= 10
    for trial, world in ((warned, 4), (requeued, 2)):
        assert every_step_once(trial, STEPS), night.evidence()
        assert [record["world"] for record in trial.attempts()] == [world, world]


def test_submitting_twice_submits_nothing_and_editing_code_and_conf_changes_nothing_in_queued_trials(
    night: Desk,
) -> None:
    """One array for each resource class; every attempt ran the code of the moment of submission."""
    one, other = night.arrays("night")
    assert sorted(one["trials"] + other["trials"]) == sorted(t.name for t in night.trials("night"))
    codes = {record["code"] for trial in night.trials("night") for record in trial.attempts()}
    assert codes == {one["code"]} == {other["code"]}
    assert {trial.read_config().recipe.model.patch for trial in night.trials("night")} == {8}


def test_mlflow_holds_one_run_a_trial_with_every_step_once(night: Desk) -> None:
    """`jepa sync`, twice, into SQLite; then counted in the database itself."""
    store = night.folder / "mlflow.db"
    for _ in range(2):
        night.jepa("sync", "night", "--uri", f"sqlite:///{store}")
    with sqlite3.connect(store) as db:
        query = "SELECT run_uuid, step, count(*) FROM metrics WHERE key = 'loss' GROUP BY run_uuid, step"
        points = db.execute(query).fetchall()
    runs = {run for run, _, _ in points}
    assert len(runs) == 2
    for run in runs:
        assert sorted((step, times) for r, step, times in points if r == run) == [(s, 1) for s in range(1, STEPS + 1)]
