"""MagCache on ComfyUI's wrapper interface.

The wrapper of `outer_sample` plans a run and, whatever happens, forgets it afterwards. That of `apply_model`, which
surrounds everything that runs the transformer (also a compiled one), tells each call's step by the sampler's sigma, and
computes or reuses. Nothing stays on the model, and no forward is copied.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable

import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from .circumstances import Circumstances
from .common.errors import MagCacheError
from .controls import deferred
from .passes import Pass

KEY = "magcache"


class NodePatch:
    """The wrappers of one node, put on a clone of a model. A second MagCache node in the same chain replaces those of
    the first."""

    def __init__(self, say: Callable):
        """say: (text, picture="", begin=False) shows a text on the node and on the console."""
        self.say = say

    def on(self, patcher):
        patched = patcher.clone()
        for kind, wrapper in (
            (WrappersMP.OUTER_SAMPLE, self.outer_sample),
            (WrappersMP.PREDICT_NOISE, predict_noise),
            (WrappersMP.CALC_COND_BATCH, calc_cond_batch),
            (WrappersMP.APPLY_MODEL, apply_model),
        ):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, wrapper)
        return patched

    def outer_sample(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
        guider = executor.class_obj
        if len(sigmas) < 2:  # no step: what is left where sigmas are split at their end
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        try:
            made = self.begin(Circumstances.of(guider, noise, sampler, sigmas, denoise_mask))
        except MagCacheError as error:
            self.say(f"MagCache is off in this run: {error}", begin=True)
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        plain = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(plain)
        guider.model_options["transformer_options"][KEY] = made
        try:
            result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
            self.complete(made)
            return result
        finally:
            guider.model_options = plain
            made.run.end()
            self.end(made)

    def begin(self, about: Circumstances) -> Pass:
        """The Pass of a run that begins. Raises MagCacheError if it cannot be cached or measured."""
        raise NotImplementedError

    def complete(self, made: Pass):
        """The sampler made every step."""
        made.run.complete()

    def end(self, made: Pass):
        """After a run, whole or broken off."""


def apply_model(executor, *args, **kwargs):
    """Wrapper around BaseModel.apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)."""
    options = args[5] if len(args) > 5 else kwargs.get("transformer_options", {})
    made = options.get(KEY)
    return executor(*args, **kwargs) if made is None else made.call(executor, args, kwargs, options)


def predict_noise(executor, x, timestep, model_options=None, *args, **kwargs):
    """Wrapper around an evaluation of the guider, which calls the model once or more."""
    model_options = model_options or {}
    made = model_options.get("transformer_options", {}).get(KEY)
    if made is not None:
        made.seen.clear()
        made.guider = executor.class_obj
    return executor(x, timestep, model_options, *args, **kwargs)


def calc_cond_batch(executor, model, conds, x, timestep, model_options, *args, **kwargs):
    """Wrapper around the calls of one evaluation. ComfyUI copies a prompt without an area, and its id, for each area of
    the
    other branch: make the ids differ. And defer control nets until it is known whether the call computes."""
    made = model_options.get("transformer_options", {}).get(KEY)
    conds = [branch and [identified(cond) for cond in branch] for branch in conds]
    if made is not None:
        conds = deferred(conds, made.controls)
        made.expect(model, conds, timestep, model_options)
    return executor(model, conds, x, timestep, model_options, *args, **kwargs)


def identified(cond):
    area = cond.get("area")
    return {**cond, "uuid": uuid.uuid5(cond["uuid"], str(area))} if area is not None and "uuid" in cond else cond
