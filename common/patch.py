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
from .plan_text import plan_text
from .planner import Target
from .ranks import is_writer
from .residuals import Residuals
from .run import CachedRun, MeasuredRun, Run
from .schedule import Rule, Schedule, Settings
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

    model: the transformer, possibly compiled, offloaded or sharded; or a list of models among which the sampler divides
        its steps (a high-noise and a low-noise expert). host: the facts of its class.
    table: its magnitude ratios; may be None for a `Target` that needs none.
    settings: `Settings` for the paper's rule, or a `Target`; rule: how the settings are meant (None: as the table
    says).
    timesteps: called without arguments at each forward; returns all timesteps of the sampler's run, 1000 being noise
        level 1, as one object that lasts as long as the run. For a diffusers pipeline: `lambda:
        pipe.scheduler.timesteps`.
    interpolation: "sigma" or "nearest" (`RatioTable.at`).
    device, dtype: where and in which type residuals are kept (None: as the model makes them).
    announce: gets the plan as text at the start of each run (None: nobody).
    boundary: with two experts, the noise level below which the second works (None: one model).
    scheduler: the sampler's, for the corrector: an object with the `step` of diffusers, a function that returns it and
        is called at the beginning of each run, or `corrector.EULER` for a plain Euler loop (None: not known, so nothing
        is corrected). corrector: whether skipped steps are corrected.
    owner: the pipeline whose calls `host.outside` lets through, where several share the model and each may have a patch
        (None: all calls come here).
    Raises MagCacheError if the model is patched already or `host` does not fit it.
    """

    def plan(levels, payload):
        return settings.with_payload(payload).plan(table, levels, switch_step(levels, boundary), rule, interpolation)

    payload = settings.for_table(table).payload
    guard = None if settings.magcache_guard is None else Guard(settings.magcache_guard)

    def residuals() -> Residuals:
        return Residuals(device, dtype, for_all=guard is not None)

    return MagCache(
        model,
        host,
        timesteps,
        plan,
        residuals,
        announce,
        table,
        PAYLOADS[payload],
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

    model, host, timesteps, owner: as in `magcache_forward`.
    name, description: of the table, and further fields of `RatioTable` (models, sampler, provenance, ...).
    path: the file that holds the average after each complete run (None: none); a run that breaks off leaves it alone.
    statistics: those of an earlier handle, to go on averaging.
    """
    return Calibration(model, host, timesteps, name, path, description or {}, statistics or Statistics(), owner)


def switch_step(levels: np.ndarray, boundary: float | None) -> int | None:
    """The step from which the second of two experts works (None: one model)."""
    return None if boundary is None else int((levels >= boundary).sum())


class MagCache(Patch):
    """The handle of a model that computes or reuses as its schedule says.

    plan: (noise levels of a run, payload) -> its Schedule; new_residuals: () -> what a run keeps its residuals in. The
    other arguments are those of `magcache_forward` and `Patch`.
    """

    def __init__(
        self,
        models: Any,
        host: Host,
        timesteps: Callable[[], Any],
        plan: Callable[[np.ndarray, str], Schedule],
        new_residuals: Callable[[], Residuals],
        announce: Callable[[str], None] | None,
        table: RatioTable | None,
        payload: Any = Residual,
        guard: Guard | None = None,
        scheduler: Any = None,
        corrector: bool = True,
        owner: Any = None,
    ) -> None:
        self.plan, self.new_residuals, self.announce, self.table = plan, new_residuals, announce, table
        self.guard, self.scheduler, self.corrector = guard, scheduler, corrector
        super().__init__(models, host, timesteps, payload, owner)

    @property
    def residuals(self) -> Residuals:
        """Those of the run in progress."""
        return self.run.residuals if isinstance(self.run, CachedRun) else self.new_residuals()

    def new_run(self, levels: np.ndarray, expert: Any, arguments: dict, latent: torch.Tensor) -> Run:
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

    def ended(self, run: Run) -> None:
        report = run.report
        if self.announce and run.schedule.reuse.any() and not report.reused:
            self.announce(report.line())

    def facts_are_wrong(self, run: CachedRun, told: str) -> None:
        """Plan for the model's output, which is predicted from here on."""
        run.plan(self.plan(np.asarray(run.levels), "output"))
        if self.announce:
            self.announce(told)


class Calibration(Patch):
    """The handle of a model that computes everything and is measured.

    table: the result of the complete runs; failure: why there is none. The end of a `with` block raises it, only then,
    so that what was rendered is not lost. The arguments are those of `magcache_calibration`.
    """

    def __init__(
        self,
        models: Any,
        host: Host,
        timesteps: Callable[[], Any],
        name: str,
        path: str | Path | None,
        description: dict,
        statistics: Statistics,
        owner: Any = None,
    ) -> None:
        self.name, self.path, self.description = name, path, description
        self.statistics = statistics
        self.table: RatioTable | None = None
        self.failure: MagCacheError | None = None
        self.refuse_other_weights: Callable[[], None] = lambda: None  # raises if they are not those the file is for
        super().__init__(models, host, timesteps, owner=owner)

    def __exit__(self, kind, error, trace) -> None:
        super().__exit__(kind, error, trace)
        if kind is None and self.failure:
            raise self.failure

    def new_run(self, levels: np.ndarray, expert: Any, arguments: dict, latent: torch.Tensor) -> Run:
        return MeasuredRun(levels, self.statistics, self.host.noise_tokens)

    def complete_run(self, run: Run) -> None:
        try:
            run.complete()
            self.table = self.statistics.table(self.name, **self.description)
            self.refuse_other_weights()
            if self.path and is_writer():
                self.path = save_calibration(self.path, self.table)
        except MagCacheError as error:
            self.failure = error
