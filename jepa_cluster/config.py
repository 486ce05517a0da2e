"""All settings of a trial: types, meanings, and the checks that need only their values.

A trial is a `Recipe` and a `Runtime`. The recipe changes the numbers; it is hashed and names the
trial. The runtime changes only speed and placement. Values come from `conf/`. This file knows no
disk, Hydra or torch.

Fields marked *derived* may be null in `conf/`. `sweep.resolve` fills them before the recipe is
hashed, so that no later default can change a frozen config.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jepa_cluster.config_ranges import Range, check_ranges, check_timm_names
from jepa_cluster.config_widths import Widths, growth
from jepa_cluster.errors import ConfigError
from jepa_cluster.schema import ConfigDict, build_dataclass, non_defaults, setting_names, to_dict

IDENTITY_VERSION = 2  # raise it when the same recipe would train to other numbers


def _require(valid: bool, what: str, hint: str = "") -> None:
    """Raise ConfigError unless valid; `config_from_dict` adds where the values come from."""
    if not valid:
        raise ConfigError(what, hint=hint)


def _check_interval(key: str, interval: Range, largest: float = 1.0) -> None:
    low, high = interval
    what = f"{key}=[{low}, {high}] is not an interval inside (0, {largest:g}]"
    _require(0 < low <= high <= largest, what, "write it as [low, high]")


def _check_transformer(key: str, width: int, heads: int, depth: int) -> None:
    for name, value in (("width", width), ("heads", heads), ("depth", depth)):
        _require(value > 0, f"{key}.{name}={value} is not 1 or more")
    divisors = [h for h in range(1, 65) if width % h == 0]
    what = f"{key}.heads={heads} does not divide {key}.width={width}"
    _require(width % heads == 0, what, f"heads that do: {divisors}")
    what = f"{key}.width={width} is not a multiple of 4, which 2-D sin-cos positions need"
    _require(width % 4 == 0, what, f"the nearest is {key}.width={round(width / 4) * 4 or 4}")


@dataclass(frozen=True)
class Model:
    """The encoder: a timm VisionTransformer without class token."""

    name: str  # short and unique; part of the trial's name
    width: int  # features per token; a multiple of 4 and of `heads`
    depth: int  # blocks
    heads: int
    mlp_ratio: float  # hidden features of the MLP / width
    patch: int  # px, side of a patch
    image: int  # px, side of the square crop; a multiple of `patch`
    # Of the weights. fan_in: a standard deviation of 1 / sqrt(inputs) instead of 0.02
    init: Literal["reference", "depth_rescaled", "fan_in"] = "reference"
    timm: Mapping[str, Any] = field(default_factory=dict[str, Any])  # more arguments of timm

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image // self.patch

    def check(self) -> None:
        what = f"model.name={self.name!r} names folders: letters, digits and _ . + - only"
        _require(re.fullmatch(r"\w[\w.+-]*", self.name, re.ASCII) is not None, what)
        check_timm_names(self.timm)
        _check_transformer("model", self.width, self.heads, self.depth)
        _require(self.patch > 0, f"model.patch={self.patch} is not 1 or more")
        nearest = round(self.image / self.patch) * self.patch
        what = f"model.image={self.image} is not a multiple of model.patch={self.patch}"
        _require(self.image % self.patch == 0, what, f"the nearest is model.image={nearest}")
        what = f"model.image={self.image} is {self.grid}x{self.grid} patches of {self.patch} px"
        what += "; the masks need at least 4x4"
        _require(self.grid >= 4, what, "raise model.image or lower model.patch")


@dataclass(frozen=True)
class Predictor:
    """The transformer that predicts target tokens from context tokens."""

    width: int  # features per token; a multiple of 4 and of `heads`
    depth: int  # blocks
    heads: int
    mode: Literal["per_target", "joint"] = "per_target"  # joint: all targets in one sequence

    def check(self) -> None:
        _check_transformer("predictor", self.width, self.heads, self.depth)


@dataclass(frozen=True)
class Mask:
    """Multi-block masking. Scales are fractions of the patch grid, aspects are height / width."""

    mode: str  # a name in ijepa.masks.SAMPLERS
    targets: int  # target blocks per sample, 1 to 16
    target_scale: Range  # of one target block
    target_aspect: Range
    context_scale: Range  # of the context block, before the targets are removed from it
    aspect_distribution: Literal["uniform", "log"] = "uniform"  # distribution of target_aspect
    context_keep: int | None = None  # derived, modes with a fixed K: context tokens that are kept
    keep_quantile: float = 0.05  # multiblock: K is this quantile of the untruncated context size
    reference_batch: int = 128  # reference: images per GPU, cut to the shortest context among them
    min_keep: int = 4  # fewest context tokens of a sample
    target_patches: int | None = None  # derived: of the largest target, if earlier versions cut it

    def check(self) -> None:
        _check_interval("mask.target_scale", self.target_scale)
        _check_interval("mask.context_scale", self.context_scale)
        _check_interval("mask.target_aspect", self.target_aspect, largest=100)
        what = f"mask.keep_quantile={self.keep_quantile} is not inside (0, 1)"
        _require(0 < self.keep_quantile < 1, what)


@dataclass(frozen=True)
class Data:
    """The training set, the order of its samples and their crops."""

    name: str  # of the set, for people; `digest` identifies it
    digest: str | None = None  # derived: fingerprint of the training index
    images: int | None = None  # derived: images in it
    # Derived: fingerprint of the validation index; null: earlier versions trained without one
    val_digest: str | None = None
    order: Literal["global", "block"] = "global"  # shuffle images, or blocks of neighbouring images
    shuffle_block: int = 64  # order=block: neighbouring images that are read together
    shuffle_window: int = 1024  # order=block: blocks that are shuffled together
    crop_scale: Range = (0.3, 1.0)  # fraction of the image's area
    crop_aspect: Range = (0.75, 4 / 3)  # width / height of the crop
    flip: bool = False  # flip horizontally with probability 0.5
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB, of pixels in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    max_corrupt: float = 0.001  # fraction of corrupt samples above which the trial fails

    def check(self) -> None:
        _check_interval("data.crop_scale", self.crop_scale)
        _check_interval("data.crop_aspect", self.crop_aspect, largest=100)


@dataclass(frozen=True)
class Objective:
    """What the predictor is trained for."""

    loss: Literal["smooth_l1", "l2"] = "smooth_l1"  # names a function of ijepa/losses.py
    # What is predicted: the representation of the target encoder, that of an untrained one, or the
    # pixels of each patch, normalised. views: nothing (ijepa/vicreg.py)
    target: Literal["representation", "frozen", "pixels", "views"] = "representation"


@dataclass(frozen=True)
class DivergenceConfig:
    """What counts as divergence or collapse, which ends the trial as failed.

    See docs/training.md.
    """

    enabled: bool = False
    # A gradient norm above so many times its running geometric mean is suspicious
    spike: float = 8.0
    target_std: float = 0.02  # of the target's patches: less is suspicious
    rankme: float = 1.5  # of a probe: less is a verdict
    patience: int = 3  # suspicious steps in a row that make a verdict


@dataclass(frozen=True)
class Optim:
    """The optimiser and its schedules. A frozen config has steps in place of epochs."""

    batch: int  # images per step, over all ranks
    steps: int | None  # derived from `epochs` when null
    epochs: float | None
    warmup_steps: int | None  # derived from `warmup_epochs` when null; fewer than `steps`
    warmup_epochs: float | None
    start_lr: float  # at step 0; rises linearly to `lr` during the warm-up
    lr: float  # at the end of the warm-up
    final_lr: float  # at steps * schedule_stretch (cosine), or at the end of the cool-down (wsd)
    weight_decay: float  # at step 0
    final_weight_decay: float  # at steps * schedule_stretch
    decay_shape: Literal["cosine", "linear"]  # of the way from weight_decay to final_weight_decay
    momentum: float  # of the target encoder, at step 0
    final_momentum: float  # at steps * schedule_stretch
    schedule: Literal["cosine", "wsd"] = "cosine"  # of lr; wsd: warm-up, constant, linear cool-down
    cooldown_steps: int = 0  # wsd: last steps, in which lr falls to final_lr
    # Schedules end at steps * schedule_stretch; training ends at `steps`
    schedule_stretch: float = 1.0
    momentum_steps: float | None = None  # derived: steps * schedule_stretch, if it is not whole
    betas: tuple[float, float] = (0.9, 0.999)  # of AdamW
    eps: float = 1e-8  # of AdamW
    clip: float | None = None  # largest global gradient norm; null: no clipping
    # mup: rates, initial scales and attention follow the widths, so that one lr fits all of them
    transfer: Literal["none", "mup"] = "none"
    base_width: Widths = field(default_factory=Widths)  # at which mup changes nothing
    # Of the forward and backward pass. bf16: all of it; autocast: residual stream and norms in fp32
    precision: Literal["bf16", "autocast", "fp32"] = "bf16"
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)

    def check(self) -> None:
        has_length = self.steps is not None or self.epochs is not None
        _require(has_length, "neither optim.steps nor optim.epochs is set", "set one of them")


@dataclass(frozen=True)
class Probe:
    """The evaluation of the frozen target encoder; `Runtime.probe_every` says how often."""

    images: int = 4096  # training images for the ridge probe
    test_images: int = 2048  # validation images
    labels: tuple[str, ...] = ("class",)  # columns of the index that are predicted


@dataclass(frozen=True)
class Recipe:
    """Everything that changes the numbers. All of it is hashed."""

    model: Model
    predictor: Predictor
    mask: Mask
    data: Data
    optim: Optim
    probe: Probe
    objective: Objective = field(default_factory=Objective)
    seed: int = 0  # of initialisation, order, crops and masks

    @property
    def target_width(self) -> int:
        """Numbers that the predictor predicts of a patch."""
        widths = {"pixels": 3 * self.model.patch**2, "views": 0}
        return widths.get(self.objective.target, self.model.width)

    @property
    def growth(self) -> Mapping[str, float]:
        """How many times wider than the base each of `Widths` is; 1 without mup."""
        heads = [section.width // section.heads for section in (self.model, self.predictor)]
        own = Widths(self.model.width, heads[0], self.predictor.width, heads[1])
        return growth(own, self.optim.base_width if self.optim.transfer == "mup" else own)

    def check(self) -> None:
        for section in (self.model, self.predictor, self.mask, self.data, self.optim):
            section.check()
        _require(0 <= self.seed < 1 << 63, f"seed={self.seed} is not 0 or more")
        is_views = self.objective.target == "views" or self.mask.mode != "views"
        _require(is_views, "mask.mode=views needs objective.target=views")
        what = "objective.target=pixels with optim.precision=bf16 would round what is predicted"
        rounded = self.objective.target == "pixels" and self.optim.precision == "bf16"
        _require(not rounded, what, "optim.precision=autocast, or fp32")
        if self.optim.transfer == "mup":
            self._check_mup()
        keep, patches = self.mask.context_keep, self.model.grid**2
        what = f"mask.context_keep={keep} is not between 1 and the {patches} patches of the grid"
        _require(keep is None or 1 <= keep <= patches, what)

    def _check_mup(self) -> None:
        what, hint = "optim.transfer=mup needs ", "set it to the narrowest width of the sweep"
        _require(self.objective.target != "views", f"{what}a predictor: no objective.target=views")
        _require(self.optim.base_width.encoder is not None, f"{what}optim.base_width.encoder", hint)
        _require(self.model.init == "fan_in", f"{what}model.init=fan_in")
        _require("attn_layer" not in self.model.timm, f"{what}the usual model.timm.attn_layer")
        for name, factor in self.growth.items():
            _require(factor >= 1, f"optim.base_width.{name} is above that of the model", hint)


@dataclass(frozen=True)
class Runtime:
    """Everything that changes only speed and placement. Ranks are nodes * procs_per_node."""

    data_root: str  # folder with shards, index.npz and manifest.json of train/ and val/
    nodes: int = 1
    procs_per_node: int = 1  # one process per GPU; on CPU, gloo ranks
    device: Literal["auto", "cpu", "cuda"] = "auto"
    micro_batch: int | None = None  # images per rank and backward; null: all images of the rank
    workers: int = 8  # decoding processes per rank; 0 decodes in the training process
    threads: int | None = None  # of torch per rank; null: OMP_NUM_THREADS, else its cores
    compile: bool = False  # torch.compile
    activation_checkpointing: bool = False  # less memory, more compute
    # Ranks that share one copy of the weights; null: chosen by model size
    fsdp_shard_size: int | None = None
    log_every: int = 10  # steps
    probe_every: int = 0  # steps; 0: only at the end
    checkpoint_minutes: float = 10.0  # between checkpoints
    keep_checkpoints: int = 2  # newest ones that are kept, at least 2
    milestone_every: int = 0  # steps between checkpoints that are never removed; 0: none
    milestones: tuple[int, ...] = ()  # more steps whose checkpoints are never removed
    fork_from: str | None = None  # name of the trunk, from whose milestone this trial may start
    grace_seconds: float = 60.0  # between Slurm's signal and SIGKILL
    hang_seconds: float = 300.0  # without progress, after which a rank counts as hung
    peak_tflops: float | None = None  # dense, of one device, for `mfu`; null: by GPU name
    stop_after: int = 0  # save and end with exit code 0 after this step; 0: never
    staging_dir: str | None = None  # node-local folder to copy shards to
    lr_source: str = ""  # of a calibrated optim.lr: value, interval and calibration, for people

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.procs_per_node

    def keeps(self, step: int) -> bool:
        """Return whether the checkpoint of this step is a milestone, which is never removed."""
        if step in self.milestones:
            return True
        return self.milestone_every > 0 and step % self.milestone_every == 0

    def check(self, recipe: Recipe) -> None:
        batch, world = recipe.optim.batch, self.world_size
        shape = f"runtime.nodes={self.nodes} x procs_per_node={self.procs_per_node}"
        _require(world > 0, f"{shape}: nothing would run")
        if batch % world:
            below = batch // world * world
            largest = max(ranks for ranks in range(1, world + 1) if batch % ranks == 0)
            what = f"optim.batch={batch} cannot be shared equally by {world} ranks"
            batches = f"the nearest batches are {below} and {below + world}"
            raise ConfigError(what, hint=f"{batches}, the nearest world size is {largest}")
        if self.micro_batch is not None:
            images, micro = batch // world, self.micro_batch
            what = f"runtime.micro_batch={micro}: objective.target=views needs {images}"
            _require(recipe.objective.target != "views" or micro == images, what, "or null")
            divisors = [size for size in range(1, images + 1) if images % size == 0]
            what = f"runtime.micro_batch={micro} does not divide the {images} images of a rank"
            _require(micro in divisors, what, f"micro-batches that do: {divisors}")


SECTIONS: Mapping[str, type[Any]] = {
    "model": Model,
    "predictor": Predictor,
    "mask": Mask,
    "data": Data,
    "objective": Objective,
    "optim": Optim,
    "probe": Probe,
    "runtime": Runtime,
}


@dataclass(frozen=True)
class TrialConfig:
    recipe: Recipe
    runtime: Runtime

    def identity(self) -> dict[str, Any]:
        """Return the document that is hashed and stored as identity.json.

        A setting at its default is left out. So a setting that is added later renames no trial,
        when its default keeps the numbers.
        """
        return self._identity

    @functools.cached_property
    def _identity(self) -> dict[str, Any]:
        return {"identity_version": IDENTITY_VERSION, "recipe": to_dict(non_defaults(self.recipe))}

    @functools.cached_property
    def id(self) -> str:
        """12 hex digits of the SHA-256 of identity() as JSON, sorted and without spaces."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_from_dict(values: Mapping[str, Any], where: str = "") -> TrialConfig:
    """Build and check a config from one mapping of sections: model, ..., seed, runtime.

    where: file and line, for errors. Raises ConfigError for an unknown, missing or wrongly typed
    setting, and for values that cannot work, alone or together.
    """
    sections: ConfigDict = {"runtime": {}, **values}
    try:
        for name in SECTIONS.keys() & sections:
            sections[name] = _build_section(name, _encode(sections[name]))
        runtime = sections.pop("runtime")
        recipe = build_dataclass(Recipe, sections, "")
        recipe.check()
        runtime.check(recipe)
    except ConfigError as e:
        raise ConfigError(e.what, where=where, hint=e.hint) from e
    return TrialConfig(recipe, runtime)


_encode = json.JSONEncoder(default=repr).encode


@functools.lru_cache(4096)
def _build_section(name: str, text: str) -> Any:
    """Build a section from JSON. The configs of a sweep share equal sections."""
    section = build_dataclass(SECTIONS[name], json.loads(text), name)
    check_ranges(section, name)
    return section


def all_settings() -> list[str]:
    """Return the dotted names of all settings, as an override has them."""
    return [*setting_names(Recipe), *setting_names(Runtime, "runtime")]


def config_to_dict(config: TrialConfig) -> ConfigDict:
    """Return the mapping that `config_from_dict` reads."""
    return {**to_dict(config.recipe), "runtime": to_dict(config.runtime)}
