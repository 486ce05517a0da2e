"""`jepa scaling next`: the sweep that narrows a law most, its bill, and its results as predicted beforehand."""

import json
from pathlib import Path

import fabricate
import numpy as np
import pytest

from jepa_cluster import cli
from jepa_cluster.data import manifest
from jepa_cluster.launch import describe, propose, resources, submit
from jepa_cluster.report import power_law, proposal, scaling
from jepa_cluster.tracking import curves
from jepa_cluster.trial.layout import Root

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
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        columns = {k: np.zeros(640, dtype) for k, dtype in manifest.COLUMNS.items()}
        index = manifest.Index((manifest.Shard("shard-000000.tar", 9, 640),), columns)
        manifest.write(tmp_path / "data" / split, index, ("a",), {})
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
    p = propose.propose(describe.find(root, path), resources.profile(), root)
    submit._write_sweep(p, "0" * 12)
    for name, trial in p.trials.items():
        root.trial(name).create(trial.config)
        number = fabricate.run(root.trial(name), every=20, commit=40)
        flops = fabricate.values(root.trial(name), trial.config.recipe.optim.steps)["flops_total"]
        ended = root.trial(name).attempts()[-1]["ended"]
        root.trial(name).amend(number, {"started": ended - int(flops * HOURS * 3.6e6 / 2)})


def test_a_proposal_is_a_sweep_file_that_plan_accepts_with_predictions_that_are_held_against_results(
    ask: Root, capsys: pytest.CaptureFixture[str]
):
    """File, bill, predictions beforehand; after the trials, `jepa scaling` counts which of them held.

    Too little money, too few budgets, no such sweep: each is refused with what is missing.
    """
    for words, says in (
        (["next", "ask", "--gpu-hours", "0.000001"], "buy no trial; the cheapest costs"),
        (["next", "ask"], "jepa scaling next S --gpu-hours H"),
        (["next", "asc", "--gpu-hours", "1"], "did you mean 'ask'"),
    ):
        assert cli.main(["scaling", *words]) == 78 and says in capsys.readouterr().err
    root, sweep = ask, curves.load(ask, "ask")
    few = scaling.study(curves.Sweep("ask", sweep.plan, sweep.curves[:2]))
    assert "2 distinct budgets" in str(proposal.propose(few, 1.0))
    assert cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "expected afterwards" in out and "next: jepa plan ask_next.yaml" in out
    predicted = json.loads((root.sweep("ask_next") / "predicted.json").read_text())
    bill = sum(p["gpu_hours"] for p in predicted["points"])
    assert 0.25 < bill <= 0.5 and predicted["first_seed"] == 1
    wide, narrow = (p["high"] - p["low"] for p in (predicted["before"], predicted["after"]))
    assert narrow < 0.8 * wide and predicted["settings"] == {"mask.target_scale": [0.2, 0.3]}
    assert cli.main(["plan", "ask_next.yaml", "--json"]) == 3
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["trials"]) == sum(p["seeds"] for p in predicted["points"])
    assert cli.main(["scaling", "next", "ask", "--gpu-hours", "0.5"]) == 78, "predictions are made once"
    finish(root, "ask_next.yaml")
    s = scaling.study(curves.load(root, "ask_next"))
    told = "\n".join(scaling.summary(s))
    assert f"of {len(plan['trials'])} trials inside their 90 % intervals" in told
    inside = int(told.split("predicted beforehand from ask: ")[1].split()[0])
    assert inside >= 0.7 * len(plan["trials"]) and "both sweeps together" in told
    other = scaling.study(curves.load(root, "ask_next"), "probe/knn_error")
    assert "predicted beforehand: probe/class_error over flops_total" in "\n".join(scaling.summary(other))
    path = root.sweep("ask_next") / "predicted.json"
    path.write_text(json.dumps({**predicted, "error": "probe/knn_error"}))
    assert scaling.study(curves.load(root, "ask_next")).error == "probe/knn_error", "what was predicted is shown first"


def test_no_plan_of_one_budget_narrows_the_law_more_than_the_proposal():
    """Beside every way of spending all on one compute; and what it expects is what refitting then finds."""
    rng = np.random.default_rng(1)
    compute = np.geomspace(1, 100, 8) * 1e15
    truth = lambda c: 0.6 * (c / 1e15) ** -0.2 + 0.1  # noqa: E731
    at, target, budget = np.geomspace(1e15, 1e18, 24), 1e18, 40.0
    cost = at / 1e17
    expected, found = [], []
    for _ in range(12):
        law = power_law.fit(compute, truth(compute) * np.exp(0.01 * rng.normal(size=8)))
        assert isinstance(law, power_law.PowerLawFit)
        counts, left = proposal.choose(law, target, at, cost, budget)
        assert sum(n * c for n, c in zip(counts, cost, strict=True)) <= budget
        shared = np.cov(np.log(law.bootstrap_predictions(np.append(target, at))).T)
        for i, price in enumerate(cost):
            n = int(min(budget / price, proposal.MOST))
            alone = 1 - n * shared[0, i + 1] ** 2 / (n * shared[i + 1, i + 1] + law.scale**2) / shared[0, 0]
            assert left <= 1.02 * alone
        more = np.repeat(at, counts)
        every = np.concatenate([compute, more])
        again = power_law.fit(
            every, np.concatenate([truth(compute), truth(more)]) * np.exp(0.01 * rng.normal(size=len(every)))
        )
        expected.append(np.sqrt(left * shared[0, 0]))
        found.append(np.log(again.bootstrap_predictions(target)).std())
    assert 0.6 < np.median(expected) / np.median(found) < 1.7
