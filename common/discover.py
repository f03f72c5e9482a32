"""Find the facts of a transformer class that MagCache does not know.

One forward is traced, and possible facts are proposed from it. A proposal is proved if its residual, put back on the
same inputs, gives the same output without running its blocks (`payloads.disproof`). The proposals whose blocks do the
most work are tried first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

LEAST_SHARE = 0.25  # of the work in all block lists that a stack must do


@dataclass(frozen=True)
class Found:
    """The result of a search.

    host: proved facts, otherwise those that suffice to predict the output; share: of the work of all block lists that
    its stack does, in 0..1; tries: proposals tried; why: reason why the last one failed, "" if it was proved.
    """

    host: Host
    share: float = 0.0
    tries: int = 0
    why: str = ""


class Trace:
    """The modules that one forward called. starts: (name of the child or block list, args, kwargs) of each call, in
    order; work: {name: weights times tokens}, which is proportional to the time and needs no clock."""

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

    def entering(self, name: str) -> Callable[..., None]:
        """A forward pre-hook that notes calls under this name."""

        def hook(module, args, kwargs):
            self.starts.append((name, args, kwargs))
            tokens = [value[..., 0].numel() for value in (*args, *kwargs.values()) if is_tokens(value)]
            weights = sum(parameter.numel() for parameter in module.parameters())
            self.work[name] = self.work.get(name, 0) + weights * max(tokens, default=0)

        return hook

    def stacks(self) -> list[tuple[str, ...]]:
        """Names of block lists that may form the stack: single lists, and lists that run one after another. Those that
        do the most work come first."""
        order = list(dict.fromkeys(name for name, *_ in self.starts if name in self.lists))
        runs = {tuple(order[first : last + 1]) for first, last in product(range(len(order)), repeat=2) if first <= last}
        return sorted(runs, key=lambda names: (-round(self.share(names), 1), len(names)))

    def share(self, names: Iterable[str]) -> float:
        """The share, in 0..1, of the work of all block lists that these do."""
        total = sum(self.work.get(name, 0) for name in self.lists)
        return sum(self.work.get(name, 0) for name in names) / total if total else 0.0

    def final_layers(self, stack: tuple[str, ...]) -> list[str | None]:
        """Modules that run after the last block of a stack, the nearest first; at the end None, for no final layer."""
        last = max(index for index, (name, *_) in enumerate(self.starts) if name in stack)
        return [*dict.fromkeys(name for name, *_ in self.starts[last + 1 :] if name not in self.lists), None]

    def image_tokens(self, stack: tuple[str, ...]) -> list[str | int]:
        """Arguments of the first block that may be the image tokens, by name or position, the usual names first."""
        _, args, kwargs = next(start for start in self.starts if start[0] in stack)
        named = {**dict(enumerate(args)), **kwargs}
        keys = [key for key, value in named.items() if is_tokens(value)]
        return sorted(keys, key=lambda key: key not in ("hidden_states", "x", "img", 0))


def is_tokens(value: Any) -> bool:
    """Whether a block's argument may be tokens: floats (batch, tokens, width), or packed (tokens, width)."""
    return torch.is_tensor(value) and value.ndim in (2, 3) and value.is_floating_point()


def discover(model: torch.nn.Module, args: tuple, kwargs: dict, most: int = 24) -> Found:
    """Find the facts of a model, from a call with these arguments, by calling its forward un-cached several times.

    most: how many proposals to try.
    """

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
    """Facts that may be true, the likeliest first. base: the facts that all share."""
    for stack in trace.stacks():
        for final_layer, image_tokens in product(trace.final_layers(stack), trace.image_tokens(stack)):
            host = replace(base, blocks=stack, final_layer=final_layer, image_tokens=image_tokens)
            yield host
            yield replace(host, in_place=True)
            if final_layer:
                yield replace(host, reads_blocks=True)


def why_wrong(model: torch.nn.Module, host: Host, arguments: dict, forward: Callable[[], Any]) -> str:
    """Why these facts are wrong for the model; "" if they are proved. arguments: of its forward, by name; forward:
    calls it with them."""
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
    """The line to add to common/hosts/diffusers.py, and a comment on how it was found."""
    default = {field.name: field.default for field in fields(Host)}
    facts = [f"{name}={value!r}" for name, value in vars(found.host).items() if value != default[name]]
    said = f'"{class_name(model)}": Host({", ".join(facts)}),'
    if found.host.blocks:
        return f"{said}\n# proved on this model, try {found.tries}; {found.share:.0%} of the work in its block lists"
    return f"{said}\n# {found.why} ({found.tries} proposals)"


def first_call(pipe: Any, **arguments: Any) -> tuple[torch.nn.Module, tuple, dict]:
    """(denoiser, args, kwargs) of the first model call in pipe(**arguments), which is ended there. Raises MagCacheError
    if the pipeline never calls its denoiser."""
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
    """The forward of a model until its first call (`PatchAfterDiscovery`)."""

    __slots__ = ("magcache",)

    def __init__(self, magcache: PatchAfterDiscovery) -> None:
        own = magcache.own_forward
        super().__init__(magcache.model, own or getattr(magcache.model, magcache.place), own is not None)
        self.magcache = magcache

    def __call__(self, *args, **kwargs):
        return self.magcache.first_call(*args, **kwargs)


class PatchAfterDiscovery:
    """Replaces the forward of a model of unknown class. At its first call it finds the facts and puts a patch on the
    model, to which it delegates from then on.

    patch: makes that patch from the facts; owner: the pipeline, as for the patch (None: any).
    """

    def __init__(self, model: torch.nn.Module, patch: Callable[[Host], Patch], owner: Any = None) -> None:
        self.model, self.make_patch, self.owner = model, patch, owner
        self.patch: Patch | None = None
        self.put_on()

    def put_on(self) -> None:
        """Replace the forward. Raises MagCacheError if the model is patched already, even for another pipeline: that
        patch would take part in the search."""
        if patches_of(self.model):
            raise MagCacheError(PATCHED_ALREADY)
        self.active = True
        # accelerate's offload hooks remove and restore themselves after each run, with the forward that they wrap.
        self.place = "_old_forward" if "_old_forward" in self.model.__dict__ else "forward"
        self.own_forward = self.model.__dict__.get(self.place)
        setattr(self.model, self.place, FirstForward(self))

    def first_call(self, *args: Any, **kwargs: Any) -> Any:
        """Find the facts, put the patch on, and run the call."""
        self.take_off()
        if self.active and self.patch is None:
            self.patch = self.make_patch(discover(self.model, args, kwargs).host)
        return self.model.forward(*args, **kwargs)

    def take_off(self) -> None:
        """Restore the forward, unless the patch has replaced it."""
        if self.patch is None:
            delattr(self.model, self.place)
            if self.own_forward is not None:
                setattr(self.model, self.place, self.own_forward)

    @property
    def reports(self) -> list[RunReport]:
        """`Patch.reports`; empty until the first call."""
        return self.patch.reports if self.patch else []

    def settle(self) -> None:
        """`Patch.settle`."""
        if self.patch:
            self.patch.settle()

    def end_run(self) -> None:
        """`Patch.end_run`."""
        if self.patch:
            self.patch.end_run()

    def remove(self) -> None:
        """`Patch.remove`, or restore the forward before the first call."""
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
