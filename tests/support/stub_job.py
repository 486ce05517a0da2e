"""Replace the trainer: `python -m jepa_cluster.launch.worker.main <trial>`.

$STUB holds words for the first attempt; every later attempt finishes. It writes the files that a
trainer would.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

trial = Path(sys.argv[1])
rank = int(os.environ["RANK"])
launch = os.environ["JEPA_LAUNCH"]
others = [json.loads(p.read_text()) for p in (trial / "attempts").glob("[0-9][0-9][0-9][0-9].json")]
words: list[str] = []
if all(record["launch"] == launch for record in others):  # the first attempt
    words = os.environ.get("STUB", "").split()
stop: list[int] = []
signal.signal(signal.SIGUSR2, lambda *_: stop.append(75))
signal.signal(signal.SIGTERM, lambda *_: stop.append(75))
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2, signal.SIGTERM})
if "no_claim" in words and rank == 0:
    print("job: [Errno 122] Disk quota exceeded", file=sys.stderr)
    sys.exit(76)
if "no_claim" in words:
    time.sleep(600)  # for the claim of rank 0
if rank == 0:
    number = len(others) + 1
    file = trial / "attempts" / f"{number:04d}.json"
    record = {
        "attempt": number,
        "launch": launch,
        "started": int(time.time() * 1000),
        "world": int(os.environ["WORLD_SIZE"]),
    }
    half = trial / f"record.{launch}"
    half.write_text(json.dumps(record))
    half.rename(file)
    seen = {"t": time.time(), "env": dict(os.environ), "cwd": str(Path.cwd())}
    with (trial / "seen.jsonl").open("a") as log:
        log.write(json.dumps(seen) + "\n")
if "blocked" in words and rank == 0:
    time.sleep(600)
if "blocked" in words:
    sys.stdout.buffer.write(b"not UTF-8: \xff\n")
    sys.stdout.flush()
    sys.exit(1)
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
if rank == 0:
    if "stop_after" in words:
        record |= {"cause": "stopped", "exit": 0}
        file.write_text(json.dumps(record))
    else:
        done = {"step": 10, "t": 0, "metrics": {"probe/class_error": 0.25}}
        (trial / "DONE.json").write_text(json.dumps(done))
    (trial / "ended").write_text(str(time.time()))
sys.exit(0)
