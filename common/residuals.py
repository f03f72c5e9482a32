"""What is kept between steps: the newest residuals of each conditioning of one run, and the predictions made from
them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch

from .schedule import Schedule
from .steps import Part


@dataclass(frozen=True)
class Kept:
    """A residual that is kept. latent: `signature` of the latent that it belongs to; dtype, device: with which the
    model made it."""

    step: int
    latent: tuple
    residual: torch.Tensor
    dtype: torch.dtype
    device: torch.device

    def as_made(self) -> torch.Tensor:
        """The residual on the device and in the dtype of the model."""
        return self.residual.to(self.device, self.dtype)


class Residuals:
    """The newest residuals (or model outputs) of each conditioning, by `Part.key`.

    device, dtype: where and in which type they are kept (None: as the model made them); for_all: keep what predicts any
    later step, not only the reused ones, because a `guard.Guard` compares the computed ones.
    """

    def __init__(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None, for_all: bool = False
    ) -> None:
        self.device, self.dtype, self.for_all, self.peak_bytes = device, dtype, for_all, 0
        self.kept: dict[Hashable, list[Kept]] = {}
        self.branches = 0  # most branches that a step had so far

    def keep(self, part: Part, residual: torch.Tensor) -> None:
        """Keep the residual that was computed for a part. It replaces that of an earlier evaluation at the same
        step."""
        key, call, latent = part.key, part.call, part.latent
        self.branches = max(self.branches, call.branch + 1)
        kept = Kept(
            call.step,
            signature(latent),
            residual.detach().to(self.device or residual.device, self.dtype),
            residual.dtype,
            residual.device,
        )
        self.kept[key] = [kept, *(one for one in self.kept.get(key, []) if one.step != call.step)]
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def predict(self, part: Part, schedule: Schedule) -> tuple[torch.Tensor | None, str]:
        """(predicted residual, "") for a part, or (None, why none of the kept residuals fits).

        Residuals of the planned steps are weighed as planned. Where only the newest is there, or the run has more
        branches than there are weights for, the newest is taken as it is. A residual older than planned is not used.
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
        """Drop the residuals of a part, about to be computed, from which no later step is predicted."""
        later = {anchor for step in self.needed_by(schedule, part.call.step) for anchor in schedule.anchors(step)}
        self.kept[part.key] = [one for one in self.kept.get(part.key, []) if one.step in later]

    def needed_by(self, schedule: Schedule, step: int) -> list[int]:
        """The steps after `step` that are predicted from a residual of this step or an earlier one."""
        steps = range(schedule.steps) if self.for_all else np.flatnonzero(schedule.reuse)
        return [int(later) for later in steps if later > step and schedule.anchors(int(later))[-1] <= step]

    def clear(self) -> None:
        self.kept.clear()

    @property
    def bytes(self) -> int:
        return sum(one.residual.numel() * one.residual.element_size() for kept in self.kept.values() for one in kept)


def signature(latent: torch.Tensor) -> tuple:
    """(shape, device) of a latent. Not its dtype: HunyuanVideo's first latent is float16, its others are float32, and
    autocast makes them alike."""
    return tuple(latent.shape), latent.device
