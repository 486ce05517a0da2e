"""The copy of the shards on a disk of the node that all its users can write to."""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import fake_trials
from support.users import ALICE, BOB, GROUP, group_folder, modes, needs_root, run_as

from jepa_cluster.data import manifest, staging
from jepa_cluster.errors import DataError

pytestmark = needs_root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A split with one shard."""
    folder = fake_trials.data_root(tmp_path) / "train"
    (folder / "shard-000000.tar").write_bytes(b"123456789")
    return folder


@contextlib.contextmanager
def open_stage() -> Iterator[Path]:
    """A disk of a node as /tmp: every user may create folders on it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def stage_all(folder: Path, stage: Path) -> dict[str, str]:
    """Stage a set. Returns the modes of what is on the node meanwhile."""
    with staging.staged(folder, manifest.read(folder), stage):
        return modes(stage)


def test_a_staging_folder_is_its_users_alone(data: Path):
    """Whatever the umask is; another user has a folder of its own."""
    with open_stage() as stage, group_folder() as group:
        folder = shutil.copytree(data, group / "train")
        for user in (ALICE, BOB):
            found = run_as(user, 0, stage_all, folder, stage)
            place, *files = found
            assert place.startswith(f"jepa-{user}-")
            assert found[place] == f"700 {user}"
            assert files
            assert not list(stage.iterdir())


def test_copies_that_grow_are_progress_for_every_rank_of_the_node(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also for a rank that waits while another one copies."""
    monkeypatch.setattr(staging, "GROWTH_SECONDS", 0.001)
    grown = threading.Event()

    def fill(folder: Path, copies: object, place: Path) -> None:
        (place / "000000.partial").write_bytes(b"copied by another rank")
        assert grown.wait(60)

    monkeypatch.setattr(staging, "_fill", fill)
    with staging.staged(data, manifest.read(data), tmp_path / "stage", grown.set):
        assert grown.is_set()


@pytest.mark.parametrize("trap", ["folder", "open folder", "link", "lock", "stale link"])
def test_a_staging_folder_that_another_user_prepared_is_not_used(data: Path, trap: str):
    """The victim's file behind a link stays as it is, and one error names the folder."""
    with open_stage() as stage, group_folder() as group:
        folder = shutil.copytree(data, group / "train")
        victims = group / "file"
        victims.write_text("precious")
        os.chown(victims, ALICE, GROUP)
        place = stage / f"jepa-{ALICE}-{manifest.read(folder).digest}"
        if trap == "link":
            place.symlink_to(group)
        elif trap == "stale link":
            place.with_name(f"jepa-{ALICE}-0").symlink_to(group)
        else:
            place.mkdir()
            os.chown(place, ALICE if trap in ("open folder", "lock") else BOB, GROUP)
            place.chmod(0o777 if trap == "open folder" else 0o755)
        if trap == "lock":
            (place / "lock").symlink_to(victims)
        before = modes(group)
        error = run_as(ALICE, 0o022, stage_all, folder, stage)
        assert modes(group) == before
        assert victims.read_text() == "precious"
        if trap == "stale link":
            assert isinstance(error, dict)
        else:
            assert isinstance(error, DataError)
            assert str(place) in str(error) or "symbolic links" in str(error)
