"""What is kept between steps: the newest residuals of each branch of one run, and the prediction made of them."""
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Kept:
    step: int
    latent: tuple
    residual: torch.Tensor
    dtype: torch.dtype
    device: torch.device


class Residuals:
    """The newest residuals of each branch, on a device and in a dtype of choice (None: as the model made them)."""

    def __init__(self, device=None, dtype=None):
        self.device, self.dtype, self.kept, self.peak_bytes = device, dtype, {}, 0

    def keep(self, call, latent, residual):
        """Keep a residual (batch, tokens, width) computed at `call` for a latent of this shape and device."""
        kept = Kept(call.step, signature(latent), residual.to(self.device or residual.device, self.dtype), residual.dtype,
                    residual.device)
        self.kept.setdefault(call.branch, []).insert(0, kept)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def predict(self, call, latent, schedule):
        """(residual, "") for a reused call, or (None, why nothing kept belongs here).

        Two residuals of the planned steps are weighed as planned; where only the newest is there, it is taken as it is. A
        residual older than planned is not used.
        """
        anchors, kept = schedule.anchors(call.step), self.kept.get(call.branch, [])
        if not kept or kept[0].step < anchors[0]:
            return None, "no residual of this branch yet"
        if kept[0].latent != signature(latent):
            return None, "the latent changed its shape or device"
        newest = kept[0]
        residual = newest.residual.to(newest.device, newest.dtype)
        if len(anchors) == 2 and [one.step for one in kept] == anchors and kept[1].latent == newest.latent:
            a, b = schedule.weights[min(call.branch, len(schedule.weights) - 1), call.step].tolist()
            residual = (a * residual).add_(kept[1].residual.to(newest.device, newest.dtype), alpha=b)
        return residual, ""

    def drop_unneeded(self, call, schedule):
        """Let go of this branch's residuals that no step after the computed `call` takes."""
        later = {anchor for step in needed_by(schedule, call.step) for anchor in schedule.anchors(step)}
        self.kept[call.branch] = [one for one in self.kept.get(call.branch, []) if one.step in later]

    def clear(self):
        self.kept.clear()

    @property
    def bytes(self):
        return sum(one.residual.numel() * one.residual.element_size() for kept in self.kept.values() for one in kept)


def needed_by(schedule, step):
    """The reused steps after `step` that take a residual of it or of an earlier step."""
    return [later for later in np.flatnonzero(schedule.reuse) if later > step and schedule.anchors(later)[-1] <= step]


def signature(latent):
    """Its dtype is no part: HunyuanVideo's first latent is float16, the others are float32, and autocast makes one of them."""
    return tuple(latent.shape), latent.device
