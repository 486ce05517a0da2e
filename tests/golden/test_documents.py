"""Keys and types of every document printed with --json, of plan.json, and of a run in MLflow.

A script of a user may rely on each key. Values are left out: they depend on times and costs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json

Golden = Callable[[str, str], None]

SWEEP = """\
question: Which document does each command print?
base: [data=synthetic, optim.batch=32, optim.epochs=2, optim.warmup_epochs=0.2,
       model.image=96, model.depth=2]
grid:
  model: [vit_ti, vit_s]
resources: [{time: 30m}]
limits: {gpu_hours: 100}
"""
ON_STUBS = {  # name of the golden file -> command; `demo` is a sweep of stub trials
    "status": "status demo",
    "status-all": "status",
    "why": "why demo",
    "watch": "watch demo --until-done",
    "logs": "logs demo 0",
    "nodes": "nodes",
    "doctor": "doctor",
    "export": "export demo",
    "export-points": "export demo --points",
    "export-curves": "export demo --curves",
    "repro": "repro demo",
    "gc": "gc --yes",
    "sync": "sync demo",
    "scaling": "scaling demo --offline",
    "report": "report demo",
    "masks": "masks show",
}
ON_DATA = {  # `data` has two splits, `ask.yaml` is the sweep above
    "plan": "plan ask.yaml --points",
    "submit-dry-run": "submit ask.yaml --dry-run",
    "shards-synthetic": "shards synthetic images --train 8 --val 4",
    "shards-build": "shards build images packed",
    "shards-info": "shards info packed",
    "shards-verify": "shards verify packed",
}
BEFORE = {  # name of a command -> the commands that it needs first
    "shards-build": ["shards-synthetic"],
    "shards-info": ["shards-synthetic", "shards-build"],
    "shards-verify": ["shards-synthetic", "shards-build"],
}


def shape(value: Any) -> Any:
    """Replace the values of a document by their types, and keys that are paths by file names.

    A list is represented by its first element.
    """
    if isinstance(value, dict):
        shapes = {}
        for key in sorted(value):
            name = Path(key).name if key.startswith("/") else key
            shapes[name] = shape(value[key])
        return shapes
    if isinstance(value, list):
        return [shape(each) for each in value[:1]]
    return type(value).__name__


def shape_text(document: Any) -> str:
    return json.dumps(shape(document), indent=1) + "\n"


def print_document(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command with --json and return the shape of what it prints."""
    cli.main([*command.split(), "--json"])
    return shape_text(json.loads(capsys.readouterr().out))


@pytest.fixture
def stubs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """Make a sweep of six stub trials: four are done, one failed, one interrupted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    monkeypatch.delenv("JEPA_CLUSTER", raising=False)
    root = Root(tmp_path / "root")
    trials = fake_trials.sweep(root)
    for trial in trials[:4]:
        fake_trials.run(trial)
    fake_trials.run(trials[4], stop=20, cause="error")
    failure = {
        "cause": "error",
        "error": "RuntimeError: a defect",
        "attempt": 1,
        "t": 0,
    }
    write_json(trials[4].failed, failure)
    fake_trials.run(trials[5], stop=20, cause="preempted")
    logs = trials[0].logs(1)
    logs.mkdir(parents=True)
    (logs / "rank0.out").write_text("a line\n")
    return root


@pytest.mark.parametrize("name", ON_STUBS)
def test_the_document_of_a_command_on_a_sweep(
    golden: Golden, stubs: Root, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    if name == "watch":
        for trial in stubs.trials.iterdir():
            (trial / "STOP").touch()
    golden(f"{name}.json", print_document(ON_STUBS[name], capsys))


@pytest.fixture
def with_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a folder with a data root, a sweep file, and a root without trials."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "ask.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JEPA_DATA", raising=False)
    monkeypatch.delenv("JEPA_CLUSTER", raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    return tmp_path


@pytest.mark.parametrize("name", ON_DATA)
def test_the_document_of_a_command_on_data(
    golden: Golden, with_data: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for earlier in BEFORE.get(name, []):
        cli.main(ON_DATA[earlier].split())
    capsys.readouterr()
    golden(f"{name}.json", print_document(ON_DATA[name], capsys))


def test_the_plan_of_a_submitted_sweep(golden: Golden, with_data: Path) -> None:
    root = Root(with_data / "root")
    sweep = documents.find_sweep(root, "ask.yaml")
    made = plan.make_plan(sweep, profile.load_profile(), root)
    submit._write_sweep(made, "0" * 12)
    document = json.loads(root.sweep("ask").plan.read_text())
    golden("plan-file.json", shape_text(document))


def test_names_of_tags_params_and_metrics_in_mlflow(golden: Golden, stubs: Root) -> None:
    """The runs are the parent run of a sweep and the run of a finished trial."""
    uri = f"sqlite:///{stubs.path / 'mlflow.db'}"
    sync.sync(stubs, uri=uri)
    client, _ = mlflow_client.connect(stubs, uri)
    names = {}
    for run in client.search_runs(["1"]):
        is_trial = "jepa.trial" in run.data.tags
        if is_trial and run.info.status != "FINISHED":
            continue
        names["trial" if is_trial else "sweep"] = {
            "metrics": sorted(run.data.metrics),
            "params": sorted(run.data.params),
            "tags": sorted(run.data.tags),
        }
    golden("mlflow.json", json.dumps(names, indent=1, sort_keys=True) + "\n")
