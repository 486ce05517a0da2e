"""Write the end of an attempt.

In: why a rank ends. Out: attempts/NNNN.end.json. Imports no torch, so that a rank can record its
end while torch is imported.
"""

# pyright: standard

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from jepa_cluster.errors import ExitCode, TrialError
from jepa_cluster.training.watchdog import PhaseTimer, goodput
from jepa_cluster.trial import provenance, spool
from jepa_cluster.trial.directory import TrialDir


def close_record(
    trial: TrialDir,
    attempt: int,
    code: ExitCode,
    timer: PhaseTimer,
    step: int | None,
    cause: str = "",
    error: str = "",
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the end of an attempt to attempts/NNNN.end.json, unless another rank has."""
    with contextlib.suppress(OSError, TrialError):
        for newest in trial.committed()[-1:]:
            timer.mark_committed(newest)  # only rank 0 has seen the commit
        seconds = timer.report(ended=True)
        end: dict[str, Any] = {
            "ended": spool.now_ms(),
            "cause": cause or code.cause,
            "exit": int(code),
            "seconds": seconds,
            "goodput": goodput(seconds),
        }
        end |= facts or {}
        if step is not None:
            end["end_step"] = step
        if error:
            end["error"] = error[:2000]
            end["node"] = provenance.node_name()
        trial.end_attempt(attempt, end)
