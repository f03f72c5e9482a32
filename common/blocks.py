"""Run a transformer's block stack and watch its image tokens, or put a residual in the stack's place.

The host's forward runs unchanged either way. During a call, stand-ins shadow its block lists and its final layer in the
instance's `__dict__`, where attribute look-up comes before `_modules`: parameters, names, FSDP units and hooks notice
nothing. On a reused step the lists are empty and the residual is added in front of the final layer, so that what the
forward adds between its blocks (control nets) is not added twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch.nn import functional

from .errors import MagCacheError


@dataclass(frozen=True)
class Host:
    """The facts of a transformer class. `forward` stands for the arguments of its forward, by name.

    blocks: its block lists, in the order in which the forward runs them. Empty: only its output can be predicted, and
        `why_output` says why.
    final_layer: the module, or the dictionary of modules, whose first argument is the image tokens after the last
        block. None: the last block returns them, and the forward changes them before its final layer (gathers them from
        the ranks that share them).
    block_returns: (arguments of the first block, image tokens) -> what a block returns, if that is more than the
        tokens; only needed where final_layer is None.
    image_tokens: keyword or position of the image tokens among the first block's arguments: (batch, tokens, width), or
        (tokens, width) where the forward packs its sequences into one.
    latent, timestep: names of these arguments of the forward; timestep_scale: the timestep at noise level 1.
    noise_level: (forward) -> noise level in 0..1, where the timestep is no multiple of it (it runs from 0 to 1, or is
        another function of sigma). None: timestep / timestep_scale.
    outside: (forward) -> whether this call is no step of the sampler (it fills a cache for the prompt); such calls run
        as they are. None: every call is a step.
    residual_shape: (model, forward) -> shape of the residual, known before the first step.
    residual_dtype: (model) -> dtype of the residual. None: that of the latent.
    noise_tokens: (forward) -> how many of the first image tokens are being denoised, where others follow them
        (reference pictures, padding); statistics are taken of these alone. None: all.
    in_place: the first block writes into the tokens that it is given, so they are copied first.
    output_tokens: (model, forward) -> from how many of the last image tokens the output is made, where others precede
        them (packed frames of an earlier section); residuals are kept of these alone. None: all.
    on_the_way: (model, image tokens before the first block) -> those of them that reach the final layer, where the
        forward drops others after the blocks or gathers what ranks share. None: the last, as many as it gets.
    tokens_lead: tokens that the forward drops between its blocks and its final layer follow those that it keeps
        (reference pictures behind the noise). Otherwise they precede them.
    reads_blocks: the forward also reads attributes of its blocks.
    hint_methods: methods whose result goes into the blocks and nowhere else (a control net's branch that the forward
        runs first); they return an empty list on a reused step.
    """

    blocks: tuple[str, ...]
    final_layer: str | None = None
    image_tokens: str | int = "hidden_states"
    latent: str = "hidden_states"
    timestep: str = "timestep"
    timestep_scale: float = 1000.0
    residual_shape: Callable[[Any, dict], tuple[int, ...]] | None = None
    residual_dtype: Callable[[Any], torch.dtype] | None = None
    noise_tokens: Callable[[dict], int] | None = None
    in_place: bool = False
    output_tokens: Callable[[Any, dict], int] | None = None
    on_the_way: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    hint_methods: tuple[str, ...] = ()
    noise_level: Callable[[dict], Any] | None = None
    outside: Callable[[dict], Any] | None = None
    tokens_lead: bool = False
    reads_blocks: bool = False
    why_output: str = ""
    block_returns: Callable[[tuple, torch.Tensor], Any] | None = None


class BlockStack:
    """The block stack of one model instance, as a `payloads.Payload` that treats all branches alike."""

    key: Any = None

    def __init__(self, model: torch.nn.Module, host: Host) -> None:
        if not host.blocks:
            raise MagCacheError(
                f"For {type(model).__name__} only the output can be predicted"
                f"{', because ' + host.why_output if host.why_output else ''}: ask for the payload output."
            )
        final_layer = (host.final_layer,) if host.final_layer else ()
        missing = [name for name in (*host.blocks, *final_layer, *host.hint_methods) if not hasattr(model, name)]
        if missing:
            raise MagCacheError(
                f"{type(model).__name__} has no {', '.join(missing)}: MagCache does not know this version "
                "of the model; run it without MagCache."
            )
        self.model: Any = model
        self.host = host
        self.first = FirstBlock(host.image_tokens, host.in_place)
        self.final: Any = (
            FinalLayer(host.tokens_lead)
            if host.final_layer
            else LastBlock(self.first.passed_on, host.tokens_lead, host.block_returns)
        )
        self.plain_class: Any = type(self.model)
        self.shadows: dict[str, Any] = {}  # the stand-ins on the model, by attribute
        self.shadowed: dict[str, Any] = {}  # what its `__dict__` had there

    def size(self, arguments: dict, latent: torch.Tensor) -> tuple[int, torch.dtype] | None:
        """(number of elements, dtype) of a residual; None if the facts do not tell its shape."""
        if self.host.residual_shape is None:
            return None
        dtype = self.host.residual_dtype(self.model) if self.host.residual_dtype else latent.dtype
        return prod(self.host.residual_shape(self.model, arguments)), dtype

    def record(self, arguments: dict | None = None) -> None:
        """From here to `finish`, the forward runs every block, and the image tokens before and after them are noted.
        arguments: of the forward, by name, for the host's `output_tokens`."""
        self.last = self.host.output_tokens(self.model, arguments or {}) if self.host.output_tokens else 0
        lists = {name: list(getattr(self.model, name)) for name in self.host.blocks}
        filled = [name for name, blocks in lists.items() if blocks]
        if not filled:
            raise MagCacheError(f"{type(self.model).__name__} has no blocks, so there is nothing to skip.")
        start, end = filled[0], filled[-1]
        self.first.original, lists[start][0] = lists[start][0], self.first
        if self.host.final_layer:
            self.final.original = getattr(self.model, self.host.final_layer)
            self.shadow({start: tuple(lists[start]), self.host.final_layer: self.final})
        else:
            self.final.original, lists[end][-1] = lists[end][-1], self.final
            self.shadow({start: tuple(lists[start]), end: tuple(lists[end])})

    def replace(self, residual: torch.Tensor) -> None:
        """From here to `restore`, the forward runs no block; `residual` is added in front of the final layer."""
        self.final.residual = residual
        if self.host.final_layer:
            self.final.original = getattr(self.model, self.host.final_layer)
            stand_ins: dict[str, Any] = {**dict.fromkeys(self.host.blocks, ()), self.host.final_layer: self.final}
            if self.host.reads_blocks:
                stand_ins.update((name, ReadOnly(getattr(self.model, name))) for name in self.host.blocks)
        else:  # equally many in each list, for a forward that runs its lists in pairs; none where blocks return more
            others = () if self.host.block_returns else (self.first.passed_on,)
            stand_ins = {**dict.fromkeys(self.host.blocks, others), self.host.blocks[0]: (self.final,)}
        self.shadow({**stand_ins, **dict.fromkeys(self.host.hint_methods, no_hints)})

    def shadow(self, attributes: dict[str, Any]) -> None:
        """Put stand-ins on the model, by attribute."""
        self.shadows, self.plain_class = attributes, type(self.model)
        # Sequence parallelism puts methods of its own there.
        self.shadowed = {name: self.model.__dict__[name] for name in attributes if name in self.model.__dict__}
        self.model.__dict__.update(attributes)
        # A graph that torch.compile made of the un-cached model does not look at `__dict__`, but it checks the class.
        self.model.__class__ = class_while_shadowed(self.plain_class)

    def finish(self, output: Any = None) -> torch.Tensor:
        """Take the stand-ins away and return the residual: the tokens after the last block minus those before the
        first. Tokens that the forward drops in between (a reference picture) have none. Raises MagCacheError if the
        forward did not pass through its blocks."""
        before = arrived = self.first.tokens
        after = self.final.tokens
        self.restore()
        if before is None or after is None:
            raise MagCacheError(
                f"The forward of {type(self.model).__name__} did not pass through its blocks and "
                f"{self.host.final_layer}; run it without MagCache."
            )
        if after.dtype != before.dtype and torch.equal(after.to(before.dtype).to(after.dtype), after):
            after = after.to(before.dtype)  # the forward had cast the tokens for its final layer only
        if self.host.on_the_way:
            before = self.host.on_the_way(self.model, before)
        if after.ndim == 2:  # packed
            before, after = before[None], after[None]
        tokens = self.last or after.shape[1]
        # How many other tokens there are where the residual is added, in each kind of call.
        added_to = after if self.host.final_layer else arrived
        self.final.others.add(added_to.shape[0 if added_to.ndim == 2 else 1] - tokens)
        kept = slice(None, tokens) if self.host.tokens_lead else slice(-tokens, None)
        return after[:, kept] - before[:, kept]

    def restore(self) -> None:
        """Take the stand-ins away."""
        if self.shadows:
            self.model.__class__ = self.plain_class
        for name in self.shadows:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.shadowed)
        self.shadows, self.shadowed = {}, {}
        self.first.tokens = self.final.tokens = self.final.residual = None


def no_hints(*args, **kwargs) -> list:
    """Stands in for a method of `Host.hint_methods`."""
    return []


@cache
def class_while_shadowed(plain_class: Any) -> type:
    """The class that a model has while stand-ins are on it: the same in everything but identity."""
    return type(plain_class)(plain_class.__name__, (plain_class,), {"__module__": plain_class.__module__})


class ReadOnly(tuple):
    """A block list whose members can be read by index but do not run."""

    def __iter__(self) -> Iterator:
        return iter(())

    def __len__(self) -> int:
        return 0


class ModuleStandIn:
    """Takes the place of a module during a call. Attributes that it lacks are those of the original."""

    __slots__ = ("original",)
    original: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Dynamo asks for what slots do not have
            raise AttributeError(name)
        return getattr(self.original, name)


class FirstBlock(ModuleStandIn):
    """Stands in for the first block and notes the image tokens that come in."""

    __slots__ = ("image_tokens", "in_place", "tokens")

    def __init__(self, image_tokens: str | int, in_place: bool) -> None:
        self.image_tokens, self.in_place = image_tokens, in_place
        self.original = self.tokens = None

    def __call__(self, *args, **kwargs):
        tokens = self.passed_on(*args, **kwargs)
        self.tokens = tokens.clone() if self.in_place else tokens
        return self.original(*args, **kwargs)

    def passed_on(self, *args, **kwargs) -> torch.Tensor:
        """The image tokens among a block's arguments."""
        key = self.image_tokens
        return args[key] if isinstance(key, int) else kwargs[key] if key in kwargs else args[0]


class FinalLayer(ModuleStandIn):
    """Stands in for the final layer: notes the image tokens that come in, or adds the residual to them."""

    __slots__ = ("tokens_lead", "tokens", "residual", "others")

    def __init__(self, tokens_lead: bool) -> None:
        self.tokens_lead, self.original, self.tokens, self.residual = tokens_lead, None, None, None
        self.others: set[int] = set()

    def __getitem__(self, key: Any) -> FinalLayer:  # one of several, for different patch sizes
        self.original = self.original[key]
        return self

    def __call__(self, tokens, *args, **kwargs):
        if self.residual is None:
            self.tokens = tokens
            return self.original(tokens, *args, **kwargs)
        return self.original(added(tokens, self.residual, self.tokens_lead, self.others), *args, **kwargs)


class LastBlock(ModuleStandIn):
    """Stands in for the last block, and notes the image tokens that come out; or for all blocks, and returns those that
    come in plus the residual."""

    __slots__ = ("passed_on", "tokens_lead", "returns", "tokens", "residual", "others")

    def __init__(self, passed_on: Callable[..., torch.Tensor], tokens_lead: bool, returns: Callable | None) -> None:
        self.passed_on, self.tokens_lead = passed_on, tokens_lead
        self.returns = returns or (lambda args, tokens: tokens)
        self.original = self.tokens = self.residual = None
        self.others: set[int] = set()

    def __call__(self, *args, **kwargs):
        if self.residual is None:
            self.tokens = self.original(*args, **kwargs)
            return self.tokens
        tokens = added(self.passed_on(*args, **kwargs), self.residual, self.tokens_lead, self.others)
        return self.returns(args, tokens)


class TokensChanged(MagCacheError):
    """The number of image tokens changed since the residual was made, because reference pictures came or went."""


def added(
    tokens: torch.Tensor, residual: torch.Tensor, tokens_lead: bool = False, others: Set[int] = frozenset({0})
) -> torch.Tensor:
    """The residual added to the last of the tokens, or to the first if `tokens_lead`. others: how many more tokens
    there may be than the residual has. Raises TokensChanged for another number."""
    if tokens.ndim == 2:
        return added(tokens[None], residual, tokens_lead, others)[0]
    more = tokens.shape[1] - residual.shape[1]
    if more not in others:
        raise TokensChanged("the number of image tokens changed")
    if more:
        residual = functional.pad(residual, (0, 0, 0, more) if tokens_lead else (0, 0, more, 0))
    return tokens + residual
