"""Every knob in the project, on one page.

A trial is a `Recipe` (changes the numbers, so it is hashed and names the trial) and a `Runtime` (changes
only speed and place, never hashed). Values come from `conf/` in Hydra's grammar; this file holds the types,
what they mean, and the checks that need nothing but the values. It knows no disk, no Hydra and no torch.

Fields marked *derived* may be null in `conf/`; `sweep.resolve` fills them before the recipe is hashed, so a
frozen config has no null left that a later default could change.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

from jepa_cluster.errors import ConfigError, nearest

IDENTITY_VERSION = 1  # raise it when the same recipe would train to other numbers

Range = tuple[float, float]


@dataclass(frozen=True)
class Model:
    """The encoder: a timm VisionTransformer without class token. Sizes as in the paper's table of models."""

    name: str  # short and unique, part of the trial's name
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    patch: int  # px
    image: int  # px, square
    init: Literal["released", "depth_rescaled"] = "released"
    timm: Mapping[str, Any] = field(default_factory=dict[str, Any])  # further VisionTransformer arguments

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image // self.patch


@dataclass(frozen=True)
class Predictor:
    """The narrow transformer. `joint` puts all targets in one sequence: cheaper, and another model."""

    width: int
    depth: int
    heads: int
    mode: Literal["per_target", "joint"] = "per_target"


@dataclass(frozen=True)
class Mask:
    """Multi-block masking. Scales are fractions of the patch grid, aspects are height / width."""

    mode: str  # a name in ijepa.masks.SAMPLERS
    targets: int
    target_scale: Range
    target_aspect: Range
    context_scale: Range
    aspect_law: Literal["uniform", "log"] = "uniform"
    context_keep: int | None = None  # derived (clean): context tokens kept, the K of the random drop
    keep_quantile: float = 0.05  # clean: K is this quantile of the untruncated context size
    official_batch: int = 128  # official: the per-GPU batch whose shortest context truncates the others
    min_keep: int = 4  # fewest context tokens a sample may be left with


@dataclass(frozen=True)
class Data:
    """What is seen: the set (by digest, wherever it lies), its order and its crops."""

    name: str
    digest: str | None = None  # derived: fingerprint of the training index
    images: int | None = None  # derived: images in it
    order: Literal["global", "block"] = "global"
    block: int = 64  # block order: neighbouring samples read together
    window: int = 1024  # block order: blocks shuffled together
    crop_scale: Range = (0.3, 1.0)
    crop_aspect: Range = (0.75, 4 / 3)
    flip: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_corrupt: float = 0.001  # share of corrupt samples that stops the trial


@dataclass(frozen=True)
class Watch:
    """Spikes and collapse: what counts as one, and how often the trial may go back for it. See docs/training.md.

    It belongs to the recipe because it can change the numbers; so does its own cadence, `every`.
    """

    rollbacks: int = 0  # at most; one more and the trial fails as diverged. 0: nothing is watched
    every: int = 1000  # steps between anchors: checkpoints judged good, to which a rollback goes
    spike: float = 8.0  # gradient norm over its running geometric mean
    target_std: float = 0.02  # of the target's patches: less is a collapse
    rankme: float = 1.5  # of the probe at an anchor: less is a collapse
    patience: int = 3  # bad steps in a row that make a verdict


@dataclass(frozen=True)
class Optim:
    """One step of the optimiser and how its settings move. Epoch fields are turned into steps and nulled."""

    batch: int  # images a step, over all ranks
    steps: int | None  # derived from epochs when null
    epochs: float | None
    warmup_steps: int | None  # derived from warmup_epochs when null
    warmup_epochs: float | None
    start_lr: float
    lr: float
    final_lr: float
    weight_decay: float
    final_weight_decay: float
    decay_shape: Literal["cosine", "linear"]
    momentum: float  # of the target encoder
    final_momentum: float
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown_steps: int = 0  # wsd only
    stretch: float = 1.0  # schedules end at steps * stretch
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = None  # global gradient norm
    loss: Literal["smooth_l1", "l2"] = "smooth_l1"
    precision: Literal["bf16", "fp32"] = "bf16"
    watch: Watch = field(default_factory=Watch)


@dataclass(frozen=True)
class Probe:
    """What the frozen target encoder is measured with; its cadence is `Runtime.probe_every`."""

    images: int = 4096  # training images for the ridge probe
    test_images: int = 2048
    labels: tuple[str, ...] = ("class",)


@dataclass(frozen=True)
class Recipe:
    """Everything that changes the numbers. Hashed whole."""

    model: Model
    predictor: Predictor
    mask: Mask
    data: Data
    optim: Optim
    probe: Probe
    seed: int = 0


@dataclass(frozen=True)
class Runtime:
    """Everything that changes only speed and place."""

    data_root: str  # folder with the shards, index.npz and manifest.json of train/ and val/
    nodes: int = 1
    procs_per_node: int = 1  # one process a GPU; on CPU, gloo ranks
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch: int | None = None  # images a rank and backward; null: batch / world
    workers: int = 8  # decoding processes a rank; 0 decodes in the training process
    threads: int | None = None  # torch threads a rank; null: cores / ranks of the node
    compile: bool = False
    activation_checkpointing: bool = False
    shard: int | None = None  # ranks that share one copy; null: chosen by size
    log_every: int = 10  # steps
    probe_every: int = 0  # steps; 0: at the end only
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    milestone_every: int = 0  # steps between checkpoints kept for ever; 0: none
    milestones: tuple[int, ...] = ()  # further steps whose checkpoints are kept for ever
    fork_from: str | None = None  # the trial whose milestone this one may begin from, its trunk
    grace_seconds: float = 60.0  # between the signal and the kill
    hang_seconds: float = 300.0  # standing still for as long, and for 10 times the longest seen, is a hang
    peak_tflops: float | None = None  # dense, of one rank's device, for `mfu`; null: by the GPU's name
    stop_after: int = 0  # leave with a checkpoint after this step, as STOP does; 0: never
    kill_after: int | None = None  # every rank kills itself with SIGKILL after this step; for `jepa drill`
    stage: str | None = None  # node-local folder to copy shards to

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is a milestone, kept for ever."""
        return step in self.milestones or (self.milestone_every > 0 and step % self.milestone_every == 0)


@dataclass(frozen=True)
class TrialConfig:
    recipe: Recipe
    runtime: Runtime

    def identity(self) -> dict[str, Any]:
        """The document that is hashed and stored as identity.json."""
        return {"identity_version": IDENTITY_VERSION, "recipe": to_plain(self.recipe)}

    @functools.cached_property
    def id(self) -> str:
        """12 hex digits of SHA-256 over the canonical identity document."""
        parts = ",".join(f'"{f}":{_canonical(getattr(self.recipe, f))}' for f in sorted(_RECIPE))
        text = f'{{"identity_version":{IDENTITY_VERSION},"recipe":{{{parts}}}}}'  # = identity(), sorted, no spaces
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def name(self) -> str:
        """The directory's name: a function of the recipe alone, so equal trials of two sweeps meet."""
        r = self.recipe
        low, high = (f"{v:.3f}".strip("0") or "0" for v in r.mask.target_scale)
        return f"{r.model.name}-ts{low}-{high}-s{r.seed}-{self.id}"


_RECIPE = tuple(f.name for f in dataclasses.fields(Recipe))
SECTIONS = (*_RECIPE, "runtime")
_canon: dict[int, tuple[Any, str]] = {}  # id of a section -> it and its text: the trials of a sweep share sections


def _canonical(section: Any) -> str:
    known = _canon.get(id(section))
    if known is None or known[0] is not section:
        if len(_canon) > 4096:
            _canon.clear()
        known = _canon[id(section)] = section, json.dumps(to_plain(section), sort_keys=True, separators=(",", ":"))
    return known[1]


T = TypeVar("T")


def from_plain(values: Mapping[str, Any], where: str = "") -> TrialConfig:
    """A flat mapping of sections (`model`, `mask`, ..., `seed`, `runtime`) -> TrialConfig.

    Raises ConfigError for an unknown, missing or wrongly typed key, and for values that cannot work together.
    """
    values = dict(values)
    unknown = set(values) - set(SECTIONS)
    if unknown:
        key = min(unknown)
        raise ConfigError(f"unknown setting '{key}'", where=where, now=nearest(key, SECTIONS))
    runtime = build(Runtime, values.pop("runtime", {}), "runtime", where)
    config = TrialConfig(build(Recipe, values, "", where), runtime)
    check(config, where)
    return config


def to_plain(value: Any) -> Any:
    """Dataclasses and tuples as plain dicts and lists, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in cast("list[Any]", value)]
    return value


def flatten(config: TrialConfig) -> dict[str, Any]:
    """The inverse of from_plain: one mapping of sections, plain values."""
    return {**to_plain(config.recipe), "runtime": to_plain(config.runtime)}


def build(cls: type[T], values: object, key: str, where: str = "") -> T:
    """A mapping -> the frozen dataclass `cls`, strictly: no unknown key, no missing key, no silent cast."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key or cls.__name__} wants a mapping, got {values!r}", where=where)
    given = cast(Mapping[str, Any], values)
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    dot = f"{key}." if key else ""
    for name in given:
        if name not in fields:
            raise ConfigError(f"unknown setting '{dot}{name}'", where=where, now=nearest(name, fields))
    out: dict[str, Any] = {}
    for name, f in fields.items():
        if name in given:
            out[name] = _convert(given[name], hints[name], dot + name, where)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ConfigError(f"'{dot}{name}' is missing", where=where, now=f"set {dot}{name}=...")
    return cls(**out)


def settings(cls: type[Any], key: str = "") -> list[str]:
    """Dotted names of every setting below a section."""
    found: list[str] = []
    for name, hint in _hints(cls).items():
        dotted = f"{key}.{name}" if key else name
        found += settings(cast("type[Any]", hint), dotted) if dataclasses.is_dataclass(hint) else [dotted]
    return found


_hints = functools.cache(typing.get_type_hints)


def _convert(value: Any, hint: Any, key: str, where: str) -> Any:
    def wrong(want: str) -> ConfigError:
        return ConfigError(
            f"{key} wants {want}, got {value!r}",
            where=where,
            now=f"set {key}={want if want[0] == '[' else f'<{want}>'}",
        )

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return build(cast("type[Any]", hint), value, key, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), key, where)
    if origin is Literal:
        if value not in args:
            options = ", ".join(map(str, args))
            raise ConfigError(
                f"{key} wants one of {options}, got {value!r}", where=where, now=nearest(str(value), map(str, args))
            )
        return value
    if origin is tuple:
        pair = key.endswith(("_scale", "_aspect"))
        if not isinstance(value, (list, tuple)):
            raise wrong("[low, high]" if pair else "a list")
        items = list(cast("list[Any]", value))
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(items) != len(kinds):
            raise wrong("[low, high]" if pair else f"{len(kinds)} values")
        return tuple(_convert(v, k, f"{key}[{i}]", where) for i, (v, k) in enumerate(zip(items, kinds, strict=True)))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise wrong("a mapping")
        return to_plain(cast(Mapping[str, Any], value))
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise wrong({float: "a number", int: "an integer", str: "text", bool: "true or false"}.get(hint, str(hint)))


def check(config: TrialConfig, where: str = "") -> None:
    """Values that are well typed but cannot work, alone or together: one ConfigError, the first found."""
    r, runtime = config.recipe, config.runtime
    m, p, k, d, o = r.model, r.predictor, r.mask, r.data, r.optim

    def need(ok: bool, what: str, now: str) -> None:
        if not ok:
            raise ConfigError(what, where=where, now=now)

    for name, width, heads in (("model", m.width, m.heads), ("predictor", p.width, p.heads)):
        need(width > 0 and heads > 0, f"{name}.width={width}, {name}.heads={heads}: both must be positive", "")
        need(
            width % heads == 0,
            f"{name}.heads={heads} does not divide {name}.width={width}",
            f"heads that do: {[h for h in range(1, 65) if width % h == 0]}",
        )
        need(
            width % 4 == 0,
            f"{name}.width={width} is not a multiple of 4, which 2-D sin-cos positions need",
            f"the nearest is {name}.width={round(width / 4) * 4 or 4}",
        )
    need(m.depth > 0 and p.depth > 0, f"depth must be positive: model {m.depth}, predictor {p.depth}", "")
    need(
        m.patch > 0 and m.image % m.patch == 0,
        f"model.image={m.image} is not a multiple of model.patch={m.patch}",
        f"the nearest is model.image={round(m.image / max(m.patch, 1)) * m.patch}",
    )
    need(
        m.grid >= 4,
        f"the grid is {m.grid}x{m.grid} patches; the masks need at least 4x4",
        "raise model.image or lower model.patch",
    )
    for key, (low, high), top in (
        ("mask.target_scale", k.target_scale, 1.0),
        ("mask.context_scale", k.context_scale, 1.0),
        ("mask.target_aspect", k.target_aspect, 100.0),
        ("data.crop_scale", d.crop_scale, 1.0),
        ("data.crop_aspect", d.crop_aspect, 100.0),
    ):
        need(
            0 < low <= high <= top,
            f"{key}=[{low}, {high}] is not an interval inside (0, {top:g}]",
            "write it as [low, high]",
        )
    need(1 <= k.targets <= 16, f"mask.targets={k.targets} is not between 1 and 16", "the paper uses 4")
    need(0 < k.keep_quantile < 1, f"mask.keep_quantile={k.keep_quantile} is not inside (0, 1)", "")
    need(
        k.context_keep is None or 1 <= k.context_keep <= m.grid**2,
        f"mask.context_keep={k.context_keep} is not between 1 and the {m.grid**2} patches of the grid",
        "",
    )
    for key, value, low in (
        ("seed", r.seed, 0),
        ("data.block", d.block, 1),
        ("data.window", d.window, 1),
        ("runtime.workers", runtime.workers, 0),
    ):
        need(low <= value < 1 << 63, f"{key}={value} is not {low} or more", "")
    need(0 <= d.max_corrupt <= 1, f"data.max_corrupt={d.max_corrupt} is not a share between 0 and 1", "")
    need(o.batch > 0, f"optim.batch={o.batch} is not positive", "")
    need(o.steps is not None or o.epochs is not None, "neither optim.steps nor optim.epochs is set", "set one of them")
    need(o.steps is None or o.steps > 0, f"optim.steps={o.steps} is not positive", "")
    for key, value in (("lr", o.lr), ("momentum", o.momentum), ("final_momentum", o.final_momentum)):
        need(0 < value <= 1, f"optim.{key}={value} is not inside (0, 1]", "")
    for key, value in (("every", o.watch.every), ("patience", o.watch.patience)):
        need(value > 0, f"optim.watch.{key}={value} is not positive", "optim.watch.rollbacks=0 switches the watch off")
    world = runtime.nodes * runtime.procs_per_node
    need(world > 0, f"runtime.nodes={runtime.nodes} x procs_per_node={runtime.procs_per_node}: nothing would run", "")
    need(
        o.batch % world == 0,
        f"optim.batch={o.batch} cannot be shared equally by {world} ranks",
        f"the nearest batches are {o.batch // world * world} and {(o.batch // world + 1) * world}, "
        f"the nearest world size is {max(w for w in range(1, world + 1) if o.batch % w == 0)}",
    )
    if runtime.micro_batch is not None:
        need(
            runtime.micro_batch > 0 and (o.batch // world) % runtime.micro_batch == 0,
            f"runtime.micro_batch={runtime.micro_batch} does not divide the {o.batch // world} images of a rank",
            f"micro-batches that do: {[b for b in range(1, o.batch // world + 1) if (o.batch // world) % b == 0]}",
        )
    need(
        runtime.keep_checkpoints >= 2,
        f"runtime.keep_checkpoints={runtime.keep_checkpoints} leaves no second one to fall back on",
        "set runtime.keep_checkpoints=2 or more",
    )
