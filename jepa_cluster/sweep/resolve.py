"""Points become composed, validated, frozen configs. Typos end here.

In: a `Sweep`, the `conf/` folder, and what the cluster profile says of place (`Need`, runtime settings).
Out: one `Trial` a point and seed, its config complete: every derived value is filled in, so nothing that is
hashed can follow a default that changes later. Hydra composes once per set of group choices (125 ms); the
values of a point are merged into that plain mapping. It knows no scheduler and imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jepa_cluster.config import (
    SECTIONS,
    Data,
    Mask,
    Model,
    Optim,
    Predictor,
    Probe,
    Recipe,
    Runtime,
    TrialConfig,
    build,
    check,
    from_plain,
)
from jepa_cluster.errors import ConfigError, DataError, nearest
from jepa_cluster.ijepa import schedules
from jepa_cluster.sweep.definition import HORIZON, Need, Point, Sweep, label, shortest
from jepa_cluster.sweep.expression import Expression

Plain = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One point and seed, resolved. minutes: its time limit."""

    point: Point
    seed: int
    config: TrialConfig
    minutes: int

    @property
    def label(self) -> str:
        """'vit_s target_scale=.15-.2 s0': words as a selection takes them; what is no number needs no name."""
        words = [
            label(v) if isinstance(v, str) else f"{shortest(a, self.point)}={label(v)}" for a, v in self.point.items()
        ]
        return " ".join([*words, f"s{self.seed}"])

    @property
    def trunk(self) -> str | None:
        """The trial it is a branch of."""
        return self.config.runtime.fork_from

    @property
    def begins(self) -> int:
        """The step that its own work begins from: where a branch leaves its trunk, else 0."""
        optim = self.config.recipe.optim
        return (optim.steps or 0) - optim.cooldown_steps if self.trunk else 0


def conf_dir() -> Path:
    """`conf/` beside the package (a clone, a code snapshot) or inside it (an installed wheel)."""
    package = Path(__file__).parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError("the conf/ folder is missing", where=str(package), now="install jepa_cluster again")


def resolve(sweep: Sweep, fallback: Need, runtime: Mapping[str, Any], composer: Composer | None = None) -> list[Trial]:
    """Every trial of the sweep, in its order.

    fallback: what a trial gets when no rule of `resources` says otherwise; complete. runtime: the profile's
    settings, which the sweep's own overrides replace. Raises ConfigError naming the setting, the nearest known
    name, and the sweep file's line; DataError when the data's manifest is missing.
    """
    composer = composer or Composer(conf_dir(), runtime)
    base = [composer.override(text, sweep.source.where("base", i)) for i, text in enumerate(sweep.base)]
    rules = [(n, sweep.expression("when", n.when, "resources", i)) for i, n in enumerate(sweep.resources) if n.when]
    trials: list[Trial] = []
    seen: dict[str, str] = {}
    for point, seed in sweep.points():
        wheres = {axis: _where(sweep, axis) for axis in point}
        plain = composer.compose([*base, *((a, v, wheres[a]) for a, v in point.items())])
        plain["seed"] = seed
        if sweep.fork:
            plain["optim"] |= {"schedule": "wsd", "cooldown_steps": sweep.fork.cooldown_steps(point[HORIZON])}
        need = _need(sweep, rules, plain, {**point, "seed": seed}, fallback)
        plain["runtime"] |= {"nodes": need.nodes, "procs_per_node": need.procs_per_node}
        told = "; ".join(f"{a}={label(v)}" for a, v in point.items()) or "the only point"
        try:
            config = freeze(plain, told)
        except ConfigError as e:
            raise ConfigError(e.what, where=f"{_blamed(sweep, e.what)}: {e.where}", now=e.now) from e
        trial = Trial(point, seed, config, need.minutes or 60)
        if config.id in seen:
            raise sweep.source.error(
                f"two points are the same trial {config.id}: '{seen[config.id]}' and '{trial.label}'",
                now="drop one of them, or the axis that changes nothing",
            )
        seen[config.id] = trial.label
        trials.append(trial)
    if not trials:
        raise sweep.source.error("no point is left", "where", now="loosen `where`")
    return link(sweep, trials) if sweep.fork and not sweep.fork.from_zero else trials


def link(sweep: Sweep, trials: list[Trial]) -> list[Trial]:
    """Give the longest trial of each point and seed its milestones, and the shorter ones their trunk.

    Raises SweepFileError when a branch would part from its trunk before it cools down.
    """
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {k: v for k, v in trial.point.items() if k != HORIZON}
        groups.setdefault(json.dumps([rest, trial.seed]), []).append(trial)
    linked: dict[str, Trial] = {}
    for members in groups.values():
        *branches, trunk = sorted(members, key=lambda t: t.point[HORIZON])
        name, steps = trunk.config.name, list[int]()
        for branch in branches:
            linked[branch.config.name] = made = _runtime(branch, fork_from=name)
            steps.append(made.begins)
            if schedules.shared_prefix_steps(trunk.config.recipe.optim, branch.config.recipe.optim) != made.begins:
                raise sweep.source.error(
                    f"'{branch.label}' and its trunk '{trunk.label}' part before step {made.begins}",
                    "fork",
                    now="base: [optim=wsd]; decay and momentum must not move, or share nothing: from_zero: true",
                )
            watch = branch.config.recipe.optim.watch
            if watch.rollbacks and made.begins % watch.every:
                raise sweep.source.error(
                    f"'{branch.label}' leaves its trunk at step {made.begins}, which is no anchor of the watch",
                    "fork",
                    now=f"let plateaus end at multiples of optim.watch.every={watch.every}, or change that",
                )
        linked[name] = _runtime(trunk, milestones=tuple(steps))
    return [linked[t.config.name] for t in trials]


def _runtime(trial: Trial, **changes: Any) -> Trial:
    config = trial.config
    runtime = dataclasses.replace(config.runtime, **changes)
    return dataclasses.replace(trial, config=TrialConfig(config.recipe, runtime))


def freeze(plain: Plain, where: str = "") -> TrialConfig:
    """A composed mapping -> the config, its derived values filled in."""
    runtime = plain["runtime"]
    if isinstance(runtime.get("data_root"), str):
        runtime["data_root"] = str(Path(runtime["data_root"]).expanduser().absolute())
    texts = {k: json.dumps(v) for k, v in plain.items() if k != "seed"}
    config = _typed(plain, texts, where)
    try:
        plain["mask"]["context_keep"] = _keep(texts["mask"], config.recipe.model.grid)
    except ConfigError as e:
        raise ConfigError(e.what, where="; ".join(w for w in (where, e.where) if w), now=e.now) from e
    _derive_data(plain, where)
    _derive_steps(plain["optim"], plain["data"]["images"], where)
    derived = {
        k: _filled(_SECTION[k], texts[k], tuple((name, plain[k][name]) for name in names))
        for k, names in _DERIVED.items()
    }
    return TrialConfig(dataclasses.replace(config.recipe, **derived), config.runtime)


_DERIVED = {
    "mask": ("context_keep",),
    "data": ("digest", "images"),
    "optim": ("steps", "epochs", "warmup_steps", "warmup_epochs"),
}


def _typed(plain: Plain, texts: Mapping[str, str], where: str) -> TrialConfig:
    """from_plain, with sections that many points share built once. texts: the sections as JSON."""
    if set(plain) != set(SECTIONS):
        return from_plain(plain, where)  # which says what is missing or unknown
    try:
        built = {k: _build(_SECTION[k], text) for k, text in texts.items()}
    except ConfigError as e:
        raise ConfigError(e.what, where=where, now=e.now) from e
    except (TypeError, ValueError):
        return from_plain(plain, where)
    config = TrialConfig(
        Recipe(**{k: v for k, v in built.items() if k != "runtime"}, seed=plain["seed"]), built["runtime"]
    )
    check(config, where)
    return config


_SECTION: Mapping[str, Any] = {
    "model": Model, "predictor": Predictor, "mask": Mask, "data": Data, "optim": Optim, "probe": Probe,
    "runtime": Runtime,
}  # fmt: skip


@functools.lru_cache(4096)
def _build(cls: type[Any], text: str) -> Any:
    return build(cls, json.loads(text), cls.__name__.lower())


@functools.lru_cache(4096)
def _filled(cls: type[Any], text: str, derived: tuple[tuple[str, Any], ...]) -> Any:
    """A section with its derived values: one object for all trials that share it."""
    return dataclasses.replace(_build(cls, text), **dict(derived))


def _derive_data(plain: Plain, where: str) -> None:
    data = plain["data"]
    folder = Path(plain["runtime"]["data_root"])
    try:
        digest, images = _manifest(str(folder / "train"))
    except DataError as e:
        usual = folder == Path(os.environ.get("JEPA_DATA", "data")).absolute()
        now = f"export JEPA_DATA=<where the shards are>, or {e.now}" if usual else e.now
        raise DataError(e.what, where=e.where, now=now) from e
    if data.get("digest") not in (None, digest):
        raise ConfigError(
            f"data.digest={data['digest']} is asked for, but the shards have {digest}",
            where=where or plain["runtime"]["data_root"],
            now="point runtime.data_root at the other shards, or leave data.digest out",
        )
    data["digest"], data["images"] = digest, images


def _derive_steps(optim: Plain, images: int, where: str) -> None:
    """Epoch fields become steps: the steps that see `epochs * images` images, rounded down, at least one."""
    for steps, epochs in (("steps", "epochs"), ("warmup_steps", "warmup_epochs")):
        if optim[steps] is None:
            least = 1 if steps == "steps" else 0
            optim[steps] = max(int((optim[epochs] or 0) * images / optim["batch"]), least)
        optim[epochs] = None
    if optim["warmup_steps"] >= optim["steps"]:
        raise ConfigError(
            f"a warm-up of {optim['warmup_steps']} steps does not end within {optim['steps']} steps",
            where=where,
            now="set optim.warmup_steps, or train longer",
        )


@functools.cache
def _manifest(folder: str) -> tuple[str, int]:
    from jepa_cluster.data import manifest

    found = manifest.read(Path(folder))
    return found.digest, found.images


@functools.cache
def _keep(text: str, grid: int) -> int | None:
    """K for masks that have one; ConfigError when these masks cannot be drawn on this grid."""
    from jepa_cluster.ijepa import masks

    mask = build(Mask, json.loads(text), "mask")
    masks.check(mask, grid)
    return masks.context_keep(mask, grid)


def _where(sweep: Sweep, axis: str) -> str:
    for key in ("grid", "zip", "list"):
        found = sweep.source.where(key, axis)
        if found != sweep.source.where(key):
            return found
    return sweep.source.file


def _blamed(sweep: Sweep, what: str) -> str:
    """File and line of what an error speaks of: an axis, an override of base, else the file."""
    lines = {a: _where(sweep, a) for a in sweep.axes}
    lines |= {text.partition("=")[0]: sweep.source.where("base", i) for i, text in enumerate(sweep.base)}
    named = [name for name in lines if re.match(rf"{re.escape(name)}(\W|$)", what)]
    return lines[max(named, key=len)] if named else sweep.source.file or sweep.name


def _need(sweep: Sweep, rules: list[tuple[Need, Expression]], plain: Plain, point: Point, fallback: Need) -> Need:
    """The first rule that holds, completed from the profile. Names are axes, then settings of the composed config."""

    def lookup(name: str) -> Any:
        if name in point:
            return point[name]
        value: Any = plain
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise ConfigError(f"no setting is called '{name}'", now=nearest(name, [*point, *leaves(plain)]))
            value = cast("Mapping[str, Any]", value)[part]
        return cast("Mapping[str, Any]", value).get("name") if isinstance(value, Mapping) else value

    expressions = dict(rules)
    for i, need in enumerate(sweep.resources):
        try:
            if need.when and not expressions[need](lookup):
                continue
        except ConfigError as e:
            raise sweep.source.error(f"when: {e.what}", "resources", i, "when", now=e.now) from e
        return Need("", *(getattr(need, k) or getattr(fallback, k) for k in ("nodes", "procs_per_node", "minutes")))
    return fallback


def leaves(plain: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of every setting of a composed config."""
    names: list[str] = []
    for key, value in plain.items():
        inner = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}
        names += leaves(inner, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return names


Override = tuple[str, Any, str]  # setting or group, value, where it was written


class Composer:
    """`conf/` through Hydra, once per set of group choices."""

    def __init__(self, conf: Path, runtime: Mapping[str, Any]) -> None:
        self.conf, self.runtime = conf, runtime
        self.groups = {
            p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in conf.iterdir() if any(p.glob("*.yaml"))
        }
        self._composed: dict[tuple[str, ...], Plain] = {}

    def override(self, text: str, where: str) -> Override:
        """'optim.lr=1e-3' in Hydra's grammar -> (key, value, where). A leading + is allowed, for free-form keys."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        try:
            parsed = OverridesParser.create().parse_override(text)
            if parsed.is_sweep_override() or parsed.is_delete() or parsed.package:
                raise ConfigError(f"'{text}' is no plain setting", where=where, now="sweep it as an axis of grid")
            value: Any = parsed.value()
        except (HydraException, ValueError) as e:
            message = str(e).splitlines()[0]
            raise ConfigError(f"not a Hydra override: '{text}' ({message})", where=where, now="key=value") from e
        return parsed.key_or_group, value, where

    def compose(self, overrides: list[Override]) -> Plain:
        """A fresh mapping with group choices composed, the profile's runtime and then the values merged in."""
        choices: list[str] = []
        for key, value, where in overrides:
            if key in self.groups:
                if value not in self.groups[key]:
                    now = nearest(str(value), self.groups[key])
                    raise ConfigError(f"no {key} is called {value!r}", where=where, now=now)
                choices.append(f"{key}={value}")
        plain = _copy(self._groups(tuple(choices)))
        for key, value in self.runtime.items():
            _set(plain, f"runtime.{key}", value, "the cluster profile")
        for key, value, where in overrides:
            if key not in self.groups:
                _set(plain, key, value, where)
        return plain

    def _groups(self, choices: tuple[str, ...]) -> Plain:
        if choices not in self._composed:
            from hydra import compose, initialize_config_dir
            from hydra.errors import HydraException
            from omegaconf import OmegaConf
            from omegaconf.errors import OmegaConfBaseException

            try:
                with initialize_config_dir(str(self.conf.absolute()), version_base="1.3"):
                    config = compose("config", list(choices))
                plain = OmegaConf.to_container(config, resolve=True)
            except (HydraException, OmegaConfBaseException) as e:
                raise ConfigError(f"conf/ does not compose: {e}", where=str(self.conf)) from e
            plain = cast(Plain, plain)
            plain.pop("hydra", None)
            self._composed[choices] = plain
        return self._composed[choices]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in cast(Plain, value).items()}
    return [_copy(v) for v in cast("list[Any]", value)] if isinstance(value, list) else value


def _set(plain: Plain, key: str, value: Any, where: str) -> None:
    """Replace one existing setting; below model.timm, where any key is allowed, it may be new."""
    at: Any = plain
    *folders, last = key.split(".")
    for part in folders:
        at = cast(Plain, at).get(part) if isinstance(at, dict) else None
    free = key.startswith("model.timm.")
    if not isinstance(at, dict) or (last not in at and not free):
        now = nearest(key, leaves(plain))
        if isinstance(at, dict) and folders:  # the section is right: look for the nearest name within it
            now = nearest(key, [".".join([*folders, name]) for name in cast(Plain, at)])
        raise ConfigError(f"unknown setting '{key}'", where=where, now=now)
    if isinstance(cast(Plain, at).get(last), dict) and not isinstance(value, dict):
        raise ConfigError(f"'{key}' is a section, not a setting; got {label(value)!r}", where=where)
    at[last] = _copy(value)
