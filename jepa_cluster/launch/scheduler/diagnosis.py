"""Explain the state of a trial: what `jepa why` shows. Derived from attempts, markers and logs.

In: a root and a row of the status document. Out: a document. It changes nothing and stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from jepa_cluster.launch.scheduler import array_records
from jepa_cluster.records import AttemptRecord, SweepArray
from jepa_cluster.trial import file_facts
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.failures import Failure, classify_attempt
from jepa_cluster.trial.files import read_json

LOG_LINES = 12  # last lines of a log that are shown
LOG_BYTES = 16_384  # at the end of a log that are read
ENDED_STATES = ("failed", "interrupted", "stopped", "queued", "requeued")
# Of an attempt's record, that are shown as they are
ATTEMPT_KEYS = (
    "attempt",
    "kind",
    "host",
    "start_step",
    "end_step",
    "cause",
    "exit",
    "error",
    "excluded",
)
SHORT_CAUSES = ("done", "preempted", "stopped")  # the log has nothing to add to them


def explain_trial(
    root: Root, sweep: str, row: Mapping[str, Any], arrays: Sequence[SweepArray]
) -> dict[str, Any]:
    """Return the row with cause, evidence, last log lines, the rule that applies, and a hint.

    arrays: all that Slurm accepted, oldest first.
    """
    if row.get("canary"):
        return _explain_held_trial(root, sweep, row)
    trial, state = root.trial(row["name"]), row["state"]
    attempts = trial.attempts_and_bad_starts()
    newest = attempts[-1]["attempt"] if attempts else 0
    log = log_tail(root, trial, newest)
    if not newest:
        log = _job_output(root, arrays, trial.name)
    failure = _last_failure(trial, attempts, log, row)
    if state == "stopped":  # whatever ended its last attempt
        failure = Failure("stopped", row["note"])
    tries = [_attempt_row(attempt) for attempt in attempts]
    hint = _hint(sweep, row, failure)
    has_ended = attempts or log or trial.failed.exists() or state == "stopped"
    if not has_ended or state not in ENDED_STATES:
        return {**row, **_no_failure(row["note"]), "tries": tries, "hint": hint}
    last: Mapping[str, Any] = attempts[-1] if attempts else {}
    return {
        **row,
        "cause": failure.cause,
        "means": failure.summary,
        "evidence": failure.evidence,
        "rule": _rule(failure, state, last),
        "tries": tries,
        "log": [] if failure.cause in SHORT_CAUSES else log,
        "hint": hint,
    }


def _explain_held_trial(root: Root, sweep: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Explain a trial that waits for its canary by what became of the canary."""
    document = {**row, **_no_failure(row["note"]), "tries": [], "hint": f"jepa watch {sweep}"}
    if not row["note"].startswith("held"):
        return document
    canary = root.trial(str(row["canary"]))
    log = log_tail(root, canary, canary.newest_attempt())
    failure = _last_failure(canary, canary.attempts_and_bad_starts(), log, {})
    without = f"without a canary: jepa cancel {sweep}, jepa resume {sweep}"
    return {
        **document,
        "cause": f"its canary: {failure.cause}",
        "evidence": failure.evidence,
        "rule": "held until a canary of its class succeeds",
        "log": log,
        "hint": f"repair the cause, then jepa retry {sweep}; {without}",
    }


def _no_failure(note: str) -> dict[str, Any]:
    return {"cause": "", "means": note, "evidence": "", "rule": "", "log": []}


def _last_failure(
    trial: TrialDir,
    attempts: list[AttemptRecord],
    log: list[str],
    row: Mapping[str, Any],
) -> Failure:
    """Return why the newest attempt ended. FAILED.json overrides its record.

    row: its cause is that of a retry budget that is used up, before FAILED.json says so.
    """
    record: dict[str, Any] = {**attempts[-1]} if attempts else {}
    marker = read_json(trial.failed) or {"cause": row.get("cause", ""), "error": row.get("note")}
    if marker["cause"]:
        record |= {"cause": marker.get("cause"), "error": marker.get("error")}
    if not attempts and log and marker["cause"] in ("", "not_started"):
        return Failure("not_started", log[-1])
    return classify_attempt(record, row.get("slurm_state", ""), "\n".join(log))


def log_tail(root: Root, trial: TrialDir, attempt: int) -> list[str]:
    """Return the end of the first log with a traceback, else of the first that is not empty.

    Those of the attempt come before those of the local queue, and rank 0 before the others.
    """
    chosen = ""
    for folder in (trial.logs(attempt), root.local / "logs" / trial.name):
        paths = (sorted(folder.glob(pattern)) for pattern in ("*.err", "*.out", "*.log"))
        for path in chain.from_iterable(paths):
            text = _read_end(path)
            if "Traceback" in text:
                return _last_lines(text)
            chosen = chosen or text.strip()
    return _last_lines(chosen)


def _job_output(root: Root, arrays: Iterable[SweepArray], trial: str) -> list[str]:
    """Return the last lines that the newest Slurm job of a trial printed, and its rank 0."""
    of_trial = array_records.arrays_of(arrays, {trial})
    if not of_trial:
        return []
    newest = of_trial[-1]
    log = file_facts.job_output(root.sweep(newest["sweep"]), newest, trial)
    logs = (log, *sorted(log.with_suffix("").glob("*_0_log.*")))
    return _last_lines("\n".join(_read_end(path) for path in logs if path.exists()))


def _last_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][-LOG_LINES:]


def _read_end(path: Path) -> str:
    with path.open("rb") as f:
        f.seek(max(0, f.seek(0, 2) - LOG_BYTES))
        return f.read().decode(errors="replace")


def _hint(sweep: str, row: Mapping[str, Any], failure: Failure) -> str:
    """Return what to type next."""
    trial = f"{sweep} {row['index']}"
    if row.get("held"):
        return row["note"].rpartition(": ")[2]
    match row["state"]:
        case "done":
            return f"jepa scaling {sweep}"
        case "running":
            return f"jepa logs -f {trial}"
        case "failed":
            hint = failure.rule.hint or "jepa retry"
            return hint.replace("jepa retry", f"jepa retry {trial}")
        case "stopped":
            return f"jepa resume {trial}"
        case "unknown":
            return "jepa status again when Slurm answers"
        case "new" | "interrupted":
            return f"jepa submit {sweep}"
        case _:
            return f"jepa watch {sweep}"


def _rule(failure: Failure, state: str, last: Mapping[str, Any]) -> str:
    """Return what the rule of the failure says about another attempt. last: newest attempt."""
    rule = failure.rule
    if rule.retry and state == "failed":
        return f"retries.{rule.budget} is used up"
    if state == "stopped":
        return "stays stopped until jepa resume"
    if not rule.retry:
        return "not run again by itself"
    text = "runs again, free of charge"
    if rule.budget:
        text = f"runs again within retries.{rule.budget}"
    if last.get("excluded"):
        text += f", without {', '.join(last['excluded'])}"
    if last.get("exclude_refused"):
        text += f"; could not exclude {last['exclude_refused']}"
    return text


def _attempt_row(attempt: AttemptRecord) -> dict[str, Any]:
    started, ended = attempt.get("started"), attempt.get("ended")
    job = attempt.get("job")
    if "array_task_id" in attempt:  # the id of the task's own job changes with each requeue
        job = f"{attempt.get('array_job_id')}_{attempt['array_task_id']}"
    return {
        **{key: attempt.get(key) for key in ATTEMPT_KEYS},
        "job": job or "",
        "minutes": (ended - started) / 60_000 if started and ended else None,
    }
