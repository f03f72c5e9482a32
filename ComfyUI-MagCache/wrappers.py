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

from .common import run, tables
from .common.blocks import BlockStack
from .common.calibration import Statistics, fingerprint_of
from .common.errors import MagCacheError
from .common.expert import inner_module
from .common.hosts import host_of
from .common.planner import Target
from .common.report import plan_text
from .common.residuals import Residuals
from .common.schedule import Rule, Settings, compute_all, rule_of
from .common.steps import Call, Part
from .common.tables import calibrations_folder, load
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
            sampling = self.begin(Circumstances.of(guider, noise, sigmas, denoise_mask))
        except MagCacheError as error:
            self.say(f"MagCache is off in this run: {error}")
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        plain = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(plain)
        guider.model_options["transformer_options"][KEY] = sampling
        try:
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
            sampling.report.complete = True
            return result
        finally:
            guider.model_options = plain
            self.end(sampling)


def apply_model(executor, *args, **kwargs):
    """Wrapper around BaseModel.apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)."""
    options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
    sampling = options.get(KEY)
    return executor(*args, **kwargs) if sampling is None else sampling.call(executor, args, kwargs, options)


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


class Sampling:
    """One pass of a sampler over one model: what tells `run.Run` which step and conditioning each call is."""

    def __init__(self, circumstances, run):
        self.circumstances, self.run, self.host = circumstances, run, host_of(circumstances.model)
        self.report, self.levels, self.stacks = run.report, circumstances.levels, {}
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
        branches = options["cond_or_uncond"]
        sigma = float(options["sigmas"].flatten()[0])
        calls = [Call(self.step(sigma), branch) for branch in branches]
        parts = [Part(*part) for part in zip(keys_of(options), calls, x.chunk(len(branches)))]
        arguments = {
            "x": parts[0].latent,
            "patch_size": getattr(self.circumstances.model, "patch_size", None),
            "sigma": sigma,
        }
        call = self.run.begin(parts, stack, arguments)
        try:
            output = executor(*args, **kwargs) if call.output is None else call.output
            call.finish(output, lambda: executor(*args, **kwargs))
        except BaseException:
            call.cancel()
            raise
        return output


class Blockless:
    """Where another patch skipped or replaced the first block, a call counts as computed and nothing of it is kept."""

    def nothing_recorded(self, error):
        return "another patch skipped or replaced the first block"


class CachedRun(Blockless, run.CachedRun):
    pass


class MeasuredRun(Blockless, run.MeasuredRun):
    def outputs(self, call, output, noise_tokens, tokens):
        """The velocity: what the model itself gave, of which ComfyUI made the denoised latent `output`."""
        return [
            ((part.latent - denoised) / call.arguments["sigma"]).reshape(1, -1, 1)
            for part, denoised in zip(call.parts, output.chunk(len(call.parts)))
        ]


def keys_of(options):
    """What tells one residual of a run from another, for each part of a call's batch: the conditioning, the context
    window, and which blocks are replaced (skip-layer guidance calls the model again with the same conditioning)."""
    window = getattr(options.get("context_window"), "index_list", None)
    replaced = sorted(
        str((name, key)) for name, patches in options.get("patches_replace", {}).items() for key in patches
    )
    parts = options.get("uuids") or options["cond_or_uncond"]
    return [(part, None if window is None else tuple(window), tuple(replaced)) for part in parts]


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
        cached = CachedRun(schedule, circumstances.levels, Residuals(self.device))
        self.say(plan_text(schedule, circumstances.levels, table))
        return Sampling(circumstances, cached)

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
        return settings.plan(table, circumstances.levels, rule=self.windowed(rule, steps)), table

    def windowed(self, rule, steps):
        """The rule, with the steps outside of start_step .. end_step computed."""
        first, last = (step if step >= 0 else steps + step for step in self.window)
        outside = tuple((step, steps) for step in range(steps) if not first <= step <= last)
        return replace(rule, never_reuse=(*rule.never_reuse, *outside))

    def end(self, sampling):
        sampling.run.end()
        if sampling.report.calls:
            self.say(sampling.report.line())


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
    """Measures a model in an ordinary un-cached run. `table` and `path` are those of the last complete run."""

    def __init__(self, say):
        super().__init__(say)
        self.table = self.path = self.failure = None

    def begin(self, circumstances):
        self.table = self.path = None
        self.failure = "no complete run has been measured yet"
        try:
            noise_tokens = host_of(circumstances.model).noise_tokens
            return Sampling(circumstances, MeasuredRun(circumstances.levels, Statistics(), noise_tokens))
        except MagCacheError as error:
            self.failure = str(error)
            raise

    def end(self, sampling):
        if not sampling.report.complete:
            self.failure = "the run broke off"
            self.say("MagCache Calibration: the run broke off, nothing was written.")
            return
        try:
            sampling.run.complete()
            self.write(sampling)
        except MagCacheError as error:
            self.failure = str(error)
            self.say(f"MagCache Calibration: {error}")

    def write(self, sampling):
        about = sampling.circumstances
        model_type = about.recognised
        _, patched = fingerprints(about.patcher, about.model)
        name = f"{model_type or type(about.model).__name__.lower()}-{patched}"
        published = published_table(model_type, len(sampling.levels))
        self.table = sampling.run.statistics.table(
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
        tables.write(self.path, self.table)
        self.failure = None
        self.say(
            f"MagCache Calibration: {self.path} written; MagCache nodes take it from now on.\n{ratios_text(self.table)}"
        )


def ratios_text(table):
    return "\n".join(
        f"{branch}: {', '.join(f'{ratio:.5f}' for ratio in ratios)}" for branch, ratios in table.mag_ratios.items()
    )


def schedule_of(table):
    """What the paper's rule would make of a calibration at its own steps, for the plot."""
    return Settings(**(table.settings or UNPUBLISHED)).plan(table, table.sigmas, rule=Rule())
