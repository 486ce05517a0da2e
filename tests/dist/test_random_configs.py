"""Plan is a promise: a random config that it accepts trains, saves, resumes and probes.

`pytest --configs N` says how many are drawn. A refusal names the setting, its value and the line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import random_configs
from support.image_sets import encoded, picture, tree

from jepa_cluster import config as configs
from jepa_cluster.config import TrialConfig
from jepa_cluster.data import shards
from jepa_cluster.data.sources import scan
from jepa_cluster.errors import ConfigError, DataError, ExitCode
from jepa_cluster.launch.cluster.profile import Profile
from jepa_cluster.launch.submit.plan import make_plan
from jepa_cluster.sweep.sweep_file import load
from jepa_cluster.training.attempt_log import WALL_CLOCK_METRICS
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir
from jepa_cluster.trial.files import read_json

FIRST_LINE = 3  # of the base in the sweep file
SETS = (  # training and validation images
    ("usual", (48, 16)),
    ("five", (5, 1)),
    ("unlabelled", (20, 7)),
)


def test_every_setting_is_drawn_or_has_a_reason() -> None:
    names = random_configs.DRAWN.keys() | random_configs.NOT_DRAWN.keys()
    assert names == {*configs.all_settings()}
    assert not random_configs.DRAWN.keys() & random_configs.NOT_DRAWN.keys()


@pytest.fixture(scope="module")
def data_roots(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Labelled images of one size; five images; no labels; sizes and formats of all kinds."""
    folder = tmp_path_factory.mktemp("sets")
    for name, images in SETS:
        for split, count in zip(("train", "val"), images, strict=True):
            source = tree(folder / "images" / name / split, count)
            if name == "unlabelled":
                (source / "labels.jsonl").unlink()
                for path in source.glob("*/*"):
                    path.rename(source / path.name)
            shards.build(scan(source), folder / name / split, workers=1)
    odd = folder / "images" / "odd"
    sizes = (
        (1, 1),
        (3, 200),
        (400, 20),
        (48, 48),
        (17, 33),
    )
    for number in range(30):
        width, height = sizes[number % len(sizes)]
        image = picture(number, width, height).convert("L" if number % 2 else "RGB")
        path = odd / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image, "PNG"))
    train, val = shards.without_validation(scan(odd), 0.3, 0)
    shards.build(train, folder / "odd" / "train", workers=1)
    shards.build(val, folder / "odd" / "val", workers=1)
    return [str(folder / name) for name in ("usual", "five", "unlabelled", "odd")]


def plan(
    folder: Path,
    overrides: list[str],
) -> TrialConfig:
    """Plan a sweep with this base -> the config of its trial. Raises ConfigError, DataError."""
    file = folder / "ask.yaml"
    base = "\n".join(f"  - {json.dumps(override)}" for override in overrides)
    text = f"question: Q\nbase:\n{base}\nresources: [{{procs_per_node: 2, time: 10m}}]\n"
    file.write_text(text)
    planned = make_plan(load(file), Profile("local"), Root(folder / "root"))
    (trial,) = planned.trials.values()
    return trial.config


def assert_helpful(
    error: ConfigError | DataError,
    names: list[str],
    impossible: str,
) -> None:
    """The refusal begins with a setting and its value, and says where it is and what to write.

    impossible: the setting that is to be named.
    """
    found = re.match(r"([a-z]+)\.([a-z_.]+)", error.what)
    assert found, error
    assert found[1] in [name.split(".")[0] for name in names], error
    assert not impossible or impossible.rsplit(".", 1)[-1] in f"{error.what} {error.hint}", error
    line = re.search(r"ask\.yaml:(\d+)", error.where)
    assert line, error
    assert names[int(line[1]) - FIRST_LINE].split(".")[0] == found[1], error
    assert error.hint or " is not " in error.what, error


def stop_after(trial: TrialDir, step: int) -> None:
    config = trial.read_config()
    runtime = dataclasses.replace(config.runtime, stop_after=step)
    trial.create(dataclasses.replace(config, runtime=runtime))


def test_a_random_config_is_refused_or_trains(
    config_seed: int,
    data_roots: list[str],
    tmp_path: Path,
    launch: Callable,
    record_property: Callable[[str, str], None],
) -> None:
    """Two ranks: an attempt of two steps, and one that resumes, ends and probes.

    `--junitxml` counts the outcomes.
    """
    overrides, impossible = random_configs.draw(config_seed, data_roots)
    print(*overrides, sep="\n")
    names = [override.split("=")[0] for override in overrides]
    try:
        config = plan(tmp_path, overrides)
    except (ConfigError, DataError) as error:
        print("refused:", error)
        record_property("outcome", "refused")
        assert_helpful(error, names, impossible)
        return
    assert not impossible, f"{impossible} was accepted"
    trial = Root(tmp_path / "root").trial_of(config)
    trial.create(config)
    stop_after(trial, 2)
    codes = launch(trial).wait()
    if codes == [ExitCode.DONE] * 2:
        assert trial.committed()[-1] == 2
        stop_after(trial, 0)
        codes = launch(trial).wait()
    record = trial.attempts()[-1]
    if record["cause"] == "diverged":  # by limits that were drawn
        assert config.recipe.optim.divergence.enabled
        record_property("outcome", "diverged")
        return
    assert codes == [ExitCode.DONE] * 2, record
    assert record["start_step"] == 2
    done = read_json(trial.done)
    assert done["step"] == 3
    assert all(math.isfinite(value) for value in done["metrics"].values()), done
    record_property("outcome", "trained")


# ---- effects

NO_TRACE = {
    "data.max_corrupt": "acts on damaged images; test_pipeline_faults.py",
    "optim.divergence.enabled": "acts on a diverging run; test_diverging_run.py",
    "optim.divergence.spike": "the same",
    "optim.divergence.target_std": "the same",
    "optim.divergence.rankme": "the same",
    "optim.divergence.patience": "the same",
    "data.shuffle_block": "needs more blocks of images; test_sample_order.py",
    "data.shuffle_window": "the same",
    "optim.transfer": "needs a base width; tests/cpu/test_mup.py",
    "model.timm": "each option is compared with timm; test_ijepa.py",
}
# what else a setting needs to have an effect in three steps
BESIDE = {
    "mask.targets": ["mask.min_keep=1"],
    "mask.target_scale": ["mask.min_keep=1"],
    "mask.reference_batch": ["mask.mode=reference", "mask.min_keep=1"],
    "mask.keep_quantile": ["mask.min_keep=1"],
    "mask.min_keep": ["mask.mode=reference", "mask.target_scale=[0.2,0.25]"],
    "mask.mode": ["mask.context_scale=[0.5,0.6]", "mask.targets=1"],
    "optim.cooldown_steps": ["optim.schedule=wsd"],
    "optim.start_lr": ["optim.warmup_steps=2"],
    "optim.decay_shape": ["optim.weight_decay=0.1", "optim.final_weight_decay=2.0"],
    "optim.clip": ["optim.lr=0.01"],
    "optim.base_width.encoder": ["optim.transfer=mup"],
    "optim.base_width.encoder_head": ["optim.transfer=mup", "optim.base_width.encoder=32"],
    "optim.base_width.predictor": ["optim.transfer=mup", "optim.base_width.encoder=32"],
    "optim.base_width.predictor_head": ["optim.transfer=mup", "optim.base_width.encoder=32"],
}
SETTINGS = sorted(
    name
    for name in random_configs.DRAWN
    if not name.startswith("runtime.") and name not in NO_TRACE
)


def outcome(
    folder: Path,
    overrides: list[str],
    launch: Callable,
) -> list[dict[str, float]]:
    """Train three steps and probe -> the rows, without their times."""
    folder.mkdir()
    config = plan(folder, overrides)
    trial = Root(folder / "root").trial_of(config)
    trial.create(config)
    assert launch(trial).wait() == [ExitCode.DONE] * 2
    return [
        {name: value for name, value in row.values.items() if name not in WALL_CLOCK_METRICS}
        for row in spool.read(trial).rows
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_changes_what_is_trained(
    name: str, data_roots: list[str], tmp_path: Path, launch: Callable
) -> None:
    """Two values of each setting of the recipe leave different numbers behind."""
    usual, *_ = data_roots
    base = ["model=vit_nano", "data=demo", "optim=demo", "probe=demo", "runtime=demo"]
    base += [f"runtime.data_root={usual}", "runtime.log_every=1", "probe.labels=[class]"]
    base += ["optim.steps=3", "optim.warmup_steps=1", "optim.batch=8", "optim.lr=0.001"]
    beside = BESIDE.get(name, [])
    taken = {override.split("=")[0] for override in beside} | {name}
    base = [override for override in base if override.split("=")[0] not in taken]
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(40):
        value = random_configs.text(random_configs.DRAWN[name](random.Random(seed)))
        if value in found:
            continue
        with contextlib.suppress(ConfigError):
            overrides = [*base, *beside, f"{name}={value}"]
            found[value] = outcome(tmp_path / str(seed), overrides, launch)
        if len(found) == 2:
            break
    one, two = found.values()
    assert one != two, found.keys()
