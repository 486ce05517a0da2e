"""Why an attempt ended, and what happens next: one table, used by the local queue, by `why` and by `retry`.

In: what is known of an attempt's end (its record, exit code, the scheduler's word, the last log lines). Out: a
`Failure` and its rule. Pure. It starts and stops nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from jepa_cluster.errors import ExitCode

Cause = Literal[
    "done", "preempted", "stopped", "fenced", "timeout", "node", "hang", "lost", "killed", "gpu_oom", "host_oom",
    "diverged", "config", "error", "infrastructure", "unknown",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """again: run it again. budget: the name in the sweep's `retries`, "" for free of charge. elsewhere: not there."""

    means: str
    again: bool
    budget: str = ""
    now: str = ""
    elsewhere: bool = False


RULES: Mapping[Cause, Rule] = {
    "done": Rule("it finished", False),
    "preempted": Rule("it saved a checkpoint and made room", True),
    "stopped": Rule("somebody asked it to stop", False, now="jepa resume"),
    "fenced": Rule("a newer attempt owns the trial", False),
    "timeout": Rule("the time limit came before a checkpoint was saved", True, "timeout", "ask for more time"),
    "node": Rule("its node went away, or said that it is broken", True, "node", "jepa nodes", elsewhere=True),
    "hang": Rule("a step did not end and the watchdog gave up", True, "hang", "jepa logs: the stacks", elsewhere=True),
    "killed": Rule("a process was killed from outside", True, "killed"),
    "lost": Rule("a rank lost the others: one of them, or its node, went away", True, "killed"),
    "gpu_oom": Rule("the GPU's memory was full", True, "oom", "jepa retry (with half the micro-batch)"),
    "host_oom": Rule("the machine's memory was full", False, "oom", "lower runtime.workers, then jepa retry"),
    "diverged": Rule(
        "the training diverged or collapsed",
        False,
        "error",
        "lower optim.lr or set optim.clip: that is another trial",
    ),
    "config": Rule("it cannot run as configured", False, "error", "mend what the error says, then jepa retry"),
    "error": Rule("the program raised an error", False, "error", "mend it, submit again, then jepa retry"),
    "infrastructure": Rule("the cluster or its filesystem failed", True, "node", elsewhere=True),
    "unknown": Rule("nobody recorded why", True, "killed"),
}

_CODES: Mapping[int, Cause] = {int(code): cast(Cause, code.cause) for code in ExitCode}
_SLURM: Mapping[str, Cause] = {
    "TIMEOUT": "timeout",
    "NODE_FAIL": "node",
    "OUT_OF_MEMORY": "host_oom",
    "PREEMPTED": "killed",
    "BOOT_FAIL": "infrastructure",
    "DEADLINE": "timeout",
}
_SIGNS: tuple[tuple[str, Cause], ...] = (
    (r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|torch\.(cuda\.)?OutOfMemoryError", "gpu_oom"),
    (r"\bMemoryError\b|Cannot allocate memory|oom-kill|Out of memory: Killed", "host_oom"),
    (r"DataLoader worker .* killed by signal: Killed", "host_oom"),
    (r"non-?finite|loss is nan|diverged", "diverged"),
    (r"NCCL error.*(unhandled system|remote process)|uncorrectable ECC|GPU has fallen off|Xid", "node"),
    (r"ModuleNotFoundError|ImportError|No space left|Stale file handle|Input/output error", "infrastructure"),
)


@dataclass(frozen=True)
class Failure:
    """cause: a key of RULES. evidence: the fact that decided it, for a person."""

    cause: Cause
    evidence: str

    @property
    def rule(self) -> Rule:
        return RULES[self.cause]

    @property
    def means(self) -> str:
        """For a person. A preempted trial may have had no time for a checkpoint of its own."""
        late = re.search(r"left with the commit of step \d+", self.evidence) if self.cause == "preempted" else None
        return f"it made room, but {late[0]}: what came after is trained again" if late else self.rule.means


def classify_exit_codes(codes: list[int]) -> Failure:
    """Exit codes of an attempt's ranks in the order they ended (negative: by that signal) -> what ended it.

    A clean word of any rank outweighs the noise that its end makes among the others; else the first end counts,
    a killed rank before one that complained of it in the same moment.
    """
    for code in (ExitCode.CONFIG, ExitCode.FENCED, ExitCode.STOPPED, ExitCode.PREEMPTED):
        if int(code) in codes:
            return Failure(_CODES[code], f"exit code {int(code)}")
    signals = [c for c in codes if c < 0]
    first = next((c for c in codes if c), 0)
    if signals and first != ExitCode.ERROR:  # a lost peer ends a rank as a hang does
        return Failure("killed", f"a rank was ended by signal {-signals[0]}")
    if first == 0:
        return Failure("done", "every rank ended with 0")
    return Failure(_CODES.get(first, "unknown"), f"exit code {first}")


def classify_attempt(record: Mapping[str, Any], state: str = "", log: str = "") -> Failure:
    """An attempt's record, Slurm's word for its job (may be empty), the tail of its logs -> why it ended."""
    cause = record.get("cause")
    said = f"{record.get('error') or ''}\n{log}"
    if cause in ("error", None, "killed", "lost"):
        for pattern, found in _SIGNS:
            hit = re.search(pattern, said, re.IGNORECASE)
            if hit and (cause != "error" or found != "infrastructure"):
                line = next((x for x in said.splitlines() if hit[0] in x), hit[0])
                return Failure(found, line.strip()[:200])
    if cause in get_args(Cause):
        return Failure(cast(Cause, cause), str(record.get("error") or f"attempt {record.get('attempt')} recorded it"))
    word = state.split(" ")[0]
    if word in _SLURM:
        return Failure(_SLURM[word], f"Slurm says {state}")
    if word == "CANCELLED":
        return Failure("stopped", f"Slurm says {state}")
    return Failure("unknown", f"the attempt's record has no end{f'; Slurm says {state}' if state else ''}")
