"""Schedules and weights from the Gram matrix of one calibration run.

G[i, j] = <r_i, r_j> for the block-stack residuals of a run or for the model's outputs. From it follows the exact
squared error, on the calibration's tokens, of predicting r_i by a*r_j + b*r_k, and the weights a, b that make it
least; and the schedule with the fewest computed steps that keeps a bound, as a shortest path over pairs of neighbouring
computed steps. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .errors import MagCacheError
from .interpolation import line_share, resample_gram
from .schedule import Schedule

if TYPE_CHECKING:
    from .tables import RatioTable

RIDGE = 1e-6  # of the mean residual energy: enough against noise, too little to blunt the prediction
POWER = 2  # of the squared errors that a schedule adds up: one large error costs more than two halves
GRAMS = {
    "residual": "gram",
    "output": "gram_of_outputs",
}  # payload: where a calibration's statistics have its Gram matrices


def least_squares(anchors, products):
    """The weights that predict best. anchors: Gram matrices (..., 2, 2) of the newest two; products: theirs with what
    is to be predicted, (..., 2, steps). Returns weights (..., 2, steps), as every predictor."""
    return np.linalg.solve(anchors, products)


def newest(anchors, products):
    """The newest as it is, as the paper has it."""
    return np.zeros(products.shape) + np.array([[1.0], [0.0]])


PREDICTORS = {"linear": least_squares, "reuse": newest}  # of a calibration; the third, "line", needs none


def has_gram(table):
    return bool(table.statistics.get("gram"))


def unpredicted(table: RatioTable, levels: np.ndarray) -> np.ndarray:
    """Mask (steps,) of the steps beyond the noise levels that a table covers, and of those that would be predicted from
    one: they compute."""
    uncovered = ~table.covered(levels)
    return uncovered | np.append(False, uncovered[:-1])


def table_grams(table, levels, payload="residual"):
    """The Gram matrices (branches, steps, steps) of a `RatioTable` at the noise levels of a run."""
    stored = table.statistics.get(GRAMS[payload])
    if not stored:
        raise MagCacheError(
            f"{table.name} was calibrated without the Gram matrix of the {payload}; calibrate again, or ask for the "
            "other payload."
        )
    if not table.fine_enough(levels):
        raise MagCacheError(
            f"{table.name} was calibrated in {table.steps} steps, too few to predict a run of {len(levels)} by; "
            "calibrate again in as many steps as you run."
        )
    try:
        grams = [unpacked(rows) for rows in stored.values()]
    except (TypeError, ValueError, IndexError, AttributeError):
        grams = []
    if not grams or any(gram.shape != (table.steps, table.steps) for gram in grams):
        raise MagCacheError(f"{table.name}: its Gram matrix cannot be read; calibrate again.")
    return np.stack(grams if table.fits(levels) else [resample_gram(gram, table.sigmas, levels) for gram in grams])


def packed(gram):
    """A symmetric matrix as the rows of its upper triangle, ten digits each."""
    return [[float(f"{value:.10g}") for value in row[index:]] for index, row in enumerate(np.asarray(gram))]


def unpacked(rows):
    gram = np.zeros((len(rows),) * 2)
    for index, row in enumerate(rows):
        gram[index, index:] = gram[index:, index] = row
    return gram


@dataclass(frozen=True)
class Forecast:
    """What every prediction would miss, all indexed [i, j, k]: step i from the newest anchor j and k, the one before
    it, k < j < i; k = j where there is only one. What cannot be is infinite.

    errors: squared and relative, |r_i - prediction|^2 / |r_i|^2, the mean over the branches.
    weights: (branches, steps, steps, steps, 2); None: the newest as it is.
    """

    errors: np.ndarray
    weights: np.ndarray | None = None

    @property
    def steps(self):
        return len(self.errors)

    @classmethod
    def of_table(cls, table, levels, predictor="linear", payload="residual", switch_step=None):
        """Of a `RatioTable` at the noise levels of a run."""
        forecast, uncovered = cls.of_grams(table_grams(table, levels, payload), predictor), ~table.covered(levels)
        if uncovered.any():
            forecast = forecast.within(uncovered)
        return forecast if switch_step is None else forecast.of_experts(np.arange(len(levels)) >= switch_step)

    @classmethod
    def of_grams(cls, grams, predictor="linear"):
        """grams: (branches, steps, steps)."""
        by_branch = [pair_errors(np.asarray(gram, dtype=float), predictor) for gram in grams]
        return cls(
            np.mean([errors for errors, _ in by_branch], axis=0),
            None if predictor == "reuse" else np.stack([weights for _, weights in by_branch]),
        )

    def of_experts(self, second):
        """The same where no residual of one expert serves the other; second: mask (steps,) of the second one's
        steps."""
        other = second[:, None] != second
        forecast = self.alone(other)
        return replace(forecast, errors=np.where(other[:, :, None], np.inf, forecast.errors))

    def within(self, uncovered):
        """The same where steps that the table does not cover, a mask (steps,), are neither predicted nor predict."""
        forecast = self.alone(np.broadcast_to(uncovered, (self.steps, self.steps)))
        beyond = uncovered[:, None, None] | uncovered[None, :, None]
        return replace(forecast, errors=np.where(beyond, np.inf, forecast.errors))

    def alone(self, apart):
        """The same where the newest anchor j is the only one if k, the one before it, is `apart` from it [j, k]."""
        same = np.arange(self.steps)
        errors = np.where(apart, self.errors[:, same, same][:, :, None], self.errors)
        if self.weights is None:
            return Forecast(errors)
        return Forecast(errors, np.where(apart[..., None], self.weights[:, :, same, same][:, :, :, None], self.weights))

    def anchors_of(self, reuse):
        """(i, j, k) of every step but the first, where `reuse` (steps,) says which steps do not compute."""
        computed, steps = np.flatnonzero(~reuse), np.arange(1, len(reuse))
        newest = np.searchsorted(computed, steps) - 1
        return steps, computed[newest], computed[np.maximum(newest - 1, 0)]

    def error_of(self, reuse):
        """Expected relative error (steps,) of predicting each step; that of a computed step is what it saved."""
        error = np.sqrt(self.errors[self.anchors_of(reuse)])
        return np.append(0.0, np.where(np.isfinite(error), error, 0))

    def weights_of(self, reuse):
        """(branches, steps, 2), or None"""
        if self.weights is None:
            return None
        weights = np.zeros((len(self.weights), len(reuse), 2))
        i, j, k = self.anchors_of(reuse)
        weights[:, 1:] = self.weights[:, i, j, k]
        return weights


def pair_errors(gram, predictor="linear"):
    """Errors (steps, steps, steps) and weights (steps, steps, steps, 2) of one branch, as in `Forecast`.

    gram: (steps, steps). Where there is one anchor it is taken as it is.
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


def plan_steps(forecast, max_error, magcache_K=None, kept=1):
    """The schedule with the fewest computed steps that keeps every reused one's expected relative error within
    max_error; of several the one whose errors, each to the fourth power, add up to the least.

    magcache_K: most reuses in a row (None: any); kept: how many steps, from the first on, compute. Exact: dynamic
    programming over (anchor, the one before). Returns a Schedule with each step's expected relative error; with the
    linear predictor it has `weights`.
    """
    steps = forecast.steps
    i, j, _ = np.indices((steps,) * 3)
    possible = np.isfinite(forecast.errors) & (i >= kept) & (i - j <= (steps if magcache_K is None else magcache_K))
    possible &= forecast.errors <= max_error**2

    until = sum_until(np.where(possible, forecast.errors, 0) ** POWER)
    until[sum_until((i > j) & ~possible) > 0] = np.inf
    return scheduled(cheapest_path(until), forecast, kept)


def cheapest_path(until):
    """As few anchors as can be, the first of them step 0, whose costs add up to the least.

    until: (steps + 1, steps, steps), the cost at [m, j, k] of reusing the steps j+1 .. m-1 from the anchors j and k.
    """
    steps = until.shape[1]
    # through[j, k]: least cost so far with newest anchor j and the one before it k; k = j while there is only one.
    through, choices = np.full((steps, steps), np.inf), []
    through[0, 0] = 0
    while len(choices) + 1 < steps and not np.isfinite(through + until[steps]).any():
        following, choice = np.full((steps, steps), np.inf), np.zeros((steps, steps), dtype=int)
        for m in range(1, steps):
            # Newest anchor m, before it j; the best anchor before that one is choice[m, j].
            costs = through[:m] + until[m, :m]
            choice[m, :m] = costs.argmin(axis=1)
            following[m, :m] = costs.min(axis=1)
        through = following
        choices.append(choice)
    ends = through + until[steps]
    newest, before = np.unravel_index(ends.argmin(), ends.shape)
    anchors = [int(newest)]
    for choice in reversed(choices):
        anchors.append(int(before))
        newest, before = before, choice[newest, before]
    return sorted(set(anchors))


def sum_until(values):
    """(steps + 1, steps, steps): the sum of values[j+1 .. m-1, j, k] at [m, j, k]."""
    steps = len(values)
    total = np.concatenate([np.zeros((1, steps, steps)), np.cumsum(values, axis=0)])
    return total - total[np.arange(1, steps + 1), np.arange(steps)][None]


def scheduled(anchors, forecast, kept=1):
    """The Schedule that computes at `anchors` (which begin with 0)."""
    reuse = np.ones(forecast.steps, dtype=bool)
    reuse[anchors] = False
    why_none = "" if reuse.any() else "every step was asked to compute"
    return Schedule(
        reuse,
        np.arange(forecast.steps) < kept,
        expected_error=forecast.error_of(reuse),
        why_none=why_none,
        fewest_computed=len(anchors),
        weights=forecast.weights_of(reuse),
    )


def along(grams, reuse, predictor="linear", switch_step=None, uncovered=False, levels=None):
    """(expected relative error (steps,), weights (branches, steps, 2) or None) of each step of one schedule, as
    `Forecast.error_of` and `weights_of`, without weighing every other. grams: (branches, steps, steps); uncovered: mask
    (steps,) of what neither is predicted nor predicts; levels: of the predictor line, which follows it to its end."""
    computed, i = np.flatnonzero(~reuse), np.arange(1, len(reuse))
    newest = np.searchsorted(computed, i) - 1
    j, k = computed[newest], computed[np.maximum(newest - 1, 0)]
    second = np.arange(len(reuse)) >= (len(reuse) if switch_step is None else switch_step)
    uncovered = uncovered | np.zeros(len(reuse), dtype=bool)
    lone = (j == k) | (second[j] != second[k]) | uncovered[j] | uncovered[k]
    errors, weights = [], np.zeros((len(grams), len(reuse), 2))
    for gram, row in zip(grams, weights):
        anchors = np.stack([np.stack([gram[j, j], gram[j, k]], -1), np.stack([gram[k, j], gram[k, k]], -1)], -2)
        products = np.stack([gram[i, j], gram[i, k]], -1)[..., None]
        if predictor == "line":
            lone |= k == 0  # made of noise alone, it lies off the line
            share = line_share(np.asarray(levels, dtype=float), i, j, np.where(lone, i, k))
            found = np.stack([1 + share, -share], -1)
        else:
            found = PREDICTORS[predictor](anchors + RIDGE * np.diag(gram).mean() * np.eye(2), products)[..., 0]
        found[lone] = [1.0, 0.0]
        missed = gram[i, i] - 2 * (found * products[..., 0]).sum(-1) + np.einsum("ia,iab,ib->i", found, anchors, found)
        errors.append(np.maximum(missed, 0) / gram[i, i])
        row[1:] = found
    error = np.sqrt(np.mean(errors, axis=0))
    error[(second[i] != second[j]) | uncovered[i] | uncovered[j]] = 0.0
    return np.append(0.0, error), None if predictor in ("reuse", "line") else weights


def gram_of_outputs(table: RatioTable, levels: np.ndarray) -> np.ndarray | None:
    """The Gram matrix (steps, steps) of the outputs at the levels of a run, nan where the table covers none. None: the
    table has none, or one for each branch of guidance."""
    if len(table.mag_ratios) > 1 or not table.statistics.get(GRAMS["output"]):
        return None
    uncovered = ~table.covered(levels)
    return np.where(uncovered | uncovered[:, None], np.nan, table_grams(table, levels, "output")[0])


def error_by_gram(schedule, levels, table):
    """Expected relative error of every step that a schedule of the paper's rule reuses."""
    error, _ = along(table_grams(table, levels, "residual"), schedule.reuse, "reuse", table.switch_step(levels))
    return error[schedule.reuse]
