"""Magnitude ratios as numbers, and at the noise levels of another run.

gamma_t = mean over tokens of |r_t| / |r_{t-1}|, with r_t the residual of the block stack (paper, section 3.2, eq. 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import numpy as np

from .errors import MagCacheError

Levels = Union[np.ndarray, Sequence[float]]  # noise levels of a run's steps, from high to low, in 0..1


def flow_sigmas(steps: int, shift: float = 1.0) -> np.ndarray:
    """Noise levels of a rectified-flow sampler: 1, ..., 1/steps, shifted by sigma' = shift*sigma / (1 +
    (shift-1)*sigma). Raises MagCacheError for steps or a shift that cannot be."""
    if steps <= 0:
        raise MagCacheError(f"The number of steps must be at least 1, not {steps}.")
    if not 0 < shift < np.inf:
        raise MagCacheError(f"The shift of a sampler is a number larger than 0, not {shift}.")
    sigma = np.linspace(1, 1 / steps, steps)
    return shift * sigma / (1 + (shift - 1) * sigma)


def fitted_shift(sigmas: Levels) -> float:
    """The shift of the rectified-flow sampler that has these noise levels (median over the steps; 1 for one step)."""
    sigmas = np.asarray(sigmas, dtype=float)
    plain = np.linspace(1, 1 / len(sigmas), len(sigmas))[1:]
    inner = sigmas[1:]
    return float(np.median(inner * (1 - plain) / (plain * (1 - inner)))) if len(inner) else 1.0


def nearest_interp(ratios: Levels, steps: int) -> np.ndarray:
    """Index resampling of the released scripts: entry round(i*(L-1)/(n-1)), halves to even; n = 1 takes the last."""
    ratios = np.asarray(ratios, dtype=float)
    if steps == 1:
        return ratios[-1:]
    return ratios[np.round(np.arange(steps) * (len(ratios) - 1) / (steps - 1)).astype(int)]


def log_magnitude(ratios: Levels, sigmas: Levels, at: Levels) -> np.ndarray:
    """L(sigma) = log of the residual's magnitude relative to the first step, piecewise linear in sigma.

    at: the noise levels to evaluate L at. Below the last calibrated level the last slope continues; above the first one
    the magnitude stays the same.
    """
    cumulative = np.cumsum(np.log(np.asarray(ratios, dtype=float)))
    own, new = np.asarray(sigmas, dtype=float), np.asarray(at, dtype=float)
    distinct = np.append(np.flatnonzero(np.diff(own) < 0), len(own) - 1)
    own, cumulative = own[distinct], cumulative[distinct]
    values = np.interp(-new, -own, cumulative)
    if len(own) > 1:
        slope = (cumulative[-1] - cumulative[-2]) / (own[-1] - own[-2])
        below = new < own[-1]
        values[below] = cumulative[-1] + slope * (new[below] - own[-1])
    return values


def resample(ratios: Levels, sigmas: Levels, new_sigmas: Levels) -> np.ndarray:
    """Ratios between the steps of another run, exp(L(b) - L(a)); the first is 1.

    The product over any range of noise levels stays that of the calibration, whatever the run's steps, shift or first
    level.
    """
    logs = log_magnitude(ratios, sigmas, new_sigmas)
    return np.exp(np.diff(logs, prepend=logs[:1]))
