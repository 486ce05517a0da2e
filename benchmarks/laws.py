"""How often do the 90 % intervals hold the truth? Synthetic studies with a known law.

    python benchmarks/laws.py --studies 200                    # all kinds, as in RESULTS.md
    python benchmarks/laws.py --studies 50 --kinds hard alike
    python benchmarks/laws.py --studies 60 --sizes             # the exponent of the best size
    python benchmarks/laws.py --studies 400 --claims           # the difference of a claim

A study is a table of trials as `jepa scaling` reads it, and goes through the same analysis. Each
kind is run three times: with all trials, with three of ten missing by chance, and without the two
longest horizons of the largest model in one setting, as if they had diverged. Counted are the
intervals of the frontier's law at its largest budget and at five times that, of b (where the truth
has one), and of the differences between settings. With --sizes: those of the exponent of N_opt(C),
by parabolas at equal compute and by E(N, D). With --claims: those of the difference between two
settings of one size and horizon, as `claims` are judged, and how often the truth is below and above
the interval. Counts, not times: the load does not matter.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np

from jepa_cluster.report import comparisons
from jepa_cluster.report.analysis import Analysis
from jepa_cluster.report.power_law import Interval, PowerLawFit, quantiles
from jepa_cluster.results import effects
from jepa_cluster.results.tables import Row, SweepResults

A, B, C = 0.6, 0.25, 0.08  # error = A C^-B + C, of the best size at each compute
CURVATURE = 0.01  # of log error in log size around the best one
AXIS = "mask.target_scale"


@dataclass(frozen=True)
class Kind:
    """sizes, horizons, seeds: how many. effects: log error of each setting. shared: variance share
    of the noise that the seeds of a point have in common. shift: d of the truth.
    """

    sizes: int
    horizons: int
    seeds: int
    noise: float
    effects: tuple[float, ...] = (0.0,)
    shared: float = 0.0
    shift: float = 0.0


KINDS = {
    "one": Kind(3, 3, 2, 0.05),
    "alike": Kind(3, 3, 2, 0.10, (0.0,) * 5),
    "two, 5 %": Kind(3, 3, 2, 0.05, (0.0, 0.05)),
    "two, 10 %": Kind(3, 3, 2, 0.10, (0.0, 0.05)),
    "two, 17 %": Kind(3, 3, 2, 0.17, (0.0, 0.05)),
    "hard": Kind(3, 3, 2, 0.10, (-0.1, 0.0, 0.0, 0.0, 0.0)),
    "8 x 2": Kind(1, 8, 2, 0.01),
    "12 x 1": Kind(1, 12, 1, 0.01),
    "6 x 3": Kind(1, 6, 3, 0.02),
    "8 x 2, points": Kind(1, 8, 2, 0.01, shared=0.5),
    "6 x 3, points": Kind(1, 6, 3, 0.02, shared=0.5),
    "8 x 2, shift": Kind(1, 8, 2, 0.01, shift=0.5),
    "6 x 3, shift": Kind(1, 6, 3, 0.02, shift=0.5),
}
MISSING = ("none", "by chance", "diverged")


def law(compute: float, shift: float = 0.0) -> float:
    return float(np.log(A * (compute / 1e15 + shift) ** -B + C))


def study(kind: Kind, missing: str, rng: np.random.Generator) -> tuple[list[Row], float]:
    """Return rows of trials, and the lowest true log error up to their largest compute."""
    horizons = np.geomspace(1, 30 if kind.sizes > 1 else 100, kind.horizons)
    rows: list[Row] = []
    truths: list[tuple[float, float]] = []  # compute, log error
    for n, size in enumerate(np.geomspace(1, 10, kind.sizes)):
        for d, horizon in enumerate(horizons):
            compute = size * horizon * 1e15
            off = np.log(size / (0.8 * (size * horizon) ** 0.5)) if kind.sizes > 1 else 0.0
            for setting, effect in enumerate(kind.effects):
                true = law(compute, kind.shift) + CURVATURE * off**2 + effect
                truths.append((compute, true))
                true += kind.noise * kind.shared**0.5 * rng.normal()
                largest = n == kind.sizes - 1 and d >= kind.horizons - 2 and setting == 0
                for seed in range(kind.seeds):
                    own = kind.noise * (1 - kind.shared) ** 0.5 * rng.normal()
                    gone = missing == "by chance" and rng.random() < 0.3
                    if gone or (missing == "diverged" and largest):
                        continue
                    row: Row = {
                        "state": "done",
                        "model": f"m{n}",
                        "parameters": 1e6 * size,
                        "steps": int(1000 * horizon),
                        "seed": seed,
                        "setting": f"s{setting}",
                        "trial": f"m{n} s{setting} {int(1000 * horizon)} s{seed}",
                        "label": f"m{n} s{setting} {int(1000 * horizon)} s{seed}",
                        AXIS: f"s{setting}",
                        "flops_total": compute,
                        "probe/class_error": float(np.exp(true + own)),
                    }
                    rows.append(row)
    end = max(row["flops_total"] for row in rows)
    return rows, min(true for compute, true in truths if compute <= end)


def coverage(name: str, missing: str, studies: int) -> str:
    """Return a row of the table."""
    kind = KINDS[name]
    held: Counter[str] = Counter()
    counted: Counter[str] = Counter()

    def count(what: str, truth: float, low: float, high: float) -> None:
        counted[what] += 1
        held[what] += low <= truth <= high

    for number in range(studies):
        rows, lowest = study(kind, missing, np.random.default_rng(1000 + number))
        sweep = SweepResults("study", {"axes": ["model", AXIS, "optim.steps"], "expect_best": {}})  # type: ignore
        s = Analysis(sweep, "probe/class_error", "flops_total", rows)
        found = s.law
        if not isinstance(found, PowerLawFit):
            counted["refused"] += 1
            continue
        end = max(row["flops_total"] for row in rows)
        low, high = found.band(np.array([end, 5 * end]))
        count("largest budget", np.exp(lowest), low[0], high[0])
        beyond = law(5 * end, kind.shift) + min(kind.effects)
        count("x 5", np.exp(beyond), low[1], high[1])
        b = found.parameters["b"]
        if kind.sizes == 1:
            count("b", B, b.low, b.high)
        for axis in s.effects.axes:  # type: ignore[union-attr]
            for level in range(1, len(axis.names)):
                drawn = axis.relative[:, level] - axis.relative[:, 0]
                ends = quantiles(drawn)
                count("difference", kind.effects[level] - kind.effects[0], ends[0], ends[1])
    shares = [f"{100 * held[w] / counted[w]:.1f}" if counted[w] else "–" for w in COLUMNS]
    return f"| {name} | {missing} | {' | '.join(shares)} | {counted['refused']} |"


# ---- the best size: E = 0.1 + 0.3 N^-alpha + 0.4 D^-beta, N and D in millions

SIZE_GRIDS = {  # sizes; the best ones are 3.5 to 18 (12 to 65 where the exponents are equal)
    "off-centre, exponents differ": (np.geomspace(0.5, 60, 7), 0.45, 0.25),
    "off-centre, 5 sizes": (np.geomspace(1, 30, 5), 0.45, 0.25),
    "centred, exponents differ": (np.geomspace(2.5, 25, 5), 0.45, 0.25),
    "exponents equal": (np.geomspace(0.5, 60, 7), 0.35, 0.35),
}
SIZE_NOISE = (0.005, 0.01, 0.03)
SIZE_BUDGETS = np.geomspace(10, 1000, 5)


def size_study(grid: str, noise: float, seeds: int, rng: np.random.Generator) -> list[Row]:
    """Return trials of each size at each budget, of compute N D."""
    sizes, alpha, beta = SIZE_GRIDS[grid]
    rows: list[Row] = []
    for (n, size), budget in itertools.product(enumerate(sizes), SIZE_BUDGETS):
        images = budget / size
        error = 0.1 + 0.3 * size**-alpha + 0.4 * images**-beta
        for seed in range(seeds):
            row: Row = {
                "state": "done",
                "model": f"m{n}",
                "parameters": 1e6 * size,
                "steps": int(1e4 * images),
                "images_seen": 1e6 * images,
                "seed": seed,
                "setting": "all",
                "trial": f"m{n} {budget:g} s{seed}",
                "label": f"m{n} {budget:g} s{seed}",
                "flops_total": 6e12 * budget,
                "probe/class_error": float(error * np.exp(noise * rng.normal())),
            }
            rows.append(row)
    return rows


def size_coverage(grid: str, noise: float, seeds: int, studies: int) -> str:
    """Return a row of the table of best sizes: share that holds the truth, and median exponent."""
    _, alpha, beta = SIZE_GRIDS[grid]
    truth = beta / (alpha + beta)
    held: Counter[str] = Counter()
    values: dict[str, list[float]] = {"parabola": [], "E(N, D)": []}
    differ = 0
    for number in range(studies):
        rows = size_study(grid, noise, seeds, np.random.default_rng(2000 + number))
        sweep = SweepResults("study", {"axes": ["model", "optim.steps"], "expect_best": {}})  # type: ignore
        s = Analysis(sweep, "probe/class_error", "flops_total", rows)
        for method, found in (("parabola", s.iso_flop), ("E(N, D)", s.size_law)):
            exponent = getattr(found, "exponent", None)
            if isinstance(exponent, Interval):
                values[method].append(exponent.value)
                held[method] += truth in exponent
        differ += comparisons.differ(s.iso_flop, s.size_law)
    cells = [f"{grid}", f"{100 * noise:g} %", str(seeds), f"{truth:.3f}"]
    for method, exponents in values.items():
        if exponents:
            share = 100 * held[method] / len(exponents)
            cells.append(f"{share:.0f} % ({np.median(exponents):.3f}, n={len(exponents)})")
        else:
            cells.append("–")
    return f"| {' | '.join(cells)} | {differ} |"


def show_sizes(studies: int) -> None:
    print("| sizes | noise | seeds | truth | parabola | E(N, D) | differ |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for grid, noise, seeds in itertools.product(SIZE_GRIDS, SIZE_NOISE, (1, 2)):
        print(size_coverage(grid, noise, seeds, studies), flush=True)


# ---- the difference of a claim

CLAIM_NOISE = 0.03  # of a trial with an error of 0.5
OTHERS = {2: (), 4: (0.55, 0.45)}  # errors of the settings that the claim does not name


def claim_coverage(settings: int, seeds: int, difference: float, studies: int) -> str:
    """Return a row of the table of claims: shares of studies whose interval holds the truth.

    Twice: without a part of the noise that is that of the seed, and with half of its variance.
    """
    errors = (0.5, 0.5 + difference, *OTHERS[settings])
    cells = [str(settings), str(seeds), f"{difference:g}"]
    for shared in (0.0, 0.5):
        below = above = 0
        for number in range(studies):
            rng = np.random.default_rng(3000 + number)
            of_seed = CLAIM_NOISE * shared**0.5 * rng.normal(size=seeds)
            rows: list[Row] = []
            for (n, error), seed in itertools.product(enumerate(errors), range(seeds)):
                own = CLAIM_NOISE * (1 - shared) ** 0.5 * rng.normal()
                row: Row = {
                    "model": "m",
                    "parameters": 1e6,
                    "steps": 100,
                    "seed": seed,
                    AXIS: f"s{n}",
                    "probe/class_error": error + of_seed[seed] + own,
                }
                rows.append(row)
            fitted = effects.fit(rows, "probe/class_error", [AXIS])
            drawn = np.exp(fitted.setting_draws)
            low, high = quantiles(drawn[:, seeds] - drawn[:, 0])
            below += difference < low
            above += difference > high
        held = studies - below - above
        shares = [f"{100 * count / studies:.1f}" for count in (held, below, above)]
        cells.append("{} ({}, {})".format(*shares))
    return f"| {' | '.join(cells)} |"


def show_claims(studies: int) -> None:
    print("| settings | seeds | difference | own noise | half shared by a seed |")
    print("|---:|---:|---:|---:|---:|")
    for settings, seeds in itertools.product(OTHERS, (4, 8)):
        for difference in (0.0, 0.02, 0.04, 0.08):
            print(claim_coverage(settings, seeds, difference, studies), flush=True)


COLUMNS = ("largest budget", "x 5", "b", "difference")


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    p.add_argument("--studies", type=int, default=200)
    p.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    p.add_argument("--sizes", action="store_true", help="the exponent of the best size instead")
    p.add_argument("--claims", action="store_true", help="the difference of a claim instead")
    a = p.parse_args()
    if a.claims:
        show_claims(a.studies)
        return
    if a.sizes:
        show_sizes(a.studies)
        return
    print(f"| kind | missing | {' | '.join(COLUMNS)} | refused |")
    print(f"|---|---|{'---:|' * (len(COLUMNS) + 1)}")
    for name in a.kinds:
        settings = len(KINDS[name].effects) > 1 or KINDS[name].sizes > 1
        for missing in MISSING if settings else MISSING[:2]:
            if missing != "diverged" or len(KINDS[name].effects) > 1:
                print(coverage(name, missing, a.studies), flush=True)


if __name__ == "__main__":
    main()
