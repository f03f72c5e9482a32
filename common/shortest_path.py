"""The schedule with the fewest computed steps within an error, as a shortest path. numpy only."""

from __future__ import annotations

import numpy as np

from .gram import Forecast
from .schedule import Schedule
from .spread import planned_schedule

POWER = 2  # to which a schedule's squared errors are added up: one large error costs more than two of half its size


def plan_steps(forecast: Forecast, max_error: float, magcache_K: int | None = None, retained: int = 1) -> Schedule:
    """The schedule with the fewest computed steps for which no reused step's expected relative error exceeds max_error;
    of several, the one whose errors, each to the fourth power, have the smallest sum.

    magcache_K: most reuses in a row (None: any); retained: how many steps, from the first on, compute. Exact: dynamic
    programming over (newest computed step, the one before it).
    """
    steps = forecast.steps
    i, j, _ = np.indices((steps,) * 3)
    possible = np.isfinite(forecast.errors) & (i >= retained) & (i - j <= (steps if magcache_K is None else magcache_K))
    possible &= forecast.errors <= max_error**2

    until = sum_until(np.where(possible, forecast.errors, 0) ** POWER)
    until[sum_until((i > j) & ~possible) > 0] = np.inf
    computed = cheapest_path(until)
    reuse = np.ones(steps, dtype=bool)
    reuse[computed] = False
    return planned_schedule(reuse, len(computed), retained, forecast.error_of(reuse), forecast.weights_of(reuse))


def cheapest_path(until: np.ndarray) -> list[int]:
    """As few anchors as possible, step 0 first, at the lowest total cost.

    until: (steps + 1, steps, steps); [m, j, k] is the cost of reusing the steps j+1 .. m-1 from the anchors j and k.
    """
    steps = until.shape[1]
    # through[j, k]: lowest cost so far where j is the newest anchor and k the one before it; k = j if there is one.
    through = np.full((steps, steps), np.inf)
    choices: list[np.ndarray] = []
    through[0, 0] = 0
    while len(choices) + 1 < steps and not np.isfinite(through + until[steps]).any():
        following, choice = np.full((steps, steps), np.inf), np.zeros((steps, steps), dtype=int)
        for m in range(1, steps):
            # choice[m, j]: the best anchor before j where m is the newest anchor and j the one before it.
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


def sum_until(values: np.ndarray) -> np.ndarray:
    """(steps + 1, steps, steps): the sum of values[j+1 .. m-1, j, k] at [m, j, k]."""
    steps = len(values)
    total = np.concatenate([np.zeros((1, steps, steps)), np.cumsum(values, axis=0)])
    return total - total[np.arange(1, steps + 1), np.arange(steps)][None]
