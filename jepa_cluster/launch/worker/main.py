"""Run one rank of one attempt. The only module of launch/ that leads to torch.

In: the path of a trial, and the environment of one rank. Out: an exit code that the launcher reads.
In this order: signal handler, rank, test of the node, attempt, logs, and only then torch. So a
signal is noticed whenever it comes, a bad node makes no attempt, and the output of a rank is in the
logs of the trial. When an attempt ends on Slurm, rank 0 requeues the job if it should continue;
otherwise it redistributes the freed GPUs among the sweep's other arrays.

    python -m jepa_cluster.launch.worker.main <trial>          # started by the local launcher
    python -m jepa_cluster.launch.worker.main <intent>.json    # by Slurm: the trials of an array
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
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from jepa_cluster.errors import ExitCode, JepaError, LaunchError, NodeFault
from jepa_cluster.launch.cluster.job_name import JobName
from jepa_cluster.launch.worker import node_test
from jepa_cluster.launch.worker.attempt_claim import Claim, NodeServer, socket_name, wait_for_claim
from jepa_cluster.launch.worker.slurm_rank import from_slurm, is_slurm_task
from jepa_cluster.records import CanaryRequest
from jepa_cluster.training.dist_env import DistEnv, from_environment, listen
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.preemption import JobHooks, PreemptionHandler, exit_rank
from jepa_cluster.training.watchdog import PhaseTimer
from jepa_cluster.trial import provenance
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json, write_atomic
from jepa_cluster.trial.spool import now_ms

CODE = Path(__file__).parents[3]  # a snapshot, or a clone
REBALANCE_TRIES = 3  # at the end of an attempt, while Slurm does not answer
REBALANCE_PAUSE = 5.0  # seconds between them


def main(argv: list[str] | None = None) -> None:
    """Run the trial that the command line names. Never returns: the process ends here."""
    path = Path((argv or sys.argv[1:])[0])
    if path.suffix == ".json":
        try:
            path = trial_of_task(path, os.environ)
        except LaunchError as e:
            _print(str(e))
            exit_rank(ExitCode.CONFIG)
    run(path)


def trial_of_task(intent: Path, env: Mapping[str, str]) -> Path:
    """Return the trial of an array task. intent: names the trials of the array by index."""
    record = read_json(intent)
    if record is None:
        raise LaunchError(
            "the intent of this job is gone",
            where=str(intent),
            hint="another submit took the job for one that sbatch refused; submit again",
        )
    trials: list[str] = record["trials"]
    index = int(env.get("SLURM_ARRAY_TASK_ID", "0"))
    return Root(intent.parents[3]).trial(trials[index]).path


def run(path: Path | str) -> None:
    """Join the attempt, train, requeue the job if it should continue, and end the process."""
    timer = PhaseTimer()
    handler = PreemptionHandler().install()
    raise_descriptor_limit()
    trial = TrialDir(Path(path).absolute())
    on_slurm = is_slurm_task(os.environ)
    try:
        env = from_slurm(os.environ) if on_slurm else from_environment(os.environ)
    except LaunchError as e:
        _print(str(e))
        exit_rank(ExitCode.CONFIG)
    hooks = slurm_hooks(trial, env) if on_slurm else local_hooks(trial, env)
    exits = ForcedExit(trial, env, timer, handler, hooks)
    try:
        if trial.done.exists():  # rank 0 may have been killed after that, before it rebalanced
            if on_slurm and env.is_rank0:
                _rebalance(trial)
            exit_rank(ExitCode.DONE)
        if on_slurm:
            _stop_if_cancelled(trial)
        exits.start()
        claimed = claim(trial, env, handler)
    except LaunchError as e:
        _print(str(e))
        exit_rank(ExitCode.CONFIG)
    except (JepaError, OSError) as e:  # a full disk or a missing rank 0: another start may succeed
        _print(str(e))
        handler.ignore_signals()  # the requeue sends TERM: that is no preemption
        exits.on_claim_error(str(e), "node" if isinstance(e, NodeFault) else "infrastructure")
    if claimed is None:
        _print(f"{handler.signal or trial.stop.name} before an attempt was opened")
        handler.ignore_signals()
        if trial.stop.exists():
            exit_rank(ExitCode.STOPPED)
        exits.leave()
    attempt, env = exits.attempt, exits.env = claimed
    with contextlib.suppress(OSError):  # on a full disk the launcher's own log remains
        redirect_output(trial, attempt, env.rank)
    code = run_trainer(exits)
    if env.is_rank0 and code == ExitCode.DONE and trial.canary.exists():
        with contextlib.suppress(JepaError, OSError, KeyError):  # then there is no measurement
            code = _check_budget(trial, attempt)
    handler.ignore_signals()
    if on_slurm:
        end_job(trial, env, code)
    exit_rank(code)


# ---- before training


def claim(trial: TrialDir, env: DistEnv, handler: PreemptionHandler) -> tuple[int, DistEnv] | None:
    """Test the node, then join the attempt: rank 0 opens it, the others wait for its address.

    Returns the number of the attempt, and `env` with the address of rank 0; None if a signal asked
    to stop before that. Raises as `node_test.run` and `wait_for_claim` do.
    """
    begun = time.monotonic()
    server = None
    if env.local_rank == 0 and env.local_world_size > 1:
        server = NodeServer(socket_name(trial, env), env.local_world_size - 1)
    found = None
    passed = node_test.run(trial, env, lambda: handler.stop_requested, begun)
    if not env.is_rank0:
        found = wait_for_claim(trial, env, lambda: handler.stop_requested, begun)
    elif passed and not handler.stop_requested:
        found, env = open_attempt(trial, env)
    if found is None:
        return None
    if server:
        server.answer(found)
    return found.attempt, replace(env, address=found.address)


def open_attempt(trial: TrialDir, env: DistEnv) -> tuple[Claim, DistEnv]:
    """Listen on a free port, and open the next attempt with its address.

    Returns `env` with the open socket.
    """
    listener = listen(env.host)
    address = f"{env.host}:{listener.getsockname()[1]}"
    record = {
        **provenance.here(),
        "launch": env.launch,
        "kind": "slurm" if is_slurm_task(os.environ) else "local",
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "world": env.world_size,
        "code": code_id(),
        "started": now_ms(),
        "address": address,
    }
    return Claim(trial.claim(record), address), replace(env, listener=listener.detach())


def code_id() -> str:
    """Return the id of the snapshot that this runs from, or the commit of the clone."""
    return CODE.name if CODE.parent.name == "code" else provenance.commit(CODE)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open file descriptors to the hard one.

    Rank 0 holds about three sockets per rank, so the usual soft limit of 1 024 would be too low
    from 340 ranks on.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel may refuse the hard limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def set_torch_variables(env: MutableMapping[str, str], code: Path) -> None:
    """Set what torch reads at its import, unless the user has set it.

    The compiler's cache is below the root, per user and code: /tmp is lost with the node, and other
    users can write there.
    """
    env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    root = Root(code.parent.parent)
    if code.parent == root.code:
        env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root.compiled(code.name)))


def redirect_output(trial: TrialDir, attempt: int, rank: int) -> None:
    """Send what this rank and its children print to logs/NNNN/rankR.{out,err}."""
    folder = trial.logs(attempt)
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    for number, name in ((1, "out"), (2, "err")):
        with (folder / f"rank{rank}.{name}").open("a") as log:
            os.dup2(log.fileno(), number)


# ---- training


def run_trainer(exits: ForcedExit) -> ExitCode:
    """Train. Turn an exception into an exit code and the end of the attempt's record."""
    set_torch_variables(os.environ, CODE)
    from jepa_cluster.training import attempt_log, distributed
    from jepa_cluster.training.train import train

    try:
        code = train(exits)
        with contextlib.suppress(Exception):
            distributed.final_barrier()
        return code
    except BaseException as e:
        trial, attempt, timer = exits.trial, exits.attempt, exits.timer
        code, cause, text = attempt_log.classify_exception(e, trial, attempt, exits.env)
        if isinstance(e, JepaError):
            _print(str(e))
        else:
            traceback.print_exc()
        if cause == "lost":
            time.sleep(2)  # the rank that knows the cause records it first
        attempt_log.close_record(trial, attempt, code, timer, timer.step, cause, text)
        if cause != "lost":
            distributed.drain_messages()
        return code


def _check_budget(trial: TrialDir, attempt: int) -> ExitCode:
    """Fail a canary whose class would exceed the budget, so that Slurm does not start the class."""
    from jepa_cluster.launch.cluster import cost

    hours = cost.measured_hours(trial)
    request = cast("CanaryRequest", read_json(trial.canary) or {})
    problem = ""
    if hours:
        problem = cost.budget_problem(request, hours)
    if not problem:
        return ExitCode.DONE
    trial.amend(attempt, {"cause": "error", "error": problem, "exit": int(ExitCode.ERROR)})
    trial.done.unlink(missing_ok=True)
    trial.write_failed("error", problem, attempt)
    return ExitCode.ERROR


# ---- on Slurm


def slurm_hooks(trial: TrialDir, env: DistEnv) -> JobHooks:
    """Return what the trainer asks of Slurm."""
    from jepa_cluster.launch.worker.requeue import kill_wait, requeue_job

    return JobHooks(
        requeue=functools.partial(requeue_job, trial, env.launch, env.is_rank0),
        on_commit=functools.partial(_on_commit, trial),
        end_start=functools.partial(_end_start, trial, env),
        may_retry=functools.partial(should_requeue, trial, ExitCode.ERROR),
        kill_wait=kill_wait(os.environ),
    )


def local_hooks(trial: TrialDir, env: DistEnv) -> JobHooks:
    """Return the hooks of a rank without Slurm: `jepa train` prints why a start has ended."""

    def end_start(cause: str, error: str) -> str:
        _record_start(trial, env, cause, error)
        return ""

    return JobHooks(end_start=end_start)


def _end_start(trial: TrialDir, env: DistEnv, cause: str, error: str) -> str:
    """Record why a start ended that opened no attempt; return why it may not be repeated, or ''.

    After a fault of the node the rank that asks for the requeue decides (node_exclusion.py).
    """
    from jepa_cluster.launch.scheduler.retry_policy import exhausted_starts, fail_start

    _record_start(trial, env, cause, error)
    exhausted = exhausted_starts(trial, os.environ, undecided=env.launch)
    if exhausted and cause != "preempted":
        with contextlib.suppress(OSError):
            fail_start(trial, {"cause": cause, "error": error}, exhausted)
    return exhausted


def _record_start(
    trial: TrialDir,
    env: DistEnv,
    cause: str,
    error: str,
) -> None:
    """Record why a start ended that opened no attempt.

    Only rank 0 records a preemption: Slurm also sends TERM to the others when one rank has failed.
    """
    if env.is_rank0 or cause != "preempted":
        now = now_ms()
        end = {**provenance.here(), "cause": cause, "error": error, "started": now, "ended": now}
        if cause == "node":
            end["node"] = provenance.node_name()
        with contextlib.suppress(OSError):
            trial.end_start(env.launch, end)


def end_job(trial: TrialDir, env: DistEnv, code: ExitCode) -> None:
    """Every rank, at its end: requeue the job if the trial continues; else let others use its GPUs.

    After an error `should_requeue` is true on the first rank that asks, which need not be rank 0.
    """
    from jepa_cluster.launch.worker.requeue import requeue_job

    if not trial.done.exists() and should_requeue(trial, code):
        asks_at_once = env.is_rank0 or code == ExitCode.ERROR
        requeue_job(trial, env.launch, asks_at_once)
    elif env.is_rank0:  # gives the freed GPUs to other job arrays of the sweep
        _rebalance(trial)


def should_requeue(trial: TrialDir, code: ExitCode) -> bool:
    """Return whether the trial continues: after a preemption, or an error that may be retried."""
    if code == ExitCode.ERROR:
        from jepa_cluster.launch.scheduler import retry_policy

        budget = retry_policy.retries(trial.root, os.environ.get("SLURM_JOB_NAME", ""))
        return retry_policy.apply_retry(trial, budget) is not None
    return code == ExitCode.PREEMPTED or (code == ExitCode.HANG and not trial.is_stuck())


def _stop_if_cancelled(trial: TrialDir) -> None:
    """Stop the trial if the user cancelled the job that this one follows."""
    from jepa_cluster.launch.worker import chained_job

    if chained_job.follows_cancelled_job(trial, os.environ):
        write_atomic(trial.stop, "cancelled in Slurm\n")
        exit_rank(ExitCode.STOPPED)


def _on_commit(trial: TrialDir) -> None:
    """Release branches that begin at a committed step, in a thread: training does not wait."""
    if shutil.which("scontrol"):
        from jepa_cluster.launch.worker import gpu_throttle

        release = functools.partial(gpu_throttle.release_branches, trial)
        threading.Thread(target=release, name="branches", daemon=True).start()


def _rebalance(trial: TrialDir) -> None:
    """Give the GPUs of this job to other arrays, and release the branches of a trunk that ended."""
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


def _print(text: str) -> None:
    print(f"job: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
