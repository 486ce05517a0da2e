"""`claims` of a sweep file: what is compared, by which margin, and whether it holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jepa_cluster.errors import SweepFileError
from jepa_cluster.report import claims, findings
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.results.tables import Row, SweepResults
from jepa_cluster.sweep import sweep_file

TARGET = "objective.target"
METRIC = "probe/class_error"
ERRORS = {"representation": 0.50, "frozen": 0.51, "pixels": 0.60}
SWEEP = f"""
question: What is worth predicting?
grid:
  {TARGET}: [representation, frozen, pixels]
  model: [vit_nano, vit_mini]
claims:
  - claim: Representations beat pixels
    metric: {METRIC}
    lower: {{{TARGET}: representation}}
    than: {{{TARGET}: pixels}}
    by: 0.02
"""


def study(noise: float = 0.005, untrained: float = 0.8) -> list[Row]:
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for target, error in ERRORS.items():
        for size in (1e5, 2e5):
            for seed in range(4):
                row: Row = {
                    "state": "done",
                    "trial": f"{target}-{size:g}-{seed}",
                    "model": f"m{size:g}",
                    "size": f"m{size:g}",
                    "parameters": size,
                    "steps": 100,
                    "seed": seed,
                    "setting": target,
                    "label": f"m{size:g} {target} s{seed}",
                    TARGET: target,
                    "flops_total": size,
                    METRIC: error + noise * rng.normal(),
                    "initial/probe/mean_std_max/class_error": untrained,
                }
                rows.append(row)
    return rows


def analysed(
    rows: list[Row],
    lower: str,
    than: str,
    by: float = 0.02,
) -> Analysis:
    claim = {"claim": "it helps", "metric": METRIC, "by": by}
    claim |= {"lower": {TARGET: lower}, "than": {TARGET: than}}
    plan: Any = {"axes": ["model", TARGET], "expect_best": {}, "claims": [claim]}
    return Analysis(SweepResults("s", plan), "probe/knn_error", "flops_total", rows)


@pytest.mark.parametrize(
    ("lower", "than", "verdict"),
    [
        ("representation", "pixels", claims.HOLDS),
        ("pixels", "representation", claims.FAILS),
        ("representation", "frozen", claims.FAILS),  # by less than the margin
    ],
)
def test_a_claim_holds_if_the_whole_interval_is_beyond_the_margin(
    lower: str,
    than: str,
    verdict: str,
):
    """It is judged by its own metric, whatever the analysis shows."""
    s = analysed(study(), lower, than)
    (found,) = claims.verdicts(s)
    assert found.verdict == verdict
    assert found.difference
    assert ERRORS[than] - ERRORS[lower] in found.difference
    assert str(found) in findings.summary(s)
    assert str(found) in findings.evidence(s)


def test_noise_leaves_a_claim_open():
    (found,) = claims.verdicts(analysed(study(noise=0.1), "representation", "pixels"))
    assert found.verdict == claims.UNKNOWN


def test_what_an_untrained_encoder_reaches_shows_nothing():
    (found,) = claims.verdicts(analysed(study(untrained=0.4), "representation", "pixels"))
    assert found.verdict == claims.UNKNOWN
    assert str(found).endswith("(an untrained encoder has 0.4)")


def test_without_trials_of_a_side_nothing_is_decided():
    rows = [row for row in study() if row[TARGET] != "pixels"]
    (found,) = claims.verdicts(analysed(rows, "representation", "pixels"))
    assert found.verdict == claims.UNKNOWN
    assert found.why == "no trial with objective.target=pixels has finished"


def test_a_claim_about_sizes_may_name_a_model_of_the_list(tmp_path: Path):
    file = tmp_path / "sizes.yaml"
    sizes = "list: [{model: vit_nano}, {model: vit_mini, model.name: vit_midi, model.width: 96}]"
    claim = f"{{claim: a, metric: {METRIC}, lower: {{model: vit_midi}}, than: {{model: vit_nano}}"
    file.write_text(f"question: Do larger models help?\n{sizes}\nclaims: [{claim}, by: 0}}]\n")
    assert sweep_file.load(file).claims[0].lower == {"model": "vit_midi"}


def test_claims_are_read_and_written_back(tmp_path: Path):
    file = tmp_path / "targets.yaml"
    file.write_text(SWEEP)
    (claim,) = sweep_file.load(file).claims
    assert claim.lower == {TARGET: "representation"}
    assert claim.by == 0.02
    again = tmp_path / "again.yaml"
    again.write_text(sweep_file.to_yaml(sweep_file.load(file)))
    assert sweep_file.load(again).claims == (claim,)


@pytest.mark.parametrize(
    ("before", "after", "message", "line"),
    [
        (METRIC, "loss", "metric wants the error of a probe, got 'loss'", 8),
        ("by: 0.02", "by: 2", "by wants a number in [0, 1), got 2", 11),
        ("    by: 0.02\n", "", "'claims[0].by' is missing", 7),
        ("by: 0.02", "at: 0.02", "unknown setting 'claims[0].at'", 7),
        ("than: {objective.target", "than: {mask.mode", "'mask.mode', which is no swept", 10),
        (": pixels}", ": pixel}", "objective.target=pixel, which does not run", 10),
    ],
)
def test_a_wrong_claim_is_refused_with_its_line(
    tmp_path: Path,
    before: str,
    after: str,
    message: str,
    line: int,
):
    file = tmp_path / "targets.yaml"
    assert before in SWEEP
    file.write_text(SWEEP.replace(before, after))
    with pytest.raises(SweepFileError) as caught:
        sweep_file.load(file)
    assert message in str(caught.value)
    assert str(caught.value).count(f"targets.yaml:{line}") == 1
