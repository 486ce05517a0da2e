"""Ranks that join an attempt: one per node reads the shared filesystem and answers the others."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from jepa_cluster.errors import TrialError
from jepa_cluster.launch.worker import attempt_claim, main
from jepa_cluster.launch.worker.attempt_claim import (
    SIGN_SECONDS,
    Claim,
    NewRecords,
    NodeClient,
    NodeServer,
    socket_name,
    wait_for_claim,
)
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.preemption import PreemptionHandler
from jepa_cluster.trial.directory import Root, TrialDir

EARLIER = 20

RANK = """
import json, os, sys, time
from jepa_cluster.launch.worker import attempt_claim, main
from jepa_cluster.training.dist_env import from_environment
from jepa_cluster.training.preemption import PreemptionHandler
from jepa_cluster.trial.directory import TrialDir

counts = {"reads": 0, "listings": 0}

def counted(name, function):
    def call(*args):
        counts[name] += 1
        return function(*args)
    return call

place = from_environment(os.environ)
trial = TrialDir(main.Path(sys.argv[1]))
attempt_claim.read_json = counted("reads", attempt_claim.read_json)
if place.is_rank0:
    time.sleep(3)
else:
    TrialDir.attempt_numbers = counted("listings", TrialDir.attempt_numbers)
attempt, place = main.claim(trial, place, PreemptionHandler())
print(json.dumps({"attempt": attempt, "address": place.address, **counts}), flush=True)
time.sleep(3)  # as the trainer would; rank 0 of each node still answers
"""


@pytest.fixture
def trial(tmp_path: Path) -> TrialDir:
    made = Root(tmp_path).trial("tiny")
    for folder in ("attempts", "logs"):
        (made.path / folder).mkdir(parents=True)
    return made


def place(
    rank: int,
    launch: str = "7.0",
    node_ranks: int = 2,
) -> DistEnv:
    local = rank % node_ranks
    return DistEnv(
        rank,
        4,
        local,
        node_ranks,
        launch,
        node=rank - local,
    )


def start(
    trial: TrialDir,
    code: str,
    rank: int,
    world: int,
    node_ranks: int,
) -> subprocess.Popen[str]:
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank % node_ranks),
        "LOCAL_WORLD_SIZE": str(node_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "JEPA_LAUNCH": f"test-{os.getpid()}",
    }
    command = [sys.executable, "-c", textwrap.dedent(code), str(trial.path)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
    )


def test_one_rank_per_node_reads_the_filesystem(trial: TrialDir) -> None:
    """Two nodes with two ranks each, 20 earlier attempts, and a rank 0 that is 3 s late."""
    for n in range(EARLIER):
        trial.claim({"launch": f"earlier-{n}", "address": "127.0.0.1:1"})
    ranks = [start(trial, RANK, rank, 4, 2) for rank in range(4)]
    found = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    for report in found:
        assert report["attempt"] == EARLIER + 1
        assert report["address"] == found[0]["address"]
    assert found[0]["reads"] == 0
    assert found[1]["reads"] == 0
    assert found[3]["reads"] == 0
    # its own record may be read while it is written
    assert 1 <= found[2]["reads"] <= attempt_claim.NEWEST + 3
    assert found[1]["listings"] == 0
    assert found[3]["listings"] == 0
    assert found[2]["listings"] <= 16


def test_a_record_is_read_once_and_again_only_while_it_is_torn(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the records that exist only the newest few are read; then each new number."""
    reads: list[str] = []
    read = attempt_claim.read_json

    def counted(path: Path) -> object:
        reads.append(path.name)
        return read(path)

    monkeypatch.setattr(attempt_claim, "read_json", counted)
    for _ in range(EARLIER):
        trial.claim({"launch": "another"})
    records = NewRecords(trial, "7.0")
    assert [records.look() for _ in range(5)] == [None] * 5
    assert reads == ["0020.json", "0019.json", "0018.json"]
    trial.attempt(21).write_text('{"launch": "7')
    assert records.look() is None
    trial.attempt(21).write_text('{"launch": "7.0", "address": "h:1"}')
    assert records.look() == Claim(21, "h:1")
    assert reads[3:] == ["0021.json"] * 2


def test_a_rank_without_its_nodes_first_rank_reads_the_filesystem_itself(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local rank 0 of this node never starts, or was killed."""
    monkeypatch.setattr(attempt_claim, "NODE_PATIENCE", 0.3)
    trial.claim({"launch": "7.0", "address": "h:1"})
    assert wait_for_claim(trial, place(3), lambda: False, time.monotonic()) == Claim(1, "h:1")


def test_a_rank_reads_no_files_while_its_nodes_first_rank_lives(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late rank 0 is, and although local rank 0 was late, too."""
    monkeypatch.setattr(attempt_claim, "NODE_PATIENCE", 1.0)
    found: list[Claim | None] = []

    def join() -> None:
        found.append(wait_for_claim(trial, place(3), lambda: False, time.monotonic()))

    rank = threading.Thread(target=join)
    rank.start()
    time.sleep(2)
    server = NodeServer(socket_name(trial, place(2)), 1)
    time.sleep(2)
    trial.claim({"launch": "7.0", "address": "of the file"})
    time.sleep(2)
    server.answer(Claim(1, "of the socket"))
    rank.join(5)
    assert found == [Claim(1, "of the socket")]


def test_a_stop_file_ends_the_wait_on_the_other_nodes(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt_claim, "STOP_PATIENCE", 0.5)
    trial.stop.touch()
    assert wait_for_claim(trial, place(2), lambda: False, time.monotonic()) is None


def test_a_rank_waits_on_a_connection_that_is_there_before_the_claim(trial: TrialDir) -> None:
    """It connects while local rank 0 still looks for the record, and gets the answer at once."""
    server = NodeServer(socket_name(trial, place(2)), 1)
    found: list[Claim | None] = []

    def join() -> None:
        found.append(wait_for_claim(trial, place(3), lambda: False, time.monotonic()))

    rank = threading.Thread(target=join)
    rank.start()
    time.sleep(1.5)
    server.answer(Claim(5, "h:2"))
    rank.join(5)
    assert found == [Claim(5, "h:2")]


def test_a_rank_that_was_stopped_finds_the_claim_behind_signs_of_life(trial: TrialDir) -> None:
    """Messages that have gathered meanwhile are read one by one."""
    server = NodeServer("\0jepa-test-of-signs", 1)
    client = NodeClient("\0jepa-test-of-signs")
    assert client.receive() is None
    time.sleep(3 * SIGN_SECONDS)
    server.answer(Claim(5, "h:2"))
    time.sleep(2 * SIGN_SECONDS)
    received = [client.receive() for _ in range(5)]
    assert received[0] is None
    assert Claim(5, "h:2") in received


@pytest.mark.skipif(os.getuid() != 0, reason="needs a process of another user")
def test_an_answer_of_another_user_is_not_believed(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of another user on the node listens under the name of our socket."""
    monkeypatch.setattr(attempt_claim, "NODE_PATIENCE", 1.0)
    trial.claim({"launch": "7.0", "address": "h:1"})
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    name = socket_name(trial, place(3))
    impostor = fork.Process(target=_answer_as_nobody, args=(name, ready), daemon=True)
    impostor.start()
    assert ready.wait(10)
    assert wait_for_claim(trial, place(3), lambda: False, time.monotonic()) == Claim(1, "h:1")
    impostor.kill()
    impostor.join()


def _answer_as_nobody(name: str, ready: threading.Event) -> None:
    os.setuid(65534)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(name)
    listener.listen(8)
    ready.set()
    while True:
        listener.accept()[0].sendall(b'{"attempt": 99, "address": "evil:1"}')


def test_launches_and_nodes_have_sockets_of_their_own(trial: TrialDir) -> None:
    """Two emulated nodes, or two jobs, on one machine do not answer each other's ranks."""
    names = {socket_name(trial, p) for p in (place(0), place(2), place(0, "7.1"), place(1))}
    assert len(names) == 3
    assert socket_name(TrialDir(trial.path / "other"), place(0)) not in names


def test_a_rank_that_is_asked_to_stop_does_not_wait_for_rank_0(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It looks for a few more seconds, because rank 0 may have opened the attempt; then it ends."""
    monkeypatch.setattr(attempt_claim, "STOP_PATIENCE", 0.5)
    assert wait_for_claim(trial, place(2), lambda: True, time.monotonic()) is None
    trial.claim({"launch": "7.0", "address": "h:1"})
    assert wait_for_claim(trial, place(2), lambda: True, time.monotonic()) == Claim(1, "h:1")


def test_a_rank_0_that_never_comes_is_an_error_that_says_so(
    trial: TrialDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait ends after `CLAIM_PATIENCE`."""
    monkeypatch.setattr(attempt_claim, "CLAIM_PATIENCE", 0.3)
    monkeypatch.setattr(attempt_claim, "LATE_START", 0.0)
    with pytest.raises(TrialError, match="not opened an attempt for launch 7"):
        wait_for_claim(trial, place(2), lambda: False, time.monotonic())


SHORT_STOP = """
import sys
from jepa_cluster.launch.worker import attempt_claim, main
attempt_claim.STOP_PATIENCE = 0.5
"""
MAIN = """
main.main(sys.argv[1:])
"""


def test_a_signal_before_the_attempt_is_opened_is_a_preemption(
    trial: TrialDir,
) -> None:
    """A process that waits for rank 0, and a rank 0 that is signalled before its first line."""
    waiting = start(trial, SHORT_STOP + "print('ready', flush=True)" + MAIN, 1, 2, 2)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "ready\n"
    time.sleep(1)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.wait(20) == 75
    held = {signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        first = start(trial, SHORT_STOP + MAIN, 0, 2, 2)
        first.send_signal(signal.SIGTERM)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
    assert first.wait(20) == 75
    assert trial.attempt_numbers() == []


def test_the_job_raises_the_limit_of_open_files_before_anything_else() -> None:
    """The soft limit is raised to the hard one."""
    code = """
    import os, resource
    from jepa_cluster.launch.worker import main

    def print_limits(env):
        print(*resource.getrlimit(resource.RLIMIT_NOFILE), flush=True)
        os._exit(0)

    main.from_environment = print_limits
    main.run("nowhere")
    """

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, 512))

    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.stdout == "512 512\n", done.stderr


def test_rank_0_opens_no_attempt_when_it_was_asked_to_stop(trial: TrialDir) -> None:
    """The other ranks may have ended already."""
    guard = PreemptionHandler()
    guard.request_stop("SIGTERM")
    assert main.claim(trial, place(0), guard) is None
    assert trial.attempt_numbers() == []
