"""Tell which sampler step and which CFG branch a call of the model is, by the timestep that the sampler passes.

Calls at one noise level are CFG branches as long as they see the same latent; a solver's second evaluation sees another
one. Nothing is counted, so a run may start at any level, leave out guidance for a while, or break off.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .ratios import Levels

if TYPE_CHECKING:
    import torch

TRAIN_TIMESTEPS = 1000  # timestep at noise level 1, in every host's sampler


@dataclass(frozen=True)
class Call:
    """Where in a run a call is. step: index in the schedule; branch: 0 for the first call at this step (conditional), 1
    for the next, ..."""

    step: int
    branch: int


class Part(NamedTuple):
    """One conditioning's part of a model call's batch.

    key: under which its residuals are kept, the same at each step; latent: its rows; guided: whether there is
    guidance that `call` does not show, as one makes all branches (`StepTracker.in_one_call`) or each is alone.
    """

    key: Hashable
    call: Call
    latent: torch.Tensor
    guided: bool = False


class StepTracker:
    """Follows one run through its noise levels."""

    def __init__(self, levels: Levels, level: float, tolerance: float) -> None:
        """levels: every noise level that the sampler will visit, high to low; level: that of the first call, where the
        run starts (not the first of the list in image-to-image, or for a second sampler); tolerance: relative."""
        every = np.asarray(levels, dtype=float)
        self.levels = every[self.locate(every, level, tolerance) :]
        self.step, self.branch, self.level = 0, -1, level
        self.latent: torch.Tensor | None = None
        self.listed = True  # whether the last call was at one of these levels, not between two of them
        self.rows, self.twice = 0, False  # of the newest batch, and whether its first latent occurs in it twice

    @staticmethod
    def locate(levels: np.ndarray, level: float, tolerance: float) -> int:
        """The index of the step that this level belongs to."""
        nearest = int(np.abs(levels - level).argmin())
        # Not a listed level: an evaluation inside a step belongs to the step that it started from.
        return nearest if close(level, levels[nearest], tolerance) or levels[nearest] > level else max(0, nearest - 1)

    def onward(self, level: float, tolerance: float) -> int | None:
        """The next step at this level, or None. Steps are passed over only where rounding hides which came last."""
        for step in range(self.step + 1, len(self.levels)):
            if step > self.step + 1 and not close(self.levels[step - 1], self.level, tolerance):
                return None
            if close(level, self.levels[step], tolerance):
                return step
        return None

    def observe(self, level: float, latent: torch.Tensor, tolerance: float) -> Call | None:
        """Which Call this is, or None if it cannot belong to this run, so that a new run has begun."""
        here, following = self.levels[self.step], self.levels[self.step + 1 : self.step + 2]
        onward = self.onward(level, tolerance)
        repeats = close(level, self.level, tolerance) and self.latent is not None and same(latent, self.latent)
        if repeats:
            self.branch += 1
        elif self.latent is None:
            self.branch = 0
        elif onward is not None:
            self.step, self.branch = onward, 0
        elif close(level, here, tolerance) or (following[0] if len(following) else 0) < level < here:
            self.branch = 0
        else:
            return None
        self.level, self.latent = level, latent
        self.listed = close(level, self.levels[self.step], tolerance)
        return Call(self.step, self.branch)

    def in_one_call(self, latents: torch.Tensor | Sequence[torch.Tensor]) -> bool:
        """Whether the branches of guidance are one batch, because a latent occurs in it twice. Not looked at in the
        first step, where pictures of one seed have the same latent, and later only where the size of the batch changes,
        because looking waits for the GPU."""
        if self.step and len(latents) != self.rows:
            self.rows, self.twice = len(latents), any(same(latents[0], other) for other in latents[1:])
        return self.twice

    def let_go(self) -> None:
        """Release the last latent, once the run is complete."""
        if self.latent is not None:
            self.latent = self.latent.new_empty(0)


def close(a: float, b: float, tolerance: float) -> bool:
    """Whether two noise levels agree. tolerance: relative."""
    return abs(a - b) <= tolerance * max(a, b)


def same(latent: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two latents are the same: the same memory, or the same numbers."""
    if latent is other:
        return True
    if latent.shape != other.shape or latent.dtype != other.dtype:
        return False
    return latent.data_ptr() == other.data_ptr() or bool((latent == other).all())
