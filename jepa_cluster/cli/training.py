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
from dataclasses import replace
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import ExitCode, JepaError
from jepa_cluster.trial.layout import Root, TrialDir, default_root, read_json

TICK = 0.2  # seconds between looks at the spool


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("train", help="train one trial here and now; ^C saves and stops, the same command goes on")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings in Hydra's grammar, as in conf/")
    p.add_argument("--trial", type=Path, help="go on with this trial directory instead of composing one")
    p.add_argument("--procs", type=int, help="local processes (default: the profile's, 2 on CPU)")
    p.add_argument("--root", type=Path, help="where trials lie (default $JEPA_ROOT, else ./jepa-root)")
    p.set_defaults(run=train)

    p = verbs.add_parser(
        "probe", help="logistic probe on 1 %% of the labels and attentive probe of a trial's newest weights"
    )
    p.add_argument("trial", type=Path, help="trial directory; it is only read")
    p.add_argument("--images", type=int, help="look at no more than this many images of each split")
    p.set_defaults(run=probe)

    p = verbs.add_parser("drill", help="interrupt copies of a trial on purpose and prove that it resumes bit by bit")
    p.add_argument("trial", type=Path, help="trial directory; it is only read")
    p.add_argument("--steps", type=int, default=10, help="steps to train beyond its newest checkpoint (default 10)")
    p.add_argument("--kills", type=int, default=2, help="kills of all ranks on the way (default 2)")
    p.add_argument("--procs", type=int, help="local processes (default: as the trial is configured)")
    p.set_defaults(run=drill)


def train(arguments: argparse.Namespace) -> int:
    from jepa_cluster.launch.warm import Server

    trial, world = find_trial(arguments)
    if trial.done.exists():
        print(f"{trial.path}\nis done; nothing to do")
        return 0
    print(f"{trial.path}\n{world} process{'es' if world > 1 else ''}; ^C saves a checkpoint and stops", flush=True)
    server = Server(sys.executable, Path(__file__).parents[2], os.environ)
    try:
        codes = attend(server, trial, world)
    finally:
        server.close()
    worst = next((c for c in codes if c not in (0, ExitCode.HANG)), max(codes))
    told(trial, worst)
    return worst if worst >= 0 else 128 - worst


def find_trial(arguments: argparse.Namespace) -> tuple[TrialDir, int]:
    """The trial that is meant, created when it is new, and how many processes work on it."""
    if arguments.trial:
        trial = TrialDir(arguments.trial.absolute())
        runtime = trial.read_config().runtime
        return trial, arguments.procs or runtime.nodes * runtime.procs_per_node
    from jepa_cluster.launch import resources
    from jepa_cluster.sweep.definition import Need, Sweep
    from jepa_cluster.sweep.resolve import resolve

    profile = resources.profile(Path("local"))
    need = Need("", 1, arguments.procs or profile.procs_per_node, 60)
    seeds = tuple(int(o.partition("=")[2]) for o in arguments.overrides if o.startswith("seed="))
    base = tuple(o for o in arguments.overrides if not o.startswith("seed="))
    found = resolve(Sweep("command line", base=base, seeds=seeds or (0,)), need, profile.runtime)[0]
    root = Root(arguments.root.absolute()) if arguments.root else default_root()
    trial = root.trial(found.config.name)
    trial.create(found.config)
    return trial, found.config.runtime.procs_per_node


def environments(world: int) -> list[dict[str, str]]:
    """What each rank of one local launch finds in its environment."""
    from jepa_cluster.launch.environment import scrubbed

    shared = {
        **scrubbed(os.environ),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "JEPA_LAUNCH": f"train-{uuid.uuid4().hex[:12]}",
    }
    shared.setdefault("OMP_NUM_THREADS", "1")
    return [{**shared, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(world)]


def attend(server: Any, trial: TrialDir, world: int, kill_after: int | None = None) -> list[int]:
    """Start the ranks, show what they write, pass ^C on, kill them after a step if asked; -> their exit codes."""
    from jepa_cluster.trial import spool

    ranks = [server.spawn(trial.path, e, Path(os.devnull)) for e in environments(world)]

    def pass_on(*_: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    known = spool.read(trial).rows
    shown = known[-1].step if known else -1
    try:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(TICK)
            shown = show(trial, shown)
            if kill_after is not None and shown >= kill_after:
                for rank in ranks:
                    rank.kill()
        show(trial, shown)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return [rank.wait() for rank in ranks]


def show(trial: TrialDir, after: int) -> int:
    """Print the rows beyond a step -> the last step printed."""
    from jepa_cluster.trial import spool

    names = ("loss", "grad_norm", "lr", "images_per_s", "probe/class_top1", "probe/rankme")
    for row in spool.read(trial).rows:
        if row.step > after:
            values = [f"{n} {row.values[n]:.4g}" for n in names if n in row.values]
            print(f"step {row.step}: {', '.join(values)}", flush=True)
            after = row.step
    return after


def told(trial: TrialDir, code: int) -> None:
    """One line on how it ended, and the error if there was one."""
    try:
        last = trial.attempts()[-1]
    except (IndexError, JepaError):
        last = {}
    print(f"{last.get('cause', f'exit code {code}')} at step {last.get('end_step', '?')}")
    if last.get("error"):
        print(f"  {last['error']}\n  logs: {trial.logs(last['attempt'])}")


def probe(arguments: argparse.Namespace) -> int:
    from jepa_cluster.training.evaluate import evaluate

    for name, value in evaluate(TrialDir(arguments.trial.absolute()), arguments.images).items():
        print(f"{name:20s} {value:.4g}")
    return 0


def drill(arguments: argparse.Namespace) -> int:
    """Two copies from the newest checkpoint: one left alone, one killed on the way. Exit code 0 when no bit differs."""
    from jepa_cluster.launch.warm import Server

    trial = TrialDir(arguments.trial.absolute())
    config = trial.read_config()
    start = (trial.committed() or [0])[-1]
    end = min(start + arguments.steps, config.recipe.optim.steps or 0)
    if end <= start:
        print(f"the trial is at its last step {start}; nothing is left to train")
        return 1
    world = arguments.procs or config.runtime.nodes * config.runtime.procs_per_node
    server = Server(sys.executable, Path(__file__).parents[2], os.environ)
    with tempfile.TemporaryDirectory(prefix="jepa-drill-") as folder:
        try:
            alone, killed = (copy(trial, Root(Path(folder) / name), start, end) for name in ("alone", "killed"))
            print(f"steps {start} to {end} on {world} processes, left alone", flush=True)
            attend(server, alone, world)
            for number in range(arguments.kills):
                at = start + (end - start) * (number + 1) // (arguments.kills + 1)
                print(f"the same, all ranks killed after step {at}", flush=True)
                attend(server, killed, world, kill_after=at)
            attend(server, killed, world)
        finally:
            server.close()
        return verdict(alone, killed, end)


def copy(trial: TrialDir, root: Root, start: int, end: int) -> TrialDir:
    """A trial of the same recipe that begins at `start` and leaves at `end`; every step has a row."""
    config = trial.read_config()
    runtime = replace(config.runtime, log_every=1, checkpoint_minutes=0.02, stop_after=end, milestone_every=0)
    runtime = replace(runtime, milestones=(), fork_from=None)
    fresh = root.trial(trial.name)
    fresh.create(replace(config, runtime=runtime))
    manifest = read_json(trial.checkpoint(start) / "manifest.json") or {}
    for step in {start, manifest.get("anchor") or start} - {0}:  # where a rollback would go, too
        shutil.copytree(trial.checkpoint(step), fresh.checkpoint(step))
    return fresh


def verdict(alone: TrialDir, killed: TrialDir, step: int) -> int:
    """Compare weights, moments and metrics, and say so."""
    import torch

    from jepa_cluster.training import checkpoint, journal
    from jepa_cluster.trial import spool

    def rows(trial: TrialDir) -> list[Any]:
        return [
            (r.step, {k: v for k, v in r.values.items() if k not in journal.TIMINGS}) for r in spool.read(trial).rows
        ]

    if not (alone.checkpoint(step).exists() and killed.checkpoint(step).exists()):
        last = [t.attempts()[-1] if t.attempts() else {} for t in (alone, killed)]
        print(f"no verdict: the copies did not come to step {step}: {[r.get('error', r.get('cause')) for r in last]}")
        return 1
    left, right = checkpoint.whole(alone.checkpoint(step)), checkpoint.whole(killed.checkpoint(step))
    apart = [n for n in left if not torch.equal(left[n], right[n])]
    same = rows(alone) == rows(killed)
    print(
        f"{len(left) - len(apart)} of {len(left)} tensors and {'all' if same else 'NOT all'} {len(rows(alone))} rows "
        f"are identical after {len(killed.attempts())} attempts: {'PASSED' if same and not apart else 'FAILED'}"
    )
    for name in apart[:10]:
        print(f"  differs: {name}, by {(left[name].double() - right[name].double()).abs().max():.3g}")
    return 0 if same and not apart else 1
