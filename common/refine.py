"""Find the measure (`spread`) in which the computed steps of a checkpoint are best spread, by comparing results.

A few prompts are drawn un-cached and once with each of a few measures. Models differ in which measure is best, and the
errors of single steps do not tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .errors import MagCacheError
from .schedule import Schedule
from .spread import MEASURE, REFINED
from .tables import RatioTable

MEASURES = (MEASURE, (0.5, 0.7), (0.5, 0.8), (0.75, 0.8), (0.75, 1.0))
MARGIN = 1.0  # dB by which another measure must be better than the first; less may be due to the prompts
EXACT = 99.0  # dB, for equal pictures


def closeness_of(draw: Callable[[tuple[float, float]], Sequence[float]]) -> dict[tuple[float, float], float]:
    """Mean PSNR of each of MEASURES. draw: draws all prompts with one measure and returns the PSNR of each, in dB."""
    return {measure: float(np.mean(np.minimum(draw(measure), EXACT))) for measure in MEASURES}


def best_measure(closeness: dict[tuple[float, float], float]) -> tuple[float, float]:
    """The closest measure, or MEASURE if no other is better by MARGIN. closeness: {measure: dB}."""
    best = max(closeness, key=lambda measure: closeness[measure])
    return best if closeness[best] >= closeness[MEASURE] + MARGIN else MEASURE


def refined(
    table: RatioTable, closeness: dict[tuple[float, float], float], schedule: Schedule, prompts: int
) -> RatioTable:
    """The calibration with the measure that runs of its checkpoint use from now on.

    closeness: {measure: dB}, of runs with this schedule's steps and computed steps; prompts: how many. Raises
    MagCacheError if nothing was skipped in them.
    """
    if not schedule.reuse.any():
        raise MagCacheError(f"There is nothing to refine: {schedule.why_none}.")
    found = {
        "measure": list(best_measure(closeness)),
        "steps": schedule.steps,
        "computed": schedule.computed,
        "prompts": prompts,
        "psnr": [[*measure, round(psnr, 2)] for measure, psnr in closeness.items()],
    }
    return replace(table, statistics={**table.statistics, REFINED: found})
