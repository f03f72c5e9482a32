"""The skip logic: which steps compute the block stack and which reuse its residual.

Paper, section 3.3: acc *= gamma_t; k += 1; err += |1 - acc|. A step is reused while err is within `magcache_thresh` and
k <= `magcache_K`; otherwise it computes, and acc = 1, k = 0, err = 0 again. The first `retention_ratio` of the steps
always compute. The rule looks only at ratios and settings, so the schedule is known before the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil, floor
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .errors import MagCacheError

if TYPE_CHECKING:
    from .planner import Target
    from .tables import RatioTable


@dataclass(frozen=True)
class Settings:
    """The paper's rule. magcache_thresh: bound on the accumulated error; magcache_K: most reuses in a row;
    retention_ratio: share of the steps, from the first on, that always compute.

    The class attributes are the values that a `planner.Target` chooses and the rule does not: callers treat both alike.
    """

    magcache_thresh: float
    magcache_K: int
    retention_ratio: float
    magcache_speedup: ClassVar[float | None] = None
    payload: ClassVar[str] = "residual"
    magcache_guard: ClassVar[float | None] = None
    predictor: ClassVar[str] = "reuse"
    needs_table: ClassVar[bool] = True
    needs_gram: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.magcache_thresh >= 0:
            raise MagCacheError(f"magcache_thresh must be 0 (off) or more, not {self.magcache_thresh}.")
        if self.magcache_K < 0:
            raise MagCacheError(f"magcache_K must be 0 (off) or more, not {self.magcache_K}.")
        if not 0 <= self.retention_ratio <= 1:
            raise MagCacheError(
                f"retention_ratio is a share of the steps, between 0 and 1, not {self.retention_ratio}."
            )

    def plan(
        self,
        table: RatioTable,
        levels: np.ndarray,
        switch_step: int | None = None,
        rule: Rule | None = None,
        interpolation: str = "sigma",
    ) -> Schedule:
        """The Schedule of a run at these noise levels; a second expert takes over at `switch_step` (None: one model).

        rule: None for the table's own; interpolation: "sigma" or "nearest" (`RatioTable.at`). Steps outside the noise
        levels that the table covers compute, because no ratio was measured there.
        """
        ratios, uncovered = table.at(levels, interpolation), ~table.covered(levels)
        uncovered[1:] |= uncovered[:-1]  # a ratio relates two levels
        return magcache_schedule(ratios, self, rule or rule_of(table), switch_step, uncovered)

    def with_payload(self, payload: str) -> Settings:
        """These settings: the rule looks at ratios only, whatever the payload."""
        return self

    def for_table(self, table: RatioTable | None) -> Settings:
        """These settings: the rule works with any table."""
        return self


OFF = Settings(magcache_thresh=0.0, magcache_K=0, retention_ratio=1.0)


@dataclass(frozen=True)
class Rule:
    """How a release interprets the settings; the defaults are the paper's.

    strict: the error must stay below the threshold; otherwise it may equal it.
    start: how x = retention_ratio * steps becomes the index of the first step that may be reused: "floor", "half_up",
        "ceil", or "calls", which rounds 2x model calls down and then up to a whole step (the release counts conditional
        and unconditional calls).
    never_reuse: [[step, of_steps], ...], steps that always compute, scaled to the run's number of steps.
    max_deviation: a step whose own |1 - gamma| is larger computes.
    experts: with two experts, "each" has its own retained steps; "last": nothing is reused before the second expert.
    retained_resets: a retained step resets the error; the Wan2.2 release carries it over to the second expert.
    min_steps: shorter runs compute every step, because there is too little to gain.
    """

    strict: bool = False
    start: str = "floor"
    never_reuse: tuple = ()
    max_deviation: float | None = None
    experts: str | None = None
    retained_resets: bool = True
    min_steps: int = 5


@dataclass(frozen=True)
class Schedule:
    """The plan of one run.

    reuse: mask of the reused steps; retained: mask of the steps that compute whatever the error.
    accumulated_error: the paper's err, on which the decision rests (None: planned otherwise).
    expected_error: expected relative error of predicting each step (None: not known).
    settings: what was planned for; why_none: why nothing is reused; why_changed: why it is not what was asked for.
    ratios: (branches, steps). fewest_computed: how many steps magcache_K and `retained` make compute at any threshold.
    weights: (branches, steps, 2), for the two newest residuals (None: the newest is taken as it is).
    gram: (steps, steps), of the outputs of a calibrated run, for the corrector (None: not known).
    """

    reuse: np.ndarray
    retained: np.ndarray
    accumulated_error: np.ndarray | None = None
    expected_error: np.ndarray | None = None
    settings: Settings | Target = OFF
    why_none: str = ""
    ratios: np.ndarray | None = field(default=None, repr=False)
    fewest_computed: int = 0
    weights: np.ndarray | None = field(default=None, repr=False)
    why_changed: str = ""
    gram: np.ndarray | None = field(default=None, repr=False)

    @property
    def steps(self) -> int:
        return len(self.reuse)

    @property
    def computed(self) -> int:
        return int(self.steps - self.reuse.sum())

    @property
    def predictor(self) -> str:
        """How a skipped step is predicted: "reuse", "linear" or "line" (`planner.Target`)."""
        return self.settings.predictor

    @property
    def follows_line(self) -> bool:
        """Whether a skipped output is predicted along the line through the two newest."""
        return self.predictor == "line" or (self.predictor == "linear" and self.weights is None)

    @property
    def skipped_steps(self) -> list[int]:
        return np.flatnonzero(self.reuse).tolist()

    @property
    def bound(self) -> float:
        """Upper limit of the speed-up, as if reused steps cost nothing."""
        return self.steps / self.computed

    @property
    def strip(self) -> str:
        """One character per step: # computes, . reuses."""
        return "".join(".#"[not reuse] for reuse in self.reuse)

    def anchors(self, step: int) -> list[int]:
        """The computed steps from which this one is predicted, newest first; at most `depth` of them."""
        return np.flatnonzero(~self.reuse[:step])[::-1][: self.depth].tolist()

    @property
    def depth(self) -> int:
        """How many residuals are kept for each branch."""
        return 1 if self.weights is None else self.weights.shape[-1]


def first_reusable(steps: int, retention_ratio: float, start: str = "floor") -> int:
    """Index of the first step that may be reused; at least 1, because one step has to leave a residual."""
    retained = steps * retention_ratio
    index = {
        "floor": int(retained),
        "half_up": floor(retained + 0.5),
        "ceil": ceil(retained),
        "calls": ceil(int(2 * steps * retention_ratio) / 2),
    }[start]
    return max(1, index)


def retained_steps(
    steps: int, retention_ratio: float, rule: Rule = Rule(), switch_step: int | None = None
) -> np.ndarray:
    """Mask (steps,) of the steps that compute whatever the error, each expert's first step among them. switch_step: the
    step at which a second expert takes over (None: one model)."""
    retained = np.zeros(steps, dtype=bool)
    if switch_step is None or not 0 < switch_step < steps:
        retained[: first_reusable(steps, retention_ratio, rule.start)] = True
    elif rule.experts == "last":
        retained[: switch_step + first_reusable(steps - switch_step, retention_ratio, rule.start)] = True
    else:
        retained[: first_reusable(switch_step, retention_ratio, rule.start)] = True
        # The release includes the end of the second window: forward number split + (N - split) * R still computes.
        retained[switch_step : switch_step + floor((steps - switch_step) * retention_ratio) + 1] = True
    for step, of_steps in rule.never_reuse:
        if steps > 1:
            retained |= np.round(np.arange(steps) * (of_steps - 1) / (steps - 1)).astype(int) == step
    return retained


def magcache_schedule(
    mag_ratios: np.ndarray,
    settings: Settings,
    rule: Rule = Rule(),
    switch_step: int | None = None,
    uncovered: np.ndarray | None = None,
) -> Schedule:
    """The Schedule of a run by the paper's rule.

    mag_ratios: (branches, steps) or (steps,), the ratio of each step to the one before; uncovered: mask (steps,) of
    steps without a measured ratio, which compute. All branches share one decision: a step is reused if each may be.
    """
    ratios = np.atleast_2d(np.asarray(mag_ratios, dtype=float))
    steps = ratios.shape[1]
    retained = retained_steps(steps, settings.retention_ratio, rule, switch_step)
    unmeasured = np.zeros(steps, dtype=bool) if uncovered is None else uncovered & ~retained
    retained = retained | unmeasured
    off = why_nothing_skips(steps, settings, rule)
    if off:
        return replace(compute_all(steps, off), settings=settings, ratios=ratios)
    reuse, error = decide(ratios, settings.magcache_thresh, settings.magcache_K, rule, retained)
    fewest_computed = steps - int(decide(ratios, np.inf, settings.magcache_K, rule, retained)[0].sum())
    why_none = "" if reuse.any() else why_no_reuse(error, retained, settings, rule)
    if retained.all() and unmeasured.any():
        why_none = "the table covers no step that could be reused"
    return Schedule(
        reuse, retained, error, settings=settings, why_none=why_none, ratios=ratios, fewest_computed=fewest_computed
    )


def decide(
    ratios: np.ndarray, magcache_thresh: float, magcache_K: int, rule: Rule, retained: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The rule itself: (mask of reused steps, accumulated error), both (steps,). ratios: (branches, steps); retained:
    mask (steps,)."""
    branches, steps = ratios.shape
    reuse, error = np.zeros(steps, dtype=bool), np.zeros(steps)
    accumulated, accumulated_error, k = np.ones(branches), np.zeros(branches), 0
    for step in range(1, steps):
        if retained[step] and not rule.retained_resets:
            continue
        accumulated = accumulated * ratios[:, step]
        accumulated_error = accumulated_error + np.abs(1 - accumulated)
        k += 1
        error[step] = accumulated_error.max()
        within = error[step] < magcache_thresh if rule.strict else error[step] <= magcache_thresh
        steady = rule.max_deviation is None or (np.abs(1 - ratios[:, step]) <= rule.max_deviation).all()
        if within and steady and k <= magcache_K and not retained[step]:
            reuse[step] = True
        else:
            accumulated, accumulated_error, k = np.ones(branches), np.zeros(branches), 0
    return reuse, error


def compute_all(steps: int, why: str = "MagCache is off") -> Schedule:
    """The schedule of an un-cached run."""
    computes = np.ones(steps, dtype=bool)
    return Schedule(~computes, computes, np.zeros(steps), why_none=why, fewest_computed=steps)


def why_nothing_skips(steps: int, settings: Settings | Target, rule: Rule) -> str:
    """Why this run reuses nothing whatever the ratios are, or ""."""
    for name in ("magcache_thresh", "magcache_max_error", "magcache_K"):
        if getattr(settings, name, None) == 0:
            return f"{name} is 0, which turns MagCache off"
    if steps < rule.min_steps:
        return f"a run of {steps} steps has nothing to gain (MagCache starts at {rule.min_steps})"
    return ""


def why_no_reuse(error: np.ndarray, retained: np.ndarray, settings: Settings, rule: Rule) -> str:
    """Why the rule, with these accumulated errors, reuses no step."""
    if retained.all():
        return "retention_ratio keeps every step"
    if error[~retained].min() < settings.magcache_thresh:
        return f"the ratio of every step is more than {rule.max_deviation} away from 1"
    return (
        f"the smallest error of reusing a step is {error[~retained].min():.3f}, above magcache_thresh "
        f"{settings.magcache_thresh}"
    )


def rule_of(table: RatioTable) -> Rule:
    """The Rule that a table's settings were published for. Raises MagCacheError if it cannot be read."""
    unknown = table.rule.keys() - Rule.__dataclass_fields__.keys()
    if unknown:
        raise MagCacheError(f"{table.name}: there is no rule named {', '.join(sorted(unknown))}.")
    try:
        rule = Rule(**table.rule)
        rule = replace(
            rule,
            never_reuse=tuple((int(step), int(steps)) for step, steps in rule.never_reuse),
            min_steps=int(rule.min_steps),
        )
        first_reusable(10, 0.5, rule.start)
    except (TypeError, ValueError, KeyError) as error:
        raise MagCacheError(f"{table.name}: its 'rule' cannot be read ({error!r}).") from None
    return rule
