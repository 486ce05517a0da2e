"""Claim: a trial that is killed resumes with the same bits, on this machine.

    python benchmarks/resume_drill.py jepa-root/trials/vit_s-... --steps 10 --kills 2

Trains two copies of a trial from its newest checkpoint. All ranks of one copy kill themselves after
chosen steps and are started again. Weights, moments and metrics of the two are compared bit by bit.
The trial is only read; the copies are deleted at the end. Exit code 0 if no bit differs, 1 if one
does or if there is no verdict.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict, final

import torch

REPO = Path(__file__).parents[1]
sys.path.insert(0, str(REPO / "tests"))
from support.faulty_rank import FAULTS, Fault, dump  # noqa: E402

from jepa_cluster.errors import CheckpointError, ExitCode, plural  # noqa: E402
from jepa_cluster.launch.ops import single_trial  # noqa: E402
from jepa_cluster.training import checkpoint  # noqa: E402
from jepa_cluster.training.attempt_log import WALL_CLOCK_METRICS  # noqa: E402
from jepa_cluster.trial import spool  # noqa: E402
from jepa_cluster.trial.directory import Root, TrialDir  # noqa: E402

# Runs an attempt, whose ranks kill themselves after a step; returns the exit code of each.
RunAttempt = Callable[[TrialDir, int | None], list[int]]
RANK_PROGRAM = REPO / "tests/support/rank_program.py"
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

    The ranks kill themselves, because a kill from outside might come too late.
    Returns why the copies cannot be compared; '' when they can.
    """
    log("first copy: not interrupted")
    codes = run_attempt(alone, None)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was not interrupted {how_it_ended(alone, codes)}"
    for step in kills:
        log(f"second copy: all ranks are killed after step {step}")
        codes = run_attempt(killed, step)
        if -signal.SIGKILL not in codes or not KILLED.issuperset(codes):
            return f"the copy was not killed after step {step}; it {how_it_ended(killed, codes)}"
    log("second copy: to the end")
    codes = run_attempt(killed, None)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was killed {how_it_ended(killed, codes)}"
    return ""


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


# ---- the script


def rank_command(trial: TrialDir) -> list[str]:
    """Return the command of a rank that strikes as $FAULTS says."""
    return [sys.executable, str(RANK_PROGRAM), str(trial.path)]


def rank_environment(
    trial: TrialDir,
    rank: int,
    kill_after: int | None,
) -> dict[str, str]:
    """Return what a rank needs besides its address: paths, and when it kills itself."""
    paths = [str(REPO), str(REPO / "tests"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if kill_after is not None:
        marker = trial.path.with_name(f"killed-{rank}")
        steps = kill_after - last_step(trial)
        fault = Fault("set_lr_and_decay", rank, "SIGKILL", str(marker), skip=steps)
        variables[FAULTS] = dump([fault])
    return variables


def last_step(trial: TrialDir) -> int:
    """Return the step at which the next attempt begins."""
    return max(trial.committed(), default=0)


def local_ranks(world: int) -> RunAttempt:
    """Return a function that runs an attempt with `world` processes on this machine."""

    def run(trial: TrialDir, kill_after: int | None) -> list[int]:
        ranks: list[subprocess.Popen[bytes]] = []
        for rank, address in enumerate(single_trial.environments(world)):
            variables = {**address, **rank_environment(trial, rank, kill_after)}
            ranks.append(subprocess.Popen(rank_command(trial), env=variables))
        return [rank.wait() for rank in ranks]

    return run


def describe(result: Verdict | NoVerdict) -> str:
    """Return the verdict as text, with up to ten tensors that differ."""
    if "differ" not in result:
        return f"no verdict: {result['problem']}"
    differ = result["differ"]
    rows = f"{'all' if result['rows_identical'] else 'NOT all'} {result['rows']} rows"
    same = result["tensors"] - len(differ)
    text = f"{same} of {result['tensors']} tensors and {rows} are identical"
    text += f" after {plural(result['attempts'], 'attempt')}"
    if result["resumed_from"]:
        text += f", resumed from {', '.join(map(str, result['resumed_from']))}"
    lines = [f"{text}: {'PASSED' if result['passed'] else 'FAILED'}"]
    for name, difference in list(differ.items())[:10]:
        lines.append(f"  differs: {name}, by {difference:.3g}")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("trial", type=Path, help="directory of a trial")
    p.add_argument("--steps", type=int, default=10, help="beyond the newest checkpoint")
    p.add_argument("--kills", type=int, default=2, help="how often all ranks are killed")
    p.add_argument("--procs", type=int, help="processes (default: as the trial is configured)")
    args = p.parse_args()
    if args.steps < 1:
        p.error(f"--steps {args.steps} trains nothing")
    trial = TrialDir(args.trial.resolve())
    world = args.procs or single_trial.world_size(trial)
    _, result = drill(trial, args.steps, args.kills, local_ranks(world), print)
    print(describe(result))
    return int(not result["passed"])


if __name__ == "__main__":
    raise SystemExit(main())
