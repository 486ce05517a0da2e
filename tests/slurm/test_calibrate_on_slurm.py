"""`jepa calibrate` from a sweep file to a calibrated sweep: stub trials, real Slurm."""

import json
from pathlib import Path

import pytest
import yaml
from support.login_node import SMALL, TINY, LoginNode, causes, orders
from testcluster import Cluster

BEST_RATE = 2e-3
BASE = (
    *TINY,
    "optim.lr=4e-4",
    "optim.start_lr=8e-5",
)
BODY = f"""\
seeds: [0]
resources: [{SMALL}]
"""


def test_rates_of_a_ladder_are_used_by_a_calibrated_sweep(cluster: Cluster, tmp_path: Path) -> None:
    """The ladder begins below the best rate, so two rates are added. Nothing runs twice."""
    login = LoginNode(cluster, tmp_path, stub=True)
    orders(login, best_rate=BEST_RATE)
    login.sweep("one", BASE, BODY)
    out = login.jepa("calibrate", "one.yaml", "--rates", "5", "--seeds", "0")
    assert "next: jepa submit one_lr.yaml; when it is done: jepa calibrate one.yaml" in out
    ladder = login.folder / "one_lr.yaml"
    points = yaml.safe_load(ladder.read_text())["list"]
    rates = [point["optim.lr"] for point in points]
    assert rates == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]

    login.wait_done(login.submit(ladder))
    out = login.jepa("calibrate", "one.yaml")
    assert "2 points added: one_lr.yaml" in out

    login.wait_done(login.submit(ladder))
    out = login.jepa("calibrate", "one.yaml")
    assert "in a sweep file: optim.lr=calibrated" in out
    assert "next:" not in out
    document = json.loads(login.root.sweep("one_lr").calibration.read_text())
    (found,) = document["optima"]
    assert found["lr"] == pytest.approx(BEST_RATE, rel=0.3)

    base = [*BASE, "optim.lr=calibrated"]
    body = f"{BODY}calibration: {{sweep: one_lr}}\n"
    use = login.sweep("use", base, body)
    (trial,) = login.submit(use)
    login.wait_done([trial])
    optim = trial.read_config().recipe.optim
    assert optim.lr == found["lr"]
    assert optim.start_lr == pytest.approx(0.2 * found["lr"])

    for file in (ladder, use):
        assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    for each in (*login.trials("one_lr"), trial):
        assert causes(each) == ["done"]
