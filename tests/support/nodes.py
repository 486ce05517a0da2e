"""Two nodes on this machine, and small filesystems that they share and that really fill up.

A node is a fork server in a mount namespace of its own, and the ranks that it forks. A mount below
`shared` appears on every node. A mount made by a node stays there, so a filesystem can be read-only
for one node alone.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.attempts import Ranks, start_server
from support.faulty_rank import FAULTS, Fault, dump

from jepa_cluster.trial.directory import TrialDir

NODES = 2
# Waits for the end of its input, which is also the end of a test process that was killed.
CLEAN = """cat >/dev/null
for d in "$0"/disk*; do umount -l "$d"; done 2>/dev/null
umount -l "$0"
rm -f "$0"/*.img"""
# bytes left on an almost full disk: room for rows and records, none for a checkpoint
SPARE = 64 << 10


def command(*words: object) -> str:
    """Run a command that must succeed, and return its stdout."""
    line = [str(word) for word in words]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(line)}: {done.stderr.strip()}"
    return done.stdout


def missing() -> str:
    """What this machine lacks for these tests; '' for nothing."""
    if os.getuid() != 0:
        return "not root"
    programs = ("unshare", "nsenter", "mount", "losetup", "mkfs.ext4", "mkfs.btrfs")
    lacking = [name for name in programs if not shutil.which(name)]
    if lacking:
        return f"no {', '.join(lacking)}; as root: apt-get install util-linux e2fsprogs btrfs-progs"
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    done = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return "no mount namespaces" if done.returncode else ""


# ---- nodes


class Node:
    """A mount namespace with a fork server in it."""

    def __init__(self, folder: Path) -> None:
        """folder: for the files of this node itself."""
        folder.mkdir()
        self.folder = folder
        self.server = start_server(folder, "unshare --mount --propagation slave")

    def run(self, *words: object) -> str:
        """Run a command in the mount namespace of this node."""
        return command("nsenter", f"--mount=/proc/{self.server._process.pid}/ns/mnt", *words)

    def make_read_only(self, mounted: Path) -> None:
        """Mount the same filesystem over it, read-only: files opened later cannot be written.

        A mount with files that are open for writing cannot itself be made read-only.
        """
        stage = self.folder / "read-only"
        stage.mkdir(exist_ok=True)
        self.run("mount", "--bind", mounted, stage)
        self.run("mount", "-o", "remount,bind,ro", stage)
        self.run("mount", "--bind", stage, mounted)
        self.run("umount", stage)

    def make_writable(self, mounted: Path) -> None:
        """Undo `make_read_only`."""
        self.run("umount", "--lazy", mounted)


class NodeRanks(Ranks):
    """The processes of one attempt, the first half on node 0, the second on node 1."""

    def __init__(
        self, nodes: list[Node], trial: TrialDir, world: int, faults: list[Fault], log: Path
    ) -> None:
        self.launch = log.stem
        self.log = log
        self.ranks = []
        local_world = world // NODES
        for rank in range(world):
            number, local_rank = divmod(rank, local_world)
            variables = {
                "PATH": os.environ["PATH"],
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(local_world),
                "MASTER_ADDR": "127.0.0.1",
                "JEPA_LAUNCH": self.launch,
                "SLURMD_NODENAME": f"node{number}",
                "OMP_NUM_THREADS": "1",
                FAULTS: dump(faults),
            }
            self.ranks.append(nodes[number].server.spawn(trial.path, variables, log))

    def of_node(self, number: int) -> tuple[int, ...]:
        """The ranks of a node."""
        half = len(self.ranks) // NODES
        return tuple(range(number * half, (number + 1) * half))


# ---- filesystems


class Filesystem:
    """A filesystem of its own, mounted at `path`. Tests fill it and make room again."""

    path: Path

    def fill(self, spare: int) -> None:
        """Leave about `spare` bytes.

        Blocks of removed files count as free before they can be used again: first they are synced,
        and what was taken beyond `spare` is given back.
        """
        command("sync", "--file-system", self.path)
        with (self.path / "ballast").open("ab") as ballast:
            left = shutil.disk_usage(self.path).free - spare
            step = 1 << 20
            while left > 0 and step >= 512:
                try:
                    left -= os.write(ballast.fileno(), bytes(min(step, left)))
                    os.fsync(ballast.fileno())
                except OSError as e:
                    assert e.errno == errno.ENOSPC
                    step //= 2
            missing = spare - shutil.disk_usage(self.path).free
            if missing > 0:
                size = ballast.seek(0, os.SEEK_END)
                ballast.truncate(max(0, size - missing))
                os.fsync(ballast.fileno())

    def make_room(self) -> None:
        (self.path / "ballast").unlink()


class Ext4(Filesystem):
    def __init__(self, path: Path, size: int = 24 << 20) -> None:
        self.path = path
        image = make_image(path, size)
        command("mkfs.ext4", "-q", "-m", "0", "-N", "2048", image)
        command("mount", "-o", "loop", image, path)


class Tmpfs(Filesystem):
    def __init__(self, path: Path, size: int = 16 << 20) -> None:
        self.path = path
        path.mkdir()
        command("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path)


class Quota(Filesystem):
    """A btrfs subvolume with a limit: the quota of a user.

    Writes beyond it end in EDQUOT, for root too.
    """

    def __init__(self, path: Path, size: int = 256 << 20) -> None:
        image = make_image(path, size)
        command("mkfs.btrfs", "-q", image)
        # what was removed counts until it is committed
        command("mount", "-o", "loop,commit=1", image, path)
        self.path = path / "user"
        command("btrfs", "quota", "enable", path)
        command("btrfs", "subvolume", "create", self.path)

    def fill(self, spare: int) -> None:
        command("btrfs", "filesystem", "sync", self.path)
        groups = command("btrfs", "qgroup", "show", "--raw", "-f", self.path)
        _, used, *_ = groups.splitlines()[-1].split()
        self._limit(int(used) + spare)

    def make_room(self) -> None:
        self._limit("none")

    def _limit(self, size: int | str) -> None:
        """By the parent folder, which has no limit: to set one writes."""
        number = command("btrfs", "inspect-internal", "rootid", self.path).strip()
        command("btrfs", "qgroup", "limit", size, f"0/{number}", self.path.parent)


def make_image(path: Path, size: int) -> Path:
    path.mkdir()
    image = path.with_name(f"{path.name}.img")
    with image.open("wb") as f:
        f.truncate(size)
    return image


# ---- the fixtures


class Cluster:
    """Two nodes and the folder that they share."""

    def __init__(self, folder: Path) -> None:
        self.shared = folder / "shared"
        self.shared.mkdir()
        command("mount", "--bind", self.shared, self.shared)
        command("mount", "--make-shared", self.shared)
        self._cleaner = subprocess.Popen(
            ["sh", "-c", CLEAN, str(self.shared)], stdin=subprocess.PIPE, start_new_session=True
        )
        self.nodes = [Node(folder / f"node{number}") for number in range(NODES)]
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.started: list[NodeRanks] = []
        self._names = itertools.count()

    def start(self, trial: TrialDir, world: int, faults: list[Fault] | None = None) -> NodeRanks:
        """The ranks of one attempt."""
        log = self.logs / f"test-{os.getpid()}-{next(self._names)}.log"
        self.started.append(NodeRanks(self.nodes, trial, world, faults or [], log))
        return self.started[-1]

    def filesystem(self, kind: type[Filesystem] = Ext4) -> Filesystem:
        return kind(self.shared / f"disk{next(self._names)}")  # type: ignore[call-arg]

    def end_attempts(self) -> None:
        """Kill what still runs, and take away its disks."""
        for ranks in self.started:
            ranks.kill(9)
            ranks.wait()
        self.started.clear()
        for path in sorted(self.shared.glob("disk*")):
            if path.is_mount():
                for node in self.nodes:
                    # not covered by a read-only mount, as most of the time
                    with contextlib.suppress(AssertionError):
                        node.run("umount", "--lazy", path)
                command("umount", "--lazy", path)
        for image in self.shared.glob("*.img"):
            image.unlink()

    def close(self) -> None:
        self.end_attempts()
        for node in self.nodes:
            node.server.close()
        self._cleaner.communicate()


def require() -> None:
    """Skip the test where disk faults cannot be real; with JEPA_REQUIRE_FAULTS, fail it."""
    if reason := missing():
        reason = f"no real disk faults on this machine: {reason}"
        pytest.fail(reason) if os.environ.get("JEPA_REQUIRE_FAULTS") else pytest.skip(reason)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require()
    cluster = Cluster(tmp_path_factory.mktemp("two-nodes"))
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """Two nodes; what a test started on them is killed and unmounted at its end."""
    yield two_nodes
    two_nodes.end_attempts()


Start = Callable[..., NodeRanks]
