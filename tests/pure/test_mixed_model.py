"""The Gibbs sampler, compared with the posterior on a grid."""

import numpy as np
import pytest

from jepa_cluster.results import mixed_model
from jepa_cluster.results.mixed_model import Floats

BLOCK = np.repeat([0, 1], 9)
LEVEL = np.tile(np.repeat([0, 1, 2], 3), 2)  # six values each
PRIOR = 0.1
QUANTILES = np.array([0.1, 0.25, 0.5, 0.75, 0.9])


def posterior(
    y: Floats,
    scales: Floats,
    noises: Floats,
) -> Floats:
    """Return the density of the scale of effects and of the noise at the points of a grid.

    The block means have a flat prior, and are integrated out: of 18 values 16 contrasts are left,
    two of them between levels.
    """
    centred = y - (np.bincount(BLOCK, y) / 9)[BLOCK]
    between = 6 * ((np.bincount(LEVEL, centred) / 6) ** 2).sum()
    within = (centred**2).sum() - between
    noise = noises**2
    of_level = noise + 6 * scales[:, None] ** 2
    log_density = (
        -7 * np.log(noise) - np.log(of_level) - within / noise / 2 - between / of_level / 2
    )
    log_density -= np.log1p(noise / mixed_model.NOISE_SCALE**2)
    log_density -= np.log1p((scales[:, None] / PRIOR) ** 2)
    return np.exp(log_density - log_density.max())


def quantiles(
    points: Floats,
    density: Floats,
) -> Floats:
    middle = (np.cumsum(density) - density / 2) / density.sum()
    return np.interp(QUANTILES, middle, points)


@pytest.mark.parametrize("effect", [0.0, 0.01, 0.2], ids=["none", "small", "large"])
def test_scales_have_the_quantiles_of_the_posterior(effect: float):
    """A chain leaves a scale near 0, and does not stay away from it."""
    noise = 0.02 * np.random.default_rng(1).normal(size=len(BLOCK))
    y = np.array([0.3, -0.4])[BLOCK] + effect * np.array([-1, 0, 1])[LEVEL] + noise
    scales, noises = np.linspace(5e-4, 10, 20000), np.linspace(1e-3, 0.08, 200)
    density = posterior(y, scales, noises)
    runs = [mixed_model.sample(y, BLOCK, [(LEVEL, PRIOR)], seed=seed) for seed in range(16)]
    drawn = np.quantile(np.concatenate([run.scales for run in runs]), QUANTILES)
    assert drawn == pytest.approx(quantiles(scales, density.sum(1)), rel=0.06, abs=5e-4)
    drawn = np.quantile(np.concatenate([run.noise for run in runs]), QUANTILES)
    assert drawn == pytest.approx(quantiles(noises, density.sum(0)), rel=0.02)
