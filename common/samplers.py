"""What the corrector needs to know of a scheduler: whether its steps can be repeated, what it integrates, its noise."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# In the names of schedulers that add noise at each step.
STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM", "SASolver", "SCM", "UnCLIP", "Stochastic", "RePaint")
EULER = "euler"  # stands for the scheduler of a plain loop x += (sigma' - sigma) * output


def sigmas_of(scheduler: Any, levels: Sequence[float]) -> list[float]:
    """The scheduler's own noise levels, which may be more exact than its timesteps, if it has as many and they agree
    with `levels`; otherwise these."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > len(levels):
        own = [float(one) for one in sigmas[-len(levels) - 1 : -1]]
        if np.allclose(own, levels, atol=2e-3) and len(set(own)) == len(own):
            return own
    return [float(level) for level in levels]


def integrates_data(scheduler: Any) -> bool:
    """Whether a scheduler turns the output of a flow model into x0 and integrates that (DPM-Solver++, UniPC)."""
    config = getattr(scheduler, "config", {})
    solver = config.get("predict_x0") or config.get("algorithm_type") == "dpmsolver++"
    return bool(solver) and config.get("prediction_type") == "flow_prediction"


def why_uncorrected(scheduler: Any) -> str:
    """Why skipped steps of this scheduler cannot be corrected, or ""."""
    if scheduler is None:
        return "this sampler's steps cannot be followed"
    if scheduler == EULER:
        return ""
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    if not callable(step) or list(inspect.signature(step).parameters)[:3] != ["model_output", "timestep", "sample"]:
        return f"{name} has no step that can be repeated"
    if getattr(scheduler, "order", 1) != 1:
        return f"{name} calls the model twice a step"
    config = getattr(scheduler, "config", {})
    told = (config.get("stochastic_sampling"), "sde" in str(config.get("algorithm_type", "")))
    if any(told) or any(part in name for part in STOCHASTIC):
        return f"{name} adds noise at each step"
    return ""


def generator_states(sample: torch.Tensor, args: tuple, kwargs: dict) -> list[tuple[torch.Generator, torch.Tensor]]:
    """(generator, its state) for each generator from which a scheduler's step may draw noise, as DDIM's does with eta:
    those in its arguments, and the default ones."""
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in (*args, *kwargs.values())]
    generators = [one for values in lists for one in values if isinstance(one, torch.Generator)]
    generators.append(torch.default_generator)
    if sample.is_cuda:
        generators.append(torch.cuda.default_generators[sample.get_device()])
    return [(one, one.get_state()) for one in generators]


@contextmanager
def drawn_again(states: list[tuple[torch.Generator, torch.Tensor]]) -> Iterator[None]:
    """Inside, the generators draw the noise that followed `states` once more; afterwards they go on as if nothing had
    been drawn."""
    now = [(generator, generator.get_state()) for generator, _ in states]
    try:
        for generator, state in states:
            generator.set_state(state)
        yield
    finally:
        for generator, state in now:
            generator.set_state(state)
