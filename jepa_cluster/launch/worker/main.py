"""What lands on a node: a path, and the one door to torch.

In: the path of a trial and the environment of one rank. Out: an exit code that the launcher reads. In this order:
guard, place, claim, logs, and only then torch; so a signal finds the guard whenever it comes, and whatever a rank
says stands in the trial's own logs. On Slurm the end of an attempt is also where the sweep is looked after: the job
goes back to the queue where that is due, and what it leaves free is dealt to the sweep's other arrays.

    python -m jepa_cluster.launch.worker.main <trial>     # one rank; started by Slurm or by the local launcher
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import cast

from jepa_cluster.errors import ExitCode, JepaError, LaunchError
from jepa_cluster.launch.worker.attempt_claim import Claim, NodeServer, socket_name, wait_for_claim
from jepa_cluster.launch.worker.slurm_rank import from_slurm, is_slurm_task
from jepa_cluster.records import CanaryRequest, JobName
from jepa_cluster.training.dist_env import DistEnv, from_environment, listen
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler, exit_rank
from jepa_cluster.training.watchdog import PhaseTimer
from jepa_cluster.trial import provenance
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import read_json, write_atomic, write_json

REBALANCE_TRIES, REBALANCE_PAUSE = 3, 5.0  # at the end of an attempt, while Slurm does not answer; seconds


def main(argv: list[str] | None = None) -> None:
    """One rank of one attempt. Never returns: the process ends here, with the exit code."""
    run(Path((argv or sys.argv[1:])[0]))


def run(path: Path | str) -> None:
    """Signals -> rank -> claim -> logs -> train -> exit code, and on Slurm back to the queue where that is due."""
    clock = PhaseTimer()
    guard = PreemptionHandler().install()
    raise_descriptor_limit()
    trial = TrialDir(Path(path).absolute())
    try:
        slurm = is_slurm_task(os.environ)
        place = from_slurm(os.environ) if slurm else from_environment(os.environ)
        if trial.done.exists():  # rank 0 may have been killed after that, before it rebalanced
            if slurm and place.is_rank0:
                _rebalance(trial)
            exit_rank(ExitCode.DONE)
        hooks = JobHooks()
        if slurm:
            hooks = slurm_hooks(trial, place)
            _end_if_orphaned(trial)
        claimed = claim(trial, place, guard)
    except LaunchError as e:
        print(f"job: {e}", file=sys.stderr, flush=True)
        exit_rank(ExitCode.CONFIG)
    except (JepaError, OSError) as e:  # a full disk, or a rank 0 that never came: another attempt may do better
        print(f"job: {e}", file=sys.stderr, flush=True)
        exit_rank(ExitCode.HANG)
    if claimed is None:
        print(f"job: {guard.signal} before an attempt was opened", file=sys.stderr, flush=True)
        guard.ignore_signals()
        if trial.stop.exists():
            exit_rank(ExitCode.STOPPED)
        hooks.requeue(True)
        exit_rank(ExitCode.PREEMPTED)
    attempt, place = claimed
    with contextlib.suppress(OSError):  # on a full disk the launcher's own log remains
        redirect(trial, attempt, place.rank)
    code = attend(trial, attempt, place, guard, clock, hooks)
    if place.is_rank0 and code == ExitCode.DONE and trial.canary.exists():
        with contextlib.suppress(JepaError, OSError, KeyError):  # as if nothing had been measured
            code = _check_budget(trial, attempt)
    guard.ignore_signals()
    if slurm:
        end_job(trial, place, code)
    exit_rank(code)


def end_job(trial: TrialDir, place: DistEnv, code: ExitCode) -> None:
    """Requeue the job where the trial comes back; else rank 0 gives what the job leaves free to other arrays."""
    from jepa_cluster.launch.worker.requeue import requeue_job

    if not trial.done.exists() and comes_back(trial, code):
        # after an error only the rank that `comes_back` allowed asks
        requeue_job(trial, place.launch, place.is_rank0 or code == ExitCode.ERROR)
    elif place.is_rank0:
        _rebalance(trial)


def comes_back(trial: TrialDir, code: ExitCode) -> bool:
    """Whether the job goes back to the queue: it made room, or may try again, with less memory or on another node."""
    if code == ExitCode.ERROR:
        from jepa_cluster.launch.scheduler import retry_policy

        budget = retry_policy.retries(trial.root, os.environ.get("SLURM_JOB_NAME", ""))
        return retry_policy.apply_retry(trial, budget) is not None
    return code == ExitCode.PREEMPTED or (code == ExitCode.HANG and not trial.is_stuck())


def slurm_hooks(trial: TrialDir, place: DistEnv) -> JobHooks:
    """What the trainer asks of Slurm."""
    from jepa_cluster.launch.worker.requeue import requeue_job

    requeue = functools.partial(requeue_job, trial, place.launch, place.is_rank0)
    return JobHooks(requeue, functools.partial(_on_commit, trial))


def _end_if_orphaned(trial: TrialDir) -> None:
    """Stop the trial if this job follows a cancelled one."""
    from jepa_cluster.launch.worker import chained_job

    if chained_job.orphaned(trial, os.environ):
        write_atomic(trial.stop, "cancelled in Slurm\n")
        exit_rank(ExitCode.STOPPED)


def _check_budget(trial: TrialDir, attempt: int) -> ExitCode:
    """Fail a canary whose class would exceed the budget of its sweep, so that Slurm does not start the class."""
    from jepa_cluster.launch.cluster import cost

    hours = cost.measured_hours(trial)
    request = cast("CanaryRequest", read_json(trial.canary) or {})
    problem = cost.exceeds_budget(request, hours) if hours else ""
    if not problem:
        return ExitCode.DONE
    failure = {"cause": "error", "error": problem}
    trial.amend(attempt, {**failure, "exit": int(ExitCode.ERROR)})
    trial.done.unlink(missing_ok=True)
    write_json(trial.failed, {**failure, "attempt": attempt, "t": time.time_ns() // 1_000_000})
    return ExitCode.ERROR


def _on_commit(trial: TrialDir) -> None:
    """Release the branches that begin from a committed step, in a thread, so that training does not wait for Slurm."""
    if shutil.which("scontrol"):
        from jepa_cluster.launch.worker import gpu_throttle

        threading.Thread(target=gpu_throttle.release_branches, args=(trial,), name="branches", daemon=True).start()


def _rebalance(trial: TrialDir) -> None:
    """Give what this job leaves free to other arrays of its sweep, and release the branches of a trunk that ended."""
    if not shutil.which("scontrol"):
        return
    from jepa_cluster.launch.worker import gpu_throttle

    name = JobName.of_this_job(os.environ)
    if name:
        for _ in range(REBALANCE_TRIES):
            if gpu_throttle.try_rebalance(trial.root, name.sweep):
                break
            time.sleep(REBALANCE_PAUSE)
    gpu_throttle.release_branches(trial)


def attend(
    trial: TrialDir, attempt: int, place: DistEnv, guard: PreemptionHandler, clock: PhaseTimer, hooks: JobHooks
) -> ExitCode:
    """Train, and turn whatever happens into an exit code and a line in the attempt's record."""
    from jepa_cluster.training import attempt_log, distributed
    from jepa_cluster.training.train import train  # the door

    try:
        code = train(trial, attempt, place, guard, clock, hooks)
        with contextlib.suppress(Exception):
            distributed.final_barrier()
        return code
    except BaseException as e:
        code, cause, text = attempt_log.classify_exception(e, trial, attempt, place)
        if isinstance(e, JepaError):
            print(f"job: {e}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        if cause == "lost":
            time.sleep(2)  # the rank that knows the cause says it first
        attempt_log.close_record(trial, attempt, code, clock, clock.step, cause, text)
        if cause != "lost":
            distributed.drain_messages()
        return code


def claim(trial: TrialDir, place: DistEnv, guard: PreemptionHandler) -> tuple[int, DistEnv] | None:
    """Join the attempt of this launch: rank 0 opens it and says where it listens, the others wait for that.

    Returns the attempt's number and the place with rank 0's address; None when a signal asked to stop before that.
    Raises TrialError when rank 0 does not open an attempt, OSError.
    """
    serves_node = place.local_rank == 0 and place.local_world_size > 1
    server = NodeServer(socket_name(trial, place), place.local_world_size - 1) if serves_node else None
    if place.is_rank0:
        found, place = (None, place) if guard.stop_requested else open_attempt(trial, place)
    else:
        found = wait_for_claim(trial, place, lambda: guard.stop_requested)
    if found is None:
        return None
    if server:
        server.answer(found)
    return found.attempt, replace(place, address=found.address)


def open_attempt(trial: TrialDir, place: DistEnv) -> tuple[Claim, DistEnv]:
    """Listen on a free port and open the next attempt with its address; the place then holds the open socket."""
    listener = listen(place.host)
    address = f"{place.host}:{listener.getsockname()[1]}"
    record = {
        **provenance.here(),
        "launch": place.launch,
        "kind": "slurm" if is_slurm_task(os.environ) else "local",
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "world": place.world_size,
        "code": code_id(),
        "started": time.time_ns() // 1_000_000,
        "address": address,
    }
    return Claim(trial.claim(record), address), replace(place, listener=listener.detach())


def code_id() -> str:
    """The snapshot this runs from, or the commit of the checkout."""
    folder = Path(__file__).parents[3]
    return folder.name if folder.parent.name == "code" else provenance.commit(folder)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open file descriptors to the hard one.

    Rank 0 holds about three sockets per rank, so the usual soft limit of 1 024 would be too low from 340 ranks on.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit that the kernel does not accept as a soft one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def redirect(trial: TrialDir, attempt: int, rank: int) -> None:
    """From here on, what this rank and its children print goes to logs/NNNN/rankR.{out,err}."""
    folder = trial.logs(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in ((1, "out"), (2, "err")):
        fd = os.open(folder / f"rank{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    main()
