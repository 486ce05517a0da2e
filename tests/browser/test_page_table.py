"""The table of trials, its filter, the card of a trial, and the address of a view."""

from pathlib import Path

import pytest
import scaling_page
from playwright.sync_api import Browser, Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster.report import analysis, html, payload
from jepa_cluster.results import tables
from jepa_cluster.trial.directory import Root
from jepa_cluster.trial.status import STATES

pytestmark = pytest.mark.browser

MARKED_TRIALS = """
    [...new Set(
        document.getElementById('plot').data
            .filter((trace) => trace.customdata)
            .flatMap((trace) => trace.customdata.flat())
    )].sort()
"""
HEADS = (
    "#",
    "target scale",
    "model",
    "seed",
    "state",
    "step",
    "class error",
    "untrained",
    "loss",
    "GPU-hours",
    "attempts",
)
POINT = ".scatterlayer .point"
METRIC_NAME = "async (name) => (await import('scaling/marks.js')).metricName(name)"
MARK_OF_STATE = (
    """async (state) => (await import('scaling/constants.js')).STATE_MARKS[state].glyph"""
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A sweep of 12 trials: one was killed at step 35, one has not started."""
    root = Root(tmp_path_factory.mktemp("root"))
    fake_trials.unfinished_sweep(root, waiting=[10])
    return root


@pytest.fixture(scope="module")
def address(root: Root) -> str:
    """The address of the page as a file, with points."""
    study = analysis.analyse(tables.load(root, "demo"))
    return f"{scaling_page.write(root, study)}#view=scatter"


def column(tab: Page, head: str) -> list[str]:
    heads = tab.locator("#table th").all_inner_texts()
    lines = tab.locator(f"#table td:nth-child({heads.index(head) + 1})")
    return lines.all_inner_texts()


def sort_by(tab: Page, head: str) -> str | None:
    """Click a head, and return how its column is sorted."""
    cell = tab.locator("#table th").filter(has_text=head)
    cell.locator("button").click()
    return cell.get_attribute("aria-sort")


# ---- columns


def test_seed_index_and_attempts_have_all_their_digits(tab: Page, tmp_path: Path):
    seeds = (7, 20240101, 4294967295)
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, seeds=seeds, models=("vit_a",)):
        fake_trials.run(trial)
    study = analysis.analyse(tables.load(root, "demo"))
    tab.goto(f"{scaling_page.write(root, study)}#view=scatter&sort=seed")
    drawn(tab)
    assert column(tab, "seed") == [str(seed) for seed in seeds for _ in range(2)]
    assert sorted(column(tab, "#")) == list("012345")
    assert set(column(tab, "attempts")) == {"1"}


def test_what_the_sweep_varies_comes_first_under_names_for_people(address: str, tab: Page):
    """After the index; then state, error, error before training, loss, cost and attempts."""
    tab.goto(address)
    drawn(tab)
    assert tuple(tab.locator("#table th").all_inner_texts()) == HEADS
    assert set(column(tab, "target scale")) == {".05-.1", ".15-.2"}
    assert column(tab, "attempts").count("0") == 1
    assert column(tab, "#") == list(map(str, range(12)))


def test_every_state_has_a_mark_of_its_own_beside_its_name(address: str, tab: Page):
    """Queued, new, requeued and interrupted trials share the mark of those that wait."""
    tab.goto(address)
    drawn(tab)
    marks = {state: tab.evaluate(MARK_OF_STATE, state) for state in STATES}
    assert all(marks.values())
    assert len(set(marks.values())) == len(STATES) - 3
    shown = column(tab, "state")
    assert shown.count("● done") == 10
    assert len(set(shown)) == 3
    colors = tab.evaluate("""[...document.querySelectorAll('#table .state')].map(
        (each) => [each.textContent, getComputedStyle(each).color].join())""")
    assert len({color.partition(",")[2] for color in colors}) == 3


def test_metrics_have_short_names(address: str, tab: Page):
    tab.goto(address)
    drawn(tab)
    names = {
        "probe/class_error": "class error",
        "probe/online/class_error": "class error, online",
        "probe/mean_linear_error": "mean linear error",
        "gain/probe/class_error": "class error, gain",
        "probe/rankme": "RankMe",
        "loss": "training loss",
    }
    assert {metric: tab.evaluate(METRIC_NAME, metric) for metric in names} == names


# ---- sorting


def test_a_click_or_enter_on_a_head_sorts(address: str, tab: Page):
    """Numbers as numbers, trials without one last; the address opens the same order."""
    tab.goto(address)
    drawn(tab)
    assert sort_by(tab, "class error") == "ascending"
    errors = column(tab, "class error")
    assert errors[-1] == "–"
    rising = list(map(float, errors[:-1]))
    assert rising == sorted(rising)
    tab.keyboard.press("Enter")  # the head has kept the focus
    assert tab.locator("th[aria-sort=descending]").inner_text().startswith("class error")
    errors = column(tab, "class error")
    assert errors[-1] == "–"
    assert list(map(float, errors[:-1])) == rising[::-1]
    assert "sort=-error" in tab.url
    tab.evaluate("document.querySelectorAll('#table tr')[1].id = 'moved'")
    sort_by(tab, "seed")
    assert tab.locator("#moved").count() == 1  # lines are moved, not built again
    sort_by(tab, "class error")
    sort_by(tab, "class error")
    tab.reload()
    drawn(tab)
    assert column(tab, "class error") == errors


def test_labels_are_sorted_in_natural_order(tmp_path: Path, tab: Page):
    """80k comes after 9k, and models come by size."""
    steps = (9000, 80000, 600)
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_b", "vit_a"), steps=steps):
        fake_trials.run(trial, every=600, commit=600, stop=600)
    sweep = tables.load(root, "demo")
    document = payload.build(sweep)
    for trial in document["trials"]:
        trial["model"] = {"vit_a": "vit_small", "vit_b": "vit_big"}[trial["model"]]
    path = tmp_path / "page.html"
    path.write_text(html.render(document))
    tab.goto(f"file://{path}#view=scatter")
    drawn(tab)
    sort_by(tab, "steps")
    assert list(dict.fromkeys(column(tab, "steps"))) == ["600", "9k", "80k"]
    sort_by(tab, "model")
    assert list(dict.fromkeys(column(tab, "model"))) == ["vit_small", "vit_big"]


def test_the_head_of_the_table_stays_in_sight(address: str, tab: Page):
    tab.set_viewport_size({"width": 1440, "height": 300})
    tab.goto(address)
    drawn(tab)
    tab.evaluate("document.querySelector('.scroll').scrollTop = 60")
    head = tab.locator("#table th").first.bounding_box()
    box = tab.locator(".scroll").bounding_box()
    assert abs(head["y"] - box["y"]) <= 2
    assert tab.evaluate("document.querySelector('.scroll').scrollTop") == 60


# ---- filter


def test_the_filter_selects_trials_of_table_and_figure(root: Root, address: str, tab: Page):
    """Its words are in the address; an unknown word is named, and all trials are shown."""
    tab.goto(address)
    number = drawn(tab)
    tab.fill("#filter", "vit_b !s0")
    number = drawn(tab, number)
    assert column(tab, "model") == ["vit_b", "vit_b"]
    assert column(tab, "seed") == ["1", "1"]
    assert tab.inner_text("#count") == "2 of 12"
    trials = {trial.name: trial for trial in tables.load(root, "demo").trials}
    shown = tab.evaluate(MARKED_TRIALS)
    assert [(trials[name].seed, trials[name].point["model"]) for name in shown] == [
        (1, "vit_b")
    ] * 2
    assert "filter=vit_b" in tab.url
    tab.select_option("#view", "effect")
    number = drawn(tab, number)
    assert tab.evaluate(MARKED_TRIALS) == shown
    tab.fill("#filter", "modle=vit_b")
    drawn(tab, number)
    problem = "Trials have no 'modle': did you mean 'model'? All trials are shown."
    assert tab.inner_text("#problem") == problem
    assert tab.locator("#table tr").count() == 13
    assert tab.get_attribute("#filter", "aria-invalid") == "true"


# ---- the card


def test_a_click_pins_the_card_and_escape_unpins_it(address: str, tab: Page):
    """What the pointer touches does not replace it; the address holds it."""
    tab.goto(address)
    drawn(tab)
    line = tab.locator("#table tr").nth(3)
    label = line.get_attribute("title")
    line.click()
    assert tab.inner_text("#trial h3") == label
    for words in (
        "class error",
        "untrained",
        "loss",
        "RankMe",
        "attempts",
        "GPU-h",
        "jepa why demo",
    ):
        assert words in tab.inner_text("#trial")
    assert tab.locator("#trial canvas").count() == 4
    assert "trial=" in tab.url
    tab.locator(POINT).last.hover(force=True)
    tab.locator("#table tr").nth(5).focus()
    assert tab.inner_text("#trial h3") == label
    tab.reload()
    drawn(tab)
    assert tab.inner_text("#trial h3") == label
    tab.keyboard.press("Escape")
    assert tab.locator("#trial h3").count() == 0
    assert "trial=" not in tab.url
    tab.locator(POINT).first.hover(force=True)
    tab.wait_for_selector("#trial h3")


def test_a_click_on_a_point_pins_all_its_seeds(address: str, tab: Page):
    tab.goto(address)
    drawn(tab)
    tab.locator(POINT).first.click(force=True)
    tab.wait_for_selector("#trial.pinned")
    assert tab.locator("#trial dl").count() == 2
    assert tab.locator("#table tr[aria-selected=true]").count() == 2
    tab.click("#unpin")
    assert tab.locator("#trial.pinned").count() == 0


def test_the_keyboard_reaches_and_pins_every_trial(address: str, tab: Page):
    """One step of Tab enters the lines; arrows move, Enter pins."""
    tab.goto(address)
    drawn(tab)
    tab.locator("#table th button").last.focus()
    tab.keyboard.press("Tab")
    for _ in range(11):
        tab.keyboard.press("ArrowDown")
    last = tab.locator("#table tr").last.get_attribute("title")
    assert tab.inner_text("#trial h3") == last
    tab.keyboard.press("Enter")
    tab.keyboard.press("ArrowUp")
    assert tab.evaluate("document.activeElement.title") not in ("", last)
    assert tab.inner_text("#trial.pinned h3") == last


@pytest.mark.parametrize(("width", "height"), [(1440, 700), (390, 844)])
def test_a_pinned_card_stays_in_sight(address: str, tab: Page, width: int, height: int):
    """Beside the table on a wide screen; on a phone, on the lower edge over less than half."""
    tab.set_viewport_size({"width": width, "height": height})
    tab.goto(address)
    drawn(tab)
    tab.locator("#table tr").last.click()
    tab.evaluate("scrollTo(0, document.body.scrollHeight)")
    box = tab.locator("#trial").bounding_box()
    assert box["y"] >= 0
    assert box["y"] + box["height"] <= height + 1
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    if width < 600:
        assert box["y"] >= height / 2


# ---- the address


def test_back_and_forward_step_through_views(address: str, tab: Page):
    """What the page fills in is no step: Back from the first view leaves the page."""
    tab.goto("about:blank")
    tab.goto(address)
    number = drawn(tab)
    tab.select_option("#x", "images_seen")
    number = drawn(tab, number)
    sort_by(tab, "loss")
    tab.locator("#filter").press_sequentially("vit_a")  # one step, not one per key
    number = drawn(tab, number)
    tab.locator("#table tr").nth(1).click()
    seen = []
    for _ in range(4):
        tab.go_back()
        number = drawn(tab, number)
        filtered, order = tab.input_value("#filter"), tab.locator("th[aria-sort=ascending]").count()
        pinned = tab.locator("#trial.pinned").count()
        seen.append((filtered, order, tab.input_value("#x"), pinned))
    assert seen == [
        ("vit_a", 1, "images_seen", 0),
        ("", 1, "images_seen", 0),
        ("", 0, "images_seen", 0),
        ("", 0, "flops_total", 0),
    ]
    tab.go_forward()
    drawn(tab, number)
    assert tab.input_value("#x") == "images_seen"
    tab.go_back()
    tab.go_back()
    assert tab.url == "about:blank"


def test_a_colleague_sees_the_same_filter_order_and_card(address: str, tab: Page, browser: Browser):
    tab.goto(address)
    number = drawn(tab)
    tab.fill("#filter", "vit_a vit_b")
    drawn(tab, number)
    sort_by(tab, "class error")
    tab.locator("#table tr").nth(2).click()
    other = browser.new_page()
    other.goto(tab.url)
    drawn(other)
    for each in ("#table", "#trial", "#note", "#filter"):
        assert other.inner_text(each) == tab.inner_text(each)
    assert other.evaluate(MARKED_TRIALS) == tab.evaluate(MARKED_TRIALS)
    other.close()
