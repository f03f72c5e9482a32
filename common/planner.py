"""Schedules for a number of computed steps, a speed-up or an error: without a calibration, or from one.

Without one the computed steps are spread over the run (`spread_steps`), and a skipped output is predicted along the
line through the two newest (`trajectory.Trajectory`). With one, `gram` tells what every prediction would miss. numpy
only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from .errors import MagCacheError
from .gram import PREDICTORS, Forecast, has_gram, plan_steps, unpredicted
from .schedule import Rule, Schedule, Settings, compute_all, magcache_schedule

if TYPE_CHECKING:
    from .tables import RatioTable

INDEX_SHARE = 0.5  # of the step's index in the measure that computed steps are spread in; the rest: noise level
EARLY = 0.6  # its power: below 1, more of them lie at the beginning, where guidance decides what is drawn
EXACT_STEPS = 100  # of longer runs not every schedule is weighed (`long_runs`): time and memory grow with their cube


@dataclass(frozen=True)
class Target:
    """What to plan for, one of: exactly `magcache_steps` computed steps; the number of them that comes nearest to
    `magcache_speedup`, by the calibration's step times where it has some, else by the bound steps / computed; the
    fewest with no expected relative error above `magcache_max_error`.

    predictor: "line" needs no calibration and no facts of the model: computed steps spread evenly, outputs predicted
        along the line through the two newest. "linear" and "reuse" plan from a calibration and weigh the two newest or
        take the newest as it is. None: line, or linear where magcache_max_error, magcache_guard or the payload
        residual are asked for.
    payload: what is kept and predicted, the block stack's "residual" or the model's "output" (None: what line takes,
        the output, else the residual).
    magcache_K: most reuses in a row (None: any; 0: every step computes); retention_ratio: share of the steps, from the
    first on, that compute (None: the first).
    magcache_guard: stop skipping where a computed step is predicted this many times worse than in the calibration.
    """

    magcache_steps: int | None = None
    magcache_speedup: float | None = None
    predictor: str | None = None
    magcache_K: int | None = None
    retention_ratio: float | None = None
    magcache_max_error: float | None = None
    payload: str | None = None
    magcache_guard: float | None = None

    def __post_init__(self):
        asked = [self.magcache_steps, self.magcache_speedup, self.magcache_max_error]
        if sum(value is not None for value in asked) != 1:
            raise MagCacheError(
                "Ask for one of magcache_steps, magcache_speedup and magcache_max_error."
                if not any(value is not None for value in asked)
                else "Ask for only one of magcache_steps, magcache_speedup and magcache_max_error."
            )
        if self.magcache_steps is not None and self.magcache_steps < 1:
            raise MagCacheError(f"magcache_steps must be at least 1, not {self.magcache_steps}.")
        if self.magcache_speedup is not None and not 1 <= self.magcache_speedup < np.inf:
            raise MagCacheError(f"magcache_speedup must be a number of 1 or more, not {self.magcache_speedup}.")
        if self.magcache_max_error is not None and not self.magcache_max_error >= 0:
            raise MagCacheError(f"magcache_max_error must be 0 (off) or more, not {self.magcache_max_error}.")
        if self.magcache_K is not None and self.magcache_K < 0:
            raise MagCacheError(f"magcache_K must be 0 (off) or more, not {self.magcache_K}.")
        if self.retention_ratio is not None and not 0 <= self.retention_ratio <= 1:
            raise MagCacheError(
                f"retention_ratio is a share of the steps, between 0 and 1, not {self.retention_ratio}."
            )
        if self.magcache_guard is not None and not self.magcache_guard >= 1:
            raise MagCacheError(
                f"magcache_guard must be 1 or more times the calibrated error, not {self.magcache_guard}."
            )

        if self.predictor not in (None, "line", *PREDICTORS):
            known = ", ".join(["line", *PREDICTORS])
            raise MagCacheError(f"There is no predictor {self.predictor}; there are {known}.")
        measured = self.magcache_max_error is not None or self.magcache_guard is not None
        predictor = self.predictor or ("linear" if measured or self.payload == "residual" else "line")
        object.__setattr__(self, "predictor", predictor)
        object.__setattr__(self, "payload", self.payload or ("output" if predictor == "line" else "residual"))
        if predictor == "line" and (measured or self.payload != "output"):
            raise MagCacheError(
                "The predictor line needs no calibration and predicts the model's output: for magcache_max_error, "
                "magcache_guard or the payload residual ask for the predictor linear."
            )

    def plan(
        self,
        table: RatioTable | None,
        levels: np.ndarray,
        switch_step: int | None = None,
        rule: object = None,
        interpolation: str = "sigma",
    ) -> Schedule:
        """The Schedule of a run at these noise levels; a second expert takes over at `switch_step` (None: one model).
        table: None will do for the predictor line. rule: of `Settings.plan`, and no part of this plan.
        Raises MagCacheError if the table lacks what the target needs."""
        ratios = None if table is None else table.at(levels, interpolation)
        if self.predictor == "line":
            return replace(self.spread(levels, switch_step), settings=self, ratios=ratios)
        if table is None or not has_gram(table):
            has = "There is no calibration" if table is None else f"{table.name} has magnitude ratios only"
            raise MagCacheError(
                f"{has}; the predictors linear and reuse, magcache_max_error and the guard need the Gram matrix that a "
                "calibration measures."
            )
        if len(levels) > EXACT_STEPS:
            from .long_runs import plan_long_run  # which is made of what is here

            return plan_long_run(self, table, levels, switch_step)
        forecast = Forecast.of_table(table, levels, self.predictor, self.payload, switch_step)
        share, beyond = reused_share(table, self.payload), unpredicted(table, levels)
        return replace(self.place(forecast, share, switch_step, beyond), settings=self, ratios=ratios)

    def spread(self, levels: np.ndarray, switch_step: int | None = None) -> Schedule:
        """The Schedule whose computed steps, the first and the last among them, are spread evenly."""
        steps, few = len(levels), Rule().min_steps
        if steps < few:
            return compute_all(steps, f"a run of {steps} steps has nothing to gain (MagCache starts at {few})")
        kept, computed = self.kept(steps), self.computed_of(steps, 0.0, switch_step) or steps
        reuse = np.ones(steps, dtype=bool)
        reuse[spread_steps(levels, computed, self.magcache_K, kept, switch_step)] = False
        return Schedule(
            reuse,
            np.arange(steps) < kept,
            why_none="" if reuse.any() else "every step was asked to compute",
            fewest_computed=computed,
        )

    @property
    def needs_gram(self) -> bool:
        """Whether it takes the Gram matrix of a calibration; published ratios have none."""
        return self.predictor != "line"

    def of(self, payload: str) -> Target:
        """The same for another payload."""
        return replace(self, payload=payload)

    def kept(self, steps: int) -> int:
        """How many steps, from the first on, compute in any case."""
        return max(1, int(steps * (self.retention_ratio or 0)))

    def place(self, forecast, share=0.0, switch_step=None, beyond=None):
        """The Schedule that these errors ask for; share: cost of a reused step, in computed ones; beyond: of
        `fewest_computed`."""
        computed = self.computed_of(forecast.steps, share, switch_step, beyond)
        return plan_steps(forecast, computed, self.magcache_K, self.kept(forecast.steps), self.magcache_max_error)

    def computed_of(
        self, steps: int, share: float = 0.0, switch_step: int | None = None, beyond: np.ndarray | None = None
    ) -> int | None:
        """How many of these steps compute; None: as the errors ask. share: cost of a reused step, in computed ones;
        beyond: of `fewest_computed`."""
        least = fewest_computed(steps, self.magcache_K, self.kept(steps), switch_step, beyond)
        if self.predictor == "line":
            least = min(steps, max(2, least))  # the first and the last
        if self.magcache_speedup is not None:
            counts = np.arange(least, steps + 1)
            return int(counts[np.abs(speedup(steps, counts, share) - self.magcache_speedup).argmin()])
        if self.magcache_steps is None:
            return None
        computed = steps if self.magcache_K == 0 else min(self.magcache_steps, steps)
        if computed < least:
            raise MagCacheError(f"Of {steps} steps, between {least} and {steps} can be computed, not {computed}.")
        return computed


def spread_steps(
    levels: np.ndarray,
    computed: int,
    magcache_K: int | None = None,
    kept: int = 1,
    switch_step: int | None = None,
) -> list[int]:
    """Indices of `computed` steps, spread evenly in `places`. The first and the last compute, since only what lies
    between two is corrected; so do the first and the last of each expert where there are enough. magcache_K: most
    between two; kept: how many compute from the first on."""
    place, steps = places(levels), len(levels)
    if switch_step is None or not 0 < switch_step < steps:
        return spread_evenly(place, computed, magcache_K, kept)
    # Each expert's share, and no less than its own cap needs.
    least = fewest_computed(switch_step, magcache_K, min(kept, switch_step))
    most = computed - fewest_computed(steps - switch_step, magcache_K)
    first = int(np.clip(round(computed * place[switch_step]), least, min(most, switch_step)))
    first = max(first, computed - (steps - switch_step))
    late = spread_evenly(place[switch_step:], computed - first, magcache_K)
    return spread_evenly(place[:switch_step], first, magcache_K, kept) + [switch_step + step for step in late]


def places(levels: np.ndarray) -> np.ndarray:
    """Where each step lies in a run, from 0 to 1: INDEX_SHARE of its index and the rest of how far the noise level has
    fallen, to the power EARLY."""
    levels = np.asarray(levels, dtype=float)
    fallen = (levels[0] - levels) / max(levels[0] - levels[-1], 1e-9)
    return (INDEX_SHARE * np.linspace(0, 1, len(levels)) + (1 - INDEX_SHARE) * fallen) ** EARLY


def spread_evenly(place: np.ndarray, computed: int, magcache_K: int | None = None, kept: int = 1) -> list[int]:
    """Indices of `computed` of these places, the first `kept` and the last among them, the rest as evenly as can be."""
    steps = len(place)
    apart = steps if magcache_K is None else magcache_K + 1
    chosen = list(range(min(kept, computed)))
    last = min(steps - 1, chosen[-1] + (computed - len(chosen)) * apart)
    wanted = np.linspace(place[chosen[-1]], place[-1], computed - len(chosen) + 1)[1:]
    for left, where in zip(range(len(wanted) - 1, -1, -1), wanted):
        possible = np.arange(max(chosen[-1] + 1, last - left * apart), min(steps - 1 - left, chosen[-1] + apart) + 1)
        chosen.append(int(possible[np.abs(place[possible] - where).argmin()]))
    return chosen


def fewest_computed(steps, magcache_K=None, kept=1, switch_step=None, beyond=None):
    """How many steps compute at least: the first `kept`, the first of each expert, those of the mask `beyond`
    (`unpredicted`), and one after every magcache_K reuses."""
    reuse, run = np.zeros(steps, dtype=bool), 0
    possible = np.ones(steps, dtype=bool) if beyond is None else ~beyond
    for step in range(steps):
        allowed = step >= kept and step != switch_step and possible[step]
        reuse[step] = allowed and (magcache_K is None or run < magcache_K)
        run = run + 1 if reuse[step] else 0
    return int(steps - reuse.sum())


def speedup(steps, computed, share):
    """Transformer time of computing every step over that with `computed` computed ones; share: `reused_share`."""
    return steps / (computed + share * (steps - computed))


def reused_share(table, payload="residual"):
    """Cost of a reused step in computed ones, as the calibration measured it; 0, which gives the bound, where it did
    not. With the payload "output" nothing of the model runs."""
    seconds = table.statistics.get("seconds")
    if not seconds or payload == "output":
        return 0.0
    try:
        return min(1.0, seconds["reused"] / seconds["computed"])
    except (TypeError, KeyError, ZeroDivisionError):
        raise MagCacheError(f"{table.name}: its step times cannot be read; calibrate again.") from None


def nearest_by_the_rule(table, levels, rule, computed, switch_step=None):
    """The paper's rule at the settings with which it computes as nearly as possible `computed` steps, and then errs
    least."""
    ratios, forecast, found = table.at(levels), Forecast.of_table(table, levels, "reuse", "residual", switch_step), {}
    beyond = unpredicted(table, levels)
    for K, retention, thresh in product(range(1, 7), (0.1, 0.2), np.geomspace(0.01, 2, 24)):
        schedule = magcache_schedule(ratios, Settings(round(float(thresh), 4), K, retention), rule, switch_step, beyond)
        found[schedule.strip] = replace(schedule, expected_error=forecast.error_of(schedule.reuse))
    return min(found.values(), key=lambda one: (abs(one.computed - computed), one.expected_error[one.reuse].sum()))
