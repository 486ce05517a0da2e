"""How often do the 90 % intervals hold the truth? Synthetic studies with a known law.

    python benchmarks/laws.py --studies 400                    # all kinds, as in RESULTS.md
    python benchmarks/laws.py --studies 100 --kinds points

Kinds: `noise`: independent noise on every trial. `points`: half of the noise is shared by a point's
seeds, as when a size lies off the law. `shift`: the truth has a shift d that the data hardly show.
Counts, not times: the machine's load does not matter.
"""

from __future__ import annotations

import argparse

import numpy as np

from jepa_cluster.report import comparisons, power_law

A, B, C = 0.6, 0.2, 0.1
TARGET = 500e15  # five times the largest budget


def truth(compute: np.ndarray, d: float) -> np.ndarray:
    return A * (compute / 1e15 + d) ** -B + C


def study(rng: np.random.Generator, kind: str, points: int, seeds: int, noise: float):
    """-> compute, error, point of every trial."""
    where = np.repeat(np.arange(points), seeds)
    compute = np.geomspace(1, 100, points)[where] * 1e15
    shared = noise * np.sqrt(0.5) * rng.normal(size=points)[where] if kind == "points" else 0.0
    own = noise * (np.sqrt(0.5) if kind == "points" else 1.0) * rng.normal(size=len(where))
    return compute, truth(compute, 0.5 if kind == "shift" else 0.0) * np.exp(shared + own), where


def coverage(kind: str, studies: int, points: int, seeds: int, noise: float) -> str:
    rng = np.random.default_rng(11)
    held, forms, out = np.zeros(4), {}, 0
    d = 0.5 if kind == "shift" else 0.0
    for i in range(studies):
        compute, error, where = study(rng, kind, points, seeds, noise)
        law = power_law.fit(compute, error, seed=i, draws=200, points=list(where))
        if isinstance(law, power_law.NotEnoughData):
            out += 1
            continue
        forms[law.form] = forms.get(law.form, 0) + 1
        b, c = law.parameters["b"], law.parameters.get("c", power_law.Interval(0, 0, 0))
        low, high = law.band(TARGET)
        aside = comparisons.hold_out(compute, error, list(where))
        inside = (
            isinstance(aside, comparisons.HoldOut)
            and aside.predicted.low <= aside.actual <= aside.predicted.high
        )
        value = truth(np.array(TARGET), d)
        held += [b.low <= B <= b.high, c.low <= C <= c.high, low[0] <= value <= high[0], inside]
    n = max(studies - out, 1)
    held_text = ", ".join(
        f"{name} {h / n:.1%}"
        for name, h in zip(("b", "c", "5 x extrapolation", "hold-out"), held, strict=True)
    )
    return (
        f"{kind}: {points} points x {seeds} seeds, noise {noise:.0%}: {held_text}; "
        f"forms {forms}; refused {out}"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--studies", type=int, default=400)
    p.add_argument("--kinds", nargs="+", default=["noise", "points", "shift"])
    a = p.parse_args()
    for kind in a.kinds:
        for points, seeds, noise in ((8, 2, 0.01), (12, 1, 0.01), (6, 3, 0.02)):
            print(coverage(kind, a.studies, points, seeds, noise), flush=True)


if __name__ == "__main__":
    main()
