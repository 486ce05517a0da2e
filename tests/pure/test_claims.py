"""`claims` of a sweep file: what is compared, by which margin, and whether it holds."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import fake_trials

from jepa_cluster.config import config_from_dict
from jepa_cluster.errors import SweepFileError
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.report import claims, findings, markdown
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.results import student, tables
from jepa_cluster.results.tables import Row, SweepResults, TrialResult
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.trial import spool
from jepa_cluster.trial.directory import Root, TrialDir

TARGET, COUNT = "objective.target", "mask.targets"
METRIC = "probe/class_error"
RICHER = "initial/probe/mean_std_max/class_error"
OFFSETS = (-0.04, -0.01, 0.02, 0.03)  # of four seeds
ERRORS = {"representation": 0.50, "frozen": 0.51, "pixels": 0.60}
RECIPE = config_from_dict(yaml.safe_load(fake_trials.PLAIN)).recipe
SWEEP = f"""
question: What is worth predicting?
base: [data=synthetic, runtime.data_root=DATA, optim=demo, optim.batch=8, optim.steps=40,
       optim.warmup_steps=5]
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


class Study:
    """Finished trials, each of a point, a size and a seed."""

    def __init__(self, noise: float = 0.005) -> None:
        self.rng = np.random.default_rng(0)
        self.noise = noise
        self.rows: list[Row] = []
        self.results: list[TrialResult] = []

    def add(
        self,
        point: Mapping[str, Any],
        error: float,
        size: float = 1e5,
        seeds: int = 4,
        untrained: float = 0.9,
    ) -> None:
        for seed in range(seeds):
            setting = " ".join(map(str, point.values()))
            name = f"{setting}-{size:g}-{seed}"
            row: Row = {
                "state": "done",
                "trial": name,
                "model": f"m{size:g}",
                "size": f"m{size:g}",
                "parameters": size,
                "steps": 100,
                "seed": seed,
                "setting": setting,
                "label": name,
                **{axis: str(value) for axis, value in point.items()},
                "flops_total": size,
                METRIC: error + self.noise * self.rng.normal(),
                RICHER: untrained,
            }
            self.rows.append(row)
            objective = dataclasses.replace(
                RECIPE.objective, target=point.get(TARGET, "representation")
            )
            model = dataclasses.replace(RECIPE.model, name=f"m{size:g}")
            recipe = dataclasses.replace(RECIPE, objective=objective, model=model)
            trial = TrialDir(Path(name))
            history = spool.read(trial)
            found = TrialResult(trial, name, dict(point), seed, "done", recipe, history)
            self.results.append(found)

    def judge(
        self,
        lower: Mapping[str, Any],
        than: Mapping[str, Any],
        by: float = 0.02,
        finished: int = 0,
    ) -> tuple[claims.Verdict, Analysis]:
        claim = {"claim": "it helps", "metric": METRIC, "by": by, "finished": finished}
        claim |= {"lower": lower, "than": than}
        axes = list(dict.fromkeys(axis for result in self.results for axis in result.point))
        plan: Any = {"axes": ["model", *axes], "expect_best": {}, "claims": [claim]}
        s = Analysis(
            SweepResults("s", plan, self.results), "probe/knn_error", "flops_total", self.rows
        )
        (found,) = claims.verdicts(s)
        return found, s


def of(target: str) -> dict[str, str]:
    return {TARGET: target}


def targets(noise: float = 0.005, untrained: float = 0.9) -> Study:
    study = Study(noise)
    for target, error in ERRORS.items():
        for size in (1e5, 2e5):
            study.add(of(target), error, size, untrained=untrained)
    return study


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
    found, s = targets(noise=0.002).judge(of(lower), of(than))
    assert found.verdict == verdict
    assert found.difference
    assert found.difference.value == pytest.approx(ERRORS[than] - ERRORS[lower], abs=0.005)
    assert str(found) in findings.summary(s)
    assert str(found) in findings.evidence(s)


def test_a_difference_is_that_of_the_means_with_the_interval_of_its_seeds():
    """Two groups of four seeds: it is not drawn towards 0, however large the noise is."""
    study = Study(noise=0)
    study.add(of("representation"), 0.50)
    study.add(of("pixels"), 0.54)
    for row, offset in zip(study.rows, 2 * OFFSETS, strict=True):
        row[METRIC] += offset * (1 if row[TARGET] == "pixels" else -1)
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.difference
    assert found.difference.value == pytest.approx(0.04, abs=0.003)
    half = student.quantile(6, 0.9) * np.std(OFFSETS, ddof=1) * 0.5**0.5
    assert (found.difference.high - found.difference.low) / 2 == pytest.approx(half, rel=0.15)


def test_what_seeds_have_in_common_does_not_widen_the_interval():
    """Each seed moves both groups alike."""
    study = Study(noise=0.002)
    for target, error in (("representation", 0.50), ("pixels", 0.53)):
        study.add(of(target), error, seeds=8)
    for row in study.rows:
        row[METRIC] += (-0.04, 0.03, 0.01, -0.02, 0.04, -0.01, -0.03, 0.02)[row["seed"]]
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.verdict == claims.HOLDS


def test_noise_leaves_a_claim_open():
    found, _ = targets(noise=0.1).judge(of("representation"), of("pixels"))
    assert found.verdict == claims.UNKNOWN


def test_what_untrained_encoders_reach_shows_nothing():
    """It confirms no claim; what refutes one stays."""
    study = targets(untrained=0.4)
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.verdict == claims.UNKNOWN
    assert str(found).endswith("(untrained encoders have 0.4)")
    found, _ = study.judge(of("pixels"), of("representation"))
    assert found.verdict == claims.FAILS


def test_a_size_is_compared_with_its_own_untrained_encoders():
    study = Study()
    for target, errors in (("representation", (0.5, 0.3)), ("pixels", (0.6, 0.36))):
        study.add(of(target), errors[0], 1e5, untrained=0.75)
        study.add(of(target), errors[1], 2e5, untrained=0.45)
    assert study.judge(of("representation"), of("pixels"))[0].verdict == claims.HOLDS


def test_without_trials_of_a_side_nothing_is_decided():
    study = Study()
    study.add(of("representation"), 0.5)
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.verdict == claims.UNKNOWN
    assert found.why == "no trial with objective.target=pixels has finished"


def test_sizes_that_one_side_lacks_change_nothing():
    """Pixels have no trial of the largest size, which has the lowest error."""
    study = Study()
    for size, error in ((1e5, 0.6), (2e5, 0.5), (4e5, 0.4)):
        study.add(of("representation"), error, size)
        if size < 4e5:
            study.add(of("pixels"), error, size)
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.verdict == claims.FAILS
    assert found.difference
    assert 0 in found.difference
    study = Study()
    study.add(of("representation"), 0.4, 4e5)
    study.add(of("pixels"), 0.6, 1e5)
    found, _ = study.judge(of("representation"), of("pixels"))
    assert found.why == "no two finished trials differ only in what the claim names"


def test_another_setting_that_differs_is_not_credited():
    """Only the number of targets differs between the second and the third."""
    study = Study()
    for count, mode, error in ((1, "", 0.6), (4, "packed", 0.5), (1, "packed", 0.5)):
        study.add({COUNT: count, "mask": mode}, error)
    found, _ = study.judge({COUNT: 4}, {COUNT: 1})
    assert found.verdict == claims.FAILS
    assert found.difference
    assert abs(found.difference.value) < 0.01


def test_one_trial_of_each_side_decides_nothing():
    study = Study()
    study.add(of("representation"), 0.6, seeds=1)
    study.add(of("pixels"), 0.5, seeds=1)
    for lower, than in (("representation", "pixels"), ("pixels", "representation")):
        found, _ = study.judge(of(lower), of(than), by=0.0)
        assert found.verdict == claims.UNKNOWN
        assert "add seeds or horizons" in found.why


def test_an_interaction_is_part_of_the_difference():
    """Two settings of three levels each; one cell is worse than both suggest."""
    study = Study()
    for a in ("representation", "frozen", "pixels"):
        for count in (1, 2, 4):
            is_odd = a == "pixels" and count == 4
            study.add({TARGET: a, COUNT: count}, 0.6 if is_odd else 0.5)
    odd, even = {TARGET: "pixels", COUNT: 4}, {TARGET: "representation", COUNT: 4}
    found, _ = study.judge(even, odd)
    assert found.difference
    assert found.difference.value > 0.05


def test_a_claim_of_sizes_compares_their_settings():
    study = Study()
    for size, error in ((1e5, 0.6), (2e5, 0.5)):
        study.add(of("representation"), error, size)
    found, _ = study.judge({"model": "m200000"}, {"model": "m100000"})
    assert found.verdict == claims.HOLDS


def test_a_claim_that_was_written_after_results_says_so():
    found, _ = targets().judge(of("representation"), of("pixels"), finished=12)
    assert "(the claim was written when 12 trials of it had finished)" in str(found)


# ---- in a sweep file


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    fake_trials.data_root(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for name in ("JEPA_DATA", "JEPA_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    return Root(tmp_path / "root")


def write(text: str) -> Path:
    file = Path("targets.yaml")
    file.write_text(text.replace("DATA", str(Path("data").absolute())))
    return file


def submitted(root: Root, text: str) -> plan.Plan:
    made = plan.make_plan(
        documents.find_sweep(root, str(write(text))), profile.load_profile(), root
    )
    submit._write_sweep(made, "0" * 12)
    return made


def test_a_claim_is_judged_by_the_trials_of_its_sweep(root: Root):
    """A later claim says how many trials had finished."""
    made = submitted(root, SWEEP)
    for name, planned in made.trials.items():
        trial = root.trial(name)
        trial.create(planned.config)
        fake_trials.run(trial, every=20, commit=40)
    submitted(root, SWEEP)
    (found,) = claims.verdicts(analysed(root))
    assert found.difference is None or "written when" not in str(found)
    submitted(root, SWEEP.replace("by: 0.02", "by: 0"))
    (found,) = claims.verdicts(analysed(root))
    assert "the claim was written when 4 trials of it had finished" in str(found)


@pytest.mark.parametrize(
    ("lower", "than", "labels"),
    [
        ({TARGET: "representation"}, {TARGET: "pixels"}, {"representation", "pixels"}),
        ({TARGET: "frozen"}, {TARGET: "pixels", "model": "vit_mini"}, {"frozen"}),
    ],
)
def test_the_report_names_the_command_that_repeats_the_trials_of_a_claim(
    root: Root,
    tmp_path: Path,
    lower: Mapping[str, str],
    than: Mapping[str, str],
    labels: set[str],
) -> None:
    claim = {**yaml.safe_load(SWEEP)["claims"][0], "lower": lower, "than": than}
    text = SWEEP.partition("claims:")[0] + yaml.safe_dump({"claims": [claim]})
    made = submitted(root, text)
    for name, planned in made.trials.items():
        root.trial(name).create(planned.config)
    page = markdown.write(analysed(root), tmp_path / "report").read_text()
    (command,) = re.findall(r"Representations beat pixels: `(.*)`", page)
    verb, _, name, *words = shlex.split(command)
    assert (verb, name) == ("jepa", "targets")
    rows = select(documents.plan_rows(made), words)
    assert {str(row["point"][TARGET]) for row in rows} == labels
    assert len(rows) == 2 * len(labels)


def analysed(root: Root) -> Analysis:
    loaded = tables.load(root, "targets")
    return Analysis(loaded, METRIC, "flops_total", tables.trial_table(loaded))


@pytest.mark.parametrize(
    ("before", "after", "message", "line"),
    [
        (METRIC, "probe/clas_error", "is probe/clas_error, which no probe measures", 10),
        (METRIC, "loss", "metric is loss, which no probe measures", 10),
        ("by: 0.02", "by: 2", "by wants a number in [0, 1), got 2", 13),
        ("    by: 0.02\n", "", "claims[0] has no by", 9),
        ("by: 0.02", "at: 0.02", "unknown key 'at' in 'claims[0]'", 13),
        (": Representations beat pixels", ": ''", "claims[0] has no claim", 9),
        ("than: {objective.target: pixels}", "than: {}", "claims[0] has no than", 9),
        ("than: {objective.target", "than: {mask.moe", "no trial has mask.moe=pixels", 12),
        (": pixels}", ": pixel}", "no trial has objective.target=pixel\n", 12),
        ("than: {objective.target: pixels}", "than: {model: vit_nano}", "1 trial on both", 9),
        ("claims:\n  - ", "claims:\n    ", "claims wants a list, got {", 8),
    ],
)
def test_a_wrong_claim_is_refused_with_its_line(
    root: Root,
    before: str,
    after: str,
    message: str,
    line: int,
):
    assert before in SWEEP
    with pytest.raises(SweepFileError) as caught:
        submitted(root, SWEEP.replace(before, after))
    assert message in str(caught.value)
    assert str(caught.value).count(f"targets.yaml:{line}") == 1


def test_a_level_that_runs_by_default_is_known(root: Root):
    """Also the name of a model that a point of the list sets."""
    lists = "list: [{}, {mask.targets: 1}, {model: vit_nano, model.name: mine, model.depth: 1}]"
    text = SWEEP.replace("  model: [vit_nano, vit_mini]\n", "")
    text = text.replace("claims:", f"{lists}\nclaims:")
    text = text.replace(f"lower: {{{TARGET}: representation}}", "lower: {mask.targets: 4}")
    text = text.replace(f"than: {{{TARGET}: pixels}}", "than: {mask.targets: 1}")
    assert submitted(root, text)
    text = text.replace("lower: {mask.targets: 4}", "lower: {model: mine}")
    assert submitted(root, text)
