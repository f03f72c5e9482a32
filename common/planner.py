"""Schedules with exactly as many computed steps as asked for, from the Gram matrix of one calibration run.

G[i, j] = <r_i, r_j> for the block-stack residuals of a run. From it follows the exact squared error, on the calibration's
tokens, of predicting r_i by a*r_j + b*r_k, and the weights a, b that make it least. So the schedule whose errors, each to the
fourth power so that peaks count, add up to the least is a shortest path over pairs of neighbouring computed steps. numpy only.
"""
from dataclasses import dataclass, replace

import numpy as np

from .ratios import MagCacheError
from .schedule import Schedule

RIDGE = 1e-6  # of the mean residual energy: enough against noise, too little to blunt the prediction
POWER = 2  # of the squared errors that a schedule adds up: one large error costs more than two halves (docs/quality.md)
PREDICTORS = ("linear", "reuse")


@dataclass(frozen=True)
class Target:
    """What to plan for: exactly `magcache_steps` computed steps, or the number whose bound steps / computed is nearest to
    `magcache_speedup`.

    predictor: "linear" weighs the two newest residuals, "reuse" takes the newest as it is, as the paper does.
    magcache_K: most reuses in a row (None: any; 0: every step computes).
    """

    magcache_steps: int = None
    magcache_speedup: float = None
    predictor: str = "linear"
    magcache_K: int = None

    def __post_init__(self):
        if (self.magcache_steps is None) == (self.magcache_speedup is None):
            raise MagCacheError("Ask for magcache_steps or for magcache_speedup, and not for both.")
        if self.magcache_steps is not None and self.magcache_steps < 1:
            raise MagCacheError(f"magcache_steps must be at least 1, not {self.magcache_steps}.")
        if self.magcache_speedup is not None and not 1 <= self.magcache_speedup < np.inf:
            raise MagCacheError(f"magcache_speedup must be a number of 1 or more, not {self.magcache_speedup}.")
        if self.magcache_K is not None and self.magcache_K < 0:
            raise MagCacheError(f"magcache_K must be 0 (off) or more, not {self.magcache_K}.")

    def plan(self, table, levels, switch_step=None):
        """The Schedule of a run at these noise levels; a second expert takes over at `switch_step` (None: one model).
        Raises MagCacheError if the table has no Gram matrix."""
        steps = len(levels)
        computed = self.magcache_steps if self.magcache_speedup is None else max(1, round(steps / self.magcache_speedup))
        computed = steps if self.magcache_K == 0 else min(computed, steps)
        schedule = plan_steps(table_grams(table, levels), computed, self.predictor, self.magcache_K, switch_step)
        return replace(schedule, settings=self, ratios=table.at(levels))


def table_grams(table, levels):
    """The Gram matrices (branches, steps, steps) of a `MagRatios` at the noise levels of a run."""
    stored = table.statistics.get("gram")
    if not stored:
        raise MagCacheError(f"{table.name} has magnitude ratios only; planning needs the Gram matrix that --magcache_calibration "
                            "measures.")
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


def pair_errors(gram, predictor="linear"):
    """Errors and weights of predicting each residual from two earlier ones.

    gram: (steps, steps). Returns errors (steps, steps, steps) and weights (steps, steps, steps, 2), both indexed
    [i, j, k] for r_i predicted by weights @ (r_j, r_k) with k < j < i; k = j means r_j alone, as it is. Errors are squared
    norms; combinations that cannot be are infinite.
    """
    steps, energy = len(gram), np.diag(gram)
    ridge = RIDGE * energy.mean() * np.eye(2)
    errors, weights = np.full((steps,) * 3, np.inf), np.zeros((steps, steps, steps, 2))
    for j in range(steps):
        later = slice(j + 1, steps)
        errors[later, j, j] = np.maximum(energy[later] - 2 * gram[later, j] + energy[j], 0)
        weights[later, j, j, 0] = 1
        for k in range(j if predictor == "linear" else 0):
            anchors, products = gram[np.ix_((j, k), (j, k))], gram[later][:, (j, k)]
            best = np.linalg.solve(anchors + ridge, products.T).T
            missed = energy[later] - 2 * (best * products).sum(1) + np.einsum("ia,ab,ib->i", best, anchors, best)
            errors[later, j, k], weights[later, j, k] = np.maximum(missed, 0), best
    return errors, weights


def plan_steps(grams, computed, predictor="linear", magcache_K=None, switch_step=None):
    """The schedule with exactly `computed` computed steps and the least sum of prediction errors to the fourth power.

    grams: (branches, steps, steps), each scaled by its own mean energy, so that branches count alike. magcache_K: most
    reuses in a row (None: any). switch_step: where a second expert takes over, whom no residual of the first serves (None:
    one model). Exact: dynamic programming over (anchor before, anchor). Returns a Schedule whose `error` is each step's
    expected relative error; with the linear predictor it has `weights`.
    """
    grams = np.asarray(grams, dtype=float)
    steps = grams.shape[1]
    second = np.arange(steps) >= (steps if switch_step is None else switch_step)
    spans = [span for span in (int((~second).sum()), int(second.sum())) if span]
    least = sum(1 if magcache_K is None else -(-span // (magcache_K + 1)) for span in spans)
    if not least <= computed <= steps:
        raise MagCacheError(f"Of {steps} steps, between {least} and {steps} can be computed, not {computed}.")
    scaled = grams / np.einsum("bii->b", grams)[:, None, None] * steps
    by_branch = [pair_errors(gram, predictor) for gram in scaled]
    errors = np.mean([errors for errors, _ in by_branch], axis=0)
    alone = errors[:, np.arange(steps), np.arange(steps)]
    errors = np.where(second[:, None] == second, errors, alone[:, :, None])

    # until[m, j, k]: error of reusing the steps j+1 .. m-1 from the anchors j and k.
    finite = np.where(np.isfinite(errors), errors, 0) ** POWER
    total = np.concatenate([np.zeros((1, steps, steps)), np.cumsum(finite, axis=0)])
    until = total - total[np.arange(1, steps + 1), np.arange(steps)][None]
    until[1:][second[:, None] != second] = np.inf  # m - 1 would be reused from the other expert's j
    if magcache_K is not None:
        gap = np.arange(steps + 1)[:, None] - np.arange(steps)[None] - 1
        until[gap > magcache_K] = np.inf

    # cost[j, k]: least error so far with newest anchor j and the one before it k; k = j while there is only one.
    cost, choices = np.full((steps, steps), np.inf), []
    cost[0, 0] = 0
    for _ in range(computed - 1):
        following, choice = np.full((steps, steps), np.inf), np.zeros((steps, steps), dtype=int)
        for m in range(1, steps):
            # Newest anchor m, before it j; the best anchor before that one is choice[m, j].
            through = cost[:m] + (until[m, :m] if predictor == "linear" else np.diag(until[m])[:m, None])
            choice[m, :m] = through.argmin(axis=1)
            following[m, :m] = through.min(axis=1)
        cost = following
        choices.append(choice)
    ends = cost + (until[steps] if predictor == "linear" else np.diag(until[steps])[:, None])
    newest, before = np.unravel_index(ends.argmin(), ends.shape)
    anchors = [int(newest)]
    for choice in reversed(choices):
        anchors.append(int(before))
        newest, before = before, choice[newest, before]
    return scheduled(sorted(set(anchors)), second, by_branch, predictor)


def scheduled(anchors, second, by_branch, predictor):
    """The Schedule that computes at `anchors` (which begin with 0); second: mask (steps,) of the second expert's steps."""
    steps = len(second)
    reuse = np.ones(steps, dtype=bool)
    reuse[anchors] = False
    error, weights = np.zeros(steps), np.zeros((len(by_branch), steps, 2))
    for i in np.flatnonzero(reuse):
        past = [anchor for anchor in anchors if anchor < i and second[anchor] == second[i]]
        j, k = past[-1], past[-2] if predictor == "linear" and len(past) > 1 else past[-1]
        error[i] = np.sqrt(np.mean([errors[i, j, k] for errors, _ in by_branch]))
        weights[:, i] = [chosen[i, j, k] for _, chosen in by_branch]
    retained = np.zeros(steps, dtype=bool)
    retained[0] = True
    return Schedule(reuse, error, retained, None, "" if reuse.any() else "every step was asked to compute", None, len(anchors),
                    weights if predictor == "linear" else None)


def resample_gram(gram, sigmas, new_sigmas):
    """The Gram matrix of a run at other noise levels: residuals interpolated in sigma by cubics through four levels.

    G' = W G W^T, with the rows of W the Lagrange weights of the nearest calibrated levels; beyond the ends the outermost
    straight line goes on.
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
