"""--magcache_refine of the diffusers scripts: find the measure in which computed steps are best spread."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import MagCacheError
from ..pipeline import enable
from ..refine import best_measure, closeness_of, refined
from ..tables import calibrations, write
from .quality import quality


def check_refining(args: argparse.Namespace, others: Sequence[str]) -> None:
    """Raises MagCacheError if --magcache_refine is given with a flag that it excludes, or without a speed-up. args:
    MagCache's flags; others: names of the excluded ones."""
    if not args.magcache_refine:
        return
    for name in others:
        if getattr(args, name) not in (None, False):
            raise MagCacheError(f"--magcache_refine draws its own runs: leave out --{name}.")
    if not args.magcache:
        raise MagCacheError("--magcache_refine draws with MagCache: leave out --no-magcache.")
    if args.magcache_speedup is None and args.magcache_steps is None:
        raise MagCacheError("--magcache_refine is for a speed-up: name it with --magcache_speedup or --magcache_steps.")


def refine(
    pipe: Any,
    draw: Callable[[str | None, str], np.ndarray | None],
    prompts: Sequence[str | None],
    **asked: Any,
) -> None:
    """Calibrate a pipeline on these prompts, draw each prompt with every measure, and save the best measure with the
    calibration.

    draw: (prompt, title) -> uint8 frames (frames, height, width, 3); asked: speedup or steps, K and retention_ratio,
    as for `enable`. Raises MagCacheError for a pipeline that draws neither images nor videos.
    """
    with enable(pipe, calibrate=True) as cache:
        uncached = [draw(prompt, "un-cached") for prompt in prompts]
    if any(frames is None for frames in uncached):
        raise MagCacheError("Only images and videos can be compared: this pipeline makes neither.")
    schedules = []

    def psnr_of(measure):
        """In dB, for each prompt."""
        with enable(pipe, **asked, measure=measure, announce=None) as cached:
            pictures = [draw(prompt, "MagCache") for prompt in prompts]
        schedules.append(cached.reports[-1].schedule)
        values = [quality(true, picture)["psnr"] for true, picture in zip(uncached, pictures)]
        share, power = measure
        print(
            f"  {schedules[-1].strip}  measure {share:g}, {power:g}: {np.mean(values):.1f} dB, worst {min(values):.1f}"
        )
        return values

    closeness = closeness_of(psnr_of)
    for handle in cache.handles:
        calibration: Any = getattr(handle, "patch", handle)  # a PatchAfterDiscovery has the patch inside
        checkpoint = calibration.table.provenance["fingerprint"]
        for path, table in calibrations(f"*-{checkpoint}*.json").items():  # a run may take any
            write(path, refined(table, closeness, schedules[-1], len(prompts)))
            print(f"Saved in {path}")
    share, power = best_measure(closeness)
    print(f"Runs of this checkpoint spread their computed steps in the measure {share:g}, {power:g} from now on.")
