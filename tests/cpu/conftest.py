"""An MLflow database that is made once."""

from pathlib import Path

import pytest

from jepa_cluster.tracking import mlflow_client
from jepa_cluster.trial.directory import Root


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables and no rows; making it takes 3 s, so tests copy it."""
    folder = tmp_path_factory.mktemp("store")
    client, _ = mlflow_client.connect(Root(folder), f"sqlite:///{folder}/mlflow.db")
    client.search_experiments()
    return folder / "mlflow.db"
