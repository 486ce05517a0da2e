"""The copy of the code from which attempts run."""

import subprocess
from pathlib import Path

import pytest

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.submit import code_snapshot
from jepa_cluster.trial.directory import Root


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package and settings, from which the code seems to run."""
    folder = tmp_path / "clone"
    for name in (
        "jepa_cluster/a.py",
        "jepa_cluster/__pycache__/a.pyc",
        "conf/c.yaml",
        "slurm/clusters/x.yaml",
        "data/d",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    monkeypatch.setattr(code_snapshot, "source", lambda: folder)
    return folder


def test_a_snapshot_holds_code_and_settings_and_nothing_else(clone: Path, tmp_path: Path):
    root = Root(tmp_path / "root")
    snapshot = root.code / code_snapshot.take(root)
    files = sorted(
        str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()
    )
    assert files == ["conf/c.yaml", "jepa_cluster/a.py", "slurm/clusters/x.yaml"]
    assert (snapshot / "jepa_cluster/a.py").read_text() == "jepa_cluster/a.py"


def test_the_same_code_is_copied_once_and_an_edit_makes_another_snapshot(
    clone: Path, tmp_path: Path
):
    root = Root(tmp_path / "root")
    first = code_snapshot.take(root)
    assert code_snapshot.take(root) == first
    assert code_snapshot.read()[0] == first
    (clone / "conf" / "c.yaml").write_text("edited")
    second = code_snapshot.take(root)
    assert second != first
    assert len(list(root.code.iterdir())) == 2
    assert (root.code / first / "conf/c.yaml").read_text() == "conf/c.yaml"


def test_a_renamed_file_changes_the_id(clone: Path):
    before, _ = code_snapshot.read()
    (clone / "conf" / "c.yaml").rename(clone / "conf" / "d.yaml")
    assert code_snapshot.read()[0] != before


def test_a_checkout_leaves_out_what_git_ignores(clone: Path):
    (clone / ".gitignore").write_text("*.swp\n")
    subprocess.run(["git", "init", "-q", str(clone)], check=True)
    before, _ = code_snapshot.read()
    (clone / "conf" / "c.yaml.swp").write_text("an editor's file")
    assert code_snapshot.read()[0] == before
    (clone / "conf" / "new.yaml").write_text("a new file")
    assert code_snapshot.read()[0] != before


def test_an_installation_without_files_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(code_snapshot, "source", lambda: tmp_path)
    with pytest.raises(LaunchError, match="no source files"):
        code_snapshot.files()
