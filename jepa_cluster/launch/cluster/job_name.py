"""Names of Slurm jobs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class JobName:
    """The name of a Slurm job: `jepa.SWEEP.CLASS.UNIQUE`.

    The unique part finds a job whose id was lost.
    """

    sweep: str
    letter: str
    unique: str

    def __str__(self) -> str:
        return f"jepa.{self.sweep}.{self.letter}.{self.unique}"

    @classmethod
    def new(cls, sweep: str, letter: str) -> JobName:
        return cls(sweep, letter, uuid.uuid4().hex[:8])

    @classmethod
    def parse(cls, name: str) -> JobName | None:
        """Return the parts of a name; None for a job that is none of ours."""
        match = re.fullmatch(r"jepa\.(.+)\.([^.]+)\.([0-9a-f]{8})", name)
        return cls(*match.groups()) if match else None

    @classmethod
    def of_this_job(cls, env: Mapping[str, str]) -> JobName | None:
        """Return the name of the Slurm job that runs this process."""
        return cls.parse(env.get("SLURM_JOB_NAME", ""))
