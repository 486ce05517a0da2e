"""Page, terminal, report and PNG write a number with the same digits."""

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import scaling_page
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster import labels
from jepa_cluster.report import analysis, html, payload
from jepa_cluster.results import table_files, tables
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

# exact halves, ends of the ranges, whole numbers, and what is no number
CHOSEN = (
    *(
        0,
        -0.0,
        1,
        7,
        0.5,
        2.0625,
        0.03125,
        1.00005,
        0.99995,
        9999.5,
        99999.5,
        999999.5,
        999999,
        1e6,
    ),
    *(
        12345,
        12345.6,
        123456.7,
        1e-4,
        9.9999e-5,
        1e-7,
        1.2e18,
        1e21,
        1e22,
        1.5e300,
        85.6e6,
        -0.12345,
    ),
    *(0.1234499999, 0.123449999999, 0.12345, 0.1234505, 3.0000004, 100, 8.5e-9, float("nan"), None),
    *(-0.0004, -0.0005, -0.0006, 9999.9995, 10000.0, -123456.7, 1e27, -1e27, 1e307, 1.7e308),
    *(float("inf"), float("-inf")),
)
FORMAT = """async (values) => {
    const { formatNumber, formatPercent, signed } = await import("scaling/format.js");
    return values.map((v) => [
        formatNumber(v), formatNumber(v, 3), formatPercent(v), signed(formatPercent(v)),
    ]);
}"""
COLUMNS = """[...document.querySelectorAll('#table tr')].slice(1)
    .map((line) => [...line.cells].map((cell) => cell.textContent))"""


def values() -> list[float | None]:
    draw = random.Random(0)
    found: list[float | None] = list(CHOSEN)
    for _ in range(3000):
        digits = draw.choice((2, 3, 4, 5, 6, 7, 17))
        number = draw.uniform(-1, 10) * 10 ** draw.uniform(-9, 20)
        found.append(float(f"{number:.{digits}g}"))
        found.append(draw.randrange(1, 2**14) / 2 ** draw.randrange(1, 14))
    return found


def in_python(value: float | None) -> list[str]:
    return [
        labels.format_number(value),
        labels.format_number(value, labels.FITTED),
        labels.format_percent(value),
        labels.format_percent(value, "+"),
    ]


@pytest.fixture
def study(tmp_path: Path) -> analysis.Analysis:
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_a", "vit_b")):
        fake_trials.run(trial)
    return analysis.analyse(tables.load(root, "demo"))


@pytest.fixture
def page(study: analysis.Analysis, tab: Page, tmp_path: Path) -> Page:
    tab.goto(f"{scaling_page.write(Root(tmp_path), study)}#view=scatter")
    drawn(tab)
    return tab


def test_page_and_python_format_every_number_alike(page: Page):
    """As the page has it from MLflow, with all digits, and from the document, with six."""
    numbers = values()
    rounded = json.loads(payload.to_json({"numbers": numbers}))["numbers"]
    for given in (numbers, rounded):
        shown: list[list[str]] = page.evaluate(FORMAT, given)
        for number, own, texts in zip(numbers, given, shown, strict=True):
            assert texts == in_python(own), number
    for number, six in zip(numbers, rounded, strict=True):
        assert labels.format_number(number) == labels.format_number(six)


def test_the_table_has_the_digits_of_the_terminal(page: Page, study: analysis.Analysis):
    """Error, error before training, loss and cost of each trial."""
    heads = page.locator("#table th").all_inner_texts()
    for line, row in zip(page.evaluate(COLUMNS), study.trials, strict=True):
        cells = dict(zip(heads, line, strict=True))
        wanted = html.trial_cells(study, row)
        names = {"class error": "trained", "untrained": "random", "loss": "loss"}
        for on_page, in_terminal in {**names, "GPU-hours": study.sweep.unit}.items():
            assert cells[on_page] == wanted[in_terminal]


def test_the_csv_of_the_page_has_six_digits_and_that_of_export_all(
    page: Page, study: analysis.Analysis
):
    with page.expect_download() as download:
        page.click("#csv")
    text = Path(download.value.path()).read_text()
    rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text)))
    exported = csv.DictReader(io.StringIO(table_files.to_csv(study.trials)))
    for row, full, trial in zip(rows, exported, study.trials, strict=True):
        assert float(full[study.error]) == trial[study.error]
        assert float(row[study.error]) == labels.rounded(trial[study.error])
