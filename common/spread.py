"""Which steps compute: those spread evenly over the run in a measure of step index and noise level. numpy only.

A measure is a pair (share, power). A step's place in the run, from 0 to 1, is (share * its index + (1 - share) * how
far the noise level has fallen) ** power. With a power below 1 more of the computed steps lie at the beginning, where
guidance decides what is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import MagCacheError
from .schedule import Schedule

if TYPE_CHECKING:
    from .tables import RatioTable

MEASURE = (0.5, 0.6)
NEXT_TO_NOTHING = 0.25  # of the level before it: a last step below this noise level has next to nothing to do
REFINED = "refined"  # key in a calibration's statistics: the measure that came closest on a few prompts (`refine`)


def spread_steps(
    levels: np.ndarray,
    computed: int,
    magcache_K: int | None = None,
    retained: int = 1,
    switch_step: int | None = None,
    must_compute: np.ndarray | None = None,
    measure: tuple[float, float] | None = None,
) -> list[int]:
    """Indices of the computed steps, spread evenly in `places`.

    The first and the last step compute, because only what lies between two computed steps is corrected; so do the first
    and the last of each expert where `computed` allows. A last step that is NEXT_TO_NOTHING leaves its place to the one
    before it.

    computed: how many steps compute; magcache_K: most reuses in a row; retained: how many steps compute from the first
    on; must_compute: mask (steps,) of more that do, at the beginning and the end (`gram.unpredicted`); measure: None
    for MEASURE.
    """
    ends = must_compute is not None and must_compute[-1]
    if ends_in_nothing(levels, switch_step) and retained <= computed < len(levels) and not ends:
        levels, must_compute = levels[:-1], must_compute if must_compute is None else must_compute[:-1]
    place, steps = places(levels, measure or MEASURE), len(levels)
    forced = np.arange(steps) < retained
    if must_compute is not None:
        forced |= must_compute
    if switch_step is None or not 0 < switch_step < steps:
        return spread_evenly(place, computed, magcache_K, forced)
    # Each expert gets its share, and at least as many as magcache_K and its forced steps need.
    least, rest = (
        fewest_computed(len(part), magcache_K, 1, None, part) for part in (forced[:switch_step], forced[switch_step:])
    )
    first = int(np.clip(round(computed * place[switch_step]), least, min(computed - rest, switch_step)))
    first = max(first, computed - (steps - switch_step))
    late = spread_evenly(place[switch_step:], computed - first, magcache_K, forced[switch_step:])
    return spread_evenly(place[:switch_step], first, magcache_K, forced[:switch_step]) + [
        switch_step + step for step in late
    ]


def ends_in_nothing(levels: np.ndarray, switch_step: int | None = None) -> bool:
    """Whether the last step moves the latent next to nothing, as with diffusers' own noise levels for Euler, and is not
    its expert's only step."""
    return len(levels) > 2 and levels[-1] < NEXT_TO_NOTHING * levels[-2] and switch_step != len(levels) - 1


def places(levels: np.ndarray, measure: tuple[float, float]) -> np.ndarray:
    """Each step's place in the run, (steps,) in 0..1, by a measure as above."""
    (share, power), levels = measure, np.asarray(levels, dtype=float)
    fallen = (levels[0] - levels) / max(levels[0] - levels[-1], 1e-9)
    return (share * np.linspace(0, 1, len(levels)) + (1 - share) * fallen) ** power


def refined_measure(table: RatioTable | None) -> tuple[float, float] | None:
    """The measure that was found best for a table's checkpoint (`refine`); None: nobody looked for it."""
    found = table.statistics.get(REFINED) if table is not None else None
    if not found:
        return None
    try:
        share, power = found["measure"]
        if 0 <= share <= 1 and 0 < power < np.inf:
            return float(share), float(power)
    except (TypeError, KeyError, ValueError):
        pass
    raise MagCacheError(f"{table.name if table else ''}: its refined measure cannot be read; refine again.")


def spread_evenly(place: np.ndarray, computed: int, magcache_K: int | None, forced: np.ndarray) -> list[int]:
    """Indices of `computed` of the places: the first, the last, those of the mask `forced` at the beginning and at the
    end, and the others as evenly as possible."""
    steps = len(place)
    head, tail = (max(1, int(np.append(~run, True).argmax())) for run in (forced, forced[::-1]))
    if head + tail > steps:
        return list(range(steps))[: max(computed, head)]
    apart = steps if magcache_K is None else magcache_K + 1
    chosen, end, after = list(range(min(head, computed))), steps - tail, list(range(steps - tail + 1, steps))
    spread = computed - len(after)
    last = min(end, chosen[-1] + (spread - len(chosen)) * apart)
    wanted = np.linspace(place[chosen[-1]], place[end], spread - len(chosen) + 1)[1:]
    for left, where in zip(range(len(wanted) - 1, -1, -1), wanted):
        possible = np.arange(max(chosen[-1] + 1, last - left * apart), min(end - left, chosen[-1] + apart) + 1)
        chosen.append(int(possible[np.abs(place[possible] - where).argmin()]))
    return chosen + after


def fewest_computed(
    steps: int,
    magcache_K: int | None = None,
    retained: int = 1,
    switch_step: int | None = None,
    must_compute: np.ndarray | None = None,
) -> int:
    """How many steps compute at least: the first `retained`, the first of each expert, those of `must_compute`, and one
    after every magcache_K reuses."""
    reuse, in_a_row = np.zeros(steps, dtype=bool), 0
    possible = np.ones(steps, dtype=bool) if must_compute is None else ~must_compute
    for step in range(steps):
        allowed = step >= retained and step != switch_step and possible[step]
        reuse[step] = allowed and (magcache_K is None or in_a_row < magcache_K)
        in_a_row = in_a_row + 1 if reuse[step] else 0
    return int(steps - reuse.sum())


def planned_schedule(
    reuse: np.ndarray,
    fewest_computed: int,
    retained: int,
    expected_error: np.ndarray | None = None,
    weights: np.ndarray | None = None,
) -> Schedule:
    """The Schedule with this mask of reused steps; the other arguments are those of `Schedule`, but for retained: how
    many steps compute from the first on."""
    return Schedule(
        reuse,
        np.arange(len(reuse)) < retained,
        expected_error=expected_error,
        why_none="" if reuse.any() else "every step was asked to compute",
        fewest_computed=fewest_computed,
        weights=weights,
    )
