"""What `jepa gc` removes and what it keeps, and the commands of `jepa repro`."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster.launch.ops import cleanup
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A sweep of two trials with the checkpoints of steps 20, 40 and 60; the first is done."""
    root = Root(tmp_path)
    done, unfinished = fake_trials.sweep(root, models=("vit_a", "vit_b"), scales=((0.15, 0.2),))
    for trial in (done, unfinished):
        for step in (20, 40, 60):
            trial.checkpoint(step).mkdir(parents=True)
    done.done.write_text("{}")
    return root


def grow_old(root: Root) -> None:
    """Make everything below the root older than the limit."""
    old = time.time() - cleanup.MIN_AGE - 60
    for path in [root.path, *root.path.rglob("*")]:
        os.utime(path, (old, old))


def removable(root: Root) -> set[str]:
    return {str(path.relative_to(root.path)) for path, _ in cleanup.garbage(root)}


def trials(root: Root) -> list[TrialDir]:
    plan = root.sweep("demo").read_plan()
    assert plan is not None
    return [root.trial(trial["name"]) for trial in plan["trials"]]


def test_a_finished_trial_keeps_its_last_checkpoint_others_keep_all(
    root: Root,
):
    done, _ = trials(root)
    assert removable(root) == set(), "what is young may be in use"
    grow_old(root)
    assert removable(root) == {
        f"trials/{done.name}/checkpoints/step-000000{step}" for step in (20, 40)
    }


@pytest.mark.parametrize("runtime", [{"milestones": (20,)}, {"milestone_every": 10}])
def test_a_milestone_of_a_finished_trial_stays(root: Root, runtime: dict[str, Any]):
    """One by a fork, or by the user; and all checkpoints of a trial whose config is unreadable."""
    done, _ = trials(root)
    config = done.read_config()
    done.create(replace(config, runtime=replace(config.runtime, **runtime)))
    grow_old(root)
    removed = {f"trials/{done.name}/checkpoints/step-00000040"}
    assert removable(root) == (removed if "milestones" in runtime else set())
    done.config.write_text("")
    assert removable(root) == set()


def test_a_snapshot_that_is_in_use_stays(root: Root):
    for name in ("abc1234", "in-array", "in-attempt", "in-queue", "unused", ".torn"):
        (root.code / name).mkdir(parents=True)
    folder = root.sweep("demo")
    folder.arrays.mkdir()
    write_json(folder.array("jepa.demo.A.1"), {"code": "in-array"})
    trials(root)[1].claim({"code": "in-attempt"})
    (root.local / "queue").mkdir(parents=True)
    write_json(root.local / "queue" / "1-x.json", {"code": "in-queue"})
    grow_old(root)
    assert {path for path in removable(root) if path.startswith("code/")} == {
        "code/unused",
        "code/.torn",
    }


def test_remains_of_submissions_and_checkpoints_of_ended_canaries_go(root: Root):
    (root.trials / ".new").mkdir()
    folder = root.sweep("demo")
    folder.intents.mkdir()
    (folder.intents / "jepa.demo.A.1.void").touch()
    for name in ("canary.demo.A.0.x", "canary.demo.B.0.y"):
        for part in ("checkpoints/step-00000040", "attempts"):
            (root.canaries / name / part).mkdir(parents=True)
    (root.canaries / "canary.demo.A.0.x" / "FAILED.json").touch()
    grow_old(root)
    found = {path for path in removable(root) if not path.startswith("trials/vit")}
    assert found == {
        "trials/.new",
        "sweeps/demo/intents/jepa.demo.A.1.void",
        "canaries/canary.demo.A.0.x/checkpoints/step-00000040",
    }


def test_a_folder_or_a_file_is_measured_and_removed(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("12345")
    assert cleanup.size(tmp_path / "a") == 5
    assert cleanup.size(tmp_path / "a" / "b" / "file") == 5
    cleanup.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    cleanup.remove(tmp_path / "a")


def test_repro_prints_a_command_per_rank_with_the_newest_snapshot(root: Root):
    _, trial = trials(root)
    assert cleanup.repro_script(trial)["code"] == "abc1234", (
        "never attempted: the snapshot of the newest sweep"
    )
    trial.claim({"world": 2, "code": "def5678", "versions": {"python": "3.12"}})
    script = cleanup.repro_script(trial)
    assert script["code"] == "def5678"
    assert script["versions"] == {"python": "3.12"}
    assert len(script["commands"]) == 2
    folder = root.code / "def5678"
    assert script["commands"][1].startswith(
        f"cd {folder} && PYTHONPATH={folder} RANK=1 WORLD_SIZE=2 "
    )
    assert script["commands"][1].endswith(f"python -m jepa_cluster.launch.worker.main {trial.path}")
