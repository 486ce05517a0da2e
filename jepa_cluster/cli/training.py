"""`jepa train key=value ...`: one trial here and now, into the same directory contract as a sweep's."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from jepa_cluster.cli import Verbs
from jepa_cluster.errors import ExitCode, JepaError
from jepa_cluster.trial.layout import Root, TrialDir, default_root

TICK = 0.2  # seconds between looks at the spool


def add(verbs: Verbs) -> None:
    p = verbs.add_parser("train", help="train one trial here and now; ^C saves and stops, the same command goes on")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="settings in Hydra's grammar, as in conf/")
    p.add_argument("--trial", type=Path, help="go on with this trial directory instead of composing one")
    p.add_argument("--procs", type=int, help="local processes (default: the profile's, 2 on CPU)")
    p.add_argument("--root", type=Path, help="where trials lie (default $JEPA_ROOT, else ./jepa-root)")
    p.set_defaults(run=train)


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


def attend(server: Any, trial: TrialDir, world: int) -> list[int]:
    """Start the ranks, show what they write, pass ^C on; -> their exit codes."""
    ranks = [server.spawn(trial.path, e, Path(os.devnull)) for e in environments(world)]

    def pass_on(*_: object) -> None:
        for rank in ranks:
            rank.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    shown = -1
    try:
        while any(rank.poll() is None for rank in ranks):
            time.sleep(TICK)
            shown = show(trial, shown)
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
