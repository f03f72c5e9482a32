"""Run a transformer's block stack with a view on its image tokens, or put a residual in its place.

The host's forward runs unchanged either way. Stand-ins shadow its block lists and its final layer in the instance's
`__dict__`, which attribute look-up asks before `_modules`: parameters, names, FSDP units and hooks never notice, and
the stand-ins are gone when the call ends. On a reused step the lists are empty and the residual is added in front of
the final layer, so that what a forward adds between its blocks (control nets) is not added twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch.nn import functional

from .errors import MagCacheError


@dataclass(frozen=True)
class Host:
    """What MagCache has to know of a transformer class.

    blocks: its block lists, in the order in which forward runs them.
        Empty: nothing is known of its inside, so only its output can be predicted; `why_output` says why.
    final_layer: the module, or the dictionary of them, whose first argument is the image tokens after the last block.
        None: the last block returns them, and forward does something with them before its final layer (gathers them
        from the ranks that share them).
    block_returns: (arguments of the first block, image tokens) -> what it returns, where that is more than the tokens;
        needed where final_layer is None.
    image_tokens: keyword, or position, of the image tokens among the arguments of the first block: (batch, tokens,
        width), or (tokens, width) where forward packs its sequences into one.
    latent, timestep: names of forward's arguments.
    timestep_scale: what forward's timestep is at noise level 1.
    noise_level: (arguments of forward by name) -> noise level in 0..1, where the timestep is no multiple of it (it runs
        from 0 to 1, or is a function of sigma). None: timestep / timestep_scale.
    outside: (arguments of forward by name) -> whether this call is no step of the sampler (it fills a cache for its
        prompt); such calls run as they are. None: none is.
    residual_shape: (model, arguments of forward by name) -> shape of the residual, known before the first step.
    residual_dtype: (model) -> type of the residual. None: the latent's.
    noise_tokens: (arguments of forward by name) -> how many leading image tokens are being denoised, where others
        follow them (reference pictures, padding); statistics are taken of these only. None: all are.
    in_place: the first block writes into the tokens that it is given, so they are copied before.
    output_tokens: (model, arguments of forward by name) -> from how many of the last image tokens forward makes its
        output, where others precede them (packed frames of an earlier section); residuals are kept of these only.
        None: all.
    on_the_way: (model, image tokens before the first block) -> those of them that the final layer would get, where
        forward takes others away after the blocks or gathers what ranks share. None: the last, as many as it gets.
    tokens_lead: tokens that forward cuts off between its blocks and its final layer follow those that it keeps
        (reference pictures behind the noise). Otherwise they precede them.
    reads_blocks: forward reads attributes of its blocks beside running them.
    hint_methods: methods whose product goes into the blocks and nowhere else (the branch of a control net that forward
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
    """The block stack of one model instance. key: as `payloads.Payload` has it; one residual is as another."""

    key = None

    def __init__(self, model, host):
        if not host.blocks:
            raise MagCacheError(
                f"Of {type(model).__name__} only the output can be predicted"
                f"{', because ' + host.why_output if host.why_output else ''}: ask for the payload output."
            )
        final_layer = (host.final_layer,) if host.final_layer else ()
        missing = [name for name in (*host.blocks, *final_layer, *host.hint_methods) if not hasattr(model, name)]
        if missing:
            raise MagCacheError(
                f"{type(model).__name__} has no {', '.join(missing)}: MagCache does not know this version "
                "of the model; run it without MagCache."
            )
        self.model, self.host = model, host
        self.first = FirstBlock(host.image_tokens, host.in_place)
        self.final = (
            FinalLayer(host.tokens_lead)
            if host.final_layer
            else LastBlock(self.first.passed_on, host.tokens_lead, host.block_returns)
        )
        self.shadows, self.shadowed = {}, {}

    def size(self, arguments, latent):
        """(elements, dtype) of a residual, or None where the host does not say its shape."""
        if self.host.residual_shape is None:
            return None
        dtype = self.host.residual_dtype(self.model) if self.host.residual_dtype else latent.dtype
        return prod(self.host.residual_shape(self.model, arguments)), dtype

    def record(self, arguments=None):
        """From here to `finish`, forward runs every block and the image tokens before and after them are remembered.
        arguments: of forward, by name, for the host's `output_tokens`."""
        self.last = self.host.output_tokens(self.model, arguments) if self.host.output_tokens else 0
        lists = {name: list(getattr(self.model, name)) for name in self.host.blocks}
        filled = [name for name, blocks in lists.items() if blocks]
        if not filled:
            raise MagCacheError(f"{type(self.model).__name__} has no blocks, so there is nothing to skip.")
        start, end = filled[0], filled[-1]
        self.first.block, lists[start][0] = lists[start][0], self.first
        if self.host.final_layer:
            self.final.layer = getattr(self.model, self.host.final_layer)
            self.shadow({start: tuple(lists[start]), self.host.final_layer: self.final})
        else:
            self.final.layer, lists[end][-1] = lists[end][-1], self.final
            self.shadow({start: tuple(lists[start]), end: tuple(lists[end])})

    def replace(self, residual):
        """From here to `restore`, forward runs no block; `residual` is added to the tokens in front of the final
        layer."""
        self.final.residual = residual
        if self.host.final_layer:
            self.final.layer = getattr(self.model, self.host.final_layer)
            stand_ins = {**dict.fromkeys(self.host.blocks, ()), self.host.final_layer: self.final}
            if self.host.reads_blocks:
                stand_ins.update((name, ReadOnly(getattr(self.model, name))) for name in self.host.blocks)
        else:  # as many in each list, for a forward that runs its lists in pairs; none where blocks return other things
            others = () if self.host.block_returns else (self.first.passed_on,)
            stand_ins = {**dict.fromkeys(self.host.blocks, others), self.host.blocks[0]: (self.final,)}
        self.shadow({**stand_ins, **dict.fromkeys(self.host.hint_methods, no_hints)})

    def shadow(self, attributes):
        self.shadows, self.plain_class = attributes, type(self.model)
        # Sequence parallelism puts methods of its own there.
        self.shadowed = {name: self.model.__dict__[name] for name in attributes if name in self.model.__dict__}
        self.model.__dict__.update(attributes)
        # A graph that torch.compile made of the un-cached model does not notice shadows, but it does check the class.
        self.model.__class__ = class_while_shadowed(self.plain_class)

    def finish(self, output=None):
        """Take the stand-ins away. Returns the residual of a recorded call: tokens after the last block minus tokens
        before the first. Tokens that forward cuts off in between (a reference picture) have none. Raises MagCacheError
        if forward came past neither."""
        before = arrived = self.first.tokens
        after = self.final.tokens
        self.restore()
        if before is None or after is None:
            raise MagCacheError(
                f"The forward of {type(self.model).__name__} did not pass through its blocks and "
                f"{self.host.final_layer}; run it without MagCache."
            )
        if after.dtype != before.dtype and torch.equal(after.to(before.dtype).to(after.dtype), after):
            after = after.to(before.dtype)  # forward had cast what the blocks made for its final layer alone
        if self.host.on_the_way:
            before = self.host.on_the_way(self.model, before)
        if after.ndim == 2:  # packed
            before, after = before[None], after[None]
        tokens = self.last or after.shape[1]
        # How many precede or follow them where the residual is added, of each kind of call.
        added_to = after if self.host.final_layer else arrived
        self.final.others.add(added_to.shape[0 if added_to.ndim == 2 else 1] - tokens)
        kept = slice(None, tokens) if self.host.tokens_lead else slice(-tokens, None)
        return after[:, kept] - before[:, kept]

    def restore(self):
        if self.shadows:
            self.model.__class__ = self.plain_class
        for name in self.shadows:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self.shadowed)
        self.shadows, self.shadowed = {}, {}
        self.first.tokens = self.final.tokens = self.final.residual = None


def no_hints(*args, **kwargs):
    return []


@cache
def class_while_shadowed(plain_class):
    """The class of a model while stand-ins are in place: the same in all but identity."""
    return type(plain_class)(plain_class.__name__, (plain_class,), {"__module__": plain_class.__module__})


class ReadOnly(tuple):
    """A block list whose members can be read and none runs."""

    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


class FirstBlock:
    """Stands in for the first block and remembers the image tokens that come in. Its other attributes are the
    block's."""

    __slots__ = ("image_tokens", "in_place", "block", "tokens")

    def __init__(self, image_tokens, in_place):
        self.image_tokens, self.in_place, self.tokens, self.block = image_tokens, in_place, None, None

    def __getattr__(self, name):
        if name.startswith("__"):  # Dynamo asks for what slots have not
            raise AttributeError(name)
        return getattr(self.block, name)

    def __call__(self, *args, **kwargs):
        tokens = self.passed_on(*args, **kwargs)
        self.tokens = tokens.clone() if self.in_place else tokens
        return self.block(*args, **kwargs)

    def passed_on(self, *args, **kwargs):
        """The image tokens among a block's arguments."""
        key = self.image_tokens
        return args[key] if isinstance(key, int) else kwargs[key] if key in kwargs else args[0]


class FinalLayer:
    """Stands in for the final layer: remembers the image tokens that come in, or adds the residual to them. Its other
    attributes are the layer's."""

    __slots__ = ("tokens_lead", "layer", "tokens", "residual", "others")

    def __init__(self, tokens_lead):
        self.tokens_lead, self.layer, self.tokens, self.residual = tokens_lead, None, None, None
        self.others = set()

    def __getattr__(self, name):
        if name.startswith("__"):  # Dynamo asks for what slots have not
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __getitem__(self, key):  # of several final layers, one for each size of patches
        self.layer = self.layer[key]
        return self

    def __call__(self, tokens, *args, **kwargs):
        if self.residual is None:
            self.tokens = tokens
            return self.layer(tokens, *args, **kwargs)
        return self.layer(added(tokens, self.residual, self.tokens_lead, self.others), *args, **kwargs)


class LastBlock:
    """Stands in for the last block: remembers the image tokens that come out. Or for all: returns those that come in
    with the residual."""

    __slots__ = ("passed_on", "tokens_lead", "returns", "layer", "tokens", "residual", "others")

    def __init__(self, passed_on, tokens_lead, returns):
        self.passed_on, self.tokens_lead = passed_on, tokens_lead
        self.returns = returns or (lambda args, tokens: tokens)
        self.layer = self.tokens = self.residual = None
        self.others = set()

    def __getattr__(self, name):
        if name.startswith("__"):  # Dynamo asks for what slots have not
            raise AttributeError(name)
        return getattr(self.layer, name)

    def __call__(self, *args, **kwargs):
        if self.residual is None:
            self.tokens = self.layer(*args, **kwargs)
            return self.tokens
        tokens = added(self.passed_on(*args, **kwargs), self.residual, self.tokens_lead, self.others)
        return self.returns(args, tokens)


class TokensChanged(MagCacheError):
    """A residual was made of more or fewer tokens than it is added to: reference pictures came or went."""


def added(tokens, residual, tokens_lead=False, others=frozenset({0})):
    """The residual added to the last of the tokens, or the first. others: how many more there may be, which do not
    reach the output. Raises TokensChanged where there are fewer than the residual has, or another number more."""
    if tokens.ndim == 2:
        return added(tokens[None], residual, tokens_lead, others)[0]
    more = tokens.shape[1] - residual.shape[1]
    if more not in others:
        raise TokensChanged("the number of image tokens changed")
    if more:
        residual = functional.pad(residual, (0, 0, 0, more) if tokens_lead else (0, 0, more, 0))
    return tokens + residual
