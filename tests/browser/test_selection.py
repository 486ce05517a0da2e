"""The filter of the page and `jepa status SWEEP WORDS` select the same trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import scaling_page
from playwright.sync_api import Page
from scaling_page import drawn
from support import fake_trials

from jepa_cluster import labels
from jepa_cluster.errors import ConfigError
from jepa_cluster.launch.submit import documents
from jepa_cluster.report import analysis
from jepa_cluster.results import tables
from jepa_cluster.sweep.select_trials import select
from jepa_cluster.trial.directory import Root

pytestmark = pytest.mark.browser

POINTS: list[dict[str, Any]] = [
    {"model": "vit_s", "mask.target_scale": [0.15, 0.2], "optim.steps": 80000},
    {"model": "vit_s", "mask.target_scale": [0.05, 0.1], "optim.steps": 80000},
    {"model": "vit_l", "mask.target_scale": [0.15, 0.2], "optim.steps": 40000},
    {"model": "vit_l", "data.flip": True, "optim.lr": 1e-05},
    {"model": "vit_l", "data.flip": False, "optim.lr": 0.0005},
    {"model": "vit_b", "predictor.depth": 6, "model.depth": 12, "mask.context_keep": None},
]
STATES = ("done", "failed", "running", "stopped", "queued")
WORDS = (
    "vit_s", "!vit_s", "vit_s vit_l", "vit_s s0", "s1 s0 vit_l", "model=vit_*", "model=vit_[sl]",
    "model=vit_[!s]", "model=vit_?", "model=vit_s,vit_b", "seed=0", "seed=1,0", "state=failed",
    "state=failed,done !vit_l", "state=d*", "ts=.15-.2", "ts=0.15-0.20", "target_scale=.15-.2",
    "mask.target_scale=.1*", "target_scale=.05-.1 s0", "80k", "steps=80k", "steps=80000",
    "optim.steps=*k", "lr=1e-05", "lr=0.0005", "lr=.0005", "lr=0.00001", "flip=true",
    "flip=True", "data.flip=false", "context_keep=null", "context_keep=None", "ts=null",
    "depth=12", "predictor.depth=6", "model.depth=12", "0", "3 5", "!0 !1", "00", "00000000000a",
    "00000000000", "vit_l 3", "class=A", "class=*", "action=None", "id=00000000000b", "name=vit_s*",
    "class=B", "class=A,B !class=A", "!class=B vit_s", "class=?", "class=[!A]", "class=C",
    "class=null", "11", "12", "1 !1", "!3 vit_s", "name=*-s1-*",
    "vit_q", "failed", "modle=vit_s", "=", "model=", "seed=7", "!model=vit_*", "vit_s !vit_s",
    "ts=.15-.2 model=vit_s", "model=vit_s model=vit_l", "s", "-", "123456", "",
)  # fmt: skip
SELECT = """async ([rows, words]) => {
    const { select } = await import("scaling/selection.js");
    return words.map((text) => {
        try {
            return select(rows, text.split(" ").filter(Boolean)).map((row) => row.index);
        } catch (e) {
            return e.message;
        }
    });
}"""


FILTER = """async (words) => {
    const { filteredRows, state } = await import("scaling/state.js");
    state.filter = words;
    const { rows, problem } = filteredRows();
    return problem ? [] : rows.map((row) => row.index);
}"""


def rows() -> list[dict[str, Any]]:
    """Return two seeds of each point, as in the status document."""
    found: list[dict[str, Any]] = []
    for number, point in enumerate(POINTS):
        for seed in (0, 1):
            index = 2 * number + seed
            trial_id = f"{index + 10:012x}"
            row = {
                "index": index,
                "name": f"{point['model']}-s{seed}-{trial_id}",
                "id": trial_id,
                "label": labels.point_label(point, seed),
                "class": "AB"[number % 2],
                "seed": seed,
                "state": STATES[index % len(STATES)],
                "point": point,
            }
            found.append(row)
    return found


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the page has it: values are text."""
    point = {axis: labels.format_value(value) for axis, value in row["point"].items()}
    return {**row, "point": point}


def selected(words: str, among: Sequence[Mapping[str, Any]]) -> list[int] | str:
    try:
        return [row["index"] for row in select(among, words.split())]
    except ConfigError as e:
        return str(e)


@pytest.fixture
def page(tmp_path: Path, tab: Page) -> Page:
    """The page of four trials of two resource classes, with its modules."""
    root = Root(tmp_path)
    for trial in fake_trials.sweep(root, models=("vit_a", "vit_b")):
        fake_trials.run(trial)
    entries = root.sweep("demo").read_plan()["trials"]
    for number, entry in enumerate(entries):
        entry["class"] = "AB"[number % 2]
    fake_trials.write_plan(root, "demo", entries)
    tab.goto(scaling_page.write(root, analysis.analyse(tables.load(root, "demo"))))
    drawn(tab)
    return tab


def test_the_page_selects_what_the_command_line_selects(page: Page):
    """The same trials for all words; where the command line refuses them, so does the page."""
    found = page.evaluate(SELECT, [list(map(shown, rows())), list(WORDS)])
    for words, on_page in zip(WORDS, found, strict=True):
        wanted = selected(words, rows())
        if isinstance(wanted, str):
            assert isinstance(on_page, str), words
            assert on_page.partition(" ")[0] in ("No", "Trials"), words
        else:
            assert on_page == wanted, words


def test_the_filter_selects_the_trials_of_the_status_document(page: Page, tmp_path: Path):
    """Index, resource class, state and name of each trial are on the page too."""
    listed = documents.status_document(Root(tmp_path), "demo")["trials"]
    for words in (
        "class=A",
        "!class=A",
        "class=B 3",
        "0 2",
        "!1",
        "4",
        "state=done",
        "vit_a class=B",
    ):
        shown = page.evaluate(FILTER, words)
        wanted = selected(words, listed)
        assert shown == ([] if isinstance(wanted, str) else wanted), words
    assert page.evaluate(FILTER, f"id={listed[2]['id']}") == [2]
    assert page.evaluate(FILTER, listed[1]["name"]) == [1]


def test_a_word_that_matches_nothing_is_named(page: Page):
    words = ("modle=vit_s", "vit_l vit_q", "state=faild", "failed", "seed=1 ts=.05-.1 vit_l")
    assert page.evaluate(SELECT, [list(map(shown, rows())), list(words)]) == [
        "Trials have no 'modle': did you mean 'model'?",
        "No trial matches vit_q.",
        "No trial matches state=faild: did you mean 'failed'?",
        "No trial matches failed: did you mean 'state=failed'?",
        "No trial matches seed=1 ts=.05-.1 vit_l.",
    ]
