"""Which step a pipeline is at, told by its scheduler, and whether a call of the model is the pipeline's at all."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import numpy as np
import torch

from .blocks import Host
from .expert import inner_module, noise_level, patches_of
from .loop import CacheContext
from .steps import TRAIN_TIMESTEPS, close

GUIDANCE = "the pipeline's guidance"


class Clock:
    """Which step of its scheduler a pipeline is at, whatever it tells its transformer.

    Some pipelines tell it (diffusers' `cache_context`). Else a scheduler counts its steps; the few that do not (DDIM)
    are read by the timestep that the model is given.
    """

    def __init__(self, pipe, models: list[torch.nn.Module]) -> None:
        self.pipe, self.models = pipe, models
        self.source: Any = None  # the scheduler's timesteps
        self.levels = np.empty(0)  # what they are as noise levels * 1000

    def host(self, host: Host) -> Host:
        """The facts with the noise level told by the scheduler."""

        def outside(arguments):
            return not self.is_ours() or bool(host.outside and host.outside(arguments))

        return replace(host, noise_level=lambda arguments: self.level(host, arguments), outside=outside)

    def is_ours(self) -> bool:
        """Whether the call that is under way is this pipeline's: that of another one with this model, whose scheduler
        is not followed, runs as it is."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if caller is self.pipe:
                return True
            if "scheduler" in getattr(caller, "__dict__", ()):
                if any(value is model for value in vars(caller).values() for model in self.models):
                    return False
            frame = frame.f_back
        # Of no pipeline, as in a loop of one's own: that of a model with one patch.
        return all(len(patches_of(model)) < 2 for model in self.models)

    def scheduler(self):
        """The pipeline's at the beginning of a run: a user may have put in another."""
        return self.pipe.scheduler

    def guidance(self) -> dict[str, list]:
        """What the pipeline does with the outputs of a step, as far as it keeps that: numbers that a callback may
        change in the middle of a run."""
        guider = getattr(self.pipe, "guider", None)
        kept = {**vars(self.pipe), **({} if guider is None else vars(guider))}
        named = sorted(name for name in kept if "guidance" in name or name.endswith("scale"))
        return {GUIDANCE: [kept[name] for name in named if isinstance(kept[name], (int, float))]}

    def timesteps(self) -> np.ndarray:
        """One object as long as the scheduler keeps its timesteps, from high noise to low, 1000 at noise level 1."""
        source = self.pipe.scheduler.timesteps
        if source is not self.source:
            self.source, self.levels = source, falling(source)
        return self.levels

    def level(self, host: Host, arguments: dict) -> float:
        """The noise level of a call."""
        scheduler, levels = self.pipe.scheduler, self.timesteps()
        step = self.told_step()
        if step is not None or hasattr(scheduler, "step_index"):
            step = scheduler.step_index if step is None else step
            if step is None:
                begin = getattr(scheduler, "begin_index", None)
                step = self.first_step(host, arguments) if begin is None else begin
            return levels[min(step, len(levels) - 1)] / TRAIN_TIMESTEPS
        timestep = arguments[host.timestep]
        return float(timestep.max() if torch.is_tensor(timestep) else timestep) / TRAIN_TIMESTEPS

    def first_step(self, host: Host, arguments: dict) -> int:
        """Where a run begins whose scheduler was not told: by the time that the model is given, as far as the facts say
        what that is."""
        levels, (level, tolerance) = self.timesteps() / TRAIN_TIMESTEPS, noise_level(host, arguments)
        nearest = int(np.abs(levels - level).argmin())
        return nearest if close(level, levels[nearest], tolerance) else 0

    def told_step(self) -> int | None:
        """The step that the pipeline tells of; None where it tells none."""
        contexts = [vars(inner_module(model)).get("cache_context") for model in self.models]
        told = next((one.told for one in contexts if isinstance(one, CacheContext) and one.told), {})
        step, sigma, count = (told.get(name) for name in ("step_index", "sigma", "num_inference_steps"))
        steps = len(self.timesteps())
        if step is not None:  # counted from where an image-to-image run begins
            return step + (steps - count if count and count < steps else 0)
        sigmas = getattr(self.pipe.scheduler, "sigmas", None)
        if sigma is None or sigmas is None or len(sigmas) < steps:
            return None
        return int(np.abs(np.array([float(one) for one in sigmas[:steps]]) - float(sigma)).argmin())


def falling(timesteps) -> np.ndarray:
    """A scheduler's timesteps as noise levels * 1000, high to low: where they rise (time from noise to picture)
    turned round, and where they are no times of this kind (logarithms of sigma) their order alone."""
    values = np.asarray(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps, dtype=float).reshape(-1)
    if len(values) > 1 and (np.diff(values) >= 0).all():
        values = TRAIN_TIMESTEPS - values
    if len(values) and values.min() >= 0 and values.max() <= TRAIN_TIMESTEPS and (np.diff(values) <= 0).all():
        return values
    return np.linspace(TRAIN_TIMESTEPS, 0, len(values), endpoint=False)
