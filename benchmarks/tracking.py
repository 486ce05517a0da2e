"""Claim: with N live trials writing spools, settled points reach MLflow within seconds, each exactly once.

    python benchmarks/tracking.py --trials 200 --seconds 60 [--kills 20] [--direct]

Stub trials (one process writes for all) log a row of 18 metrics a second each and commit every ten. The collector
follows into a fresh SQLite store; with --kills it is killed with SIGKILL that many times. Lag is the time from the
commit in the spool to the end of the request that carried its last point. At the end every settled point of every
spool is looked for in the tables: missing and doubled points are counted. --direct logs the same rows from one thread
a trial straight to the same kind of store instead.
"""

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fabricate

from jepa_cluster.errors import TrackingError
from jepa_cluster.tracking import collect, lease, store
from jepa_cluster.trial.layout import Root
from jepa_cluster.trial.spool import Spool

ROW = {f"metric_{i}": float(i) for i in range(16)} | {"loss": 0.4, "flops_total": 1e12}


def study(root: Root, trials: int) -> list:
    return fabricate.sweep(root, "load", ("vit_a",), fabricate.SCALES[:1], range(trials))


def write(path: Path, trials: int, seconds: float) -> None:
    """The stub writers: every trial one row a second, a commit every ten, phases spread."""
    made = [Root(path).trial(t["name"]) for t in json.loads((path / "sweeps/load/plan.json").read_text())["trials"]]
    spools = [Spool(t, t.claim({"world": 1, "started": int(time.time() * 1000)}), 0) for t in made]
    begun, step = time.monotonic(), 0
    while time.monotonic() - begun < seconds:
        step += 1
        for i, spool in enumerate(spools):
            spool.log(step, ROW | {"flops_total": 1e12 * step})
            if (step + i) % 10 == 0:
                spool.commit(step)
        time.sleep(max(0.0, begun + step - time.monotonic()))
    for spool in spools:
        spool.commit(step)
        spool.close()


class Timed(collect.Collector):
    """A collector that notes when each commit it ships was made."""

    def _ship(self, remote, rows):
        sent = super()._ship(remote, rows)
        with (self.root.path / "lags.jsonl").open("a") as f:
            f.write(json.dumps({"run": remote.name, "step": rows[-1].step, "t": time.time() * 1000}) + "\n")
        return sent


def follow(path: Path, uri: str) -> None:
    root = Root(path)
    client, uri = store.connect(root, uri)
    with lease.hold(root, uri, patience=30) as renew:
        collector = Timed(root, client, uri)
        while True:
            try:
                collector.round()
            except TrackingError as e:
                print(e)
            renew()
            time.sleep(0.5)


def lags(root: Root, trials: list) -> list[float]:
    """Seconds from each commit to the batch that shipped it."""
    shipped = [json.loads(x) for x in (root.path / "lags.jsonl").read_text().splitlines()]
    by_seed = {f"s{t.read_config().recipe.seed}": t for t in trials}
    commits = {k: {r["commit"]: r["t"] for r in map(json.loads, t.metrics(1).read_text().splitlines()) if "commit" in r}
               for k, t in by_seed.items()}  # fmt: skip
    found = ((commits[s["run"].rsplit(" ", 1)[1]].get(s["step"]), s["t"]) for s in shipped)
    return [(sent - made) / 1000 for made, sent in found if made]


def check(trials: list, uri: str) -> dict[str, int]:
    found = fabricate.stored(uri)
    counts = {"points": 0, "missing": 0, "doubled": 0}
    for trial in trials:
        have = found.get(trial.name, {})
        for key, point in fabricate.spooled(trial).items():
            counts["points"] += 1
            counts["missing"] += point not in have.get(key, [])
            counts["doubled"] += len(have.get(key, [])) > 1
    return counts


def spooled(a: argparse.Namespace, root: Root, uri: str) -> None:
    trials = study(root, a.trials)
    fork = get_context("fork")  # mlflow is imported once, here
    client, _ = store.connect(root, uri)
    client.search_experiments()
    collector = fork.Process(target=follow, args=(root.path, uri))
    writers = fork.Process(target=write, args=(root.path, a.trials, a.seconds))
    collector.start()
    writers.start()
    rng = random.Random(0)
    for _ in range(a.kills):
        time.sleep(rng.uniform(0.2, 1.8) * a.seconds / max(a.kills, 1) / 2)
        os.kill(collector.pid, signal.SIGKILL)
        collector.join()
        collector = fork.Process(target=follow, args=(root.path, uri))
        collector.start()
    writers.join()
    time.sleep(10)
    os.kill(collector.pid, signal.SIGKILL)
    collector.join()
    collect.sync(root, uri=uri)
    seconds = sorted(lags(root, trials))
    p95 = seconds[int(0.95 * len(seconds))]
    print(f"{a.trials} trials, {a.seconds:g} s, {a.kills} kills, load {os.getloadavg()[0]:.1f}: {check(trials, uri)}, "
          f"lag p50 {statistics.median(seconds):.2f} s, p95 {p95:.2f} s over {len(seconds)} commits")  # fmt: skip


def direct(a: argparse.Namespace, root: Root, uri: str) -> None:
    """The same rows without spools: one client a thread, one log_batch a row, no retry beyond MLflow's own."""
    from mlflow.entities import Metric

    client, _ = store.connect(root, uri)
    experiment = client.create_experiment("direct", str(root.path))
    counts, slow, guard = {"sent": 0, "failed": 0}, [], threading.Lock()

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
            time.sleep(max(0.0, 1 - (time.monotonic() - begun)))

    threads = [threading.Thread(target=trial) for _ in range(a.trials)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    due = int(a.trials * a.seconds)
    print(f"direct, {a.trials} trials, {a.seconds:g} s: {counts} of {due} rows due; the trainer waits p50 "
          f"{statistics.median(slow):.2f} s, longest {max(slow):.1f} s a row")  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trials", type=int, default=200)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--kills", type=int, default=0)
    p.add_argument("--direct", action="store_true")
    a = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Root(Path(folder))
        (direct if a.direct else spooled)(a, root, f"sqlite:///{folder}/mlflow.db")


if __name__ == "__main__":
    main()
