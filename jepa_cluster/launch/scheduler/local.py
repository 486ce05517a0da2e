"""The same contract without Slurm: a queue over this machine's slots (GPUs, else CPU cores).

    <root>/local/queue/<order>-<trial>.json     waiting; the runner takes them in order of name; 2-...: held
                                                until a canary has passed
    <root>/local/running/<trial>.json           taken; with the processes' ids
    <root>/local/{lock,runner.log,logs/}

Entries are files, so nothing is lost with a process. One runner at a time (a lock) starts the ranks of a trial,
waits, and acts on how they end: failures.RULES. It is detached from the shell and leaves when the queue is empty.
When it is killed, trials run on; the next runner waits for them to end and reads from their files what happened.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from jepa_cluster.errors import LaunchError
from jepa_cluster.launch.scheduler import failures, fork_server, retry_policy
from jepa_cluster.launch.scheduler.clean_env import clean_environment
from jepa_cluster.training.dist_env import local_environment
from jepa_cluster.trial import file_lock
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_json
from jepa_cluster.trial.spool import now_ms

TICK = 0.1  # s between looks at the queue and the processes
PATIENCE = 15.0  # s that the other ranks get after one has ended badly
STARTING = 60.0  # s that a signal waits for the ranks of a trial that is being started
LINGER = 1.0  # s that an idle runner waits before it leaves


@dataclass
class RunningTrial:
    """A running trial. ranks: processes that this runner started; empty when an earlier runner did."""

    entry: dict[str, Any]
    slots: list[str]
    ranks: list[fork_server.RankProcess] = field(default_factory=list[fork_server.RankProcess])
    ended: list[int] = field(default_factory=list[int])  # exit codes in order of their end
    deadline: float | None = None

    @property
    def name(self) -> str:
        return str(self.entry["trial"])


def enqueue(root: Root, entries: Iterable[Mapping[str, Any]], slots: int) -> None:
    """Put trials at the end of the queue and see to it that a runner is there.

    An entry: trial, code, world, python, environment, retries, and after: the canary it is held for, or none.
    """
    _folders(root)
    write_json(root.local / "machine.json", {"slots": slots})
    now = now_ms()
    for i, entry in enumerate(entries):
        order = 2 if entry.get("after") else 1
        write_json(_queue(root) / f"{order}-{now:015d}-{i:05d}-{entry['trial']}.json", {**entry, "queued": now})
    start_runner(root)


def list_trials(root: Root) -> dict[str, str]:
    """Trials that the queue knows: 'running' with a process, 'queued', or 'held:<canary>' until that has passed."""
    seen = {_trial(p): "queued" for p in waiting_entries(root)}
    for path in held_entries(root):
        seen[_trial(path)] = f"held:{(read_json(path) or {}).get('after', '')}"
    for path in _running(root).glob("*.json"):
        seen[path.stem] = "running"
    return seen


def canary(word: str) -> str:
    """What `look` says of a trial -> the canary that it is held for, or ''."""
    return word.removeprefix("held:") if word.startswith("held:") else ""


def waiting_entries(root: Root) -> list[Path]:
    """Queue entries that may start, the next one first."""
    return sorted(p for p in _queue(root).glob("[01]-*.json"))


def held_entries(root: Root) -> list[Path]:
    return sorted(_queue(root).glob("2-*.json"))


def release_held(root: Root) -> None:
    """Let entries start that were held for a canary which has succeeded."""
    for path in held_entries(root):
        canary = (read_json(path) or {}).get("after", "")
        if root.trial(canary).succeeded():
            path.rename(path.with_name(f"1{path.name[1:]}"))


def dequeue(root: Root, trials: Iterable[str]) -> list[str]:
    """Take trials out of the queue -> those that were waiting. A rename decides the race with the runner."""
    names, gone = set(trials), list[str]()
    for path in [*waiting_entries(root), *held_entries(root)]:
        name = _trial(path)
        if name in names:
            try:
                path.rename(path.with_suffix(".gone"))
            except FileNotFoundError:
                continue
            path.with_suffix(".gone").unlink()
            gone.append(name)
    return gone


def signal_trials(root: Root, trials: Iterable[str], what: signal.Signals) -> list[str]:
    """Signal every rank of running trials -> those that had one alive."""
    reached: list[str] = []
    for name in trials:
        entry = read_json(_running(root) / f"{name}.json") or {}
        end = time.monotonic() + STARTING
        while entry and len(entry.get("pids", [])) < entry["world"] and time.monotonic() < end:  # it is being started
            time.sleep(TICK)
            entry = read_json(_running(root) / f"{name}.json") or {}
        alive = [p for p in entry.get("pids", []) if _alive(*p)]
        for pid, _ in alive:
            try:
                os.kill(pid, what)
            except ProcessLookupError:
                continue
        if alive:
            reached.append(name)
    return reached


def start_runner(root: Root) -> None:
    """Start a detached runner; it leaves at once when there is one."""
    package = str(Path(__file__).parents[3])
    environment = {
        **clean_environment(os.environ),
        "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
    }
    with (root.local / "runner.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "jepa_cluster.launch.scheduler.local", str(root.path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root.local,
            env=environment,
            start_new_session=True,
        )


def main(root: Root) -> int:
    """The runner's process: hold the lock while there is work."""
    _folders(root)
    while True:
        try:
            with file_lock.acquire(root.local / "lock", timeout=0):
                runner = Runner(root)
                runner.run()
        except Timeout:
            return 0
        if runner.leaving or not (waiting_entries(root) or any(_running(root).glob("*.json"))):
            return 0  # an entry made after this line finds the lock free


class Runner:
    """Takes, watches and settles trials until nothing is left, or until it is told to leave."""

    def __init__(self, root: Root) -> None:
        self.root = root
        self.leaving = False
        gpus = _gpus()
        count = int((read_json(root.local / "machine.json") or {}).get("slots", 1))
        self.free = gpus[:count] if gpus else [""] * count
        self.work: dict[str, RunningTrial] = {}
        self.servers: dict[
            tuple[str, Path], fork_server.ForkServer
        ] = {}  # processes with torch in memory, by Python and code
        release_held(root)  # an earlier runner may have died before it did so
        for path in sorted(_running(root).glob("*.json")):
            entry = read_json(path) or {}
            slots = self._take_slots(int(entry.get("world", 1)), entry.get("slots"))
            self.work[path.stem] = RunningTrial(entry, slots)

    def run(self) -> None:
        for what in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(what, self._leave)
        idle_since = time.monotonic()
        while True:
            for work in list(self.work.values()):
                self._watch(work)
            if not self.leaving:
                self._start_what_fits()
            if self.work:
                idle_since = time.monotonic()
            elif self.leaving or time.monotonic() - idle_since > LINGER:
                for server in self.servers.values():
                    server.close()
                return
            time.sleep(TICK)

    def _leave(self, *_: object) -> None:
        """This machine goes down, or somebody ends the runner: let every trial save itself."""
        self.leaving = True
        for work in self.work.values():
            for rank in work.ranks:
                rank.send_signal(signal.SIGTERM)

    def _start_what_fits(self) -> None:
        for path in waiting_entries(self.root):
            entry = read_json(path)
            if entry is None:  # withdrawn in this moment
                continue
            if self._awaits_trunk(entry):
                continue
            if int(entry["world"]) > len(self.free):
                return  # strictly in order: nobody starves behind smaller trials
            taken = _running(self.root) / f"{entry['trial']}.json"
            try:
                path.rename(taken)
            except FileNotFoundError:
                continue
            trial = self.root.trial(entry["trial"])
            if trial.done.exists() or trial.failed.exists() or trial.stop.exists():
                taken.unlink()
                continue
            self._start(entry, taken)

    def _awaits_trunk(self, entry: Mapping[str, Any]) -> bool:
        """A branch waits as long as its trunk is at work and has not yet saved the step at which they part."""
        trunk = entry.get("trunk")
        return (
            bool(trunk)
            and trunk in list_trials(self.root)
            and not self.root.trial(trunk).checkpoint(entry["begins"]).exists()
        )

    def _start(self, entry: dict[str, Any], taken: Path) -> None:
        world = int(entry["world"])
        work = RunningTrial(entry, self._take_slots(world, None))
        launch = f"local-{uuid.uuid4().hex[:12]}"
        logs = self.root.local / "logs" / work.name
        logs.mkdir(parents=True, exist_ok=True)
        code = self.root.code / entry["code"]
        entry |= {"launch": launch, "pids": [], "slots": work.slots, "started": now_ms()}
        self.work[work.name] = work
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})  # inherited; the job unblocks
        try:
            for rank in range(world):
                environment = {
                    **clean_environment(os.environ),
                    **entry.get("environment", {}),
                    "PYTHONPATH": str(code),
                    **local_environment(rank, world, launch),
                }
                if work.slots[0]:
                    environment["CUDA_VISIBLE_DEVICES"] = ",".join(work.slots)
                server = self._server(entry["python"], code, environment)
                log = logs / f"rank{rank}.log"
                work.ranks.append(server.spawn(self.root.trial(work.name).path, environment, log))
                entry["pids"].append([work.ranks[-1].pid, _started(work.ranks[-1].pid)])
                write_json(taken, entry)  # at once: whoever comes after us must know every rank
        except LaunchError as e:
            for started in work.ranks:
                started.kill()
            self._settle(work, failures.Failure("infrastructure", e.what))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})

    def _server(self, python: str, code: Path, environment: Mapping[str, str]) -> fork_server.ForkServer:
        """The server for this code; a new one when there is none or it died."""
        known = self.servers.get((python, code))
        if known is None or not known.alive:
            known = self.servers[python, code] = fork_server.ForkServer(python, code, environment)
        return known

    def _watch(self, work: RunningTrial) -> None:
        if not work.ranks:  # started by an earlier runner: only its files and process ids are known
            if not any(_alive(*p) for p in work.entry.get("pids", [])):
                self._settle(work, self._verdict_from_files(work))
            return
        codes = {r.pid: r.poll() for r in work.ranks}
        ended = sorted(c for c in codes.values() if c is not None)  # killed ranks before those that complain
        work.ended += _new_exit_codes(ended, work.ended)
        if len(ended) == len(work.ranks):
            self._settle(work, failures.classify_exit_codes(work.ended))
        elif any(ended):
            now = time.monotonic()
            work.deadline = work.deadline or now + PATIENCE
            if now > work.deadline:
                for rank in work.ranks:
                    if rank.poll() is None:
                        rank.kill()

    def _verdict_from_files(self, work: RunningTrial) -> failures.Failure:
        attempts = self.root.trial(work.name).attempts()
        last = attempts[-1] if attempts and attempts[-1].get("launch") == work.entry.get("launch") else {}
        return failures.classify_attempt(last)

    def _settle(self, work: RunningTrial, verdict: failures.Failure) -> None:
        """A trial's processes are gone: close its record, put it back or let it rest, free its slots."""
        trial = self.root.trial(work.name)
        for rank in work.ranks:  # data workers may have outlived their rank
            _kill_group(rank.pid)
        if verdict.cause == "done" and not trial.done.exists():  # "stopped" where it reached runtime.stop_after
            verdict = self._verdict_from_files(work)
        verdict = self._told_by_log(trial, work, verdict)
        _close(trial, work.entry, verdict, work.ended)
        if verdict.cause == "error":
            verdict = retry_policy.apply_retry(trial, work.entry.get("retries", {})) or verdict
        used = work.entry.setdefault("used", {})
        used[verdict.rule.budget] = used.get(verdict.rule.budget, 0) + 1
        budget = work.entry.get("retries", {}).get(verdict.rule.budget, 3)
        if (
            trial.done.exists()
            or trial.failed.exists()
            or trial.stop.exists()
            or verdict.cause in ("fenced", "stopped")
        ):
            pass
        elif verdict.rule.again and (not verdict.rule.budget or used[verdict.rule.budget] <= budget):
            for key in ("launch", "pids", "slots", "started"):
                work.entry.pop(key, None)
            write_json(_queue(self.root) / f"0-{now_ms():015d}-00000-{work.name}.json", work.entry)
        else:
            spent = f" ({budget} tries used)" if verdict.rule.again else ""
            error = f"{verdict.rule.means}: {verdict.evidence}{spent}"
            facts = {"cause": verdict.cause, "error": error, "attempt": trial.newest_attempt(), "t": now_ms()}
            write_json(trial.failed, facts)
        (_running(self.root) / f"{work.name}.json").unlink(missing_ok=True)
        if trial.canary.exists():
            release_held(self.root)
        self.free += work.slots
        del self.work[work.name]
        print(f"{time.strftime('%F %T')} {work.name}: {verdict.cause}, {verdict.evidence}", flush=True)

    def _told_by_log(self, trial: TrialDir, work: RunningTrial, verdict: failures.Failure) -> failures.Failure:
        """An attempt that ended before it opened a record left its last words in the queue's own log."""
        attempts = trial.attempts()
        if verdict.cause not in ("error", "unknown") or (
            attempts and attempts[-1].get("launch") == work.entry["launch"]
        ):
            return verdict
        words = b"".join(p.read_bytes()[-4000:] for p in sorted((self.root.local / "logs" / work.name).glob("*.log")))
        lines = [line for line in words.decode(errors="replace").splitlines() if line.strip()]
        return failures.Failure(verdict.cause, lines[-1][:300]) if lines else verdict

    def _take_slots(self, count: int, known: list[str] | None) -> list[str]:
        wanted = known if known is not None else self.free[:count]
        for slot in wanted:
            if slot in self.free:
                self.free.remove(slot)
        return wanted


def _close(trial: TrialDir, entry: Mapping[str, Any], verdict: failures.Failure, codes: list[int]) -> None:
    """Write the end of an attempt that could not do so itself."""
    attempts = trial.attempts()
    if attempts and attempts[-1].get("launch") == entry.get("launch") and "ended" not in attempts[-1]:
        end = {"ended": now_ms(), "cause": verdict.cause, "exit": next((c for c in codes if c), 0)}
        trial.amend(attempts[-1]["attempt"], {**end, "error": verdict.evidence})


def _new_exit_codes(codes: list[int], known: list[int]) -> list[int]:
    """The codes that are new: multiset difference, order kept."""
    rest = list(known)
    fresh: list[int] = []
    for code in codes:
        if code in rest:
            rest.remove(code)
        else:
            fresh.append(code)
    return fresh


def _gpus() -> list[str]:
    from jepa_cluster.launch.cluster.profile import visible_gpus

    return list(visible_gpus())


def _started(pid: int) -> int:
    """Kernel start time of a process, which together with its id names it for ever; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _alive(pid: int, started: int) -> bool:
    return started != 0 and _started(pid) == started


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return


def _trial(entry: Path) -> str:
    """The name of a queue entry's trial."""
    return entry.name.split("-", 3)[3][:-5]


def _queue(root: Root) -> Path:
    return root.local / "queue"


def _running(root: Root) -> Path:
    return root.local / "running"


def _folders(root: Root) -> None:
    for folder in (_queue(root), _running(root), root.local / "logs"):
        folder.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(main(Root(Path(sys.argv[1]))))
