"""Every text of the page and of the PNG has a contrast of 4.5 against its ground."""

import pytest
import scaling_page
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials
from support.colors import contrast

from jepa_cluster.report import analysis, figure_style
from jepa_cluster.results import tables
from jepa_cluster.tracking.chart_view import ramp
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

LEGIBLE = 4.5  # WCAG, of small text
# [[text, colour, ground], ...] of what is seen: a text's fill or colour with its opacity, over the
# nearest background that is not transparent. The text of heat maps is on cells instead.
TEXTS = """() => {
    const pen = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });
    const paint = (...colors) => {
        pen.clearRect(0, 0, 1, 1);
        for (const [color, alpha] of colors) {
            pen.globalAlpha = alpha;
            pen.fillStyle = color;
            pen.fillRect(0, 0, 1, 1);
        }
        const [r, g, b] = pen.getImageData(0, 0, 1, 1).data;
        return '#' + [r, g, b].map((v) => v.toString(16).padStart(2, '0')).join('');
    };
    const found = [];
    for (const each of document.querySelectorAll('body *')) {
        const own = [...each.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        const isMark = /^[●◌◇□×☆▲]$/.test(each.textContent.trim());
        if (!own || isMark || each.closest('.heatmaplayer, script')) continue;
        if (!each.getClientRects().length) continue;
        const css = getComputedStyle(each), grounds = [];
        let opacity = 1;
        for (let e = each; e; e = e.parentElement) {
            opacity *= +getComputedStyle(e).opacity;
            grounds.unshift([getComputedStyle(e).backgroundColor, 1]);
        }
        grounds.unshift(['Canvas', 1]);
        const color = each instanceof SVGElement ? css.fill : css.color;
        found.push([each.textContent.trim().slice(0, 40), paint(...grounds, [color, opacity]),
            paint(...grounds)]);
    }
    return found;
}"""
CELL_INK = "document.getElementById('plot').data.filter((d) => d.type === 'heatmap')[0].textfont"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of two mask axes, three sizes, and trials in several states."""
    root = Root(tmp_path_factory.mktemp("root"))
    trials = fake_trials.sweep(root, aspects=fake_trials.ASPECTS, seeds=(0, 1))
    for number, trial in enumerate(trials):
        if number < 3:
            fake_trials.run(trial, stop=20, kill=True)
            (trial.stop, trial.failed, trial.heartbeat)[number].write_text("{}")
        else:
            fake_trials.run(trial)
    study = analysis.analyse(tables.load(root, "demo"))
    return scaling_page.write(root, study)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["effect", "scatter", "heat", "iso"])
def test_all_text_is_legible(address: str, tab: Page, view: str, scheme):
    """Also a pinned card, a selected line of the table, and a wrong filter."""
    tab.emulate_media(color_scheme=scheme)
    tab.goto(f"{address}#view={view}&filter=foo")
    drawn(tab)
    tab.locator("#table tr").nth(1).click()
    texts: list[list[str]] = tab.evaluate(TEXTS)
    assert len(texts) > 100
    low = [(text, contrast(color, ground)) for text, color, ground in texts]
    assert [pair for pair in low if pair[1] < LEGIBLE] == []
    if view in ("effect", "heat"):
        ink = tab.evaluate(CELL_INK)["color"]
        cells = ramp(figure_style.HEAT_COLORS, 99)
        assert min(contrast(ink, cell) for cell in cells) >= LEGIBLE


def test_the_text_of_the_png_is_legible():
    assert contrast(figure_style.INK, "#ffffff") >= LEGIBLE
    cells = ramp(figure_style.HEAT_COLORS, 99)
    assert min(contrast("#000000", cell) for cell in cells) >= LEGIBLE
