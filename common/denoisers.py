"""The models of a diffusers pipeline that its sampler calls at each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import MagCacheError

DENOISERS = ("transformer", "unet", "decoder", "prior")  # where a pipeline keeps its denoiser, the first that is there


@dataclass(frozen=True)
class Denoisers:
    """The models among which a sampler divides its steps, most often one. attribute: of the pipeline; boundary: noise
    level below which the second works."""

    attribute: str
    models: list[torch.nn.Module]
    boundary: float | None = None
    leads: bool = True  # of two groups, the one with which the scheduler's steps are made again


def denoisers(pipe) -> list[Denoisers]:
    """What MagCache patches in a pipeline. Two groups where each step calls two models (one without the prompt).
    Raises MagCacheError for a pipeline that has none, or no scheduler."""
    attribute = next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), torch.nn.Module)), None)
    if attribute is None or not hasattr(getattr(pipe, "scheduler", None), "timesteps"):
        raise MagCacheError(f"{type(pipe).__name__} has no transformer or U-Net with a scheduler that could be cached.")
    model, second = getattr(pipe, attribute), getattr(pipe, "transformer_2", None)
    boundary = pipe.config.get("boundary_ratio")
    if second is not None and boundary is not None:
        return [Denoisers(attribute, [model, second], boundary)]
    other = getattr(pipe, "unconditional_transformer", None)  # Ideogram 4
    others = [] if other is None else [Denoisers("unconditional_transformer", [other], leads=False)]
    return [Denoisers(attribute, [model]), *others]


def checkpoint_of(pipe, group: Denoisers) -> str:
    """Hub id or folder."""
    return str(pipe.config.get("_name_or_path") or getattr(group.models[0].config, "_name_or_path", ""))


def refuse_other_caches(model: torch.nn.Module) -> None:
    """Raises MagCacheError if another step cache works on this model."""
    name = type(model).__name__
    if getattr(model, "is_cache_enabled", False):
        raise MagCacheError(f"This {name} has a cache of diffusers enabled: call its disable_cache() first.")
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    if any(type(hook).__module__.endswith("_cache") for hook in hooks):
        raise MagCacheError(f"This {name} has hooks of another cache on its blocks: remove them first.")
