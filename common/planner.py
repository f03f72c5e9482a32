"""Schedules for a number of computed steps, a speed-up or an error: without a calibration, or from one.

The computed steps are spread over the run (`spread`), since whole schedules are not ranked by what single
predictions miss. Without a calibration a skipped output is predicted along the line through the two newest
(`trajectory.Trajectory`). With one, `gram` tells how skipped outputs are corrected or residuals weighed, and which
schedule keeps a bound on the error. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from .errors import MagCacheError
from .gram import (
    PREDICTORS,
    Forecast,
    along,
    gram_of_outputs,
    has_gram,
    plan_steps,
    table_grams,
    unpredicted,
)
from .schedule import Rule, Schedule, Settings, compute_all, magcache_schedule
from .spread import fewest_computed, refined_measure, spread_steps

if TYPE_CHECKING:
    from .tables import RatioTable

EXACT_STEPS = 100  # of longer runs not every schedule is weighed: time and memory grow with their cube


@dataclass(frozen=True)
class Target:
    """What to plan for, one of: exactly `magcache_steps` computed steps; the number of them that comes nearest to
    `magcache_speedup`, by the calibration's step times where it has some, else by the bound steps / computed; the
    fewest with no expected relative error above `magcache_max_error`.

    predictor: "line" needs no calibration and no facts of the model: computed steps spread evenly, outputs predicted
        along the line through the two newest, as far as that served in the run. "linear" is by a calibration: outputs
        are predicted as for line and corrected as the calibration tells, residuals are the two newest weighed.
        "reuse" takes the newest as it is. None: line, or linear where magcache_max_error, magcache_guard or the payload
        residual are asked for. `for_table` says where linear gives way.
    payload: what is kept and predicted, the block stack's "residual" or the model's "output" (None: the residual for
        reuse, magcache_max_error and magcache_guard, else the output).
    magcache_K: most reuses in a row (None: any; 0: every step computes); retention_ratio: share of the steps, from the
    first on, that compute (None: the first).
    magcache_guard: stop skipping where a computed step is predicted this many times worse than in the calibration.
    measure: in which computed steps are spread evenly (`spread`; None: the one that was found best for the table's
        checkpoint, else MEASURE).
    """

    magcache_steps: int | None = None
    magcache_speedup: float | None = None
    predictor: str | None = None
    magcache_K: int | None = None
    retention_ratio: float | None = None
    magcache_max_error: float | None = None
    payload: str | None = None
    magcache_guard: float | None = None
    measure: tuple[float, float] | None = None

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
        predictor = self.predictor or ("linear" if self.watched or self.payload == "residual" else "line")
        object.__setattr__(self, "predictor", predictor)
        of_output = predictor == "line" or (predictor == "linear" and not self.watched)
        object.__setattr__(self, "payload", self.payload or ("output" if of_output else "residual"))
        if predictor == "line" and (self.watched or self.payload != "output"):
            raise MagCacheError(
                "The predictor line needs no calibration and predicts the model's output: for magcache_max_error, "
                "magcache_guard or the payload residual ask for the predictor linear."
            )

    @property
    def watched(self) -> bool:
        """Whether the expected error of single predictions decides."""
        return self.magcache_max_error is not None or self.magcache_guard is not None

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
        target, ratios = self.for_table(table), None if table is None else table.at(levels, interpolation)
        target = replace(target, measure=target.measure or refined_measure(table))
        if target.predictor == "line":
            schedule = target.spread(levels, switch_step)
        elif table is None or not has_gram(table):
            has = "There is no calibration" if table is None else f"{table.name} has magnitude ratios only"
            raise MagCacheError(
                f"{has}; the predictors linear and reuse, magcache_max_error and the guard need the Gram matrix that a "
                "calibration measures."
            )
        else:
            bound = target.magcache_max_error
            schedule = (
                target.weighed(table, levels, switch_step)
                if bound is None
                else target.within(bound, table, levels, switch_step)
            )
            schedule = replace(schedule, gram=gram_of_outputs(table, levels))
        if target.predictor != self.predictor and table is not None:
            how = "outputs are predicted without them" if target.predictor == "line" else "the newest is taken as it is"
            why = f"{table.name} was calibrated with guidance, which multiplies what its weights miss: {how}"
            schedule = replace(schedule, why_changed=why)
        return replace(schedule, settings=target, ratios=ratios)

    def for_table(self, table: RatioTable | None) -> Target:
        """The same, or what is done in its place: the weights of the predictor linear were fitted to the branches of
        guidance, which multiplies what they miss. A table of more than one branch serves as none, and where an error is
        asked for the newest is taken as it is."""
        if self.predictor != "linear" or table is None or len(table.mag_ratios) < 2 or not has_gram(table):
            return self
        if self.watched:
            return replace(self, predictor="reuse")
        return replace(self, predictor="line", payload="output")

    def spread(self, levels: np.ndarray, switch_step: int | None = None) -> Schedule:
        """The Schedule whose computed steps, the first and the last among them, are spread evenly."""
        steps, few = len(levels), Rule().min_steps
        if steps < few:
            return compute_all(steps, f"a run of {steps} steps has nothing to gain (MagCache starts at {few})")
        kept, computed = self.kept(steps), self.computed_of(steps, 0.0, switch_step) or steps
        reuse = np.ones(steps, dtype=bool)
        reuse[spread_steps(levels, computed, self.magcache_K, kept, switch_step, measure=self.measure)] = False
        return Schedule(
            reuse,
            np.arange(steps) < kept,
            why_none="" if reuse.any() else "every step was asked to compute",
            fewest_computed=computed,
        )

    @property
    def needs_table(self) -> bool:
        """Whether a `RatioTable` is needed to plan."""
        return self.predictor != "line"

    @property
    def needs_gram(self) -> bool:
        """Whether that table must hold a Gram matrix, which only a calibration measures."""
        return self.predictor != "line"

    def weighed(
        self, table: RatioTable, levels: np.ndarray, switch_step: int | None = None, computed: int | None = None
    ) -> Schedule:
        """The Schedule whose computed steps (None: as many as are asked for) are spread evenly, with what the
        calibration has for the others: weights of two residuals, or what outputs on the line are expected to miss."""
        steps, kept, beyond = len(levels), self.kept(len(levels)), unpredicted(table, levels)
        grams = table_grams(table, levels, self.payload)
        if computed is None:
            computed = self.computed_of(steps, reused_share(table, self.payload), switch_step, beyond) or steps
        reuse = np.ones(steps, dtype=bool)
        reuse[spread_steps(levels, computed, self.magcache_K, kept, switch_step, beyond, self.measure)] = False
        line = self.predictor == "linear" and self.payload == "output" and not self.watched
        predictor = "line" if line else self.predictor or "linear"
        error, weights = along(grams, reuse, predictor, switch_step, ~table.covered(levels), levels)
        return Schedule(
            reuse,
            np.arange(steps) < kept,
            expected_error=error,
            why_none="" if reuse.any() else "every step was asked to compute",
            fewest_computed=computed,
            weights=weights,
        )

    def within(
        self, max_error: float, table: RatioTable, levels: np.ndarray, switch_step: int | None = None
    ) -> Schedule:
        """The Schedule with the fewest computed steps, in long runs the fewest evenly spread ones, for which no skipped
        one's expected relative error exceeds max_error."""
        steps, kept = len(levels), self.kept(len(levels))
        if steps <= EXACT_STEPS:
            forecast = Forecast.of_table(table, levels, self.predictor, self.payload, switch_step)
            return plan_steps(forecast, max_error, self.magcache_K, kept)
        computed = steps
        least = fewest_computed(steps, self.magcache_K, kept, switch_step, unpredicted(table, levels))
        while least < computed:
            middle = (least + computed) // 2
            one = self.weighed(table, levels, switch_step, middle)
            if np.asarray(one.expected_error)[one.reuse].max(initial=0) <= max_error:
                computed = middle
            else:
                least = middle + 1
        return self.weighed(table, levels, switch_step, computed)

    def with_payload(self, payload: str) -> Target:
        """The same for another payload."""
        return replace(self, payload=payload)

    def kept(self, steps: int) -> int:
        """How many steps, from the first on, compute in any case."""
        return max(1, int(steps * (self.retention_ratio or 0)))

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
