"""A lab's MLflow below a prefix (`mlflow server --static-prefix /lab`), with our page in it."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import scaling_page
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials
from support.stores import Server

from jepa_cluster.report import analysis
from jepa_cluster.results import tables
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser
PREFIX = "/lab"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """The address of the server with its prefix."""
    store = f"sqlite:///{tmp_path / 'lab.db'}"
    mlflow_client.create_database(tmp_path / "lab.db")
    command = [sys.executable, "-m", "mlflow", "server", *OPTIONS, store]
    no_jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with Server(tmp_path, store, command, PREFIX, **no_jobs) as server:
        yield server.uri


OPTIONS = [
    *("--app-name", "jepa"),
    *("--static-prefix", PREFIX),
    *("--workers", "1"),
    *("--port", "{port}"),
    "--backend-store-uri",
]


def test_page_and_links_work_below_a_static_prefix(tmp_path: Path, lab: str, tab: Page):
    """Collected through the prefix; the page is drawn, and its links stay below the prefix."""
    root = Root(tmp_path / "root")
    for trial in fake_trials.sweep(root):
        fake_trials.run(trial)
    scaling_page.write(root, analysis.analyse(tables.load(root, "demo")))
    assert sync.sync(root, uri=lab).states == {"done": 6}

    tab.goto(f"{lab}/scaling/#view=scatter")
    drawn(tab)
    tab.locator(".scatterlayer .point").first.hover(force=True)
    tab.wait_for_selector("#trial a.run")
    tab.locator("#trial a.run").first.click()
    tab.wait_for_url(f"{lab}/#/experiments/*/runs/*")
    tab.get_by_text("probe/class_error").first.wait_for()
