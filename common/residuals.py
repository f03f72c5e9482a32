"""What is kept between steps: the newest residual of each branch of one run."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Kept:
    step: int
    latent: tuple
    residual: torch.Tensor
    dtype: torch.dtype
    device: torch.device


class Residuals:
    """One residual a branch, on a device and in a dtype of choice (None: as the model made it)."""

    def __init__(self, device=None, dtype=None):
        self.device, self.dtype, self.kept, self.peak_bytes = device, dtype, {}, 0

    def keep(self, call, latent, residual):
        """Keep a residual (batch, tokens, width) computed at `call` for a latent of this shape, dtype and device."""
        self.kept[call.branch] = Kept(call.step, signature(latent), residual.to(self.device or residual.device, self.dtype),
                                      residual.dtype, residual.device)
        self.peak_bytes = max(self.peak_bytes, self.bytes)

    def take(self, call, latent, anchor):
        """(residual, "") for a reused call, or (None, why there is none that belongs here).

        anchor: the step at which the schedule computed last; an older residual is not what was planned.
        """
        kept = self.kept.get(call.branch)
        if kept is None or kept.step < anchor:
            return None, "no residual of this branch yet"
        if kept.latent != signature(latent):
            return None, "the latent changed its shape, dtype or device"
        return kept.residual.to(kept.device, kept.dtype), ""

    def drop(self, branch):
        self.kept.pop(branch, None)

    def clear(self):
        self.kept.clear()

    @property
    def bytes(self):
        return sum(kept.residual.numel() * kept.residual.element_size() for kept in self.kept.values())


def signature(latent):
    return tuple(latent.shape), latent.dtype, latent.device
