"""How often does the interval of a learning rate hold the truth, and are refusals right?

    python benchmarks/calibration.py --studies 200      # as in RESULTS.md

A study is a ladder of rates with a known curve of log error over log2 rate, as `jepa calibrate`
reads it. Its optimum lies anywhere between the two middle rates of the ladder. Counted are the
ladders that may be used, the intervals of those that contain the truth, and how much the error at
the found rate is above the lowest one. A kind that must be refused has no right use. Counts, not
times: the load does not matter.
"""

from __future__ import annotations

import argparse
import itertools
import math
from dataclasses import dataclass

import numpy as np

from jepa_cluster.report import calibration
from jepa_cluster.report.huber_fit import Floats
from jepa_cluster.report.rate_ladder import Ladder, Optimum, optimum
from jepa_cluster.trial.calibration import NORMAL

LOWEST, UNTRAINED = 0.4, 0.6  # errors
SHARED = 0.03  # standard deviation of log error that the trials of a seed share


@dataclass(frozen=True)
class Kind:
    """left, right: rise of log error per squared octave. cubic: per cubed one. offset: octaves from
    the middle of the ladder to the optimum. usable: whether the rate may be used.
    """

    left: float
    right: float
    noise: float
    cubic: float = 0.0
    offset: float = 0.0
    untrained: float = UNTRAINED
    usable: bool = True

    def rise(self, octaves: Floats) -> Floats:
        parabola = octaves**2 * np.where(octaves < 0, self.left, self.right)
        return parabola + self.cubic * octaves**3


KINDS = {
    "parabola, 3 %": Kind(0.03, 0.03, 0.03),
    "parabola, 6 %": Kind(0.03, 0.03, 0.06),
    "steep": Kind(0.08, 0.08, 0.06),
    "steeper to the left, 3 %": Kind(0.06, 0.02, 0.03),
    "steeper to the left, 6 %": Kind(0.06, 0.02, 0.06),
    "steeper to the right": Kind(0.02, 0.06, 0.04),
    "cubic": Kind(0.05, 0.05, 0.04, cubic=-0.008),
    "flat": Kind(0.002, 0.002, 0.04),
    "optimum below the ladder": Kind(0.08, 0.08, 0.04, offset=-4.5, usable=False),
    "optimum above the ladder": Kind(0.08, 0.08, 0.04, offset=4.5, usable=False),
    "not trained": Kind(0.01, 0.01, 0.05, untrained=LOWEST * 1.05, usable=False),
    "bracket": Kind(0.05, 0.05, 0.04),
    "bracket, optimum outside": Kind(0.05, 0.05, 0.04, offset=3.0, usable=False),
    "maximum": Kind(-0.05, -0.05, 0.04, usable=False),
}
DESIGNS = {
    "6 x 2": (6, 1.0, 2),
    "12 x 1": (12, 0.5, 1),
    "6 x 1": (6, 1.0, 1),
}  # rates, octaves apart, seeds
BRACKETS = {"3 x 2": (3, 1.0, 2), "5 x 1": (5, 0.7, 1)}


def study(kind: Kind, design: str, rng: np.random.Generator) -> Optimum:
    """Return what a ladder says. The true optimum is a rate of 1."""
    rates, apart, seeds = {**DESIGNS, **BRACKETS}[design]
    spread = 0.5 if design in BRACKETS else 1.0
    middle = rng.uniform(-spread, spread) - kind.offset
    steps = np.arange(rates, dtype=float) - (rates - 1) / 2
    octaves: Floats = np.repeat(middle + apart * steps, seeds)
    number = np.arange(len(octaves)) % seeds
    shared = SHARED * rng.normal(size=seeds)[number]
    noise = shared + kind.noise * rng.normal(size=len(octaves))
    errors = LOWEST * np.exp(kind.rise(octaves) + noise)
    untrained = kind.untrained * np.exp(kind.noise / 3 * rng.normal(size=len(octaves)))
    found = optimum(Ladder(2.0**octaves, errors, number.astype(float), untrained))
    assert isinstance(found, Optimum)
    return found


def row(name: str, design: str, studies: int) -> str:
    """Return a row of the table."""
    kind = KINDS[name]
    held = 0
    widths: list[float] = []
    regrets: list[float] = []
    for number in range(studies):
        found = study(kind, design, np.random.default_rng(3000 + number))
        if found.problems:
            continue
        held += 1.0 in found.lr
        widths.append(found.lr.high / found.lr.low)
        regrets.append(100 * np.expm1(kind.rise(np.log2(np.array([found.lr.value])))).item())
    used = len(widths)
    right = used if kind.usable else studies - used
    cells = [name, design, f"{100 * right / studies:.1f}"]
    if kind.usable and used:
        cells += [f"{100 * held / used:.1f}", f"{np.median(widths):.2f}", f"{np.mean(regrets):.1f}"]
    else:
        cells += ["–"] * 3
    return f"| {' | '.join(cells)} |"


# ---- the law: lr ~ N^-0.4 D^-0.3, of three sizes

SIZES = (1e5, 3e5, 1e6)
LARGER = 4e6  # parameters of the size that is predicted
EXPONENTS = (-0.4, -0.3)
CELLS = {"3 sizes x 2 horizons": (100.0, 300.0), "3 sizes x 1 horizon": (100.0,)}
SCATTERS = (0.0, 0.2)  # of log lr around the law


def law_row(name: str, design: str, scatter: float, studies: int) -> str:
    """Return a row of the table: shares of 90 % intervals that contain the truth."""
    held = np.zeros(2)
    widths: list[float] = []
    for number in range(studies):
        rng = np.random.default_rng(5000 + number)
        logs: list[list[float]] = []
        draws: list[Floats] = []
        for size, steps in itertools.product(SIZES, CELLS[name]):
            log_cell = [math.log(size), math.log(steps)]
            best = np.dot(EXPONENTS, log_cell) + scatter * rng.normal()
            found = study(KINDS["parabola, 3 %"], design, rng)
            logs.append([*log_cell, 0.0])
            draws.append(found.log2_rate * math.log(2) + best)
        law = calibration.fit_law(np.array(logs), np.stack(draws, 1))
        held[0] += abs(law.terms[1] - EXPONENTS[0]) < NORMAL * law.covariance[1][1] ** 0.5
        steps = CELLS[name][0]
        truth = math.exp(np.dot(EXPONENTS, [math.log(LARGER), math.log(steps)]))
        _, low, high = law.predict({"parameters": LARGER, "steps": steps, "batch": 1.0})
        held[1] += low < truth * math.exp(scatter * rng.normal()) < high
        widths.append(high / low)
    shares = [f"{100 * share / studies:.1f}" for share in held]
    return f"| {name}, {design} | {scatter:g} | {' | '.join(shares)} | {np.median(widths):.2f} |"


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--studies", type=int, default=200)
    a = p.parse_args()
    print("| curve | rates x seeds | right | held | width (factor) | regret, % |")
    print("|---|---|---:|---:|---:|---:|")
    for name in KINDS:
        for design in BRACKETS if name.startswith("bracket") else DESIGNS:
            print(row(name, design, a.studies), flush=True)
    print("\n| law of | scatter | exponent of N | a larger size | its width (factor) |")
    print("|---|---:|---:|---:|---:|")
    for name, design, scatter in itertools.product(CELLS, ("6 x 2", "6 x 1"), SCATTERS):
        print(law_row(name, design, scatter, a.studies), flush=True)


if __name__ == "__main__":
    main()
