"""Fixtures and options of all tests.

Helpers are in the package `support`, which pyproject.toml puts on the path.

`tiny_data` is a data root with 200 training and 64 validation images, made once;
`tiny_config(**{"optim.steps": 9})` is a frozen trial on it that takes milliseconds a step.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import jaxtyping
import pytest

from jepa_cluster.config import TrialConfig

pytest.register_assert_rewrite("support")
from support import groups, tiny_trial  # noqa: E402

# How long an example takes, or making it, says how busy the machine is.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--chaos", type=int, default=5, metavar="N", help="random faults of the chaos test"
    )
    parser.addoption(
        "--schedules",
        type=int,
        default=240,
        metavar="N",
        help="random schedules of the save protocol",
    )

    parser.addoption(
        "--configs",
        type=int,
        default=12,
        metavar="N",
        help="random configs, from `--config-seed` on",
    )
    parser.addoption("--config-seed", type=int, default=0, metavar="SEED")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "config_seed" in metafunc.fixturenames:
        first = int(metafunc.config.getoption("--config-seed"))
        count = int(metafunc.config.getoption("--configs"))
        metafunc.parametrize("config_seed", range(first, first + count))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "chaos: random faults against tiny trials; --chaos N says how many"
    )


def pytest_unconfigure() -> None:
    gc.freeze()  # else Python visits every object of torch and mlflow once more before it ends


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the groups that last longest."""
    items.sort(key=lambda item: groups.rank(item.nodeid))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> groups.GroupScheduling:
    """Run each group in one process, in the order of the groups."""
    config.option.loadscopereorder = False
    return groups.GroupScheduling(config, log)


@pytest.fixture(autouse=True)
def own_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """What jepa prints into a pipe does not depend on the terminal of the tests."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def chaos_faults(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--chaos"))


@pytest.fixture
def schedules(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--schedules"))


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch the checks of shapes and types off: torch.compile cannot trace them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Session-wide data root: 8 classes, real JPEG files packed by the same builder as ImageNet."""
    return tiny_trial.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_config(tiny_data: Path) -> Callable[..., TrialConfig]:
    return functools.partial[Any](tiny_trial.config, tiny_data)
