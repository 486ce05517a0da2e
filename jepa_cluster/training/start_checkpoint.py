"""Find the checkpoint that an attempt begins from.

In: a trial, and the trunk that its config names. Out: the manifest of the newest checkpoint that
verifies, the same on every rank. This module loads nothing.
"""

# pyright: standard

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from jepa_cluster.config import TrialConfig
from jepa_cluster.errors import CheckpointError, JepaError
from jepa_cluster.ijepa import schedules
from jepa_cluster.training.checkpoint_files import Manifest
from jepa_cluster.training.distributed import World
from jepa_cluster.training.save_protocol import CheckpointSearch, SaveProtocol
from jepa_cluster.training.watchdog import print_stderr
from jepa_cluster.trial.directory import TrialDir
from jepa_cluster.trial.files import names_in


class Start(NamedTuple):
    """Where an attempt begins: at a checkpoint, of `trunk` unless that is None, or from nothing.

    faults: why newer checkpoints of the trial were set aside.
    """

    manifest: Manifest | None
    trunk: TrialDir | None
    faults: Sequence[str]


def find_start(
    topic: str,
    config: TrialConfig,
    world: World,
    trial: TrialDir,
    protocol: SaveProtocol,
) -> Start:
    """Every rank: the trial's newest valid checkpoint, else the trunk's newest valid milestone.

    Raises CheckpointError when the trial has only damaged checkpoints.
    """

    def same_recipe(manifest: Manifest) -> str:
        if manifest.recipe != config.id:
            raise CheckpointError(
                f"checkpoint of recipe {manifest.recipe}, this trial is {config.id}",
                where=str(trial.checkpoint(manifest.step)),
                hint="it was copied here by hand; move it away",
            )
        return ""

    search = CheckpointSearch(protocol, world.channel, trial.committed, same_recipe)
    manifest, faults = search.find(topic)
    if manifest is not None:
        return Start(manifest, None, faults)
    # Checkpoints that this attempt or an earlier one has set aside.
    damaged = world.channel.from_rank0(f"{topic}/damaged", lambda: quarantined(trial))
    if damaged:
        faults = faults or damaged
        raise CheckpointError(
            f"none of the {len(faults)} checkpoints verifies: {' | '.join(faults)}",
            where=str(trial.checkpoints),
            hint="restore one, or move checkpoints/ away to begin again from step 0",
        )
    if not config.runtime.fork_from:
        return Start(None, None, faults)

    # A branch is the trial it would be if trained from step 0: this saves work and changes no bit.
    # The trunk may be running: only its milestones are read, which it never removes.
    trunk = trial.root.trial(config.runtime.fork_from)

    def same_trunk(manifest: Manifest) -> str:
        same = trunk.name.endswith(f"-{manifest.recipe}")
        return "" if same else "another recipe"

    steps = functools.partial(fork_steps, trunk, config)
    search = CheckpointSearch(protocol, world.channel, steps, same_trunk, trunk.checkpoints)
    manifest, unusable = search.find(f"{topic}/fork")
    if world.env.is_rank0:
        for fault in unusable:
            print_stderr(f"fork: a checkpoint of {trunk.name} cannot be used: {fault}")
    return Start(manifest, trunk if manifest else None, faults)


def quarantined(trial: TrialDir) -> list[str]:
    """Return the names of checkpoints that did not verify."""
    return sorted(name for name in names_in(trial.checkpoints) if name.startswith("bad-step-"))


def fork_steps(trunk: TrialDir, config: TrialConfig) -> list[int]:
    """Return the trunk's milestones to fork at, oldest first.

    Empty when there is no such trial, or it is not the same up to the cooldown.
    """
    try:
        other = trunk.read_config()
    except JepaError:
        return []
    if replace(other.recipe, optim=config.recipe.optim) != config.recipe:
        return []
    last = schedules.shared_prefix_steps(other.recipe.optim, config.recipe.optim)
    return [step for step in trunk.committed() if step <= last and other.runtime.keeps(step)]
