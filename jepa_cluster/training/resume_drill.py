"""Check that a trial resumes with the same bits: train two copies of it and kill one of them.

In: a trial, and a function that runs one attempt of a copy. Out: `Verdict` or `NoVerdict`.
The trial is only read. The copies are deleted at the end.
"""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict, final

import torch

from jepa_cluster.errors import CheckpointError, ExitCode, plural
from jepa_cluster.training import checkpoint
from jepa_cluster.training.attempt_log import WALL_CLOCK_METRICS
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir

RunAttempt = Callable[[TrialDir], list[int]]  # returns the exit code of each rank
Log = Callable[[str], None]
Rows = list[tuple[int, dict[str, float]]]
# Exit codes after a kill. HANG: the rank noticed that another one was gone.
KILLED = {-signal.SIGKILL, ExitCode.HANG}


class Span(NamedTuple):
    """Steps of a drill. kills: steps after which all ranks are killed."""

    start: int
    end: int
    kills: list[int]


@final
class Verdict(TypedDict):
    """How the copies compare. differ: name of a tensor -> largest absolute difference."""

    passed: bool
    problem: str
    attempts: int
    resumed_from: list[int | None]
    tensors: int
    differ: dict[str, float]
    rows: int
    rows_identical: bool


@final
class NoVerdict(TypedDict):
    """The copies could not be compared: neither passed nor failed."""

    passed: None
    problem: str


def drill(
    trial: TrialDir, steps: int, kills: int, run_attempt: RunAttempt, log: Log
) -> tuple[Span, Verdict | NoVerdict]:
    """Train two copies of a trial, one of them with kills, and compare weights and metrics."""
    span = plan_span(trial, steps, kills)
    if len(span.kills) < kills:
        wanted = f"{plural(kills, 'kill')} asked for"
        log(f"{wanted}, {len(span.kills)} fit between steps {span.start} and {span.end}")
    log(f"steps {span.start} to {span.end}")
    with tempfile.TemporaryDirectory(prefix="jepa-drill-") as folder:
        try:
            alone = clone_trial(trial, Root(Path(folder) / "alone"), span)
            killed = clone_trial(trial, Root(Path(folder) / "killed"), span)
            problem = train_copies(alone, killed, span.kills, run_attempt, log)
            return span, no_verdict(problem) if problem else compare(alone, killed, span.end)
        except (CheckpointError, OSError) as e:
            return span, no_verdict(f"{type(e).__name__}: {e}")


def plan_span(
    trial: TrialDir,
    steps: int,
    kills: int,
) -> Span:
    """Begin at the newest checkpoint with steps still to train, or from the seed."""
    last = trial.read_config().recipe.optim.steps or 0
    start = max((step for step in trial.committed() if step < last), default=0)
    end = min(start + steps, last)
    return Span(start, end, kill_steps(start, end, kills))


def kill_steps(
    start: int,
    end: int,
    count: int,
) -> list[int]:
    """Return up to `count` distinct steps strictly between `start` and `end`, evenly spaced."""
    count = min(count, end - start - 1)
    return [start + (end - start) * number // (count + 1) for number in range(1, count + 1)]


def clone_trial(trial: TrialDir, root: Root, span: Span) -> TrialDir:
    """Create a trial of the same recipe that starts and ends with the span and logs every step."""
    config = trial.read_config()
    runtime = replace(
        config.runtime,
        log_every=1,
        checkpoint_minutes=0.02,
        stop_after=span.end,
        milestone_every=0,
        milestones=(),
        fork_from=None,
        kill_after=None,
    )
    clone = root.trial(trial.name)
    clone.create(replace(config, runtime=runtime))
    if span.start:
        shutil.copytree(trial.checkpoint(span.start), clone.checkpoint(span.start))
    return clone


def train_copies(
    alone: TrialDir, killed: TrialDir, kills: Sequence[int], run_attempt: RunAttempt, log: Log
) -> str:
    """Train `alone` in one attempt, and `killed` in one attempt per step of `kills` and a last one.

    The ranks kill themselves (`runtime.kill_after`): a kill from outside might come too late.
    Returns why the copies cannot be compared; '' when they can.
    """
    log("first copy: not interrupted")
    codes = run_attempt(alone)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was not interrupted {how_it_ended(alone, codes)}"
    for step in kills:
        log(f"second copy: all ranks are killed after step {step}")
        set_kill_after(killed, step)
        codes = run_attempt(killed)
        if -signal.SIGKILL not in codes or not KILLED.issuperset(codes):
            return f"the copy was not killed after step {step}; it {how_it_ended(killed, codes)}"
    log("second copy: to the end")
    set_kill_after(killed, None)
    codes = run_attempt(killed)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was killed {how_it_ended(killed, codes)}"
    return ""


def set_kill_after(trial: TrialDir, step: int | None) -> None:
    """Replace `runtime.kill_after` in the frozen config of a copy."""
    config = trial.read_config()
    trial.create(replace(config, runtime=replace(config.runtime, kill_after=step)))


def how_it_ended(trial: TrialDir, codes: Sequence[int]) -> str:
    """Return the exit codes of an attempt's ranks, and the cause and error in its record."""
    text = f"ended with exit codes {', '.join(map(str, codes))}"
    cause = ""
    for record in trial.attempts():
        cause = record.get("error") or record.get("cause") or ""
    return f"{text}: {cause or 'its record has no end'}"


def no_verdict(problem: str) -> NoVerdict:
    return {"passed": None, "problem": problem}


def compare(alone: TrialDir, killed: TrialDir, step: int) -> Verdict | NoVerdict:
    """Compare weights, moments and metrics of two copies. Raises CheckpointError, OSError."""
    missing = [t.root.path.name for t in (alone, killed) if not t.checkpoint(step).exists()]
    if missing:
        return no_verdict(f"no checkpoint of step {step} in copy {' and '.join(missing)}")
    expected = checkpoint.load_unsharded(alone.checkpoint(step))
    found = checkpoint.load_unsharded(killed.checkpoint(step))
    if expected.keys() != found.keys():
        unmatched = sorted(expected.keys() ^ found.keys())[:10]
        return no_verdict(f"only one of the copies has {', '.join(unmatched)}")
    differ: dict[str, float] = {}
    for name, tensor in expected.items():
        if not torch.equal(tensor, found[name]):
            differ[name] = float((tensor.double() - found[name].double()).abs().max())
    rows = deterministic_rows(alone)
    rows_identical = rows == deterministic_rows(killed)
    attempts = killed.attempts()
    return {
        "passed": rows_identical and not differ,
        "problem": "",
        "attempts": len(attempts),
        "resumed_from": [record.get("start_step") for record in attempts[1:]],
        "tensors": len(expected),
        "differ": differ,
        "rows": len(rows),
        "rows_identical": rows_identical,
    }


def deterministic_rows(trial: TrialDir) -> Rows:
    """Return step and metrics of each row, without those that measure time."""
    rows: Rows = []
    for row in spool.read(trial).rows:
        metrics = {k: v for k, v in row.values.items() if k not in WALL_CLOCK_METRICS}
        rows.append((row.step, metrics))
    return rows
