"""`jepa ui` in a browser: MLflow with our chart view, and the Scaling page of a sweep."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, Route
from scaling_page import BEARER, TOKEN, drawn
from support import fake_trials
from testcluster import claim_ports

from jepa_cluster.report import analysis, figure_numbers, points
from jepa_cluster.results import tables
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

# JavaScript that returns what Plotly has drawn
POINT_SYMBOLS = """
    document.getElementById('plot').data
        .filter((trace) => trace.error_y)
        .flatMap((trace) => trace.marker.symbol)
"""
POINTS_WITH_WHISKERS = """
    document.getElementById('plot').data
        .filter((trace) => trace.error_y)
        .flatMap((trace) => trace.y.map((y, i) => [
            trace.text[i].match(/<b>(.*)<.b>/)[1],
            y,
            y - trace.error_y.arrayminus[i],
            y + trace.error_y.array[i],
        ]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A sweep of 12 trials, one of them killed at step 35."""
    root = Root(tmp_path_factory.mktemp("root"))
    fake_trials.unfinished_sweep(root)
    return root


@pytest.fixture(scope="module")
def site(root: Root) -> Iterator[str]:
    """The address of `jepa ui`, which ends after TERM with exit code 0 and its last line."""
    (claim,) = claim_ports(1)
    port = claim.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")}
    env |= {"JEPA_ROOT": str(root.path), "JEPA_UI_TOKEN": TOKEN}
    log = root.path / "ui.log"
    command = [sys.executable, "-m", "jepa_cluster", "ui", "--port", str(port)]
    with log.open("w") as out:
        ui = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        for words in ("ready: ", "points sent", "  demo: "):
            wait(lambda words=words: words in log.read_text(), ui)
        wait((root.sweep("demo").path / "scaling.png").exists, ui)
        yield f"http://127.0.0.1:{port}"
    finally:
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(60) == 0, log.read_text()
        claim.close()
    assert log.read_text().endswith("stopped\n")


def wait(done: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert process.poll() is None, "jepa ui did not become ready"
        assert time.monotonic() < deadline, "jepa ui did not become ready"
        time.sleep(0.2)


# ---- the server


def test_the_mount_keeps_mlflows_own_checks(site: str):
    """/scaling leads to /scaling/; a foreign host name is refused there as everywhere."""
    request = urllib.request.Request(f"{site}/scaling", headers=BEARER)
    assert urllib.request.urlopen(request, timeout=60).url == f"{site}/scaling/"
    request.add_header("Host", "evil.example")
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(request, timeout=60)
    assert e.value.code == 403


def test_another_root_collects_into_the_server(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Over REST, points arrive once, and the plan is an artifact of the parent run."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, "two", ("vit_a", "vit_b"), fake_trials.SCALES[:1]):
        fake_trials.run(trial)
    first = sync.sync(root, uri=site)
    second = sync.sync(root, uri=site)
    assert first.created == 3
    assert first.states == {"done": 2}
    assert first.points > 0
    assert second.created == 0
    assert second.points == 0
    client, _ = mlflow_client.connect(root, site)
    experiment = client.get_experiment_by_name("two")
    parent, *_ = client.search_runs([experiment.experiment_id], "tags.`jepa.kind` = 'sweep'")
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert files == {"plan.json", "runs.json", "sweep.yaml"}
    client.delete_experiment(experiment.experiment_id)


# ---- the Scaling page


def plan_entries(root: Root) -> list[dict]:
    return json.loads(root.sweep("demo").plan.read_text())["trials"]


def test_the_page_shows_the_sweep(root: Root, site: str, tab: Page):
    """Points of every trial, the law, both probes in the table.

    Labels of trials and settings can be pasted into `jepa status`.
    """
    entries = plan_entries(root)
    tab.goto(f"{site}/scaling/#view=scatter")
    drawn(tab)
    assert tab.inner_text("#title") == "Do stubs scale?"
    assert tab.locator("#table tr").count() == 13
    findings = tab.inner_text("#findings")
    assert "11 of 12 trials finished, 1 not" in findings
    assert "b = " in findings
    assert "compute, total [FLOP]" in tab.inner_text("#plot")
    assert "class probe error" in tab.inner_text("#plot")
    symbols = sorted(tab.evaluate(POINT_SYMBOLS))
    assert symbols == ["circle"] * 3 + ["diamond-open"] + ["square"] * 3
    key = tab.inner_text("#key")
    assert key.startswith("colour: model · shape: target scale · ● done · ◇ interrupted · small: ")
    assert "each seed · whisker: 90 % interval" in key
    assert "running" not in key
    legend = tab.locator(".legendtext").all_text_contents()
    assert legend[-5:] == ["vit_a", "vit_b", "vit_c", "ts=.05-.1", "ts=.15-.2"]
    for line in tab.locator("#table tr").all()[1:]:
        label = line.get_attribute("title")
        assert select(entries, [label])[0]["label"] == label
    settings = tab.locator("#setting option").all()[1:]
    assert len(settings) == 2
    for option in settings:
        assert len(select(entries, [option.get_attribute("value")])) == 6


def test_a_point_leads_to_its_trial_and_to_its_run_in_mlflow(root: Root, site: str, tab: Page):
    """The panel of a point has the masks of the trial, commands to paste, and a link to the run."""
    tab.goto(f"{site}/scaling/#view=scatter")
    drawn(tab)
    tab.locator(".scatterlayer .point").first.hover(force=True)
    tab.wait_for_selector("#trial a.run")
    assert "untrained" in tab.inner_text("#trial")
    assert tab.locator("#trial canvas").count() == 4
    shown = set(re.findall(r"jepa why demo ([0-9a-f]{12})", tab.inner_text("#trial")))
    assert shown
    selected = select(plan_entries(root), [tab.inner_text("#trial h3")])
    assert shown <= {entry["id"] for entry in selected}
    tab.locator("#trial a.run").first.click()
    tab.wait_for_url("**/#/experiments/*/runs/*")
    tab.get_by_text("probe/class_error").first.wait_for()


def whiskers(tab: Page) -> dict[str, list[float]]:
    """Return label -> mean, low and high of each drawn point that has an interval."""
    found = {}
    for label, mean, low, high in tab.evaluate(POINTS_WITH_WHISKERS):
        if low < mean:
            found[label] = [mean, low, high]
    return found


def test_whiskers_come_from_the_noise_of_all_seeds(root: Root, site: str, tab: Page):
    """Each finished point has one, from the effects; a metric without effects has none."""
    tab.goto(f"{site}/scaling/#view=scatter&x=images_seen")
    number = drawn(tab)
    study = analysis.analyse(tables.load(root, "demo"))
    reach = figure_numbers.seed_reach(study.effects)
    table = {point["label"]: point for point in points.point_table(study.trials)}
    shown = whiskers(tab)
    assert shown.keys() == table.keys()
    for label, ends in shown.items():
        mean, n = table[label]["probe/class_error"], table[label]["n"]
        factor = math.exp(reach / math.sqrt(n))
        assert ends == pytest.approx([mean, mean / factor, mean * factor], rel=1e-4)
    tab.select_option("#y", "loss")
    tab.select_option("#setting", "ts=.15-.2")
    drawn(tab, number)
    assert not whiskers(tab)
    assert "whisker" not in tab.inner_text("#key")


def test_findings_appear_before_plotly_has_started(root: Root, site: str, tab: Page):
    """Findings and table do not wait for Plotly, and only unfinished runs are searched."""
    shipped = root.path / "mlflow-artifacts" / "demo"
    deadline = time.monotonic() + 60
    for name in ("scaling.html", "runs.json"):
        while not list(shipped.glob(f"*/artifacts/{name}")):
            assert time.monotonic() < deadline, "the collector did not ship the page"
            time.sleep(0.2)
    held: list[Route] = []
    searched: list[str | None] = []

    def hold(route: Route) -> None:
        held.append(route)

    def note_search(request: Request) -> None:
        if "runs/search" in request.url:
            searched.append(request.post_data)

    tab.route("**/plotly.min.js", hold)
    tab.on("request", note_search)
    tab.goto(f"{site}/scaling/#view=scatter", wait_until="commit")
    tab.wait_for_function("document.querySelectorAll('#table tr').length === 13")
    assert "11 of 12 trials finished" in tab.inner_text("#findings")
    for route in held:
        route.continue_()
    drawn(tab)
    assert tab.locator(".scatterlayer .point").count() > 0
    assert searched
    for request in searched:
        assert "jepa.state" in request


def test_a_view_can_be_sent_to_a_colleague(site: str, tab: Page, browser: Browser):
    """Axes, colour and switches are in the address; another browser draws the same."""
    tab.goto(f"{site}/scaling/#view=scatter")
    number = drawn(tab)
    tab.select_option("#x", "images_seen")
    number = drawn(tab, number)
    tab.select_option("#color", "setting")
    number = drawn(tab, number)
    tab.uncheck("#curves")
    drawn(tab, number)
    other = browser.new_page(
        viewport={"width": 600, "height": 900}, color_scheme="dark", extra_http_headers=BEARER
    )
    other.goto(tab.url)
    drawn(other)
    assert other.input_value("#x") == "images_seen"
    assert not other.is_checked("#curves")
    assert other.input_value("#color") == "setting"
    assert "images seen" in other.inner_text("#plot")
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    other.close()


def test_training_loss_is_refused_across_settings_and_shown_within_one(site: str, tab: Page):
    """The page gives the reason."""
    tab.goto(f"{site}/scaling/#view=scatter&y=loss")
    number = drawn(tab)
    assert "do not compare" in tab.inner_text("#note")
    assert tab.locator(".scatterlayer .point").count() == 0
    tab.select_option("#setting", "ts=.15-.2")
    drawn(tab, number)
    assert tab.locator(".scatterlayer .point").count() > 0


def downloaded(tab: Page, button: str) -> bytes:
    with tab.expect_download() as download:
        tab.click(button)
    return Path(download.value.path()).read_bytes()


def test_numbers_and_figure_can_be_downloaded(site: str, tab: Page):
    """CSV has every trial, PNG and SVG the figure; the heat map has the trials per cell."""
    tab.goto(f"{site}/scaling/#view=heat")
    drawn(tab)
    assert "n = 2" in tab.inner_text("#plot")
    assert "averaged together" not in tab.inner_text("#note")
    assert len(downloaded(tab, "#csv").decode().splitlines()) == 13
    assert downloaded(tab, "#png").startswith(b"\x89PNG")
    assert downloaded(tab, "#svg").startswith(b"<svg")


def test_axes_facets_and_overlays_change_and_the_keyboard_selects_a_trial(site: str, tab: Page):
    """Another X, facets by a swept axis, linear axes, the paper's numbers; a trial by the table."""
    tab.goto(f"{site}/scaling/#view=scatter")
    number = drawn(tab)
    tab.select_option("#x", "context_fraction")
    tab.select_option("#y", "probe/rankme")
    tab.select_option("#facet", "mask.target_scale")
    number = drawn(tab, number)
    for words in ("context, share of patches", "RankMe", ".05-.1", ".15-.2"):
        assert words in tab.inner_text("#plot")
    tab.select_option("#x", "flops_total")
    tab.select_option("#y", "probe/class_error")
    tab.keyboard.press("Escape")
    tab.locator("#title").click()
    for key in "xyrc":  # logarithmic axes off, overlay on, curves off
        tab.keyboard.press(key)
    drawn(tab, number)
    assert not tab.is_checked("#logx")
    assert not tab.is_checked("#curves")
    assert "paper: linear probe" in tab.inner_text("#plot")
    tab.locator("#table tr").nth(3).focus()
    tab.wait_for_selector("#trial canvas")
    assert "vit_" in tab.inner_text("#trial h3")


# ---- MLflow's own pages


def test_a_sweep_in_mlflows_list_opens_on_its_runs(site: str, tab: Page):
    """The experiment opens as model training; two clicks show every trial; a GenAI choice stays."""
    tab.goto(f"{site}/#/experiments")
    tab.get_by_role("link", name="demo", exact=True).first.click()
    tab.wait_for_url("**/#/experiments/1/runs?workflowType=machine_learning*")
    tab.get_by_text("Do stubs scale?", exact=True).first.wait_for()
    tab.get_by_role("button", name="Views").click()
    tab.get_by_text("Scaling", exact=True).first.click()
    for name in ("vit_a ts=.15-.2 s0", "vit_c ts=.05-.1 s1"):
        tab.get_by_text(name, exact=True).first.wait_for()
    tab.evaluate("""localStorage["mlflow.workflowType_v1"] = '"genai"'""")
    tab.goto(f"{site}/#/experiments")
    tab.reload()
    assert tab.evaluate("""localStorage["mlflow.workflowType_v1"]""") == '"genai"'


CHART_AREA_HAS_SECTIONS = """() => {
    const id = "[data-testid=experiment-view-compare-runs-chart-area]";
    const text = document.querySelector(id)?.innerText;
    return ["Scaling", "Masks", "Health"].every((section) => text?.includes(section));
}"""


def test_the_printed_link_of_a_sweep_opens_our_chart_view(root: Root, site: str, tab: Page):
    """MLflow's page has our sections, grouped by model, and the question as its note.

    Its token becomes a cookie, without which the server shows nothing.
    """
    log = (root.path / "ui.log").read_text()
    link = re.search(r"^  demo: (http\S+)$", log, re.MULTILINE)
    assert link
    assert link[1].startswith(f"{site}/?token=")
    tab.context.set_extra_http_headers({})
    assert tab.goto(f"{site}/scaling/").status == 401
    assert "Open the address that `jepa ui` printed" in tab.content()
    tab.goto(link[1])
    assert "token" not in tab.url
    for words in ("Group by: model.name", "Do stubs scale?"):
        tab.get_by_text(words).first.wait_for()
    tab.wait_for_function(CHART_AREA_HAS_SECTIONS)
    tab.locator(".scatterlayer .point").first.wait_for(state="attached")


def test_the_artifact_of_a_sweep_is_drawn_inside_mlflow(root: Root, site: str, tab: Page):
    """MLflow shows scaling.html in a sandboxed frame, which has no origin and no history."""
    client, _ = mlflow_client.connect(root, mlflow_client.default_uri(root))
    (parent,) = client.search_runs(["1"], "tags.`jepa.kind` = 'sweep'")
    tab.goto(f"{site}/#/experiments/1/runs/{parent.info.run_id}/artifacts/scaling.html")
    tab.locator("iframe").first.wait_for()
    inside = tab.frame_locator("iframe")
    inside.locator("#view").select_option("scatter")
    inside.locator(".scatterlayer .point").first.wait_for(state="attached")
    assert inside.locator("#table tr").count() == 13
    inside.locator("#table tr").last.click()
    inside.locator("#trial.pinned canvas").first.wait_for()
    inside.locator("#share").click()
    inside.get_by_text("Copy the address").wait_for()
