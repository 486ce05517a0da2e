"""The code as it was when you pressed enter, dirty files included.

In: the folder this package runs from. Out: `<root>/code/<id>/`, named by its content, from which attempts run.
Two submits of the same code share one snapshot; editing code or conf afterwards changes nothing in it.
"""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from jepa_cluster.errors import LaunchError
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import new_folder

PARTS = ("jepa_cluster", "conf", "sweeps", "slurm/clusters")


def source() -> Path:
    """The folder that holds the package: a clone, a snapshot, or site-packages."""
    return Path(__file__).parents[3]


def files(folder: Path) -> list[Path]:
    """What belongs to the snapshot, relative to `folder`: tracked and new files; without git every source file."""
    listed = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "-z", "-co", "--exclude-standard", "--", *PARTS],
        capture_output=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [Path(n.decode()) for n in listed.stdout.split(b"\0") if n]
    else:
        parts = [p for p in PARTS if (folder / p).is_dir()]
        names = [f.relative_to(folder) for p in parts for f in (folder / p).rglob("*") if "__pycache__" not in f.parts]
    return sorted(n for n in names if (folder / n).is_file())


def read(folder: Path | None = None) -> tuple[str, list[tuple[Path, bytes]]]:
    """The id of the code of `folder` (default: the running one), and its files."""
    folder = folder or source()
    contents = [(name, (folder / name).read_bytes()) for name in files(folder)]
    if not contents:
        raise LaunchError(f"no source files in {folder}", where=str(folder), hint="install jepa_cluster again")
    digest = hashlib.sha256()
    for name, data in contents:
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12], contents


def take(root: Root, folder: Path | None = None) -> str:
    """Copy the code below the root, once. Returns its id."""
    identity, contents = read(folder)
    final = root.code / identity
    if final.exists():
        return identity
    with new_folder(final) as fresh:
        for name, data in contents:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
    return identity
