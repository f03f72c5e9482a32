"""For a model that nobody calibrated: its first complete run computes everything and is measured, and later runs are
planned from what it showed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .blocks import Host
from .calibration import Statistics
from .errors import MagCacheError
from .expert import Expert
from .patch import MagCache, switch_step
from .payloads import PAYLOADS, Payload, Residual
from .planner import Target
from .residuals import Residuals
from .run import MeasuredRun, Run
from .schedule import Rule, Schedule, Settings, compute_all, why_nothing_skips
from .tables import RatioTable, best, save_calibration

LEAST_COVERED = 0.5  # share of a run's steps that a table must cover; with less the run is measured
MEASURING = "this run computes every step; the next one is faster"


class MeasuredFirst(MagCache):
    """Like the handle of `magcache_forward`, but a run without a table is an ordinary un-cached one, and is measured.

    find_table: noise levels of a run -> the table to plan it from, or None; asked at the beginning of each run.
    name, path, description: as in `magcache_calibration`; path is None where another process writes.
    A run that breaks off, or whose measurement fails, saves nothing, and the next run measures again. Runs too short to
    skip anything are not measured.
    """

    def __init__(
        self,
        models: list[torch.nn.Module],
        host: Host,
        timesteps: Callable[[], Any],
        find_table: Callable[[np.ndarray], RatioTable | None],
        settings: Settings | Target,
        name: str,
        path: Path | None,
        description: dict,
        announce: Callable[[str], None] | None = None,
        boundary: float | None = None,
        scheduler: Any = None,
        owner: Any = None,
    ) -> None:
        self.find_table, self.settings, self.boundary = find_table, settings, boundary
        self.name, self.path, self.description = name, path, description
        self.measured: RatioTable | None = None  # in this process
        self.refuse_other_weights: Callable[[], None] = lambda: None  # as in `Calibration`
        payload = PAYLOADS[settings.payload]
        super().__init__(
            models, host, timesteps, self.plan_run, Residuals, announce, None, payload, None, scheduler, owner=owner
        )
        self.stacks = {  # the residual of the blocks is measured, whatever is predicted
            expert: expert.payload if payload is Residual else Residual(expert.model, host) for expert in self.experts
        }

    def plan_run(self, levels: np.ndarray, payload: str) -> Schedule:
        """The Schedule of a run; without a table one that computes everything."""
        if self.table is None:
            return compute_all(len(levels), why_nothing_skips(len(levels), self.settings, Rule()))
        return self.settings.with_payload(payload).plan(self.table, levels, switch_step(levels, self.boundary))

    def payload_of(self, expert: Expert) -> Payload:
        return self.stacks[expert] if isinstance(self.run, MeasuredRun) else expert.payload

    def new_run(self, levels: np.ndarray, expert: Expert, arguments: dict, latent: torch.Tensor) -> Run:
        known = (table for table in (self.find_table(levels), self.measured) if table is not None)
        self.table = best(known, levels)
        if self.serves(self.table, levels) or why_nothing_skips(len(levels), self.settings, Rule()):
            return super().new_run(levels, expert, arguments, latent)
        run = MeasuredRun(levels, Statistics(), self.host.noise_tokens)
        run.schedule = run.report.schedule = replace(run.schedule, why_none=f"measuring: {MEASURING}")
        run.report.measuring = MEASURING
        if self.announce:
            self.announce(run.report.line())
        return run

    def serves(self, table: RatioTable | None, levels: np.ndarray) -> bool:
        """Whether this table is good enough to plan a run, so that it need not be measured."""
        if table is None or table.covered(levels).mean() < LEAST_COVERED:
            return False
        return not self.settings.needs_gram or table.fine_enough(levels)

    def complete_run(self, run: Run) -> None:
        """Keep what was measured. What goes wrong is told but not raised, so that what was rendered is not lost."""
        try:
            super().complete_run(run)
        except MagCacheError as error:
            self.tell(run, f"it failed ({str(error).rstrip('.')}), so the next run measures again")
            return
        if not isinstance(run, MeasuredRun):
            return
        self.measured = run.statistics.table(self.name, **self.description)
        try:
            self.refuse_other_weights()
            if self.path:
                run.report.measuring = f"{MEASURING} (saved to {save_calibration(self.path, self.measured)})"
        except MagCacheError as error:
            self.tell(run, f"{MEASURING}, in this process only ({str(error).rstrip('.')})")

    def ended(self, run: Run) -> None:
        if not run.measures:
            super().ended(run)
        elif not run.report.complete:
            self.tell(run, "this run was interrupted, so nothing is saved and the next one measures again")

    def tell(self, run: Run, text: str) -> None:
        run.report.measuring = text
        if self.announce:
            self.announce(run.report.line())
