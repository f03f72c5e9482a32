"""Where computed steps lie: spread evenly over the run in a measure of step index and noise level. numpy only.

A measure is (share of the step's index, the rest being the noise level; its power): below 1 more of them lie at the
beginning, where guidance decides what is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import MagCacheError

if TYPE_CHECKING:
    from .tables import RatioTable

MEASURE = (0.5, 0.6)
NEXT_TO_NOTHING = 0.25  # of the level before: a last level below this, at which there is nothing left to compute
REFINED = "refined"  # of a calibration's statistics: the measure that came closest on a few prompts (`refine`)


def spread_steps(
    levels: np.ndarray,
    computed: int,
    magcache_K: int | None = None,
    kept: int = 1,
    switch_step: int | None = None,
    beyond: np.ndarray | None = None,
    measure: tuple[float, float] | None = None,
) -> list[int]:
    """Indices of `computed` steps, spread evenly in `places`. The first and the last compute, since only what lies
    between two is corrected; so do the first and the last of each expert where there are enough. A last step that is
    NEXT_TO_NOTHING leaves its place to the one before. magcache_K: most
    between two; kept: how many compute from the first on; beyond: mask (steps,) of others that compute, at the
    beginning and at the end (`gram.unpredicted`); measure: None, MEASURE."""
    if ends_in_nothing(levels, switch_step) and kept <= computed < len(levels) and (beyond is None or not beyond[-1]):
        levels, beyond = levels[:-1], beyond if beyond is None else beyond[:-1]
    place, steps = places(levels, measure or MEASURE), len(levels)
    forced = np.arange(steps) < kept
    if beyond is not None:
        forced |= beyond
    if switch_step is None or not 0 < switch_step < steps:
        return spread_evenly(place, computed, magcache_K, forced)
    # Each expert's share, and no less than its own caps need.
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
    """Whether the last step moves next to nothing, as in diffusers' own noise levels for Euler, and is not the only one
    of its expert."""
    return len(levels) > 2 and levels[-1] < NEXT_TO_NOTHING * levels[-2] and switch_step != len(levels) - 1


def places(levels: np.ndarray, measure: tuple[float, float]) -> np.ndarray:
    """Where each step lies in a run, from 0 to 1: the share of its index and the rest of how far the noise level has
    fallen, to the power of the measure."""
    (share, power), levels = measure, np.asarray(levels, dtype=float)
    fallen = (levels[0] - levels) / max(levels[0] - levels[-1], 1e-9)
    return (share * np.linspace(0, 1, len(levels)) + (1 - share) * fallen) ** power


def refined_measure(table: RatioTable | None) -> tuple[float, float] | None:
    """The measure that was found best for the checkpoint of a table; None: none was looked for."""
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
    """Indices of `computed` of these places: the first, those of the mask `forced` at the beginning and at the end, the
    last, and the rest as evenly as can be."""
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
