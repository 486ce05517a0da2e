"""What `submit` does about each trial: wanted names and their states in, actions out. Pure.

The states come from the scheduler, the attempts and the trial directories. After the actions are
done, the same call returns nothing to start, so `submit` is idempotent.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace

from jepa_cluster.trial.status import IN_PROGRESS, RULES, Action, State


@dataclass(frozen=True)
class Actions:
    """What `submit` does about each wanted trial.

    by_name: in the order of the sweep. `wait` means not submitted, because Slurm accepts no more
    jobs of this user; submit again continues. dropped: trials that are active, but no longer
    wanted.
    """

    by_name: Mapping[str, Action] = field(default_factory=dict[str, Action])
    dropped: tuple[str, ...] = ()

    def trials(self, action: Action) -> list[str]:
        """Return the names of the trials with this action."""
        return [name for name, found in self.by_name.items() if found == action]

    @functools.cached_property
    def start(self) -> tuple[str, ...]:
        """Trials to hand to the scheduler."""
        return (*self.trials("submit"), *self.trials("resume"))

    def starts(self, name: str) -> bool:
        return self.by_name[name] in ("submit", "resume")

    def changed(self, names: Iterable[str], action: Action) -> Actions:
        """Return the actions with another one for these trials."""
        by_name = {**self.by_name, **dict.fromkeys(names, action)}
        return replace(self, by_name=by_name)

    def limited_to(self, submitted: Container[str]) -> Actions:
        """Return the actions with only these trials to start; the others wait."""
        waiting = [name for name in self.start if name not in submitted]
        return self.changed(waiting, "wait")


def reconcile(wanted: Iterable[str], seen: Mapping[str, State]) -> Actions:
    """Return what to do. seen: states of trials, also of former ones; a missing one is new."""
    by_name: dict[str, Action] = {}
    for name in wanted:
        state = seen.get(name, "new")
        by_name[name] = RULES[state].submit
    dropped: list[str] = []
    for name, state in seen.items():
        is_active = state in (*IN_PROGRESS, "unknown")
        if is_active and name not in by_name:
            dropped.append(name)
    return Actions(by_name, tuple(sorted(dropped)))
