"""Prediction errors and weights from the Gram matrix of one calibration run. numpy only.

G[i, j] = <r_i, r_j>, for the residuals of the block stack or for the model's outputs. It gives the exact squared error,
on the calibrated tokens, of predicting r_i by a*r_j + b*r_k, and the weights a, b for which that is smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from .errors import MagCacheError
from .interpolation import line_share, resample_gram
from .schedule import Schedule

if TYPE_CHECKING:
    from .tables import RatioTable

RIDGE = 1e-6  # share of the mean residual energy: enough to suppress noise, too little to blunt the prediction
GRAMS = {"residual": "gram", "output": "gram_of_outputs"}  # payload: its Gram matrices' key in a table's statistics


def least_squares(anchors: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The weights with the smallest error.

    anchors: Gram matrices (..., 2, 2) of the two newest; products: their inner products (..., 2, steps) with what is to
    be predicted. Returns weights (..., 2, steps), as every predictor does.
    """
    return np.linalg.solve(anchors, products)


def newest_alone(anchors: np.ndarray, products: np.ndarray) -> np.ndarray:
    """The newest as it is, as in the paper."""
    return np.zeros(products.shape) + np.array([[1.0], [0.0]])


PREDICTORS = {"linear": least_squares, "reuse": newest_alone}  # from a calibration; the third, "line", needs none


def has_gram(table: RatioTable) -> bool:
    return bool(table.statistics.get("gram"))


def unpredicted(table: RatioTable, levels: np.ndarray) -> np.ndarray:
    """Mask (steps,) of the steps that a table says nothing of and that therefore compute: those at noise levels that it
    does not cover, and each step after one of them."""
    uncovered = ~table.covered(levels)
    return uncovered | np.append(False, uncovered[:-1])


def table_grams(table: RatioTable, levels: np.ndarray, payload: str = "residual") -> np.ndarray:
    """The Gram matrices (branches, steps, steps) of a table at a run's noise levels. Raises MagCacheError if it has
    none, or too few steps to interpolate between."""
    stored = table.statistics.get(GRAMS[payload])
    if not stored:
        raise MagCacheError(
            f"{table.name} was calibrated without the Gram matrix of the {payload}; calibrate again, or ask for the "
            "other payload."
        )
    if not table.fine_enough(levels):
        raise MagCacheError(
            f"{table.name} was calibrated in {table.steps} steps, too few to predict a run of {len(levels)}; "
            "calibrate again with as many steps as you run."
        )
    try:
        grams = [unpacked(rows) for rows in stored.values()]
    except (TypeError, ValueError, IndexError, AttributeError):
        grams = []
    if not grams or any(gram.shape != (table.steps, table.steps) for gram in grams):
        raise MagCacheError(f"{table.name}: its Gram matrix cannot be read; calibrate again.")
    return np.stack(grams if table.fits(levels) else [resample_gram(gram, table.sigmas, levels) for gram in grams])


def packed(gram: ArrayLike) -> list[list[float]]:
    """The rows of a symmetric matrix's upper triangle, rounded to ten digits."""
    return [[float(f"{value:.10g}") for value in row[index:]] for index, row in enumerate(np.asarray(gram))]


def unpacked(rows: list[list[float]]) -> np.ndarray:
    """The inverse of `packed`."""
    gram = np.zeros((len(rows),) * 2)
    for index, row in enumerate(rows):
        gram[index, index:] = gram[index:, index] = row
    return gram


@dataclass(frozen=True)
class Forecast:
    """The error of every possible prediction. All arrays are indexed [i, j, k]: step i is predicted from the newest
    computed step j and the one before it, k < j < i; k = j where there is only one.

    errors: |r_i - prediction|^2 / |r_i|^2, averaged over the branches; infinite where no prediction is possible.
    weights: (branches, steps, steps, steps, 2); None: the newest is taken as it is.
    """

    errors: np.ndarray
    weights: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return len(self.errors)

    @classmethod
    def of_table(
        cls,
        table: RatioTable,
        levels: np.ndarray,
        predictor: str = "linear",
        payload: str = "residual",
        switch_step: int | None = None,
    ) -> Forecast:
        """From a calibration, at the noise levels of a run."""
        forecast, uncovered = cls.of_grams(table_grams(table, levels, payload), predictor), ~table.covered(levels)
        if uncovered.any():
            forecast = forecast.without(uncovered)
        return forecast if switch_step is None else forecast.between_experts(np.arange(len(levels)) >= switch_step)

    @classmethod
    def of_grams(cls, grams: Sequence[np.ndarray] | np.ndarray, predictor: str = "linear") -> Forecast:
        """grams: (branches, steps, steps)."""
        by_branch = [pair_errors(np.asarray(gram, dtype=float), predictor) for gram in grams]
        return cls(
            np.mean([errors for errors, _ in by_branch], axis=0),
            None if predictor == "reuse" else np.stack([weights for _, weights in by_branch]),
        )

    def between_experts(self, second: np.ndarray) -> Forecast:
        """The same where no expert is predicted from the other's residuals. second: mask (steps,) of the second's."""
        other = second[:, None] != second
        forecast = self.one_anchor_where(other)
        return replace(forecast, errors=np.where(other[:, :, None], np.inf, forecast.errors))

    def without(self, uncovered: np.ndarray) -> Forecast:
        """The same where the steps of the mask `uncovered` (steps,) are neither predicted nor predicted from."""
        forecast = self.one_anchor_where(np.broadcast_to(uncovered, (self.steps, self.steps)))
        impossible = uncovered[:, None, None] | uncovered[None, :, None]
        return replace(forecast, errors=np.where(impossible, np.inf, forecast.errors))

    def one_anchor_where(self, apart: np.ndarray) -> Forecast:
        """The same where a prediction uses j alone if `apart` [j, k], a mask (steps, steps), says so."""
        same = np.arange(self.steps)
        errors = np.where(apart, self.errors[:, same, same][:, :, None], self.errors)
        if self.weights is None:
            return Forecast(errors)
        return Forecast(errors, np.where(apart[..., None], self.weights[:, :, same, same][:, :, :, None], self.weights))

    def error_of(self, reuse: np.ndarray) -> np.ndarray:
        """Expected relative error (steps,) of predicting each step; of a computed step, what predicting it would have
        missed."""
        error = np.sqrt(self.errors[anchors_of(reuse)])
        return np.append(0.0, np.where(np.isfinite(error), error, 0))

    def weights_of(self, reuse: np.ndarray) -> np.ndarray | None:
        """`Schedule.weights`."""
        if self.weights is None:
            return None
        weights = np.zeros((len(self.weights), len(reuse), 2))
        i, j, k = anchors_of(reuse)
        weights[:, 1:] = self.weights[:, i, j, k]
        return weights


def anchors_of(reuse: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(i, j, k) of every step but the first, as in `Forecast`. reuse: mask (steps,) of the reused steps."""
    computed, steps = np.flatnonzero(~reuse), np.arange(1, len(reuse))
    newest = np.searchsorted(computed, steps) - 1
    return steps, computed[newest], computed[np.maximum(newest - 1, 0)]


def pair_errors(gram: np.ndarray, predictor: str = "linear") -> tuple[np.ndarray, np.ndarray]:
    """Errors (steps, steps, steps) and weights (steps, steps, steps, 2) of one branch, as in `Forecast`.

    gram: (steps, steps). A single anchor is taken as it is.
    """
    steps, energy = len(gram), np.diag(gram)
    anchors, products = np.empty((steps, steps, 2, 2)), np.empty((steps, steps, 2, steps))  # [j, k, ...]
    anchors[..., 0, 0], anchors[..., 1, 1], anchors[..., 0, 1], anchors[..., 1, 0] = energy[:, None], energy, gram, gram
    products[..., 0, :], products[..., 1, :] = gram[:, None], gram
    weights = PREDICTORS[predictor](anchors + RIDGE * energy.mean() * np.eye(2), products)
    weights[np.arange(steps), np.arange(steps)] = [[1.0], [0.0]]
    missed = energy - 2 * (weights * products).sum(2) + np.einsum("jkai,jkab,jkbi->jki", weights, anchors, weights)
    i, j, k = np.indices((steps,) * 3)
    errors = np.where((k <= j) & (j < i), (np.maximum(missed, 0) / energy).transpose(2, 0, 1), np.inf)
    return errors, weights.transpose(3, 0, 1, 2)


def errors_and_weights(
    grams: np.ndarray,
    reuse: np.ndarray,
    predictor: str = "linear",
    switch_step: int | None = None,
    uncovered: np.ndarray | bool = False,
    levels: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What `Forecast.error_of` and `Forecast.weights_of` give for one schedule, without looking at any other.

    grams: (branches, steps, steps); uncovered: mask (steps,) of steps that are neither predicted nor predicted from;
    levels: for the predictor "line" alone, which is taken to follow its line all the way.
    """
    i, j, k = anchors_of(reuse)
    second = np.arange(len(reuse)) >= (len(reuse) if switch_step is None else switch_step)
    uncovered = uncovered | np.zeros(len(reuse), dtype=bool)
    single = (j == k) | (second[j] != second[k]) | uncovered[j] | uncovered[k]
    errors, weights = [], np.zeros((len(grams), len(reuse), 2))
    for gram, row in zip(grams, weights):
        anchors = np.stack([np.stack([gram[j, j], gram[j, k]], -1), np.stack([gram[k, j], gram[k, k]], -1)], -2)
        products = np.stack([gram[i, j], gram[i, k]], -1)[..., None]
        if predictor == "line":
            single |= k == 0  # the first output, made of noise alone, lies off the line
            share = line_share(np.asarray(levels, dtype=float), i, j, np.where(single, i, k))
            found = np.stack([1 + share, -share], -1)
        else:
            found = PREDICTORS[predictor](anchors + RIDGE * np.diag(gram).mean() * np.eye(2), products)[..., 0]
        found[single] = [1.0, 0.0]
        missed = gram[i, i] - 2 * (found * products[..., 0]).sum(-1) + np.einsum("ia,iab,ib->i", found, anchors, found)
        errors.append(np.maximum(missed, 0) / gram[i, i])
        row[1:] = found
    error = np.sqrt(np.mean(errors, axis=0))
    error[(second[i] != second[j]) | uncovered[i] | uncovered[j]] = 0.0
    return np.append(0.0, error), None if predictor in ("reuse", "line") else weights


def gram_of_outputs(table: RatioTable, levels: np.ndarray) -> np.ndarray | None:
    """The Gram matrix (steps, steps) of the outputs at the noise levels of a run, nan at levels that the table does not
    cover. None: the table has none, or one for each branch of guidance."""
    if len(table.mag_ratios) > 1 or not table.statistics.get(GRAMS["output"]):
        return None
    uncovered = ~table.covered(levels)
    return np.where(uncovered | uncovered[:, None], np.nan, table_grams(table, levels, "output")[0])


def error_by_gram(schedule: Schedule, levels: np.ndarray, table: RatioTable) -> np.ndarray:
    """Expected relative error of each step that a schedule of the paper's rule reuses."""
    error, _ = errors_and_weights(
        table_grams(table, levels, "residual"), schedule.reuse, "reuse", table.switch_step(levels)
    )
    return error[schedule.reuse]
