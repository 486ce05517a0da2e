"""`jepa calibrate` from a sweep file to a calibrated sweep: stub trials, real Slurm."""

import json
from pathlib import Path

import pytest
import yaml
from support.login_node import SMALL, TINY, LoginNode, causes, orders
from testcluster import Cluster

BEST_RATE = 2e-3


def test_rates_of_a_ladder_are_used_by_a_calibrated_sweep(cluster: Cluster, tmp_path: Path) -> None:
    """The ladder begins below the best rate, so two rates are added. Nothing runs twice."""
    login = LoginNode(cluster, tmp_path, stub=True)
    orders(login, best_rate=BEST_RATE)
    body = f"seeds: [0]\nresources: [{SMALL}]\n"
    base = [*TINY, "optim.lr=4e-4", "optim.start_lr=8e-5"]
    login.sweep("one", base, body)
    written = login.jepa("calibrate", "one.yaml", "--rates", "5", "--seeds", "0")
    assert "next: jepa submit one_lr.yaml; when it is done: jepa calibrate one.yaml" in written
    ladder = login.folder / "one_lr.yaml"
    rates = [point["optim.lr"] for point in yaml.safe_load(ladder.read_text())["list"]]
    assert rates == [1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3]

    for added in ("2 points added: one_lr.yaml", ""):
        login.wait_done(login.submit(ladder))
        read = login.jepa("calibrate", "one.yaml")
        assert (added or "in a sweep file: optim.lr=calibrated") in read
    (found,) = json.loads(login.root.sweep("one_lr").calibration.read_text())["optima"]
    assert found["lr"] == pytest.approx(BEST_RATE, rel=0.3)

    use = login.sweep(
        "use", [*base, "optim.lr=calibrated"], "calibration: {sweep: one_lr}\n" + body
    )
    (trial,) = login.submit(use)
    login.wait_done([trial])
    optim = trial.read_config().recipe.optim
    assert (optim.lr, optim.start_lr) == pytest.approx((found["lr"], 0.2 * found["lr"]))
    for file in (ladder, use):
        assert "nothing to do" in login.jepa("submit", str(file), "--yes")
    for each in (*login.trials("one_lr"), trial):
        assert causes(each) == ["done"]
