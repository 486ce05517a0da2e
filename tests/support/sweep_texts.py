"""The fixtures `data` and `do`: trials of a sweep file that is given as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from support import fake_trials

from jepa_cluster.sweep import resolve, sweep_file, yaml_source
from jepa_cluster.sweep.points import ResourceRequest
from jepa_cluster.sweep.resolve import Trial

Resolve = Callable[..., list[Trial]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the manifest of 640 images, without the images."""
    return fake_trials.data_root(tmp_path_factory.mktemp("data"))


def resolved(
    text: str, data: Path, names: Mapping[str, str] = MappingProxyType({}), **runtime: object
) -> list[Trial]:
    """Resolve the text of a sweep file. names: id -> directory, of the trials that exist."""
    sweep = sweep_file.from_source(yaml_source.parse(text, "sweeps/x.yaml"), "x")
    settings = {"data_root": str(data), **runtime}
    return resolve.resolve(sweep, ResourceRequest("", 1, 2, 60), settings, names=names)


@pytest.fixture
def do(data: Path) -> Resolve:
    """Resolve a sweep file with this body and these overrides in its base."""

    def resolve_body(body: str = "", *base: str, **runtime: object) -> list[Trial]:
        overrides = ["data=synthetic", "optim.batch=32", "optim.warmup_epochs=1", *base]
        return resolved(f"question: Q\nbase: {overrides}\n{body}", data, **runtime)

    return resolve_body
