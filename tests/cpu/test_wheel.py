"""An installed wheel has the package, conf/, the shipped sweeps and the cluster profiles."""

import subprocess
import sys
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_an_installed_wheel_composes_a_trial_without_the_clone(tmp_path: Path):
    """conf/ is reachable from the wheel, and composing it needs no torch."""
    built = tmp_path / "dist"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(built)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
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
