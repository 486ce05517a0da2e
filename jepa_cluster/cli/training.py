"""`jepa train`: one trial here and now, in the directory contract of a sweep. `jepa drill`: proof that it resumes."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs
from jepa_cluster.cli.completers import attach, overrides
from jepa_cluster.cli.verb import ask_selection, ask_sweep, finish, print_json, root_of, tell, trials_of, verb
from jepa_cluster.errors import CheckpointError, ConfigError, DataError, ExitCode, plural
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

Say = Callable[[str], None]
TICK = 0.2  # seconds between looks at the spool
KILLED = (-signal.SIGKILL, ExitCode.HANG)  # after a kill; HANG: the rank noticed that another one was gone


def add(verbs: Verbs) -> None:
    p = verb(verbs, "train", train, "train one trial here and now; ^C saves and stops, the same command goes on")
    told = "settings in Hydra's grammar, as in conf/"
    attach(p.add_argument("overrides", nargs="*", metavar="key=value", help=told), overrides)
    p.add_argument("--trial", type=Path, help="go on with this trial directory instead of composing one")
    p.add_argument("--procs", type=int, help="local processes (default: the profile's, 2 on CPU)")

    told = "logistic probe on 1 %% of the labels and attentive probe of trials' newest weights; they are only read"
    p = verb(verbs, "probe", probe, told)
    ask_sweep(p, "a trial directory, or the name of a submitted sweep")
    ask_selection(p)
    p.add_argument("--images", type=int, help="look at no more than this many images of each split")

    told = "kill copies of a trial on purpose and check that it resumes with the same bits; the trial is only read"
    p = verb(verbs, "drill", drill, told)
    ask_sweep(p, "a trial directory, or the name of a submitted sweep")
    ask_selection(p)
    p.add_argument("--steps", type=int, default=10, help="steps to train beyond its newest checkpoint (default 10)")
    p.add_argument("--kills", type=int, default=2, help="kills of all ranks on the way (default 2)")
    p.add_argument("--procs", type=int, help="local processes (default: as the trial is configured)")


def train(arguments: argparse.Namespace) -> int:
    from jepa_cluster.launch.scheduler.fork_server import ForkServer

    trial, world = find_trial(arguments)
    tell(arguments, str(trial.path))
    if trial.done.exists():
        return finish(arguments, ending(trial, 0), "is done; nothing to do")
    if trial.failed.exists():
        error = (read_json(trial.failed) or {}).get("error", "")
        tell(arguments, f"an earlier attempt failed and is tried again: {error}")
        trial.failed.unlink()
    tell(arguments, f"{world} process{'es' if world > 1 else ''}; ^C saves a checkpoint and stops")
    server = ForkServer(sys.executable, Path(__file__).parents[2], os.environ)
    try:
        codes = attend(server, trial, world, lambda line: tell(arguments, line))
    finally:
        server.close()
    worst = next((c for c in codes if c not in (0, ExitCode.HANG)), max(codes))
    end = ending(trial, worst)
    text = f"{end['cause']} at step {'?' if end['step'] is None else end['step']}"
    finish(arguments, end, text + (f"\n  {end['error']}\n  logs: {end['logs']}" if end["error"] else ""))
    return worst if worst >= 0 else 128 - worst


def find_trial(arguments: argparse.Namespace) -> tuple[TrialDir, int]:
    """The trial that is meant, created when it is new, and how many processes work on it."""
    if arguments.trial:
        trial = TrialDir(arguments.trial.absolute())
        runtime = trial.read_config().runtime
        return trial, arguments.procs or runtime.nodes * runtime.procs_per_node
    from jepa_cluster.launch.cluster import profile as resources
    from jepa_cluster.sweep.points import ResourceRequest, Sweep
    from jepa_cluster.sweep.resolve import resolve

    profile = resources.load_profile(Path("local"))
    need = ResourceRequest("", 1, arguments.procs or profile.procs_per_node, 60)
    seeds = tuple(int(o.partition("=")[2]) for o in arguments.overrides if o.startswith("seed="))
    base = tuple(o for o in arguments.overrides if not o.startswith("seed="))
    found = resolve(Sweep("command line", base=base, seeds=seeds or (0,)), need, profile.runtime)[0]
    trial = root_of(arguments).trial(found.config.name)
    trial.create(found.config)
    return trial, found.config.runtime.procs_per_node


def environments(world: int) -> list[dict[str, str]]:
    """What each rank of one local launch finds in its environment."""
    from jepa_cluster.launch.scheduler.clean_env import clean_environment
    from jepa_cluster.training.dist_env import local_environment

    shared = clean_environment(os.environ)
    shared.setdefault("OMP_NUM_THREADS", "1")
    launch = f"train-{uuid.uuid4().hex[:12]}"
    return [{**shared, **local_environment(rank, world, launch)} for rank in range(world)]


def attend(server: Any, trial: TrialDir, world: int, say: Say) -> list[int]:
    """Run one attempt: start the ranks, print their rows, pass ^C on. Returns exit codes by rank."""
    from jepa_cluster.trial import spool

    variables = environments(world)
    ranks = [server.spawn(trial.path, each, Path(os.devnull)) for each in variables]

    def pass_on(*_: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    known = spool.read(trial).rows
    shown = known[-1].step if known else -1
    try:
        begun = False
        while any(rank.poll() is None for rank in ranks):
            time.sleep(TICK)
            begun = begun or show_begin(trial, variables[0]["JEPA_LAUNCH"], say)
            shown = show(trial, shown, say)
        show(trial, shown, say)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return [rank.wait() for rank in ranks]


def show_begin(trial: TrialDir, launch: str, say: Say) -> bool:
    """Print where the attempt of this launch begins, and what it set aside; False while that is not known."""
    from jepa_cluster.trial import spool

    record = next((r for r in trial.attempts() if r.get("launch") == launch and "start_step" in r), None)
    if record is None:
        return False
    if record["attempt"] > 1 or record["start_step"]:
        say(f"attempt {record['attempt']} begins at step {record['start_step']}")
    for event in spool.read(trial).events:
        if event["event"] == "checkpoint_set_aside" and event["attempt"] == record["attempt"]:
            say(f"a damaged checkpoint was set aside: {event['fault']}")
    return True


def show(trial: TrialDir, after: int, say: Say) -> int:
    """Say the rows beyond a step -> the last step said."""
    from jepa_cluster.trial import spool

    names = ("loss", "grad_norm", "lr", "images_per_s", "probe/class_top1", "probe/rankme")
    for row in spool.read(trial).rows:
        if row.step > after:
            values = [f"{n} {row.values[n]:.4g}" for n in names if n in row.values]
            say(f"step {row.step}: {', '.join(values)}")
            after = row.step
    return after


def ending(trial: TrialDir, code: int) -> dict[str, Any]:
    """How it ended: cause, step, the error if there was one. code: of its processes, the worst."""
    attempts = trial.attempts()
    last = attempts[-1] if attempts else {"attempt": 0}
    return {
        "trial": trial.name,
        "path": str(trial.path),
        "attempts": len(attempts),
        "cause": last.get("cause", f"exit code {code}"),
        "exit": code,
        "step": last.get("end_step"),
        "error": last.get("error", ""),
        "logs": str(trial.logs(last["attempt"])),
        "metrics": (read_json(trial.done) or {}).get("metrics", {}),
    }


def probe(a: argparse.Namespace) -> int:
    """One document a trial; where several are probed, one that cannot be is told and the others go on."""
    from jepa_cluster.training.evaluate import evaluate

    trials, found = trials_of(a), list[dict[str, Any]]()
    for trial in trials:
        try:
            found.append({"trial": trial.name, **evaluate(trial, a.images)})
        except (CheckpointError, DataError) as e:
            if len(trials) == 1:
                raise
            found.append({"trial": trial.name, "error": e.what})
        for name, value in found[-1].items():
            tell(a, f"{name:20s} {value:.4g}" if isinstance(value, float) else f"{name:20s} {value}")
    print_json(a, found)
    return int(any("error" in f for f in found))


def drill(a: argparse.Namespace) -> int:
    """Train two copies of a trial, kill the ranks of one of them on the way, and compare weights and metrics.

    The copies begin at the newest checkpoint with steps still to train, or from the seed.
    Returns exit code 0 when no bit differs; 1 when one does, and when there is no verdict.
    """
    from jepa_cluster.launch.scheduler.fork_server import ForkServer

    if a.steps < 1:
        raise ConfigError(f"--steps {a.steps} trains nothing", hint="--steps 10")
    (trial,) = trials_of(a, "drill")
    config = trial.read_config()
    horizon = config.recipe.optim.steps or 0
    start = max((s for s in trial.committed() if s < horizon), default=0)  # of a finished trial: an earlier one
    end = min(start + a.steps, horizon)
    kills = kill_steps(start, end, a.kills)
    world = a.procs or config.runtime.nodes * config.runtime.procs_per_node
    server = ForkServer(sys.executable, Path(__file__).parents[2], os.environ)

    def say(line: str) -> None:
        tell(a, line)

    def attempt(copy: TrialDir) -> list[int]:
        return attend(server, copy, world, say)

    if len(kills) < a.kills:
        say(f"{plural(a.kills, 'kill')} asked for, {len(kills)} fit between steps {start} and {end}")
    say(f"steps {start} to {end} on {plural(world, 'rank')}")
    with tempfile.TemporaryDirectory(prefix="jepa-drill-") as folder:
        try:
            alone, killed = (make_copy(trial, Root(Path(folder) / name), start, end) for name in ("alone", "killed"))
            problem = train_copies(alone, killed, kills, attempt, say)
            comparison = no_verdict(problem) if problem else compare(alone, killed, end)
        except (CheckpointError, OSError) as e:
            comparison = no_verdict(f"{type(e).__name__}: {e}")
        finally:
            server.close()
    found = {"trial": trial.name, "start": start, "end": end, "kills": kills, **comparison}
    finish(a, found, said(found))
    return 0 if found["passed"] else 1


def kill_steps(start: int, end: int, count: int) -> list[int]:
    """Up to `count` distinct steps strictly between `start` and `end`, evenly spaced."""
    count = min(count, end - start - 1)
    return [start + (end - start) * (number + 1) // (count + 1) for number in range(count)]


def make_copy(trial: TrialDir, root: Root, start: int, end: int) -> TrialDir:
    """A trial of the same recipe that begins at `start` and leaves at `end`; every step has a row."""
    config = trial.read_config()
    runtime = replace(config.runtime, log_every=1, checkpoint_minutes=0.02, stop_after=end, milestone_every=0)
    runtime = replace(runtime, milestones=(), fork_from=None, kill_after=None)
    fresh = root.trial(trial.name)
    fresh.create(replace(config, runtime=runtime))
    if start:
        shutil.copytree(trial.checkpoint(start), fresh.checkpoint(start))
    return fresh


def train_copies(
    alone: TrialDir, killed: TrialDir, kills: Sequence[int], attempt: Callable[[TrialDir], list[int]], say: Say
) -> str:
    """Train `alone` in one attempt, and `killed` in one attempt per step of `kills` and a last one.

    The ranks kill themselves, by `runtime.kill_after`: a kill from outside might come after the last step.
    attempt: runs one attempt of a copy and returns the exit codes of its ranks.
    Returns why the copies cannot be compared; '' when they can.
    """
    say("first copy: not interrupted")
    codes = attempt(alone)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was not interrupted {how_it_ended(alone, codes)}"
    for step in kills:
        say(f"second copy: all ranks are killed after step {step}")
        set_kill_after(killed, step)
        codes = attempt(killed)
        if -signal.SIGKILL not in codes or not set(codes) <= set(KILLED):
            return f"the copy was not killed after step {step}; it {how_it_ended(killed, codes)}"
    say("second copy: to the end")
    set_kill_after(killed, None)
    codes = attempt(killed)
    if set(codes) != {ExitCode.DONE}:
        return f"the copy that was killed {how_it_ended(killed, codes)}"
    return ""


def set_kill_after(trial: TrialDir, step: int | None) -> None:
    """Replace `runtime.kill_after` in the frozen config of a copy."""
    config = trial.read_config()
    trial.create(replace(config, runtime=replace(config.runtime, kill_after=step)))


def how_it_ended(trial: TrialDir, codes: Sequence[int]) -> str:
    """Exit codes of an attempt's ranks, and the cause and error in its record."""
    attempts = trial.attempts()
    record = attempts[-1] if attempts else {}
    cause = record.get("error") or record.get("cause") or "its record has no end"
    return f"ended with exit codes {', '.join(map(str, codes))}: {cause}"


def no_verdict(problem: str) -> dict[str, Any]:
    """The result of a drill that could not compare its copies: neither passed nor failed."""
    return {"passed": None, "problem": problem}


def compare(alone: TrialDir, killed: TrialDir, step: int) -> dict[str, Any]:
    """Compare weights, moments and metrics of two copies. Raises CheckpointError, OSError."""
    import torch

    from jepa_cluster.training import attempt_log, checkpoint
    from jepa_cluster.trial import spool

    def rows(trial: TrialDir) -> list[tuple[int, dict[str, float]]]:
        found = spool.read(trial).rows
        return [(r.step, {k: v for k, v in r.values.items() if k not in attempt_log.WALL_CLOCK_METRICS}) for r in found]

    missing = [t.root.path.name for t in (alone, killed) if not t.checkpoint(step).exists()]
    if missing:
        return no_verdict(f"no checkpoint of step {step} in copy {' and '.join(missing)}")
    left, right = (checkpoint.load_unsharded(t.checkpoint(step)) for t in (alone, killed))
    if left.keys() != right.keys():
        return no_verdict(f"only one of the copies has {', '.join(sorted(left.keys() ^ right.keys())[:10])}")
    differing = [name for name in left if not torch.equal(left[name], right[name])]
    same_rows = rows(alone) == rows(killed)
    attempts = killed.attempts()
    return {
        "passed": same_rows and not differing,
        "problem": "",
        "attempts": len(attempts),
        "resumed_from": [record.get("start_step") for record in attempts[1:]],
        "tensors": len(left),
        "differ": {n: float((left[n].double() - right[n].double()).abs().max()) for n in differing},
        "rows": len(rows(alone)),
        "rows_identical": same_rows,
    }


def said(found: dict[str, Any]) -> str:
    """A drill's verdict in words."""
    if found["problem"]:
        return f"no verdict: {found['problem']}"
    differ, resumed = found["differ"], found["resumed_from"]
    begun = f", resumed from {', '.join(map(str, resumed))}" if resumed else ""
    lines = [
        f"{found['tensors'] - len(differ)} of {found['tensors']} tensors and "
        f"{'all' if found['rows_identical'] else 'NOT all'} {found['rows']} rows are identical after "
        f"{plural(found['attempts'], 'attempt')}{begun}: {'PASSED' if found['passed'] else 'FAILED'}"
    ]
    return "\n".join([*lines, *(f"  differs: {name}, by {by:.3g}" for name, by in list(differ.items())[:10])])
