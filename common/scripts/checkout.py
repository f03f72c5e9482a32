"""Hooks into an upstream checkout: its script, its schedulers, its loaders."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..calibration import fingerprint
from ..errors import MagCacheError, escape_unprintable
from ..ranks import is_writer


def one_sentence(main: Callable[..., None]) -> Callable[..., None]:
    """A decorator for `main`: a user's mistake or a missing package ends the program with one sentence, which only one
    process prints."""

    @functools.wraps(main)
    def with_one_sentence(*args, **kwargs):
        escape_unprintable()
        try:
            main(*args, **kwargs)
        except (MagCacheError, ModuleNotFoundError) as error:
            # Before the processes form a group, all of them make the same mistake.
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if isinstance(error, ModuleNotFoundError):
                error = f"{error}: install it, or run this in the environment of the program that it belongs to."
            sys.exit(f"{Path(sys.argv[0]).name}: {error}" if is_writer() or distributed else 1)

    return with_one_sentence


def checkouts_script(name: str, upstream: str, folder: str) -> Any:
    """Import the checkout's script `name`. upstream, folder: names of the checkout and of the drop-in folder, for the
    message. Raises MagCacheError if there is no such script."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MagCacheError(
            f"There is no {name}.py of {upstream} beside this script: python -m common install {folder} "
            f"/path/to/{upstream} puts it there."
        ) from None


def script_at(path: Path) -> Any:
    """Import the script at this path."""
    spec: Any = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def timesteps_noted(scheduler_classes: Iterable[Any]) -> Iterator[Any]:
    """A context that notes the timesteps set on schedulers of these classes, for samplers that keep their scheduler in
    a local variable. Gives a function that returns the newest timesteps; its attribute `scheduler` is a function that
    returns their scheduler."""
    noted: list[Any] = [None, None]

    def noting(set_timesteps):
        @functools.wraps(set_timesteps)
        def noting_set_timesteps(self, *args, **kwargs):
            result = set_timesteps(self, *args, **kwargs)
            noted[:] = self.timesteps, self
            return result

        return noting_set_timesteps

    plain = {scheduler: scheduler.set_timesteps for scheduler in scheduler_classes}
    for scheduler, set_timesteps in plain.items():
        scheduler.set_timesteps = noting(set_timesteps)
    try:
        timesteps: Any = functools.partial(noted.__getitem__, 0)
        timesteps.scheduler = lambda: noted[1]
        yield timesteps
    finally:
        for scheduler, set_timesteps in plain.items():
            scheduler.set_timesteps = set_timesteps


@contextmanager
def checkpoints_noted(loader_class: Any) -> Iterator[dict[int, str]]:
    """A context that takes the fingerprint of each model as soon as `loader_class.from_pretrained` has loaded it,
    because sharding and casting change the weights. Gives {id of the model: fingerprint}."""
    noted: dict[int, str] = {}
    plain = loader_class.__dict__["from_pretrained"]

    def from_pretrained(cls, *args, **kwargs):
        model = plain.__func__(cls, *args, **kwargs)
        noted[id(model)] = fingerprint(model)
        return model

    loader_class.from_pretrained = classmethod(from_pretrained)
    try:
        yield noted
    finally:
        loader_class.from_pretrained = plain
