"""The data set that a trial reads: its splits by their manifests, and whether the trial fits them.

In: a data root and the settings of a trial. Out: a `DataSet`, or an error before anything is
queued. Images are not read.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jepa_cluster.config import Data, Probe
from jepa_cluster.errors import ConfigError, DataError, suggest

if TYPE_CHECKING:
    from jepa_cluster.data.manifest import Manifest


class DataSet(NamedTuple):
    root: Path
    train: Manifest
    val: Manifest


@functools.cache
def read(root: Path) -> DataSet:
    """Read both manifests. Raises DataError, also for a set without a validation split."""
    from jepa_cluster.data import manifest

    try:
        train = manifest.read(root / "train")
    except DataError as e:
        hint = e.hint
        usual = os.environ.get("JEPA_DATA", "data")
        if root == Path(usual).expanduser().absolute():
            hint = f"export JEPA_DATA=<where the shards are>, or {hint}"
        raise DataError(e.what, where=e.where, hint=hint) from e
    if not (root / "val").exists():
        what = "there is no validation split, and the probes of every trial read one"
        hint = f"jepa shards build <validation images> {root} --split val"
        raise DataError(what, where=str(root / "val"), hint=hint)
    return DataSet(root, train, manifest.read(root / "val"))


def with_digests(data: Data, found: DataSet) -> Data:
    """Fill digests and number of images. Raises ConfigError when other digests are asked for."""
    digests = {"digest": found.train.digest, "val_digest": found.val.digest}
    for key, value in digests.items():
        wanted = getattr(data, key)
        if wanted not in (None, value):
            what = f"data.{key}={wanted} is asked for, but the shards have {value}"
            hint = f"point runtime.data_root at the other shards, or leave data.{key} out"
            raise ConfigError(what, where=str(found.root), hint=hint)
    return replace(data, **digests, images=found.train.images)


def check_probe(probe: Probe, found: DataSet) -> None:
    """Raise ConfigError for a label that the images of a split do not have."""
    for split, made in (("train", found.train), ("val", found.val)):
        for label in probe.labels:
            if label in made.labels:
                continue
            what = f"probe.labels has '{label}', but the images in {found.root / split} have "
            if not made.labels:
                hint = "probe.labels=[] trains without labels"
                raise ConfigError(f"{what}no label", hint=f"{hint}, with RankMe and val/loss")
            known = ", ".join(made.labels)
            raise ConfigError(f"{what}{known}", hint=suggest(label, made.labels))
