"""`magcache_forward` and `magcache_calibration`: replace the forward of one model instance, and put it back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .blocks import Host
from .calibration import Statistics
from .errors import MagCacheError
from .guard import Guard
from .handle import Patch
from .payloads import PAYLOADS, Residual
from .planner import Target
from .ranks import is_writer
from .report import plan_text
from .residuals import Residuals
from .run import CachedRun, MeasuredRun
from .schedule import Rule, Settings
from .tables import RatioTable, save_calibration


def magcache_forward(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    host: Host,
    table: RatioTable | None,
    settings: Settings | Target,
    timesteps: Callable[[], Sequence[float]],
    rule: Rule | None = None,
    interpolation: str = "sigma",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    announce: Callable[[str], None] | None = tqdm.write,
    boundary: float | None = None,
    scheduler: Any = None,
    corrector: bool = True,
    owner: Any = None,
) -> MagCache:
    """Let a model skip its block stack where the schedule says so. Returns a handle, which is also a context manager.

    model: the transformer, also compiled, offloaded or sharded, or a list of those among which the sampler divides its
        steps (a high-noise and a low-noise expert); host: `blocks.Host`, the facts of its class.
    table: of its magnitude ratios, or None, which will do for a `planner.Target` without a calibration; settings:
        `schedule.Settings` for the paper's rule, or a `planner.Target`; rule: `schedule.Rule` of the settings (None:
        the table's own).
    timesteps: called without arguments at each forward; returns all timesteps of the sampler's run, noise level 1
        being 1000, as one object that lasts as long as the run. A diffusers pipeline: `lambda:
        pipe.scheduler.timesteps`.
    interpolation: "sigma" or "nearest" (`RatioTable.at`).
    device, dtype: where and how residuals are kept (None: as the model makes them).
    announce: gets the plan as text at the start of each run.
    boundary: with two experts, the noise level below which the second works (None: one model).
    scheduler: the sampler's, by which skipped steps are made again when the next one is computed: an object with the
        `step` of diffusers, a function called at the beginning of each run that returns it, or `corrector.EULER` for a
        plain Euler loop without one (None: not known, nothing is corrected). corrector: whether that is done.
    owner: of several pipelines that share the model the one whose calls `host.outside` lets through; each may have a
        patch of its own (None: all calls come here).
    """

    def plan(levels, payload):
        return settings.with_payload(payload).plan(table, levels, switch_step(levels, boundary), rule, interpolation)

    payload = settings.for_table(table).payload
    guard = None if settings.magcache_guard is None else Guard(settings.magcache_guard)

    def residuals():
        return Residuals(device, dtype, for_all=guard is not None)

    return MagCache(
        model,
        host,
        timesteps,
        plan,
        residuals,
        announce,
        table,
        PAYLOADS[payload or "residual"],
        guard,
        scheduler,
        corrector,
        owner,
    )


def magcache_calibration(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    host: Host,
    timesteps: Callable[[], Sequence[float]],
    name: str,
    path: str | Path | None = None,
    description: dict | None = None,
    statistics: Statistics | None = None,
    owner: Any = None,
) -> Calibration:
    """Measure the magnitude ratios of a model, or of experts, in ordinary un-cached runs. Returns a handle.

    After each complete run the file at `path` holds the average so far; an interrupted run leaves it as it was.
    description: further fields of `RatioTable` (models, sampler, provenance, ...).
    statistics: those of an earlier handle, to go on averaging. owner: of `magcache_forward`.
    """
    return Calibration(model, host, timesteps, name, path, description or {}, statistics or Statistics(), owner)


def switch_step(levels: np.ndarray, boundary: float | None) -> int | None:
    """The step from which the second of two experts works."""
    return None if boundary is None else int((levels >= boundary).sum())


class MagCache(Patch):
    """A model that computes or reuses as its schedule says.

    plan: (noise levels of a run, kind of payload) -> `schedule.Schedule`; new_residuals: () -> `Residuals` of a run.
    """

    def __init__(
        self,
        models,
        host,
        timesteps,
        plan,
        new_residuals,
        announce,
        table,
        payload=Residual,
        guard=None,
        scheduler=None,
        corrector=True,
        owner=None,
    ):
        self.plan, self.new_residuals, self.announce, self.table = plan, new_residuals, announce, table
        self.guard, self.scheduler, self.corrector = guard, scheduler, corrector
        super().__init__(models, host, timesteps, payload, owner)

    @property
    def residuals(self) -> Residuals:
        """Those of the run in progress."""
        return self.run.residuals if isinstance(self.run, CachedRun) else self.new_residuals()

    def new_run(self, levels, expert, arguments, latent):
        schedule = self.plan(levels, expert.payload.kind)
        scheduler = self.scheduler() if inspect.isroutine(self.scheduler) else self.scheduler
        run = CachedRun(
            schedule, levels, self.new_residuals(), self.guard, self.facts_are_wrong, scheduler, self.corrector
        )
        if self.announce:
            bytes_a_branch, size = None, expert.payload.size(arguments, latent)
            if size is not None:
                elements, dtype = size
                bytes_a_branch = elements * (run.residuals.dtype or dtype).itemsize * run.schedule.depth
            self.announce(plan_text(run.schedule, levels, self.table, bytes_a_branch, run.why_uncorrected))
        return run

    def ended(self, run):
        report = run.report
        if self.announce and run.schedule.reuse.any() and not report.reused:
            self.announce(report.line())

    def facts_are_wrong(self, run, told):
        """The model's output is predicted from here on, and planned for."""
        run.plan(self.plan(np.asarray(run.levels), "output"))
        if self.announce:
            self.announce(told)


class Calibration(Patch):
    """A model that computes everything and measures. `table` holds the result of the complete runs; `failure` why there
    is none, which the end of a `with` block raises: what the run has rendered is not lost for it."""

    def __init__(self, models, host, timesteps, name, path, description, statistics, owner=None):
        self.name, self.path, self.description = name, path, description
        self.statistics = statistics
        self.table: RatioTable | None = None
        self.failure: MagCacheError | None = None
        self.refuse_other_weights: Callable[[], None] = lambda: None  # than those that the file is named after
        super().__init__(models, host, timesteps, owner=owner)

    def __exit__(self, kind, error, trace):
        super().__exit__(kind, error, trace)
        if kind is None and self.failure:
            raise self.failure

    def new_run(self, levels, expert, arguments, latent):
        return MeasuredRun(levels, self.statistics, self.host.noise_tokens)

    def complete_run(self, run):
        try:
            run.complete()
            self.table = self.statistics.table(self.name, **self.description)
            self.refuse_other_weights()
            if self.path and is_writer():
                self.path = save_calibration(self.path, self.table)
        except MagCacheError as error:
            self.failure = error
