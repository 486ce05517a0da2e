"""An MLflow server with sweeps, answered inside the browser: each test decides what has arrived."""

import importlib.resources
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from playwright.sync_api import Page, Route

from jepa_cluster.report import mlflow_app, payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root

SITE = "http://127.0.0.1:9/scaling/"
PLOTLY = Path(str(importlib.resources.files("plotly"))) / "package_data" / "plotly.min.js"


@dataclass
class FakeMlflow:
    """documents: sweep -> scaling.json. arrived: sweep -> trials that have a run; None for all.

    planned: trials of the plan of a sweep without a document. is_gone: no request is answered.
    names: sweep -> its experiment, where that has another name.
    """

    documents: dict[str, Any] = field(default_factory=dict)
    arrived: dict[str, list[str]] = field(default_factory=dict)
    planned: dict[str, int] = field(default_factory=dict)
    is_gone: bool = False
    names: dict[str, str] = field(default_factory=dict)

    def add(self, root: Root, sweep: str) -> None:
        document = payload.build(tables.load(root, sweep))
        self.documents[sweep] = json.loads(payload.to_json(document))

    def open(self, tab: Page, fragment: str = "") -> None:
        tab.route("http://127.0.0.1:9/**", self.answer)
        tab.goto(f"{SITE}{fragment}")

    def answer(self, route: Route) -> None:
        address = urlsplit(route.request.url)
        name = address.path.rpartition("/")[2]
        if address.path.startswith("/scaling/"):
            self._answer_file(route, name or "index.html")
        elif self.is_gone:
            route.abort()
        elif name == "get-artifact":
            query = parse_qs(address.query)
            found = self._artifact(query["run_uuid"][0], query["path"][0])
            route.fulfill(json=found, status=404 if found is None else 200)
        else:
            body = json.loads(route.request.post_data or "{}")
            kind = address.path.partition("/2.0/mlflow/")[2]
            route.fulfill(json=self._api(kind, body))

    def _answer_file(self, route: Route, name: str) -> None:
        if name == "constants.js":
            route.fulfill(body=mlflow_app.constants_js(), content_type="text/javascript")
        elif name == PLOTLY.name:
            route.fulfill(path=PLOTLY)
        else:
            route.fulfill(path=mlflow_app.STATIC / name)

    def _artifact(self, run: str, path: str) -> Any:
        sweep = run.removeprefix("parent-")
        document = self.documents.get(sweep)
        if path == "scaling.json":
            return document
        names = self.arrived.get(sweep)
        if names is None and document:
            names = [trial["trial"] for trial in document["trials"]]
        return {name: f"run-{name}" for name in names or ()}

    def _api(self, kind: str, body: dict[str, Any]) -> Any:
        if kind == "experiments/search":
            return {"experiments": list(map(self._experiment, {**self.documents, **self.planned}))}
        if kind != "runs/search" or "'sweep'" not in body["filter"]:
            return {}
        (sweep,) = body["experiment_ids"]
        tags = {"jepa.axes": "[]", "jepa.trials": str(self.planned.get(sweep, 0))}
        return {"runs": [{"info": {"run_id": f"parent-{sweep}"}, "data": _tags(tags)}]}

    def _experiment(self, sweep: str) -> dict[str, Any]:
        tags = {"jepa.kind": "sweep", "jepa.sweep": sweep, "jepa.parent": f"parent-{sweep}"}
        name = self.names.get(sweep, sweep)
        return {"name": name, "experiment_id": sweep, **_tags(tags)}


def _tags(tags: dict[str, str]) -> dict[str, Any]:
    return {"tags": [{"key": key, "value": value} for key, value in tags.items()]}
