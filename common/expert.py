"""Replace the forward of one model instance, and put it back."""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .blocks import Host, TokensChanged
from .errors import MagCacheError
from .payloads import Payload

if TYPE_CHECKING:
    from .handle import Patch


PATCHED_ALREADY = "This model is patched already; remove the first patch (handle.remove()) before the second."


@functools.cache
def graphs_know_the_class() -> bool:
    """Whether graphs that torch.compile makes of a whole model are guarded by the model's class, which tells them from
    those of a model with stand-ins: since torch 2.5. Before that, such a model runs uncompiled; separately compiled
    blocks stay compiled."""
    return torch.torch_version.TorchVersion(torch.__version__) >= "2.5"


class Expert:
    """One model instance whose forward is replaced. Most samplers have one; some divide their steps between two.

    on: whether the replacement is to be there; payload: what is kept of its calls.
    """

    def __init__(
        self, model: torch.nn.Module, host: Host, patch: Patch, payload: Callable[[torch.nn.Module, Host], Payload]
    ) -> None:
        self.model, self.patch = inner_module(model), patch
        self.payload = payload(self.model, host)
        self.argument_names = argument_names(self.model)
        self.forward = PatchedForward(self, self.model.forward, own=False)
        self.on = False

    def put_on(self) -> None:
        """Replace the forward. Raises MagCacheError if another cache is on the model, or another patch, unless the two
        patches belong to pipelines that share the model."""
        owner = self.patch.owner
        for other in patches_of(self.model):
            known = owner is not None and other.owner not in (None, owner) and hasattr(other, "experts")
            if other is not self.patch and not known:
                raise MagCacheError(PATCHED_ALREADY)
        self.refuse_other_caches()
        self.on = True
        if self.is_on():  # another wrapper has kept it from the last time
            return
        # accelerate's offload hooks go off and on again after each run, and take along what they wrap.
        place = "_old_forward" if "_old_forward" in self.model.__dict__ else "forward"
        self.forward = PatchedForward(self, getattr(self.model, place), own=place in self.model.__dict__)
        setattr(self.model, place, self.forward)

    def take_off(self) -> None:
        """Restore the model. If something else (an offload hook, another pipeline's patch) has wrapped the patch since,
        the patch stays in that chain and only passes calls on."""
        self.on = False
        for place in ("forward", "_old_forward"):
            if self.model.__dict__.get(place) is self.forward:
                forward = self.forward
                while isinstance(forward.original, PatchedForward) and not forward.original.is_on:
                    forward = forward.original
                if place == "forward" and not forward.own:
                    del self.model.forward
                else:
                    setattr(self.model, place, forward.original)

    def is_on(self) -> bool:
        """Whether calls of the model come here, as far as wrappers tell what they wrap."""
        return any(forward is self.forward for forward in forwards(self.model))

    def stay_on(self) -> None:
        """After a call: put the patch on again if a hook below it removed itself during the call and put back the
        forward that it had found, without the patch (diffusers' prefetching does once it knows the order of layers)."""
        if not self.on:  # removed during the call
            return
        found = self.model.__dict__.get("forward")
        below = getattr(self.forward.original, "__wrapped__", None)
        while below is not None and below is not found:
            below = getattr(below, "__wrapped__", None)
        if below is found and found is not None:
            self.forward = PatchedForward(self, found, own=True)
            self.model.forward = self.forward

    def refuse_other_caches(self) -> None:
        """Raises MagCacheError if another cache is on this model: each would reuse what the other made."""
        if getattr(self.model, "is_cache_enabled", False):
            raise MagCacheError(
                f"A cache of diffusers is on in this {type(self.model).__name__}, and two caches do not go together: "
                "call its disable_cache() first."
            )
        if self.model.__dict__.get("_is_cached"):
            raise MagCacheError(
                f"cache-dit is on in this {type(self.model).__name__}, and two caches do not go together: call "
                "cache_dit.disable_cache(pipe) first."
            )


class InstanceForward:
    """Takes the place of a model's forward. A copied or pickled model gets the original forward instead, because a
    patch belongs to the instance that it was put on.

    original: the forward that was there; own: whether it was an attribute of the instance, not of its class.
    """

    __slots__ = ("model", "original", "own", "__weakref__")

    def __init__(self, model: torch.nn.Module, original: Callable, own: bool) -> None:
        self.model, self.original, self.own = model, original, own

    def __deepcopy__(self, memo: dict) -> Any:
        model = memo.get(id(self.model))
        if model is None:
            return self  # only the forward is being copied, not the model
        if self.own:
            return copy.deepcopy(self.original, memo)
        return types.MethodType(type(model).forward, model)

    def __reduce__(self):
        if self.own:
            return as_it_is, (self.original,)
        return getattr, (self.model, "forward")


class PatchedForward(InstanceForward):
    """Of an `Expert`'s model."""

    __slots__ = ("expert",)

    def __init__(self, expert: Expert, original: Callable, own: bool) -> None:
        super().__init__(expert.model, original, own)
        self.expert = expert

    # Dynamo must not trace this; the original forward, called from here, is still compiled.
    @functools.partial(torch.compiler.disable, recursive=False)
    def __call__(self, *args, **kwargs):
        expert, patch = self.expert, self.expert.patch
        with patch.lock:  # other threads wait, because stand-ins are on the model during a call
            caching = patch.active and expert.forward is self
            call = patch.begin_call(expert, args, kwargs) if caching else None
            try:
                if call is None:
                    return self.original(*args, **kwargs)
                original = self.original if graphs_know_the_class() else torch.compiler.disable(self.original)
                try:
                    output = original(*args, **kwargs) if call.output is None else call.output
                except TokensChanged as changed:
                    call = patch.compute_instead(call, str(changed))
                    output = original(*args, **kwargs)
                return patch.finish_call(call, output, functools.partial(original, *args, **kwargs))
            except BaseException:
                if call is not None:
                    patch.cancel_call(call)
                raise
            finally:
                expert.stay_on()

    def __get__(self, model: Any, model_class: Any = None) -> PatchedForward:
        """Itself, as it is bound already: cache-dit binds the forward that it finds to the model."""
        return self

    @property
    def magcache(self) -> Patch:
        return self.expert.patch

    @property
    def is_on(self) -> bool:
        return self.expert.on and self.expert.forward is self

    @property
    def __wrapped__(self):  # for inspect.signature
        return self.original

    @property
    def __name__(self):
        return "forward"


def as_it_is(value: Any) -> Any:
    """For `__reduce__`, which needs a function."""
    return value


def forwards(model: torch.nn.Module) -> Iterator[Any]:
    """A model's forward and all that it wraps, as far as wrappers tell (`functools.wraps`, accelerate's hooks)."""
    seen, waiting = set(), [model.__dict__.get("forward"), model.__dict__.get("_old_forward")]
    while waiting:
        forward = waiting.pop(0)
        if forward is not None and id(forward) not in seen:
            seen.add(id(forward))
            yield forward
            waiting.append(getattr(forward, "__wrapped__", None))


def patches_of(model: torch.nn.Module) -> list[Patch]:
    """The active patches that calls of a model go through, as far as wrappers tell what they wrap: usually one, or one
    for each of the pipelines that share the model."""
    patches = (getattr(forward, "magcache", None) for forward in forwards(inner_module(model)))
    return [patch for patch in patches if patch is not None and patch.active]


def inner_module(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, inside torch.compile, FSDP or DataParallel wrappers."""
    for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        if name in model.__dict__.get("_modules", {}):
            return inner_module(getattr(model, name))
    return model


def argument_names(model: torch.nn.Module) -> list[str]:
    """Names of the arguments of a model's forward: of its class's, because a wrapper on the instance may hide them; of
    the instance's where the class has none."""
    forward = type(model).forward
    if forward is torch.nn.Module.forward:
        return list(inspect.signature(model.forward).parameters)
    return list(inspect.signature(forward).parameters)[1:]


def noise_level(host: Host, arguments: dict) -> tuple[float, float]:
    """(noise level of a call, relative error that it may have). arguments: of the forward, by name."""
    timestep = arguments.get(host.timestep)
    # The highest, because tokens that are given (a video's first frame) may have a timestep of 0 of their own.
    if host.noise_level is None:
        return highest(timestep) / host.timestep_scale, level_tolerance(timestep)
    told = host.noise_level(arguments)
    level = highest(told)
    return level, level_tolerance(told) / min(1.0, max(level, 1e-3))  # 1 - t has the absolute error of t


def level_tolerance(timestep: Any) -> float:
    """Relative error that a noise level may have from rounding in the timestep's dtype."""
    if torch.is_tensor(timestep) and timestep.is_floating_point():
        return max(1e-6, 1.01 * torch.finfo(timestep.dtype).eps)
    return 1e-6


def highest(value: Any) -> float:
    """The largest of a tensor, or the number itself."""
    return float(value.max() if torch.is_tensor(value) else value)
