"""What a reused step predicts: the residual of the block stack, or the output of the whole model.

A payload has four methods. Around a computed call: `record(arguments)`, those of forward by name, before it, and
`finish(output)` after it, which returns the tensor to keep, (batch, tokens, width). Around a reused call:
`replace(tensor)`, which returns the output, or None where forward is still to make it, and `restore()` after it.
"""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from .blocks import BlockStack


class ModelOutput:
    """The model's output. A reused step runs nothing of the model, and what is kept is as small as a latent."""

    def __init__(self, model=None, host=None):
        self.leaves = self.form = None

    def record(self, arguments=None):
        pass

    def finish(self, output):
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
