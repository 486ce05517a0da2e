"""Why an attempt ended, and what happens next: one table for the local queue, `why` and `retry`.

In: what is known of an attempt's end (its record, exit codes, Slurm's word, the last log lines).
Out: a `Failure` with its rule, or the retry budget that is used up. It reads no file and starts
nothing.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from jepa_cluster.errors import ExitCode
from jepa_cluster.records import AttemptRecord

Cause = Literal[
    "done", "preempted", "stopped", "fenced", "timeout", "node", "hang", "lost", "killed",
    "gpu_oom", "host_oom", "diverged", "config", "error", "infrastructure", "unknown",
    "not_started",
]  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """What a cause means, and whether the trial runs again.

    budget: the name in the sweep's `retries`; '' is free of charge. hint: what to type next.
    exclude_node: the node may be at fault, so the next job excludes it.
    """

    summary: str
    retry: bool = False
    budget: str = ""
    hint: str = ""
    exclude_node: bool = False


RULES: Mapping[Cause, Rule] = {
    "done": Rule("it finished"),
    "preempted": Rule("preempted after saving a checkpoint", retry=True),
    "stopped": Rule("stopped on request", hint="jepa resume"),
    "fenced": Rule("a newer attempt owns the trial"),
    "timeout": Rule(
        "the time limit came before a checkpoint was saved",
        retry=True,
        budget="timeout",
        hint="ask for more time",
    ),
    "node": Rule(
        "the node failed or reported a hardware error",
        retry=True,
        budget="node",
        hint="jepa nodes",
        exclude_node=True,
    ),
    "hang": Rule(
        "a step did not end and the watchdog ended the attempt",
        retry=True,
        budget="hang",
        hint="jepa logs: the stacks",
        exclude_node=True,
    ),
    "killed": Rule("another process killed a rank", retry=True, budget="killed"),
    "lost": Rule(
        "a rank lost the others: one of them, or its node, failed", retry=True, budget="killed"
    ),
    "gpu_oom": Rule(
        "the GPU's memory was full",
        retry=True,
        budget="oom",
        hint="jepa retry (with half the micro-batch, where that is possible), or more ranks",
    ),
    "host_oom": Rule(
        "the machine's memory was full",
        budget="oom",
        hint="lower runtime.workers, then jepa retry",
    ),
    "diverged": Rule(
        "the training diverged or collapsed",
        budget="error",
        hint="lower optim.lr or set optim.clip: that is another trial",
    ),
    "config": Rule(
        "it cannot run as configured",
        budget="error",
        hint="correct what the error names, then jepa retry",
    ),
    "error": Rule(
        "the program raised an error",
        budget="error",
        hint="correct it, submit again, then jepa retry",
    ),
    "infrastructure": Rule(
        "the cluster or its filesystem failed",
        retry=True,
        budget="node",
        exclude_node=True,
    ),
    "not_started": Rule(
        "its job ended before Python could begin an attempt",
        retry=True,
        budget="start",
        hint="correct python or setup in the profile (jepa doctor --node), then jepa retry",
    ),
    "unknown": Rule("no cause was recorded", retry=True, budget="killed"),
}

_EXIT_CODES: Mapping[int, Cause] = {int(code): cast(Cause, code.cause) for code in ExitCode}
_SLURM_STATES: Mapping[str, Cause] = {
    "TIMEOUT": "timeout",
    "NODE_FAIL": "node",
    "OUT_OF_MEMORY": "host_oom",
    "PREEMPTED": "preempted",
    "REQUEUED": "preempted",
    "BOOT_FAIL": "infrastructure",
    "DEADLINE": "timeout",
    "CANCELLED by": "stopped",  # slurmctld cancels too, without "by", when it has lost a job
}
ILLEGAL_ACCESS = "an illegal memory access"  # of a broken GPU, or of the user's code
ON_OTHER_NODE = "the same on node"  # what `apply_retry` adds to its error
LOG_PATTERNS: Sequence[tuple[str, Cause]] = (
    (r"CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|torch\.(cuda\.)?OutOfMemoryError", "gpu_oom"),
    (r"\bMemoryError\b|Cannot allocate memory|oom-kill|Out of memory: Killed", "host_oom"),
    (r"DataLoader worker .* killed by signal: Killed", "host_oom"),
    (r"non-?finite|loss is nan|diverged", "diverged"),
    (rf"{ILLEGAL_ACCESS}.*{ON_OTHER_NODE}", "error"),
    (
        rf"NCCL error.*(unhandled system|remote process)|uncorrectable ECC|GPU has fallen off|Xid"
        rf"|{ILLEGAL_ACCESS}|unspecified launch failure|device\(s\) is/are busy or unavailable"
        r"|CUDA error: initialization error|system not yet initialized"
        r"|CUBLAS_STATUS_NOT_INITIALIZED|no CUDA-capable device|CUDA driver initialization failed",
        "node",
    ),
    (
        r"ModuleNotFoundError|ImportError|No space left|Stale file handle|Input/output error",
        "infrastructure",
    ),
)


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended. evidence: the fact that decided it, for the user."""

    cause: Cause
    evidence: str

    @property
    def rule(self) -> Rule:
        return RULES[self.cause]

    @property
    def summary(self) -> str:
        """The rule's summary; a preempted attempt may have had no time to save a checkpoint."""
        if self.cause == "preempted" and self.evidence.startswith("Slurm says"):
            return "preempted before a checkpoint was saved"
        late = re.search(r"left with the commit of step \d+", self.evidence)
        if late and self.cause == "preempted":
            return f"preempted, but {late[0]}: what came after is trained again"
        return self.rule.summary


def classify_exit_codes(codes: Sequence[int]) -> Failure:
    """Return why an attempt ended by the exit codes of its ranks, in the order of their ends.

    A code is negative when a signal ended the rank. A deliberate exit of any rank decides, because
    it makes the other ranks fail. Otherwise the first rank to end decides, and a killed rank comes
    before one that complained of it.
    """
    for code in (ExitCode.CONFIG, ExitCode.FENCED, ExitCode.STOPPED, ExitCode.PREEMPTED):
        if code in codes:
            return Failure(_EXIT_CODES[code], f"exit code {int(code)}")
    first = next((code for code in codes if code), 0)
    signal = -next((code for code in codes if code < 0), 0)
    if signal and first != ExitCode.ERROR:  # a lost peer ends a rank as a hang does
        return Failure("killed", f"signal {signal} ended a rank")
    if first == 0:
        return Failure("done", "every rank ended with 0")
    return Failure(_EXIT_CODES.get(first, "unknown"), f"exit code {first}")


def classify_attempt(record: Mapping[str, Any], slurm_state: str = "", log: str = "") -> Failure:
    """Return why an attempt ended.

    The cause that the attempt recorded counts first, then patterns in its error and its log, then
    Slurm's state of its job. An error or a loss is looked up in the patterns, which say more.
    """
    cause = record.get("cause")
    if cause in (None, "error", "killed", "lost"):
        text = f"{record.get('error') or ''}\n{log}"
        failure = _match_log(text, by_exception=cause == "error")
        if failure:
            return failure
    if cause in get_args(Cause):
        recorded = record.get("error") or f"attempt {record.get('attempt')} recorded it"
        return Failure(cast(Cause, cause), str(recorded))
    for word, found in _SLURM_STATES.items():
        if slurm_state.startswith(word):
            return Failure(found, f"Slurm says {slurm_state}")
    evidence = "the attempt's record has no end"
    if slurm_state:
        evidence += f"; Slurm says {slurm_state}"
    return Failure("unknown", evidence)


def _match_log(text: str, by_exception: bool) -> Failure | None:
    """Return the failure of the first pattern that matches, with the line where it does.

    by_exception: an exception ended the attempt, so a missing module is the user's error.
    """
    for pattern, cause in LOG_PATTERNS:
        match = re.search(pattern, text, re.IGNORECASE)
        if match and not (by_exception and cause == "infrastructure"):
            lines = (line for line in text.splitlines() if match[0] in line)
            return Failure(cause, next(lines, match[0]).strip()[:200])
    return None


def budget_of(attempt: Mapping[str, Any], failure: Failure) -> str:
    """Return the retry budget in which an attempt counts; '' is free of charge.

    A full GPU memory is free while no step is done and the micro-batch could be halved.
    """
    start = attempt.get("start_step")
    could_halve = failure.cause == "gpu_oom" and "halved" in attempt
    is_free = could_halve and start is not None and start == attempt.get("end_step")
    return "" if is_free else failure.rule.budget


def exhausted_budget(
    attempts: Sequence[AttemptRecord],
    retries: Mapping[str, int],
    slurm_state: str = "",
    newest_ended: bool = True,
) -> tuple[str, Cause]:
    """Return why the trial may not run again, and the cause of its last failure.

    Returns ('', ...) while the budget of that failure allows another attempt. Attempts up to the
    last `jepa retry` or `jepa resume` do not count, nor those whose job Slurm itself requeued.
    slurm_state: of the newest attempt's job. newest_ended: count the newest attempt even if its
    record has no end.
    """
    used: Counter[str] = Counter()
    budget, cause = "", cast(Cause, "unknown")
    for attempt, follower in itertools.zip_longest(attempts, attempts[1:]):
        has_ended = "ended" in attempt or newest_ended
        if follower and ("ended" not in attempt or "slurm_state" in attempt):
            job = attempt.get("job_id")
            has_ended = not job or job != follower.get("job_id")
        if attempt.get("forgiven"):
            used.clear()
            budget = ""
        elif has_ended:
            failure = classify_attempt(attempt, "" if follower else slurm_state)
            budget, cause = budget_of(attempt, failure), failure.cause
            used[budget] += 1
    if not budget or used[budget] <= retries.get(budget, used[budget]):
        return "", cause
    return f"{cause} {used[budget]} times, retries.{budget} allows {retries[budget]}", cause
