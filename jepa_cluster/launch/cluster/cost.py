"""Estimate the hours of trials: measured where the model has run in the same shape, else by FLOPs.

In: resolved trials, the profile's peak and MFU, and the attempts below the root. Out: a
`CostEstimate` per trial. Masks are sampled to count tokens (numpy); nothing else is computed.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from jepa_cluster.config import Mask, Recipe, TrialConfig
from jepa_cluster.errors import JepaError, plural
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.records import AttemptRecord, CanaryRequest
from jepa_cluster.results import student
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.usage import modified

MASK_SAMPLES = 64  # masks that are sampled to count tokens
LOOK_BACK = 12  # newest trials of a model that are read for their speed
FLOPS_SPREAD = 0.3  # relative error of an estimate by FLOPs
LEAST_SPREAD = 0.05  # relative error of a measured estimate, at least
START_SECONDS = {"local": 5.0, "slurm": 60.0}  # from a job's start to its first step, unmeasured
WEIGHT_AND_MOMENTS, TARGET_WEIGHT = 12, 4  # bytes per parameter in a checkpoint
STEP_PHASES = ("train", "data", "checkpoint", "lost")  # of an attempt, that grow with its steps


@dataclass(frozen=True)
class CostEstimate:
    """hours: wall time of one trial. spread: error of the hours.

    save_seconds: the longest save of trials like it, 0 if none was measured.
    """

    hours: float
    spread: float
    basis: str
    save_seconds: float = 0.0


class Shape(NamedTuple):
    """Trials of one shape have one speed. image: side in pixels. world: processes."""

    model: str
    image: int
    world: int


class MeasuredSpeed(NamedTuple):
    """The speed of a trial.

    flops: per second while it steps. start: seconds from an attempt's start to its first step.
    probe: seconds per probe.
    """

    flops: float
    start: float
    probe: float

    def seconds(self, flops: float, probes: int) -> float:
        """Return the wall time of this much work in one attempt."""
        return flops / self.flops + self.start + probes * self.probe


def estimate_costs(
    root: Root, profile: Profile, trials: Iterable[Trial]
) -> dict[str, CostEstimate]:
    """Return the cost of each trial by name, from its first step to its last."""
    trials = list(trials)
    models = {trial.config.recipe.model.name for trial in trials}
    measured, saves = _measurements(root, models)
    estimates: dict[str, CostEstimate] = {}
    for trial in trials:
        config, shape = trial.config, _shape(trial.config)
        flops = total_flops(config.recipe) * own_step_fraction(root, trial)
        probes = _probe_count(config, trial.begins, config.recipe.optim.steps or 0)
        speeds = measured.get(shape)
        if speeds:
            seconds = [speed.seconds(flops, probes) for speed in speeds]
            spread = max(_relative_error(seconds), LEAST_SPREAD)
            basis = f"measured, {plural(len(seconds), 'trial')}"
        else:
            seconds = [_assumed_speed(profile, config.recipe, shape.world).seconds(flops, probes)]
            spread = FLOPS_SPREAD
            basis = f"FLOPs at {profile.mfu:.0%} MFU"
        hours = fmean(seconds) / 3600
        estimates[trial.name] = CostEstimate(hours, hours * spread, basis, saves.get(shape, 0.0))
    return estimates


def checkpoint_bytes(recipe: Recipe) -> int:
    """Return the size of one checkpoint: fp32 weights, their two moments, the target encoder."""
    from jepa_cluster.ijepa.flops import parameters

    count = parameters(recipe)
    return WEIGHT_AND_MOMENTS * (count.encoder + count.predictor) + TARGET_WEIGHT * count.encoder


def kept_checkpoints(trial: Trial) -> int:
    """Return the most checkpoints that a trial keeps: its newest ones and its milestones."""
    runtime, steps = trial.config.runtime, trial.config.recipe.optim.steps or 0
    kept = runtime.keep_checkpoints + len(runtime.milestones)
    if runtime.milestone_every:
        kept += (steps - trial.begins) // runtime.milestone_every
    return kept


def own_step_fraction(root: Root, trial: Trial) -> float:
    """Return the fraction of its steps that a trial trains itself.

    A branch trains its cooldown alone, unless its trunk passed the step and kept no checkpoint.
    """
    if trial.trunk:
        trunk = root.trial(trial.trunk)
        passed = trunk.done.exists() or max(trunk.committed(), default=0) > trial.begins
        if passed and not trunk.checkpoint(trial.begins).exists():
            return 1.0
    steps = trial.config.recipe.optim.steps or 1
    return (steps - trial.begins) / steps


def total_flops(recipe: Recipe) -> float:
    """Return the FLOPs of the whole training, with token counts of sampled masks."""
    from jepa_cluster.ijepa.flops import step_flops

    context, targets = _token_counts(recipe.mask, recipe.model.grid)
    images = recipe.optim.batch * (recipe.optim.steps or 0)
    return step_flops(recipe, context, targets).total * images


def measured_hours(trial: TrialDir) -> float | None:
    """Return the wall time of the whole trial at its measured speed; None without a measurement."""
    config = trial.read_config(older=True)
    attempts = _trained(trial.attempts())
    if not attempts:
        return None
    probes = _probe_count(config, 0, config.recipe.optim.steps or 0)
    return _speed(config, attempts).seconds(total_flops(config.recipe), probes) / 3600


def budget_problem(expected: CanaryRequest, hours: float) -> str:
    """Return why the class of a canary may not start, else ''. hours: of one trial, as measured."""
    limit, planned = expected["limit"], expected["hours"]
    if limit is None or not planned:
        return ""
    cost = expected["others"] + expected["cost"] * hours / planned
    if cost <= limit:
        return ""
    return (
        f"a trial takes {hours:.3g} h, not {planned:.3g} h: the sweep would cost "
        f"{cost:,.3g} {expected['unit']}, more than its limit of {limit:,g}"
    )


# ---- speed


def _assumed_speed(profile: Profile, recipe: Recipe, world: int) -> MeasuredSpeed:
    """Return the speed by the profile's peak and MFU.

    A probe encodes all its images once, and its test images twice more with masks.
    """
    from jepa_cluster.ijepa.flops import encoder_flops

    rate = profile.peak_tflops * 1e12 * profile.mfu * world
    probe = encoder_flops(recipe) * (recipe.probe.images + 3 * recipe.probe.test_images)
    start = profile.start_seconds
    if start is None:
        start = START_SECONDS[profile.kind]
    return MeasuredSpeed(rate, start, probe / rate)


def longest_save(root: Root) -> tuple[float, str]:
    """Return the seconds of the longest save of the newest trials, and its trial; (0, '')."""
    longest = 0.0, ""
    for folder in _newest_first(root.trials.glob("[!.]*"))[:LOOK_BACK]:
        for attempt in TrialDir(folder).attempts():
            longest = max(longest, (attempt.get("save_seconds", 0.0), folder.name))
    return longest


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    return sorted(folders, key=lambda path: modified(path / "attempts"), reverse=True)


def _measurements(
    root: Root, models: set[str]
) -> tuple[dict[Shape, list[MeasuredSpeed]], dict[Shape, float]]:
    """Return speeds and longest saves of the newest trials and canaries of these models, by shape.

    An attempt that has not ended has saves, but no speed.
    """
    found: dict[Shape, list[MeasuredSpeed]] = {}
    saves: dict[Shape, float] = {}
    read: Counter[str] = Counter()
    folders: dict[Path, str] = {}
    for folder in (*root.trials.glob("[!.]*"), *root.canaries.glob("canary.*")):
        model = _model(folder.name, models)
        if model:
            folders[folder] = model
    for folder in _newest_first(folders):
        trial, model = TrialDir(folder), folders[folder]
        if read[model] >= LOOK_BACK or not trial.newest_attempt():
            continue
        try:
            config = trial.read_config(older=True)
            attempts = trial.attempts()
        except JepaError:
            continue
        read[model] += 1
        image = config.recipe.model.image
        for attempt in attempts:
            shape = Shape(model, image, attempt.get("world", 1))
            saves[shape] = max(saves.get(shape, 0.0), attempt.get("save_seconds", 0.0))
        trained = _trained(attempts)
        worlds = {attempt.get("world", 1) for attempt in trained}
        if config.recipe.optim.steps and len(worlds) == 1:
            shape = Shape(model, image, worlds.pop())
            found.setdefault(shape, []).append(_speed(config, trained))
    return found, saves


def _speed(config: TrialConfig, attempts: Sequence[AttemptRecord]) -> MeasuredSpeed:
    """Return the speed over attempts that ended in order.

    An attempt without seconds per phase counts as steps alone.
    """
    stepping = probing = starting = 0.0
    steps = probes = 0
    for attempt in attempts:
        wall = (attempt.get("ended", 0) - attempt.get("started", 0)) / 1000
        phases = attempt.get("seconds") or {"train": wall}
        step_seconds = 0.0
        for phase in STEP_PHASES:
            step_seconds += phases.get(phase, 0.0)
        probe_seconds = phases.get("probe", 0.0)
        stepping += step_seconds
        probing += probe_seconds
        starting += wall - step_seconds - probe_seconds
        first, last = _step_range(attempt)
        steps += last - first
        probes += _probe_count(config, first, last)
    flops = total_flops(config.recipe) * steps / (config.recipe.optim.steps or 1)
    start = max(starting / len(attempts), 0.0)
    return MeasuredSpeed(flops / max(stepping, 1e-9), start, probing / max(probes, 1))


def _relative_error(seconds: Sequence[float]) -> float:
    """Return the relative error of the next trial's time, by the times of trials like it."""
    count = len(seconds)
    if count == 1:
        return FLOPS_SPREAD / 2
    quantile = student.quantile(count - 1, student.ONE_SIGMA)
    return quantile * (1 + 1 / count) ** 0.5 * stdev(seconds) / fmean(seconds)


def _probe_count(config: TrialConfig, first: int, last: int) -> int:
    """Return the probes of an attempt over these steps: at step 0, at the end, and regular ones."""
    horizon, every = config.recipe.optim.steps or 0, config.runtime.probe_every
    count = int(first == 0)
    if every:
        count += last // every - first // every
    if last == horizon and not (every and horizon % every == 0):
        count += 1
    return count


def _trained(attempts: Iterable[AttemptRecord]) -> list[AttemptRecord]:
    """Return the attempts that ended in order after at least one step."""
    trained: list[AttemptRecord] = []
    for attempt in attempts:
        first, last = _step_range(attempt)
        in_order = attempt.get("ended") and "slurm_state" not in attempt
        if in_order and attempt.get("started") and last > first:
            trained.append(attempt)
    return trained


def _step_range(attempt: AttemptRecord) -> tuple[int, int]:
    return attempt.get("start_step") or 0, attempt.get("end_step") or 0


def _model(folder: str, models: Iterable[str]) -> str:
    """Return which of the models the name of a trial or canary begins with, else ''.

    The name of a canary is canary.<sweep>.<class>.<code>.<trial>.
    """
    if folder.startswith("canary."):
        folder = folder.split(".", 4)[4]
    return max((model for model in models if folder.startswith(f"{model}-")), key=len, default="")


def _shape(config: TrialConfig) -> Shape:
    world = config.runtime.world_size
    return Shape(config.recipe.model.name, config.recipe.model.image, world)


@functools.cache
def _token_counts(mask: Mask, grid: int) -> tuple[Any, Any]:
    import numpy as np

    from jepa_cluster.ijepa import masks

    images = np.arange(MASK_SAMPLES)
    return masks.lengths(masks.sample(mask, grid, 0, np.zeros_like(images), images))
