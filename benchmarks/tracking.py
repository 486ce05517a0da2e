"""Claim: settled points of N live trials reach MLflow within seconds, each exactly once.

    python benchmarks/tracking.py
        lag and CPU, 200 trials, SQLite below the root
    python benchmarks/tracking.py --store server --kills 20 --restarts 3 --torn --rebuild
        the collector and the server are killed, lines are torn; then a rebuild
    python benchmarks/tracking.py --store server --lossy 0.3
        every third answer is lost
    python benchmarks/tracking.py --store server --full
        the server's disk is full for a third of the time
    python benchmarks/tracking.py --store postgres --rebuild
        a private PostgreSQL behind a server
    python benchmarks/tracking.py --store server --direct
        the same rows from 200 threads, without spools

Stub trials (one process writes for all) log a row of 18 metrics every --row seconds and commit
every --commit, once the collector has made their runs. A trial with the default settings (a row
every 10 steps of about a second, a checkpoint every 10 minutes) writes a fifth and commits a
thirtieth as often. The collector is `jepa sync --follow`, killed with SIGKILL and started again
--kills times. Lag is the time from a commit in the spool to the end of the request that made its
last row visible, for every commit. At the end every settled point of every spool, read by a reader
of our own, is looked for in the tables.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "slurm" / "testcluster"))
from support import fake_trials, stores

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import collector, mlflow_client, mlflow_runs, sync
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.spool import Spool

ROW = {f"metric_{i}": float(i) for i in range(16)} | {"loss": 0.4, "flops_total": 1e12}
FORK = get_context("fork")  # mlflow is imported once, before the first fork


def write(trials: list[TrialDir], a: argparse.Namespace) -> None:
    """The stub writers, phases spread.

    --torn: in the middle every tenth trial's machine dies within a line, and a second attempt goes
    on from the last commit.
    """
    spools = [Spool(t, t.claim({"world": 1, "started": int(time.time() * 1000)})) for t in trials]
    begun, step, every = time.monotonic(), 0, max(1, round(a.commit / a.row))
    while time.monotonic() - begun < a.seconds:
        step += 1
        if a.torn and step == max(2, int(a.seconds / a.row / 2)):
            for i in range(0, len(trials), 10):
                with trials[i].metrics(1).open("ab") as f:
                    f.write(b'{"step": %d, "t": 1, "lo' % step)
                resumed = spools[i].settled
                spools[i].close()
                trials[i].amend(1, {"ended": int(time.time() * 1000), "cause": "killed"})
                spools[i] = Spool(trials[i], trials[i].claim({"world": 1}), resumed)
        for i, spool in enumerate(spools):
            spool.log(step, ROW | {"flops_total": 1e12 * step})
            if (step + i) % every == 0:
                spool.commit(step)
        time.sleep(max(0.0, begun + step * a.row - time.monotonic()))
    for spool in spools:  # what follows the last commit stays unsettled, and must not be shown
        spool.close()


class Timed(mlflow_runs.Experiment):
    """An experiment that notes when what it sent was visible, and what it cost."""

    log = Path()

    def send(self, run, tags, rows=(), params=None):
        sent = super().send(run, tags, rows, params)
        if sent[0]:
            self.note(run, *sent)
        return sent

    def find(self, key):
        uncertain = key in self._uncertain
        run = super().find(key)
        if uncertain and run and key:  # the answer was lost, the points were not
            self.note(run, 0, 0)
        return run

    def note(self, run, points: int, requests: int) -> None:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        line = {
            "trial": run.tags["jepa.trial"],
            "settled": run.settled,
            "t": time.time(),
            "points": points,
            "requests": requests,
            "cpu": spent.ru_utime + spent.ru_stime,
            "pid": os.getpid(),
        }
        with self.log.open("a") as f:
            f.write(json.dumps(line) + "\n")


def follow(root: Root, uri: str) -> None:
    Timed.log, collector.Experiment = root.path / "sent.jsonl", Timed
    sync.follow(root, uri, 0.5, threading.Event(), lambda line: None)


def lags(root: Root, trials: list[TrialDir]) -> list[float]:
    """Seconds from every commit to the first request after which the run's watermark was not below
    it.
    """
    visible: dict[str, list[tuple[float, int]]] = {}
    for line in map(json.loads, (root.path / "sent.jsonl").read_text().splitlines()):
        visible.setdefault(line["trial"], []).append((line["t"], line["settled"]))
    found = []
    for trial in trials:
        for path in sorted((trial.path / "metrics").glob("*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                if line.startswith(b'{"commit"') and line.endswith(b"}"):
                    made = json.loads(line)
                    found += [
                        t - made["t"] / 1000
                        for t, s in visible.get(trial.name, ())
                        if s >= made["commit"]
                    ][:1]
    return sorted(found)


def cpu(root: Root) -> str:
    """Of the collector, by process, between its first and its last request."""
    by: dict[int, list[dict]] = {}
    for line in map(json.loads, (root.path / "sent.jsonl").read_text().splitlines()):
        by.setdefault(line["pid"], []).append(line)
    spent = sum(lines[-1]["cpu"] - lines[0]["cpu"] for lines in by.values())
    points = sum(x["points"] for lines in by.values() for x in lines[1:])
    requests = sum(x["requests"] for lines in by.values() for x in lines[1:])
    return (
        f"{1e6 * spent / max(points, 1):.0f} us of CPU a point, "
        f"{points / max(requests, 1):.0f} points a request"
    )


def check(trials: list[TrialDir], database: str) -> dict[str, int]:
    found = fake_trials.stored(database)
    counts = {
        "points": 0,
        "missing": 0,
        "doubled": 0,
        "runs doubled": len(fake_trials.doubled_runs(database)),
    }
    for trial in trials:
        have, wanted = found.get(trial.name, {}), fake_trials.spooled(trial)
        counts["points"] += len(wanted)
        counts["missing"] += sum(point not in have.get(key, []) for key, point in wanted.items())
        counts["doubled"] += sum(len(points) > 1 for points in have.values())
        counts["missing"] += len(have.keys() - wanted.keys())  # shown, but not settled
    return counts


def disturb(
    a: argparse.Namespace, root: Root, uri: str, server, over: threading.Event, current: list
) -> list:
    """What dies while the trials write, from a thread each -> the threads.

    current: holds the living collector.
    """
    rng = random.Random(0)

    def kills() -> None:
        for _ in range(a.kills):
            if over.wait(rng.uniform(0.3, 1.7) * a.seconds / (a.kills + 1)):
                return
            os.kill(current[0].pid, signal.SIGKILL)
            current[0].join()
            current[0] = FORK.Process(target=follow, args=(root, uri))
            current[0].start()

    def restarts() -> None:
        for _ in range(a.restarts):
            if over.wait(a.seconds / (a.restarts + 1)):
                return
            server.kill()
            time.sleep(3)
            server.start().ready()

    def full() -> None:
        over.wait(a.seconds / 3)
        server.disk(free=100_000)
        over.wait(a.seconds / 3)
        server.disk(free=None)

    threads = [
        threading.Thread(target=t)
        for t, on in ((kills, a.kills), (restarts, a.restarts), (full, a.full))
        if on
    ]
    for t in threads:
        t.start()
    return threads


def spooled(
    a: argparse.Namespace, root: Root, uri: str, database: str, server: stores.Server | None
) -> None:
    trials = fake_trials.sweep(root, "load", ("vit_a",), fake_trials.SCALES[:1], range(a.trials))
    over, collector = threading.Event(), FORK.Process(target=follow, args=(root, uri))
    collector.start()
    made = "select count(*) from tags where key = 'jepa.trial'"
    stores.until(
        lambda: fake_trials.rows(database, made)[0][0] >= a.trials, "no runs"
    )  # as after a submit
    begun, current = time.monotonic(), [collector]
    threads = disturb(a, root, uri, server, over, current)
    writers = FORK.Process(target=write, args=(trials, a))
    writers.start()
    writers.join()
    for t in threads:
        t.join()
    patience = time.monotonic() + a.patience
    while len(lags(root, trials)) < commits(trials) and time.monotonic() < patience:
        time.sleep(1)
    settled = time.monotonic() - begun - a.seconds
    over.set()
    os.kill(current[0].pid, signal.SIGKILL)
    current[0].join()
    for _ in range(20):  # a lossy store may need more than one sync
        try:
            sync.sync(root, uri=uri)
            break
        except TrackingError:
            continue
    seconds = lags(root, trials)
    p95 = seconds[int(0.95 * len(seconds))]
    print(
        f"{name(a)}: {check(trials, database)}; "
        f"lag p50 {statistics.median(seconds):.2f} s, p95 {p95:.2f} s, "
        f"longest {seconds[-1]:.1f} s over {len(seconds)} of {commits(trials)} commits; "
        f"all there {settled:.0f} s after the last row; {cpu(root)}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    if a.rebuild:
        before, begun = fake_trials.stored(database), time.monotonic()
        report = sync.sync(root, uri=uri, rebuild=True)
        after = fake_trials.stored(database)
        differ = sum(before.get(t.name) != after.get(t.name) for t in trials)
        points = sum(map(len, after.values()))
        print(
            f"rebuilt in {time.monotonic() - begun:.0f} s: {report.created} runs, "
            f"{points} points, {differ} trials differ, {check(trials, database)}"
        )


def commits(trials: list[TrialDir]) -> int:
    return sum(
        line.startswith(b'{"commit"')
        for t in trials
        for p in (t.path / "metrics").glob("*.jsonl")
        for line in p.read_bytes().split(b"\n")
    )


def name(a: argparse.Namespace) -> str:
    faults = [
        f"{a.kills} kills" * bool(a.kills),
        f"{a.restarts} restarts" * bool(a.restarts),
        "disk full" * a.full,
        "torn lines" * a.torn,
        f"{a.lossy:.0%} of answers lost" * bool(a.lossy),
    ]
    described = ", ".join(f for f in faults if f) or "no faults"
    return f"{a.store}, {a.trials} trials, {a.seconds:g} s, a row every {a.row:g} s, {described}"


def direct(a: argparse.Namespace, root: Root, uri: str) -> None:
    """The same rows without spools: one thread a trial, one log_batch a row, no retry beyond
    MLflow's own.
    """
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(uri)  # with MLflow's own patience
    experiment = client.create_experiment("direct", str(root.path))
    counts, slow, guard = Counter[str](), [], threading.Lock()

    def trial() -> None:
        run, end, step = None, time.monotonic() + a.seconds, 0
        while time.monotonic() < end:
            begun, step = time.monotonic(), step + 1
            try:
                run = run or client.create_run(experiment).info.run_id
                now = int(time.time() * 1000)
                client.log_batch(run, metrics=[Metric(k, v, now, step) for k, v in ROW.items()])
                what = "sent"
            except Exception:
                what = "failed"
            with guard:
                counts[what] += 1
                slow.append(time.monotonic() - begun)
            time.sleep(max(0.0, a.row - (time.monotonic() - begun)))

    threads = [threading.Thread(target=trial) for _ in range(a.trials)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    due = int(a.trials * a.seconds / a.row)
    print(
        f"direct, {name(a)}: {dict(counts)} of {due} rows due; "
        f"the trainer waits p50 {statistics.median(slow):.2f} s, longest {max(slow):.1f} s; "
        f"load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--trials", type=int, default=200)
    p.add_argument("--seconds", type=float, default=120)
    p.add_argument("--row", type=float, default=2, help="seconds between two rows of a trial")
    p.add_argument(
        "--commit", type=float, default=20, help="seconds between two commits of a trial"
    )
    p.add_argument("--store", choices=("sqlite", "server", "postgres"), default="sqlite")
    p.add_argument("--kills", type=int, default=0, help="of the collector")
    p.add_argument(
        "--restarts", type=int, default=0, help="of the server, after SIGKILL and three seconds"
    )
    p.add_argument(
        "--lossy", type=float, default=0, metavar="SHARE", help="of answers swallowed by a proxy"
    )
    p.add_argument(
        "--full", action="store_true", help="no room on the server's disk in the middle third"
    )
    p.add_argument(
        "--torn", action="store_true", help="every tenth trial dies within a line and goes on"
    )
    p.add_argument(
        "--rebuild", action="store_true", help="afterwards rebuild the store and compare it"
    )
    p.add_argument(
        "--direct", action="store_true", help="no spools: the trials log to the store themselves"
    )
    p.add_argument(
        "--patience",
        type=float,
        default=200,
        help="seconds to wait for the rest after the last row",
    )
    a = p.parse_args()
    if ((a.restarts or a.lossy or a.full) and a.store == "sqlite") or (
        a.full and a.store == "postgres"
    ):
        p.error("--restarts and --lossy need a server, --full one over SQLite: --store server")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_:
        root, database, server = Root(Path(folder)), f"sqlite:///{folder}/mlflow.db", None
        if (
            a.store != "postgres"
        ):  # and mlflow is imported, without a connection that a fork would share
            mlflow_client.create_database(Path(folder) / "mlflow.db")
        else:
            database = open_.enter_context(stores.postgres())
        uri = database
        if a.store != "sqlite":
            server = open_.enter_context(stores.Server(Path(folder), database))
            uri = server.uri
            if a.lossy:
                uri, _ = open_.enter_context(stores.lossy(server.port, a.lossy))
        if a.direct:
            direct(a, root, uri)
        else:
            spooled(a, root, uri, database, server)


if __name__ == "__main__":
    main()
