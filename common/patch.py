"""`magcache_forward` and `magcache_calibration`: replace the forward of one model instance, and put it back."""

from __future__ import annotations

import functools
import inspect
from contextlib import contextmanager

import numpy as np
import torch
from tqdm import tqdm

from .blocks import BlockStack
from .calibration import Statistics
from .errors import MagCacheError
from .guard import Guard
from .payloads import PAYLOADS, ModelOutput, leading_tokens
from .planner import Target
from .ranks import is_writer
from .report import RunReport, plan_text
from .residuals import Residuals
from .schedule import compute_all, magcache_schedule, rule_of
from .steps import TRAIN_TIMESTEPS, Call, StepTracker
from .tables import save_calibration
from .timing import Stopwatch

REHEARSALS = 3  # of a reused step, at the end of a calibration


def magcache_forward(
    model,
    host,
    mag_ratios,
    settings,
    timesteps,
    rule=None,
    interpolation="sigma",
    device=None,
    dtype=None,
    announce=tqdm.write,
    boundary=None,
):
    """Let a model skip its block stack where the schedule says so. Returns a handle, which is also a context manager.

    model: the transformer, also compiled, offloaded or sharded, or a list of those among which the sampler divides its
        steps (a high-noise and a low-noise expert); host: `blocks.Host`, the facts of its class.
    mag_ratios: `ratios.RatioTable`; settings: `schedule.Settings` for the paper's rule, or `planner.Target` for a
    planned schedule; rule: `schedule.Rule` of the settings (None: the preset's own).
    timesteps: called without arguments at each forward; returns all timesteps of the sampler's run, noise level 1
        being 1000, as one object that lasts as long as the run. A diffusers pipeline: `lambda:
        pipe.scheduler.timesteps`.
    interpolation: "sigma" or "nearest" (`RatioTable.at`).
    device, dtype: where and how residuals are kept (None: as the model makes them).
    announce: gets the plan as text at the start of each run.
    boundary: with two experts, the noise level below which the second works (None: one model).
    """
    rule = rule or rule_of(mag_ratios)

    def plan(levels):
        switch_step = None if boundary is None else int((levels >= boundary).sum())
        if isinstance(settings, Target):
            return settings.plan(mag_ratios, levels, switch_step)
        return magcache_schedule(mag_ratios.at(levels, interpolation), settings, rule, switch_step)

    factor = getattr(settings, "magcache_guard", None)
    return MagCache(
        model,
        host,
        timesteps,
        plan,
        Residuals(device, dtype, for_all=factor is not None),
        announce,
        mag_ratios,
        PAYLOADS[getattr(settings, "payload", "residual")],
        factor and Guard(factor),
    )


def magcache_calibration(model, host, timesteps, name, path=None, description=None, statistics=None):
    """Measure the magnitude ratios of a model, or of experts, in ordinary un-cached runs. Returns a handle.

    After each complete run the file at `path` holds the average so far; an interrupted run leaves it as it was.
    description: further fields of `RatioTable` (models, sampler, provenance, ...).
    statistics: those of an earlier handle, to go on averaging.
    """
    return Calibration(model, host, timesteps, name, path, description or {}, statistics or Statistics())


class Run:
    """One pass of the sampler: its tracker, its schedule and what it keeps."""

    def __init__(self, timesteps, tracker, schedule, report):
        self.timesteps, self.tracker, self.schedule, self.report = timesteps, tracker, schedule, report
        self.branches, self.stopped = {}, ""


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
            try:
                output = patch.before(self, args, kwargs)
                if output is None:
                    output = self.original(*args, **kwargs)
                patch.after(output)
            except BaseException:
                patch.abort()
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


class Patch:
    """The forward of a model instance (or of several), replaced. `remove()` or the end of a `with` block restores
    it."""

    def __init__(self, models, host, timesteps, payload=BlockStack):
        self.host, self.timesteps = host, timesteps
        self.active, self.reached, self.run, self.reports, self.short_runs = True, False, None, [], 0
        self.expert = None
        models = models if isinstance(models, (list, tuple)) else [models]
        self.experts = [Expert(model, host, self, payload) for model in models]
        for expert in self.experts:
            expert.put_on()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.end_run()  # broken off, perhaps between the branches of its last step: not to be settled as complete
        self.remove()
        if kind is None:
            self.require_reached()

    def remove(self):
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

    def require_reached(self):
        if not self.reached:
            name = type(self.experts[0].model).__name__
            raise MagCacheError(
                f"The patched forward of {name} was never called, so nothing was cached: patch the instance that "
                "the sampler runs, after its last wrapper was put on."
            )

    @torch.compiler.disable
    def before(self, expert, args, kwargs):
        """Find out which call of which run this is, and let the block stack run or be replaced. Returns the output
        where it is predicted as a whole, so that no forward is needed, else None."""
        self.reached = True
        arguments = {**dict(zip(expert.argument_names, args)), **kwargs}
        latent, timestep = arguments[self.host.latent], arguments[self.host.timestep]
        latent = latent[0] if isinstance(latent, (list, tuple)) else latent
        # The largest: tokens that are given, as the first frame of a video, may have a timestep of 0 of their own.
        level = float(timestep.max() if torch.is_tensor(timestep) else timestep) / self.host.timestep_scale
        tolerance = level_tolerance(timestep)

        timesteps = self.timesteps()
        call = None
        if self.run is not None and timesteps is self.run.timesteps:
            call = self.run.tracker.observe(level, latent, tolerance)
        elif self.run is not None:
            self.expect_lasting_timesteps(level)
        if call is None:
            self.begin_run(timesteps, level, tolerance, expert.model, arguments)
            call = self.run.tracker.observe(level, latent, tolerance)
        if expert is not self.expert:
            self.expert = expert
            self.expert_changed()
        self.run.branches[call.step] = max(self.run.branches.get(call.step, 0), call.branch + 1)
        self.call, self.latent, self.arguments, self.inputs = call, latent, arguments, (args, kwargs)
        self.stopwatch = Stopwatch(latent.device)
        return self.prepare(self.run, call)

    @torch.compiler.disable
    def after(self, output):
        run, call, seconds = self.run, self.call, self.stopwatch.stop()
        self.served(run, call, seconds, output)
        self.latent = self.arguments = self.inputs = None
        last = run.schedule.steps - 1
        if call.step == last and run.branches[last] >= run.branches.get(last - 1, 1):
            self.complete_run(run)

    @torch.compiler.disable
    def abort(self):
        """An exception or a cancel leaves nothing behind."""
        for expert in self.experts:
            expert.payload.restore()
        self.latent = self.arguments = self.inputs = None
        self.end_run()

    def expect_lasting_timesteps(self, level):
        """New timesteps mean a new run. Raises MagCacheError if every call has new ones, so that no run gets beyond one
        call."""
        goes_on = len(self.run.report.calls) == 1 and level < self.run.tracker.level
        self.short_runs = self.short_runs + 1 if goes_on else 0
        if self.short_runs == 3:
            raise MagCacheError(
                "The function `timesteps` returns a new object at each call, which tells one run from the next: "
                "let it return the sampler's own timesteps."
            )

    def settle(self):
        """Complete a run that reached its last step with fewer branches than before: guidance ended there."""
        if self.run and not self.run.report.complete and self.run.branches.get(self.run.schedule.steps - 1):
            self.complete_run(self.run)

    def begin_run(self, timesteps, level, tolerance, model, arguments):
        self.settle()
        self.end_run()
        if timesteps is None or len(timesteps) == 0:
            raise MagCacheError(
                "The sampler has no timesteps yet: patch the model before the pipeline runs, not its parts."
            )
        levels = (
            np.asarray(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps, dtype=float) / TRAIN_TIMESTEPS
        )
        tracker = StepTracker(levels, level, tolerance)
        schedule = self.plan(tracker.levels)
        self.reports.append(RunReport(schedule, tracker.levels.tolist()))
        self.run = Run(timesteps, tracker, schedule, self.reports[-1])
        self.started(model, arguments)

    def expert_changed(self):
        """Another model than in the call before: its residuals have nothing to do with those kept so far."""

    def end_run(self):
        """Forget the run in progress, whole or not."""
        self.run = self.expert = None


class MagCache(Patch):
    """A model that computes or reuses as its schedule says. `reports` has one `RunReport` a run."""

    def __init__(self, models, host, timesteps, plan, residuals, announce, mag_ratios, payload=BlockStack, guard=None):
        self.plan, self.residuals, self.announce, self.mag_ratios = plan, residuals, announce, mag_ratios
        self.payload, self.guard = payload, guard
        super().__init__(models, host, timesteps, payload)

    def started(self, model, arguments):
        bytes_a_branch = None
        if self.host.residual_shape:
            latent = arguments[self.host.latent]
            latent = latent[0] if isinstance(latent, (list, tuple)) else latent
            if self.payload is ModelOutput:
                elements, dtype = latent.numel(), latent.dtype
            else:
                elements = int(np.prod(self.host.residual_shape(model, arguments)))
                dtype = self.host.residual_dtype(model) if self.host.residual_dtype else latent.dtype
            bytes_a_branch = elements * (self.residuals.dtype or dtype).itemsize * self.run.schedule.depth
        if self.announce:
            self.announce(plan_text(self.run.schedule, self.run.tracker.levels, self.mag_ratios, bytes_a_branch))

    def prepare(self, run, call):
        residual, self.why = None, ""
        if run.schedule.reuse[call.step]:
            residual, self.why = (
                (None, run.stopped) if run.stopped else self.residuals.predict(call, self.latent, run.schedule)
            )
        self.reusing = residual is not None
        if self.reusing:
            return self.expert.payload.replace(residual)
        if not self.guard:
            self.residuals.drop_unneeded(call, run.schedule)
        return self.expert.payload.record(self.arguments)

    def expert_changed(self):
        self.residuals.clear()

    def served(self, run, call, seconds, output):
        if self.reusing:
            self.expert.payload.restore()
            run.report.add(call, "reused", seconds)
            return
        residual = self.expert.payload.finish(output)
        run.report.add(call, "computed", seconds, self.why)
        if self.guard and not run.stopped:
            self.watch(run, call, residual)
        if self.residuals.needed_by(run.schedule, call.step) and not run.stopped:
            self.residuals.keep(call, self.latent, residual)
            run.report.peak_bytes = self.residuals.peak_bytes

    def watch(self, run, call, residual):
        """Skip nothing more in this run if the guard says so."""
        predicted, missing = self.residuals.predict(call, self.latent, run.schedule)
        if not missing:
            run.stopped = self.guard.judge(call.step, residual, predicted, run.schedule.error[call.step])
        self.residuals.drop_unneeded(call, run.schedule)

    def complete_run(self, run):
        run.report.complete = True
        self.residuals.clear()

    def end_run(self):
        super().end_run()
        self.residuals.clear()
        self.residuals.peak_bytes = 0


class Calibration(Patch):
    """A model that computes everything and measures. `mag_ratios` holds the result of the complete runs."""

    def __init__(self, models, host, timesteps, name, path, description, statistics):
        self.name, self.path, self.description = name, path, description
        self.statistics, self.mag_ratios = statistics, None
        self.plan = lambda levels: compute_all(len(levels), "the ratios were measured in this run")
        super().__init__(models, host, timesteps)

    def expert_changed(self):
        self.statistics.expert_changed()

    def started(self, model, arguments):
        if self.run.schedule.steps < 2:
            raise MagCacheError("Calibration compares neighbouring steps: run at least 2.")
        self.statistics.begin(self.run.tracker.levels)

    def prepare(self, run, call):
        self.expert.payload.record(self.arguments)

    def served(self, run, call, seconds, output):
        residual = self.expert.payload.finish()
        run.report.add(call, "computed", seconds)
        tokens = self.host.noise_tokens(self.arguments) if self.host.noise_tokens else None
        made = ModelOutput().finish(leading_tokens(output, tokens, residual.shape[1]))
        self.statistics.add(call, residual[:, :tokens], made)
        if call == Call(run.schedule.steps - 1, 0):
            self.reused_seconds = self.time_reuse(residual)

    def time_reuse(self, residual):
        """Seconds, a function, of a forward without its blocks: the least of REHEARSALS on the inputs of this call. Not
        compiled, so with torch.compile around the whole model a reused step costs at most this."""
        args, kwargs = self.inputs
        seconds = []
        for _ in range(REHEARSALS):
            self.expert.payload.replace(residual)
            stopwatch = Stopwatch(self.latent.device)
            self.expert.original(*args, **kwargs)
            seconds.append(stopwatch.stop())
            self.expert.payload.restore()
        return lambda: min(read() for read in seconds)

    def complete_run(self, run):
        run.report.complete = True
        self.statistics.finish((run.report.typical_seconds, self.reused_seconds()))
        self.mag_ratios = self.statistics.mag_ratios(self.name, **self.description)
        if self.path and is_writer():
            self.path = save_calibration(self.path, self.mag_ratios)

    def end_run(self):
        super().end_run()
        self.statistics.begin(())


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
