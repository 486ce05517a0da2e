"""An archive of sweeps: one small file from which their results are read elsewhere.

In: a root and names of sweeps. Out: a tar.xz with the plan of each sweep, and the config, the
attempts and the spools of its trials; unpacked, a root that every reader of results takes. Left out
are checkpoints, logs and sweep files, and what names a folder, a machine, a user or a job.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jepa_cluster.errors import TrackingError
from jepa_cluster.results import tables
from jepa_cluster.trial import config_yaml, spool
from jepa_cluster.trial.directory import Root, TrialDir, default_root
from jepa_cluster.trial.files import new_folder, open_atomic, read_json, to_json

FOLDER = "archives"  # of unpacked archives, below the root
ATTEMPT_KEYS = (
    "attempt",
    "kind",
    "world",
    "code",
    "versions",
    "started",
    "start_step",
    "end_step",
    "trunk",
    "lost_steps",
    "seconds",
    "goodput",
    "ended",
    "cause",
    "exit",
)
FAILURE_KEYS = ("cause", "attempt", "t")
RUNTIME = {"data_root": "data", "staging_dir": None}  # in place of folders of a machine


def write(
    root: Root,
    sweeps: Sequence[str],
    file: Path,
) -> int:
    """Write the archive of some sweeps, and return their number of trials. Raises TrackingError."""
    plans = [tables.read_plan(root, sweep) for sweep in sweeps]
    names: dict[str, None] = {}
    try:
        with open_atomic(file) as stream, tarfile.open(fileobj=stream, mode="w:xz") as tar:
            for sweep, plan in zip(sweeps, plans, strict=True):
                folder = root.sweep(sweep)
                _add(tar, root, folder.plan, to_json({**plan, "profile": ""}))
                for path in (folder.predicted, folder.calibration):
                    _add_copy(tar, root, path)
                entries = [*plan["trials"], *plan["dropped"]]
                names.update((entry["name"], None) for entry in entries)
            for name in names:
                _add_trial(tar, root, root.trial(name))
    except OSError as error:
        raise TrackingError(f"cannot write the archive: {error}", where=str(file)) from error
    return len(names)


def unpack(
    file: Path,
) -> Root:
    """Unpack an archive below the default root, once, and return its root. Raises TrackingError."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    folder = default_root().path / FOLDER / f"{file.name.partition('.')[0]}-{digest}"
    if not folder.exists():
        with new_folder(folder, durable=False) as fresh:
            try:
                with lzma.open(file) as data, tarfile.open(fileobj=data, mode="r:") as tar:
                    for member in tar:
                        _unpack_file(tar, member, fresh)
                    while data.read(1 << 20):  # the checksum is at the end
                        pass
            except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
                shutil.rmtree(fresh)
                raise TrackingError(
                    f"no archive of sweeps: {error}",
                    where=str(file),
                    hint="--root wants a folder, or a file that `jepa archive` wrote",
                ) from error
    return Root(folder)


def _unpack_file(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    folder: Path,
) -> None:
    """Write a file of an archive. Raises ReadError for one outside the folder, and for a link.

    Not by `extractall`, whose filter Python has from 3.11.4 on.
    """
    path = folder / member.name
    content = tar.extractfile(member) if member.isfile() else None
    if content is None or not path.resolve().is_relative_to(folder.resolve()):
        raise tarfile.ReadError(f"{member.name} is no file, or outside the destination")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.read())
    os.utime(path, (member.mtime, member.mtime))


def _add_trial(
    tar: tarfile.TarFile,
    root: Root,
    trial: TrialDir,
) -> None:
    for path in (trial.identity, trial.point, trial.done):
        _add_copy(tar, root, path)
    if trial.config.exists():
        values = config_yaml.load(trial.config.read_text()) or {}
        values["runtime"] = {**values.get("runtime", {}), **RUNTIME}
        _add(tar, root, trial.config, config_yaml.dump_values(values))
    for path, text in ((trial.stop, ""), (trial.heartbeat, "{}")):
        if path.exists():
            _add(tar, root, path, text)
    if failure := read_json(trial.failed):
        _add(tar, root, trial.failed, to_json(_chosen(failure, FAILURE_KEYS)))
    for record in trial.attempts():
        number = record["attempt"]
        _add(tar, root, trial.attempt(number), to_json(_chosen(record, ATTEMPT_KEYS)))
        lines = ""
        for line in spool.read_lines(trial.metrics(number))[0]:
            line.pop("error", None)
            lines += json.dumps(line, separators=(",", ":")) + "\n"
        if lines:
            _add(tar, root, trial.metrics(number), lines)


def _chosen(
    record: Any,
    keys: Sequence[str],
) -> dict[str, Any]:
    return {key: record[key] for key in keys if key in record}


def _add_copy(
    tar: tarfile.TarFile,
    root: Root,
    path: Path,
) -> None:
    if path.exists():
        _add(tar, root, path, path.read_text())


def _add(
    tar: tarfile.TarFile,
    root: Root,
    path: Path,
    text: str,
) -> None:
    """Add a file with another content, at the time of the original."""
    data = text.encode()
    member = tarfile.TarInfo(path.relative_to(root.path).as_posix())
    member.size = len(data)
    member.mtime = path.stat().st_mtime
    tar.addfile(member, io.BytesIO(data))
