"""One private Slurm for all tests here. Without Slurm's programs: skipped; failed where JEPA_REQUIRE_SLURM is set."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "slurm" / "testcluster"))
from testcluster import Cluster, missing


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def cluster_of_the_session() -> Iterator[Cluster]:
    if line := missing():
        reason = f"Slurm's programs are missing; as root: {line}"
        pytest.fail(reason) if os.environ.get("JEPA_REQUIRE_SLURM") else pytest.skip(reason)
    with Cluster(nodes=2, cpus=16, gpus=2, grace=20) as c:
        yield c


@pytest.fixture
def cluster(cluster_of_the_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Two idle nodes n1, n2 with fake GPUs, partitions low and high; this test's environment points there."""
    monkeypatch.setenv("SLURM_CONF", str(cluster_of_the_session.conf))
    monkeypatch.setenv("PATH", cluster_of_the_session.env["PATH"])
    yield cluster_of_the_session
    cluster_of_the_session.clean()
