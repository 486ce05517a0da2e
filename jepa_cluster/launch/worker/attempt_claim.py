"""Pass the number of the attempt and the address of rank 0 to all ranks of a launch.

In: a trial and the `DistEnv` of this rank. Out: a `Claim`. Rank 0 opens the attempt and writes its
address into the record. On each node one rank, local rank 0, looks for that record on the shared
filesystem and passes it to the node's other ranks through an abstract Unix socket, which leaves no
file behind. Does not import torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from jepa_cluster.errors import TrialError
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json

CLAIM_PATIENCE = 600.0  # seconds from the start of rank 0 until it has opened an attempt
LATE_START = 60.0  # seconds that rank 0 may start after another rank, which waits so much longer
# Seconds without a sign of local rank 0, which may be stopped, until a rank reads files itself.
# Less than KillWait, as the watchdog, which ends a stuck attempt, starts after that.
NODE_PATIENCE = 15.0
SIGN_SECONDS = 0.2  # between two signs of local rank 0
SIGN_OF_LIFE = b"\n"
# Seconds that a rank which was asked to stop still waits, so that it can stop with the others.
STOP_PATIENCE = 10.0
# Seconds between two looks, and their ratio.
FIRST_PAUSE, LONGEST_PAUSE, PAUSE_GROWTH = 0.05, 1.0, 1.5
REVALIDATE_SECONDS = 5.0  # between two requests that an NFS client read attempts/ from the server
MESSAGE_BYTES = 4096  # a claim is far shorter
NEWEST = 3  # of the attempts that exist at the first look, only so many are read


@dataclass(frozen=True)
class Claim:
    """attempt: its number. address: "host:port" where rank 0 listens."""

    attempt: int
    address: str


def wait_for_claim(
    trial: TrialDir,
    env: DistEnv,
    stopping: Callable[[], bool],
    begun: float,
) -> Claim | None:
    """Wait until rank 0 has opened the attempt of this launch.

    stopping: whether a signal asked this process to stop. Then, or when local rank 0 of another
    node than rank 0's sees the STOP file, the wait ends within `STOP_PATIENCE`. begun:
    time.monotonic() at the start of this process. Returns None when it ended because of that.
    Raises TrialError after `CLAIM_PATIENCE`, and some time for a late rank 0.
    """
    records = NewRecords(trial, env.launch)
    node = NodeClient(socket_name(trial, env)) if env.local_rank > 0 else None
    pause, stop_seen = FIRST_PAUSE, False
    end = begun + CLAIM_PATIENCE + LATE_START
    while True:
        claim = node.receive() if node else None
        if not claim and not (node and time.monotonic() < node.heard + NODE_PATIENCE):
            claim = records.look()
        if claim:
            return claim
        is_stopped = stopping() or (env.is_first_on_node and trial.stop.exists())
        if is_stopped and not stop_seen:
            stop_seen, end = True, time.monotonic() + STOP_PATIENCE
        if time.monotonic() > end:
            break
        if not (node and node.connected):  # else `receive` has waited
            time.sleep(pause)
            pause = min(pause * PAUSE_GROWTH, LONGEST_PAUSE)
    if stop_seen:
        return None
    raise TrialError(
        f"rank 0 has not opened an attempt for launch {env.launch} in {CLAIM_PATIENCE:.0f} s",
        where=f"rank {env.rank} on {socket.gethostname()}",
        hint="look at rank 0's output in the launcher's log",
    )


class NewRecords:
    """Finds the attempt record of a launch.

    Reads no record twice, and few of those that were there before.
    """

    def __init__(self, trial: TrialDir, launch: str) -> None:
        self.trial, self.launch = trial, launch
        self._known: set[int] | None = None
        self._revalidate_at = time.monotonic() + REVALIDATE_SECONDS

    def look(self) -> Claim | None:
        """List the attempts and read the records that are new since the last look.

        A record that cannot be parsed yet (rank 0 is writing it) is read again at the next look.
        """
        if time.monotonic() > self._revalidate_at:
            self.trial.revalidate_attempts()
            self._revalidate_at = time.monotonic() + REVALIDATE_SECONDS
        numbers = self.trial.attempt_numbers()
        if self._known is None:
            self._known = set(numbers[:-NEWEST])
        for number in reversed(numbers):
            if number in self._known:
                continue
            try:
                record = read_json(self.trial.attempt(number))
            except (TrialError, OSError):
                continue
            if record is None:
                continue
            self._known.add(number)
            if record.get("launch") == self.launch:
                return Claim(number, str(record.get("address", "")))
        return None


# ---- one rank per node passes it to the others


def socket_name(trial: TrialDir, env: DistEnv) -> str:
    """Return the abstract address of a node's local rank 0.

    Other users, launches and nodes have another one. Several emulated nodes may run on one machine,
    hence the number of the node.
    """
    identity = f"{os.getuid()} {trial.path} {env.launch} {env.node}"
    return "\0jepa-" + hashlib.sha256(identity.encode()).hexdigest()[:40]


class NodeServer:
    """Passes the claim to the other ranks of the node, which may connect before it is known.

    Until then it sends them signs of life. The sockets keep messages apart.
    """

    def __init__(self, name: str, clients: int) -> None:
        """clients: ranks to answer.

        If the name is taken the server does nothing, and the ranks read files.
        """
        self.clients = clients
        self._message = SIGN_OF_LIFE
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            listener.bind(name)
            listener.listen(clients)
        except OSError:
            listener.close()
            return
        threading.Thread(target=self._serve, args=(listener,), name="claim", daemon=True).start()

    def answer(self, claim: Claim) -> None:
        """Send the claim to the ranks that have connected, and to each that connects later."""
        self._message = json.dumps(asdict(claim)).encode()

    def _serve(self, listener: socket.socket) -> None:
        waiting: list[socket.socket] = []
        answered = 0
        listener.settimeout(SIGN_SECONDS)
        with contextlib.suppress(OSError), listener:
            while answered < self.clients:
                with contextlib.suppress(TimeoutError):
                    connection = listener.accept()[0]
                    connection.setblocking(False)  # a stopped rank must not stop the others
                    if peer_uid(connection) == os.getuid():
                        waiting.append(connection)
                message = self._message
                for connection in waiting:
                    with contextlib.suppress(OSError):
                        connection.sendall(message)
                if message != SIGN_OF_LIFE:
                    answered += len(waiting)
                    waiting.clear()  # closes the connections


class NodeClient:
    """A rank's connection to local rank 0 of its node. heard: when it last gave a sign of life."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.heard = time.monotonic()
        self._socket: socket.socket | None = None

    def receive(self) -> Claim | None:
        """Return the claim if it arrives within `LONGEST_PAUSE`.

        Returns None at once if local rank 0 cannot be reached.
        """
        if self._socket is None:
            self._socket = self._connect()
        if self._socket is None:
            return None
        try:
            message = self._socket.recv(MESSAGE_BYTES)
        except TimeoutError:
            return None
        except OSError:
            message = b""
        if message:
            self.heard = time.monotonic()
            if message != SIGN_OF_LIFE:
                return Claim(**json.loads(message))
        else:
            self._socket.close()
            self._socket = None
        return None

    @property
    def connected(self) -> bool:
        return self._socket is not None

    def _connect(self) -> socket.socket | None:
        """Return a connection whose other end runs as our own user, else None."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(LONGEST_PAUSE)
        with contextlib.suppress(OSError):
            connection.connect(self.name)
            if peer_uid(connection) == os.getuid():
                return connection
        connection.close()
        return None


def peer_uid(connection: socket.socket) -> int:
    """Return the user id of the process at the other end of a Unix socket, by the kernel."""
    layout = "iII"  # pid, uid, gid
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(layout)
    )
    return struct.unpack(layout, credentials)[1]
