"""One private Slurm for most tests here, one each for those that wait long. They run beside each other.

Without Slurm's programs all tests here are skipped; where JEPA_REQUIRE_SLURM is set, they fail.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("desk", "scenes", "trainer_scenes")
sys.path.insert(0, str(Path(__file__).parents[2] / "slurm" / "testcluster"))
import scenes  # noqa: E402
import trainer_scenes  # noqa: E402
from desk import PATIENCE, Desk  # noqa: E402
from testcluster import Cluster, missing  # noqa: E402

SHAPE = {"nodes": 2, "cpus": 16, "gpus": 8, "grace": 20}
SHARED = {"night", "fates", "transcripts"}  # scenes whose outcome several tests look at
WAITING = {"scene", *SHARED}  # fixtures of tests that wait for something in the background

LONGEST = ("night",)  # begins first
STAGGER = 1.5  # s between the starts of two scenes: a dozen clusters at once would starve each other's jobs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here, and put those that only wait at the end."""
    here = Path(__file__).parent
    mine = [item for item in items if item.path.is_relative_to(here)]
    for item in mine:
        item.add_marker(pytest.mark.slurm)
        item.add_marker(pytest.mark.timeout(3 * PATIENCE))
    items.sort(key=lambda item: item in mine and bool(WAITING & set(item.fixturenames)))


@pytest.fixture(scope="session")
def slurm() -> None:
    if line := missing(accounting=True):
        reason = f"Slurm's programs are missing; as root: {line}"
        pytest.fail(reason) if os.environ.get("JEPA_REQUIRE_SLURM") else pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def started_scenes(
    slurm: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Any]"]]:
    """The scenes whose tests were selected, all running from the first Slurm test on."""
    selected = [item for item in request.session.items if WAITING & set(item.fixturenames)]
    shared = [next(iter(SHARED & set(item.fixturenames)), "") for item in selected]
    names = {one or item.name.removeprefix("test_") for one, item in zip(shared, selected, strict=True)}
    ranked = sorted(names, key=lambda name: (name not in LONGEST, name))
    folders = {name: tmp_path_factory.mktemp("scene") for name in ranked}
    for name in names & {"night", *vars(trainer_scenes)}:
        (folders[name] / "data").symlink_to(request.getfixturevalue("tiny_data"))

    def play(name: str) -> Any:
        time.sleep(STAGGER * list(folders).index(name))
        more = {"faults": request.config.getoption("--chaos")} if "random_faults" in name else {}
        with Cluster(**SHAPE, accounting="with_accounting" in name) as cluster:
            return getattr(scenes if hasattr(scenes, name) else trainer_scenes, name)(cluster, folders[name], **more)

    with ThreadPoolExecutor(max(len(names), 1)) as pool:
        yield {name: pool.submit(play, name) for name in folders}


@pytest.fixture
def scene(started_scenes: dict[str, "Future[Any]"]) -> Callable[[str], object]:
    """Wait for a scene's end; its failure is the test's."""
    return lambda name: started_scenes[name].result()


@pytest.fixture
def night(started_scenes: dict[str, "Future[Any]"]) -> Desk:
    """The desk after the scene of that name: all trials are done, the cluster is gone."""
    return started_scenes["night"].result()


@pytest.fixture
def fates(started_scenes: dict[str, "Future[Any]"]) -> scenes.Fates:
    """What became of the trials of that scene; the cluster is gone."""
    return started_scenes["fates"].result()


@pytest.fixture
def transcripts(started_scenes: dict[str, "Future[Any]"]) -> dict[str, str]:
    """What that scene saw on its terminal: command -> output."""
    return started_scenes["transcripts"].result()


@pytest.fixture(scope="session")
def cluster_of_the_session(slurm: None) -> Iterator[Cluster]:
    with Cluster(**SHAPE) as c:
        yield c


@pytest.fixture
def cluster(cluster_of_the_session: Cluster) -> Iterator[Cluster]:
    """Two idle nodes n1, n2 with 16 CPUs and 8 fake GPUs each, partitions low and high; cleaned after the test."""
    yield cluster_of_the_session
    cluster_of_the_session.clean()
