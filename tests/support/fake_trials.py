"""Roots with stub trials: spools with errors from a known law, written without a trainer."""

import json
import math
import time
from collections.abc import Collection, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jepa_cluster.config import TrialConfig, config_from_dict
from jepa_cluster.data import manifest
from jepa_cluster.labels import point_label
from jepa_cluster.records import SweepPlan
from jepa_cluster.sweep.resolve import new_name
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import Spool

PLAIN = """
model: {name: vit_x, width: 64, depth: 2, heads: 2, mlp_ratio: 4.0, patch: 8, image: 64}
predictor: {width: 32, depth: 1, heads: 2}
mask: {mode: multiblock, targets: 4, target_scale: [0.15, 0.2], target_aspect: [0.75, 1.5],
       context_scale: [0.85, 1.0], context_keep: 20}
data: {name: tiny, digest: abc, images: 100}
optim: {batch: 8, steps: 10, epochs: null, warmup_steps: 2, warmup_epochs: null,
        start_lr: 0.0001, lr: 0.001, final_lr: 1.0e-6, weight_decay: 0.04,
        final_weight_decay: 0.4, decay_shape: cosine, momentum: 0.99, final_momentum: 1.0}
probe: {}
seed: 0
runtime: {data_root: data}
"""
SIZES = {
    "vit_a": (32, 2),
    "vit_b": (64, 2),
    "vit_c": (96, 3),
    "vit_d": (128, 4),
    "vit_e": (192, 6),
}
SCALES = ((0.15, 0.2), (0.05, 0.1), (0.2, 0.3))
ASPECTS = ((0.75, 1.5), (0.3, 0.6))


def data_root(folder: Path, labels: tuple[str, ...] = ("class",)) -> Path:
    """Make a data root: two splits with manifests of 640 images of one class, without images."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        columns = {name: np.zeros(640, dtype) for name, dtype in manifest.COLUMNS.items()}
        for label in labels:
            columns[f"label/{label}"] = np.zeros(640, np.int32)
        shard = manifest.Shard("shard-000000.tar", 9, 640)
        index = manifest.Index((shard,), columns)
        manifest.write(folder / split, index, ("a",), {})
    return folder


def remove_labels(split: Path) -> None:
    """Write the index and manifest of a split again, without labels."""
    made, index = manifest.load(split)
    columns = {name: column for name, column in index.columns.items() if "label/" not in name}
    manifest.write(split, manifest.Index(index.shards, columns), (), made.report)


def config(
    model: str,
    scale: tuple[float, float],
    seed: int,
    steps: int,
    aspect: tuple[float, float] = ASPECTS[0],
) -> TrialConfig:
    """Make a frozen config as `submit` does."""
    values = yaml.safe_load(PLAIN)
    width, depth = SIZES[model]
    values["model"] |= {"name": model, "width": width, "depth": depth}
    values["mask"] |= {"target_scale": list(scale), "target_aspect": list(aspect)}
    values["optim"]["steps"] = steps
    values["seed"] = seed
    return config_from_dict(values)


def sweep(
    root: Root,
    name: str = "demo",
    models: Iterable[str] = ("vit_a", "vit_b", "vit_c"),
    scales: Iterable[tuple[float, float]] = SCALES[:2],
    seeds: Iterable[int] = (0,),
    steps: Iterable[int] = (60,),
    aspects: Iterable[tuple[float, float]] = ASPECTS[:1],
) -> list[TrialDir]:
    """Make trial directories and plan.json, as after a submit. Nothing has run yet."""
    steps = tuple(steps)
    aspects = tuple(aspects)
    trials: list[TrialDir] = []
    entries: list[dict[str, Any]] = []
    for scale, aspect, model, horizon, seed in product(scales, aspects, models, steps, seeds):
        point = {"model": model, "mask.target_scale": list(scale)}
        if len(aspects) > 1:
            point["mask.target_aspect"] = list(aspect)
        if len(steps) > 1:
            point["optim.steps"] = horizon
        made = config(model, scale, seed, horizon, aspect)
        trial = root.trial(new_name(point, seed, made))
        trial.create(made)
        trial.add_point(name, point)
        trials.append(trial)
        entry = {
            "name": trial.name,
            "id": made.id,
            "point": point,
            "seed": seed,
            "class": "c0",
            "label": point_label(point, seed),
            "steps": horizon,
            "hours": 0.01,
            "world": 2,
            "trunk": None,
            "begins": 0,
        }
        entries.append(entry)
    write_plan(root, name, entries)
    return trials


def unfinished_sweep(
    root: Root,
    waiting: Collection[int] = (),
) -> None:
    """Run a sweep of 12 trials: number 7 is killed at step 35, those that wait do not start."""
    for number, trial in enumerate(sweep(root, seeds=(0, 1))):
        if number == 7:
            run(trial, stop=35, kill=True)
        elif number not in waiting:
            run(trial)


def write_plan(root: Root, name: str, entries: list[dict[str, Any]]) -> None:
    """Write plan.json and the sweep file of a sweep with these trials."""
    folder = root.sweep(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.sweep_file.write_text("question: Do stubs scale?\n")
    plan: SweepPlan = {
        "sweep": name,
        "question": "Do stubs scale?",
        "expect": "As the law says.",
        "axes": list(entries[0]["point"]),
        "code": "abc1234",
        "profile": "",
        "kind": "local",
        "unit": "GPU-h",
        "limits": {},
        "retries": {},
        "submitted": int(time.time() * 1000) - 60_000,
        "trials": entries,
        "classes": [],
    }
    write_json(folder.plan, plan)


def values(trial: TrialDir, step: int, noise: float = 0.01) -> dict[str, float]:
    """Return the metrics of a step: the probe error is 0.6 (C / 1e9)^-0.15 + 0.1.

    The noise depends on the trial and the step alone. Two mask settings raise the error.
    """
    recipe = trial.read_config().recipe
    size = 12.0 * recipe.model.width**2 * recipe.model.depth
    flops = step * 6.0 * size * recipe.optim.batch * 64
    scale, _ = recipe.mask.target_scale
    aspect, _ = recipe.mask.target_aspect
    rng = np.random.default_rng([step, recipe.seed, recipe.model.width, int(scale * 1000)])
    bias = 0.0
    if scale <= 0.1:
        bias += 0.04
    if aspect <= 0.5:
        bias += 0.02
    error = 0.6 * ((flops + 1e9) / 1e9) ** -0.15 + 0.1 + bias
    row = {
        "loss": 0.45 - 0.1 * min(step / 60, 1) + noise * rng.normal(),
        "lr": 1e-3,
        "target_std": 1.0,
        "context_fraction": 0.26 + bias,
        "target_fraction": 0.5,
        "images_seen": float(step * recipe.optim.batch),
        "flops_total": flops,
        "flops_encoder": 0.4 * flops,
        "images_per_s": 100.0,
    }
    if step % 20 == 0 or step == recipe.optim.steps:
        error *= float(np.exp(noise * rng.normal()))
        row |= {
            "probe/class_error": error,
            "probe/class_top1": 1 - error,
            "probe/knn_error": error + 0.05,
            "probe/rankme": 20 + 10 * (1 - error),
            "val/loss": 0.5 * error,
        }
    return row


def run(
    trial: TrialDir,
    stop: int | None = None,
    every: int = 5,
    commit: int = 20,
    cause: str = "done",
    kill: bool = False,
) -> int:
    """Write one attempt from the last commit to `stop`, by default the horizon.

    kill: the attempt ends without a record of its end.
    """
    horizon = int(trial.read_config().recipe.optim.steps or 0)
    last = horizon if stop is None else stop
    start = max(trial.committed(), default=0)
    now = int(time.time() * 1000)
    begun = {
        "launch": f"x{trial.newest_attempt()}",
        "kind": "local",
        "host": "stub",
        "world": 2,
        "code": "abc1234",
        "started": now - 36_000,
        "start_step": start,
    }
    attempt = trial.claim(begun)
    spool = Spool(trial, attempt, max(trial.committed(), default=-1))
    for step in (*range(start, last, every), last):
        spool.log(step, values(trial, step))
        if (step and step % commit == 0) or (step == last and not kill):
            (trial.checkpoints / f"step-{step:08d}").mkdir(exist_ok=True)
            spool.commit(step)
    spool.close()
    if kill:
        return attempt
    code = 0 if cause == "done" else 75
    trial.amend(attempt, {"end_step": last, "ended": now, "cause": cause, "exit": code})
    if cause == "done" and last == horizon:
        write_json(trial.done, {"step": last, "t": now, "metrics": values(trial, last)})
    return attempt


def spooled(trial: TrialDir) -> dict[tuple[str, int], tuple[int, float]]:
    """Read every settled value without the reader of the package: (metric, step) -> (t, value)."""
    rows: dict[int, dict[str, Any]] = {}
    settled = -1
    for path in sorted((trial.path / "metrics").glob("*.jsonl")):
        head, *lines = whole_lines(path)
        floor = head["settled"]
        settled = floor
        rows = {step: row for step, row in rows.items() if step <= floor}
        for line in lines:
            if "commit" in line:
                settled = max(settled, line["commit"])
            elif "event" not in line and line["step"] > floor:
                rows[line["step"]] = line

    points: dict[tuple[str, int], tuple[int, float]] = {}
    for step, row in rows.items():
        if step <= settled:
            for key in row.keys() - {"step", "t"}:
                points[key, step] = (row["t"], row[key])
    return points


def whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file, without torn lines."""
    *lines, _ = path.read_bytes().split(b"\n")
    for line in lines:
        if line.startswith(b"{") and line.endswith(b"}"):
            yield json.loads(line)


def stored(uri: str) -> dict[str, dict[tuple[str, int], list[tuple[int, float]]]]:
    """Read every point of a database per trial, past MLflow, which would hide duplicates."""
    found: dict[str, dict[tuple[str, int], list[tuple[int, float]]]] = {}
    query = """select t.value, m.key, m.step, m.timestamp, m.is_nan, m.value
               from metrics m join tags t on t.run_uuid = m.run_uuid and t.key = 'jepa.trial'
               join runs r on r.run_uuid = m.run_uuid and r.lifecycle_stage = 'active'
               join experiments e on e.experiment_id = r.experiment_id
                                 and e.lifecycle_stage = 'active'"""
    for trial, key, step, t, is_nan, value in rows(uri, query):
        if key == "flops_total_log10" or key.startswith("initial/"):
            continue
        number = math.nan if is_nan else float(value)
        of_trial = found.setdefault(trial, {})
        of_trial.setdefault((key, step), []).append((t, number))
    return found


def doubled_runs(uri: str) -> list[tuple]:
    """Return the trials with more than one active run in an active experiment."""
    query = """select t.value, count(*) from tags t join runs r on r.run_uuid = t.run_uuid
               join experiments e on e.experiment_id = r.experiment_id
               where t.key = 'jepa.trial' and r.lifecycle_stage = 'active'
                                          and e.lifecycle_stage = 'active'
               group by 1, r.experiment_id having count(*) > 1"""
    return rows(uri, query)


def rows(uri: str, query: str) -> list[tuple]:
    """Query SQLite or PostgreSQL, past MLflow."""
    if uri.startswith("sqlite:///"):
        import sqlite3

        db = sqlite3.connect(Path(uri.removeprefix("sqlite:///")))
    else:
        import psycopg

        db = psycopg.connect(uri)
    cursor = db.cursor()
    cursor.execute(query)
    found = cursor.fetchall()
    db.close()
    return found
