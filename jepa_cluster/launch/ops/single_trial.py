"""One trial on this machine without the local queue: create it, run its ranks, print its rows."""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypedDict

from jepa_cluster.errors import ConfigError, ExitCode
from jepa_cluster.launch.cluster.profile import load_profile
from jepa_cluster.launch.scheduler.clean_env import clean_environment
from jepa_cluster.launch.scheduler.fork_server import KILL_DELAY, ForkServer
from jepa_cluster.launch.submit import code_snapshot
from jepa_cluster.sweep.points import ResourceRequest, Sweep
from jepa_cluster.sweep.resolve import resolve
from jepa_cluster.training.dist_env import local_environment
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import classify_exit_codes
from jepa_cluster.trial.files import read_json
from jepa_cluster.trial.spool import now_ms

Log = Callable[[str], None]
POLL_SECONDS = 0.2
SHOWN_METRICS = ("loss", "grad_norm", "lr", "images_per_s", "probe/class_top1", "probe/rankme")


class Summary(TypedDict):
    """How the newest attempt of a trial ended, or a start after it that opened none.

    exit: the worst exit code of its ranks.
    """

    trial: str
    path: str
    attempts: int
    cause: str
    exit: int
    step: int | None
    error: str
    logs: str
    metrics: dict[str, float]


def create_trial(root: Root, overrides: Sequence[str], processes: int | None) -> TrialDir:
    """Compose a trial from Hydra overrides for the profile `local`. One that exists is kept."""
    profile = load_profile(Path("local"))
    request = ResourceRequest("", 1, processes or profile.procs_per_node, minutes=60)
    base: list[str] = []
    seed = 0
    for override in overrides:
        if override.startswith("seed="):
            text = override.removeprefix("seed=")
            if not text.isdecimal():
                raise ConfigError(f"seed={text} is not a whole number", hint="seed=0")
            seed = int(text)
        else:
            base.append(override)
    sweep = Sweep("command line", base=tuple(base), seeds=(seed,))
    config = resolve(sweep, request, profile.runtime)[0].config
    trial = root.trial_of(config)
    trial.create(config)
    return trial


def world_size(trial: TrialDir) -> int:
    return trial.read_config().runtime.world_size


def environments(world: int) -> list[dict[str, str]]:
    """Return the environment of each rank of one local launch."""
    shared = clean_environment(os.environ)
    shared.setdefault("OMP_NUM_THREADS", "1")
    launch = f"train-{uuid.uuid4().hex[:12]}"
    return [{**shared, **local_environment(rank, world, launch)} for rank in range(world)]


@contextmanager
def local_launcher(world: int, log: Log) -> Generator[Callable[[TrialDir], list[int]]]:
    """Yield a function that runs one attempt of a trial and returns the exit code of each rank."""
    server = ForkServer(sys.executable, code_snapshot.source(), os.environ)
    with closing(server), tempfile.NamedTemporaryFile("r", errors="replace") as output:

        def run_attempt(trial: TrialDir) -> list[int]:
            codes = [-1]
            try:
                codes = run_ranks(server, trial, world, log, Path(output.name))
            finally:
                if any(codes):
                    for line in output.read().splitlines():
                        log(line)
            return codes

        yield run_attempt


def run_ranks(
    server: ForkServer,
    trial: TrialDir,
    world: int,
    log: Log,
    output: Path,
) -> list[int]:
    """Run one attempt and print its rows. Returns the exit code of each rank.

    output: what the ranks print before they open their own logs.

    SIGINT and SIGTERM become SIGTERM for the ranks. Some time after one has failed the others are
    killed, which counts as HANG: before the ranks have met they would wait for it for minutes, and
    in a collective that blocks until the watchdog ends them.
    """
    variables = environments(world)
    launch = variables[0]["JEPA_LAUNCH"]
    ranks = [server.spawn(trial.path, each, output) for each in variables]

    def stop(*_: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    rows = spool.read(trial).rows
    shown = rows[-1].step if rows else -1
    started = False
    kill_at = math.inf
    try:
        while None in (codes := [rank.poll() for rank in ranks]):
            if any(codes):
                kill_at = min(kill_at, time.monotonic() + KILL_DELAY)
            if time.monotonic() > kill_at:
                break
            time.sleep(POLL_SECONDS)
            started = started or print_start(trial, launch, log)
            shown = print_new_rows(trial, shown, log)
        print_new_rows(trial, shown, log)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for rank in ranks:
        rank.kill()
        rank.wait()
    ended = [code for code in codes if code is not None]
    if len(ended) < world:
        close_attempt(trial, launch, ended)
    return [ExitCode.HANG if code is None else code for code in codes]


def close_attempt(
    trial: TrialDir,
    launch: str,
    codes: Sequence[int],
) -> None:
    """Write the end of an attempt some of whose ranks were killed, unless a rank has."""
    attempt = trial.attempt_of(launch)
    if attempt and "ended" not in attempt:
        failure = classify_exit_codes(codes)
        end = {"ended": now_ms(), "cause": failure.cause, "exit": worst_code(codes)}
        trial.end_attempt(attempt["attempt"], {**end, "error": failure.evidence})


def print_start(trial: TrialDir, launch: str, log: Log) -> bool:
    """Print at which step the attempt of a launch starts. Returns False while that is not known."""
    for record in trial.attempts():
        if record.get("launch") == launch and "start_step" in record:
            break
    else:
        return False
    attempt = record["attempt"]
    if attempt > 1 or record["start_step"]:
        log(f"attempt {attempt} begins at step {record['start_step']}")
    for event in spool.read(trial).events:
        if event["event"] == "checkpoint_set_aside" and event["attempt"] == attempt:
            log(f"a damaged checkpoint was set aside: {event['fault']}")
    return True


def print_new_rows(trial: TrialDir, after: int, log: Log) -> int:
    """Print the rows beyond a step. Returns the last printed step."""
    for row in spool.read(trial).rows:
        if row.step > after:
            values = [
                f"{name} {row.values[name]:.4g}" for name in SHOWN_METRICS if name in row.values
            ]
            log(f"step {row.step}: {', '.join(values)}")
            after = row.step
    return after


def worst_code(codes: Sequence[int]) -> int:
    """Return the exit code that explains the end; HANG only follows from that of another rank."""
    causes = [code for code in codes if code not in (ExitCode.DONE, ExitCode.HANG)]
    return causes[0] if causes else max(codes)


def summary(trial: TrialDir, code: int) -> Summary:
    """Return how the newest attempt or start ended. code: the worst exit code of its ranks."""
    attempts = trial.attempts()
    last: Mapping[str, Any] = {}
    for record in [*attempts, *trial.ended_starts()]:
        if record.get("started", 0) >= last.get("started", 0):
            last = record
    return {
        "trial": trial.name,
        "path": str(trial.path),
        "attempts": len(attempts),
        "cause": last.get("cause", f"exit code {code}"),
        "exit": code,
        "step": last.get("end_step"),
        "error": last.get("error", ""),
        "logs": str(trial.logs(trial.newest_attempt())),
        "metrics": (read_json(trial.done) or {}).get("metrics", {}),
    }
