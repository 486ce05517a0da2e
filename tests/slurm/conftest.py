"""A private Slurm for most tests, and one per scenario; scenarios run at the same time.

Without Slurm's programs all tests here are skipped; where JEPA_REQUIRE_SLURM is set, they fail.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import (
    node_scenarios,
    requeue_scenarios,
    slurm_scenarios,
    state_scenarios,
    stress,
    trainer_scenarios,
)
from support.login_node import PATIENCE, LoginNode
from testcluster import Cluster, missing

SHAPE = {"nodes": 2, "cpus": 16, "gpus": 8, "grace": 30}
# scenarios whose outcome several tests look at
SCENARIOS: dict[str, Callable[..., Any]] = {
    **vars(slurm_scenarios),
    **vars(node_scenarios),
    **vars(requeue_scenarios),
    **vars(state_scenarios),
    **vars(stress),
    **vars(trainer_scenarios),
}
SHARED = {"real_sweep", "array_faults", "transcripts"}
WAITING = {"scenario", *SHARED}  # fixtures of tests that wait for something in the background

LONGEST = ("real_sweep", "array_faults")  # begin first
AT_ONCE = 6  # scenarios: a dozen clusters would starve each other's jobs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(3 * PATIENCE))


@pytest.fixture(scope="session")
def slurm() -> None:
    if line := missing(accounting=True):
        reason = f"Slurm's programs are missing; as root: {line}"
        if os.environ.get("JEPA_REQUIRE_SLURM"):
            pytest.fail(reason)
        pytest.skip(reason)


def scenario_of(item: Any) -> str:
    """The scenario that a selected test waits for; '' for none."""
    fixtures = set(item.fixturenames)
    if not WAITING & fixtures:
        return ""
    shared = SHARED & fixtures
    return next(iter(shared), item.name.removeprefix("test_"))


@pytest.fixture(scope="session")
def started_scenarios(
    slurm: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Any]"]]:
    """The scenarios of the selected tests, which start with the first of these tests."""
    names = {scenario_of(item) for item in request.session.items} - {""}
    ranked = sorted(names, key=lambda name: (name not in LONGEST, name))
    folders = {name: tmp_path_factory.mktemp("scenario") for name in ranked}
    for name in names & {"real_sweep", *vars(trainer_scenarios)}:
        (folders[name] / "data").symlink_to(request.getfixturevalue("tiny_data"))

    def play(name: str) -> Any:
        more: dict[str, Any] = {}
        if "random_faults" in name:
            more["faults"] = request.config.getoption("--chaos")
        with Cluster(**SHAPE, accounting="with_accounting" in name) as cluster:
            return SCENARIOS[name](cluster, folders[name], **more)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(play, name) for name in folders}


@pytest.fixture
def scenario(started_scenarios: dict[str, "Future[Any]"]) -> Callable[[str], object]:
    """Wait for a scenario's end; when the scenario fails, the test fails."""
    return lambda name: started_scenarios[name].result()


@pytest.fixture
def real_sweep(started_scenarios: dict[str, "Future[Any]"]) -> LoginNode:
    """The login node after the scenario of that name: all trials are done, the cluster is gone."""
    return started_scenarios["real_sweep"].result()


@pytest.fixture
def array_faults(started_scenarios: dict[str, "Future[Any]"]) -> slurm_scenarios.ArrayFaults:
    """The trials of that scenario as they ended; the cluster is gone."""
    return started_scenarios["array_faults"].result()


@pytest.fixture
def transcripts(started_scenarios: dict[str, "Future[Any]"]) -> dict[str, str]:
    """What that scenario printed on its terminal: command -> output."""
    return started_scenarios["transcripts"].result()


@pytest.fixture(scope="session")
def cluster_of_the_session(slurm: None) -> Iterator[Cluster]:
    with Cluster(**SHAPE) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_of_the_session: Cluster) -> Iterator[Cluster]:
    """Two idle nodes n1, n2 with 16 CPUs and 8 fake GPUs each, partitions low and high.

    The cluster is cleaned after the test.
    """
    yield cluster_of_the_session
    cluster_of_the_session.clean()


@pytest.fixture
def cluster_with_affinity(slurm: None) -> Iterator[Cluster]:
    """One node with two cores; Slurm binds each task to its cores."""
    with Cluster(nodes=1, cpus=2, affinity=True) as cluster:
        yield cluster


@pytest.fixture
def cluster_with_real_times(slurm: None) -> Iterator[Cluster]:
    """One node, with KillWait and GraceTime as on most clusters, and typed GPUs."""
    with Cluster(nodes=1, cpus=16, gpus=8, gpu_type="a100", kill_wait=30, grace=60) as cluster:
        yield cluster


@pytest.fixture
def cluster_with_limits(slurm: None) -> Iterator[Cluster]:
    """One node, and at most five jobs of the user in the queue."""
    with Cluster(nodes=1, cpus=4, accounting=True, limits=True) as cluster:
        cluster.run("sacctmgr", "-i", "modify", "user", cluster.user, "set", "maxsubmitjobs=5")
        show = ("scontrol", "show", "assoc_mgr", "flags=assoc")
        cluster.until(lambda: "MaxSubmitJobs=5" in cluster.run(*show), "the limit holds")
        yield cluster


@pytest.fixture
def cluster_with_gpu_limits(slurm: None) -> Iterator[Cluster]:
    """One node with two fake GPUs, which accounting counts; the limits of accounts hold."""
    with Cluster(
        nodes=1,
        cpus=4,
        gpus=2,
        accounting=True,
        limits=True,
    ) as cluster:
        yield cluster
