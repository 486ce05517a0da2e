"""Draws from the posterior of an additive model with random effects, by Gibbs sampling.

In: values y, the block and the factor levels of each. Out: draws of the model

    y = mean of the block + effect of the level, for each factor + noise

Block means scatter around a smooth surface, the effects of a factor around 0, each with a standard
deviation that is drawn, too. Its prior is half-Cauchy: it may be 0, and it has no upper limit. So
effects are shrunk to 0 by as much as the noise asks, and the lowest of several levels that do not
differ is not taken for a better one. Gelman 2006, Wand et al. 2011. numpy alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Index = NDArray[np.intp]
Factor = tuple[Index, float]

# Prior scales of the standard deviations, of values that are logarithms of errors
NOISE_SCALE = 0.2
BLOCK_SCALE = 0.03
DRAWS = 600  # that are kept
THIN = 4  # steps of the chain for each, since a step is like the one before
BURN_IN = 100  # draws that are left out


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


@dataclass
class _Scale:
    """A standard deviation with a half-Cauchy prior, as two inverse gamma variables."""

    prior: float
    variance: float = field(init=False)
    auxiliary: float = 1.0

    def __post_init__(self) -> None:
        self.variance = self.prior**2 / 4

    def draw(
        self,
        deviations: Floats,
        rng: np.random.Generator,
    ) -> None:
        rate = float(deviations @ deviations) / 2 + 1 / self.auxiliary
        self.variance = rate / rng.gamma((len(deviations) + 1) / 2)
        self.auxiliary = (1 / self.variance + self.prior**-2) / rng.gamma(1.0)


class _Sampler:
    """The state of a chain. Each method draws one kind of variable, given all others."""

    def __init__(
        self,
        y: Floats,
        block: Index,
        factors: Sequence[Factor],
        surface: Floats | None,
        seed: int,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.y = y
        self.block = block
        self.factors = [levels for levels, _ in factors]
        self.surface = surface
        self.count = np.bincount(block)
        self.mean = np.bincount(block, y) / self.count
        self.smooth = self.mean
        self.fitted = self.mean[block]
        self.counts = list(map(np.bincount, self.factors))
        self.effects = list(map(np.zeros, map(len, self.counts)))
        self.scales = [_Scale(scale) for _, scale in factors]
        self.block_scale = _Scale(BLOCK_SCALE)
        self.noise = _Scale(NOISE_SCALE)
        self.nested = _nested(self.factors, block)
        if surface is not None:
            self.covariance = np.linalg.pinv(surface.T @ surface)
            nearly = self.covariance + 1e-12 * np.eye(len(self.covariance))
            self.root = np.linalg.cholesky(nearly)

    def draw(self) -> None:
        """Draw every variable once."""
        self._draw_blocks()
        for number in range(len(self.factors)):
            self._draw_effects(number)
        self.noise.draw(self.y - self.fitted, self.rng)

    def advance(self) -> None:
        """Draw THIN times, and then move what fine levels have in common."""
        for _ in range(THIN):
            self.draw()
        for fine, coarse, parent in self.nested:
            self._shift(fine, coarse, parent)

    def _draw_blocks(self) -> None:
        """Draw the surface, and block means around it."""
        pull = 0.0
        if self.surface is not None:
            shift = self.root @ self.rng.normal(size=len(self.root))
            shift = shift * self.block_scale.variance**0.5
            plane = self.covariance @ (self.surface.T @ self.mean) + shift
            self.smooth = self.surface @ plane
            pull = 1 / self.block_scale.variance
        residual = self.y - self.fitted + self.mean[self.block]
        total = np.bincount(self.block, residual) / self.noise.variance
        precision = self.count / self.noise.variance + pull
        new = self._normal((total + pull * self.smooth) / precision, precision)
        self.fitted = self.fitted + (new - self.mean)[self.block]
        self.mean = new
        if self.surface is not None:
            self.block_scale.draw(new - self.smooth, self.rng)

    def _draw_effects(
        self,
        number: int,
    ) -> None:
        """Draw the effects of a factor, around 0."""
        factor = self.factors[number]
        old = self.effects[number]
        scale = self.scales[number]
        residual = self.y - self.fitted + old[factor]
        total = np.bincount(factor, residual, len(old)) / self.noise.variance
        precision = self.counts[number] / self.noise.variance + 1 / scale.variance
        new = self._normal(total / precision, precision)
        self.fitted = self.fitted + (new - old)[factor]
        self.effects[number] = new
        scale.draw(new, self.rng)

    def _shift(
        self,
        fine: int,
        coarse: int | None,
        parent: Index,
    ) -> None:
        """Draw what the fine levels of each coarse one have in common, and move it there.

        The fitted values stay. Without this, a chain with little noise stays for long where cells
        hold a part of the mean of their block.
        """
        children = self.effects[fine]
        precision_of_child = 1 / self.scales[fine].variance
        if coarse is None:
            old, expected, pull = self.mean, self.smooth, 1 / self.block_scale.variance
            pull = 0.0 if self.surface is None else pull
        else:
            old, expected, pull = self.effects[coarse], 0.0, 1 / self.scales[coarse].variance
        count = np.bincount(parent, minlength=len(old)).astype(float)
        total = np.bincount(parent, children, len(old)) * precision_of_child
        precision: Floats = count * precision_of_child + pull
        shift = self._normal((total - pull * (old - expected)) / precision, precision)
        self.effects[fine] = children - shift[parent]
        if coarse is None:
            self.mean = old + shift
        else:
            self.effects[coarse] = old + shift

    def _normal(
        self,
        mean: Floats,
        precision: Floats,
    ) -> Floats:
        return mean + self.rng.normal(size=len(mean)) / np.sqrt(precision)


def _nested(
    factors: Sequence[Index],
    block: Index,
) -> list[tuple[int, int | None, Index]]:
    """Return each factor whose levels lie within those of another one or within blocks (None).

    With it: the coarse level of each fine one.
    """
    found: list[tuple[int, int | None, Index]] = []
    coarser: list[tuple[int | None, Index]] = [(None, block), *enumerate(factors)]
    for (fine, levels), (coarse, others) in itertools.product(enumerate(factors), coarser):
        parent = np.zeros(levels.max() + 1, int)
        parent[levels] = others
        if fine != coarse and len(parent) > others.max() + 1 and (parent[levels] == others).all():
            found.append((fine, coarse, parent))
    return found


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
    chain = _Sampler(y, block, factors, surface, seed)
    blocks: list[Floats] = []
    effects: list[list[Floats]] = []
    variances: list[list[float]] = []
    for _ in range(BURN_IN):
        chain.advance()
    for _ in range(DRAWS):
        chain.advance()
        blocks.append(chain.smooth if is_single and surface is not None else chain.mean)
        effects.append(list(chain.effects))
        variances.append([scale.variance for scale in (*chain.scales, chain.noise)])
    by_factor = map(np.stack, zip(*effects, strict=True))
    scales = np.sqrt(variances)
    return Posterior(np.stack(blocks), list(by_factor), scales[:, :-1], scales[:, -1])


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
