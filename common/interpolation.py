"""Weights of what is known at some noise levels of a run in what lies between and after them. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

RIDGE = 1e-6  # of the mean squared move: enough against noise, too little to blunt the interpolation


def line_share(levels: Any, step: Any, newest: Any, before: Any) -> Any:
    """How far `step` is on the line from `before` through `newest`, in noise levels: 0 at newest, 1 as far again. Of
    numbers, or of arrays (steps,)."""
    return (levels[step] - levels[newest]) / (levels[newest] - levels[before])


def interpolation_weights(levels: Sequence[float], step: int, anchors: Sequence[int]) -> list[float]:
    """Of the outputs at the steps `anchors` in that at `step`: Lagrange's, a straight line through two, a parabola
    through three."""
    return [
        float(np.prod([(levels[step] - levels[o]) / (levels[a] - levels[o]) for o in anchors if o != a]))
        for a in anchors
    ]


def gram_weights(gram: np.ndarray, step: int, anchors: Sequence[int]) -> list[float]:
    """The same by least squares: weights whose sum is 1 and that come closest to the output at `step` in the run whose
    Gram matrix (steps, steps) this is."""
    origin, *others = anchors
    moves = [step, *others]  # each from the output at `origin`
    products = gram[np.ix_(moves, moves)] - gram[moves, origin][:, None] - gram[moves, origin] + gram[origin, origin]
    known = products[1:, 1:]
    weights = np.linalg.solve(known + RIDGE * known.trace() / len(known) * np.eye(len(known)), products[1:, 0])
    return [float(1 - weights.sum()), *weights.tolist()]


def gram_of_data(gram: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """The Gram matrix of x0 less the run's first latent, from that of the outputs: x0_i = x_i - sigma_i v_i, where
    Euler's steps make x_i of the outputs before it. Differences of x0 need no more. What is nan, at the ends of a run,
    stays so."""
    moves = np.append(np.diff(levels), 0.0)
    steps = np.tril(np.broadcast_to(moves, gram.shape), -1) - np.diag(levels)
    return np.where(np.isnan(gram), np.nan, steps @ np.nan_to_num(gram) @ steps.T)


def resample_gram(gram, sigmas, new_sigmas):
    """The Gram matrix of a run at other noise levels: residuals interpolated in sigma by cubics through four levels.

    G' = W G W^T, with the rows of W the Lagrange weights of the nearest calibrated levels; beyond the ends the
    outermost straight line goes on.
    """
    gram, sigmas = np.asarray(gram, dtype=float), np.asarray(sigmas, dtype=float)
    weights = np.zeros((len(new_sigmas), len(sigmas)))
    for row, sigma in zip(weights, np.asarray(new_sigmas, dtype=float)):
        nodes = nearest_levels(sigmas, sigma)
        for node in nodes:
            others = [other for other in nodes if other != node]
            row[node] = np.prod([(sigma - sigmas[other]) / (sigmas[node] - sigmas[other]) for other in others])
    return weights @ gram @ weights.T


def nearest_levels(sigmas, sigma):
    """Indices of the calibrated levels that a new one is interpolated from: two on each side, or the outermost two."""
    above = int((sigmas > sigma).sum())
    if len(sigmas) < 2:
        return [0]
    if above == 0:
        return [0, 1]
    if above == len(sigmas):
        return [above - 2, above - 1]
    return list(range(max(0, above - 2), min(len(sigmas), above + 2)))
