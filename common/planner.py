"""Schedules for a number of computed steps, a speed-up or an error: without a calibration, or from one. numpy only.

The computed steps are spread over the run (`spread`), because the errors of single predictions do not rank whole
schedules. Without a calibration a skipped output is predicted along the line through the two newest ones
(`trajectory.Trajectory`). A calibration tells how to correct skipped outputs or weigh residuals (`gram`), and which
schedule stays within an error (`shortest_path`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import MagCacheError
from .gram import (
    PREDICTORS,
    Forecast,
    errors_and_weights,
    gram_of_outputs,
    has_gram,
    table_grams,
    unpredicted,
)
from .schedule import Rule, Schedule, Settings, compute_all, magcache_schedule
from .shortest_path import plan_steps
from .spread import fewest_computed, planned_schedule, refined_measure, spread_steps

if TYPE_CHECKING:
    from .tables import RatioTable

EXACT_STEPS = 100  # in longer runs not every schedule is looked at: time and memory grow with the cube of the steps


@dataclass(frozen=True)
class Target:
    """What to plan for: exactly one of magcache_steps, magcache_speedup and magcache_max_error.

    magcache_steps: how many steps compute. magcache_speedup: as many as come nearest to it, by the step times that the
        calibration measured, otherwise by the bound steps / computed. magcache_max_error: as few as possible with no
        expected relative error above it.
    predictor: "line" needs neither a calibration nor facts of the model: outputs are predicted along the line through
        the two newest, as far as that line predicted the computed steps of the run. "linear" needs a calibration:
        outputs are predicted as by line and corrected as the calibration tells; of residuals, the two newest are
        weighed. "reuse" takes the newest unchanged. "": linear where magcache_max_error, magcache_guard or the payload
        residual is asked for, otherwise line. `for_table` says where linear gives way to another.
    payload: what is kept and predicted, the block stack's "residual" or the model's "output" ("": the residual for
        reuse, magcache_max_error and magcache_guard, otherwise the output).
    magcache_K: most reuses in a row (None: any number; 0: every step computes).
    retention_ratio: share of the steps, from the first on, that compute (None: only the first).
    magcache_guard: stop skipping once a computed step is predicted this many times worse than in the calibration.
    measure: in which the computed steps are spread (`spread`; None: the one found best for the table's checkpoint, or
        MEASURE).
    """

    magcache_steps: int | None = None
    magcache_speedup: float | None = None
    predictor: str = ""
    magcache_K: int | None = None
    retention_ratio: float | None = None
    magcache_max_error: float | None = None
    payload: str = ""
    magcache_guard: float | None = None
    measure: tuple[float, float] | None = None

    def __post_init__(self) -> None:
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

        if self.predictor and self.predictor not in ("line", *PREDICTORS):
            known = ", ".join(["line", *PREDICTORS])
            raise MagCacheError(f"There is no predictor {self.predictor}; there are {known}.")
        predictor = self.predictor or ("linear" if self.bounds_error or self.payload == "residual" else "line")
        object.__setattr__(self, "predictor", predictor)
        of_output = predictor == "line" or (predictor == "linear" and not self.bounds_error)
        object.__setattr__(self, "payload", self.payload or ("output" if of_output else "residual"))
        if predictor == "line" and (self.bounds_error or self.payload != "output"):
            raise MagCacheError(
                "The predictor line needs no calibration and predicts the model's output: for magcache_max_error, "
                "magcache_guard or the payload residual ask for the predictor linear."
            )

    @property
    def bounds_error(self) -> bool:
        """Whether the error of single predictions is bounded, in the plan or by the guard."""
        return self.magcache_max_error is not None or self.magcache_guard is not None

    def plan(
        self,
        table: RatioTable | None,
        levels: np.ndarray,
        switch_step: int | None = None,
        rule: Rule | None = None,
        interpolation: str = "sigma",
    ) -> Schedule:
        """The Schedule of a run at these noise levels; a second expert takes over at `switch_step` (None: one model).

        table: may be None for the predictor line; rule: not used, it is there because `Settings.plan` has it. Raises
        MagCacheError if the table lacks what this target needs.
        """
        target, ratios = self.for_table(table), None if table is None else table.at(levels, interpolation)
        target = replace(target, measure=target.measure or refined_measure(table))
        if target.predictor == "line":
            schedule = target.plan_without_table(levels, switch_step)
        elif table is None or not has_gram(table):
            has = "There is no calibration" if table is None else f"{table.name} has magnitude ratios only"
            raise MagCacheError(
                f"{has}; the predictors linear and reuse, magcache_max_error and the guard need the Gram matrix that a "
                "calibration measures."
            )
        else:
            bound = target.magcache_max_error
            schedule = (
                target.plan_from_table(table, levels, switch_step)
                if bound is None
                else target.plan_within_error(bound, table, levels, switch_step)
            )
            schedule = replace(schedule, gram=gram_of_outputs(table, levels))
        if target.predictor != self.predictor and table is not None:
            how = "outputs are predicted without them" if target.predictor == "line" else "the newest is reused"
            why = f"{table.name} was calibrated with guidance, which amplifies the errors of its weights: {how}"
            schedule = replace(schedule, why_changed=why)
        return replace(schedule, settings=target, ratios=ratios)

    def for_table(self, table: RatioTable | None) -> Target:
        """This target, or what replaces it for a calibration with guidance: the weights of the predictor linear are
        fitted to single branches, and guidance multiplies what they miss. Where an error is bounded the newest is then
        taken as it is; otherwise the run is planned as without a table."""
        if self.predictor != "linear" or table is None or len(table.mag_ratios) < 2 or not has_gram(table):
            return self
        if self.bounds_error:
            return replace(self, predictor="reuse")
        return replace(self, predictor="line", payload="output")

    def plan_without_table(self, levels: np.ndarray, switch_step: int | None = None) -> Schedule:
        """The Schedule for the predictor line: its computed steps are spread evenly."""
        steps, few = len(levels), Rule().min_steps
        if steps < few:
            return compute_all(steps, f"a run of {steps} steps has nothing to gain (MagCache starts at {few})")
        retained, computed = self.retained_steps(steps), self.computed_steps(steps, 0.0, switch_step) or steps
        reuse = np.ones(steps, dtype=bool)
        reuse[spread_steps(levels, computed, self.magcache_K, retained, switch_step, measure=self.measure)] = False
        return planned_schedule(reuse, computed, retained)

    @property
    def needs_table(self) -> bool:
        """Whether a `RatioTable` is needed to plan."""
        return self.predictor != "line"

    @property
    def needs_gram(self) -> bool:
        """Whether that table must hold a Gram matrix, which only a calibration measures."""
        return self.predictor != "line"

    def plan_from_table(
        self, table: RatioTable, levels: np.ndarray, switch_step: int | None = None, computed: int | None = None
    ) -> Schedule:
        """The Schedule whose computed steps are spread evenly, with the weights and errors of the others from a
        calibration. computed: how many steps compute (None: as many as are asked for)."""
        steps, must_compute = len(levels), unpredicted(table, levels)
        retained, grams = self.retained_steps(steps), table_grams(table, levels, self.payload)
        if computed is None:
            computed = self.computed_steps(steps, reused_share(table, self.payload), switch_step, must_compute) or steps
        reuse = np.ones(steps, dtype=bool)
        limits = self.magcache_K, retained, switch_step, must_compute, self.measure
        reuse[spread_steps(levels, computed, *limits)] = False
        line = self.predictor == "linear" and self.payload == "output" and not self.bounds_error
        predictor = "line" if line else self.predictor
        error, weights = errors_and_weights(grams, reuse, predictor, switch_step, ~table.covered(levels), levels)
        return planned_schedule(reuse, computed, retained, error, weights)

    def plan_within_error(
        self, max_error: float, table: RatioTable, levels: np.ndarray, switch_step: int | None = None
    ) -> Schedule:
        """The Schedule with the fewest computed steps for which no skipped step's expected relative error exceeds
        max_error. In runs of more than EXACT_STEPS steps, the fewest that are spread evenly."""
        steps, retained = len(levels), self.retained_steps(len(levels))
        if steps <= EXACT_STEPS:
            forecast = Forecast.of_table(table, levels, self.predictor, self.payload, switch_step)
            return plan_steps(forecast, max_error, self.magcache_K, retained)
        computed = steps
        least = fewest_computed(steps, self.magcache_K, retained, switch_step, unpredicted(table, levels))
        while least < computed:
            middle = (least + computed) // 2
            schedule = self.plan_from_table(table, levels, switch_step, middle)
            if np.asarray(schedule.expected_error)[schedule.reuse].max(initial=0) <= max_error:
                computed = middle
            else:
                least = middle + 1
        return self.plan_from_table(table, levels, switch_step, computed)

    def with_payload(self, payload: str) -> Target:
        """The same for another payload."""
        return replace(self, payload=payload)

    def retained_steps(self, steps: int) -> int:
        """How many of so many steps, from the first on, compute in any case."""
        return max(1, int(steps * (self.retention_ratio or 0)))

    def computed_steps(
        self, steps: int, share: float = 0.0, switch_step: int | None = None, must_compute: np.ndarray | None = None
    ) -> int | None:
        """How many of so many steps are asked to compute; None: the errors decide. share: `reused_share`; must_compute:
        as in `fewest_computed`. Raises MagCacheError for a number of steps that cannot be."""
        least = fewest_computed(steps, self.magcache_K, self.retained_steps(steps), switch_step, must_compute)
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


def speedup(steps: int, computed: Any, share: float) -> Any:
    """Transformer time of computing every step, over that of computing `computed` of them, a number or an array. share:
    `reused_share`."""
    return steps / (computed + share * (steps - computed))


def reused_share(table: RatioTable, payload: str = "residual") -> float:
    """Time of a reused step over that of a computed one, as the calibration measured it; 0 for the payload "output", of
    which nothing runs, and where nothing was measured."""
    seconds = table.statistics.get("seconds")
    if not seconds or payload == "output":
        return 0.0
    try:
        return min(1.0, seconds["reused"] / seconds["computed"])
    except (TypeError, KeyError, ZeroDivisionError):
        raise MagCacheError(f"{table.name}: its step times cannot be read; calibrate again.") from None


def nearest_by_the_rule(
    table: RatioTable, levels: np.ndarray, rule: Rule, computed: int, switch_step: int | None = None
) -> Schedule:
    """The Schedule of the paper's rule that computes as nearly as possible `computed` steps, among a grid of settings;
    of several, the one with the smallest expected errors."""
    ratios, forecast = table.at(levels), Forecast.of_table(table, levels, "reuse", "residual", switch_step)
    schedules, uncovered = {}, unpredicted(table, levels)
    for K, retention, thresh in product(range(1, 7), (0.1, 0.2), np.geomspace(0.01, 2, 24)):
        settings = Settings(round(float(thresh), 4), K, retention)
        schedule = magcache_schedule(ratios, settings, rule, switch_step, uncovered)
        schedules[schedule.strip] = schedule, forecast.error_of(schedule.reuse)

    def distance(found: tuple[Schedule, np.ndarray]) -> tuple[int, float]:
        schedule, error = found
        return abs(schedule.computed - computed), error[schedule.reuse].sum()

    schedule, error = min(schedules.values(), key=distance)
    return replace(schedule, expected_error=error)
