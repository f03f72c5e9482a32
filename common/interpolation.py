"""Weights with which what is known at some noise levels of a run gives what lies between and after them. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .ratios import Levels

RIDGE = 1e-6  # share of the mean squared move: enough to suppress noise, too little to blunt the interpolation


def line_share(levels: Any, step: Any, newest: Any, before: Any) -> Any:
    """How far the noise level of `step` lies past that of `newest`, in units of the distance from `before` to `newest`.
    The steps are indices, or arrays of indices."""
    return (levels[step] - levels[newest]) / (levels[newest] - levels[before])


def interpolation_weights(levels: Sequence[float], step: int, anchors: Sequence[int]) -> list[float]:
    """Lagrange weights of the outputs at the steps `anchors` for the output at `step`: two give a straight line in the
    noise level, three a parabola."""
    weights = []
    for anchor in anchors:
        others = [other for other in anchors if other != anchor]
        factors = [(levels[step] - levels[other]) / (levels[anchor] - levels[other]) for other in others]
        weights.append(float(np.prod(factors)))
    return weights


def gram_weights(gram: np.ndarray, step: int, anchors: Sequence[int]) -> list[float]:
    """The same by least squares: the weights with sum 1 that come closest to the output at `step` in a calibrated run.
    gram: of that run's outputs, (steps, steps)."""
    origin, *others = anchors
    moves = [step, *others]  # their outputs less that at `origin`
    products = gram[np.ix_(moves, moves)] - gram[moves, origin][:, None] - gram[moves, origin] + gram[origin, origin]
    known = products[1:, 1:]
    weights = np.linalg.solve(known + RIDGE * known.trace() / len(known) * np.eye(len(known)), products[1:, 0])
    return [float(1 - weights.sum()), *weights.tolist()]


def gram_of_data(gram: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """The Gram matrix (steps, steps) of x0_i - x_0, from that of the outputs v_i: x0_i = x_i - sigma_i v_i, and Euler's
    steps make x_i of x_0 and the outputs before it. For differences of x0, x_0 does not matter. nan stays nan."""
    moves = np.append(np.diff(levels), 0.0)
    steps = np.tril(np.broadcast_to(moves, gram.shape), -1) - np.diag(levels)
    return np.where(np.isnan(gram), np.nan, steps @ np.nan_to_num(gram) @ steps.T)


def resample_gram(gram: np.ndarray, sigmas: Levels, new_sigmas: Levels) -> np.ndarray:
    """The Gram matrix at other noise levels, with the residuals interpolated by cubics through the four nearest levels.

    G' = W G W^T; the rows of W are Lagrange weights. Beyond the ends, the outermost straight line is continued.
    """
    gram, sigmas = np.asarray(gram, dtype=float), np.asarray(sigmas, dtype=float)
    weights = np.zeros((len(new_sigmas), len(sigmas)))
    for row, sigma in zip(weights, np.asarray(new_sigmas, dtype=float)):
        nodes = nearest_levels(sigmas, sigma)
        for node in nodes:
            others = [other for other in nodes if other != node]
            row[node] = np.prod([(sigma - sigmas[other]) / (sigmas[node] - sigmas[other]) for other in others])
    return weights @ gram @ weights.T


def nearest_levels(sigmas: np.ndarray, sigma: float) -> list[int]:
    """Indices of the calibrated levels from which a new one is interpolated: two on each side, or the outermost two."""
    above = int((sigmas > sigma).sum())
    if len(sigmas) < 2:
        return [0]
    if above == 0:
        return [0, 1]
    if above == len(sigmas):
        return [above - 2, above - 1]
    return list(range(max(0, above - 2), min(len(sigmas), above + 2)))
