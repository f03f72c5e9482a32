"""The optimizer of the demo video model: Muon for matrices, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with orthonormal rows or columns, by five Newton-Schulz steps: [matrices, rows, columns]."""
    x = matrices.bfloat16()
    x = x if x.shape[1] <= x.shape[2] else x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrices.shape[1] <= matrices.shape[2] else x.mT


class Muon:
    """As torch.optim.Muon, which takes matrices one by one; here all of one shape at once, since a GPU waits otherwise.

    A kernel is a matrix, too: [out, in * taps].
    """

    def __init__(self, parameters: list[torch.Tensor], weight_decay: float = 0.01, momentum: float = 0.95):
        self.weight_decay, self.momentum, self.groups = weight_decay, momentum, {}
        for parameter in parameters:
            self.groups.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
        self.buffers = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    def step(self, rate: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([parameter.grad.view(shape) for parameter in group])
            buffer = self.buffers[shape].lerp_(gradients, 1 - self.momentum)
            update = orthogonal(gradients.lerp(buffer, self.momentum)).float()
            torch._foreach_mul_(group, 1 - rate * self.weight_decay)
            moves = [one.view_as(parameter) for one, parameter in zip(update, group)]
            torch._foreach_add_(group, moves, alpha=-0.2 * rate * max(shape) ** 0.5)  # a step as long as AdamW's


class Optimizer:
    """Muon and AdamW on float32 copies of a model; keeps their moving average.

    muon: says of a name and a parameter whether Muon takes it.
    """

    def __init__(
        self,
        named: list[tuple[str, torch.nn.Parameter]],
        muon: Callable[[str, torch.nn.Parameter], bool],
        decay: float = 0.998,
    ):
        self.working = [p for _, p in named]
        self.master = [p.detach().float().contiguous().clone().requires_grad_() for p in self.working]
        for master in self.master:
            master.grad = torch.zeros_like(master)
        chosen = [muon(name, p) for name, p in named]
        self.muon = Muon([m for m, taken in zip(self.master, chosen) if taken])
        rest = [m for m, taken in zip(self.master, chosen) if not taken]
        self.adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.average, self.decay, self.steps = [m.detach().clone() for m in self.master], decay, 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        torch._foreach_copy_([m.grad for m in self.master], [p.grad for p in self.working])
        for parameter in self.working:
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        self.muon.step(rate)
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        self.steps += 1
        decay = min(self.decay, (self.steps + 1) / (self.steps + 20))
        torch._foreach_lerp_(self.average, [m.detach() for m in self.master], 1 - decay)
        torch._foreach_copy_(self.working, [m.detach() for m in self.master])

    def state(self) -> dict:
        return {
            "master": self.master,
            "average": self.average,
            "muon": self.muon.buffers,
            "adamw": self.adamw.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load(self, state: dict) -> None:
        torch._foreach_copy_(self.master, state["master"])
        torch._foreach_copy_(self.working, state["master"])
        torch._foreach_copy_(self.average, state["average"])
        self.muon.buffers = state["muon"]
        self.adamw.load_state_dict(state["adamw"])
        self.steps = state["steps"]
