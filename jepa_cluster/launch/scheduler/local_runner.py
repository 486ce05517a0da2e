"""The runner of the local queue: starts the ranks of trials, waits, and acts on how they end.

It is one process that is detached from the shell and holds a lock. It acts on the end of a trial by
failures.RULES, and exits when the queue is empty. When it is killed the trials run on: the next
runner waits for their end and reads it from their files.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from filelock import Timeout

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.cluster.profile import visible_gpus
from jepa_cluster.launch.scheduler import retry_policy
from jepa_cluster.launch.scheduler.clean_env import clean_environment
from jepa_cluster.launch.scheduler.fork_server import (
    KILL_DELAY,
    ForkServer,
    RankProcess,
    kill_group,
)
from jepa_cluster.launch.scheduler.local import (
    TICK,
    create_folders,
    is_alive,
    list_trials,
    queue_folder,
    read_entry,
    release_held,
    running_folder,
    start_time,
    waiting_entries,
)
from jepa_cluster.records import AttemptRecord, QueueEntry
from jepa_cluster.training.dist_env import local_environment
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import Failure, budget_of, classify_attempt, classify_exit_codes
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import now_ms

IDLE_SECONDS = 1.0  # after which a runner without a trial exits
DEFAULT_RETRIES = 3
EXIT_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class RunningTrial:
    """A running trial. ranks: processes that this runner started; [] when an earlier one did.

    exit_codes: process id -> exit code, in the order of their ends. kill_at: monotonic time.
    """

    entry: QueueEntry
    slots: list[str]
    ranks: list[RankProcess] = field(default_factory=list[RankProcess])
    exit_codes: dict[int, int] = field(default_factory=dict[int, int])
    kill_at: float | None = None


def main(root: Root) -> int:
    """Run the queue until it is empty, unless another runner does."""
    create_folders(root)
    while True:
        try:
            with file_lock.acquire(root.local / "lock", timeout=0):
                runner = Runner(root)
                runner.run()
        except Timeout:
            return 0
        # An entry that is made after this line finds the lock free
        if runner.exiting or not (
            waiting_entries(root) or any(running_folder(root).glob("*.json"))
        ):
            return 0


class Runner:
    """Starts and follows trials until the queue is empty or a signal ends the runner."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.exiting = False
        machine = read_json(root.local / "machine.json") or {}
        count = int(machine.get("slots", 1))
        self.free_slots = list(visible_gpus()[:count]) or [""] * count
        self.trials: dict[str, RunningTrial] = {}
        self.servers: dict[tuple[str, str], ForkServer] = {}  # by Python and code
        release_held(root)  # an earlier runner may have died before it did so
        for path in sorted(running_folder(root).glob("*.json")):
            entry = read_entry(path)
            if entry:
                slots = entry.get("slots") or self.free_slots[: entry["world"]]
                self.trials[path.stem] = RunningTrial(entry, self._take(slots))
                pids = entry.get("pids", [])
                if len(pids) < entry["world"]:  # it died before it had started all ranks
                    for pid, started in pids:
                        if is_alive(pid, started):
                            kill_group(pid)

    def run(self) -> None:
        for number in EXIT_SIGNALS:
            signal.signal(number, self._exit)
        exit_at = time.monotonic() + IDLE_SECONDS
        while True:
            for name in list(self.trials):
                self._follow(name)
            if not self.exiting:
                self._start_what_fits()
            if self.trials:
                exit_at = time.monotonic() + IDLE_SECONDS
            elif self.exiting or time.monotonic() > exit_at:
                break
            time.sleep(TICK)
        for server in self.servers.values():
            server.close()

    def _exit(self, *_: object) -> None:
        """Let all trials save: the machine shuts down, or the user ends the runner.

        This does not wait for a server that is still importing torch.
        """
        self.exiting = True
        for running in self.trials.values():
            for rank in running.ranks:
                rank.send_signal(signal.SIGTERM)

    def _take(self, slots: list[str]) -> list[str]:
        for slot in slots:
            if slot in self.free_slots:
                self.free_slots.remove(slot)
        return slots

    # ---- start

    def _start_what_fits(self) -> None:
        """Start trials strictly in order, so that small ones never starve a large one."""
        for path in waiting_entries(self.root):
            if self.exiting:
                return
            entry = read_entry(path)
            if entry is None or self._waits_for_trunk(entry):
                continue
            if entry["world"] > len(self.free_slots):
                return
            running = running_folder(self.root) / f"{entry['trial']}.json"
            try:
                path.rename(running)
            except FileNotFoundError:  # dequeued meanwhile
                continue
            if _is_over(self.root.trial(entry["trial"])):
                running.unlink()
            else:
                self._start(entry, running)

    def _waits_for_trunk(self, entry: QueueEntry) -> bool:
        """Whether the trunk is active and has not saved the step where the branch begins."""
        trunk = entry.get("trunk")
        if not trunk or trunk not in list_trials(self.root):
            return False
        return not self.root.trial(trunk).checkpoint(entry.get("begins", 0)).exists()

    def _start(self, entry: QueueEntry, path: Path) -> None:
        """Start the ranks. path: of the running entry, which always names every rank that runs."""
        name = entry["trial"]
        slots = self._take(self.free_slots[: entry["world"]])
        running = self.trials[name] = RunningTrial(entry, slots)
        entry["launch"], entry["slots"] = f"local-{uuid.uuid4().hex[:12]}", slots
        pids = entry["pids"] = list[tuple[int, int]]()
        self._logs(name).mkdir(parents=True, exist_ok=True)
        try:
            for rank in range(entry["world"]):
                process = self._start_rank(entry, rank, slots)
                running.ranks.append(process)
                if self.exiting:  # since the rank was requested
                    process.send_signal(signal.SIGTERM)
                pids.append((process.pid, start_time(process.pid)))
                write_json(path, entry)
        except LaunchError as e:
            for process in running.ranks:
                process.kill()
            self._finish(running, Failure("infrastructure", e.what))

    def _start_rank(self, entry: QueueEntry, rank: int, slots: list[str]) -> RankProcess:
        code = self.root.code / entry["code"]
        environment = {
            **clean_environment(os.environ),
            **entry["environment"],
            "PYTHONPATH": str(code),
            **local_environment(rank, entry["world"], entry.get("launch", "")),
        }
        if slots[0]:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slots)
        key = entry["python"], entry["code"]
        if key not in self.servers or not self.servers[key].alive:
            self.servers[key] = ForkServer(entry["python"], code, environment)
        trial = self.root.trial(entry["trial"])
        return self.servers[key].spawn(
            trial.path, environment, self._logs(trial.name) / f"rank{rank}.log"
        )

    def _logs(self, trial: str) -> Path:
        """What the ranks print before their own logs are open."""
        return self.root.local / "logs" / trial

    # ---- end

    def _follow(self, name: str) -> None:
        """Finish a trial whose ranks have ended; kill the others some time after one has failed."""
        running = self.trials[name]
        if not running.ranks:  # of an earlier runner: only files and process ids are known
            if not any(is_alive(*pid) for pid in running.entry.get("pids", [])):
                self._finish(running, self._recorded_failure(running.entry))
            return
        ended: list[tuple[int, int]] = []
        for rank in running.ranks:
            code = rank.poll()
            if code is not None and rank.pid not in running.exit_codes:
                ended.append((code, rank.pid))
        for code, pid in sorted(ended):  # a killed rank before those that complain of it
            running.exit_codes[pid] = code
        codes = list(running.exit_codes.values())
        if len(codes) == len(running.ranks):
            self._finish(running, classify_exit_codes(codes))
        elif any(codes):
            now = time.monotonic()
            running.kill_at = running.kill_at or now + KILL_DELAY
            if now > running.kill_at:
                for rank in running.ranks:
                    rank.kill()

    def _finish(self, running: RunningTrial, failure: Failure) -> None:
        """Close the record of the attempt, requeue the trial or not, and free its slots."""
        entry = running.entry
        trial = self.root.trial(entry["trial"])
        for rank in running.ranks:
            rank.kill()
        if failure.cause == "done" and not trial.done.exists():  # at runtime.stop_after: "stopped"
            failure = self._recorded_failure(entry)
        attempt = self._attempt(entry)
        if attempt is None and failure.cause in ("error", "unknown", "hang", "config"):
            cause = "infrastructure" if failure.cause == "hang" else failure.cause
            failure = Failure(cause, self._last_log_line(entry) or failure.evidence)
        if attempt and "ended" not in attempt:
            code = next(filter(None, running.exit_codes.values()), 0)
            end = {"ended": now_ms(), "cause": failure.cause, "exit": code}
            trial.end_attempt(attempt["attempt"], {**end, "error": failure.evidence})
        if failure.cause == "error":
            failure = retry_policy.apply_retry(trial, entry["retries"]) or failure
        if not _is_over(trial) and failure.cause not in ("fenced", "stopped"):
            self._requeue_or_fail(trial, entry, failure)
        (running_folder(self.root) / f"{trial.name}.json").unlink(missing_ok=True)
        if trial.canary.exists():
            release_held(self.root)
        self.free_slots += running.slots
        del self.trials[trial.name]
        print(
            f"{time.strftime('%F %T')} {trial.name}: {failure.cause}, {failure.evidence}",
            flush=True,
        )

    def _requeue_or_fail(self, trial: TrialDir, entry: QueueEntry, failure: Failure) -> None:
        """Put the trial at the head of the queue while its retry budget lasts, else fail it."""
        rule = failure.rule
        budget = budget_of(self._attempt(entry) or {}, failure)
        allowed = entry["retries"].get(budget, DEFAULT_RETRIES)
        used = entry.setdefault("used", {})
        used[budget] = used.get(budget, 0) + 1
        if rule.retry and (not budget or used[budget] <= allowed):
            entry.pop("launch", None)
            entry.pop("pids", None)
            entry.pop("slots", None)
            write_json(
                queue_folder(self.root) / f"0-{now_ms():015d}-00000-{trial.name}.json", entry
            )
            return
        error = f"{rule.summary}: {failure.evidence}"
        if rule.retry:
            error += f" ({allowed} tries used)"
        trial.write_failed(failure.cause, error, trial.newest_attempt())

    def _attempt(self, entry: QueueEntry) -> AttemptRecord | None:
        """Return the record of the attempt that this launch opened; None when it opened none."""
        launch = entry.get("launch")
        return self.root.trial(entry["trial"]).attempt_of(launch) if launch else None

    def _recorded_failure(self, entry: QueueEntry) -> Failure:
        return classify_attempt(self._attempt(entry) or {})

    def _last_log_line(self, entry: QueueEntry) -> str:
        text = ""
        for path in sorted(self._logs(entry["trial"]).glob("*.log")):
            text += path.read_bytes()[-4000:].decode(errors="replace")
        return text.strip().rpartition("\n")[2][:300]


def _is_over(trial: TrialDir) -> bool:
    """Whether no attempt may follow."""
    return trial.done.exists() or trial.failed.exists() or trial.stop.exists()


if __name__ == "__main__":
    sys.exit(main(Root(Path(sys.argv[1]))))
