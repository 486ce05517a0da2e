"""A root that two users share: modes by umask and setgid, and refusals before anything is done."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_trials
from support.submitted_sweep import Submitted
from support.users import ALICE, BOB, GROUP, group_folder, modes, needs_root, run_as

from jepa_cluster.errors import LaunchError, TrackingError
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.scheduler import local
from jepa_cluster.launch.submit import code_snapshot, documents, plan, submit
from jepa_cluster.records import QueueEntry
from jepa_cluster.tracking import collector_lock
from jepa_cluster.trial import file_lock, files, spool
from jepa_cluster.trial.directory import Root, TrialDir

pytestmark = needs_root


@pytest.fixture
def shared() -> Iterator[Path]:
    with group_folder() as folder:
        yield folder


def make_everything(folder: Path) -> None:
    """Make a file or a folder in each way in which the package does."""
    files.write_json(folder / "a.json", {})
    with files.new_folder(folder / "made") as fresh:
        (fresh / "inside").mkdir()
        files.write_atomic(fresh / "b", "b")
    (folder / "trials/t/attempts").mkdir(parents=True)
    spool.Spool(TrialDir(folder / "trials/t"), 1).close()
    file_lock.acquire(folder / "lock").lock.release()


@pytest.mark.parametrize(
    ("umask", "file", "directory"),
    [(0o002, "664", "2775"), (0o022, "644", "2755"), (0o077, "600", "2700")],
)
def test_modes_are_those_of_the_umask_and_the_group_is_that_of_the_folder(
    shared: Path, umask: int, file: str, directory: str
):
    """A umask of 077 keeps files private, one of 002 shares them."""
    assert run_as(ALICE, umask, make_everything, shared) is None
    found = modes(shared)
    assert len(found) == 10
    for name, mode in found.items():
        kind = directory if (shared / name).is_dir() else file
        assert mode == f"{kind} {GROUP}", name


def work_on(trial: TrialDir) -> int:
    """Do what rank 0 of an attempt does to the files of a trial."""
    number = trial.claim({})
    spool.Spool(trial, number).close()
    files.write_json(trial.heartbeat, {})
    files.write_json(trial.done, {})
    trial.amend(number, {"ended": 1})
    return number


@pytest.fixture
def trial(shared: Path) -> TrialDir:
    """A trial of Alice, open to the group."""
    trial = TrialDir(shared / "trials/t")
    config = fake_trials.config("vit_a", (0.1, 0.2), 0, 10)
    run_as(ALICE, 0o002, trial.create, config)
    return trial


def test_two_users_with_umask_002_continue_each_others_trials(trial: TrialDir):
    assert run_as(ALICE, 0o002, work_on, trial) == 1
    assert run_as(BOB, 0o002, work_on, trial) == 2
    assert run_as(ALICE, 0o002, work_on, trial) == 3


@pytest.mark.parametrize("part", ["", "metrics", "checkpoints", "logs"])
def test_who_may_not_write_all_of_a_trial_does_not_fence_off_its_attempt(
    trial: TrialDir, part: str
):
    """One folder that Alice closed is enough, whatever else Bob may write."""
    assert run_as(ALICE, 0o002, work_on, trial) == 1
    (trial.path / part).chmod(0o2755)
    error = run_as(BOB, 0o002, trial.claim, {})
    assert isinstance(error, LaunchError)
    assert str(trial.path / part) in error.what
    assert f"user {ALICE}" in error.what
    assert trial.attempt_numbers() == [1]


def test_a_submit_that_may_not_write_one_trial_writes_nothing(shared: Path, submitted: Submitted):
    """Bob's submit ends before the plan, a snapshot or another trial is written."""
    root = Root(shared / "root")
    shutil.copytree(submitted.root.path, root.path)
    for path in [root.path, *root.path.rglob("*")]:
        os.chown(path, ALICE, GROUP)
        path.chmod(0o2775 if path.is_dir() else 0o664)
    root.trial(submitted.trials[2].name).path.chmod(0o2755)
    before = modes(root.path)
    made = plan.make_plan(documents.find_sweep(root, "ask.yaml"), profile.load_profile(), root)
    error = run_as(BOB, 0o002, submit.submit, made)
    assert isinstance(error, LaunchError)
    assert submitted.trials[2].name in error.what
    assert modes(root.path).keys() - before.keys() == {".submit.lock"}


def test_a_code_snapshot_is_written_by_its_user_alone_and_used_by_all(
    shared: Path, monkeypatch: pytest.MonkeyPatch
):
    """A snapshot whose files were changed is refused before an attempt runs it."""
    content = (Path("jepa_cluster/a.py"), b"a")
    monkeypatch.setattr(code_snapshot, "read", lambda: ("0" * 12, [content]))
    root = Root(shared)
    assert run_as(ALICE, 0o002, code_snapshot.take, root) == "0" * 12
    assert run_as(BOB, 0o002, code_snapshot.take, root) == "0" * 12
    for mode in modes(root.code / ("0" * 12)).values():
        assert mode in (f"644 {GROUP}", f"2755 {GROUP}")
    (root.code / ("0" * 12) / "jepa_cluster/b.py").write_text("b")
    error = run_as(BOB, 0o002, code_snapshot.take, root)
    assert isinstance(error, LaunchError)
    assert "was changed: jepa_cluster/b.py" in error.what


def entry(trial: str) -> QueueEntry:
    return {"trial": trial, "code": "", "world": 1, "python": "", "environment": {}, "retries": {}}


def test_the_local_queue_is_read_by_all_and_written_by_its_user(
    shared: Path, monkeypatch: pytest.MonkeyPatch
):
    """The runner starts trials as the user of the queue, so it takes entries of no other user."""
    monkeypatch.setattr(local, "start_runner", lambda root: None)
    root = Root(shared)
    assert run_as(ALICE, 0o002, local.enqueue, root, [entry("t")], 1) is None
    assert list(run_as(BOB, 0o002, local.list_trials, root)) == ["t"]
    assert run_as(BOB, 0o002, local.dequeue, root, ["t"]) == []
    assert isinstance(run_as(BOB, 0o002, local.enqueue, root, [entry("u")], 1), PermissionError)
    assert run_as(ALICE, 0o002, local.dequeue, root, ["t"]) == ["t"]


def collect(root: Root) -> None:
    with collector_lock.hold(root, "sqlite://", 0):
        pass


def test_two_users_collect_in_turn_and_one_who_may_not_write_gets_one_error(shared: Path):
    root = Root(shared)
    assert run_as(ALICE, 0o002, collect, root) is None
    assert run_as(BOB, 0o002, collect, root) is None
    collector_lock.lease_path(root).chmod(0o644)
    error = run_as(BOB, 0o002, collect, root)
    assert isinstance(error, TrackingError)
    assert "you may not collect" in error.what
