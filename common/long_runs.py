"""Plans of runs of very many steps from a calibration.

`gram.Forecast` weighs every step against every pair of computed ones: too much where there are hundreds. Here the
computed steps are spread evenly, and only what that one schedule predicts is worked out. numpy only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .gram import PREDICTORS, RIDGE, table_grams
from .planner import Target, fewest_computed, reused_share, spread_steps
from .schedule import Schedule

if TYPE_CHECKING:
    from .tables import RatioTable


def plan_long_run(target: Target, table: RatioTable, levels: np.ndarray, switch_step: int | None = None) -> Schedule:
    """As `Target.plan`. With magcache_max_error, the fewest evenly spread steps that keep it."""
    steps, kept = len(levels), target.kept(len(levels))
    grams = table_grams(table, levels, target.payload)

    def planned(computed: int) -> Schedule:
        reuse = np.ones(steps, dtype=bool)
        reuse[spread_steps(levels, computed, target.magcache_K, kept, switch_step)] = False
        error, weights = along(grams, reuse, target.predictor or "linear", switch_step)
        why_none = "" if reuse.any() else "every step was asked to compute"
        return Schedule(
            reuse,
            np.arange(steps) < kept,
            expected_error=error,
            why_none=why_none,
            fewest_computed=computed,
            weights=weights,
        )

    computed = target.computed_of(steps, reused_share(table, target.payload), switch_step)
    if computed is None:
        computed, least = steps, fewest_computed(steps, target.magcache_K, kept, switch_step)
        while least < computed:
            middle = (least + computed) // 2
            one = planned(middle)
            assert one.expected_error is not None
            if one.expected_error[one.reuse].max(initial=0) <= target.magcache_max_error:
                computed = middle
            else:
                least = middle + 1
    return replace(planned(computed), settings=target, ratios=table.at(levels))


def error_by_gram(schedule: Schedule, levels: np.ndarray, table: RatioTable) -> np.ndarray:
    """Expected relative error of every step that a schedule of the paper's rule reuses."""
    error, _ = along(table_grams(table, levels, "residual"), schedule.reuse, "reuse", table.switch_step(levels))
    return error[schedule.reuse]


def along(
    grams: np.ndarray, reuse: np.ndarray, predictor: str = "linear", switch_step: int | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """(expected relative error (steps,), weights (branches, steps, 2) or None) of each step of one schedule, as
    `Forecast.error_of` and `weights_of`. grams: (branches, steps, steps)."""
    computed, i = np.flatnonzero(~reuse), np.arange(1, len(reuse))
    newest = np.searchsorted(computed, i) - 1
    j, k = computed[newest], computed[np.maximum(newest - 1, 0)]
    second = np.arange(len(reuse)) >= (len(reuse) if switch_step is None else switch_step)
    lone = (j == k) | (second[j] != second[k])
    errors, weights = [], np.zeros((len(grams), len(reuse), 2))
    for gram, row in zip(grams, weights):
        anchors = np.stack([np.stack([gram[j, j], gram[j, k]], -1), np.stack([gram[k, j], gram[k, k]], -1)], -2)
        products = np.stack([gram[i, j], gram[i, k]], -1)[..., None]
        found = PREDICTORS[predictor](anchors + RIDGE * np.diag(gram).mean() * np.eye(2), products)[..., 0]
        found[lone] = [1.0, 0.0]
        missed = gram[i, i] - 2 * (found * products[..., 0]).sum(-1) + np.einsum("ia,iab,ib->i", found, anchors, found)
        errors.append(np.maximum(missed, 0) / gram[i, i])
        row[1:] = found
    error = np.sqrt(np.mean(errors, axis=0))
    return np.append(0.0, np.where(second[i] != second[j], 0.0, error)), None if predictor == "reuse" else weights
