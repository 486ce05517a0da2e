"""The loop. To learn when the target encoder is updated, scroll.

In: a trial directory, the number of an attempt already claimed, this process's place and its guard. Out: an exit
code; in the directory, everything else. State is the step: order, crops, masks and schedules are functions of it,
and what is not (weights, moments, running totals) stands in the checkpoint.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Callable
from dataclasses import replace

import torch

from jepa_cluster.config import Recipe
from jepa_cluster.data import pipeline
from jepa_cluster.errors import ExitCode
from jepa_cluster.ijepa import flops, masks, schedules
from jepa_cluster.ijepa.objective import update_target
from jepa_cluster.training import distributed, probe
from jepa_cluster.training.attempt_log import AttemptLog
from jepa_cluster.training.checkpoint_policy import CheckpointPolicy, on_hang
from jepa_cluster.training.dist_env import DistEnv
from jepa_cluster.training.preemption import PreemptionHandler
from jepa_cluster.training.step_metrics import MetricReducer, square_norm
from jepa_cluster.training.watchdog import PhaseTimer, Watchdog
from jepa_cluster.trial.layout import TrialDir

LEAVING = {"signal", "stop", "stop_after", "fenced", "give_up"}
SAVING = {*LEAVING, "checkpoint"}
TIDY = 200  # steps between garbage collections, the same steps on every rank


def train(
    trial: TrialDir,
    attempt: int,
    env: DistEnv,
    handler: PreemptionHandler,
    timer: PhaseTimer,
    on_commit: Callable[[], None],
) -> ExitCode:
    """Train until the trial is done, a signal or the user asks to stop, or an exception is raised.

    on_commit: called by rank 0 after each committed checkpoint of a trial with milestones; must return at once.
    """
    # Who is here, and for what
    config = trial.read_config()
    report_hang = functools.partial(on_hang, trial, attempt, env, timer)
    watch = Watchdog(trial, attempt, env, timer, config.runtime.hang_seconds, report_hang).start()
    world = distributed.init(env, config.recipe, config.runtime, attempt, timer.touch)
    micro = distributed.micro_batch(config.recipe, config.runtime, env.world_size)
    config = replace(config, runtime=replace(config.runtime, micro_batch=micro))
    recipe, optim, steps = config.recipe, config.recipe.optim, config.recipe.optim.steps or 0
    parts = optim.batch // env.world_size // micro

    # The model: from the newest checkpoint that verifies, or from the seed
    model = distributed.build_model(recipe, config.runtime, world)
    adam = distributed.build_optimizer(model, optim)
    log = AttemptLog(trial, attempt, world, config, timer)
    saving = CheckpointPolicy(config, world, log, handler)
    saving.on_commit = on_commit
    step, owed = saving.restore(model, adam)
    watch.facts, watch.stalled_seconds = saving.facts, lambda: saving.saver.stalled_seconds

    # A probe may be owed: of the untrained encoder, or of a step at which the last attempt had to leave
    if owed is not None:
        with timer("probe"):
            found = probe.measure(model, config, world, lambda: handler.stop_requested)
        if found is None:
            return saving.stop(step, {"signal"}, owed)
        log.log(step, {**log.counters, **owed, **found})
        log.detector.observe_rankme(step, found["probe/rankme"])
        saving.raise_if_diverged()
        log.settle(step)
    if saving.runtime_flags(step) and step < steps:  # runtime.stop_after was reached by an earlier attempt
        return saving.stop(step, saving.runtime_flags(step))

    batches = pipeline.stream(config, world.rank, world.size, step * optim.batch)
    meter, work = (
        MetricReducer(world.device, world.size, world.rank),
        "compile",
    )  # the first step compiles and warms up
    gc.collect()
    gc.disable()
    while step < steps:
        step += 1
        now = schedules.schedule_at(optim, step)
        loss, spread = torch.zeros(2, device=world.device)
        numbers = saving.control_flags(watch)

        # Forward and backward, in as many parts as the memory asks for; the ranks' gradients meet in the last
        for part in range(parts):
            with timer("data"):
                batch = next(batches)
            numbers["data_seconds"] = numbers.get("data_seconds", 0.0) + timer.last_seconds
            with timer(work):
                count(numbers, batch, recipe, parts)
                images = pipeline.normalise(batch.images.to(world.device, non_blocking=True), recipe.data)
                distributed.sync_gradients(model, part == parts - 1)
                value, seen = model(images, probe.to_device(batch.masks, world.device))
                (value / parts).backward()
                loss += value.detach() / parts
                spread += seen["target_std"] / parts

        with timer(work):
            # One collective for all numbers and wishes; then context encoder and predictor take their step
            squares = distributed.squared_grad_norms(model, world.replica_count)
            vector = meter.all_reduce(step, numbers, loss, spread, squares)
            distributed.set_lr_and_decay(adam, now.lr, now.weight_decay)
            if optim.clip is not None:
                distributed.clip_gradients(model, square_norm(vector), optim.clip)
            adam.found_inf = (~torch.isfinite(square_norm(vector))).float()  # such a step changes no weight, anywhere
            adam.step()
            adam.zero_grad()
            update_target(model, now.momentum)  # the target encoder follows
            probing, milestone = log.probe_due(step), config.runtime.keeps(step)
            killed = step == config.runtime.kill_after
            numbers_due = probing or milestone or killed
            wishes = saving.runtime_flags(step) | log.consume(meter.drain() if numbers_due else meter.ready())
            if wishes & SAVING:  # the detector must have judged this step before it is saved
                wishes |= log.consume(meter.drain())
        saving.raise_if_diverged()

        if probing:
            with timer("probe"):
                found = probe.measure(model, config, world, lambda: handler.stop_requested)
            if found is None:
                return saving.stop(step, {"signal"}, log.latest_row)
            log.log(step, {**log.latest_row, **found})
            log.detector.observe_rankme(step, found["probe/rankme"])
            saving.raise_if_diverged()
        if wishes & LEAVING and step < steps:
            return saving.stop(step, wishes)
        if milestone or wishes & SAVING:
            saving.start_unless_suspicious(step)
        if killed:  # `jepa drill` proves that nothing is lost
            os.kill(os.getpid(), signal.SIGKILL)
        work = "train"
        if step % TIDY == 0:
            gc.collect()
    return saving.finish(step)


def count(numbers: dict[str, float], batch: pipeline.Batch, recipe: Recipe, parts: int) -> None:
    """Add to the step what a micro-batch's masks realised: mean shares of the grid, FLOPs of all its images."""
    images = len(batch.index)
    used = flops.step_flops(recipe, *masks.lengths(batch.masks))
    found = {k: v / parts for k, v in masks.fractions(batch.masks, recipe.model.grid).items()}
    found |= {
        "flops_encoder": used.encoder * images,
        "flops_total": used.total * images,
        "corrupt": batch.corrupt,
    }
    for name, value in found.items():
        numbers[name] = numbers.get(name, 0.0) + value
