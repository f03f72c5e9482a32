"""Tell which step a pipeline is at by its scheduler, and whether a call of the model is the pipeline's at all."""

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
    """Tells which step of its scheduler a pipeline is at, whatever time it passes to its transformer.

    Some pipelines say so themselves (diffusers' `cache_context`). Otherwise the scheduler counts its steps; for the few
    that do not (DDIM), the timestep that the model is given decides.
    """

    def __init__(self, pipe: Any, models: list[torch.nn.Module]) -> None:
        self.pipe, self.models = pipe, models
        self.source: tuple[Any, Any] = (None, None)  # the scheduler's timesteps, and the pipeline's `denoising_end`
        self.levels = np.empty(0)  # the timesteps as noise levels * 1000

    def host(self, host: Host) -> Host:
        """The facts, with the noise level told by the scheduler and calls of other pipelines left alone."""

        def outside(arguments: dict) -> bool:
            return not self.is_ours() or bool(host.outside and host.outside(arguments))

        return replace(host, noise_level=lambda arguments: self.level(host, arguments), outside=outside)

    def is_ours(self) -> bool:
        """Whether the call under way comes from this pipeline, by the call stack. A call from another pipeline that
        shares the model runs as it is, because that one's scheduler is not followed."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if caller is self.pipe:
                return True
            if "scheduler" in getattr(caller, "__dict__", ()):
                if any(value is model for value in vars(caller).values() for model in self.models):
                    return False
            frame = frame.f_back
        # From no pipeline, as in a user's own loop: ours if the model has one patch.
        return all(len(patches_of(model)) < 2 for model in self.models)

    def scheduler(self) -> Any:
        """The pipeline's scheduler, asked at the beginning of each run: a user may have replaced it."""
        return self.pipe.scheduler

    def guidance(self) -> dict[str, list]:
        """The guidance scales and other such numbers that the pipeline keeps: a callback may change them in the middle
        of a run."""
        guider = getattr(self.pipe, "guider", None)
        kept = {**vars(self.pipe), **({} if guider is None else vars(guider))}
        named = sorted(name for name in kept if "guidance" in name or name.endswith("scale"))
        return {GUIDANCE: [kept[name] for name in named if isinstance(kept[name], (int, float))]}

    def timesteps(self) -> np.ndarray:
        """The timesteps of a run from high noise to low, 1000 being noise level 1: the scheduler's, without those that
        SDXL's `denoising_end` leaves to a refiner. The same object for as long as the scheduler keeps its own."""
        timesteps, end = self.pipe.scheduler.timesteps, getattr(self.pipe, "_denoising_end", None)
        if timesteps is not self.source[0] or end != self.source[1]:
            self.source, self.levels = (timesteps, end), falling(timesteps)
            if end:
                self.levels = self.levels[self.levels >= round(TRAIN_TIMESTEPS * (1 - end))]
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
        """The step where a run begins if the scheduler was not told: by the noise level that the model is given, as far
        as the facts tell it."""
        levels, (level, tolerance) = self.timesteps() / TRAIN_TIMESTEPS, noise_level(host, arguments)
        nearest = int(np.abs(levels - level).argmin())
        return nearest if close(level, levels[nearest], tolerance) else 0

    def told_step(self) -> int | None:
        """The step that the pipeline states in its `cache_context`; None if it states none."""
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


def falling(timesteps: Any) -> np.ndarray:
    """A scheduler's timesteps as noise levels * 1000, high to low. Rising ones (time from noise to picture) are turned
    round; of values on another scale (logarithms of sigma) only the order is kept."""
    values = np.asarray(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps, dtype=float).reshape(-1)
    if len(values) > 1 and (np.diff(values) >= 0).all():
        values = TRAIN_TIMESTEPS - values
    if len(values) and values.min() >= 0 and values.max() <= TRAIN_TIMESTEPS and (np.diff(values) <= 0).all():
        return values
    return np.linspace(TRAIN_TIMESTEPS, 0, len(values), endpoint=False)
