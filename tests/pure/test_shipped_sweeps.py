"""The sweeps that are shipped: each resolves, says what it asks, expects and costs, and its figures are right."""

import json
import re
from pathlib import Path

import pytest

from jepa_cluster.launch.cluster import cost, profile
from jepa_cluster.sweep import compose, resolve, sweep_file
from jepa_cluster.sweep.compose import Composer
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root

SWEEPS = Path(__file__).parents[2] / "sweeps"
HERE = {"demo", "context_fraction"}  # on this machine, with the rendered set
FILES = sorted(f for f in SWEEPS.glob("*.yaml") if f.stem not in HERE)
PROFILE = profile.load_profile(Path("example"))


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """conf/, and the manifest of ImageNet-1k without its images."""
    split = tmp_path_factory.mktemp("imagenet") / "train"
    split.mkdir()
    facts = {"version": 1, "digest": "0" * 16, "images": 1_281_167, "shards": [], "labels": ["class"], "classes": []}
    (split / "manifest.json").write_text(json.dumps({**facts, "report": {}}))
    return Composer(compose.conf_dir(), {**PROFILE.runtime, "data_root": str(split.parent)})


def trials(file: Path, composer: Composer) -> list[Trial]:
    return resolve.resolve(sweep_file.load(file), PROFILE.default_request, {}, composer)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_shipped_sweep_resolves_and_its_cost_is_what_it_says(file: Path, composer: Composer, tmp_path: Path):
    """The figures in `cost` are those that `plan` computes with the example profile."""
    sweep, found = sweep_file.load(file), trials(file, composer)
    assert sweep.question.endswith("?") and sweep.expect
    costs = cost.estimate_costs(Root(tmp_path), PROFILE, found).values()
    total, longest = sum(c.gpu_hours for c in costs), max(c.hours for c in costs)
    told = re.match(
        r"(\d+) trials, about ([\d,]+) A100-hours at 38 % MFU; the longest takes (\d+) h\.", sweep.source.values["cost"]
    )
    assert told and int(told[1]) == len(found)
    assert float(told[2].replace(",", "")) == pytest.approx(total, rel=0.06), f"cost is now {total:.0f}"
    assert float(told[3]) == pytest.approx(longest, abs=0.6), f"the longest now takes {longest:.1f} h"
    assert all(c.hours * 60 < t.minutes for c, t in zip(costs, found, strict=True)), "longer than its limit"


def test_isoflop_points_lie_on_three_budgets(composer: Composer):
    """3e18, 1e19, 3e19 FLOPs within 2 %."""
    found = [cost.total_flops(t.config.recipe) for t in trials(SWEEPS / "isoflop.yaml", composer)]
    budgets = [min((3e18, 1e19, 3e19), key=lambda b: abs(b - f)) for f in found]
    assert found == pytest.approx(budgets, rel=0.02)
    assert [budgets.count(b) for b in (3e18, 1e19, 3e19)] == [4, 5, 3]


def test_every_shipped_sweep_stands_in_the_howto():
    """With what it asks."""
    page = (SWEEPS.parent / "docs" / "howto" / "sweeps.md").read_text()
    assert not [f.stem for f in SWEEPS.glob("*.yaml") if f"| `{f.stem}` |" not in page]
