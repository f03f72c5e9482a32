"""What is kept of a computed call and predicted for a reused one: the residual of the block stack, or the output of the
whole model. A new kind is a class with the methods of `Payload` and an entry in PAYLOADS."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from .blocks import BlockStack, Host
from .errors import MagCacheError


class Payload(Protocol):
    """What is kept of a computed call, and stands in for it in a reused one. Each model instance has its own.

    key: set before each call, tells the call's branch from the others of the run.
    """

    key: Any

    def record(self, arguments: dict | None = None) -> None:
        """Before a computed call. arguments: of the forward, by name."""

    def finish(self, output: Any = None) -> torch.Tensor:
        """After a computed call: the tensor to keep, (batch, tokens, width)."""

    def replace(self, tensor: torch.Tensor) -> Any:
        """Before a reused call: its output, or None if the forward still has to make it."""

    def restore(self) -> None:
        """After a reused call, or one that failed."""

    def size(self, arguments: dict, latent: torch.Tensor) -> tuple[int, torch.dtype] | None:
        """(number of elements, dtype) of the tensor to keep, before the first call; None if not known."""


class Numbers(NamedTuple):
    """A tensor of an output that is predicted."""

    shape: torch.Size
    dtype: torch.dtype


def is_predicted(leaf: Any) -> bool:
    """Whether a part of an output is a tensor of numbers, not a mask or indices."""
    return torch.is_tensor(leaf) and (leaf.is_floating_point() or leaf.is_complex())


def copied(leaf: Any) -> Any:
    return leaf.clone() if torch.is_tensor(leaf) else leaf


class ModelOutput:
    """Keeps the model's output. A reused step runs nothing of the model, and what is kept is as small as a latent."""

    kind, key = "output", None

    def __init__(self, model: torch.nn.Module | None = None, host: Host | None = None) -> None:
        self.forms: dict[tuple, Any] = {}  # of each branch's newest output, in each thread that runs the model

    def record(self, arguments: dict | None = None) -> None:
        pass

    def size(self, arguments: dict, latent: torch.Tensor) -> tuple[int, torch.dtype] | None:
        return latent.numel(), latent.dtype

    def finish(self, output: Any = None) -> torch.Tensor:
        """A copy of the output's numbers as (1, elements, 1): samplers may write into what they are given. Masks and
        indices are no numbers, and stay as they are. Raises MagCacheError if there are none."""
        leaves, form = pytree.tree_flatten(output)
        tensors = [leaf.flatten() for leaf in leaves if is_predicted(leaf)]
        if not tensors:
            raise MagCacheError(
                f"MagCache finds no tensor in the model's output, a {type(output).__name__}: run it without MagCache, "
                "or let its forward return a tensor, a tuple, a list, a dictionary or a class of PyTorch's pytree."
            )
        kept = [Numbers(leaf.shape, leaf.dtype) if is_predicted(leaf) else copied(leaf) for leaf in leaves]
        self.forms[threading.get_ident(), self.key] = kept, form
        return torch.cat(tensors)[None, :, None]

    def replace(self, tensor: torch.Tensor) -> Any:
        """These values in the form of the branch's newest output: a tuple, list, dictionary or dataclass of tensors."""
        values, leaves = tensor.flatten(), []
        kept, form = self.forms[threading.get_ident(), self.key]
        for leaf in kept:
            if isinstance(leaf, Numbers):
                leaves.append(values[: leaf.shape.numel()].clone().reshape(leaf.shape).to(leaf.dtype))
                values = values[leaf.shape.numel() :]
            else:
                leaves.append(copied(leaf))
        return pytree.tree_unflatten(leaves, form)

    def restore(self) -> None:
        pass


# What a forward raises if it runs without its blocks by facts that do not hold for it.
MISFITS = (AssertionError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)


class Residual:
    """Keeps the residual of the block stack. A reused step runs everything but the blocks. Where the facts of the class
    prove wrong on this model, it keeps the model's output instead, so that no picture is wrong.

    used: what keeps it, the `BlockStack` or a `ModelOutput`; proved: kinds of calls, told apart by their arguments, on
    which the facts were proved; wrong: why they were found wrong, until `prove` has said so.
    """

    def __init__(self, model: torch.nn.Module, host: Host) -> None:
        self.name = type(model).__name__
        self.used: Payload = BlockStack(model, host) if host.blocks else ModelOutput()
        self.proved: set[tuple] = set()
        self.calls: tuple = ()  # the kind of the call under way
        self.wrong = ""

    @property
    def key(self) -> Any:
        return self.used.key

    @key.setter
    def key(self, key: Any) -> None:
        self.used.key = key

    @property
    def kind(self) -> str:
        """A key of PAYLOADS."""
        return "output" if isinstance(self.used, ModelOutput) else "residual"

    def record(self, arguments: dict | None = None) -> None:
        self.calls = tuple(
            (name, tuple(value.shape) if torch.is_tensor(value) else None)
            for name, value in (arguments or {}).items()
            if value is not None
        )
        self.used.record(arguments)

    def finish(self, output: Any = None) -> torch.Tensor:
        try:
            return self.used.finish(output)
        except (MagCacheError, *MISFITS) as error:  # in the first call: tokens of other sizes, or none at all
            if self.calls in self.proved:
                raise
            self.wrong = str(error).rstrip(".")
            return self.fall_back(output)

    def fall_back(self, output: Any) -> torch.Tensor:
        """Keep the output from here on."""
        key, self.used = self.key, ModelOutput()
        self.key = key
        return self.used.finish(output)

    def replace(self, tensor: torch.Tensor) -> Any:
        return self.used.replace(tensor)

    def restore(self) -> None:
        self.used.restore()

    def size(self, arguments: dict, latent: torch.Tensor) -> tuple[int, torch.dtype] | None:
        return self.used.size(arguments, latent)

    def prove(self, made: torch.Tensor, output: Any, rehearse: Callable[[], Any]) -> tuple[torch.Tensor, Any, str]:
        """After the first computed call of its kind: check that its residual, put back, makes the same output.

        made: that residual; rehearse: makes the call again. Returns (what to keep, the output, "" or a sentence that
        says why the output is kept instead).
        """
        if self.kind == "residual" and self.calls not in self.proved:
            # A graph on a GPU may make its next output in the memory of this one.
            output = pytree.tree_map_only(torch.Tensor, torch.clone, output)
            self.wrong = disproof(self.used, made, output, rehearse)
            self.proved.add(self.calls)
            if self.wrong:
                made = self.fall_back(output)
        told = f"The facts of {self.name} do not hold for this model ({self.wrong}): its output is predicted instead."
        wrong, self.wrong = self.wrong, ""
        return made, output, told if wrong else ""


def disproof(stack: Payload, residual: torch.Tensor, output: Any, rehearse: Callable[[], Any]) -> str:
    """Why a residual, put back on the inputs that it was made from, does not make the same output; "" if it does.
    rehearse: makes the call again."""
    stack.replace(residual)
    try:
        remade = rehearse()
    except torch.cuda.OutOfMemoryError:
        raise
    except (MagCacheError, *MISFITS) as error:
        return f"without its blocks: {type(error).__name__}: {error}"
    finally:
        stack.restore()
    worst, allowed = 0.0, 1e-4
    for one, other in zip(pytree.tree_leaves(output), pytree.tree_leaves(remade)):
        if torch.is_tensor(one) and one.is_floating_point():
            if one.shape != other.shape:
                return f"an output of shape {tuple(other.shape)} for one of {tuple(one.shape)}"
            # before + (after - before) is after, up to one rounding of the tokens.
            allowed = max(allowed, *(4 * torch.finfo(tensor.dtype).eps for tensor in (one, residual)))
            if one.isfinite().all() and not other.isfinite().all():  # half precision has no room for the residual
                return "its own residual makes another output, which is not finite"
            missed = (other.detach().double() - one.detach().double()).norm() / one.detach().double().norm()
            worst = max(worst, float(missed.nan_to_num(0.0)))
    return f"its own residual makes another output, by {worst:.1%}" if worst > allowed else ""


def leading_tokens(output: Any, count: int | None, tokens: int) -> Any:
    """What an output has for the first `count` of so many tokens (None: all). Tensors without a row for each token stay
    whole."""
    return pytree.tree_map_only(
        torch.Tensor, lambda made: made[:, :count] if made.shape[1:2] == (tokens,) else made, output
    )


PAYLOADS = {"residual": Residual, "output": ModelOutput}
