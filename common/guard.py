"""An optional watch over one run: does its sample still behave as the calibration did?"""

from __future__ import annotations

import torch

from .calibration import TOKENS_AT_ONCE

LEAST = 0.01  # smaller expected relative errors count as this; rounding in bfloat16 alone makes a few thousandths


class Guard:
    """Compares what a computed step made with what would have been predicted for it, which costs no call of the model.

    factor: stop at an error so many times the calibrated one. With torch.distributed each rank judges the sum over all
    ranks, so that all decide alike; they must then run the same steps, as in sequence or tensor parallelism.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def judge(self, step: int, made: torch.Tensor, predicted: torch.Tensor, expected: float) -> str:
        """Why nothing more is to be skipped, or "". made, predicted: (batch, tokens, width); expected: the calibrated
        relative error."""
        sums = torch.zeros(2, device=made.device)
        for true, guess in zip(made.split(TOKENS_AT_ONCE, dim=1), predicted.split(TOKENS_AT_ONCE, dim=1)):
            true, guess = true.float(), guess.float()
            sums += torch.stack([(true - guess).square().sum(), true.square().sum()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        missed, energy = sums.tolist()
        times = (missed / energy) ** 0.5 / max(LEAST, expected)
        if times <= self.factor:
            return ""
        return f"the guard saw step {step} predicted {times:.1f} times worse than calibrated"
