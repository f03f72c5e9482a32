"""What is known of a sampler's run before its first step."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.k_diffusion.sampling
import comfy.model_sampling
import numpy as np

from .common.expert import inner_module
from .models import Signs, recognise


@dataclass(frozen=True)
class Circumstances:
    """One run.

    patcher: ComfyUI's ModelPatcher; model: the transformer in it; sigmas: of the sampler, one per step and the last
    step's end; levels: noise levels of its steps, high to low, in 0..1; latent: its shape; cfg: scale of the guidance;
    euler: whether the sampler is Euler's method on a trajectory smooth enough to be corrected; deterministic: whether
    no noise is added between its steps.
    """

    patcher: object
    model: object
    sigmas: np.ndarray
    levels: np.ndarray
    latent: tuple
    signs: Signs
    cfg: float
    euler: bool
    deterministic: bool

    @classmethod
    def of(cls, guider, noise, sampler, sigmas, denoise_mask) -> Circumstances:
        patcher = guider.model_patcher
        sampling = patcher.get_model_object("model_sampling")
        sigmas = np.asarray(sigmas.tolist(), dtype=float)
        conds = [cond for conds in guider.original_conds.values() for cond in conds]
        goes_on = sigmas[0] < 0.999 * float(getattr(sampling, "sigma_max", sigmas[0])) and not bool(noise.any())
        return cls(
            patcher,
            inner_module(patcher.get_model_object("diffusion_model")),
            sigmas,
            levels_of(sigmas[:-1], sampling),
            tuple(noise.shape),
            Signs(
                file_of(patcher),
                references=any(cond.get("reference_latents") for cond in conds),
                start_image=denoise_mask is not None or any(START_IMAGE & cond.keys() for cond in conds),
                latent=tuple(noise.shape[-2:]),
                midway=sigmas[-1] > 0 or goes_on,
            ),
            float(getattr(guider, "cfg", 1.0)),
            is_euler(sampler) and corrects(sampling),
            is_deterministic(sampler),
        )

    @property
    def recognised(self) -> tuple[str | None, str]:
        """`models.recognise`"""
        return recognise(self.model, self.signs)

    @property
    def rises(self) -> bool:
        """Whether the sampler adds noise (unsampling) instead of removing it."""
        return bool((np.diff(self.sigmas) > 0).any())

    def step(self, sigma: float) -> int:
        """The step that a noise level belongs to. A solver's evaluation inside a step belongs to the step in which it
        started."""
        return max(0, int((self.sigmas[:-1] >= sigma * (1 - SIGMA_TOLERANCE)).sum()) - 1)


SIGMA_TOLERANCE = 1e-4  # relative, for samplers that compute with sigmas in float32
UNEVEN = ("V_PREDICTION", "V_PREDICTION_DDPM", "X0", "IMG_TO_IMG_FLOW")  # kinds of models
STOCHASTIC = ("ancestral", "sde", "ddpm", "lcm", "seeds", "sa_solver")  # in the names of samplers
START_IMAGE = {"concat_latent_image", "guiding_frame_index", "ref_latent"}  # conditionings that hold a first frame


def levels_of(sigmas: np.ndarray, sampling) -> np.ndarray:
    """Noise levels in 0..1: a flow's sigmas as they are, others (0 to 14.6 in SDXL) as the share of noise in x."""
    return sigmas if isinstance(sampling, comfy.model_sampling.CONST) else sigmas / (1 + sigmas)


def is_euler(sampler) -> bool:
    function = getattr(sampler, "sampler_function", None)
    churn = getattr(sampler, "extra_options", {}).get("s_churn", 0)
    return function is comfy.k_diffusion.sampling.sample_euler and not churn


def corrects(sampling) -> bool:
    """Whether the direction (x - denoised) / sigma of a model changes smoothly from step to step: it does for flows and
    for models that predict noise, but not for those that predict velocities at large sigmas, or pictures."""
    kinds = [getattr(comfy.model_sampling, name, ()) for name in UNEVEN]
    return not isinstance(sampling, tuple(kind for kind in kinds if kind))


def is_deterministic(sampler) -> bool:
    """Whether no noise is added between the steps, as far as the sampler's name tells."""
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    churn = getattr(sampler, "extra_options", {}).get("s_churn", 0)
    return not churn and not any(part in name for part in STOCHASTIC)


def file_of(patcher) -> str:
    """The path that the loader gave the model, where ComfyUI remembers it."""
    arguments = (getattr(patcher, "cached_patcher_init", None) or ((), ()))[1]
    return next((str(value) for value in arguments if isinstance(value, str)), "")
