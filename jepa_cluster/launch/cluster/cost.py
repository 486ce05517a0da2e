"""What trials will cost, in hours: measured where the same model has run in the same shape, else by FLOPs.

In: resolved trials, the profile's peak and MFU, and the attempts that lie below the root. Out: a `CostEstimate` each,
with an error bar and its basis. Masks are sampled to count tokens (numpy); nothing else is computed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jepa_cluster.config import Mask, Recipe, TrialConfig
from jepa_cluster.errors import JepaError, plural
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.records import AttemptRecord
from jepa_cluster.results import student
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root, TrialDir

SAMPLES = 64  # masks drawn to count tokens
LOOK_BACK = 12  # newest trials of a model that are read for what they measured
FLOPS_SPREAD = 0.3  # relative error of a price by FLOPs alone
LEAST_SPREAD = 0.05  # relative error of a measured price, at least
START = {"local": 5.0, "slurm": 60.0}  # s from a job's start to its first step, where nobody says or has measured it
STEPPING = ("train", "data", "checkpoint", "lost")  # phases of an attempt that grow with its steps


@dataclass(frozen=True)
class CostEstimate:
    """hours: wall time of one trial; spread: its error bar; world: processes (GPUs)."""

    hours: float
    spread: float
    world: int
    basis: str

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.world


Shape = tuple[str, int, int]  # model name, image size, processes


class MeasuredSpeed(NamedTuple):
    """What a trial measured: FLOP/s while it steps, s from an attempt's start to its first step, s of a probe."""

    rate: float
    start: float
    probe: float

    def seconds(self, flops: float, probes: int) -> float:
        """Wall time of this much work in one attempt."""
        return flops / self.rate + self.start + probes * self.probe


def estimate_costs(root: Root, profile: Profile, trials: Iterable[Trial]) -> dict[str, CostEstimate]:
    """Trial name -> the price of all of it."""
    trials = list(trials)
    paces = measured(root, {_shape(t.config) for t in trials})
    out: dict[str, CostEstimate] = {}
    for trial in trials:
        recipe, runtime = trial.config.recipe, trial.config.runtime
        world = runtime.nodes * runtime.procs_per_node
        work = total_flops(recipe) * own_step_fraction(root, trial)
        times = probes(trial.config, trial.begins, recipe.optim.steps or 0)
        known = paces.get(_shape(trial.config))
        if known:
            found = [pace.seconds(work, times) for pace in known]
            seconds, basis = statistics.fmean(found), f"measured, {plural(len(found), 'trial')}"
            spread = max(_spread(found), LEAST_SPREAD)
        else:
            rate, spread = profile.peak_tflops * 1e12 * profile.mfu * world, FLOPS_SPREAD
            start = START[profile.kind] if profile.start_seconds is None else profile.start_seconds
            seconds = (work + times * probe_flops(recipe)) / rate + start
            basis = f"FLOPs at {profile.mfu:.0%} MFU"
        hours = seconds / 3600
        out[trial.config.name] = CostEstimate(hours, hours * spread, world, basis)
    return out


def probes(config: TrialConfig, start: int, end: int) -> int:
    """How often an attempt over these steps probes: at step 0, at the end, and at the runtime's cadence."""
    horizon, every = config.recipe.optim.steps or 0, config.runtime.probe_every
    regular = end // every - start // every if every else 0
    return regular + (start == 0) + (end == horizon and not (every and horizon % every == 0))


def probe_flops(recipe: Recipe) -> float:
    """Of one probe: all its images through the whole encoder, the test images twice more with masks."""
    from jepa_cluster.ijepa.flops import encoder_flops

    return encoder_flops(recipe) * (recipe.probe.images + 3 * recipe.probe.test_images)


def _spread(seconds: list[float]) -> float:
    """Relative error of the next trial's time, told from those of the same shape."""
    n = len(seconds)
    if n == 1:
        return FLOPS_SPREAD / 2
    wide = student.quantile(n - 1, student.ONE_SIGMA) * (1 + 1 / n) ** 0.5
    return wide * statistics.stdev(seconds) / statistics.fmean(seconds)


def own_step_fraction(root: Root, trial: Trial) -> float:
    """Share of the steps that a trial makes itself: of a branch its cool-down, unless its trunk kept no milestone."""
    steps = trial.config.recipe.optim.steps or 1
    trunk = root.trial(trial.trunk or "")
    lost = trunk.done.exists() and not trunk.checkpoint(trial.begins).exists()
    return 1.0 if trial.trunk and lost else (steps - trial.begins) / steps


def total_flops(recipe: Recipe) -> float:
    """FLOPs of the whole training, from masks as they would be drawn."""
    from jepa_cluster.ijepa.flops import step_flops

    context, targets = _tokens(recipe.mask, recipe.model.grid)
    return step_flops(recipe, context, targets).total * recipe.optim.batch * (recipe.optim.steps or 0)


def measured(root: Root, shapes: set[Shape]) -> dict[Shape, list[MeasuredSpeed]]:
    """What attempts of the same model, image and world size took, one pace per trial or canary."""
    found: dict[Shape, list[MeasuredSpeed]] = {}
    models = {shape[0] for shape in shapes}
    folders = [*root.trials.glob("*-ts*"), *root.canaries.glob("canary.*-ts*")] if models else []
    folders = [folder for folder in folders if _model(folder.name) in models]
    read: dict[str, int] = {}
    for folder in sorted(folders, key=lambda p: (p / "attempts").stat().st_mtime, reverse=True):
        model = _model(folder.name)
        if read.get(model, 0) >= LOOK_BACK or not any((folder / "attempts").iterdir()):
            continue
        trial = root.trial(folder.name)
        try:
            config = trial.read_config(older=True)
            ended = _ended(trial)
        except JepaError:
            continue
        read[model] = read.get(model, 0) + 1
        worlds = {int(a.get("world", 1)) for a in ended}
        if config.recipe.optim.steps and len(worlds) == 1:
            shape = (model, config.recipe.model.image, worlds.pop())
            found.setdefault(shape, []).append(_pace(config, ended))
    return found


def measured_hours(trial: TrialDir) -> float | None:
    """Wall time of the whole trial at the pace of its attempts; None while none of them has trained and ended."""
    config, ended = trial.read_config(older=True), _ended(trial)
    if not ended:
        return None
    times = probes(config, 0, config.recipe.optim.steps or 0)
    return _pace(config, ended).seconds(total_flops(config.recipe), times) / 3600


def exceeds_budget(expected: Mapping[str, Any], hours: float) -> str:
    """Return why a class may not start when a trial of it takes `hours`, else ''. expected: its canary.json."""
    limit, planned = expected["limit"], expected["hours"]
    if limit is None or not planned:
        return ""
    cost = expected["others"] + expected["cost"] * hours / planned
    if cost <= limit:
        return ""
    return (
        f"a trial takes {hours:.3g} h, not {planned:.3g} h: the sweep would cost {cost:,.3g} {expected['unit']}, "
        f"more than its limit of {limit:,g}"
    )


def _model(folder: str) -> str:
    """The model in the name of a trial, or of a canary (canary.<sweep>.<class>.<code>.<trial>)."""
    trial = folder.split(".", 4)[4] if folder.startswith("canary.") else folder
    return trial.split("-ts")[0]


def _ended(trial: TrialDir) -> list[AttemptRecord]:
    """Attempts that have trained at least one step and ended in order."""
    return [a for a in trial.attempts() if a.get("ended") and a.get("started") and _steps(a) > 0]


def _steps(attempt: AttemptRecord) -> int:
    return (attempt.get("end_step") or 0) - (attempt.get("start_step") or 0)


def _pace(config: TrialConfig, attempts: Sequence[AttemptRecord]) -> MeasuredSpeed:
    """From attempts that ended in order. Without seconds by phase in their records, all of the time counts as steps."""
    took = [(a.get("ended", 0) - a.get("started", 0)) / 1000 for a in attempts]
    parts = [a.get("seconds") or {"train": wall} for a, wall in zip(attempts, took, strict=True)]
    stepping = sum(sum(p.get(phase, 0.0) for phase in STEPPING) for p in parts)
    probing = [p.get("probe", 0.0) for p in parts]
    starts = [t - sum(p.get(phase, 0.0) for phase in (*STEPPING, "probe")) for t, p in zip(took, parts, strict=True)]
    done = sum(map(_steps, attempts)) / (config.recipe.optim.steps or 1)
    times = sum(probes(config, a.get("start_step") or 0, a.get("end_step") or 0) for a in attempts)
    rate = total_flops(config.recipe) * done / max(stepping, 1e-9)
    return MeasuredSpeed(rate, max(statistics.fmean(starts), 0.0), sum(probing) / max(times, 1))


def _shape(config: TrialConfig) -> Shape:
    return config.recipe.model.name, config.recipe.model.image, config.runtime.nodes * config.runtime.procs_per_node


@functools.cache
def _tokens(mask: Mask, grid: int) -> tuple[Any, Any]:
    import numpy as np

    from jepa_cluster.ijepa import masks

    index = np.arange(SAMPLES)
    return masks.lengths(masks.sample(mask, grid, 0, np.zeros_like(index), index))
