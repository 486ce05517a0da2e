"""An installed wheel has the package, conf/, the shipped sweeps and the cluster profiles."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from support import fake_trials

from jepa_cluster.cli import demo
from jepa_cluster.trial.directory import Root

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was unpacked, as pip does it."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def jepa(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `jepa` of the wheel in a folder."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("JEPA_")}
    return subprocess.run(
        [sys.executable, "-m", "jepa_cluster", *words],
        cwd=folder,
        env={**env, "PYTHONPATH": str(site), "JEPA_DATA": str(folder / "data")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_wheel_composes_a_trial_without_the_clone(site: Path, tmp_path: Path):
    """conf/ is reachable from the wheel, and composing it needs no torch."""
    program = f"""
import sys
sys.path.insert(0, {str(site)!r})
from jepa_cluster.sweep.compose import Composer, Override, conf_dir
assert str(conf_dir()).startswith({str(site)!r}), conf_dir()
overrides = [Override("model", "vit_b", ""), Override("mask.targets", 3, "")]
plain = Composer(conf_dir(), {{}}).compose(overrides)
assert plain["model"]["width"] == 768 and plain["mask"]["targets"] == 3
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (site / "jepa_cluster/sweeps").is_dir()
    assert (site / "jepa_cluster/clusters").is_dir()


def test_an_installed_wheel_plans_and_submits_a_shipped_sweep(site: Path, tmp_path: Path):
    """In a folder with nothing but data, on a machine without Slurm."""
    fake_trials.data_root(tmp_path / "data")
    plan = jepa(site, tmp_path, "plan", "mask_scale", "--json")
    assert plan.returncode == 3, plan.stderr
    trials = json.loads(plan.stdout)["trials"]
    dry_run = jepa(site, tmp_path, "submit", "mask_scale", "--dry-run", "--json")
    assert dry_run.returncode == 0, dry_run.stderr
    assert len(json.loads(dry_run.stdout)) == len(trials)


def test_the_demo_without_torch_says_what_to_install(site: Path, tmp_path: Path):
    """Before it draws an image. The base packages are there, those of the extras are not."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if path.stem not in demo.NEEDED:
            (packages / path.name).symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "jepa_cluster", "demo"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}:{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode
    needed = ", ".join(demo.NEEDED)
    message = " ".join(done.stderr.split())
    assert f"the demo trains and draws, which needs {needed}" in message
    assert "hint: pip install 'jepa-cluster[all]'" in message
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "all" in extras["optional-dependencies"]


@pytest.mark.slow
def test_the_demo_of_an_installed_wheel_runs_in_an_empty_folder(site: Path, tmp_path: Path):
    done = jepa(site, tmp_path, "demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "open the address that it prints, which has a token" in done.stdout
    root = Root(tmp_path / "jepa-root")
    plan = root.sweep("demo").read_plan()
    assert plan
    assert all(root.trial(trial["name"]).done.exists() for trial in plan["trials"])
