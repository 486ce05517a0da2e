"""Read a time limit in our own form or in any form of Slurm. Pure."""

from __future__ import annotations

import re

_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?")
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d+(?::\d+){0,2})")
TIME_FORMS = "30m, 8h or 1d12h, or a time of Slurm such as 1-12:00:00"


def parse_minutes(text: object) -> int | None:
    """Return the minutes of '8h', '1d12h' or a time of Slurm; None for anything else, and for 0.

    Slurm takes M, M:S, H:M:S, D-H, D-H:M and D-H:M:S. Seconds count as a part of a minute.
    """
    if type(text) not in (str, int):
        return None
    short = str(text).replace(" ", "")
    match = _TIME.fullmatch(short)
    if match:
        days, hours, minutes = map(int, match.groups(default=0))
        total = days * 1440 + hours * 60 + minutes
        return total or None
    match = _SLURM_TIME.fullmatch(short)
    if not match:
        return None
    parts = [int(part) for part in match[2].split(":")]
    if not match[1] and len(parts) < 3:  # M or M:S
        parts.insert(0, 0)
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = hours * 60 + minutes
    if match[1]:
        total += int(match[1]) * 1440
    if seconds:
        total += 1
    return total or None
