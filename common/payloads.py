"""What a reused step predicts: the residual of the block stack, or the output of the whole model.

A new kind is a class with the methods of `Payload` and an entry in PAYLOADS.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from .blocks import BlockStack, Host


class Payload(Protocol):
    """What is kept of a computed call and takes its place in a reused one, of one model instance."""

    def record(self, arguments: dict | None = None) -> None:
        """Before a computed call. arguments: of forward, by name."""

    def finish(self, output: Any = None) -> torch.Tensor:
        """After a computed call: the tensor to keep, (batch, tokens, width)."""

    def replace(self, tensor: torch.Tensor) -> Any:
        """Before a reused call: its output, or None where forward is still to make it."""

    def restore(self) -> None:
        """After a reused call, or one that failed."""

    def size(self, arguments: dict, latent: torch.Tensor) -> tuple[int, torch.dtype] | None:
        """(elements, dtype) of the tensor to keep, before the first call; None: not known."""


class ModelOutput:
    """The model's output. A reused step runs nothing of the model, and what is kept is as small as a latent."""

    def __init__(self, model: torch.nn.Module | None = None, host: Host | None = None) -> None:
        self.leaves: list = []
        self.form: Any = None

    def record(self, arguments=None):
        pass

    def size(self, arguments, latent):
        return latent.numel(), latent.dtype

    def finish(self, output=None):
        """A copy of the output's tensors as (1, elements, 1): samplers may write into what they are given."""
        self.leaves, self.form = pytree.tree_flatten(output)
        tensors = [leaf.flatten() for leaf in self.leaves if torch.is_tensor(leaf)]
        self.leaves = [leaf.shape if torch.is_tensor(leaf) else leaf for leaf in self.leaves]
        return torch.cat(tensors)[None, :, None]

    def replace(self, tensor):
        """The output of the last computed call, a tuple, list, dictionary or dataclass of tensors, with these
        values."""
        values, leaves = tensor.flatten(), []
        for leaf in self.leaves:
            if isinstance(leaf, torch.Size):
                leaves.append(values[: leaf.numel()].clone().reshape(leaf))
                values = values[leaf.numel() :]
            else:
                leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.form)

    def restore(self):
        pass


def leading_tokens(output, count, tokens):
    """An output less what is made of other tokens than the first `count` (None: all), where it has a row for each of
    `tokens`."""
    return pytree.tree_map_only(
        torch.Tensor, lambda made: made[:, :count] if made.shape[1:2] == (tokens,) else made, output
    )


PAYLOADS = {"residual": BlockStack, "output": ModelOutput}
