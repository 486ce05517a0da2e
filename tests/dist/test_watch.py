"""A spike and a collapse that really happen: the trial goes back, leaves the images out, and comes back to it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from attempts import assert_same_bits, history, wait_for
from PIL import Image

from jepa_cluster.data import pipeline, shards
from jepa_cluster.data.sample_order import Stream
from jepa_cluster.errors import ExitCode
from jepa_cluster.trial.layout import Root, TrialDir, read_json
from jepa_cluster.trial.spool import read

BAD, BATCH, STEPS = 32, 16, 40
SPIKING = {
    "optim.lr": 0.03,
    "optim.steps": STEPS,
    "optim.warmup_steps": 10,
    "optim.watch": {"rollbacks": 2, "every": 10, "spike": 2.5, "patience": 1, "rankme": 0.0, "target_std": 0.0},
    "runtime.checkpoint_minutes": 0.01,
}


@pytest.fixture(scope="module")
def noisy_data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny set, in which the images of step 32's batch, and they alone, are black and white noise."""
    folder = tmp_path_factory.mktemp("noisy")
    shutil.copytree(tiny_data.parent / "images", folder / "images")
    files = {p.read_bytes(): p for p in (folder / "images/train").rglob("*.jpeg")}
    reader, random = pipeline.open_split(tiny_data / "train"), np.random.default_rng(1)
    for sample in Stream(len(reader.index), seed=0).lookup(np.arange((BAD - 1) * BATCH, BAD * BATCH))[1].tolist():
        pixels = random.integers(0, 2, (tiny.PIXELS, tiny.PIXELS, 3), dtype=np.uint8) * 255
        Image.fromarray(pixels).save(files[bytes(reader.image(sample))], quality=95)
    for split in ("train", "val"):
        shards.build(folder / "images" / split, folder / "data" / split, workers=1)
    return folder / "data"


def rollbacks(trial: TrialDir) -> list[tuple[int, int, int]]:
    """(step of the verdict, the anchor gone back to, batches left out) of every rollback event."""
    return [(e["step"], e["to"], e["left_out"]) for e in read(trial).events if e["event"] == "rollback"]


def test_a_spike_sends_the_trial_back_once_and_kills_around_it_change_not_one_bit(
    launch: Callable, noisy_data: Path, tmp_path: Path
) -> None:
    """A batch of noise makes the gradient jump at step 32: back to the anchor of step 30, on with step 33's images.
    The same trial, stopped before it, killed right after it and stopped again, ends with the same bits."""
    config = tiny.config(noisy_data, **SPIKING)
    alone, hit = (Root(tmp_path / name).trial(config.name) for name in ("alone", "hit"))
    for trial in (alone, hit):
        trial.create(config)
    assert launch(alone).wait() == [0, 0]
    assert rollbacks(alone) == [(BAD, 30, 2)]
    rows = history(alone)
    assert [step for step, _ in rows] == list(range(STEPS + 1)), "settled, and each step once"
    assert max(values["loss"] for step, values in rows if step > 20) < 0.3, "the spike is in no settled row"
    assert [v["batches_left_out"] for s, v in rows if s in (30, 31, STEPS)] == [0, 2, 2]

    def reached(step: int) -> Callable[[], bool]:
        return lambda: bool(rows := read(hit).rows) and rows[-1].step >= step

    for ready, number in (
        (reached(24), signal.SIGTERM),
        (lambda: rollbacks(hit), signal.SIGKILL),
        (reached(34), signal.SIGTERM),
    ):
        ranks = launch(hit)
        wait_for(ready)
        ranks.kill(number)
        ranks.wait()
    while not hit.done.exists():
        assert not hit.failed.exists(), hit.failed.read_text()
        launch(hit).wait()
    assert len(hit.attempts()) > 2 and set(rollbacks(hit)) == {(BAD, 30, 2)}
    assert_same_bits(alone, hit)


def test_a_collapse_that_comes_back_ends_the_trial_after_the_rollbacks_it_may_have(
    launch: Callable, new_trial: Callable
) -> None:
    """No slow target and a high rate: RankMe falls at every anchor. Two rollbacks, then FAILED.json says diverged."""
    fast = {"optim.lr": 0.03, "optim.momentum": 0.01, "optim.final_momentum": 0.01, "optim.warmup_steps": 10}
    trial = new_trial(**fast, **{"optim.steps": 60, "optim.watch": {"rollbacks": 2, "every": 20, "rankme": 1.8}})
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    events = [e for e in read(trial).events if e["event"] == "rollback"]
    assert len(events) == 2 and all("RankMe" in e["why"] for e in events)
    failed = read_json(trial.failed)
    assert failed is not None and failed["cause"] == trial.attempts()[-1]["cause"] == "diverged"
    assert "after 2 rollbacks" in failed["error"]
    assert trial.attempts()[-1]["seconds"]["lost"] > 0


def test_steps_that_are_not_finite_are_counted_in_the_rows_and_become_a_verdict(
    launch: Callable, new_trial: Callable
) -> None:
    """A weight decay beyond all bounds: every later gradient is NaN, moves nothing, is counted; it ends as diverged."""
    watch = {"rollbacks": 1, "every": 100, "patience": 3}
    trial = new_trial(**{"optim.weight_decay": 1e30, "optim.watch": watch})
    assert launch(trial).wait() == [ExitCode.ERROR] * 2
    found = read(trial)
    bad = [row for row in found.rows if row.values.get("skipped_steps")]
    assert [row.values["skipped_steps"] for row in bad] == [1, 2, 3][: len(bad)] and bad
    assert sum(e["event"] == "non_finite_step" for e in found.events) == 6, "three before the rollback, three after"
    assert "diverged" in trial.failed.read_text()


def test_a_branch_goes_back_to_the_step_at_which_it_left_its_trunk(
    launch: Callable, noisy_data: Path, tmp_path: Path
) -> None:
    """The noise comes in the cool-down, two steps after the fork: the anchor of step 30 is there although the branch
    did not train it, and all bits are those of the branch trained from step 0."""
    plateau = {**SPIKING, "optim.schedule": "wsd", "optim.cooldown_steps": 10, "optim.final_weight_decay": 0.04,
               "optim.final_momentum": 0.99}  # fmt: skip
    longer = tiny.config(noisy_data, **{**plateau, "optim.steps": 60, "runtime.milestones": [30]})
    short = tiny.config(noisy_data, **plateau, **{"runtime.fork_from": longer.name})
    trunk, branch, alone = (
        Root(tmp_path / root).trial(config.name) for root, config in (("one", longer), ("one", short), ("alone", short))
    )
    for trial, config in ((trunk, longer), (branch, short), (alone, short)):
        trial.create(config)
        assert launch(trial).wait() == [0, 0]
    assert (alone.attempts()[0]["start_step"], branch.attempts()[0]["start_step"]) == (0, 30)
    assert rollbacks(alone) == rollbacks(branch) == [(BAD, 30, 2)]
    assert_same_bits(alone, branch)
