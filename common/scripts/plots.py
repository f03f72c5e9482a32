"""Plots of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MagCacheError, needs
from ..ratios import Levels
from ..schedule import Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_schedule(path: str | Path, schedule: Schedule, levels: Levels | None, title: str) -> None:
    """Plot a plan: magnitude ratios above; errors below, coloured by whether the step computes or is reused.

    levels: noise levels (steps,), as a second axis; None: without. Raises MagCacheError if matplotlib is missing or
    the file cannot be written.
    """
    figure_class = needs("matplotlib.figure", "matplotlib").Figure
    figure = figure_class(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = range(schedule.steps)
    for name, row in zip(("cond", "uncond"), () if schedule.ratios is None else schedule.ratios):
        top.plot(steps, row, marker=".", label=name)
    top.axhline(1, color="0.8", zorder=0)
    top.set_ylabel("magnitude ratio $\\gamma_t$")
    if schedule.ratios is not None:
        top.legend(frameon=False)
    top.set_title(
        f"{title}: {schedule.computed} of {schedule.steps} steps computed, at most {schedule.bound:.2f}x", loc="left"
    )
    settings: Any = schedule.settings
    thresholded = schedule.accumulated_error is not None  # by the paper's rule
    error = schedule.accumulated_error if thresholded else schedule.expected_error
    if error is None:  # planned without a calibration: bars of equal height
        error = np.ones(schedule.steps)
    bottom.bar(steps, error, color=["tab:orange" if reuse else "tab:blue" for reuse in schedule.reuse])
    bottom.bar([0], [0], color="tab:blue", label="computed")
    bottom.bar([0], [0], color="tab:orange", label="reused")
    if thresholded:
        bottom.axhline(settings.magcache_thresh, color="tab:red", linestyle="--", label="magcache_thresh")
        bottom.set_ylim(0, 2.5 * max(settings.magcache_thresh, 0.01))
    bottom.set_ylabel("accumulated error" if thresholded else "expected relative error")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False, ncols=3, loc="upper left")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    if levels is not None:
        noise = top.secondary_xaxis("top", functions=(lambda x: x, lambda x: x))
        ticks = list(range(0, schedule.steps, max(1, schedule.steps // 8)))
        noise.set_xticks(ticks, [f"{levels[tick]:.2f}" for tick in ticks])
        noise.set_xlabel("noise level $\\sigma$", fontsize="small")
        top.title.set_position((0, 1.2))
    save_figure(path, figure)


def save_figure(path: str | Path, figure: Figure) -> None:
    """Write a figure as an image. Raises MagCacheError for an unknown ending or if the file cannot be written."""
    if Path(path).suffix.lower() not in (".png", ".jpg", ".pdf", ".svg"):
        raise MagCacheError(f"{path} is no image format; end it in .png.")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise MagCacheError(f"{path} cannot be written as an image ({error}).") from None
