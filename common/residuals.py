"""What is kept between steps: the newest residuals of each branch of one run, and the prediction made of them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from .schedule import Schedule
from .steps import Part


@dataclass(frozen=True)
class Kept:
    step: int
    latent: tuple
    residual: torch.Tensor
    dtype: torch.dtype
    device: torch.device

    def as_made(self) -> torch.Tensor:
        return self.residual.to(self.device, self.dtype)


class Residuals:
    """The newest residuals (or model outputs) of each conditioning, by `Part.key`, on a device and in a dtype of choice
    (None: as the model made them). for_all: keep what predicts every later step, computed ones too (`guard.Guard`)."""

    def __init__(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None, for_all: bool = False
    ) -> None:
        self.device, self.dtype, self.for_all, self.peak_bytes = device, dtype, for_all, 0
        self.kept: dict[Hashable, list[Kept]] = {}
        self.branches = 0  # seen so far

    def keep(self, part: Part, residual: torch.Tensor) -> None:
        """Keep a residual computed for a part. It takes the place of an earlier evaluation at the same step."""
        key, call, latent = part.key, part.call, part.latent
        self.branches = max(self.branches, call.branch + 1)
        kept = Kept(
            call.step,
            signature(latent),
            residual.to(self.device or residual.device, self.dtype),
            residual.dtype,
            residual.device,
        )
        self.kept[key] = [kept, *(one for one in self.kept.get(key, []) if one.step != call.step)]
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def predict(self, part: Part, schedule: Schedule) -> tuple[torch.Tensor | None, str]:
        """(residual, "") for a part, or (None, why nothing kept belongs here).

        Residuals of the planned steps are weighed as planned; where only the newest is there, or guidance makes more
        branches than the weights are for, it is taken as it is. A residual older than planned is not used.
        """
        key, call, latent = part.key, part.call, part.latent
        anchors, kept = schedule.anchors(call.step), self.kept.get(key, [])
        if not anchors or not kept or kept[0].step < anchors[0]:
            return None, "no residual of this branch yet"
        if kept[0].latent != signature(latent):
            return None, "the latent changed its shape or device"
        kept = kept[: len(anchors)]
        as_planned = [one.step for one in kept] == anchors and all(one.latent == kept[0].latent for one in kept)
        if schedule.weights is None or not as_planned or self.branches > len(schedule.weights):
            return kept[0].as_made(), ""
        weights = schedule.weights[call.branch, call.step].tolist()
        if weights[0] == 1.0 and not any(weights[1:]):
            return kept[0].as_made(), ""
        residual = weights[0] * kept[0].as_made()
        for weight, one in zip(weights[1:], kept[1:]):
            residual.add_(one.as_made(), alpha=weight)
        return residual, ""

    def drop_unneeded(self, part: Part, schedule: Schedule) -> None:
        """Let go of a computed part's residuals that no later step takes."""
        later = {anchor for step in self.needed_by(schedule, part.call.step) for anchor in schedule.anchors(step)}
        self.kept[part.key] = [one for one in self.kept.get(part.key, []) if one.step in later]

    def needed_by(self, schedule: Schedule, step: int) -> list[int]:
        """The steps after `step` that take a residual of it or of an earlier step."""
        steps = range(schedule.steps) if self.for_all else np.flatnonzero(schedule.reuse)
        return [int(later) for later in steps if later > step and schedule.anchors(int(later))[-1] <= step]

    def clear(self) -> None:
        self.kept.clear()

    @property
    def bytes(self) -> int:
        return sum(one.residual.numel() * one.residual.element_size() for kept in self.kept.values() for one in kept)


def signature(latent: torch.Tensor) -> tuple:
    """Its dtype is no part: HunyuanVideo's first latent is float16, the others are float32, and autocast makes one of
    them."""
    return tuple(latent.shape), latent.device
