"""MagCache on ComfyUI's wrapper interface.

Around `outer_sample` a run is planned and, whatever happens, forgotten. Around `apply_model`, which surrounds
everything that runs the transformer (a module that torch.compile made included), each call is told its step by the
sampler's sigma and computes or reuses. Nothing stays on the model, and no forward is copied.
"""

import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

import comfy.model_patcher
import comfyui_version
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP

from .common import tables
from .common.blocks import BlockStack
from .common.calibration import Statistics, fingerprint_of
from .common.errors import MagCacheError
from .common.hosts import host_of
from .common.patch import REHEARSALS, inner_module
from .common.planner import Target
from .common.report import RunReport, plan_text
from .common.residuals import Residuals
from .common.schedule import Rule, Settings, compute_all, magcache_schedule, rule_of
from .common.steps import Call
from .common.tables import calibrations_folder, load
from .common.timing import Stopwatch
from .models import MODEL_TYPES, recognise, require_class

KEY = "magcache"
UNPUBLISHED = {
    "magcache_thresh": 0.06,
    "magcache_K": 2,
    "retention_ratio": 0.2,
}  # of a model for which none were published
SIGMA_TOLERANCE = 1e-4  # relative, for samplers that compute with sigmas in float32


class Patch:
    """Wrappers of one node, put on a clone of a model. A second MagCache node in the same chain takes the first one's
    place."""

    def __init__(self, say):
        """say: shows a text on the node and on the console."""
        self.say = say

    def on(self, patcher):
        patched = patcher.clone()
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
            (WrappersMP.APPLY_MODEL, apply_model),
        ):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return patched

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        guider = executor.class_obj
        try:
            run = self.begin(Circumstances.of(guider, noise, sigmas, denoise_mask))
        except MagCacheError as error:
            self.say(f"MagCache is off in this run: {error}")
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        plain = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(plain)
        guider.model_options["transformer_options"][KEY] = run
        try:
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
            run.report.complete = True
            return result
        finally:
            guider.model_options = plain
            self.end(run)


def apply_model(executor, *args, **kwargs):
    """Wrapper around BaseModel.apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)."""
    options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
    run = options.get(KEY)
    return executor(*args, **kwargs) if run is None else run.call(executor, args, kwargs, options)


def calc_cond_batch(executor, model, conds, *args, **kwargs):
    """A prompt without an area is copied for each area of the other branch, with its id: make the ids differ."""
    return executor(model, [branch and [identified(cond) for cond in branch] for branch in conds], *args, **kwargs)


def identified(cond):
    area = cond.get("area")
    return {**cond, "uuid": uuid.uuid5(cond["uuid"], str(area))} if area is not None and "uuid" in cond else cond


@dataclass(frozen=True)
class Circumstances:
    """What is known of a run before it begins. levels: its noise levels; to_the_end: whether it leaves no noise."""

    patcher: object
    model: object
    levels: np.ndarray
    to_the_end: bool
    latent: tuple
    start_image: bool
    references: bool
    cfg: float

    @classmethod
    def of(cls, guider, noise, sigmas, denoise_mask):
        patcher = guider.model_patcher
        levels = np.asarray(sigmas.tolist(), dtype=float)
        conds = [cond for conds in guider.original_conds.values() for cond in conds]
        return cls(
            patcher,
            inner_module(patcher.get_model_object("diffusion_model")),
            levels[:-1],
            levels[-1] == 0,
            tuple(noise.shape),
            denoise_mask is not None,
            any(cond.get("reference_latents") for cond in conds),
            getattr(guider, "cfg", 1.0),
        )

    @property
    def recognised(self):
        return recognise(self.model, file_of(self.patcher), self.references, self.start_image, self.latent[-2:])


def file_of(patcher):
    """The path that the loader gave the model, where ComfyUI remembers it."""
    arguments = (getattr(patcher, "cached_patcher_init", None) or ((), ()))[1]
    return next((str(value) for value in arguments if isinstance(value, str)), "")


class Run:
    """One pass of a sampler over one model."""

    def __init__(self, circumstances, schedule):
        self.circumstances, self.levels, self.schedule = circumstances, circumstances.levels, schedule
        self.host, self.stacks = host_of(circumstances.model), {}
        self.report = RunReport(schedule, self.levels.tolist())
        self.stack_of(circumstances.model)  # raises if this version of the class is not known

    def stack_of(self, model):
        """The block stack of a model; with several GPUs each has a model of its own."""
        if id(model) not in self.stacks:
            try:
                self.stacks[id(model)] = BlockStack(model, self.host)
            except MagCacheError:
                name = type(model).__name__
                raise MagCacheError(f"in this version of ComfyUI {name} is not built as MagCache knows it.") from None
        return self.stacks[id(model)]

    def step(self, sigma):
        """The step that a noise level belongs to: a solver's evaluation inside a step counts to the step it started
        from."""
        return max(0, int((self.levels >= sigma * (1 - SIGMA_TOLERANCE)).sum()) - 1)

    def call(self, executor, args, kwargs, options):
        x, stack = args[0], self.stack_of(inner_module(executor.class_obj.diffusion_model))
        sigma, branches = float(options["sigmas"].flatten()[0]), options["cond_or_uncond"]
        calls = [Call(self.step(sigma), branch) for branch in branches]
        parts = list(zip(keys_of(options), calls, x.chunk(len(branches))))
        residual, why = self.reused(parts)
        stopwatch = Stopwatch(x.device)
        if residual is not None:
            output = run_with(stack, residual, executor, args, kwargs)
            self.report.add(calls[0], "reused", stopwatch.stop())
            return output
        self.prepare(parts)
        try:
            stack.record()
            output = executor(*args, **kwargs)
            seconds, residual = stopwatch.stop(), self.made(stack)
        finally:
            stack.restore()
        if residual is None:
            why = "another patch skipped or replaced the first block"
        else:
            self.keep(parts, residual, output, sigma)
            if calls[0].step == self.schedule.steps - 1:
                self.ending(lambda: run_with(stack, residual, executor, args, kwargs), x.device)
        self.report.add(calls[0], "computed", seconds, why)
        return output

    @staticmethod
    def made(stack):
        try:
            return stack.finish()
        except MagCacheError:
            return None

    def reused(self, parts):
        """(residual of the whole batch, ""), or (None, why it has to be computed); parts: (key, call, latent) of each
        part of the batch."""
        return None, ""

    def prepare(self, parts):
        """Before a computed call."""

    def keep(self, parts, residual, output, sigma):
        """After a computed call. residual: (batch, tokens, width); output: the denoised latent that ComfyUI made at
        this noise level."""

    def ending(self, rehearse, device):
        """After a computed call at the last step. rehearse: makes the same call again, without its blocks."""


def run_with(stack, residual, executor, args, kwargs):
    try:
        stack.replace(residual)
        return executor(*args, **kwargs)
    finally:
        stack.restore()


def keys_of(options):
    """What tells one residual of a run from another, for each part of a call's batch: the conditioning, the context
    window, and which blocks are replaced (skip-layer guidance calls the model again with the same conditioning)."""
    window = getattr(options.get("context_window"), "index_list", None)
    replaced = sorted(
        str((name, key)) for name, patches in options.get("patches_replace", {}).items() for key in patches
    )
    parts = options.get("uuids") or options["cond_or_uncond"]
    return [(part, None if window is None else tuple(window), tuple(replaced)) for part in parts]


class CachedRun(Run):
    """Reuses residuals where the schedule says so, and only those of this run, conditioning, window, shape and
    dtype."""

    def __init__(self, circumstances, schedule, device):
        super().__init__(circumstances, schedule)
        self.device, self.residuals = device, {}

    def reused(self, parts):
        if not self.schedule.reuse[parts[0][1].step]:
            return None, ""
        predicted = []
        for key, call, latent in parts:
            residual, why = self.of(key).predict(call, latent, self.schedule)
            if residual is None:
                return None, why
            predicted.append(residual)
        return predicted[0] if len(predicted) == 1 else torch.cat(predicted), ""

    def prepare(self, parts):
        for key, call, _ in parts:
            self.of(key).drop_unneeded(call, self.schedule)

    def keep(self, parts, residual, output, sigma):
        for (key, call, latent), part in zip(parts, residual.chunk(len(parts))):
            if self.of(key).needed_by(self.schedule, call.step):
                self.of(key).keep(call, latent, part)
        self.report.peak_bytes = max(self.report.peak_bytes, sum(kept.bytes for kept in self.residuals.values()))

    def of(self, key):
        return self.residuals.setdefault(key, Residuals(self.device))


class MeasuredRun(Run):
    """Computes everything and measures the residuals of the first conditioning of each branch."""

    def __init__(self, circumstances):
        super().__init__(circumstances, compute_all(len(circumstances.levels)))
        self.statistics, self.first, self.reused_seconds = Statistics(), {}, None
        self.statistics.begin(self.levels)

    def keep(self, parts, residual, output, sigma):
        count = len(parts)
        for (key, call, latent), part, denoised in zip(parts, residual.chunk(count), output.chunk(count)):
            if self.first.setdefault(call.branch, key) == key:
                forward = {"x": latent, "patch_size": self.circumstances.model.patch_size}
                tokens = self.host.noise_tokens(forward) if self.host.noise_tokens else None
                velocity = (latent - denoised) / sigma  # what the model itself gave
                self.statistics.add(call, part[:, :tokens], velocity.reshape(1, -1, 1))

    def ending(self, rehearse, device):
        if self.reused_seconds is None:
            seconds = []
            for _ in range(REHEARSALS):
                stopwatch = Stopwatch(device)
                rehearse()
                seconds.append(stopwatch.stop())
            self.reused_seconds = min(read() for read in seconds)

    def finish(self):
        self.statistics.finish((self.report.typical_seconds, self.reused_seconds))


class MagCache(Patch):
    """Caching with the settings of one node."""

    def __init__(
        self, say, model_type="auto", thresholds=(), start_step=0, end_step=-1, speedup=0.0, device=None, mag_ratios=""
    ):
        """thresholds: {name: value} of the settings that were given; the others are the recommended ones.
        start_step, end_step: first and last step that may be reused, counted from the end where negative.
        speedup: plan for it (`planner.Target`; 0: off), within magcache_K and retention_ratio where given.
        device: where residuals are kept (None: the model's).
        mag_ratios: preset or file (empty: found for the model)."""
        super().__init__(say)
        self.model_type, self.thresholds, self.window = model_type, dict(thresholds), (start_step, end_step)
        self.speedup, self.device, self.table = speedup, device, named_table(mag_ratios) if mag_ratios else None
        Settings(**{**UNPUBLISHED, **self.thresholds})  # bad ones are refused here, before anything is rendered
        if speedup:
            Target(magcache_speedup=speedup)
            if self.window != (0, -1):
                raise MagCacheError(
                    "start_step and end_step go with the thresholds: leave them at 0 and -1 with speedup."
                )

    def begin(self, circumstances):
        schedule, table = self.plan(circumstances)
        run = CachedRun(circumstances, schedule, self.device)
        text = plan_text(schedule, circumstances.levels, table).splitlines()
        self.say("\n".join(line for line in text if "--" not in line))  # which names a flag of the scripts
        return run

    def plan(self, circumstances):
        host_of(circumstances.model)
        model_type = circumstances.recognised if self.model_type == "auto" else self.model_type
        if model_type:
            require_class(model_type, circumstances.model)
        published = published_table(model_type, len(circumstances.levels))
        table = self.table or own_table(circumstances.patcher, circumstances.model, self.say) or published
        if table is None:
            raise MagCacheError(
                f"no magnitude ratios are known for this {type(circumstances.model).__name__}: run it once "
                "with the node MagCache Calibration in the place of this one."
            )
        if self.speedup:
            caps = {name: self.thresholds.get(name) for name in ("magcache_K", "retention_ratio")}
            return Target(magcache_speedup=self.speedup, **caps).plan(table, circumstances.levels), table
        recommended = table.settings or (published.settings if published else UNPUBLISHED)
        settings, rule = Settings(**{**recommended, **self.thresholds}), rule_of(table)
        steps = len(circumstances.levels)
        if rule.experts == "last" and not circumstances.to_the_end:
            return replace(
                compute_all(steps), settings=settings, why_none="the high-noise expert of this model is not cached"
            ), table
        return magcache_schedule(table.at(circumstances.levels), settings, self.windowed(rule, steps)), table

    def windowed(self, rule, steps):
        """The rule, with the steps outside of start_step .. end_step computed."""
        first, last = (step if step >= 0 else steps + step for step in self.window)
        outside = tuple((step, steps) for step in range(steps) if not first <= step <= last)
        return replace(rule, never_reuse=(*rule.never_reuse, *outside))

    def end(self, run):
        run.residuals.clear()
        if run.report.calls:
            self.say(run.report.line())


def named_table(name):
    if name.endswith(".json") and not Path(name).is_file():
        raise MagCacheError(
            f"mag_ratios: there is no calibration file {name}; the node MagCache Calibration makes one."
        )
    return load(name)


def published_table(model_type, steps):
    """The preset of a model type whose number of steps is nearest, or None."""
    tables = [load(name) for name in MODEL_TYPES[model_type][1]] if model_type else []
    return min(tables, key=lambda table: abs(table.steps - steps), default=None)


def own_table(patcher, model, say):
    """The calibration of this model on this machine: with its LoRAs, else without them, else None."""
    if not any(calibrations_folder().glob("*.json")):
        return None
    try:
        plain, patched = fingerprints(patcher, model)
    except MagCacheError as error:
        return say(f"MagCache looks for no calibration: {error}")
    table = tables.find("", patched)
    if table is None and plain != patched:
        table = tables.find("", plain)
        if table is not None:
            say(f"MagCache: {table.name} was measured without the LoRAs of this model.")
    return table


def fingerprints(patcher, model):
    """Fingerprints of the weights as they were loaded from the file, without and with the patches (LoRAs) on them."""
    backup = getattr(patcher, "backup", {})  # of weights that a patch was added to in place
    weights = [
        (name, backup[f"diffusion_model.{name}"].weight if f"diffusion_model.{name}" in backup else weight)
        for name, weight in model.named_parameters()
    ]
    patches = [
        (f"{name}[{index}] * {patch[0]}.{number}", tensor)
        for name, patches in patcher.patches.items()
        for index, patch in enumerate(patches)
        for number, tensor in enumerate(tensors_in(patch[1]))
    ]
    try:
        plain = fingerprint_of(weights)
        return plain, fingerprint_of(weights + patches) if patches else plain
    except (NotImplementedError, RuntimeError, TypeError) as error:  # of a loader's own kind of tensor
        raise MagCacheError(f"the weights of this model cannot be read ({error}).") from None


def tensors_in(patch):
    """The tensors of one weight patch, in whatever adapter it comes."""
    if torch.is_tensor(patch):
        return [patch]
    parts = getattr(patch, "weights", patch)
    return [tensor for part in parts for tensor in tensors_in(part)] if isinstance(parts, (tuple, list)) else []


class Calibration(Patch):
    """Measures a model in an ordinary un-cached run. `mag_ratios` and `path` are those of the last complete run."""

    def __init__(self, say):
        super().__init__(say)
        self.mag_ratios = self.path = self.failure = None

    def begin(self, circumstances):
        self.mag_ratios = self.path = None
        self.failure = "no complete run has been measured yet"
        try:
            if len(circumstances.levels) < 2:
                raise MagCacheError("calibration compares neighbouring steps: sample at least 2.")
            return MeasuredRun(circumstances)
        except MagCacheError as error:
            self.failure = str(error)
            raise

    def end(self, run):
        if not run.report.complete:
            self.failure = "the run broke off"
            self.say("MagCache Calibration: the run broke off, nothing was written.")
            return
        try:
            run.finish()
            self.write(run)
        except MagCacheError as error:
            self.failure = str(error)
            self.say(f"MagCache Calibration: {error}")

    def write(self, run):
        about = run.circumstances
        model_type = about.recognised
        _, patched = fingerprints(about.patcher, about.model)
        name = f"{model_type or type(about.model).__name__.lower()}-{patched}"
        published = published_table(model_type, len(run.levels))
        self.mag_ratios = run.statistics.mag_ratios(
            name,
            settings=published.settings if published else {},
            sampler={"guidance_scale": float(about.cfg)},
            provenance={
                "fingerprint": patched,
                "host": f"ComfyUI {comfyui_version.__version__}",
                "model": file_of(about.patcher),
                "latent": list(about.latent),
                "weight_patches": len(about.patcher.patches),
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
        )
        self.path = calibrations_folder() / f"{name}.json"
        tables.write(self.path, self.mag_ratios)
        self.failure = None
        self.say(
            f"MagCache Calibration: {self.path} written; MagCache nodes take it from now on.\n"
            f"{ratios_text(self.mag_ratios)}"
        )


def ratios_text(mag_ratios):
    return "\n".join(
        f"{branch}: {', '.join(f'{ratio:.5f}' for ratio in ratios)}" for branch, ratios in mag_ratios.mag_ratios.items()
    )


def schedule_of(mag_ratios):
    """What the paper's rule would make of a calibration at its own steps, for the plot."""
    settings = Settings(**(mag_ratios.settings or UNPUBLISHED))
    return magcache_schedule(mag_ratios.at(mag_ratios.sigmas), settings, Rule())
