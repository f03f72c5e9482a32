"""Find the facts of a transformer that nobody described: watch one forward, propose, and prove by putting the residual
back.

A proposal counts as proved when its own residual, put back on the same inputs, makes the same output with none of its
blocks run (`payloads.disproof`). Of several the one whose blocks do the largest share of the work is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import torch

from .blocks import BlockStack, Host
from .errors import MagCacheError
from .expert import PATCHED_ALREADY, InstanceForward, argument_names, patches_of
from .handle import Patch
from .hosts import class_name, output_host
from .payloads import MISFITS, disproof
from .report import RunReport

LEAST_SHARE = 0.25  # of the work in all block lists that a stack has to take


@dataclass(frozen=True)
class Found:
    """host: proved facts, or those of output prediction; share: of the work in block lists; tries: proposals looked at;
    why: none was proved."""

    host: Host
    share: float = 0.0
    tries: int = 0
    why: str = ""


class Trace:
    """What one forward ran: in order the name of each block list or module, and its arguments.

    work: of each block list, weights times tokens, which its seconds go with, and no clock has to be read for it.
    """

    def __init__(self, model: torch.nn.Module, forward: Callable[[], Any]) -> None:
        self.starts: list[tuple[str, tuple, dict]] = []
        self.work: dict[str, int] = {}
        self.lists = [name for name, child in model.named_children() if isinstance(child, torch.nn.ModuleList)]
        hooks = []
        for name, child in model.named_children():
            for module in child.children() if name in self.lists else [child]:
                hooks.append(module.register_forward_pre_hook(self.entering(name), with_kwargs=True))
        try:
            forward()
        finally:
            for hook in hooks:
                hook.remove()

    def entering(self, name):
        def hook(module, args, kwargs):
            self.starts.append((name, args, kwargs))
            tokens = [value[..., 0].numel() for value in (*args, *kwargs.values()) if is_tokens(value)]
            weights = sum(parameter.numel() for parameter in module.parameters())
            self.work[name] = self.work.get(name, 0) + weights * max(tokens, default=0)

        return hook

    def stacks(self) -> list[tuple[str, ...]]:
        """Block lists that may form the stack, most of the work first: one list, or all that run between the first and
        the last call of one and another."""
        order = list(dict.fromkeys(name for name, *_ in self.starts if name in self.lists))
        runs = {tuple(order[first : last + 1]) for first, last in product(range(len(order)), repeat=2) if first <= last}
        return sorted(runs, key=lambda names: (-round(self.share(names), 1), len(names)))

    def share(self, names) -> float:
        total = sum(self.work.get(name, 0) for name in self.lists)
        return sum(self.work.get(name, 0) for name in names) / total if total else 0.0

    def final_layers(self, stack) -> list[str | None]:
        """Modules that run after the last block of a stack, the nearest first; then none."""
        last = max(index for index, (name, *_) in enumerate(self.starts) if name in stack)
        return [*dict.fromkeys(name for name, *_ in self.starts[last + 1 :] if name not in self.lists), None]

    def image_tokens(self, stack) -> list[str | int]:
        """Tensor arguments of the first block with tokens and a width, those of usual names first."""
        _, args, kwargs = next(start for start in self.starts if start[0] in stack)
        named = {**dict(enumerate(args)), **kwargs}
        keys = [key for key, value in named.items() if is_tokens(value)]
        return sorted(keys, key=lambda key: key not in ("hidden_states", "x", "img", 0))


def is_tokens(value) -> bool:
    """Whether a block's argument may be tokens: (batch, tokens, width), or packed."""
    return torch.is_tensor(value) and value.ndim in (2, 3) and value.is_floating_point()


def discover(model: torch.nn.Module, args: tuple, kwargs: dict, most: int = 24) -> Found:
    """The facts of a model that was called with these arguments. Calls its forward a few times, un-cached; most:
    proposals to look at."""

    def forward():
        return model.forward(*args, **kwargs)

    arguments = {**dict(zip(argument_names(model), args)), **kwargs}
    trace, tried, why = Trace(model, forward), 0, "it has no block lists that its forward runs"
    for host in proposals(trace, output_host(type(model).__name__, argument_names(model))):
        if trace.share(host.blocks) < LEAST_SHARE:
            continue
        tried += 1
        why = why_wrong(model, host, arguments, forward)
        if not why:
            return Found(host, trace.share(host.blocks), tried)
        if tried == most:
            break
    return Found(
        replace(
            output_host(type(model).__name__, argument_names(model)),
            why_output="none of its block lists could be proved",
        ),
        0.0,
        tried,
        why,
    )


def proposals(trace: Trace, base: Host) -> Iterator[Host]:
    for stack in trace.stacks():
        for final_layer, image_tokens in product(trace.final_layers(stack), trace.image_tokens(stack)):
            host = replace(base, blocks=stack, final_layer=final_layer, image_tokens=image_tokens)
            yield host
            yield replace(host, in_place=True)
            if final_layer:
                yield replace(host, reads_blocks=True)


def why_wrong(model: torch.nn.Module, host: Host, arguments: dict, forward: Callable[[], Any]) -> str:
    """Why these facts are not those of the model, or ""."""
    try:
        stack = BlockStack(model, host)
        stack.record(arguments)
        try:
            output = forward()
        except BaseException:
            stack.restore()
            raise
        residual = stack.finish()
    except torch.cuda.OutOfMemoryError:
        raise
    except MISFITS as error:
        return f"{type(error).__name__}: {error}"
    if not residual.any():
        return "no residual"
    return disproof(stack, residual, output, forward)


def host_line(model: torch.nn.Module, found: Found) -> str:
    """The line to contribute to common/hosts/diffusers.py, and how sure it is."""
    default = {field.name: field.default for field in fields(Host)}
    facts = [f"{name}={value!r}" for name, value in vars(found.host).items() if value != default[name]]
    said = f'"{class_name(model)}": Host({", ".join(facts)}),'
    if found.host.blocks:
        return f"{said}\n# proved on this model, try {found.tries}; {found.share:.0%} of the work in its block lists"
    return f"{said}\n# {found.why} ({found.tries} proposals)"


def first_call(pipe, **arguments) -> tuple[torch.nn.Module, tuple, dict]:
    """The denoiser of a pipeline and the arguments of its first call in pipe(**arguments), which ends there."""
    from .denoisers import denoisers

    class Reached(BaseException):
        pass

    model, caught = denoisers(pipe)[0].models[0], []

    def stop(module, args, kwargs):
        caught.append((args, kwargs))
        raise Reached

    hook = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        pipe(**arguments)
    except Reached:
        return model, *caught[0]
    finally:
        hook.remove()
    raise MagCacheError(f"{type(pipe).__name__} never called its {type(model).__name__}.")


class FirstForward(InstanceForward):
    """Of a model whose facts its first call shows (`PatchAfterDiscovery`)."""

    __slots__ = ("magcache",)

    def __init__(self, magcache: PatchAfterDiscovery) -> None:
        own = magcache.own_forward
        super().__init__(magcache.model, own or getattr(magcache.model, magcache.place), own is not None)
        self.magcache = magcache

    def __call__(self, *args, **kwargs):
        return self.magcache.first_call(*args, **kwargs)


class PatchAfterDiscovery:
    """Stands on a model whose class nobody described, until its first call shows the facts; then the patch is put on,
    and this passes on to it."""

    def __init__(self, model: torch.nn.Module, patch: Callable[[Host], Patch], owner: Any = None) -> None:
        self.model, self.make_patch, self.owner = model, patch, owner
        self.patch: Patch | None = None
        self.put_on()

    def put_on(self) -> None:
        """Raises MagCacheError if a patch is on the model, also of a pipeline that shares it: its call would run within
        the search."""
        if patches_of(self.model):
            raise MagCacheError(PATCHED_ALREADY)
        self.active = True
        # An offload hook of accelerate takes itself off and on again after each run, with what it wraps.
        self.place = "_old_forward" if "_old_forward" in self.model.__dict__ else "forward"
        self.own_forward = self.model.__dict__.get(self.place)
        setattr(self.model, self.place, FirstForward(self))

    def first_call(self, *args, **kwargs):
        self.take_off()
        if self.active and self.patch is None:
            self.patch = self.make_patch(discover(self.model, args, kwargs).host)
        return self.model.forward(*args, **kwargs)

    def take_off(self) -> None:
        if self.patch is None:
            delattr(self.model, self.place)
            if self.own_forward is not None:
                setattr(self.model, self.place, self.own_forward)

    @property
    def reports(self) -> list[RunReport]:
        return self.patch.reports if self.patch else []

    def settle(self) -> None:
        if self.patch:
            self.patch.settle()

    def end_run(self) -> None:
        if self.patch:
            self.patch.end_run()

    def remove(self) -> None:
        if self.patch:
            self.patch.remove()
        elif self.active:
            self.take_off()
        self.active = False

    def __enter__(self) -> PatchAfterDiscovery:
        if not self.active:
            (self.patch or self).put_on()
            self.active = True
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.remove()
        if self.patch and kind is None:
            self.patch.require_reached()
            failure = getattr(self.patch, "failure", None)
            if failure:
                raise failure
