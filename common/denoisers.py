"""The models of a diffusers pipeline that its sampler calls at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import MagCacheError

DENOISERS = ("transformer", "unet", "decoder", "prior")  # attributes where a pipeline may keep its denoiser


@dataclass(frozen=True)
class Denoisers:
    """The models among which a sampler divides its steps, usually one.

    attribute: of the pipeline; boundary: the noise level below which the second model works; leads: whether the
    scheduler's steps are corrected by this group's calls, where there are two groups.
    """

    attribute: str
    models: list[torch.nn.Module]
    boundary: float | None = None
    leads: bool = True


def denoisers(pipe: Any) -> list[Denoisers]:
    """What MagCache patches in a pipeline; two groups if each step calls two models (one of them without the prompt).
    Raises MagCacheError for a pipeline without a denoiser or a scheduler."""
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


def checkpoint_of(pipe: Any, group: Denoisers) -> str:
    """The hub id or folder that a denoiser was loaded from, "" if it is not known."""
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
