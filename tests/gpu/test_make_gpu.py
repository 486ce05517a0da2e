"""`make gpu` from end to end on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def run_gpu(folder: Path, *words: str) -> tuple[int, dict[str, Any], list[str]]:
    """Run the program on a CPU. Returns exit code, results.json and the lines of results.md."""
    (folder / "sitecustomize.py").write_text(MISSING)
    out = folder / "results"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--out", str(out), *words]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=REPO, env=environment, check=False)
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.md"]
    results = json.loads((out / "results.json").read_text())
    return done.returncode, results, (out / "results.md").read_text().splitlines()


@pytest.mark.slow
def test_it_runs_with_few_packages_and_writes_its_results(tmp_path: Path):
    """The checks, a trial of two attempts, the drill and a measured step: in a row of one table."""
    code, results, lines = run_gpu(tmp_path, "--minutes", "30")
    assert code == 0
    assert "bf16 gradients" in results["step_against_plain"]
    assert results["drill"]["same bits"] is True
    for number in ("ms", "host_ms", "host_ops"):
        assert results["vit_ti"]["trainer"][number] > 0
    first = [line.split(" | ")[0].strip("| ") for line in lines[4:]]
    assert first == ["step_against_plain", "self_test", "resume", "drill", "vit_ti", "vit_ti"]
    assert {line.count("|") for line in lines[2:]} == {lines[2].count("|")}


PARTS_THAT_HANG = """
import subprocess, sys, time
from pathlib import Path
sys.path.insert(0, "benchmarks")
import gpu

run = gpu.Run("cpu", Path(sys.argv[1]), 1.0)
run.part("vit_ti", 0.0, lambda: subprocess.run(["sleep", "60"], timeout=0.1))
run.part("drill", 0.0, lambda: "holds")
print(run.problems())
gpu.PART_MARGIN = 0.5
run.end = time.monotonic()
run.part("step_against_plain", 0.0, lambda: time.sleep(60))
print("not reached")
"""


def test_a_part_that_does_not_end_is_a_problem(tmp_path: Path):
    """Of a program and of this process, which ends then. A size is no exception."""
    command = [sys.executable, "-c", PARTS_THAT_HANG, str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "['vit_ti: FAILED: no end within 0 s']\n"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["step_against_plain"] == "FAILED: it did not end"
    assert results["drill"] == "holds"


@pytest.mark.slow
def test_without_time_no_part_begins_and_the_results_say_so(tmp_path: Path):
    code, results, lines = run_gpu(tmp_path, "--minutes", "0")
    assert code == 1
    for part in ("step_against_plain", "resume", "drill", "vit_ti"):
        assert results[part].startswith("not run: ")
        assert any(line.startswith(f"| {part} | not run: ") for line in lines)
