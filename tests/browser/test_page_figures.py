"""How figures look on the page: colours, marks, ticks, labels, heat maps, downloads."""

import functools
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scaling_page
from PIL import Image
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster.report import analysis, figure_style
from jepa_cluster.report.size_law import SizeLaw
from jepa_cluster.results import tables
from jepa_cluster.tracking import chart_view
from jepa_cluster.trial import calibration
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.files import write_json

pytestmark = pytest.mark.browser

MASKS = {"scales": fake_trials.SCALES, "aspects": fake_trials.ASPECTS, "seeds": (0, 1)}
Written = Callable[..., tuple[analysis.Analysis, str]]
PLOT = "document.getElementById('plot')"
COLOR_OF_LINES = f"""
    {PLOT}.data.filter((d) => d.mode === 'lines+markers').map((d) => [d.name, d.line.color])
"""
OPEN_MARKS = f"""
    [...new Set({PLOT}.data.flatMap((d) => d.marker?.symbol || []).filter((s) => /open/.test(s)))]
"""
HEAT = f"{PLOT}.data.filter((d) => d.type === 'heatmap')"
OVERLAPS = """
    (selector) => {
        const boxes = [...document.querySelectorAll(selector)]
            .filter((e) => e.textContent.trim())
            .map((e) => [e.textContent, e.getBoundingClientRect()]);
        const found = [];
        boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
            if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3
                && q.top < p.bottom - 3) found.push(`${a} | ${b}`);
        }));
        return found;
    }
"""
TICKS = f"""
    Object.keys({PLOT}.layout).filter((k) => /axis/.test(k)).map((k) =>
        ({PLOT}.layout[k].tickvals || []).filter((v, i, all) => all.length).length)
"""
MARK_OF_TRIALS = f"""
    {PLOT}.data.filter((d) => d.customdata && Array.isArray(d.marker?.symbol)).flatMap((d) =>
        d.customdata.flatMap((names, i) => names.map((n) => [n, d.marker.symbol[i], d.marker.color]
        )))
"""
MM = 96 / 25.4  # px
MAX_HEIGHT = 230  # mm, of the text of a page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Return a function that runs a sweep and writes its page: once for all that only read it."""

    @functools.cache
    def write(states: tuple[str, ...], **sweep) -> tuple[analysis.Analysis, str]:
        root = Root(tmp_path_factory.mktemp("root"))
        for number, trial in enumerate(fake_trials.sweep(root, **sweep)):
            state = states[number] if number < len(states) else "done"
            if state == "done":
                fake_trials.run(trial, every=20, commit=20)
                continue
            fake_trials.run(trial, stop=20, kill=True)
            if state == "running":
                trial.heartbeat.touch()
            elif state == "stopped":
                trial.stop.touch()
            elif state == "failed":
                write_json(trial.failed, {"error": "diverged", "cause": "diverged"})
        study = analysis.analyse(tables.load(root, "demo"))
        return study, scaling_page.write(root, study)

    return write


def open_page(
    tab: Page,
    written: Written,
    fragment: str = "",
    states: tuple[str, ...] = (),
    **sweep,
) -> analysis.Analysis:
    """Open the page of a sweep as a file. states: of its first trials."""
    study, address = written(states, **sweep)
    tab.goto(f"{address}#{fragment}")
    drawn(tab)
    return study


def test_sizes_have_the_colours_of_mlflow_small_to_large(tab: Page, written: Written):
    """The name of each size is at the end of its line, in its colour, and there is no legend."""
    models = ("vit_c", "vit_a", "vit_b")
    study = open_page(tab, written, models=models, seeds=(0, 1))
    sizes = [figure_style.size_of(row) for row in study.trials]
    wanted = chart_view.size_colors(sizes)
    shown = tab.evaluate(COLOR_OF_LINES)
    assert shown == [[name, color] for (_, name), color in wanted.items()]
    texts = tab.locator(".annotation-text").all_text_contents()
    assert {f"● {model}" for model in models} <= set(texts)
    assert tab.locator(".legendtext").count() == 0
    assert tab.evaluate(OVERLAPS, ".annotation-text") == []


def test_marks_show_states_and_the_key_names_those_that_are_drawn(tab: Page, written: Written):
    states = ("running", "stopped", "failed", "interrupted")
    open_page(tab, written, "view=scatter", states, seeds=(0, 1))
    wanted = {figure_style.STATE_MARKS[state].symbol for state in states}
    assert set(tab.evaluate(OPEN_MARKS)) == wanted
    key = tab.inner_text("#key")
    for state in (*states, "done"):
        assert f"{figure_style.STATE_MARKS[state].glyph} {state}" in key
    assert "queued" not in key


def test_the_key_names_the_factor_of_rates_that_are_not_known_to_be_near(tmp_path: Path, tab: Page):
    """Trials of a sweep whose calibration has no rate of them have a dark rim."""
    made = calibration.Calibration(
        calibration.VERSION, "demo_lr", "probe/class_error", {}, (), None
    )
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root):
        fake_trials.run(trial, every=20, commit=20)
    made.write(root.sweep("demo").calibration)
    study = analysis.analyse(tables.load(root, "demo"))
    tab.goto(f"{scaling_page.write(root, study)}#view=scatter")
    drawn(tab)
    wanted = f"dark rim: learning rate not known to be within a factor of {calibration.NEAR} of"
    assert wanted in tab.inner_text("#key")


@pytest.mark.parametrize("width", [1440, 390])
def test_ticks_of_nearly_equal_budgets_do_not_overlap(tab: Page, written: Written, width: int):
    """In each of several facets; an axis has six ticks at most, and the legend does not scroll."""
    tab.set_viewport_size({"width": width, "height": 900})
    fragment = "view=scatter&facet=mask.target_scale"
    open_page(tab, written, fragment, models=("vit_b",), steps=(58, 60), **MASKS)
    assert max(tab.evaluate(TICKS)) <= figure_style.MAX_TICKS
    for axis in ("xtick", "ytick"):
        assert tab.evaluate(OVERLAPS, f".{axis} text") == []
    assert tab.locator(".scrollbar").evaluate_all(
        "all => all.every((e) => !+e.getAttribute('height'))"
    )
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_heat_maps_of_two_mask_axes_are_below_the_effects(tab: Page, written: Written):
    """One per size on one scale, n in each cell; cells in which all trials failed are marked."""
    study = open_page(tab, written, "", ("failed", "failed"), models=("vit_a", "vit_b"), **MASKS)
    assert tab.input_value("#view") == "effect"
    assert tab.evaluate(f"{HEAT}.length") == len(study.effects.models)
    assert set(tab.evaluate(f"{HEAT}.map((d) => d.coloraxis)")) == {"coloraxis"}
    assert "n = 2" in tab.inner_text("#plot")
    assert "nothing finished: × failed" in tab.inner_text("#key")
    marks = (
        f"{PLOT}.data.filter((d) => d.marker?.symbol?.[0] === 'x-thin-open').map((d) => d.x.length)"
    )
    assert tab.evaluate(marks) == [1]
    images = tab.evaluate(f"{PLOT}.layout.images.length")
    assert images >= len(fake_trials.SCALES)
    bars = tab.evaluate(f"{PLOT}.data.filter((d) => d.type === 'bar')[0].x")
    values = [100 * answer.effect.value for answer in study.answers]
    assert sorted(bars[:-1]) == pytest.approx(sorted(values), rel=1e-4)


def test_levels_can_be_shown_at_their_realised_fraction(tab: Page, written: Written):
    study = open_page(tab, written, "levels=context_fraction", models=("vit_a", "vit_b"), **MASKS)
    assert "context, share of patches" in tab.inner_text("#plot")
    x = tab.evaluate(f"{PLOT}.data.find((d) => d.mode === 'lines+markers').x")
    fractions = [row["context_fraction"] for row in study.trials]
    assert min(fractions) - 1e-6 <= min(x) < max(x) <= max(fractions) + 1e-6


@pytest.mark.parametrize("millimetres", [85, 175])
def test_a_download_is_dark_on_white_at_its_width(tab: Page, written: Written, millimetres: int):
    """Whatever the colours of the page; from the file alone; with the labels of the lines."""
    tab.emulate_media(color_scheme="dark")
    open_page(tab, written, models=("vit_a", "vit_b"), seeds=(0, 1))
    tab.select_option("#mm", str(millimetres))
    width = round(millimetres * MM)
    files = {}
    for kind in ("png", "svg"):
        with tab.expect_download() as download:
            tab.click(f"#{kind}")
        files[kind] = Path(download.value.path()).read_bytes()
    picture = Image.open(io.BytesIO(files["png"])).convert("RGB")
    assert picture.width == 2 * width
    assert picture.getpixel((2, 2)) == (255, 255, 255)
    svg = files["svg"].decode()
    assert f'width="{width}"' in svg
    assert "font-size: 10.6667px" in svg
    assert "vit_a" in svg
    tab.click("#pdf")
    frame = tab.wait_for_selector("#print", state="attached").content_frame()
    frame.wait_for_selector("svg")
    assert f"size: {millimetres}mm" in frame.content()
    assert "vit_b" in (frame.text_content("svg") or "")


def downloaded(tab: Page, millimetres: int) -> str:
    """Return the SVG that the page makes at a width."""
    tab.select_option("#mm", str(millimetres))
    with tab.expect_download() as download:
        tab.click("#svg")
    return Path(download.value.path()).read_text()


def test_every_download_has_the_key_and_fits_on_a_page(tab: Page, written: Written):
    """Also with many facets; nothing is smaller than 8 pt but the powers of ten."""
    masks = {**MASKS, "scales": fake_trials.SCALES}
    open_page(tab, written, "", models=tuple(fake_trials.SIZES), steps=(20, 60), **masks)
    address, _ = tab.url.split("#")
    panels = 2 + len(fake_trials.SIZES)  # of two settings, with heat maps
    for fragment, words in (
        ("view=effect", ("band: 90 % interval", "● vit_e", "Cells:")),
        ("view=scatter", ("colour: model", "shape: target scale", "● done", "ts=.2-.3", "vit_e")),
        ("view=scatter&facet=setting&color=seed", ("colour: seed", "ts=.2-.3 ta=.75-1.5")),
        ("view=heat", ("Cells:", "vit_e")),
        ("view=iso", ()),
    ):
        tab.goto("about:blank")
        tab.goto(f"{address}#{fragment}")
        drawn(tab)
        for millimetres in (85, 175):
            svg = downloaded(tab, millimetres)
            height = re.search(r'<svg[^>]* height="([\d.]+)"', svg)
            assert height
            assert float(height[1]) <= MAX_HEIGHT * MM, fragment
            sizes = re.findall(r"font-size: ?([\d.]+)px", svg)
            assert min(map(float, sizes)) >= 8 * 96 / 72 - 0.01
            text = re.sub(r"<[^>]+>", "", svg)
            for word in words:
                assert word in text, fragment
            if "effect" in fragment:
                assert svg.count('class="subplot ') == panels + 1
                assert "The first" not in text


def test_many_panels_are_left_out_with_a_sentence(tab: Page, written: Written):
    """Of a facet per seed; the lowest panels are 40 px high."""
    open_page(tab, written, "view=scatter&facet=seed", models=("vit_a",), seeds=range(14))
    svg = downloaded(tab, 85)
    assert re.search(r"The first \d+ of 14 panels", svg)
    assert "The first 12 of 14 panels" in tab.inner_text("#key")


@pytest.mark.parametrize("models", [("vit_a", "vit_b"), ("vit_b",)])
def test_colours_and_shapes_mean_the_same_on_the_page_and_in_the_png(
    tab: Page, written: Written, models: tuple[str, ...]
):
    """Shape shows the first setting; of one size, colour does. The key of both says so."""
    study = open_page(tab, written, "view=scatter", models=models, **MASKS)
    style = figure_style.Style(study)
    shown = {name: (symbol, color) for name, symbol, color in tab.evaluate(MARK_OF_TRIALS)}
    for row in study.trials:
        mark = style.mark(row)
        symbol, color = shown[row["trial"]]
        assert (figure_style.SHAPES[symbol], color) == (mark["marker"], mark["color"])
    assert tab.inner_text("#key").startswith(style.title.replace(", ", " · "))
    names = [handle.get_label() for handle in figure_style.legend_handles(style, False)]
    drawn_names = tab.locator(".legendtext").all_text_contents()
    assert set(style.names.values()) <= set(names) & set(drawn_names)


def test_the_best_size_by_the_surface_is_drawn_without_a_shared_budget(tab: Page, written: Written):
    """The line of E(N, D) has the numbers of the analysis; there is no parabola beside it."""
    study = open_page(
        tab,
        written,
        "view=iso",
        scales=fake_trials.SCALES[:1],
        seeds=(0, 1),
        steps=(20, 60, 180),
    )
    assert isinstance(study.size_law, SizeLaw)
    (line,) = tab.evaluate(f"{PLOT}.data.filter((d) => d.mode === 'lines')")
    assert line["y"] == pytest.approx(study.size_law.at(np.array(line["x"])), rel=1e-4)
    assert f"N_opt ~ C^{study.size_law.exponent}" in tab.inner_text("#key")
    assert "no iso-FLOP curve" in tab.inner_text("#note")
