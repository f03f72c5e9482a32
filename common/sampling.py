"""One sampler's run, and which call of it is under way."""

from __future__ import annotations

from typing import Any

import torch

from .conditioning import Conditionings
from .run import Run
from .steps import Call, Part, StepTracker, close

BETWEEN = "the noise level is not one of the sampler's timesteps"


class Sampling:
    """A sampler's run, and how far it is.

    timesteps: the sampler's, whose identity tells one run from the next; keys: of the calls so far, by step; expert:
    the `expert.Expert` called last (None before the first call).
    """

    def __init__(self, timesteps: Any, tracker: StepTracker, run: Run, conditionings: Conditionings) -> None:
        self.timesteps, self.tracker, self.run, self.conditionings = timesteps, tracker, run, conditionings
        self.keys: dict[int, set] = {}
        self.expert: Any = None

    def part(self, call: Call, latent: torch.Tensor, latents: Any, arguments: dict) -> tuple[Part, str]:
        """(what a call is, why it must compute or ""). latents: of the whole batch; arguments: of the forward, by
        name."""
        first_level = close(self.tracker.level, self.tracker.levels[0], 1e-6)
        key, why = self.conditionings.key_of(call, first_level, arguments)
        self.keys.setdefault(call.step, set()).add(key)
        if self.run.measures:  # all prompts of a run are measured as one
            key = key[1:]
        part = Part(key, call, latent, self.tracker.in_one_call(latents))
        return part, why if self.tracker.listed else BETWEEN

    def calls_at(self, step: int) -> int:
        return len(self.keys.get(step, ()))

    @property
    def last_step(self) -> int:
        return self.run.schedule.steps - 1
