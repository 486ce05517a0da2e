"""The findings of an analysis in sentences, the same for terminal, page, report and notes.

In: an `Analysis`. Out: lines. Nothing is computed here.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from jepa_cluster.errors import plural
from jepa_cluster.labels import format_number
from jepa_cluster.report import answers, claims, comparisons, rates
from jepa_cluster.report.analysis import COMPUTE, LABEL_FREE, REFERENCE_LOSS, Analysis
from jepa_cluster.report.power_law import NotEnoughData, PowerLawFit
from jepa_cluster.results import tables
from jepa_cluster.results.effects import Effects
from jepa_cluster.trial import provenance

COLLAPSED = 0.25  # of the first value of RankMe or target_std
COMPUTE_NAMES = {
    COMPUTE: "the compute",
    "flops_encoder": "the FLOPs of the encoder",
    "images_seen": "the images",
}


def summary(s: Analysis) -> list[str]:
    """Return all findings in sentences, the same for terminal, report and notes."""
    return [*_counts(s), *map(str, claims.verdicts(s)), *answer_lines(s), *_laws(s)]


def evidence(s: Analysis) -> list[str]:
    """Return the findings without the answer, which the page shows by itself."""
    return [*_counts(s), *map(str, claims.verdicts(s)), *_laws(s)]


def _counts(s: Analysis) -> list[str]:
    """Return what has finished, what is left out, and what has collapsed."""
    finished = len(s.finished)
    lines = [f"{finished} of {len(s.trials)} trials finished"]
    if finished < len(s.trials):
        lines[0] += f", {len(s.trials) - finished} not"
    done = [row for row in s.trials if row["state"] == "done"]
    lines += filter(None, [provenance.mixed_code(tables.column(done, "code"))])
    unread = np.count_nonzero(np.isnan(tables.column(s.trials, "parameters")))
    if unread:
        reason = "their config.yaml is not one that this version froze"
        lines.append(f"{unread} trials are left out: {reason}")
    unmeasured = finished - len(s.measured)
    if unmeasured:
        lines.append(f"{plural(unmeasured, 'finished trial')} without {s.compute}: in no law")
    return lines + _collapse_lines(s)


def _laws(s: Analysis) -> list[str]:
    """Return laws and predictions, or why there are none."""
    if not s.is_comparable:
        label_free = s.error in (*LABEL_FREE, REFERENCE_LOSS, "loss")
        why = "does not compare settings" if label_free else "is not an error"
        return [f"{s.error} {why}: no law, and no best setting"]
    lines = [*_law_lines(s), *_rate_lines(s)]
    predicted = s.sweep.predicted
    if predicted and (s.error, s.compute) == (
        predicted["error"],
        predicted["compute"],
    ):
        lines += comparisons.check_predictions(predicted, s.measured)
    elif predicted:
        metrics = f"{predicted['error']} over {predicted['compute']}"
        lines.append(f"predicted beforehand: {metrics} (--metric, --compute)")
    return lines


def _rate_lines(s: Analysis) -> list[str]:
    """Return whether a law is one of the learning rate, too. Nothing where there is no law."""
    if not isinstance(s.law, PowerLawFit):
        return []
    lines = rates.lines(s.sweep, s.measured, s.error)
    if isinstance(s.law_at_best_rates, PowerLawFit):
        best = s.law_at_best_rates
        found = f"no law: {best.unreliable_because}"
        if not best.unreliable_because:
            found = f"{best.headline(compute_name(s))}; b = {best.parameters['b']}"
        lines.append(f"at the best learning rates: {found}")
    return lines


def _collapse_lines(s: Analysis) -> list[str]:
    """Name trials whose features have collapsed, whatever their probes say."""
    lines: list[str] = []
    for metric in ("probe/rankme", "target_std"):
        fallen: list[str] = []
        for row in s.trials:
            value, first = row.get(metric), row.get(f"initial/{metric}")
            if value is not None and first is not None and value < COLLAPSED * first:
                fallen.append(f"{row['label']} ({format_number(first)} -> {format_number(value)})")
        if fallen:
            more = "" if len(fallen) <= 3 else f", and {len(fallen) - 3} more"
            listed = ", ".join(fallen[:3])
            lines.append(f"{metric} fell below a quarter of its first value: {listed}{more}")
    return lines


def answer_lines(s: Analysis) -> list[str]:
    """Return what each setting does, and how much the error falls with compute."""
    lines: list[str] = []
    if isinstance(s.effects, Effects):
        sentences = map(partial(answers.sentence, s.effects), s.answers)
        lines = [*sentences, *answers.notes(s.effects), *expectations(s)]
    return [*lines, *filter(None, [headline(s)])]


def expectations(s: Analysis) -> list[str]:
    """Return for each expectation of the sweep file whether it is met."""
    wanted = s.sweep.plan["expect_best"]
    return [answers.expectation(a, wanted[a.axis]) for a in s.answers if a.axis in wanted]


def headline(s: Analysis) -> str:
    """Return how much the error falls with compute; '' where no law is known."""
    return s.law.headline(compute_name(s)) if isinstance(s.law, PowerLawFit) else ""


def compute_name(s: Analysis) -> str:
    """Return what the compute is, as in 'for twice ...'."""
    if s.compute == "gpu_hours_alone":
        return f"the {s.sweep.unit}"
    return COMPUTE_NAMES.get(s.compute, s.compute)


def _law_lines(s: Analysis) -> list[str]:
    """Return the laws that could be fitted, and one line of all that could not."""
    lines: list[str] = []
    unknown: dict[str, list[str]] = {}  # reason -> what it prevents

    def add(
        name: str,
        found: object,
    ) -> None:
        if isinstance(found, NotEnoughData):
            unknown.setdefault(found.reason, []).append(name)
        else:
            lines.append(f"{name}: {found}")

    add("frontier", s.law)
    if isinstance(s.law, PowerLawFit):
        if np.isfinite(list(s.law.aicc.values())).all():
            tried = ", ".join(f"{form}: {aicc:.1f}" for form, aicc in s.law.aicc.items())
            lines.append(f"forms tried, AICc: {tried}")
        add("hold-out", s.held_out)
    for name, law in {**s.by_setting, **s.by_size}.items():
        add(name, law)
    sizes = comparisons.compare_sizes(s.iso_flop, s.size_law)
    if sizes:
        lines.append(f"best sizes: {sizes}")
    for method, found in (("parabola", s.iso_flop), ("E(N, D)", s.size_law)):
        if isinstance(found, NotEnoughData):
            add(f"best sizes by {method}", found)
    for reason, names in unknown.items():
        lines.append(f"not known yet: {', '.join(names)} ({reason})")
    return lines
