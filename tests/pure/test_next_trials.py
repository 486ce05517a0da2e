"""`jepa scaling next`: a ladder beyond the frontier, its cost, and its results as predicted beforehand."""

import json
from pathlib import Path

import numpy as np
import pytest
from support import fake_trials

from jepa_cluster import cli
from jepa_cluster.launch.cluster import profile
from jepa_cluster.launch.submit import documents, submit
from jepa_cluster.launch.submit import plan as propose
from jepa_cluster.report import analysis, comparisons, next_trials
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root

SWEEP = """
question: How does the stub scale?
base: [data=synthetic, optim.batch=8, optim.warmup_steps=5, model.image=64]
grid:
  model: [vit_nano, vit_micro, vit_mini]
  mask.target_scale: [[0.1, 0.2], [0.2, 0.3]]
  optim.steps: [40, 80, 160]
resources: [{time: 30m}]
"""
HOURS = 2e-12  # GPU-hours a FLOP


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """A finished sweep that the real conf/ composed; its numbers follow a law with known noise."""
    fake_trials.data_root(tmp_path / "data")
    (tmp_path / "ask.yaml").write_text(SWEEP)
    monkeypatch.chdir(tmp_path)
    for name in ("JEPA_DATA", "JEPA_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JEPA_ROOT", str(tmp_path / "root"))
    root = Root(tmp_path / "root")
    finish(root, "ask.yaml")
    return root


def finish(root: Root, path: str) -> None:
    """The sweep as if submitted and trained: what each trial took is in proportion to its FLOPs."""
    p = propose.make_plan(documents.find_sweep(root, path), profile.load_profile(), root)
    submit._write_sweep(p, "0" * 12)
    for name, trial in p.trials.items():
        root.trial(name).create(trial.config)
        number = fake_trials.run(root.trial(name), every=20, commit=40)
        flops = fake_trials.values(root.trial(name), trial.config.recipe.optim.steps)["flops_total"]
        ended = root.trial(name).attempts()[-1]["ended"]
        root.trial(name).amend(number, {"started": ended - int(flops * HOURS * 3.6e6 / 2)})


def test_next_trials_are_a_sweep_file_that_plan_accepts_with_predictions_that_are_checked_against_results(
    ask: Root, capsys: pytest.CaptureFixture[str]
):
    """File, cost, predictions beforehand; after the trials, `jepa scaling` counts how many were right.

    Too little money, too few budgets, no such sweep: each is refused with what is missing.
    """
    for words, says in (
        (["next", "ask", "--gpu-hours", "0.000001"], "buy no trial; the cheapest costs"),
        (["next", "ask"], "jepa scaling next S --gpu-hours H"),
        (["next", "asc", "--gpu-hours", "1"], "did you mean 'ask'"),
    ):
        assert cli.main(["scaling", *words]) == 78 and says in capsys.readouterr().err
    root, sweep = ask, tables.load(ask, "ask")
    few = analysis.analyse(tables.SweepResults("ask", sweep.plan, sweep.trials[:2]))
    assert "2 distinct budgets" in str(next_trials.design(few, 1.0))
    assert cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "beyond the frontier of ask" in out and "next: jepa plan ask_next.yaml" in out
    predicted = json.loads((root.sweep("ask_next").predicted).read_text())
    cost = len(predicted["seeds"]) * sum(p["gpu_hours"] for p in predicted["points"])
    assert 0.25 < cost <= 0.5 and predicted["seeds"][0] == 1
    assert predicted["settings"] == {"mask.target_scale": [0.2, 0.3]}
    assert cli.main(["plan", "ask_next.yaml", "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["trials"]) == len(predicted["seeds"]) * len(predicted["points"])
    assert cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"]) == 78, "predictions are made once"
    finish(root, "ask_next.yaml")
    s = analysis.analyse(tables.load(root, "ask_next"))
    text = "\n".join(analysis.summary(s))
    assert f"of {len(plan['trials'])} trials inside their 90% intervals" in text
    inside = int(text.split("predicted beforehand from ask: ")[1].split()[0])
    assert inside >= 0.7 * len(plan["trials"]) and "both sweeps together" in text
    other = analysis.analyse(tables.load(root, "ask_next"), "probe/knn_error")
    assert "predicted beforehand: probe/class_error over flops_total" in "\n".join(analysis.summary(other))
    path = root.sweep("ask_next").predicted
    path.write_text(json.dumps({**predicted, "error": "probe/knn_error"}))
    assert analysis.analyse(tables.load(root, "ask_next")).error == "probe/knn_error", (
        "what was predicted is shown first"
    )


def study(budgets=(1e15, 3e15, 1e16, 3e16)) -> analysis.Analysis:
    """Three sizes over the budgets; 1e6 and 1e7 parameters lie beside the best size, 3e6."""
    rows = []
    for budget in budgets:
        for model, parameters in (("small", 1e6), ("best", 3e6), ("large", 1e7)):
            error = (0.6 * (budget / 1e15) ** -0.2 + 0.1) * (1 + 0.1 * np.log10(parameters / 3e6) ** 2)
            rows.append({
                "trial": model, "label": f"{model} {budget:g} s0", "setting": "all", "state": "done", "seed": 0,
                "model": model, "parameters": parameters, "steps": int(budget / parameters / 1e6), "e": error,
                "flops_total": budget, "gpu_hours_alone": budget / 1e17,
            })  # fmt: skip
    curve = tables.TrialResult(
        "s", Root(Path("/r")).trial("small"), "small s0", {"model": "small"}, 0, "done", None, None
    )  # pyright: ignore
    sweep = tables.SweepResults("s", {}, [curve])
    return analysis.Analysis(sweep, "e", "flops_total", rows)


def test_a_ladder_doubles_the_largest_budget_and_holds_the_best_size_with_its_neighbours():
    """Up to the target, and no further than the GPU-hours; little money buys the best size alone."""
    s = study()
    assert isinstance(s.iso_flop, comparisons.OptimalSize)
    found = next_trials.design(s, 1000.0)
    assert isinstance(found, next_trials.NextTrials)
    compute = [p.compute for p in found.points]
    assert compute == pytest.approx([6e16] * 3 + [1.2e17] * 3 + [2.4e17] * 3, rel=1e-3)
    assert [p.model for p in found.points] == ["best", "small", "large"] * 3
    assert found.seeds == (1, 2, 3, 4) and found.cost == pytest.approx(4 * 3 * 4.2, rel=1e-3)
    for point in found.points:
        truth = 0.6 * (point.compute / 1e15) ** -0.2 + 0.1
        assert point.error.value == pytest.approx(truth, rel=0.05)
    some = next_trials.design(s, 3.5)
    assert isinstance(some, next_trials.NextTrials)
    assert [(p.model, round(p.compute / 1e16)) for p in some.points] == [
        ("best", 6), ("small", 6), ("large", 6), ("best", 12),
    ]  # fmt: skip
    assert some.seeds == (1,) and some.cost <= 3.5
    one = next_trials.design(s, 0.7, target=5e16)
    assert isinstance(one, next_trials.NextTrials) and [p.model for p in one.points] == ["best"]
    assert "buy no trial; the cheapest costs 0.6" in str(next_trials.design(s, 0.5))
