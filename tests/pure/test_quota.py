"""The disk quota of the user, by fake programs `lfs` and `quota`."""

from pathlib import Path

import pytest

from jepa_cluster.launch.submit import quota

LUSTRE = "      /scratch    400*     500    1000       -      12       0       0       -"
LONG_PATH = """\
/scratch/a/very/long/path
                  400     500    1000       -      12       0       0       -"""
OST_DOWN = "      /scratch    [400]    500    1000       -      12     100     200       -"
NFS = """\
Disk quotas for user bob (uid 1000):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
nas:/home          600*     500    1000       0      12       0       0       0"""
NO_LIMIT = "/dev/sda1          600       0       0       0      12     100     200       0"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder that is all of PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(programs: Path, name: str, output: str, code: int = 0) -> None:
    path = programs / name
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{output}'\nexit {code}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "output", "code", "left"),
    [
        ("lfs", LUSTRE, 0, 100 * 1024),
        ("lfs", LONG_PATH, 0, 100 * 1024),
        ("lfs", OST_DOWN, 0, None),
        ("lfs", "no lustre here", 1, None),
        ("quota", NFS, 1, 0),  # its exit code says that the user is above the quota
        ("quota", NO_LIMIT, 0, None),
        ("quota", "", 0, None),
    ],
)
def test_the_soft_limit_less_what_is_used(
    programs: Path, tmp_path: Path, name: str, output: str, code: int, left: int | None
):
    install(programs, name, output, code)
    assert quota.bytes_left(tmp_path / "not/yet/made") == left


def test_lustre_that_is_full_is_not_asked_for_another_quota(programs: Path, tmp_path: Path):
    install(programs, "lfs", LUSTRE.replace("400*", "700*"))
    install(programs, "quota", NFS.replace("600*", "100"), 0)
    assert quota.bytes_left(tmp_path) == 0


@pytest.mark.usefixtures("programs")
def test_without_these_programs_there_is_no_quota(tmp_path: Path):
    assert quota.bytes_left(tmp_path) is None
