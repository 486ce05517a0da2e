"""The training loop. To learn when the target encoder is updated, scroll.

In: a trial directory, an attempt that the job has claimed, this rank's `DistEnv`, the preemption
handler, the phase timer and the hooks of the job. Out: an exit code, and everything else in the
directory.
The step is the state: sample order, crops, masks and schedules are functions of it. What is not
(weights, moments, running totals) is in the checkpoint.
"""

# pyright: standard, reportPrivateImportUsage=false

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace

import torch

from jepa_cluster.config import Recipe, TrialConfig
from jepa_cluster.data import pipeline
from jepa_cluster.errors import ExitCode
from jepa_cluster.ijepa import flops, masks
from jepa_cluster.ijepa.objective import update_target
from jepa_cluster.ijepa.schedules import initial_share, schedule_at
from jepa_cluster.training import distributed, probe, sharded_adamw
from jepa_cluster.training.attempt_log import AttemptLog
from jepa_cluster.training.checkpoint_policy import CheckpointPolicy
from jepa_cluster.training.dist_env import micro_batch
from jepa_cluster.training.distributed import World
from jepa_cluster.training.forced_exit import ForcedExit
from jepa_cluster.training.step_metrics import LocalMetrics, MetricReducer, StepMetrics
from jepa_cluster.training.watchdog import Watchdog

STOP_FLAGS = {"signal", "stop", "stop_after", "fenced", "give_up"}
SAVE_FLAGS = {*STOP_FLAGS, "checkpoint"}
GC_EVERY = 200  # steps between garbage collections, the same steps on every rank


def train(exits: ForcedExit) -> ExitCode:
    """Train until the trial is done, a signal or the user asks to stop; else raise an exception."""
    trial, attempt, timer = exits.trial, exits.attempt, exits.timer
    config, world, watchdog = join(exits)
    recipe, runtime, device = config.recipe, config.runtime, world.device
    optim, steps = recipe.optim, recipe.optim.steps or 0
    grad_accum_steps = optim.batch // world.size // (runtime.micro_batch or 1)

    # The model: from the newest checkpoint that verifies, or from the seed.
    model = distributed.build_model(recipe, runtime, world)
    optimizer = sharded_adamw.build_optimizer(model, optim)
    log = AttemptLog(trial, attempt, world, config, timer)
    policy = CheckpointPolicy(config, world, log, watchdog, exits)
    step, pending_row = policy.restore(model, optimizer)

    # Run the pending probe: of a new trial's encoder, or where the last attempt was interrupted.
    if pending_row is not None:
        if not run_probe(policy, step, {**log.counters, **pending_row}):
            return policy.stop(step, {"signal"}, pending_row)
        log.settle(step)
    if policy.runtime_flags(step) and step < steps:
        return policy.stop(step, policy.runtime_flags(step))

    batches = pipeline.stream(
        config, world.rank, world.size, step * optim.batch, world.env.is_first_on_node, timer.touch
    )
    reducer = MetricReducer(device, world.size, world.rank)
    phase = "compile"  # the first step compiles and warms up
    gc.collect()
    gc.disable()
    for step in range(step + 1, steps + 1):  # noqa: B020
        schedule = schedule_at(optim, step)
        local_metrics, local_flags = LocalMetrics(), policy.control_flags()

        # Forward and backward, in as many micro-batches as the memory asks for.
        for micro_step in range(grad_accum_steps):
            with timer("data"):
                batch = next(batches)
            local_metrics.data_seconds += timer.last_seconds
            with timer(phase):
                images = pipeline.normalise(batch.images.to(device, non_blocking=True), recipe.data)
                # The last backward averages the gradients over all ranks (FSDP).
                distributed.sync_gradients(model, micro_step == grad_accum_steps - 1)
                loss, aux = model(images, probe.to_device(batch.masks, device))
                (loss / grad_accum_steps).backward()
                fractions, sums = batch_metrics(batch, recipe)
                local_metrics.add({"loss": loss, **aux, **fractions}, sums, grad_accum_steps)

        with timer(phase):
            # One all-reduce sums metrics, control flags and squared gradient norms over all ranks.
            squared_norms = sharded_adamw.squared_grad_norms(model, world.replica_count)
            squared_norm = reducer.all_reduce(step, local_metrics, local_flags, squared_norms)
            sharded_adamw.set_lr_and_decay(optimizer, schedule.lr, schedule.weight_decay)
            sharded_adamw.clip_gradients(model, squared_norm, optim.clip)
            # A step whose gradient is not finite changes no weight, on any rank.
            optimizer.found_inf = (~torch.isfinite(squared_norm)).float()
            optimizer.step()
            optimizer.zero_grad()
            update_target(model, schedule.momentum)
            # The metrics of finished steps are the same on every rank.
            probe_due, milestone_due = log.probe_due(step), runtime.keeps(step)
            flags = policy.runtime_flags(step)
            drain = probe_due or milestone_due or bool(flags)
            for metrics in finished_steps(reducer, drain):
                flags |= metrics.flags
                row = {
                    **metrics.means,  # the loss, the objective's aux scalars, fractions of the grid
                    **metrics.grad_norms(),  # grad_norm, grad_norm_encoder, grad_norm_predictor
                    **schedule_at(optim, metrics.step)._asdict(),  # lr, weight_decay, momentum
                }
                log.consume(metrics, row)
        policy.raise_if_diverged()

        # Probe the target encoder. A sum over all ranks tells whether one was interrupted.
        if probe_due and not run_probe(policy, step, log.latest_row):
            return policy.stop(step, {"signal"}, log.latest_row)
        if flags & STOP_FLAGS and step < steps:  # any rank has asked for it
            return policy.stop(step, flags)
        if milestone_due or flags & SAVE_FLAGS:  # save a checkpoint
            policy.start_unless_suspicious(step)
        phase = "train"
        if step % GC_EVERY == 0:
            gc.collect()
    return policy.finish(step)


def join(exits: ForcedExit) -> tuple[TrialConfig, World, Watchdog]:
    """Start the watchdog and meet the other ranks. The config gets this world's micro-batch."""
    trial, attempt, env, timer = exits.trial, exits.attempt, exits.env, exits.timer
    config = trial.read_config()
    exits.handler.grace = config.runtime.grace_seconds
    watchdog = Watchdog(trial, attempt, env, timer, config.runtime.hang_seconds, exits.on_hang)
    watchdog.start()
    world = distributed.init(env, config.recipe, config.runtime, attempt, timer.touch)
    exits.new_channel = world.new_channel
    images = micro_batch(config.recipe, config.runtime, world.size)
    runtime = replace(config.runtime, micro_batch=images)
    return replace(config, runtime=runtime), world, watchdog


def run_probe(policy: CheckpointPolicy, step: int, row: Mapping[str, float]) -> bool:
    """Every rank: probe the target encoder, and log the metrics in `row` with the results.

    Returns False, and logs nothing, if a rank was asked to stop. Raises Diverged after a collapse.
    """
    log, optim = policy.log, policy.config.recipe.optim
    full = step in (0, optim.steps)
    with log.timer("probe"):
        world, topic = policy.world, f"features-{step}"
        found = probe.measure(policy.model, policy.config, world, policy.handler, full, topic)
    if found is None:
        return False
    # The processors of other nodes may round differently, and the detector judges the result.
    found = policy.world.channel.from_rank0(f"probe-{step}", lambda: found)
    is_frozen = policy.config.recipe.objective.target == "frozen"
    found["target_initial_share"] = 1.0 if is_frozen else initial_share(optim, step)
    log.log_metrics(step, {**row, **found})
    log.detector.observe_rankme(step, found["probe/rankme"])
    policy.raise_if_diverged()
    return True


def batch_metrics(
    batch: pipeline.Batch, recipe: Recipe
) -> tuple[dict[str, float], dict[str, float]]:
    """Return means over the images of a micro-batch, and sums: FLOPs by the masks, bad images."""
    images = len(batch.index)
    per_image = flops.step_flops(recipe, *masks.lengths(batch.masks))
    sums = {
        "flops_encoder": per_image.encoder * images,
        "flops_total": per_image.total * images,
        "corrupt_images": batch.corrupt,
    }
    return masks.fractions(batch.masks, recipe.model.grid), sums


def finished_steps(reducer: MetricReducer, drain: bool) -> list[StepMetrics]:
    """Return the metrics of finished steps, on a GPU without the newest unless `drain`.

    Before a checkpoint the newest is taken, too: the detector judges a step before it is saved.
    """
    finished = reducer.take(drain)
    if any(metrics.flags & SAVE_FLAGS for metrics in finished):
        finished += reducer.take(drain=True)
    return finished
