"""Copy the code below the root, so that attempts run what was submitted, uncommitted changes too.

In: the folder that this package runs from. Out: `<root>/code/<id>/`. The id is a digest of the
content, so two submissions of the same code share one snapshot. Later edits do not change it. Only
the user who made it may write to it; a snapshot whose files differ from the code is refused.
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
    """Return the folder that holds the package: a clone, a snapshot, or site-packages."""
    return Path(__file__).parents[3]


def files() -> list[Path]:
    """Return all files of the code, relative to `source()`, sorted. Raises LaunchError without any.

    In a git checkout these are the tracked and the new files, without those that git ignores.
    """
    folder = source()
    paths = _listed_by_git(folder)
    if not paths:
        for part in PARTS:
            paths += (folder / part).rglob("*")
    names = sorted(filter(_is_source, paths))
    if not names:
        hint = "install jepa_cluster again"
        raise LaunchError(f"no source files in {folder}", where=str(folder), hint=hint)
    return [path.relative_to(folder) for path in names]


def _listed_by_git(folder: Path) -> list[Path]:
    """Return the files that git tracks or would add; [] outside a checkout."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "-co", "--exclude-standard", "--"]
    try:
        listed = subprocess.run([*command, *PARTS], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return list(map(folder.joinpath, listed.decode().split("\0")[:-1]))


def _is_source(path: Path) -> bool:
    return path.is_file() and "__pycache__" not in path.parts


def read() -> tuple[str, list[tuple[Path, bytes]]]:
    """Return the id and the files of the running code."""
    folder = source()
    contents = [(name, (folder / name).read_bytes()) for name in files()]
    digest = hashlib.sha256()
    for name, data in contents:
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12], contents


def take(root: Root) -> str:
    """Write the snapshot unless it exists. Returns its id. Raises LaunchError if it was changed."""
    identity, contents = read()
    snapshot = root.code / identity
    if snapshot.exists():
        _check(snapshot, contents)
        return identity
    with new_folder(snapshot) as fresh:
        for name, data in contents:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(data)
        for path in (fresh, *fresh.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o022)
    return identity


def _check(snapshot: Path, contents: list[tuple[Path, bytes]]) -> None:
    """Raise LaunchError if the snapshot does not hold exactly these files."""
    found: dict[Path, bytes] = {}
    for path in filter(_is_source, snapshot.rglob("*")):
        found[path.relative_to(snapshot)] = path.read_bytes()
    changed = found.items() ^ contents
    if changed:
        raise LaunchError(
            f"the code snapshot {snapshot.name} was changed: {min(changed)[0]}",
            where=str(snapshot),
            hint="move it away; the next submit makes it again",
        )
