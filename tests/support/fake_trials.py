"""Roots with stub trials: spools written by the real writer, values from a law we know, and no trainer."""

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import yaml

from jepa_cluster.config import TrialConfig, config_from_dict
from jepa_cluster.data import manifest
from jepa_cluster.labels import point_label
from jepa_cluster.records import SweepPlan
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import write_json
from jepa_cluster.trial.spool import Spool

PLAIN = """
model: {name: vit_x, width: 64, depth: 2, heads: 2, mlp_ratio: 4.0, patch: 8, image: 64}
predictor: {width: 32, depth: 1, heads: 2}
mask: {mode: multiblock, targets: 4, target_scale: [0.15, 0.2], target_aspect: [0.75, 1.5], context_scale: [0.85, 1.0],
       context_keep: 20}
data: {name: tiny, digest: abc, images: 100}
optim: {batch: 8, steps: 10, epochs: null, warmup_steps: 2, warmup_epochs: null, start_lr: 0.0001, lr: 0.001,
        final_lr: 1.0e-6, weight_decay: 0.04, final_weight_decay: 0.4, decay_shape: cosine, momentum: 0.99,
        final_momentum: 1.0}
probe: {}
seed: 0
runtime: {data_root: data}
"""
SIZES = {"vit_a": (32, 2), "vit_b": (64, 2), "vit_c": (96, 3), "vit_d": (128, 4), "vit_e": (192, 6)}
SCALES = ((0.15, 0.2), (0.05, 0.1), (0.2, 0.3))
ASPECTS = ((0.75, 1.5), (0.3, 0.6))


def data_root(folder: Path) -> Path:
    """A data root of two splits with the manifests of 640 images of one class, and without the images."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        columns = {name: np.zeros(640, dtype) for name, dtype in manifest.COLUMNS.items()}
        columns["label/class"] = np.zeros(640, np.int32)
        index = manifest.Index((manifest.Shard("shard-000000.tar", 9, 640),), columns)
        manifest.write(folder / split, index, ("a",), {})
    return folder


def config(
    model: str, scale: tuple[float, float], seed: int, steps: int, aspect: tuple[float, float] = ASPECTS[0]
) -> TrialConfig:
    """A frozen config as `submit` would make it."""
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
    """Trial directories and plan.json, as after a submit. Nothing has run yet."""
    trials, entries = [], []
    steps, aspects = tuple(steps), tuple(aspects)
    several = [*(["mask.target_aspect"] if len(aspects) > 1 else []), *(["optim.steps"] if len(steps) > 1 else [])]
    for scale, aspect, model, horizon, seed in itertools.product(scales, aspects, models, steps, seeds):
        made = config(model, scale, seed, horizon, aspect)
        trial = root.trial(made.name)
        trial.create(made)
        more = {"mask.target_aspect": list(aspect), "optim.steps": horizon}
        point = {"model": model, "mask.target_scale": list(scale), **{axis: more[axis] for axis in several}}
        trial.add_point(name, point)
        trials.append(trial)
        entries.append({"name": made.name, "id": made.id, "point": point, "seed": seed, "class": "c0",
                        "label": point_label(point, seed), "steps": horizon, "hours": 0.01, "world": 2,
                        "trunk": None, "begins": 0})  # fmt: skip
    folder = root.sweep(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.sweep_file.write_text("question: Do stubs scale?\n")
    plan: SweepPlan = {
        "sweep": name,
        "question": "Do stubs scale?",
        "expect": "As the law says.",
        "axes": ["model", "mask.target_scale", *several],
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
    return trials


def values(trial: TrialDir, step: int, noise: float = 0.01) -> dict[str, float]:
    """One row: probe error 0.6 (C/1e9)^-0.15 + 0.1 with noise that depends on the trial and the step alone."""
    recipe = trial.read_config().recipe
    size = 12.0 * recipe.model.width**2 * recipe.model.depth
    flops = step * 6.0 * size * recipe.optim.batch * 64
    rng = np.random.default_rng([step, recipe.seed, recipe.model.width, int(recipe.mask.target_scale[0] * 1000)])
    bias = (0.0 if recipe.mask.target_scale[0] > 0.1 else 0.04) + (0.0 if recipe.mask.target_aspect[0] > 0.5 else 0.02)
    error = 0.6 * ((flops + 1e9) / 1e9) ** -0.15 + 0.1 + bias
    row = {
        "loss": 0.45 - 0.1 * min(step / 60, 1) + noise * rng.normal(), "lr": 1e-3, "target_std": 1.0,
        "context_fraction": 0.26 + bias, "target_fraction": 0.5, "images_seen": float(step * recipe.optim.batch),
        "flops_total": flops, "flops_encoder": 0.4 * flops, "images_per_s": 100.0,
    }  # fmt: skip
    if step % 20 == 0 or step == recipe.optim.steps:
        error *= float(np.exp(noise * rng.normal()))
        row |= {"probe/class_error": error, "probe/class_top1": 1 - error, "probe/knn_error": error + 0.05,
                "probe/rankme": 20 + 10 * (1 - error), "val/loss": 0.5 * error}  # fmt: skip
    return row


def run(
    trial: TrialDir,
    stop: int | None = None,
    every: int = 5,
    commit: int = 20,
    cause: str = "done",
    kill: bool = False,
) -> int:
    """One attempt from the last commit to `stop` (default: the horizon). kill: it ends without a word."""
    horizon = int(trial.read_config().recipe.optim.steps or 0)
    last = horizon if stop is None else stop
    start = max(trial.committed(), default=0)
    now = int(time.time() * 1000)
    attempt = trial.claim({"launch": f"x{trial.newest_attempt()}", "kind": "local", "host": "stub", "world": 2,
                           "code": "abc1234", "started": now - 36_000, "start_step": start})  # fmt: skip
    spool = Spool(trial, attempt, max(trial.committed(), default=-1))
    for step in (*range(start, last, every), last):
        spool.log(step, values(trial, step))
        if (step and step % commit == 0) or (step == last and not kill):
            (trial.checkpoints / f"step-{step:08d}").mkdir(exist_ok=True)
            spool.commit(step)
    spool.close()
    if not kill:
        ended = {"end_step": last, "ended": now, "cause": cause, "exit": 0 if cause == "done" else 75}
        trial.amend(attempt, ended)
    if cause == "done" and last == horizon and not kill:
        write_json(trial.done, {"step": last, "t": now, "metrics": values(trial, last)})
    return attempt


def spooled(trial: TrialDir) -> dict[tuple[str, int], tuple[int, float]]:
    """Every settled point by hand, without the project's reader: (metric, step) -> (t, value)."""
    points: dict[tuple[str, int], tuple[int, float]] = {}
    floor_rows: dict[int, dict] = {}
    settled = -1
    for path in sorted((trial.path / "metrics").glob("*.jsonl")):
        lines = [json.loads(x) for x in path.read_bytes().split(b"\n")[:-1] if x.startswith(b"{") and x.endswith(b"}")]
        settled = floor = lines[0]["settled"]
        floor_rows = {s: r for s, r in floor_rows.items() if s <= floor}
        for line in lines[1:]:
            if "commit" in line:
                settled = max(settled, line["commit"])
            elif "event" not in line and line["step"] > floor:
                floor_rows[line["step"]] = line
    for step, line in floor_rows.items():
        if step <= settled:
            for key in line.keys() - {"step", "t"}:
                points[key, step] = (line["t"], line[key])
    return points


def stored(uri: str) -> dict[str, dict[tuple[str, int], list[tuple[int, float]]]]:
    """Every point of a database, by trial: straight from the tables, so that doubles show."""
    found: dict[str, dict[tuple[str, int], list[tuple[int, float]]]] = {}
    query = """select t.value, m.key, m.step, m.timestamp, m.is_nan, m.value
               from metrics m join tags t on t.run_uuid = m.run_uuid and t.key = 'jepa.trial'
               join runs r on r.run_uuid = m.run_uuid and r.lifecycle_stage = 'active'
               join experiments e on e.experiment_id = r.experiment_id and e.lifecycle_stage = 'active'"""
    for trial, key, step, t, is_nan, value in rows(uri, query):
        if key != "flops_total_log10" and not key.startswith("initial/"):
            point = (t, float("nan") if is_nan else float(value))
            found.setdefault(trial, {}).setdefault((key, step), []).append(point)
    return found


def doubled_runs(uri: str) -> list[tuple]:
    """Trials with more than one active run in an active experiment."""
    query = """select t.value, count(*) from tags t join runs r on r.run_uuid = t.run_uuid
               join experiments e on e.experiment_id = r.experiment_id
               where t.key = 'jepa.trial' and r.lifecycle_stage = 'active' and e.lifecycle_stage = 'active'
               group by 1, r.experiment_id having count(*) > 1"""
    return rows(uri, query)


def rows(uri: str, query: str) -> list[tuple]:
    """A question to SQLite or PostgreSQL, past MLflow."""
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
