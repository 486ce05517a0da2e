"""A filesystem in memory that knows what a crash of its server would leave.

A file keeps the bytes that were synced beside those that were written. A folder keeps its synced
entries and the changes since then. After a crash each of these changes may have survived or not,
independently of the others, as POSIX allows.
"""

from __future__ import annotations

import contextlib
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.simulated_ranks import Faults, Process, os_error

from jepa_cluster.training.checkpoint_files import MANIFEST, Disk, parse_manifest

CHECKPOINTS = Path("/trial/checkpoints")
STALE_SECONDS = 60.0  # the age of the oldest listing that a client still uses


class File:
    """A file: its bytes, those of them that are synced, and the folder that it was created in."""

    def __init__(self, folder: Folder) -> None:
        self.data = b""
        self.synced = b""
        self.folder = folder


@dataclass(frozen=True)
class Change:
    """A change of a folder that is not yet synced.

    source: the name that goes, '' for a new entry.
    target: the name that appears, '' for a removed entry.
    """

    source: str
    target: str
    node: File | Folder


class Folder:
    """A folder. `version` grows with every change of the folder or of a file in it."""

    def __init__(self) -> None:
        self.entries: dict[str, File | Folder] = {}
        self.synced: dict[str, File | Folder] = {}
        self.changes: list[Change] = []
        self.version = 0

    def change(self, source: str, target: str, node: File | Folder) -> None:
        if source:
            del self.entries[source]
        if target:
            self.entries[target] = node
        self.changes.append(Change(source, target, node))
        self.version += 1

    def sync(self) -> None:
        self.synced = dict(self.entries)
        self.changes.clear()
        self.version += 1

    def possible(self) -> list[tuple[str, File | Folder]]:
        """Return every entry that may be there after a crash."""
        added = [(change.target, change.node) for change in self.changes if change.target]
        return [*self.synced.items(), *added]

    def certain(self) -> dict[str, File | Folder]:
        """Return the entries that are there after a crash, whichever changes survive."""
        entries = dict(self.synced)
        for change in self.changes:
            entries.pop(change.source, None)
            entries.pop(change.target, None)
        return entries

    def crash(self, choose: random.Random) -> None:
        """Keep what was synced and some changes: none, all, or each with probability 1/2."""
        survives = choose.choice((0.0, 0.5, 1.0))
        left = dict(self.synced)
        for change in self.changes:
            if choose.random() >= survives:
                continue
            if change.source and left.get(change.source) is not change.node:
                continue
            left.pop(change.source, None)
            if change.target:
                left[change.target] = change.node
        self.entries = left
        self.sync()
        for node in left.values():
            if isinstance(node, Folder):
                node.crash(choose)
            elif node.data != node.synced:
                length = choose.randint(0, len(node.data))
                node.data = node.data[:length]
                node.synced = node.data


def content(attempt: int, number: int, step: int, rank: int) -> bytes:
    """Return what a rank writes in a save; content and length name the rank and the save."""
    head = f"{attempt} {number} {step} {rank} ".encode()
    return head + bytes(step + rank % 3) + b"end"


def folder_fault(name: str, files: dict[str, bytes]) -> str:
    """Return what is wrong with a checkpoint, '' if these files are a whole one of one save."""
    if MANIFEST not in files:
        return f"{name} has no manifest"
    try:
        manifest = parse_manifest(files[MANIFEST], Path(name))
    except ValueError as e:
        return f"{name}: {e}"
    shards = sorted(set(files) - {MANIFEST})
    expected = sorted(manifest.files)
    if shards != expected or len(shards) != manifest.shards or manifest.step != int(name[5:]):
        return f"{name} holds {shards}, its manifest names {expected}"

    saves: set[tuple[int, int]] = set()
    for rank, shard in enumerate(shards):
        data = files[shard]
        words = data.split(b" ")
        if len(words) < 5:
            return f"{name}/{shard} is torn"
        attempt, number, step, writer = map(int, words[:4])
        whole = data == content(attempt, number, step, writer)
        if not whole or step != manifest.step or writer != rank:
            return f"{name}/{shard} holds {data!r}"
        if tuple(manifest.files[shard]) != (len(data), zlib.crc32(data)):
            return f"{name}/{shard} is not what the manifest says"
        saves.add((attempt, number))
    if len(saves) != 1:
        return f"{name} mixes the saves {sorted(saves)}"
    return ""


class Tree:
    """The whole filesystem, visible to all clients at once.

    audit: called after every change and every sync.
    """

    def __init__(self) -> None:
        self.root = Folder()
        self.audit: Callable[[], None] = lambda: None
        self.damaged: set[Folder] = set()  # on purpose, by a test
        self._faults: dict[tuple[Folder, str, bool], tuple[int, str]] = {}

    def find(self, path: Path) -> File | Folder:
        node: File | Folder = self.root
        for part in path.parts[len(CHECKPOINTS.parts) :]:
            if not isinstance(node, Folder) or part not in node.entries:
                raise os_error("ENOENT", path)
            node = node.entries[part]
        return node

    def folder(self, path: Path) -> Folder:
        node = self.find(path)
        if not isinstance(node, Folder):
            raise os_error("ENOTDIR", path)
        return node

    def file(self, path: Path) -> File:
        node = self.find(path)
        if not isinstance(node, File):
            raise os_error("EISDIR", path)
        return node

    def crash(self, choose: random.Random) -> None:
        self.root.crash(choose)
        self.audit()

    def committed_faults(self) -> list[str]:
        """Return what is wrong with the folders named step-N, now and after a crash now."""
        faults: list[str] = []
        for name, folder in self._checkpoints(self.root.entries.items()):
            fault = self._fault(name, folder, False)
            if fault:
                faults.append(fault)
        for name, folder in self._checkpoints(self.root.possible()):
            fault = self._fault(name, folder, True)
            if fault:
                faults.append(f"{fault}, if the disk crashed now")
        return faults

    def whole(self) -> tuple[int, int]:
        """Return the number of whole checkpoints now, and the least number after a crash."""
        now = self._count(self.root.entries, False)
        crashed = self._count(self.root.certain(), True)
        return now, crashed

    def _checkpoints(
        self,
        entries: Iterable[tuple[str, File | Folder]],
    ) -> Iterator[tuple[str, Folder]]:
        """Yield the folders named step-N that no test damaged on purpose."""
        for name, node in entries:
            if name.startswith("step-") and isinstance(node, Folder) and node not in self.damaged:
                yield name, node

    def _count(self, entries: dict[str, File | Folder], crashed: bool) -> int:
        count = 0
        for name, folder in self._checkpoints(entries.items()):
            if not self._fault(name, folder, crashed):
                count += 1
        return count

    def _fault(self, name: str, folder: Folder, crashed: bool) -> str:
        version, fault = self._faults.get((folder, name, crashed), (-1, ""))
        if version != folder.version:
            fault = self._find_fault(name, folder, crashed)
            self._faults[folder, name, crashed] = (folder.version, fault)
        return fault

    def _find_fault(self, name: str, folder: Folder, crashed: bool) -> str:
        if crashed and folder.changes:
            return f"{name} has entries that were not synced"
        files: dict[str, bytes] = {}
        for key, node in folder.entries.items():
            if isinstance(node, File):
                files[key] = node.data
                if crashed and node.data != node.synced:
                    return f"{name} has a file that was not synced"
        return folder_fault(name, files)


class SimulatedDisk(Disk):
    """The filesystem as one rank reaches it.

    fenced: this rank must know that a newer attempt exists, and that it may touch no checkpoint.
    listings: the cached listings of an NFS client, folder -> (time of the listing, names).
    """

    def __init__(self, tree: Tree, faults: Faults, process: Process, rank: int) -> None:
        self.tree = tree
        self.faults = faults
        self.process = process
        self.rank = rank
        self.fenced = False
        self.listings: dict[Path, tuple[float, list[str]]] = {}

    def _call(self, name: str) -> Any:
        return self.faults.call(self.process, self.rank, name)

    def make_folder(self, path: Path) -> None:
        self.listings.pop(path.parent, None)
        with self._call("make_folder"):
            self._create(path, Folder())

    def write_file(
        self,
        path: Path,
        chunks: Iterable[Any],
        on_progress: Callable[[], None],
    ) -> tuple[int, int]:
        kind = "manifest" if path.name == MANIFEST else "shard"
        with self._call(f"create {kind}"):
            file = File(self.tree.folder(path.parent))
            self._create(path, file)
        size = crc = 0
        for chunk in chunks:
            with self._call(f"write {kind}"):
                self._write(file, bytes(chunk))
            size = size + len(chunk)
            crc = zlib.crc32(chunk, crc)
            on_progress()
        with self._call(f"sync {kind}"):
            self._sync(file)
        if kind == "shard" and self.faults.loses_byte():
            file.data = file.data[:-1]
            file.synced = file.data
            file.folder.version += 1
        return size, crc

    def read_file(self, path: Path) -> bytes:
        with self._call("read_file"):
            return self.tree.file(path).data

    def fingerprint(self, path: Path, on_progress: Callable[[], None]) -> tuple[int, int]:
        with self._call("fingerprint"):
            data = self.tree.file(path).data
        on_progress()
        return len(data), zlib.crc32(data)

    def names(self, folder: Path) -> list[str]:
        """Return a listing up to `STALE_SECONDS` old.

        It is current if this rank has changed or revalidated the folder since.
        """
        with self._call("names"):
            scheduler = self.faults.scheduler
            when, old = self.listings.get(folder, (-math.inf, []))
            if scheduler.now - when < STALE_SECONDS and scheduler.random.random() < 0.5:
                return old
            names = sorted(self.tree.folder(folder).entries)
            self.listings[folder] = (scheduler.now, names)
            return names

    def revalidate(self, folder: Path) -> None:
        with self._call("revalidate"):
            self.listings.pop(folder, None)

    def sizes(self, folder: Path) -> dict[str, int]:
        with self._call("sizes"):
            sizes: dict[str, int] = {}
            for name, node in self.tree.folder(folder).entries.items():
                if isinstance(node, File):
                    sizes[name] = len(node.data)
            return sizes

    def exists(self, path: Path) -> bool:
        with self._call("exists"):
            return path.name in self.tree.folder(path.parent).entries

    def rename(self, source: Path, target: Path) -> None:
        self.listings.pop(source.parent, None)
        with self._call("rename"):
            node = self.tree.folder(source)
            parent = self.tree.folder(source.parent)
            existing = parent.entries.get(target.name)
            if isinstance(existing, Folder) and existing.entries:
                raise os_error("ENOTEMPTY", target)
            parent.change(source.name, target.name, node)
            self.tree.audit()
            if self.fenced and "step-" in (source.name[:5], target.name[:5]):
                what = f"a superseded attempt renames {source.name} to {target.name}"
                self.faults.scheduler.violation(what)

    def sync_folder(self, path: Path) -> None:
        with self._call("sync_folder"):
            self.tree.folder(path).sync()
            self.tree.audit()

    def pause(self, seconds: float) -> None:
        self.faults.scheduler.sleep(seconds)

    def remove(self, folder: Path) -> None:
        """Remove as shutil.rmtree does: follow the folder when it is renamed, ignore errors."""
        with contextlib.suppress(OSError):
            with self._call("remove"):
                node = self.tree.folder(folder)
            for name in sorted(node.entries):
                with contextlib.suppress(OSError), self._call("remove a file"):
                    self._drop(node, name)
            with self._call("remove the folder"):
                parent = self.tree.folder(folder.parent)
                if parent.entries.get(folder.name) is node and not node.entries:
                    self._drop(parent, folder.name)

    def _create(self, path: Path, node: File | Folder) -> None:
        parent = self.tree.folder(path.parent)
        if path.name in parent.entries:
            raise os_error("EEXIST", path)
        parent.change("", path.name, node)
        self.tree.audit()

    def _drop(self, folder: Folder, name: str) -> None:
        if name in folder.entries:
            folder.change(name, "", folder.entries[name])
            self.tree.audit()

    def _write(self, file: File, data: bytes) -> None:
        file.data += data
        file.folder.version += 1
        self.tree.audit()

    def _sync(self, file: File) -> None:
        file.synced = file.data
        file.folder.version += 1
        self.tree.audit()
