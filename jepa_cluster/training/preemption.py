"""Turn signals into a flag; let all ranks stop between two steps, and in time.

In: TERM, USR2 or INT at any moment, also while Python starts or the main thread is inside C++. Out:
`PreemptionHandler`, a flag with the time it was raised, and `exit_rank`, which ends the process
and, where the job shall run again, has one of its ranks ask Slurm for a requeue. Does not import
torch, because the handler must be installed before torch is imported.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
OURS_TO_REQUEUE = ("RUNNING", "SIGNALING")  # in any other state Slurm has already decided
# How Slurm refuses a requeue for good.
NEVER = ("disabled", "Access/permission denied")

# Seconds that the other ranks give rank 0 before they compete to request the requeue.
HEAD_START = 10.0
# Seconds until the next rank may request it in place of one that is dead or got no answer.
TURN_SECONDS = 60.0
ANSWER_MARGIN = 10.0  # seconds before the end of its turn at which a rank stops asking
TURNS = 5
REQUEUE_SECONDS = 120.0  # in which a rank without a claim file repeats its request
ACCEPTED, REFUSED = "accepted\n", "refused\n"  # content of a claim file once Slurm has answered

# Set by the job: what to do where a requeue is not possible, and after Slurm has requeued it.
successor: Callable[[], bool] | None = None
requeued: Callable[[str], None] | None = None


class PreemptionHandler:
    """Turns signals into a flag. Install it in the main thread, first of all, once per process."""

    def __init__(self) -> None:
        self.signal: str | None = None  # name of the first one that came
        self.since: float | None = None  # time.monotonic() when it came
        self._deadline: tuple[float, Callable[[], None]] | None = None
        self._read, self._write = os.pipe()

    def install(self) -> PreemptionHandler:
        """Turn signals into the flag from here on. Signals blocked since the start arrive now."""
        os.set_blocking(self._write, False)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in SIGNALS:
            # The C handler writes to the pipe; the thread below reads it.
            signal.signal(number, lambda *_: None)
        # Known now, not when the thread gets to it.
        for pending in sorted(signal.sigpending() & set(SIGNALS)):
            self.request_stop(signal.Signals(pending).name)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()
        return self

    @property
    def stop_requested(self) -> bool:
        return self.since is not None

    def request_stop(self, name: str) -> None:
        """Ask to stop as a signal would. The first reason stays."""
        if self.since is None:
            self.signal, self.since = name, time.monotonic()
            if self._deadline:
                self._arm()

    def set_deadline(self, seconds: float, leave: Callable[[], None]) -> None:
        """Call `leave` in a thread if the process lives `seconds` after the flag was raised."""
        self._deadline = (seconds, leave)
        if self.stop_requested:
            self._arm()

    def ignore_signals(self) -> None:
        """Ignore signals at the end, so that a late one cannot turn success into failure."""
        self._deadline = None
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self) -> None:
        names = {int(s): s.name for s in SIGNALS}
        while data := os.read(self._read, 64):
            for number in data:
                if number in names:
                    self.request_stop(names[number])

    def _arm(self) -> None:
        threading.Thread(target=self._expire, name="deadline", daemon=True).start()

    def _expire(self) -> None:
        if self._deadline is None or self.since is None:
            return
        seconds, leave = self._deadline
        while (left := self.since + seconds - time.monotonic()) > 0:
            time.sleep(min(left, 0.5))
        if self._deadline is not None:
            leave()


def slurm_job_id(env: Mapping[str, str]) -> str:
    """Return the id of this job as Slurm's programs take it.

    Not SLURM_JOB_ID: in one task of each array this is the array's own number, and a requeue of
    that number requeues every task of the array.
    """
    if "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env["SLURM_JOB_ID"]


def request_requeue(env: Mapping[str, str], patience: float) -> bool | None:
    """Ask Slurm to requeue our own job, if Slurm still reports it running with our restart count.

    A job on a node that was suspended may run again elsewhere; its restart count differs then, and
    it is left alone. While the controller is down the question is repeated every 2 s. Where
    scontrol is missing or requeues are disabled, `successor` submits a chained job instead, and
    this job shall end by itself.

    env: the environment of the job. patience: seconds. Returns True: accepted. False: it will not
    be requeued. None: Slurm did not answer.
    """
    job, restarts = slurm_job_id(env), env.get("SLURM_RESTART_COUNT", "0")
    end = time.monotonic() + patience
    while time.monotonic() < end:
        status = _ask("squeue", "--noheader", "--Format=State:20,RestartCnt:20", f"--jobs={job}")
        if status is not None and status.split() not in [
            [state, restarts] for state in OURS_TO_REQUEUE
        ]:
            return False
        if status is not None or not shutil.which("squeue"):
            done = _requeue(job)
            if done and requeued is not None:
                requeued(job)
            if done is not None:
                return done or (successor is not None and successor())
        time.sleep(2)
    print(
        f"preemption: Slurm did not answer for {patience:.0f} s; job {job} is not requeued",
        file=sys.stderr,
    )
    return None


def requeue_from_one_rank(env: Mapping[str, str], first: bool, claim: Path) -> None:
    """Have one rank of the job ask Slurm for a requeue. Every rank calls this.

    Returns when this process shall end.

    The rank that creates the file `claim`.0 asks Slurm; the others wait to be killed with the job.
    Ranks that are still alive after `TURN_SECONDS` compete for `claim`.1, and so on for `TURNS`
    turns, so a rank that died or got no answer is replaced. The rank that got an answer writes it
    into its file, and the others act on it at the next turn. Where no file can be created
    (read-only or full disk), each rank asks, at a random time within the turn.

    first: this rank begins at once; the others give it a head start. claim: path prefix, the same
    on all ranks and used by this job and restart alone (`TrialDir.requeue_claim`).
    """
    if not first:
        time.sleep(HEAD_START)
    for turn in range(TURNS):
        end = time.monotonic() + TURN_SECONDS
        file = claim.with_name(f"{claim.name}.{turn}")
        answer = _request_if_ours(env, file, first)
        if answer is None:
            time.sleep(max(0.0, end - time.monotonic()))
            answer = _recorded_answer(file)
        if answer:
            sleep_until_killed()
        if answer is not None:
            return


def _request_if_ours(env: Mapping[str, str], file: Path, first: bool) -> bool | None:
    """Ask Slurm if this rank creates `file`, and record the answer in it.

    Returns None without an answer, and when it is another rank's turn.
    """
    created = False
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        created = True
    except FileExistsError:
        return _recorded_answer(file)
    except OSError as e:
        print(f"preemption: {file.name}: {e.strerror}; asking Slurm without it", file=sys.stderr)
        if not first:
            time.sleep(random.uniform(0, TURN_SECONDS / 2))
    answer = request_requeue(env, TURN_SECONDS - ANSWER_MARGIN)
    if created and answer is not None:
        with contextlib.suppress(OSError):
            file.write_text(ACCEPTED if answer else REFUSED)
    return answer


def _recorded_answer(file: Path) -> bool | None:
    """Return the recorded answer to another rank; None if there is none or it is unreadable."""
    try:
        return {ACCEPTED: True, REFUSED: False}.get(file.read_text())
    except OSError:
        return None


def _requeue(job: str) -> bool | None:
    """True: Slurm took it. False: it never will, from here. None: not now."""
    if not shutil.which("scontrol"):
        return False
    refusals: list[str] = []
    if _ask("scontrol", "requeue", job, refusals=refusals) is not None:
        return True
    return False if any(word in text for text in refusals for word in NEVER) else None


def _ask(*command: str, refusals: list[str] | None = None) -> str | None:
    """One answer of a Slurm program; None when it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        print(f"preemption: {command[0]}: {e}", file=sys.stderr)
        return None
    if done.returncode != 0:
        print(f"preemption: {' '.join(command)}: {done.stderr.strip()}", file=sys.stderr)
        if refusals is not None:
            refusals.append(done.stderr)
        return None
    return done.stdout


def exit_rank(
    code: int,
    requeue: bool,
    first: bool,
    claim: Path | None = None,
) -> NoReturn:
    """End this process by `os._exit(code)`; first ask Slurm for a requeue if requested.

    After an accepted request the process waits to be killed, because Slurm takes a task that ends
    by itself for a result. Threads of torch are not joined.

    requeue: whether the job shall run again. first: whether this rank asks at once; normally rank
    0. claim: `TrialDir.requeue_claim(launch)`; the ranks then agree on one that asks
    (`requeue_from_one_rank`). None: this rank asks if `first`, else it only waits to be killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if requeue:
        for number in SIGNALS:
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
        if claim is not None:
            requeue_from_one_rank(os.environ, first, claim)
        elif not first or request_requeue(os.environ, REQUEUE_SECONDS):
            sleep_until_killed()
    os._exit(code)


def sleep_until_killed(seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
