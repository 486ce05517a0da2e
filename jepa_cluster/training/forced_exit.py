"""End a rank from another thread when its main thread cannot.

In: the watchdog's verdict that the main thread hangs, or a signal whose deadline comes before the
ranks have stopped. A collective of NCCL waits without end for a rank that died, and raises nothing.
Out: the attempt's record and torch's flight record on disk, and an exit that lets the scheduler run
the trial again. Imports no torch.
"""

# pyright: standard

from __future__ import annotations

import contextlib
import json
import math
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from jepa_cluster.errors import ExitCode, JepaError, TrialError
from jepa_cluster.training.attempt_record import close_record
from jepa_cluster.training.channel import Channel
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler, exit_rank
from jepa_cluster.training.watchdog import PhaseTimer, print_stderr
from jepa_cluster.trial.directory import TrialDir

# Seconds, and at most this share of the time from TERM to KILL:
LONGEST_RECORD, RECORD_SHARE = 10.0, 1 / 6  # to write the record; the filesystem may hang
LONGEST_ROLL_CALL, ROLL_CALL_SHARE = 10.0, 1 / 4  # to wait for the word of the other ranks
OTHER_RANKS_SECONDS = 2.0  # that a hung rank leaves the others to find that they hang, too
POLL_SECONDS = 0.1  # between two looks at the deadline


@dataclass(eq=False)
class ForcedExit:
    """The ends of one rank that do not need its main thread.

    attempt: 0 until it is claimed. new_channel: to the other ranks, once they have met.
    save_error: why the newest save failed. silent: which ranks have not answered since the signal.
    """

    trial: TrialDir
    env: DistEnv
    timer: PhaseTimer
    handler: PreemptionHandler
    hooks: JobHooks
    attempt: int = 0
    new_channel: Callable[[], Channel] | None = None
    save_error: Callable[[], str] = lambda: ""
    silent: str = "the ranks have not met"

    def start(self) -> None:
        """Watch the deadline of the first signal, in a thread."""
        self.handler.kill_wait = self.hooks.kill_wait
        threading.Thread(target=self._watch_deadline, name="deadline", daemon=True).start()

    def on_hang(self, what: str) -> None:
        """Called by the watchdog when this rank makes no progress. Never returns."""
        self._leave(ExitCode.HANG, "hang", what, OTHER_RANKS_SECONDS)

    def on_claim_error(self, what: str, cause: str) -> NoReturn:
        """End when a node or a filesystem failed before this rank could join an attempt."""
        self._leave(ExitCode.HANG, cause, what)

    def _watch_deadline(self) -> None:
        self.handler.raised.wait()
        threading.Thread(target=self._call_roll, name="roll call", daemon=True).start()
        while time.monotonic() < self.handler.deadline():
            time.sleep(POLL_SECONDS)
        if not self.handler.ending:
            self.leave()

    def _call_roll(self) -> None:
        """Report the signal to rank 0; rank 0 waits for all reports, and tells the others.

        A rank that is dead or stopped does not report. Once all have, the signal is a preemption.
        Rank 0's process holds the store. The wait for a stopped rank 0 does not end.
        """
        rank, world, begun = self.env.rank, self.env.world_size, time.monotonic()
        # Where rank 0 is slow to claim the attempt, the others have left; they are not lost.
        if world == 1 or (self.env.is_rank0 and not self.attempt):
            self.silent = ""
        while self.new_channel is None:
            time.sleep(POLL_SECONDS)
        if world == 1:
            return self.handler.note_contact(math.inf)
        self.silent = "no word of rank 0"
        try:
            channel = self.new_channel()
            channel.post("signal", f"rank {rank}", True)
            names = [f"rank {other}" for other in range(1 if rank else world)]
            patience = min(LONGEST_ROLL_CALL, ROLL_CALL_SHARE * self.handler.kill_wait)
            channel.read("signal", names, patience)
            if self.env.is_rank0:
                channel.post("signal", "all ranks", True)
            channel.read("signal", ["all ranks"], patience)
            self.silent = ""
            self.handler.note_contact(begun)
        except (JepaError, RuntimeError) as e:  # the store's errors are RuntimeErrors
            self.silent = str(e).splitlines()[0]

    def leave(self) -> NoReturn:
        """End as preempted with the newest commit; as lost when a rank does not answer."""
        code, cause, reason = ExitCode.PREEMPTED, "preempted", self.save_error()
        met = self.handler.ranks_met > (self.handler.since or 0.0)
        if self.attempt and self.silent and not met:
            code, cause, reason = ExitCode.HANG, "lost", self.silent
        self._leave(code, cause, reason or "no time to save")

    def _leave(self, code: ExitCode, cause: str, what: str, pause: float = 0.0) -> NoReturn:
        """Record the end, ask for another run where the trial continues, and end the process.

        pause: seconds before the request.

        The filesystem may be what hangs. So a thread writes the record. If it does not end, rank 0
        asks for another run without the files of the trial. Rank 0 does so too when it is preempted
        and no start without an attempt is left: the TERM of another rank may come from its failure.
        """
        answers: list[tuple[bool, bool]] = []  # whether the trial runs again; asked for by files

        def record() -> None:
            again, opened, exhausted = True, False, ""
            with contextlib.suppress(OSError, TrialError):
                opened = bool(self.attempt or self.trial.attempt_of(self.env.launch))
                again = self._record(code, cause, what)
            if again and not opened:
                exhausted = self.hooks.end_start(cause, what)
            answers.append((again and (cause == "preempted" or not exhausted), not exhausted))

        thread = threading.Thread(target=record, daemon=True)
        thread.start()
        thread.join(min(LONGEST_RECORD, RECORD_SHARE * self.handler.kill_wait))
        time.sleep(pause)
        again, by_files = answers[0] if answers else (True, False)
        if again:
            self.hooks.requeue(by_files)
        exit_rank(code)

    def _record(self, code: ExitCode, cause: str, what: str) -> bool:
        """Write the record, unless another rank has. Return whether the trial runs again."""
        trial, attempt = self.trial, self.attempt
        if trial.done.exists():  # this rank was left behind
            exit_rank(ExitCode.DONE)
        opened = trial.attempt_of(self.env.launch)
        if opened and not attempt:
            if self.env.is_rank0 or cause != "preempted":
                attempt = opened["attempt"]
            elif not self._listens(opened.get("address", "")):  # rank 0 is gone
                attempt, code, cause = opened["attempt"], ExitCode.HANG, "lost"
        if attempt:
            step = max(trial.committed(), default=0)
            if cause in ("preempted", "lost"):
                what = f"{self.handler.signal}: left with the commit of step {step}; {what}"
                print_stderr(f"{cause}: {what}")
            if self.env.is_rank0 or cause != "preempted":  # else rank 0 is alive and records it
                close_record(trial, attempt, code, self.timer, step, cause, what)
                write_flight_record(trial, attempt, self.env)
            cause = trial.read_attempt(attempt).get("cause", "")
            if cause == "node" and not self.hooks.may_retry():
                trial.write_failed(cause, what, attempt)
        if trial.failed.exists() or trial.stop.exists():
            return False
        return cause in ("preempted", "node") or not trial.is_stuck()

    def _listens(self, address: str) -> bool:
        """Whether rank 0 is alive: it listens from before the claim to the end of its process."""
        host, _, port = address.rpartition(":")
        seconds = min(LONGEST_RECORD, RECORD_SHARE * self.handler.kill_wait) / 2
        with contextlib.suppress(OSError, ValueError):
            socket.create_connection((host, int(port)), seconds).close()
            return True
        return False


def write_flight_record(trial: TrialDir, attempt: int, env: DistEnv) -> None:
    """Write rankR.flight.json; print the newest collectives that did not end.

    In: the last collectives of gloo and of NCCL, from torch's flight recorder. None before torch is
    imported.
    """
    c10d = sys.modules.get("torch._C._distributed_c10d")
    entries: list[dict[str, Any]] = []
    with contextlib.suppress(Exception):
        for name in ("_dump_fr_trace", "_dump_nccl_trace"):
            dump = getattr(c10d, name, None)
            entries += pickle.loads(dump()).get("entries", []) if dump else []
        entries.sort(key=lambda entry: entry["time_created_ns"])
        path = trial.logs(attempt) / f"rank{env.rank}.flight.json"
        path.write_text(json.dumps(entries, indent=1, default=str))
        unfinished = [entry for entry in entries if not entry.get("retired")]
        for entry in unfinished[-5:]:
            name, sizes = entry["profiling_name"], entry["input_sizes"]
            print_stderr(f"watchdog: {name} of {sizes} began and did not end")
