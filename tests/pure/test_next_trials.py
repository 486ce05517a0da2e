"""`jepa scaling next`: trials beyond the frontier, their cost, and their predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, plan, submit
from jepa_cluster.report import analysis, comparisons, findings, next_trials
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root

SWEEP = """
question: How does the stub scale?
base: [data=synthetic, optim.batch=8, optim.warmup_steps=5, model.image=48]
grid:
  model: [vit_nano, vit_micro, vit_mini]
  mask.target_scale: [[0.1, 0.2], [0.2, 0.3]]
  optim.steps: [40, 80, 160]
resources: [{time: 30m}]
"""
HOURS = 2e-12  # GPU-hours per FLOP


@pytest.fixture
def ask(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Root:
    """Make a finished sweep from the real conf/; its errors follow a law with known noise."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "ask.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    for name in ("JEPA_DATA", "JEPA_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    root = Root(tmp_path / "root")
    finish(root, "ask.yaml")
    return root


def finish(
    root: Root,
    path: str,
) -> None:
    """Make the sweep as if submitted and trained; hours are in proportion to FLOPs."""
    sweep = documents.find_sweep(root, path)
    made = plan.make_plan(sweep, profile.load_profile(), root)
    submit._write_sweep(made, "0" * 12)
    for name, planned in made.trials.items():
        trial = root.trial(name)
        trial.create(planned.config)
        number = fake_trials.run(trial, every=20, commit=40)
        row = fake_trials.values(trial, planned.config.recipe.optim.steps)
        hours = row["flops_total"] * HOURS / 2
        ended = trial.attempts()[-1]["ended"]
        trial.amend(number, {"started": ended - int(hours * 3.6e6)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "--gpu-hours", "0.000001"], "the cheapest trial costs 0.387 process-h"),
        (["ask"], "jepa scaling next S --gpu-hours H"),
        (["asc", "--gpu-hours", "1"], "did you mean 'ask'"),
        (["ask", "--gpu-hours", "1", "--out", "next.yaml"], "a sweep cannot be called 'next'"),
        (["ask", "--gpu-hours", "1", "--out", "a b.yaml"], "a sweep cannot be called 'a b'"),
        (["ask", "--gpu-hours", "1", "--out", "more.txt"], "hint:  more.yaml"),
        (["ask", "--gpu-hours", "1", "--out", "no/more.yaml"], "there is no folder no"),
        (["ask", "--gpu-hours", "1", "--out", "ask.yaml"], "a sweep ask exists"),
    ],
    ids=[
        "too few GPU-hours",
        "no GPU-hours",
        "unknown sweep",
        "a command",
        "a space",
        "no YAML",
        "no folder",
        "not free",
    ],
)
def test_next_is_refused_with_what_is_missing(
    ask: Root, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert cli.main(["scaling", "next", *arguments]) == 78
    assert message in capsys.readouterr().err


def test_next_trials_need_three_budgets(ask: Root):
    sweep = tables.load(ask, "ask")
    two_trials = tables.SweepResults("ask", sweep.plan, sweep.trials[:2])
    found = next_trials.design(analysis.analyse(two_trials), 1.0, None)
    assert "2 distinct budgets" in str(found)


def test_next_trials_are_a_sweep_file_with_predictions(
    ask: Root, capsys: pytest.CaptureFixture[str]
):
    """`jepa plan` accepts the file. Later, `jepa scaling` compares results with predictions."""
    assert cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"]) == 0
    out = capsys.readouterr().out
    first, *_ = lines = out.splitlines()
    assert "beyond the frontier of ask, about" in first
    assert first.endswith(" process-h")
    assert "GPU-h" not in out
    assert max(map(len, lines)) <= 80
    assert "next: jepa plan ask_next.yaml" in out

    predicted = json.loads(ask.sweep("ask_next").predicted.read_text())
    seeds = predicted["seeds"]
    points = predicted["points"]
    trials = predicted["trials"]
    cost = len(seeds) * sum(trial["gpu_hours"] for trial in trials)
    assert 0.25 < cost <= 0.5
    assert seeds[0] == 1
    assert predicted["settings"] == {"mask.target_scale": [0.2, 0.3]}

    assert cli.main(["plan", "ask_next.yaml", "--json"]) == 3
    planned = len(json.loads(capsys.readouterr().out)["trials"])
    assert planned == len(seeds) * len(trials)
    again = cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"])
    assert again == 78, "predictions are made once"

    finish(ask, "ask_next.yaml")
    text = summary_of_next(ask)
    checked = len(seeds) * len(points)
    assert f"of {checked} trials inside their 90% intervals" in text
    _, _, result = text.partition("predicted beforehand from ask: ")
    inside, *_ = result.split()
    assert int(inside) >= 0.7 * checked
    assert "both sweeps together" in text

    text = summary_of_next(ask, "probe/knn_error")
    assert "predicted beforehand: probe/class_error over flops_total" in text
    predicted["error"] = "probe/knn_error"
    ask.sweep("ask_next").predicted.write_text(json.dumps(predicted))
    found = analysis.analyse(tables.load(ask, "ask_next"))
    assert found.error == "probe/knn_error", "the predicted metric is the default"


def summary_of_next(
    root: Root,
    *error: str,
) -> str:
    found = analysis.analyse(tables.load(root, "ask_next"), *error)
    return "\n".join(findings.summary(found))


def three_sizes() -> analysis.Analysis:
    """Analyse three sizes over four budgets; the best size is between the other two."""
    rows = []
    for budget in (1e15, 3e15, 1e16, 3e16):
        for model, parameters in (("small", 1e6), ("best", 3e6), ("large", 1e7)):
            distance = np.log10(parameters / 3e6)
            error = true_error(budget) * (1 + 0.1 * distance**2)
            rows.append(
                {
                    "trial": model,
                    "label": f"{model} {budget:g} s0",
                    "setting": "all",
                    "state": "done",
                    "seed": 0,
                    "model": model,
                    "parameters": parameters,
                    "steps": int(budget / parameters / 1e6),
                    "probe/class_error": error,
                    "flops_total": budget,
                    "gpu_hours_alone": budget / 1e17,
                }
            )
    small = Root(Path("/r")).trial("small")
    curve = tables.TrialResult(small, "small s0", {"model": "small"}, 0, "done", None, None)
    sweep = tables.SweepResults("s", {"axes": [], "unit": "GPU-h"}, [curve])
    return analysis.Analysis(sweep, "probe/class_error", "flops_total", rows)


def true_error(compute: float) -> float:
    return 0.6 * (compute / 1e15) ** -0.2 + 0.1


def test_the_budgets_double_with_the_best_size_and_its_neighbours():
    study = three_sizes()
    assert isinstance(study.iso_flop, comparisons.OptimalSize)
    found = next_trials.design(study, 1000.0, None)
    assert isinstance(found, next_trials.NextTrials)
    compute = [trial["compute"] for trial in found.trials]
    assert compute == pytest.approx([6e16] * 3 + [1.2e17] * 3 + [2.4e17] * 3, rel=1e-3)
    assert [trial["model"] for trial in found.trials] == ["best", "small", "large"] * 3
    assert found.seeds == (1, 2, 3, 4)
    assert found.cost == pytest.approx(4 * 3 * 4.2, rel=1e-3)
    assert [point["model"] for point in found.points] == ["best"] * 3
    text = "\n".join(next_trials.describe(found))
    assert text.count("not predicted, beside the best size") == 6
    for point in found.points:  # the law knows the best size alone
        assert point["error"].value == pytest.approx(true_error(point["compute"]), rel=0.05)


def test_next_trials_cost_no_more_than_the_gpu_hours():
    some = next_trials.design(three_sizes(), 3.5, None)
    assert isinstance(some, next_trials.NextTrials)
    trials = [(trial["model"], round(trial["compute"] / 1e16)) for trial in some.trials]
    assert trials == [("best", 6), ("small", 6), ("large", 6), ("best", 12)]
    assert some.seeds == (1,)
    assert some.cost <= 3.5


def test_few_gpu_hours_buy_the_best_size_alone():
    one = next_trials.design(three_sizes(), 0.7, target=5e16)
    assert isinstance(one, next_trials.NextTrials)
    assert [trial["model"] for trial in one.trials] == ["best"]


def test_too_few_gpu_hours_buy_no_trial():
    found = next_trials.design(three_sizes(), 0.5, None)
    assert "the cheapest trial costs 0.6 GPU-h" in str(found)
