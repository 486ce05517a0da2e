"""The shipped sweeps: each has a question, an expectation and a correct cost."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from jepa_cluster.launch.cluster import cost, profile
from jepa_cluster.sweep import compose, resolve, sweep_file
from jepa_cluster.sweep.compose import Composer
from jepa_cluster.sweep.resolve import Trial
from jepa_cluster.trial.directory import Root

SWEEPS = Path(__file__).parents[2] / "sweeps"
ON_SYNTHETIC_IMAGES = ("demo", "context_fraction", "claims_")  # how their names begin
ALL = sorted(SWEEPS.glob("*.yaml"))
FILES = [path for path in ALL if not path.name.startswith(ON_SYNTHETIC_IMAGES)]
COST = r"(\d+) trials, about ([\d,]+) A100-hours at 38 % MFU; the longest takes (\d+) h\."
PROFILE = profile.load_profile(Path("example"))


@pytest.fixture(scope="module")
def composer(tmp_path_factory: pytest.TempPathFactory) -> Composer:
    """Compose conf/ with the manifest of ImageNet-1k, without its images."""
    root = tmp_path_factory.mktemp("imagenet")
    facts = {
        "version": 1,
        "digest": "0" * 16,
        "images": 1_281_167,
        "shards": [],
        "labels": ["class"],
        "classes": [],
        "report": {},
    }
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / split / "manifest.json").write_text(json.dumps(facts))
    return Composer(compose.conf_dir(), {**PROFILE.runtime, "data_root": str(root)})


def trials(file: Path, composer: Composer) -> list[Trial]:
    return resolve.resolve(sweep_file.load(file), PROFILE.default_request, {}, composer)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_cost_in_a_shipped_sweep_is_what_plan_computes(
    file: Path, composer: Composer, tmp_path: Path
):
    """`plan` computes it with the example profile."""
    sweep = sweep_file.load(file)
    found = trials(file, composer)
    assert sweep.question.endswith("?")
    assert sweep.expect

    costs = list(cost.estimate_costs(Root(tmp_path), PROFILE, found).values())
    total = 0.0
    for each, trial in zip(costs, found, strict=True):
        runtime = trial.config.runtime
        total += each.hours * runtime.nodes * runtime.procs_per_node
    longest = max(each.hours for each in costs)
    match = re.match(COST, sweep.source.values["cost"])
    assert match
    written_total = float(match[2].replace(",", ""))
    written_longest = float(match[3])
    assert int(match[1]) == len(found)
    assert written_total == pytest.approx(total, rel=0.06), "the total cost has changed"
    assert written_longest == pytest.approx(longest, abs=0.6), "the longest trial has changed"
    for each, trial in zip(costs, found, strict=True):
        assert each.hours * 60 < trial.minutes, "a trial is longer than its time limit"


def test_isoflop_points_have_three_budgets(composer: Composer):
    """The FLOPs of each point are those of its budget within 2 %."""
    points = Counter[float]()
    found = trials(SWEEPS / "isoflop.yaml", composer)
    assert len(found) == 12
    for trial in found:
        flops = cost.total_flops(trial.config.recipe)
        for budget in (3e18, 1e19, 3e19):
            points[budget] += flops == pytest.approx(budget, rel=0.02)
    assert points == {3e18: 4, 1e19: 5, 3e19: 3}


@pytest.mark.parametrize("file", sorted(SWEEPS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_sweep_is_in_the_howto(file: Path):
    page = (SWEEPS.parent / "docs" / "howto" / "sweeps.md").read_text()
    assert f"| `{file.stem}` |" in page
