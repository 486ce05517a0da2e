"""Draws from the posterior of an additive model with random effects, by Gibbs sampling.

In: values y, the block and the factor levels of each. Out: draws of the model

    y = mean of the block + effect of the level, for each factor + noise

Block means scatter around a smooth surface, the effects of a factor around 0, each with a standard
deviation that is drawn, too. Its prior is half-Cauchy: it may be 0, and it has no upper limit. So
effects are shrunk to 0 by as much as the noise asks, and the lowest of several levels that do not
differ is not taken for a better one. Gelman 2006, Wand et al. 2011. numpy alone: all chains in one
array. Beyond one variable at a time, they draw what two can exchange while the fitted values stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Index = NDArray[np.intp]
Factor = tuple[Index, float]

# Prior scales of the standard deviations, of values that are logarithms of errors
NOISE_SCALE = 0.2
BLOCK_SCALE = 0.03
DRAWS = 600  # that are kept
CHAINS = 20  # side by side; each variable of the model is an array [..., chains]
THIN = 2  # steps of a chain for each draw
BURN_IN = 20  # draws of each chain that are left out


@dataclass(frozen=True)
class Posterior:
    """Draws, one per row.

    blocks: means of the blocks [draws, blocks], as if all effects were 0. effects: of the levels of
    each factor [draws, levels]. scales: standard deviation of each factor [draws, factors]. noise:
    that of a value [draws].
    """

    blocks: Floats
    effects: list[Floats]
    scales: Floats
    noise: Floats


class _Group:
    """The values that share a level."""

    def __init__(
        self,
        level: Index,
        levels: int = 0,
    ) -> None:
        self.level = level
        self.count = np.bincount(level, minlength=levels)[:, None].astype(float)
        self._cell = (level[:, None] * CHAINS + np.arange(CHAINS)).ravel()

    def total(
        self,
        values: Floats,
    ) -> Floats:
        """Return sums of values [n, chains] over each level [levels, chains]."""
        sums = np.bincount(self._cell, values.ravel(), self.count.size * CHAINS)
        return np.asarray(sums, float).reshape(-1, CHAINS)


class _Effects:
    """Effects of the levels of a factor, and their variance, whose root is half-Cauchy.

    It is drawn as that of a normal factor times an inverse gamma variable. So a chain in which it
    is nearly 0 leaves that at once (Gelman 2006, section 4; Yu and Meng 2011).
    """

    def __init__(
        self,
        level: Index,
        prior: float,
    ) -> None:
        self.group = _Group(level)
        self.prior = prior
        self.values = np.zeros((self.group.count.size, CHAINS))
        self.variance = np.full(CHAINS, prior**2 / 4)

    def draw(
        self,
        residual: Floats,
        noise: Floats,
        rng: np.random.Generator,
    ) -> None:
        """Draw effects and variance, and subtract the change from the residuals.

        noise: variance of a value.
        """
        old = self.values
        count = self.group.count
        total = (self.group.total(residual) + count * old) / noise
        square = 2 * rng.exponential(size=CHAINS) / (self.prior**-2 + 1 / self.variance)
        precision = square * (count / noise + 1 / self.variance)
        unit = _normal(rng, total * np.sqrt(square), precision)

        squares = unit**2
        precision = (count * squares).sum(0) / noise + self.prior**-2
        factor = _normal(rng, (unit * total).sum(0), precision)
        rate = (1 + squares.sum(0)) / 2
        shape = (len(old) + 1) / 2
        self.variance = factor**2 * rate / rng.gamma(shape, size=CHAINS)
        self.values = factor * unit
        residual -= (self.values - old)[self.group.level]


class _Sampler:
    """The state of the chains: y = base of the block + effects + residual."""

    def __init__(
        self,
        y: Floats,
        block: Index,
        factors: Iterable[Factor],
        surface: Floats | None,
        seed: int,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.block = _Group(block)
        self.surface = surface
        factors = list(factors)
        if surface is not None:
            factors.append((block, BLOCK_SCALE))
            self.root = _root(surface, self.block.count)
        self.effects = [_Effects(level, prior) for level, prior in factors]
        self.base = np.zeros((self.block.count.size, CHAINS))
        self.residual = np.repeat(y[:, None], CHAINS, 1)
        self.noise = np.full(CHAINS, NOISE_SCALE**2 / 4)  # its variance
        self.auxiliary = np.ones(CHAINS)
        self.pairs = list(itertools.starmap(_Pair, itertools.combinations(self.effects, 2)))
        known = np.eye(len(self.base)) if surface is None else surface
        self.with_base: list[_WithBase] = []
        for effects in self.effects:
            self.with_base.append(_WithBase(effects, self.block, known))

    def draw(self) -> None:
        """Draw every variable once."""
        self._draw_base()
        for effects in self.effects:
            effects.draw(self.residual, self.noise, self.rng)
        self._draw_noise()
        for pair in self.pairs:
            pair.draw(self.rng)
        for effects in self.with_base:
            self.base = self.base + effects.draw(self.rng)

    def _draw_base(self) -> None:
        """Draw the surface, or block means of which nothing is known."""
        count = self.block.count
        old = self.base
        total = self.block.total(self.residual) + count * old
        if self.surface is None:
            self.base = _normal(self.rng, total / self.noise, count / self.noise)
        else:
            normal = self.rng.normal(size=(self.root.shape[1], CHAINS))
            normal *= np.sqrt(self.noise)
            self.base = self.root @ (self.root.T @ total + normal)
        self.residual -= (self.base - old)[self.block.level]

    def _draw_noise(self) -> None:
        """Draw the variance of a value, and the auxiliary variable of its half-Cauchy prior."""
        squares = np.einsum("ij,ij->j", self.residual, self.residual)
        rate = squares / 2 + 1 / self.auxiliary
        shape = (len(self.residual) + 1) / 2
        self.noise = rate / self.rng.gamma(shape, size=CHAINS)
        rate = 1 / self.noise + NOISE_SCALE**-2
        self.auxiliary = rate / self.rng.gamma(1.0, size=CHAINS)


class _Pair:
    """Two factors, and what they can exchange, such as a part of a level for that of its cells."""

    def __init__(
        self,
        first: _Effects,
        second: _Effects,
    ) -> None:
        joined = _joined(first.group.level, second.group.level)
        self.members = list(zip((first, second), joined, strict=True))

    def draw(
        self,
        rng: np.random.Generator,
    ) -> None:
        (first, of_first), (second, of_second) = self.members
        total = of_first.total(first.values) / first.variance
        total -= of_second.total(second.values) / second.variance
        precision = of_first.count / first.variance
        precision = precision + of_second.count / second.variance
        shift = _normal(rng, total, precision)
        first.values = first.values - shift[of_first.level]
        second.values = second.values + shift[of_second.level]


class _WithBase:
    """A factor, and what it can exchange with the base of the blocks."""

    def __init__(
        self,
        effects: _Effects,
        block: _Group,
        known: Floats,
    ) -> None:
        """known: regressors of the base [blocks, k]."""
        self.effects = effects
        self.of_level, self.of_block = _joined(effects.group.level, block.level)
        same = np.eye(self.of_block.count.size)[self.of_block.level]
        mean = np.asarray(np.linalg.lstsq(same, known)[0], float)
        _, sizes, rows = np.linalg.svd(known - same @ mean)
        is_shared = sizes < 1e-9 * np.abs(known).max()
        self.root = _root(mean @ rows[is_shared].T, self.of_level.count)

    def draw(
        self,
        rng: np.random.Generator,
    ) -> Floats:
        """Draw the exchange, take it from the effects, and return it for each block."""
        total = self.of_level.total(self.effects.values)
        normal = rng.normal(size=(self.root.shape[1], CHAINS))
        normal *= np.sqrt(self.effects.variance)
        shift = self.root @ (self.root.T @ total + normal)
        self.effects.values = self.effects.values - shift[self.of_level.level]
        return shift[self.of_block.level]


def _root(
    regressors: Floats,
    count: Floats,
) -> Floats:
    """Return R of the covariance R R' of fitted values, under noise of variance 1."""
    values, vectors = np.linalg.eigh(regressors.T @ (regressors * count))
    kept = values > 1e-12 * values.max(initial=0)
    return regressors @ (vectors[:, kept] / np.sqrt(values[kept]))


def _normal(
    rng: np.random.Generator,
    total: Floats,
    precision: Floats,
) -> Floats:
    """Draw around total / precision."""
    return total / precision + rng.normal(size=total.shape) / np.sqrt(precision)


def _joined(
    first: Index,
    second: Index,
) -> tuple[_Group, _Group]:
    """Return groups of the levels of two factors, which are joined where values have both."""
    of_first = np.arange(first.max() + 1)
    of_second = np.full(second.max() + 1, len(of_first))
    while not np.array_equal(of_second[second], of_first[first]):
        np.minimum.at(of_second, second, of_first[first])
        np.minimum.at(of_first, first, of_second[second])
    numbers = np.concatenate([of_first, of_second])
    found, of_level = np.unique(numbers, return_inverse=True)
    groups = len(found)
    levels = len(of_first)
    return _Group(of_level[:levels], groups), _Group(of_level[levels:], groups)


def sample(
    y: Floats,
    block: Index,
    factors: Sequence[Factor] = (),
    surface: Floats | None = None,
    seed: int = 0,
) -> Posterior:
    """Return draws for values y [n] with a block and levels of factors [n], numbered from 0.

    factors: levels, and the prior scale of their effects, each.
    surface: regressors [blocks, k] of the smooth surface; None: nothing is known of the blocks. Of
    blocks with one value each, the surface is drawn: the rest cannot be separated from noise. Their
    values themselves are returned where there is no surface and no factor.
    """
    is_single = len(y) == block.max() + 1
    if is_single and surface is None and not factors:
        known = np.tile(y[np.argsort(block)], (DRAWS, 1))
        return Posterior(known, [], np.zeros((DRAWS, 0)), np.zeros(DRAWS))
    chains = _Sampler(y, block, factors, surface, seed)
    drawn: list[list[Floats]] = []
    for number in range(BURN_IN + DRAWS // CHAINS):
        for _ in range(THIN):
            chains.draw()
        if number < BURN_IN:
            continue
        mean = chains.base
        if surface is not None and not is_single:
            mean = mean + chains.effects[-1].values
        shown = chains.effects[: len(factors)]
        variances = [each.variance for each in shown]
        scales = np.sqrt(np.stack([*variances, chains.noise]))
        drawn.append([mean, scales, *(each.values for each in shown)])
    blocks, scales, *effects = map(_rows, zip(*drawn, strict=True))
    return Posterior(blocks, effects, scales[:, :-1], scales[:, -1])


def _rows(
    drawn: Sequence[Floats],
) -> Floats:
    """Return draws of each chain [k, chains] as [draws, k]."""
    return np.stack(drawn).transpose(0, 2, 1).reshape(-1, len(drawn[0]))


def surface_of(*columns: Floats) -> Floats | None:
    """Return regressors of a quadratic surface over the variables of blocks [n] each that vary.

    As many as there is room for: fewer than blocks. None where fewer than two variables vary, or
    where there is no room for a plane.
    """
    varied: list[Floats] = []
    squares: list[Floats] = []
    for column in columns:
        centred = column - column.mean()
        if len(set(column)) > 1:
            varied.append(centred)
        if len(set(column)) > 2:
            squares.append(centred**2)
    if len(varied) < 2 or len(columns[0]) <= 1 + len(varied):
        return None
    terms = [np.ones(len(columns[0])), *varied, varied[0] * varied[1], *squares]
    return np.stack(terms[: len(columns[0]) - 1], 1)
