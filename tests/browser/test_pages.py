"""What a person sees: MLflow with our chart view, the Scaling page, a link that shows a colleague the same."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright import sync_api as api
from scipy import stats
from support import fake_trials
from testcluster import claim_ports

from jepa_cluster.report import analysis, html, payload
from jepa_cluster.results import tables
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.tracking import mlflow_client, sync
from jepa_cluster.trial.directory import Root

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and not os.environ.get("JEPA_REQUIRE_BROWSER"),
        reason="needs, as root: apt-get install --no-install-recommends chromium",
    ),
]
PATIENCE = 120_000  # ms; a loaded machine is no failure


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Root:
    """A small study, one of its trials cut off."""
    root = Root(tmp_path_factory.mktemp("root"))
    for i, trial in enumerate(fake_trials.sweep(root, seeds=(0, 1))):
        fake_trials.run(trial, **({"stop": 35, "kill": True} if i == 7 else {}))
    return root


@pytest.fixture(scope="module")
def site(root: Root) -> Iterator[str]:
    """`jepa ui` over it; ends by TERM with exit code 0 and its last line."""
    (claim,) = claim_ports(1)
    port = claim.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | {"JEPA_ROOT": str(root.path)}
    log = root.path / "ui.log"
    with log.open("w") as out:
        ui = subprocess.Popen(
            [sys.executable, "-m", "jepa_cluster", "ui", "--port", str(port)], env=env, stdout=out, stderr=out
        )
    try:
        until(lambda: all(w in log.read_text() for w in ("ready: ", "points sent", "  demo: ")), ui)
        until(lambda: (root.sweep("demo").path / "scaling.png").exists(), ui)
        yield f"http://127.0.0.1:{port}"
    finally:
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(60) == 0, log.read_text()
        claim.close()
    assert log.read_text().endswith("stopped\n")


def until(done, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not done():
        assert process.poll() is None and time.monotonic() < deadline, "jepa ui did not become ready"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with api.sync_playwright() as p:
        started = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def tab(browser) -> Iterator[object]:
    """A page whose script errors and requests to other hosts fail the test."""
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(PATIENCE)
    faults: list[str] = []
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on(
        "request",
        lambda r: faults.append(r.url) if not re.match(r"(http://127\.0\.0\.1|file:|data:|blob:)", r.url) else 0,
    )
    yield page
    page.close()
    assert not [f for f in faults if "ajax-api" not in f], faults


def drawn(page, after: int = 0) -> int:
    """Wait for a drawing later than `after`, with nothing still on its way -> its number."""
    page.wait_for_function(
        f"Number(document.body.dataset.ready || 0) > {after} && document.body.dataset.settled === '1'"
    )
    return int(page.evaluate("document.body.dataset.ready"))


def test_the_mount_keeps_mlflows_own_checks(site: str):
    """/scaling leads to /scaling/; a foreign host name is refused there as everywhere."""
    assert urllib.request.urlopen(f"{site}/scaling", timeout=60).url == f"{site}/scaling/"
    request = urllib.request.Request(f"{site}/scaling/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(request, timeout=60)
    assert e.value.code == 403


def test_another_root_collects_into_the_server(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same collector over REST: points once, figures and plan as artifacts of the parent run."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, "two", ("vit_a", "vit_b"), fake_trials.SCALES[:1]):
        fake_trials.run(trial)
    first, second = sync.sync(root, uri=site), sync.sync(root, uri=site)
    assert (first.created, first.states) == (3, {"done": 2}) and first.points > 0
    assert (second.created, second.points) == (0, 0)
    client, _ = mlflow_client.connect(root, site)
    experiment = client.get_experiment_by_name("two")
    parent, *_ = client.search_runs([experiment.experiment_id], "tags.`jepa.kind` = 'sweep'")
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} == {
        "plan.json", "runs.json", "sweep.yaml",
    }  # fmt: skip
    client.delete_experiment(experiment.experiment_id)


def test_the_page_shows_the_sweep_and_a_point_leads_to_its_run(root: Root, site: str, tab):
    """Points of every trial, the law, both probes in the table; from a point to MLflow's page of the run.

    Labels of trials, points and settings can be pasted into `jepa status`.
    """
    entries = json.loads(root.sweep("demo").plan.read_text())["trials"]
    tab.goto(f"{site}/scaling/")
    drawn(tab)
    assert tab.inner_text("#title") == "Do stubs scale?"
    assert tab.locator("#table tr").count() == 13
    findings = tab.inner_text("#findings")
    assert "11 of 12 trials finished, 1 not" in findings and "b = " in findings
    assert "compute, total [FLOP]" in tab.inner_text("#plot") and "class probe error" in tab.inner_text("#plot")
    marks = "document.getElementById('plot').data.filter((d) => d.error_y).flatMap((d) => d.marker.symbol)"
    assert sorted(tab.evaluate(marks)) == [*["circle"] * 3, "circle-open", *["square"] * 3]
    legend = tab.locator(".legendtext").all_text_contents()
    assert legend[-5:] == ["vit_a", "vit_b", "vit_c", "ts=.05-.1", "ts=.15-.2"]
    cells = [line.locator("td").first.inner_text() for line in tab.locator("#table tr").all()[1:]]
    assert [select(entries, [cell])[0]["label"] for cell in cells] == cells
    options = tab.locator("#setting option").all()[1:]
    assert [len(select(entries, [option.get_attribute("value")])) for option in options] == [6, 6]
    tab.locator(".scatterlayer .point").first.hover(force=True)
    tab.wait_for_selector("#trial a.run")
    assert "before training" in tab.inner_text("#trial") and tab.locator("#trial canvas").count() == 4
    shown = set(re.findall(r"jepa why demo ([0-9a-f]{12})\n", tab.inner_text("#trial")))
    assert shown and shown <= {entry["id"] for entry in select(entries, [tab.inner_text("#trial h3")])}
    tab.locator("#trial a.run").first.click()
    tab.wait_for_url("**/#/experiments/*/runs/*")
    tab.get_by_text("probe/class_error").first.wait_for()


def test_marks_and_whiskers_are_those_of_the_tidy_table(root: Root, site: str, tab):
    """Mean and Student's interval of each point's seeds, for another axis, too; any number of seeds as scipy has it."""
    tab.goto(f"{site}/scaling/#x=images_seen")
    number = drawn(tab)
    table = analysis.point_table(tables.trial_table(tables.load(root, "demo")))
    marks = """document.getElementById('plot').data.filter((d) => d.error_y).flatMap((d) => d.y.map((y, i) =>
      [d.text[i].match(/<b>(.*)<.b>/)[1], y, y - d.error_y.arrayminus[i], y + d.error_y.array[i]]))"""
    for metric in ("probe/class_error", "loss"):
        tab.select_option("#y", metric)
        tab.select_option("#setting", "ts=.15-.2" if metric == "loss" else "")
        number = drawn(tab, number)
        shown = {name: values for name, *values in tab.evaluate(marks) if values[1] < values[0]}
        points = [p for p in table if p["n"] == 2 and p["label"] in shown]
        assert len(shown) == len(points) == (3 if metric == "loss" else 5)
        for p in points:
            wanted = p[metric], p[f"low/{metric}"], p[f"high/{metric}"]
            assert shown[p["label"]] == pytest.approx(wanted, rel=1e-4)
    for n in (2, 11, 12, 40):
        values = [((7 * i) % n) ** 1.5 for i in range(n)]
        mean, low, high = tab.evaluate("async (v) => (await import('scaling/format.js')).interval(v)", values)
        assert (low, high) == pytest.approx(stats.t.interval(0.9, n - 1, mean, stats.sem(values)), rel=1e-4)


def test_findings_are_seen_before_plotly_has_started_and_few_runs_are_asked_for(root: Root, site: str, tab):
    """Findings and table do not wait for Plotly's script, and the page searches only runs that are not over."""
    shipped = root.path / "mlflow-artifacts" / "demo"
    deadline = time.monotonic() + 60
    while not (list(shipped.glob("*/artifacts/scaling.html")) and list(shipped.glob("*/artifacts/runs.json"))):
        assert time.monotonic() < deadline, "the collector did not ship the page"
        time.sleep(0.2)
    held, searched = [], []

    def hold(route: object) -> None:
        held.append(route)

    tab.route("**/plotly.min.js", hold)
    tab.on("request", lambda r: searched.append(r.post_data) if "runs/search" in r.url else None)
    tab.goto(f"{site}/scaling/", wait_until="commit")
    tab.wait_for_function("document.querySelectorAll('#table tr').length === 13")
    assert "11 of 12 trials finished" in tab.inner_text("#findings")
    for route in held:
        route.continue_()
    drawn(tab)
    assert tab.locator(".scatterlayer .point").count() > 0
    assert searched and all("jepa.state" in words for words in searched)


def test_a_view_can_be_sent_to_a_colleague(site: str, tab, browser):
    """Axes, colour and switches stand in the address; opened elsewhere, the same is drawn."""
    tab.goto(f"{site}/scaling/")
    number = drawn(tab)
    tab.select_option("#x", "images_seen")
    number = drawn(tab, number)
    tab.select_option("#color", "setting")
    number = drawn(tab, number)
    tab.uncheck("#curves")
    drawn(tab, number)
    other = browser.new_page(viewport={"width": 600, "height": 900}, color_scheme="dark")
    other.goto(tab.url)
    drawn(other)
    assert other.input_value("#x") == "images_seen" and not other.is_checked("#curves")
    assert other.input_value("#color") == "setting" and "images seen" in other.inner_text("#plot")
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    other.close()


def test_training_loss_is_refused_across_settings_and_shown_within_one(site: str, tab):
    """The page says why."""
    tab.goto(f"{site}/scaling/#y=loss")
    number = drawn(tab)
    assert "do not compare" in tab.inner_text("#note") and tab.locator(".scatterlayer .point").count() == 0
    tab.select_option("#setting", "ts=.15-.2")
    drawn(tab, number)
    assert tab.locator(".scatterlayer .point").count() > 0


def test_the_numbers_can_be_taken_away(site: str, tab):
    """CSV holds every trial, PNG and SVG the figure; the heat map tells how many trials stand behind a cell."""
    tab.goto(f"{site}/scaling/#view=heat")
    drawn(tab)
    assert "n = 2" in tab.inner_text("#plot") and "averaged together" not in tab.inner_text("#note")
    with tab.expect_download() as download:
        tab.click("#csv")
    assert len(Path(download.value.path()).read_text().splitlines()) == 13
    for kind, begins in (("png", b"\x89PNG"), ("svg", b"<svg")):
        with tab.expect_download() as download:
            tab.click(f"#{kind}")
        assert Path(download.value.path()).read_bytes().startswith(begins)


def test_axes_facets_and_overlays_change_and_a_line_of_the_table_leads_to_its_trial(site: str, tab):
    """Another X, facets by a swept axis, linear axes, the paper's numbers; by keyboard alone to a trial's masks."""
    tab.goto(f"{site}/scaling/")
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
    assert (
        not tab.is_checked("#logx")
        and not tab.is_checked("#curves")
        and "paper: linear probe" in tab.inner_text("#plot")
    )
    tab.locator("#table tr").nth(3).focus()
    tab.wait_for_selector("#trial canvas")
    assert "vit_" in tab.inner_text("#trial h3")


def test_a_page_of_a_thousand_trials_stands_alone_and_draws_them_all(root_of_many: Path, tab):
    """From a file, without a server: every trial is a mark and a line; too many curves are left out and it says so."""
    tab.goto(f"file://{root_of_many}")
    drawn(tab)
    assert tab.locator("#table tr").count() == 1001 and "Curves are left out above 200" in tab.inner_text("#note")
    marks = "document.getElementById('plot').data.filter((d) => d.customdata).flatMap((d) => d.customdata.flat())"
    assert tab.evaluate(f"new Set({marks}).size") == 1000


def test_a_law_that_the_data_do_not_know_is_told_and_not_drawn(tmp_path: Path, tab, monkeypatch: pytest.MonkeyPatch):
    """Page and picture say why; Y reaches over the data; a law that is known is drawn over its data alone."""
    plain = fake_trials.values

    def steep(trial, step, noise=0.01):
        """The largest of three sizes is far better than a law through the others would have it."""
        row = plain(trial, step, noise)
        if step and "probe/class_error" in row and trial.read_config().recipe.model.name == "vit_c":
            row["probe/class_error"] *= 0.4
        return row

    drawn_laws = "document.getElementById('plot').data.filter((d) => d.meta === 'law').map((d) => d.x)"
    for name, values in (("known", plain), ("unknown", steep)):
        monkeypatch.setattr(fake_trials, "values", values)
        root = Root(tmp_path / name)
        root.path.mkdir()
        for trial in fake_trials.sweep(
            root, models=("vit_a", "vit_b", "vit_c", "vit_d")[: 3 if values is steep else 4]
        ):
            fake_trials.run(trial)
        sweep = tables.load(root, "demo")
        study = analysis.analyse(sweep)
        tab.goto(f"file://{html.write(root, study) / 'scaling.html'}")
        number = drawn(tab)
        if values is steep:
            assert "No law: the interval of b includes 0" in tab.inner_text("#note")
            assert tab.evaluate(drawn_laws) == [] and "law" not in tab.locator(".legendtext").all_text_contents()
            low, high = (10**v for v in tab.evaluate("document.getElementById('plot').layout.yaxis.range"))
            errors = [r["probe/class_error"] for r in study.trials]
            assert min(errors) / 1.2 < low < min(errors) and max(errors) < high < 1
        else:
            first, last = min(r["flops_total"] for r in study.frontier), max(r["flops_total"] for r in study.frontier)
            band, line = tab.evaluate(drawn_laws)
            assert [min(line), max(line)] == [min(band), max(band)] == pytest.approx([first, last], rel=1e-4)
            tab.check("#beyond")
            drawn(tab, number)
            assert max(tab.evaluate(drawn_laws)[1]) == pytest.approx(3 * last, rel=1e-4)


def test_one_size_is_coloured_by_its_mask_axis(tmp_path: Path, tab):
    """There is no size to tell apart; no control's words are cut, no two labels of an axis overlap."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_b",), scales=fake_trials.SCALES):
        fake_trials.run(trial)
    sweep = tables.load(root, "demo")
    tab.goto(f"file://{html.write(root, analysis.analyse(sweep)) / 'scaling.html'}")
    drawn(tab)
    assert tab.input_value("#color") == "mask.target_scale" and tab.input_value("#shape") == ""
    assert tab.locator(".legendtext").all_text_contents()[-3:] == [
        "ts=.05-.1", "ts=.15-.2", "ts=.2-.3",
    ]  # fmt: skip
    wide = """[...document.querySelectorAll('#controls select')].flatMap((s) => {
      const css = getComputedStyle(s), pen = document.createElement('canvas').getContext('2d');
      pen.font = `${css.fontSize} ${css.fontFamily}`;
      return [...s.options].filter((o) => pen.measureText(o.text).width > s.clientWidth - 24).map((o) => o.text); })"""
    assert tab.evaluate(wide) == []
    ticks = sorted((b["y"], b["height"]) for b in (t.bounding_box() for t in tab.locator(".ytick text").all()))
    assert len(ticks) > 3 and all(y + height <= after for (y, height), (after, _) in itertools.pairwise(ticks))
    title = tab.locator(".ytitle").bounding_box()
    assert title["x"] + title["width"] <= min(t.bounding_box()["x"] for t in tab.locator(".ytick text").all())


def test_parabolas_at_equal_compute_show_the_best_size_and_how_it_grows(
    tmp_path: Path, tab, monkeypatch: pytest.MonkeyPatch
):
    """Three budgets that three sizes share, each with its best size; the sizes say how N_opt grows with compute."""
    plain = fake_trials.values

    def bent(trial, step, noise=0.01):
        """An error that has its least at a size that grows with the root of compute."""
        row, model = plain(trial, step, noise), trial.read_config().recipe.model
        if step and "probe/class_error" in row:
            best = 9e4 * (row["flops_total"] / 8e10) ** 0.5
            row["probe/class_error"] *= 1 + 0.1 * np.log(12 * model.width**2 * model.depth / best) ** 2
        return row

    monkeypatch.setattr(fake_trials, "values", bent)
    root = Root(tmp_path)
    for budget in (1, 2, 4):
        for model, steps in (("vit_a", 540), ("vit_b", 135), ("vit_c", 40)):
            fake_trials.sweep(root, f"{model}{budget}", (model,), fake_trials.SCALES[:1], (0, 1), (budget * steps, 1))
    plans = [json.loads(root.sweep(name).plan.read_text()) for name in root.sweeps()]
    entries = [t for p in plans for t in p["trials"] if t["steps"] > 1]
    root.sweep("iso").path.mkdir()
    root.sweep("iso").plan.write_text(json.dumps({**plans[0], "sweep": "iso", "trials": entries}))
    for entry in entries:
        fake_trials.run(root.trial(entry["name"]), every=entry["steps"], commit=entry["steps"])
    sweep = tables.load(root, "iso")
    folder = html.write(root, analysis.analyse(sweep))
    tab.goto(f"file://{folder / 'scaling.html'}#view=iso")
    drawn(tab)
    words = tab.inner_text("#plot")
    assert "N_opt, encoder parameters" in words and "N_opt ~ C^" in words and words.count("FLOP") >= 3
    stars = "document.getElementById('plot').data.filter((d) => d.marker?.symbol === 'star' && d.yaxis === 'y2')"
    best = sorted(tab.evaluate(f"{stars}.map((d) => [d.x[0], d.y[0]])"))
    assert len(best) == 3 and best[0][1] < best[1][1] < best[2][1]


@pytest.fixture
def root_of_many(tmp_path: Path) -> Path:
    """A page with one small study's document, its trials repeated a hundred times and moved a little."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=list(fake_trials.SIZES), scales=fake_trials.SCALES[:2]):
        fake_trials.run(trial)
    sweep = tables.load(root, "demo")
    doc = payload.add_curves(sweep, payload.build(sweep))
    doc["trials"] = [
        t | {"trial": f"{t['trial']}{i}", "label": f"copy{i} s0", "flops_total": t["flops_total"] * (1 + i / 99)}
        for i in range(100)
        for t in doc["trials"]
    ]
    path = tmp_path / "many.html"
    path.write_text(html.render(doc))
    return path


def test_a_sweep_in_mlflows_list_opens_on_its_runs_and_a_choice_of_genai_stays(site: str, tab):
    """The experiment's page is that of model training, the question one line of it; two clicks show every trial."""
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


def test_the_printed_link_of_a_sweep_opens_our_chart_view(root: Root, site: str, tab):
    """MLflow's own page: the shipped sections, grouped by model, the question as its note."""
    link = re.search(r"^  demo: (http\S+)$", (root.path / "ui.log").read_text(), re.MULTILINE)
    assert link and link[1].startswith(site)
    tab.goto(link[1])
    for words in ("Group by: model.name", "Do stubs scale?"):
        tab.get_by_text(words).first.wait_for()
    tab.wait_for_function(
        """() => ["Scaling", "Masks", "Health"].every((s) =>
             document.querySelector("[data-testid=experiment-view-compare-runs-chart-area]")?.innerText.includes(s))"""
    )
    tab.locator(".scatterlayer .point").first.wait_for(state="attached")
