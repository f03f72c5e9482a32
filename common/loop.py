"""Where the loop of a diffusers pipeline's sampler is, and where it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


class LoopEnd:
    """In the place of a pipeline's `progress_bar`, which surrounds the sampler's loop: when the loop is over, whoever
    ended it (the last step, `pipe._interrupt`, an exception in a callback), the handles' runs end, so that no residual
    takes memory while the VAE decodes."""

    def __init__(self, pipe: Any, handles: Sequence[Any]) -> None:
        self.pipe, self.handles = pipe, list(handles)
        there = vars(pipe).get("progress_bar")
        self.plain: Any = there.plain if isinstance(there, LoopEnd) else pipe.progress_bar
        pipe.progress_bar = self
        models = [expert.model for handle in handles for expert in getattr(handle, "experts", [handle])]
        self.contexts = [CacheContext(model) for model in models if hasattr(type(model), "cache_context")]

    def __call__(self, *args, **kwargs) -> Bar:
        return Bar(self, self.plain(*args, **kwargs))

    def over(self) -> None:
        for handle in self.handles:
            handle.settle()
            handle.end_run()

    def take_off(self) -> None:
        if vars(self.pipe).get("progress_bar") is self:
            del self.pipe.progress_bar
        for context in self.contexts:
            context.take_off()


class CacheContext:
    """In the place of a model's `cache_context`, by which some pipelines of diffusers tell where their loop is."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model: Any = model
        self.threads = threading.local()
        model.__dict__["cache_context"] = self

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
        """step_index, sigma, num_inference_steps, of the call that is under way in this thread; often none of them."""
        return getattr(self.threads, "told", {})

    def take_off(self) -> None:
        if self.model.__dict__.get("cache_context") is self:
            del self.model.__dict__["cache_context"]

    def __reduce__(self):  # a copy of the model has its own
        return getattr, (self.model, "cache_context")


class Bar:
    """A progress bar that tells when its loop is over, whether it is used as a context or iterated over."""

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
