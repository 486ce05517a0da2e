"""What `submit` does about each trial: wanted names and their states in, actions out. Pure.

The states come from the scheduler, the attempts and the trial directories. After the actions are
done, the same call returns nothing to start, so `submit` is idempotent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

from jepa_cluster.trial.status import IN_PROGRESS, RULES, Action, State


@dataclass(frozen=True)
class Actions:
    """Names of trials by action, in the order of the sweep.

    dropped: active, but no longer wanted.
    """

    submit: tuple[str, ...] = ()
    resume: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    @property
    def start(self) -> tuple[str, ...]:
        """Trials to hand to the scheduler."""
        return (*self.submit, *self.resume)

    def action(self, name: str) -> Action:
        """Return the action for a wanted trial."""
        for action in get_args(Action):
            if name in getattr(self, action):
                return action
        raise KeyError(name)


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
