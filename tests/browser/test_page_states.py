"""What the page says when something is missing, and how it shows two sweeps together."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import scaling_page
from fake_mlflow import FakeMlflow
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster.report import analysis, html, payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

NAMED_MARKS = """
    Object.fromEntries(document.getElementById('plot').data
        .filter((trace) => trace.customdata)
        .map((trace) => [trace.name, new Set(trace.customdata.flat()).size]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """Two sweeps: one varies the target scale, the other one the aspect, at another scale."""
    root = Root(tmp_path_factory.mktemp("root"))
    sizes = ("vit_a", "vit_b")
    shapes = {"scales": fake_trials.SCALES[:1], "aspects": fake_trials.ASPECTS}
    trials = fake_trials.sweep(root, "by_scale", models=sizes, seeds=(0, 1))
    trials += fake_trials.sweep(root, "by_aspect", models=sizes, seeds=(2, 3), **shapes)
    for trial in trials:
        fake_trials.run(trial)
    plan = root.sweep("by_aspect").read_plan()
    for entry in plan["trials"]:  # the scale is no axis of this sweep
        del entry["point"]["mask.target_scale"]
    fake_trials.write_plan(root, "by_aspect", plan["trials"])
    return root


@pytest.fixture(scope="module")
def documents(root: Root) -> dict[str, Any]:
    """The document of each sweep."""
    made = FakeMlflow()
    made.add(root, "by_scale")
    made.add(root, "by_aspect")
    return made.documents


@pytest.fixture
def server(documents: dict[str, Any]) -> FakeMlflow:
    """Both sweeps, completely collected."""
    return FakeMlflow(copy.deepcopy(documents))


@pytest.fixture(scope="module")
def address(root: Root) -> str:
    """The address of the page of the first sweep as a file."""
    return scaling_page.write(root, analysis.analyse(tables.load(root, "by_scale")))


def open_page(tab: Page, address: str, fragment: str) -> None:
    tab.goto(f"{address}{fragment}")
    drawn(tab)


def open_document(
    tab: Page, root: Root, folder: Path, changed: Callable[[list[dict[str, Any]]], None]
) -> str:
    """Open the page of the first sweep with changed trials, and return its note."""
    document = payload.build(tables.load(root, "by_scale"))
    changed(document["trials"])
    path = folder / "page.html"
    path.write_text(html.render(document))
    tab.goto(f"file://{path}#view=scatter")
    drawn(tab)
    return tab.inner_text("#note")


# ---- a wrong address


def test_an_unknown_sweep_is_answered_with_the_nearest_names(server: FakeMlflow, tab: Page):
    """The other sweeps of the address are shown, or else the first one."""
    sentence = "The address has the sweep '{}', which is not known here{}"
    for given, name, hint, shown in (
        ("by_scal", "by_scal", ": did you mean 'by_scale'?", "by_scale"),
        ("zzz", "zzz", ".", "by_scale"),
        ("zzz,by_aspect", "zzz", ".", "by_aspect"),
    ):
        tab.goto("about:blank")
        server.open(tab, f"#view=scatter&sweeps={given}")
        drawn(tab)
        assert tab.inner_text("#note").startswith(sentence.format(name, hint))
        assert tab.locator("#sweeps input:checked").get_attribute("value") == shown
        assert f"sweeps={shown}&" in tab.url
        assert tab.locator("#table tr").count() == 9


@pytest.mark.parametrize(
    ("fragment", "sentence"),
    [
        ("view=scater", "has view 'scater', which is not known here: did you mean 'scatter'?"),
        ("view=bar", "has view 'bar', which is not known here."),
        ("y=foo", "has Y 'foo', which is not known here."),
        ("y=probe/clas_error", "has Y 'probe/clas_error', which is not known here: did you mean"),
        ("x=flops", "has X 'flops', which is not known here"),
        ("color=modl", "has colour 'modl', which is not known here: did you mean 'model'?"),
        ("shape=foo", "has shape 'foo', which is not known here."),
        ("facet=foo", "has Facets 'foo', which is not known here."),
        ("setting=foo", "has Setting 'foo', which is not known here."),
        ("levels=foo", "has Levels at 'foo', which is not known here."),
        ("logx=maybe", "has logx 'maybe', which is not known here."),
        ("sort=-eror", "has the order 'eror', which is not known here: did you mean 'error'?"),
        ("sweeps=foo", "has the sweep 'foo', which is not known here."),
        ("viev=heat", "has the part 'viev', which is not known here: did you mean 'view'?"),
        ("trial=123", "No trial of by_scale has the id '123'."),
        ("filter=foo", "No trial matches foo. All trials are shown."),
    ],
)
def test_what_the_address_asks_for_in_vain_is_named(
    address: str, tab: Page, fragment: str, sentence: str
):
    """The default is drawn; the sentence goes with the next change."""
    open_page(tab, address, f"#{fragment}" if "view" in fragment else f"#view=scatter&{fragment}")
    place = "#problem" if "filter" in fragment else "#note"
    assert tab.inner_text(place).count(sentence) == 1
    assert tab.locator(".scatterlayer .point").count() > 0
    assert tab.locator("#table tr").count() == 9
    if "trial" in fragment:
        tab.keyboard.press("Escape")
    else:
        tab.fill("#filter", "vit_a")
    assert sentence not in tab.inner_text(place)


# ---- nothing to draw yet


def test_a_sweep_that_is_still_collected_says_how_much_has_arrived(server: FakeMlflow, tab: Page):
    """With its document or before there is one."""
    names = [trial["trial"] for trial in server.documents["by_scale"]["trials"]]
    server.arrived["by_scale"] = names[:3]
    server.planned["later"] = 12
    server.open(tab, "#view=scatter&sweeps=by_scale")
    drawn(tab)
    assert (
        "Still collecting by_scale: 3 of 8 trials have arrived. Reload to see more."
        in tab.inner_text("#note")
    )
    server.open(tab, "#sweeps=later")
    tab.reload()
    drawn(tab)
    assert (
        tab.inner_text("#note")
        == "Still collecting later: 0 of 12 trials have arrived. Reload to see more."
    )


def test_nothing_has_finished_yet(root: Root, tmp_path: Path, tab: Page):
    def change(trials: list[dict[str, Any]]) -> None:
        for i, trial in enumerate(trials):
            trial["state"] = "running" if i < 2 else "queued"

    note = open_document(tab, root, tmp_path, change)
    assert "No trial has finished yet: 6 queued, 2 running." in note


def test_trials_without_any_metric_have_one_sentence(root: Root, tmp_path: Path, tab: Page):
    """The figure is not shown; the table is."""

    def change(trials: list[dict[str, Any]]) -> None:
        for trial in trials:
            trial["state"] = "queued"
            for key in [key for key in trial if "/" in key or key == "loss"]:
                del trial[key]

    note = open_document(tab, root, tmp_path, change)
    assert note == "No trial has finished or has a result to draw yet: 8 queued."
    assert tab.locator("#plot").is_hidden()
    assert tab.locator("#table tr").count() == 9


def test_the_last_data_stay_when_the_server_is_gone(server: FakeMlflow, tab: Page):
    """Another sweep cannot be loaded; table, filter and figure of the first one go on."""
    server.open(tab, "#view=scatter&sweeps=by_scale&curves=0")
    number = drawn(tab)
    server.is_gone = True
    tab.check("input[value=by_aspect]")
    number = drawn(tab, number)
    wanted = "MLflow does not answer. The last data stay. Reload when the server is back."
    assert wanted in tab.inner_text("#note")
    assert tab.locator("#table tr").count() == 9
    tab.fill("#filter", "vit_a")
    drawn(tab, number)
    assert tab.locator("#table tr").count() == 5
    tab.uncheck("input[value=by_scale]")
    tab.wait_for_function("document.getElementById('note').textContent.startsWith('MLflow does')")
    assert tab.locator("#table tr").count() == 5
    assert tab.locator(".scatterlayer .point").count() > 0


def test_without_a_server_the_page_says_so(server: FakeMlflow, tab: Page):
    server.is_gone = True
    server.open(tab)
    tab.get_by_text("MLflow does not answer. Reload when the server is back.").wait_for()


# ---- two sweeps


def column(tab: Page, head: str) -> list[str]:
    heads = tab.locator("#table th").all_inner_texts()
    lines = tab.locator(f"#table td:nth-child({heads.index(head) + 1})")
    return lines.all_inner_texts()


def test_two_sweeps_are_told_apart_by_colour_and_compared_by_setting(server: FakeMlflow, tab: Page):
    """The colour shows the sweep, and what a sweep did not vary comes from its configs."""
    server.open(tab, "#view=scatter&sweeps=by_scale")
    number = drawn(tab)
    assert tab.input_value("#color") == "model"
    tab.check("input[value=by_aspect]")
    drawn(tab, number)
    assert tab.input_value("#color") == "sweep"
    assert tab.evaluate(NAMED_MARKS) == {"by_scale": 8, "by_aspect": 8}
    assert column(tab, "sweep") == ["by_scale"] * 8 + ["by_aspect"] * 8
    assert set(column(tab, "target scale")[8:]) == {".15-.2"}
    assert set(column(tab, "target aspect")[:8]) == {".75-1.5"}
    settings = tab.locator("#setting option").evaluate_all("all => all.map((each) => each.value)")
    assert settings == ["", "ts=.05-.1 ta=.75-1.5", "ts=.15-.2 ta=.3-.6", "ts=.15-.2 ta=.75-1.5"]
    tab.fill("#filter", "ta=.75-1.5 ts=.15-.2")
    assert column(tab, "sweep") == ["by_scale"] * 4 + ["by_aspect"] * 4
    assert "Warning" not in tab.inner_text("#note")


def test_sweeps_over_different_images_are_shown_with_a_warning(server: FakeMlflow, tab: Page):
    server.documents["by_aspect"]["fixed"]["data.digest"] = "other"
    server.open(tab, "#view=scatter&sweeps=by_scale,by_aspect")
    drawn(tab)
    note = tab.inner_text("#note")
    assert "Warning: the sweeps have another training set each" in note
    assert "by_scale abc, by_aspect other" in note
    assert "validation set" not in note


def test_two_sizes_of_one_name_are_told_apart(server: FakeMlflow, tab: Page):
    """Their names get the parameters, in one sweep and between two."""
    for trial in server.documents["by_scale"]["trials"]:
        if trial["model"] == "vit_a" and trial["seed"] == 1:
            trial["parameters"] = 5e6
    for trial in server.documents["by_aspect"]["trials"]:
        if trial["model"] == "vit_b":
            trial["parameters"] = 7e6
    server.open(tab, "#view=scatter&color=model&sweeps=by_scale")
    number = drawn(tab)
    marks = tab.evaluate(NAMED_MARKS)
    assert sorted(marks.values()) == [2, 2, 4]
    assert {"vit_b", "vit_a 5M"} <= set(marks)
    tab.check("input[value=by_aspect]")
    number = drawn(tab, number)
    tab.select_option("#color", "model")
    drawn(tab, number)
    marks = tab.evaluate(NAMED_MARKS)
    assert marks["vit_b 7M"] == 4
    assert "vit_b" not in marks


def test_findings_of_another_version_are_left_out_and_trials_are_shown(
    server: FakeMlflow, tab: Page
):
    """As after an upgrade, before the figure was drawn again."""
    document = server.documents["by_scale"]
    document["version"] = 1
    del document["heat"]
    for law in document["laws"].values():
        law["frontier"] = ["a trial"]
    server.open(tab, "#sweeps=by_scale&view=scatter")
    drawn(tab)
    assert "of another version: run jepa scaling by_scale" in tab.inner_text("#note")
    assert tab.locator("#table tr:has(td)").count() == len(document["trials"])


def test_a_state_that_a_user_wrote_has_a_mark_too(server: FakeMlflow, tab: Page):
    server.documents["by_scale"]["trials"][0]["state"] = "excluded"
    server.open(tab, "#sweeps=by_scale&view=scatter")
    drawn(tab)
    assert "☆ excluded" in tab.locator("#table .state").all_inner_texts()


def test_a_renamed_experiment_is_found_by_the_name_of_its_sweep(server: FakeMlflow, tab: Page):
    """Also one with a comma, and by the address that its note has."""
    server.names["by_scale"] = "by scale, final"
    for fragment in ("#sweeps=by_scale&view=scatter", ""):
        server.open(tab, fragment)
        drawn(tab)
        assert "not known here" not in tab.inner_text("#note")
        assert tab.locator("#table tr:has(td)").count()
