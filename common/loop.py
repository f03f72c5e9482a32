"""Notice where the loop of a diffusers pipeline's sampler is, and where it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .expert import as_it_is


class LoopEnd:
    """Takes the place of a pipeline's `progress_bar`, which surrounds the sampler's loop. When the loop ends, whether
    by its last step, `pipe._interrupt` or an exception in a callback, so do the handles' runs: no residual takes memory
    while the VAE decodes.

    before: what the pipeline object itself had there, usually nothing; plain: the method that it then had.
    """

    def __init__(self, pipe: Any, handles: Sequence[Any]) -> None:
        self.pipe, self.handles = pipe, list(handles)
        there = vars(pipe).get("progress_bar")
        self.before: Any = there.before if isinstance(there, LoopEnd) else there
        self.plain: Any = there.plain if isinstance(there, LoopEnd) else pipe.progress_bar
        pipe.progress_bar = self
        models = [expert.model for handle in handles for expert in getattr(handle, "experts", [handle])]
        self.contexts = [CacheContext.of(model) for model in models if hasattr(type(model), "cache_context")]
        for context in self.contexts:
            context.users.append(self)

    def __call__(self, *args, **kwargs) -> Bar:
        return Bar(self, self.plain(*args, **kwargs))

    def over(self) -> None:
        """The loop has ended."""
        for handle in self.handles:
            handle.settle()
            handle.end_run()

    def take_off(self) -> None:
        if vars(self.pipe).get("progress_bar") is self:
            del self.pipe.progress_bar
            if self.before is not None:
                self.pipe.progress_bar = self.before
        for context in self.contexts:
            context.leave(self)

    def __reduce__(self):  # a copy of the pipeline has its own progress bar
        return (getattr, (self.pipe, "progress_bar")) if self.before is None else (as_it_is, (self.before,))


class CacheContext:
    """Takes the place of a model's `cache_context`, in which some pipelines of diffusers tell where their loop is.
    users: the `LoopEnd` of each pipeline that shares the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.users: list[LoopEnd] = []
        self.threads = threading.local()
        model.__dict__["cache_context"] = self

    @classmethod
    def of(cls, model: torch.nn.Module) -> CacheContext:
        """The one that is there already, or a new one."""
        there = model.__dict__.get("cache_context")
        return there if isinstance(there, cls) else cls(model)

    @contextmanager
    def __call__(self, name: str, **told) -> Iterator[None]:
        self.threads.told = told
        try:
            with type(self.model).cache_context(self.model, name, **told):
                yield
        finally:
            self.threads.told = {}

    @property
    def told(self) -> dict[str, Any]:
        """step_index, sigma and num_inference_steps of this thread's call under way, as far as the pipeline tells
        them."""
        return getattr(self.threads, "told", {})

    def leave(self, user: LoopEnd) -> None:
        """Remove a user; the last one to leave restores the model."""
        self.users = [other for other in self.users if other is not user]
        if not self.users and self.model.__dict__.get("cache_context") is self:
            del self.model.__dict__["cache_context"]

    def __reduce__(self):  # a copy of the model has its own
        return getattr, (self.model, "cache_context")


class Bar:
    """A progress bar that tells when its loop has ended, used as a context manager or iterated over."""

    def __init__(self, end: LoopEnd, bar: Any) -> None:
        self.end, self.bar = end, bar

    def __enter__(self) -> Any:
        return self.bar.__enter__()

    def __exit__(self, *error) -> Any:
        try:
            return self.bar.__exit__(*error)
        finally:
            self.end.over()

    def __iter__(self) -> Iterator:
        try:
            yield from self.bar
        finally:
            self.end.over()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)
