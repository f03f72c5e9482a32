"""In which measure the computed steps of a checkpoint are best spread, by what comes out: a few prompts, each drawn
un-cached and once with each of a few measures. Models differ in it; no error of single steps tells which is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .errors import MagCacheError
from .schedule import Schedule
from .spread import MEASURE, REFINED
from .tables import RatioTable

MEASURES = (MEASURE, (0.5, 0.7), (0.5, 0.8), (0.75, 0.8), (0.75, 1.0))
MARGIN = 1.0  # dB by which another has to be better than the first: less may be the prompts'
EXACT = 99.0  # dB; what is taken for equal pictures


def closeness_of(draw: Callable[[tuple[float, float]], Sequence[float]]) -> dict[tuple[float, float], float]:
    """Mean PSNR of each of MEASURES. draw: draws all prompts with one, and returns the PSNR of each in dB."""
    return {measure: float(np.mean(np.minimum(draw(measure), EXACT))) for measure in MEASURES}


def best_measure(closeness: dict[tuple[float, float], float]) -> tuple[float, float]:
    """The closest, or the first where no other is better by MARGIN."""
    best = max(closeness, key=lambda measure: closeness[measure])
    return best if closeness[best] >= closeness[MEASURE] + MARGIN else MEASURE


def refined(
    table: RatioTable, closeness: dict[tuple[float, float], float], schedule: Schedule, prompts: int
) -> RatioTable:
    """The calibration with the measure that runs of its checkpoint take from now on. closeness: of `closeness_of`, in
    runs of this schedule's steps and computed steps; prompts: their number. Raises MagCacheError if nothing was skipped
    in them."""
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
