"""Wanted against seen: what `submit` would do. Pure: no clock, no disk, no scheduler.

A trial's state (trial.layout's markers, the scheduler and the attempts have spoken already) decides its action.
Doing the plan and planning again leaves nothing to do, which is what makes `submit` idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

State = Literal["new", "queued", "cooling", "running", "interrupted", "stopped", "failed", "done", "unknown"]
Action = Literal["submit", "resume", "keep", "leave", "done"]
STATES: tuple[State, ...] = get_args(State)
ACTIVE: frozenset[State] = frozenset({"queued", "cooling", "running"})

_ACTIONS: Mapping[State, Action] = {
    "new": "submit",  # never tried
    "interrupted": "resume",  # tried, neither finished nor given up, and nobody works on it
    "queued": "keep",
    "cooling": "keep",  # requeued, and the scheduler lets it wait
    "running": "keep",
    "unknown": "keep",  # the scheduler does not answer: absence proves nothing
    "stopped": "leave",  # a person said so; `resume` takes it back
    "failed": "leave",  # another try cannot cure it; `retry` overrules
    "done": "done",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Names of trials by action, in the order they were wanted. dropped: active, but no longer asked for."""

    submit: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def start(self) -> tuple[str, ...]:
        """What would be handed to the scheduler."""
        return (*self.submit, *self.resume)

    def action(self, name: str) -> Action:
        actions = ("submit", "resume", "keep", "leave", "done")
        return next(a for a in actions if name in getattr(self, a))


def reconcile(wanted: Iterable[str], seen: Mapping[str, State]) -> Plan:
    """wanted: trial names. seen: the state of every trial that is wanted or was; one that is missing is new."""
    wanted = list(dict.fromkeys(wanted))
    by_action: dict[Action, list[str]] = {a: [] for a in get_args(Action)}
    for name in wanted:
        by_action[_ACTIONS[seen.get(name, "new")]].append(name)
    dropped = sorted(n for n, s in seen.items() if s in ACTIVE and n not in set(wanted))
    return Plan(**{a: tuple(names) for a, names in by_action.items()}, dropped=tuple(dropped))
