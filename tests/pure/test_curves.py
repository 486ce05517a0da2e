"""Tidy tables straight from the spools, the document of a sweep, and the page that stands alone."""

import json
import re
from pathlib import Path

import fabricate
import pytest

from jepa_cluster.errors import TrackingError
from jepa_cluster.report import document, page, scaling
from jepa_cluster.tracking import curves
from jepa_cluster.trial.layout import Root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    root = Root(tmp_path)
    trials = fabricate.sweep(root)
    for trial in trials[:5]:
        fabricate.run(trial)
    fabricate.run(trials[5], stop=35, kill=True)
    return root


def test_the_tables_hold_settled_steps_with_axes_and_parameters(root: Root):
    """One row a settled step, one row a trial with its first and last probe; the open trial ends at its last commit."""
    sweep = curves.load(root, "demo")
    assert sweep.axes == ["model", "mask.target_scale"]
    table = curves.rows(sweep)
    assert {r["step"] for r in table if r["trial"] == sweep.curves[5].name} == {0, 5, 10, 15, 20}
    assert table[0]["mask.target_scale"] == "0.15–0.2" and table[0]["parameters"] > 1e4
    last = curves.finals(sweep)
    assert [r["state"] for r in last] == ["done"] * 5 + ["running"]
    assert last[0]["initial/probe/class_error"] > last[0]["probe/class_error"] and last[0]["step"] == 60
    lines = curves.to_csv(last).splitlines()
    assert len(lines) == 7 and lines[0].startswith("sweep,trial,label,model,mask.target_scale,seed")


def test_a_sweep_nobody_submitted_is_named_with_its_neighbours(root: Root):
    """The nearest name helps."""
    with pytest.raises(TrackingError, match="no sweep 'dmeo'") as e:
        curves.load(root, "dmeo")
    assert "did you mean 'demo'" in str(e.value)


def test_only_finished_trials_are_fitted_and_the_others_are_counted(root: Root):
    """The frontier keeps the better setting; the summary says what is missing."""
    s = scaling.study(curves.load(root, "demo"))
    assert len(s.finished) == 5 and s.error == "probe/class_error"
    assert [r["model"] for r in s.frontier] == ["vit_a", "vit_b", "vit_c"]
    told = "\n".join(scaling.summary(s))
    assert "5 of 6 trials finished, 1 not" in told and "b = " in told and "iso-FLOP: no fit" in told
    with pytest.raises(TrackingError, match="no trial has the metric 'probe/clas_error'"):
        scaling.study(curves.load(root, "demo"), "probe/clas_error")


def test_the_document_is_plain_json_with_laws_masks_and_every_trial(root: Root):
    """What the browser draws was computed here; numbers that are none become null."""
    doc = json.loads(document.dumps(document.document(curves.load(root, "demo"))))
    assert len(doc["trials"]) == 6 and set(doc["laws"]) >= {
        "probe/class_error|flops_total",
        "probe/knn_error|images_seen",
    }
    assert doc["laws"]["probe/class_error|flops_total"]["fits"][0]["name"] == "frontier"
    picture = doc["masks"]["target_scale=0.15–0.2"]
    assert len(picture["samples"][0]) == picture["grid"] ** 2 and set(picture["samples"][0]) == {"c", "t", "."}
    assert document.dumps({"x": float("nan"), "y": [float("inf"), 1.5]}) == '{"x":null,"y":[null,1.5]}'


def test_the_page_asks_no_address_and_the_picture_is_a_png(root: Root):
    """One file, no CDN; a question with markup in it cannot break out of its element."""
    sweep = curves.load(root, "demo")
    s = scaling.study(sweep)
    doc = document.with_curves(sweep, document.document(sweep)) | {"question": "</script><b>?"}
    text = page.page(doc)
    own = re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"""(src|href)=["']?https?:""", own) and "</script><b>?" not in text
    page.picture(s, root.path / "x.png")
    assert (root.path / "x.png").read_bytes().startswith(b"\x89PNG")
