"""Stands in for the trainer behind the launcher's contract, `python -m jepa_cluster.launch.worker.main <trial>`.

What it does is in $STUB: words for the first attempt; every later attempt finishes. It writes what a trainer would.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

trial, rank, launch = Path(sys.argv[1]), int(os.environ["RANK"]), os.environ["JEPA_LAUNCH"]
others = [json.loads(p.read_text()) for p in (trial / "attempts").glob("*.json")]
first = all(record["launch"] == launch for record in others)
words = os.environ.get("STUB", "").split() if first else []
stop: list[int] = []
signal.signal(signal.SIGUSR2, lambda *_: stop.append(75))
signal.signal(signal.SIGTERM, lambda *_: stop.append(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
if rank == 0:
    number = len(list((trial / "attempts").glob("*.json"))) + 1
    record = {
        "attempt": number,
        "launch": launch,
        "started": int(time.time() * 1000),
        "world": int(os.environ["WORLD_SIZE"]),
    }
    half = trial / f"record.{launch}"
    half.write_text(json.dumps(record))
    half.rename(trial / "attempts" / f"{number:04d}.json")
    (trial / "seen.jsonl").open("a").write(
        json.dumps({"t": time.time(), "env": dict(os.environ), "cwd": str(Path.cwd())}) + "\n"
    )
if "wait" in words:
    while not stop:
        time.sleep(0.01)
    sys.exit(stop[0])
if "kill" in words and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if "kill" in words:
    time.sleep(0.2)
    raise ConnectionError("a peer is gone")
if "exit" in words:
    sys.exit(int(words[words.index("exit") + 1]))
time.sleep(0.1)
if rank == 0 and "stop_after" in words:
    (trial / "attempts" / f"{number:04d}.json").write_text(json.dumps({**record, "cause": "stopped", "exit": 0}))
elif rank == 0:
    (trial / "DONE.json").write_text(json.dumps({"step": 10, "t": 0, "metrics": {"probe/class_error": 0.25}}))
if rank == 0:
    (trial / "ended").write_text(str(time.time()))
sys.exit(0)
