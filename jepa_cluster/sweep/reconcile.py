"""What `submit` does about each trial: wanted names and their states in, actions out. Pure.

The states come from the scheduler, the attempts and the trial directories. After the actions are
done, the same call returns nothing to start, so `submit` is idempotent.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import get_args

from jepa_cluster.trial.status import IN_PROGRESS, RULES, Action, State


@dataclass(frozen=True)
class Actions:
    """Names of trials by action, in the order of the sweep.

    wait: not submitted, because Slurm accepts no more jobs of this user; submit again continues.
    dropped: active, but no longer wanted.
    """

    submit: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    wait: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @functools.cached_property
    def start(self) -> tuple[str, ...]:
        """Trials to hand to the scheduler."""
        return (*self.submit, *self.resume)

    def limited_to(self, submitted: Container[str]) -> Actions:
        """Return the actions with only these trials to start; the others wait."""
        waiting = [name for name in self.start if name not in submitted]
        return replace(
            self,
            submit=tuple(name for name in self.submit if name in submitted),
            resume=tuple(name for name in self.resume if name in submitted),
            wait=tuple(waiting),
        )

    def starts(self, name: str) -> bool:
        return self._by_name.get(name) in ("submit", "resume")

    def action(self, name: str) -> Action:
        """Return the action for a wanted trial."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Action]:
        found: dict[str, Action] = {}
        for action in reversed(get_args(Action)):  # a stopped trial that is resumed starts
            found |= dict.fromkeys(getattr(self, action), action)
        return found


def reconcile(wanted: Iterable[str], seen: Mapping[str, State]) -> Actions:
    """Return what to do. seen: states of trials, also of former ones; a missing one is new."""
    names = dict.fromkeys(wanted)
    by_action: dict[Action, list[str]] = {action: [] for action in get_args(Action)}
    for name in names:
        state = seen.get(name, "new")
        by_action[RULES[state].submit].append(name)
    active = {name for name, state in seen.items() if state in (*IN_PROGRESS, "unknown")}
    return Actions(
        submit=tuple(by_action["submit"]),
        resume=tuple(by_action["resume"]),
        keep=tuple(by_action["keep"]),
        leave=tuple(by_action["leave"]),
        done=tuple(by_action["done"]),
        dropped=tuple(sorted(active - names.keys())),
    )
