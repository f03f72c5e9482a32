"""What MagCache knows of transformer classes: the facts (`blocks.Host`) of each, by its package and class name."""

from __future__ import annotations

from typing import Any

from ..blocks import Host
from ..errors import MagCacheError
from .checkouts import CHECKOUTS
from .comfyui import COMFYUI
from .diffusers import DIFFUSERS

# By exact class: a subclass may run its blocks in another way.
HOSTS: dict[str, Host] = {**CHECKOUTS, **COMFYUI, **DIFFUSERS}


def class_name(model: Any) -> str:
    """The key of a model in `HOSTS`: its package, a dot, and its class. For a subclass of a known class, as PyTorch's
    `fully_shard` makes, the key of the known one."""
    names = [f"{one.__module__.partition('.')[0]}.{one.__name__}" for one in type(model).__mro__]
    return next((name for name in names if name in HOSTS), names[0])


def host_of(model: Any) -> Host:
    """The facts of a model's class. Raises MagCacheError for a class that MagCache does not know."""
    if class_name(model) not in HOSTS:
        raise MagCacheError(
            f"MagCache does not know the model class {type(model).__name__}: add its facts to common/hosts "
            "(docs/design.md says what each is)."
        )
    return HOSTS[class_name(model)]


TIMES = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma", "vision_timesteps")


def output_host(model_name: str, names: list[str], why: str = "its class is not described") -> Host:
    """Facts that suffice to predict a model's output. names: arguments of its forward, the latent first; why: reason
    why no more is known. Raises MagCacheError for a forward without a timestep."""
    timestep = next((name for name in names if name in TIMES), None)
    if timestep is None:
        raise MagCacheError(f"{model_name} gets no timestep, so MagCache cannot follow its sampler.")
    return Host(blocks=(), latent=names[0], timestep=timestep, why_output=why)
