"""`jepa archive`: results of sweeps in one file, and --root with that file."""

import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.errors import TrackingError
from jepa_cluster.results import archive
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import read_json, write_json

HOST = "node017.example"
JOB = "job 4711"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """A sweep of six trials: four are done, one has failed, one was killed."""
    root = Root(tmp_path / "studies")
    trials = fake_trials.sweep(root)
    for trial in trials[:4]:
        fake_trials.run(trial)
    for trial in trials[4:]:
        fake_trials.run(trial, stop=35, kill=True)
    trials[4].write_failed("error", f"{HOST} has no file {tmp_path}/images", 1)
    for trial in trials:
        trial.add_to_attempt(1, {"host": HOST, "argv": [str(trial.path)], "job": JOB})
        (trial.logs(1)).mkdir(parents=True)
        (trial.logs(1) / "rank0.out").write_text("a log")
    plan = read_json(root.sweep("demo").plan) or {}
    write_json(root.sweep("demo").plan, {**plan, "profile": f"{tmp_path}/cluster.yaml"})
    return root


@pytest.fixture
def study(
    root: Root,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The archive of the sweep, which is unpacked below another root."""
    file = tmp_path / "study.tar.xz"
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "elsewhere"))
    assert cli.main(["archive", str(file), "demo", "--root", str(root.path)]) == 0
    return file


def test_an_archive_is_read_like_the_root_it_was_made_of(
    root: Root,
    study: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status, tables, curves and the report are the same, but for the text of an error."""
    verbs = (["status", "demo"], ["export", "demo"], ["export", "demo", "--curves"])

    def documents(place: Path) -> list[Any]:
        found: list[Any] = []
        for words in verbs:
            capsys.readouterr()
            assert cli.main([*words, "--root", str(place), "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        folder = tmp_path / f"report of {place.name}"
        assert cli.main(["report", "demo", "--root", str(place), "--into", str(folder)]) == 0
        return [*found, (folder / "demo.md").read_text()]

    expected = documents(root.path)
    (failed,) = [row for row in expected[0]["trials"] if row["state"] == "failed"]
    assert HOST in failed["note"]
    failed["note"] = ""
    root.path.rename(tmp_path / "gone")
    assert documents(study) == expected
    (unpacked,) = (tmp_path / "elsewhere/archives").iterdir()
    before = unpacked.stat().st_mtime_ns
    assert cli.main(["status", "demo", "--root", str(study)]) == 0
    assert unpacked.stat().st_mtime_ns == before


def test_an_archive_names_no_folder_machine_or_job(
    study: Path,
    tmp_path: Path,
) -> None:
    text = lzma.decompress(study.read_bytes()).decode()
    for word in (str(tmp_path), HOST, JOB, "a log", "data_root: /"):
        assert word not in text
    with tarfile.open(study) as tar:
        for member in tar:
            assert not member.uname + member.gname
            assert not member.uid + member.gid


@pytest.mark.parametrize("by", ["name", "link"])
def test_unpacking_writes_nothing_outside_its_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    by: str,
) -> None:
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    file = tmp_path / "evil.tar.xz"
    name = "../../../outside"
    with tarfile.open(file, "w:xz") as tar:
        if by == "link":
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
            tar.addfile(link)
            name = "link/outside"
        member = tarfile.TarInfo(name)
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(TrackingError, match="outside the destination"):
        archive.unpack(file)
    assert not (tmp_path / "outside").exists()
    assert list((tmp_path / "root/archives").iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "changed", "changed near the end"])
def test_a_damaged_archive_is_one_error_and_leaves_nothing(
    study: Path,
    damage: str,
    tmp_path: Path,
) -> None:
    data = bytearray(study.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "changed":
        data[len(data) // 2] ^= 0xFF
    else:
        data[-80] ^= 0xFF
    study.write_bytes(data)
    with pytest.raises(TrackingError, match=r"no archive of sweeps"):
        archive.unpack(study)
    assert list((tmp_path / "elsewhere/archives").iterdir()) == []


def test_what_is_no_archive_is_one_clear_error(
    tmp_path: Path,
    root: Root,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no tar")
    assert cli.main(["status", "demo", "--root", str(file)]) != 0
    assert "jepa archive" in capsys.readouterr().err
    assert cli.main(["archive", str(file), "nothing", "--root", str(root.path)]) != 0
    assert "no sweep 'nothing'" in capsys.readouterr().err
    assert file.read_text() == "no tar"
