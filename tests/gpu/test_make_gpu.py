"""`make gpu` from end to end on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
# A machine with a GPU may have only torch, torchvision, timm, numpy, Pillow and PyYAML.
MISSING = """
import sys

class Missing:
    names = {"argcomplete", "hydra", "isal", "jaxtyping", "mlflow", "omegaconf", "rich"}
    names |= {"simplejpeg", "submitit", "webdataset", "scipy", "matplotlib", "pytest"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
def test_it_runs_with_few_packages_and_writes_its_results(tmp_path: Path):
    """The checks, a trial of two attempts, the drill and a measured step."""
    (tmp_path / "sitecustomize.py").write_text(MISSING)
    out = tmp_path / "results"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=REPO, env=environment, check=False)
    assert done.returncode == 0
    results = json.loads((out / "results.json").read_text())
    assert results["resume"]["drill"]["same bits"] is True
    assert results["steps"]["vit_ti"]["trainer"]["host_ops"] > 0
    assert "| resume |" in (out / "results.md").read_text()
