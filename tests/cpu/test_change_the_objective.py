"""docs/howto/change-the-objective.md, applied to a copy of the package and trained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_args, get_type_hints

import mlflow
import pytest

from jepa_cluster.config import Objective
from jepa_cluster.ijepa import losses

REPOSITORY = Path(__file__).parents[2]
GUIDE = REPOSITORY / "docs/howto/change-the-objective.md"
SETTINGS = (
    "model=vit_nano",
    "optim=demo",
    "objective.loss=smooth_l1_variance",
    "mask.mode=band",
    "mask.targets=1",
    "optim.steps=6",
    "optim.warmup_steps=2",
    "optim.batch=8",
    "runtime.log_every=2",
    "runtime.compile=false",
    "runtime.workers=0",
)
SCALING_PAGE = """
import sys
from pathlib import Path
from jepa_cluster.report import payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root
sweep = tables.load(Root(Path(sys.argv[1])), "changed")
document = payload.add_curves(sweep, payload.build(sweep))
(curve,) = document["curves"].values()
print(sorted(curve[-1]))
"""


def code_blocks() -> list[str]:
    """The Python blocks of the guide, in order."""
    text = GUIDE.read_text()
    found = re.findall(r"^ *```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the guide's changes."""
    copy = tmp_path_factory.mktemp("changed")
    for name in ("jepa_cluster", "conf", "sweeps", "slurm"):
        shutil.copytree(REPOSITORY / name, copy / name)
    loss, name_of_loss, mask, entry = code_blocks()

    ijepa = copy / "jepa_cluster/ijepa"
    with (ijepa / "losses.py").open("a") as file:
        file.write("\n\n" + loss)
    config = copy / "jepa_cluster/config.py"
    lines = config.read_text().splitlines(keepends=True)
    (number,) = (i for i, line in enumerate(lines) if line.startswith("    loss: Literal["))
    lines[number] = textwrap.indent(name_of_loss, "    ")
    config.write_text("".join(lines))

    (ijepa / "masks/band.py").write_text(mask)
    with (ijepa / "masks/__init__.py").open("a") as file:
        file.write("\n" + entry)
    return copy


def run(
    copy: Path,
    *words: str,
) -> str:
    """Run Python on the changed package. Returns what it prints."""
    env = {**os.environ, "PYTHONPATH": str(copy), "JEPA_ROOT": str(copy / "root")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=copy,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def jepa(
    copy: Path,
    *words: str,
) -> str:
    """Run a `jepa` command of the changed package. Returns what it prints."""
    return run(copy, "-m", "jepa_cluster", *words)


@pytest.mark.slow
def test_the_guide_adds_a_loss_with_a_curve_and_a_mask_mode(changed: Path, tiny_data: Path) -> None:
    """The scalar of the loss is in the spool, in MLflow and on the Scaling page."""
    shown = jepa(changed, "masks", "show", "mask.mode=band", "mask.targets=1")
    assert "mode band" in shown

    settings = [*SETTINGS, "data=synthetic", f"runtime.data_root={tiny_data}"]
    base = ", ".join(settings)
    (changed / "changed.yaml").write_text(f"question: Does it train?\nbase: [{base}]\nseeds: [0]\n")
    jepa(changed, "submit", "changed.yaml", "--yes")
    jepa(changed, "watch", "changed")

    uri = f"sqlite:///{changed / 'mlflow.db'}"
    jepa(changed, "sync", "changed", "--uri", uri)
    client = mlflow.MlflowClient(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    metrics = [run.data.metrics for run in client.search_runs(experiments)]
    assert any("loss/variance_penalty" in values for values in metrics), metrics

    assert "loss/variance_penalty" in run(changed, "-c", SCALING_PAGE, str(changed / "root"))


def test_each_name_of_objective_loss_is_a_function() -> None:
    for name in get_args(get_type_hints(Objective)["loss"]):
        assert callable(getattr(losses, name))
