"""The Scaling page as a file, without a server: many trials, laws, colours, parabolas."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scaling_page
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster.report import analysis, answers, figure, findings, html, markdown, payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

# JavaScript that returns what Plotly has drawn
TRIALS_WITH_MARKS = """
    new Set(
        document.getElementById('plot').data
            .filter((trace) => trace.customdata)
            .flatMap((trace) => trace.customdata.flat())
    ).size
"""
LAWS = """
    document.getElementById('plot').data
        .filter((trace) => trace.meta === 'law')
        .map((trace) => trace.x)
"""
Y_RANGE = "document.getElementById('plot').layout.yaxis.range"
CUT_OPTIONS = """
    (() => { const all = [...document.querySelectorAll('#controls select')];
    return all.filter((select) => select.offsetParent).flatMap((select) => {
        const css = getComputedStyle(select);
        const pen = document.createElement('canvas').getContext('2d');
        pen.font = `${css.fontSize} ${css.fontFamily}`;
        return [...select.options]
            .filter((option) => pen.measureText(option.text).width > select.clientWidth - 24)
            .map((option) => option.text);
    });
    })()
"""
EFFECT_LINES = """
    document.getElementById('plot').data
        .filter((trace) => trace.mode === 'lines+markers')
        .map((trace) => [trace.name, trace.y])
"""
BEST_SIZES = """
    document.getElementById('plot').data
        .filter((trace) => trace.marker?.symbol === 'star' && trace.yaxis === 'y2')
        .map((trace) => [trace.x[0], trace.y[0]])
"""


def run_sweep(folder: Path, models: Sequence[str], scales=fake_trials.SCALES[:2]) -> Root:
    """Run a sweep of these models to its end."""
    root = Root(folder)
    for trial in fake_trials.sweep(root, models=tuple(models), scales=scales):
        fake_trials.run(trial)
    return root


def open_page(
    tab: Page, root: Root, study: analysis.Analysis, fragment: str = "#view=scatter"
) -> int:
    """Write the page of a study and open the file. Returns the number of the drawing."""
    tab.goto(f"{scaling_page.write(root, study)}{fragment}")
    return drawn(tab)


def analysed(root: Root, sweep: str = "demo") -> analysis.Analysis:
    return analysis.analyse(tables.load(root, sweep))


# ---- many trials


@pytest.fixture
def page_of_a_thousand(tmp_path: Path) -> Path:
    """A page whose document repeats ten trials a hundred times, each with other FLOPs."""
    root = run_sweep(tmp_path, list(fake_trials.SIZES))
    sweep = tables.load(root, "demo")
    document = payload.add_curves(sweep, payload.build(sweep))
    copies = []
    for i in range(100):
        for trial in document["trials"]:
            changed = {
                "trial": f"{trial['trial']}{i}",
                "label": f"copy{i} s0",
                "flops_total": trial["flops_total"] * (1 + i / 99),
            }
            copies.append(trial | changed)
    document["trials"] = copies
    path = tmp_path / "many.html"
    path.write_text(html.render(document))
    return path


def test_a_page_of_a_thousand_trials_needs_no_server_and_draws_all(
    page_of_a_thousand: Path, tab: Page
):
    """Every trial is a mark and a line of the table; the page says that curves are left out."""
    tab.goto(f"file://{page_of_a_thousand}#view=scatter")
    drawn(tab)
    assert tab.locator("#table tr").count() == 1001
    assert "Curves are left out above 200" in tab.inner_text("#note")
    assert tab.evaluate(TRIALS_WITH_MARKS) == 1000


# ---- the answer


def test_a_sweep_over_masks_opens_with_the_effect_of_each_setting(tmp_path: Path, tab: Page):
    """The answer is above the figure; lines, bands and marks show the numbers of the analysis."""
    root = run_sweep(tmp_path, list(fake_trials.SIZES))
    study = analysed(root)
    open_page(tab, root, study, "")
    assert tab.input_value("#view") == "effect"
    lines = tab.locator("#answer tbody tr").all_inner_texts()
    assert len(lines) == len(study.answers)
    for line, answer in zip(lines, study.answers, strict=True):
        texts = [each.text for each in answer.best]
        texts += [answers.moves(study.effects, answer), answers.effect(answer)]
        assert all(text in line for text in texts)
    assert lines[0].startswith("target scale")
    notes = tab.locator("#answer li").all_inner_texts()
    assert set(notes) <= set(findings.answer_lines(study))
    shown = tab.locator("#findings li").all_inner_texts()
    assert not set(findings.answer_lines(study)) & set(shown)
    (axis,) = study.effects.axes
    draws = axis.draws[:, 0] - axis.draws[:, 0].mean(1, keepdims=True)
    wanted = 100 * (np.exp(np.median(draws, 0)) - 1)
    shown = tab.evaluate(EFFECT_LINES)
    assert [name for name, _ in shown] == study.effects.models
    assert shown[0][1] == pytest.approx(wanted, abs=1e-3)


def test_on_a_phone_the_figure_comes_before_the_controls(tmp_path: Path, tab: Page):
    root = run_sweep(tmp_path, list(fake_trials.SIZES))
    tab.set_viewport_size({"width": 390, "height": 844})
    open_page(tab, root, analysed(root), "")
    (plot,), (form,) = boxes(tab, "#plot"), boxes(tab, "#controls")
    assert plot["y"] < form["y"]
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


# ---- gains


def test_gains_below_zero_are_shown_on_a_linear_axis(
    tmp_path: Path, tab: Page, monkeypatch: pytest.MonkeyPatch
):
    """A gain has no law, and its axis no logarithm, on the page and in the PNG."""
    labelled = fake_trials.values

    def values(*arguments: Any) -> dict[str, float]:
        row = labelled(*arguments)
        if "probe/class_error" in row:
            row["gain/probe/class_error"] = 0.5 - row["probe/class_error"]
        return row

    monkeypatch.setattr(fake_trials, "values", values)
    root = run_sweep(tmp_path, ("vit_a", "vit_b", "vit_c"))
    study = analysed(root)
    assert study.error == "probe/class_error"
    open_page(tab, root, study)
    tab.select_option("#y", "gain/probe/class_error")
    assert tab.evaluate(TRIALS_WITH_MARKS) == len(study.trials)
    axis = "document.querySelector('.js-plotly-plot').layout.yaxis"
    assert tab.evaluate(f"{axis}.type") == "linear"
    lowest, highest = tab.evaluate(f"{axis}.range")
    for row in study.trials:
        assert lowest < row["gain/probe/class_error"] < highest
    assert tab.is_disabled("#logy")
    gains = analysis.analyse(study.sweep, "gain/probe/class_error")
    assert "is not an error: no law" in "\n".join(findings.summary(gains))
    figure.draw(gains, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 10_000


# ---- sets without labels


def test_a_sweep_without_labels_is_shown_by_rankme_and_judges_no_setting(
    tmp_path: Path, tab: Page, monkeypatch: pytest.MonkeyPatch
):
    """The validation loss can be chosen within a setting; there is no law and no best setting."""
    labelled = fake_trials.values

    def values(*arguments: Any) -> dict[str, float]:
        row = labelled(*arguments)
        return {name: value for name, value in row.items() if "_error" not in name}

    monkeypatch.setattr(fake_trials, "values", values)
    root = run_sweep(tmp_path, ("vit_a", "vit_b", "vit_c"))
    study = analysed(root)
    assert study.error == "probe/rankme"
    open_page(tab, root, study)
    assert tab.evaluate("document.getElementById('y').value") == "probe/rankme"
    assert tab.evaluate(TRIALS_WITH_MARKS) == len(study.trials)
    assert not tab.evaluate(LAWS)
    assert "does not compare settings" in tab.inner_text("#note")
    findings = tab.inner_text("#findings")
    assert "probe/rankme does not compare settings: no law, and no best setting" in findings
    assert "frontier" not in findings
    offered = tab.evaluate("[...document.getElementById('y').options].map((each) => each.value)")
    assert {"probe/rankme", "val/loss"} <= set(offered)
    report = markdown.write(study, root.path).read_text()
    assert "## Settings" not in report


# ---- laws


def test_what_users_wrote_is_text_on_the_page(tmp_path: Path, tab: Page):
    """Neither a script in a comment nor a tag has an effect; the page has its trials."""
    root = run_sweep(tmp_path, ["vit_a", "vit_b"])
    plan = root.sweep("demo").plan
    hostile = "<!--<script> </script><i>is</i> $2/h & $4/h?"
    text = plan.read_text().replace("Do stubs scale?", hostile)
    plan.write_text(text.replace('"vit_a"', '"<i>a</i>"'))
    open_page(tab, root, analysis.analyse(tables.load(root, "demo")))
    assert tab.inner_text("#title") == hostile
    assert tab.locator("#table tr").count() == 5


def test_a_law_is_drawn_over_its_data_and_beyond_on_request(tmp_path: Path, tab: Page):
    """Band and line end where the data end, or at three times the largest compute."""
    root = run_sweep(tmp_path, ("vit_a", "vit_b", "vit_c", "vit_d"))
    study = analysed(root)
    number = open_page(tab, root, study)
    compute = [trial["flops_total"] for trial in study.frontier]
    ends = pytest.approx([min(compute), max(compute)], rel=1e-4)
    band, line = tab.evaluate(LAWS)
    assert [min(line), max(line)] == ends
    assert [min(band), max(band)] == [min(line), max(line)]
    tab.check("#beyond")
    drawn(tab, number)
    _, line = tab.evaluate(LAWS)
    assert max(line) == pytest.approx(3 * max(compute), rel=1e-4)


def test_a_law_that_the_data_do_not_support_is_explained_and_not_drawn(
    tmp_path: Path, tab: Page, monkeypatch: pytest.MonkeyPatch
):
    """The page gives the reason, and the Y axis covers the data."""
    plain = fake_trials.values

    def steep(trial, step, noise=0.01):
        """Make the largest size far better than a law through the others."""
        row = plain(trial, step, noise)
        model = trial.read_config().recipe.model.name
        if step and "probe/class_error" in row and model == "vit_c":
            row["probe/class_error"] *= 0.4
        return row

    monkeypatch.setattr(fake_trials, "values", steep)
    root = run_sweep(tmp_path, ("vit_a", "vit_b", "vit_c"))
    study = analysed(root)
    open_page(tab, root, study)
    assert "No law: the interval of b includes 0" in tab.inner_text("#note")
    assert tab.evaluate(LAWS) == []
    assert "law" not in tab.locator(".legendtext").all_text_contents()
    low, high = tab.evaluate(Y_RANGE)
    errors = [trial["probe/class_error"] for trial in study.trials]
    assert min(errors) / 1.2 < 10**low < min(errors)
    assert max(errors) < 10**high < 1


# ---- layout


def boxes(tab: Page, selector: str) -> list[dict[str, float]]:
    return [element.bounding_box() for element in tab.locator(selector).all()]


def test_one_size_is_coloured_by_its_mask_axis(tmp_path: Path, tab: Page):
    """No text of a control is cut, and no two labels of an axis overlap."""
    root = run_sweep(tmp_path, ("vit_b",), scales=fake_trials.SCALES)
    open_page(tab, root, analysed(root))
    assert tab.input_value("#color") == "mask.target_scale"
    assert tab.input_value("#shape") == ""
    legend = tab.locator(".legendtext").all_text_contents()
    assert legend[-3:] == ["ts=.05-.1", "ts=.15-.2", "ts=.2-.3"]
    assert tab.evaluate(CUT_OPTIONS) == []
    ticks = sorted(boxes(tab, ".ytick text"), key=lambda box: box["y"])
    assert len(ticks) > 3
    for i in range(1, len(ticks)):
        assert ticks[i - 1]["y"] + ticks[i - 1]["height"] <= ticks[i]["y"]
    (title,) = boxes(tab, ".annotation-text:text-is('class probe error (1 − top-1)')")
    for tick in ticks:
        assert title["x"] + title["width"] <= tick["x"]


# ---- parabolas at equal compute


def run_equal_compute_sweep(folder: Path) -> Root:
    """Run three budgets with three sizes each as one sweep named iso."""
    root = Root(folder)
    for budget in (1, 2, 4):
        for model, steps in (("vit_a", 540), ("vit_b", 135), ("vit_c", 40)):
            fake_trials.sweep(
                root,
                f"{model}{budget}",
                models=(model,),
                scales=fake_trials.SCALES[:1],
                seeds=(0, 1),
                steps=(budget * steps, 1),
            )
    entries = []
    for name in root.sweeps():
        plan = json.loads(root.sweep(name).plan.read_text())
        entries += [entry for entry in plan["trials"] if entry["steps"] > 1]
    root.sweep("iso").path.mkdir()
    root.sweep("iso").plan.write_text(json.dumps({**plan, "sweep": "iso", "trials": entries}))
    for entry in entries:
        fake_trials.run(root.trial(entry["name"]), every=entry["steps"], commit=entry["steps"])
    return root


def test_parabolas_at_equal_compute_show_the_best_size_and_its_growth(
    tmp_path: Path, tab: Page, monkeypatch: pytest.MonkeyPatch
):
    """Each of three budgets has its best size, and the law of N_opt is shown."""
    plain = fake_trials.values

    def bent(trial, step, noise=0.01):
        """Give the error its minimum at a size that grows with the root of compute."""
        row = plain(trial, step, noise)
        model = trial.read_config().recipe.model
        if step and "probe/class_error" in row:
            size = 12 * model.width**2 * model.depth
            best = 9e4 * (row["flops_total"] / 8e10) ** 0.5
            row["probe/class_error"] *= 1 + 0.1 * np.log(size / best) ** 2
        return row

    monkeypatch.setattr(fake_trials, "values", bent)
    root = run_equal_compute_sweep(tmp_path)
    open_page(tab, root, analysed(root, "iso"), "#view=iso")
    words = tab.inner_text("#plot")
    assert "N_opt, encoder parameters" in words
    assert "N_opt ~ C^" in tab.inner_text("#key")
    assert words.count("FLOP") >= 3
    best = sorted(tab.evaluate(BEST_SIZES))
    assert len(best) == 3
    assert best[0][1] < best[1][1] < best[2][1]
