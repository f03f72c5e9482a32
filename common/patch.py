"""`magcache_forward` and `magcache_calibration`: replace the forward of one model instance, and put it back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .blocks import BlockStack, Host
from .calibration import Statistics
from .errors import MagCacheError
from .guard import Guard
from .payloads import PAYLOADS
from .planner import Target
from .ranks import is_writer
from .report import plan_text
from .residuals import Residuals
from .run import CachedRun, MeasuredRun, Run
from .schedule import Rule, Settings
from .steps import TRAIN_TIMESTEPS, Part, StepTracker
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
    """

    def plan(levels):
        switch_step = None if boundary is None else int((levels >= boundary).sum())
        return settings.plan(table, levels, switch_step, rule, interpolation)

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
        PAYLOADS[settings.payload],
        guard,
        scheduler,
        corrector,
    )


def magcache_calibration(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    host: Host,
    timesteps: Callable[[], Sequence[float]],
    name: str,
    path=None,
    description: dict | None = None,
    statistics: Statistics | None = None,
) -> Calibration:
    """Measure the magnitude ratios of a model, or of experts, in ordinary un-cached runs. Returns a handle.

    After each complete run the file at `path` holds the average so far; an interrupted run leaves it as it was.
    description: further fields of `RatioTable` (models, sampler, provenance, ...).
    statistics: those of an earlier handle, to go on averaging.
    """
    return Calibration(model, host, timesteps, name, path, description or {}, statistics or Statistics())


class Expert:
    """One model instance with its forward replaced. Most samplers have one; some divide their steps between two."""

    def __init__(self, model, host, patch, payload):
        self.model, self.patch = inner_module(model), patch
        self.payload = payload(self.model, host)
        self.had_own_forward = "forward" in self.model.__dict__
        self.original = self.model.forward
        earlier = getattr(self.original, "magcache", None)
        if earlier is not None and earlier.active:
            raise MagCacheError(
                "This model is patched already; remove the first patch (handle.remove()) before the second."
            )
        # Keywords that it does not know are passed on as they are.
        self.argument_names = argument_names(self.model)

        # Dynamo must not trace the bookkeeping; the original forward, called from this frame, is still compiled.
        @functools.partial(torch.compiler.disable, recursive=False)
        @functools.wraps(self.original)
        def forward(*args, **kwargs):
            if not patch.active:
                return self.original(*args, **kwargs)
            call = patch.begin_call(self, args, kwargs)
            try:
                output = self.original(*args, **kwargs) if call.output is None else call.output
                output = patch.finish_call(call, output, functools.partial(self.original, *args, **kwargs))
            except BaseException:
                patch.cancel_call(call)
                raise
            return output

        forward.magcache = patch
        self.forward = forward

    def put_on(self):
        self.model.forward = self.forward

    def take_off(self):
        """Restore the model. Where something else (an offload hook) has wrapped the patch since, the patch stays in
        that chain and only passes calls on."""
        if self.model.__dict__.get("forward") is self.forward:
            if self.had_own_forward:
                self.model.forward = self.original
            else:
                del self.model.forward


class Sampling:
    """A sampler on its way through its noise levels: the run that it makes, and how far it is.

    timesteps: the sampler's, whose identity tells one run from the next; branches: calls at each step so far; call: the
    `run.ModelCall` under way or made last.
    """

    def __init__(self, timesteps, tracker, run):
        self.timesteps, self.tracker, self.run = timesteps, tracker, run
        self.branches: dict[int, int] = {}
        self.expert = self.call = None

    def observe(self, level, latent, tolerance):
        """The Call that this is, or None if it belongs to another run."""
        call = self.tracker.observe(level, latent, tolerance)
        if call is not None:
            self.branches[call.step] = max(self.branches.get(call.step, 0), call.branch + 1)
        return call

    def calls_at(self, step):
        return self.branches.get(step, 0)

    @property
    def last_step(self):
        return self.run.schedule.steps - 1


class Patch:
    """The forward of a model instance (or of several), replaced. `remove()` or the end of a `with` block restores it.

    active: whether calls are cached; reached: whether there was one; reports: one `RunReport` a run.
    """

    def __init__(self, models, host, timesteps, payload=BlockStack):
        self.host, self.timesteps = host, timesteps
        self.active, self.reached, self.short_runs = True, False, 0
        self.reports: list = []
        self.sampling: Sampling | None = None
        models = models if isinstance(models, (list, tuple)) else [models]
        self.experts = [Expert(model, host, self, payload) for model in models]
        for expert in self.experts:
            expert.put_on()

    @property
    def run(self) -> Run | None:
        """The run in progress."""
        return self.sampling.run if self.sampling else None

    def new_run(self, levels, expert, arguments, latent):
        """The `run.Run` of a sampler that begins at the first of these noise levels. arguments: of forward, by name."""
        raise NotImplementedError

    def complete_run(self, run):
        """The sampler made every step of a run."""
        run.complete()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.end_run()  # broken off, perhaps between the branches of its last step: not to be settled as complete
        self.remove()
        if kind is None:
            self.require_reached()

    def remove(self) -> None:
        """Restore the model."""
        self.settle()
        self.active = False
        self.end_run()
        for expert in self.experts:
            expert.take_off()

    @contextmanager
    def paused(self):
        """Let the model run as it was for a while."""
        self.active = False
        self.end_run()
        try:
            yield
        finally:
            self.active = True

    def require_reached(self) -> None:
        """Raises MagCacheError if no call came through the patch."""
        if not self.reached:
            name = type(self.experts[0].model).__name__
            raise MagCacheError(
                f"The patched forward of {name} was never called, so nothing was cached: patch the instance that "
                "the sampler runs, after its last wrapper was put on."
            )

    @torch.compiler.disable
    def begin_call(self, expert, args, kwargs):
        """Find out which call of which run this is, and let the block stack run or be replaced. Returns the
        `run.ModelCall`."""
        self.reached = True
        arguments = {**dict(zip(expert.argument_names, args)), **kwargs}
        latent, timestep = arguments[self.host.latent], arguments[self.host.timestep]
        latent = latent[0] if isinstance(latent, (list, tuple)) else latent
        # The largest: tokens that are given, as the first frame of a video, may have a timestep of 0 of their own.
        level = float(timestep.max() if torch.is_tensor(timestep) else timestep) / self.host.timestep_scale
        tolerance = level_tolerance(timestep)

        timesteps, call = self.timesteps(), None
        if self.sampling is not None and timesteps is self.sampling.timesteps:
            call = self.sampling.observe(level, latent, tolerance)
        elif self.sampling is not None:
            self.expect_lasting_timesteps(level)
        if call is None:
            self.begin_run(timesteps, level, tolerance, expert, arguments, latent)
            call = self.sampling.observe(level, latent, tolerance)
        if expert is not self.sampling.expert:
            self.sampling.expert = expert
            self.sampling.run.expert_changed()
        try:
            self.sampling.call = self.sampling.run.begin([Part(call.branch, call, latent)], expert.payload, arguments)
            return self.sampling.call
        except BaseException:
            self.end_run()
            raise

    @torch.compiler.disable
    def finish_call(self, call, output, rehearse):
        """After a call. rehearse: makes it again. Returns the output that the sampler is to get."""
        output = call.finish(output, rehearse)
        sampling = self.sampling
        last = sampling.last_step
        if call.parts[0].call.step == last and sampling.calls_at(last) >= max(1, sampling.calls_at(last - 1)):
            self.complete_run(sampling.run)
        return output

    @torch.compiler.disable
    def cancel_call(self, call):
        """An exception or a cancel leaves nothing behind."""
        call.cancel()
        self.end_run()

    def expect_lasting_timesteps(self, level):
        """New timesteps mean a new run. Raises MagCacheError if every call has new ones, so that no run gets beyond one
        call."""
        goes_on = len(self.sampling.run.report.calls) == 1 and level < self.sampling.tracker.level
        self.short_runs = self.short_runs + 1 if goes_on else 0
        if self.short_runs == 3:
            raise MagCacheError(
                "The function `timesteps` returns a new object at each call, which tells one run from the next: "
                "let it return the sampler's own timesteps."
            )

    def settle(self):
        """Complete a run that reached its last step with fewer branches than before: guidance ended there."""
        sampling = self.sampling
        if sampling and not sampling.run.report.complete and sampling.calls_at(sampling.last_step):
            self.complete_run(sampling.run)

    def begin_run(self, timesteps, level, tolerance, expert, arguments, latent):
        self.settle()
        self.end_run()
        if timesteps is None or len(timesteps) == 0:
            raise MagCacheError(
                "The sampler has no timesteps yet: patch the model before the pipeline runs, not its parts."
            )
        timesteps_listed = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
        tracker = StepTracker(np.asarray(timesteps_listed, dtype=float) / TRAIN_TIMESTEPS, level, tolerance)
        run = self.new_run(tracker.levels, expert, arguments, latent)
        self.reports.append(run.report)
        self.sampling = Sampling(timesteps, tracker, run)

    def end_run(self) -> None:
        """Forget the run in progress, whole or not."""
        if self.sampling is not None:
            self.sampling.run.end()
        self.sampling = None


class MagCache(Patch):
    """A model that computes or reuses as its schedule says.

    plan: (noise levels of a run) -> `schedule.Schedule`; new_residuals: () -> `Residuals` of a run.
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
        payload=BlockStack,
        guard=None,
        scheduler=None,
        corrector=True,
    ):
        self.plan, self.new_residuals, self.announce, self.table = plan, new_residuals, announce, table
        self.guard, self.scheduler, self.corrector = guard, scheduler, corrector
        super().__init__(models, host, timesteps, payload)

    @property
    def residuals(self) -> Residuals:
        """Those of the run in progress."""
        return self.sampling.run.residuals if self.sampling else self.new_residuals()

    def new_run(self, levels, expert, arguments, latent):
        scheduler = self.scheduler() if inspect.isroutine(self.scheduler) else self.scheduler
        run = CachedRun(self.plan(levels), levels, self.new_residuals(), self.guard, scheduler, self.corrector)
        if self.announce:
            bytes_a_branch, size = None, expert.payload.size(arguments, latent)
            if size is not None:
                elements, dtype = size
                bytes_a_branch = elements * (run.residuals.dtype or dtype).itemsize * run.schedule.depth
            self.announce(plan_text(run.schedule, levels, self.table, bytes_a_branch, run.why_uncorrected))
        return run


class Calibration(Patch):
    """A model that computes everything and measures. `table` holds the result of the complete runs."""

    def __init__(self, models, host, timesteps, name, path, description, statistics):
        self.name, self.path, self.description = name, path, description
        self.statistics = statistics
        self.table: RatioTable | None = None
        super().__init__(models, host, timesteps)

    def new_run(self, levels, expert, arguments, latent):
        return MeasuredRun(levels, self.statistics, self.host.noise_tokens)

    def complete_run(self, run):
        run.complete()
        self.table = self.statistics.table(self.name, **self.description)
        if self.path and is_writer():
            self.path = save_calibration(self.path, self.table)


def inner_module(model):
    """The module whose forward the model's authors wrote, inside torch.compile, FSDP or DataParallel wrappers."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        if name in model.__dict__.get("_modules", {}):
            return inner_module(model._modules[name])
    return model


def argument_names(model):
    """Of the class's forward, since a wrapper on the instance may hide the names; of the instance's where the class has
    none."""
    forward = type(model).forward
    if forward is torch.nn.Module.forward:
        return list(inspect.signature(model.forward).parameters)
    return list(inspect.signature(forward).parameters)[1:]


def level_tolerance(timestep):
    """How far, relatively, a noise level may be off after rounding in the timestep's own dtype."""
    if torch.is_tensor(timestep) and timestep.is_floating_point():
        return max(1e-6, 1.01 * torch.finfo(timestep.dtype).eps)
    return 1e-6
