"""Ways of reaching into an upstream checkout: its own script, its schedulers, its loaders."""

from __future__ import annotations

import functools
import importlib.util
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch

from ..calibration import fingerprint
from ..errors import MagCacheError, escape_unprintable
from ..ranks import is_writer


def one_sentence(main):
    """A decorator: a mistake of the user, and a package that is missing, end `main` with one sentence, told by one
    process."""

    @functools.wraps(main)
    def told(*args, **kwargs):
        escape_unprintable()
        try:
            main(*args, **kwargs)
        except (MagCacheError, ModuleNotFoundError) as error:
            # Until the processes are a group they make the same mistake, each for itself.
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            if isinstance(error, ModuleNotFoundError):
                error = f"{error}: install it, or run this in the environment of the program that it belongs to."
            sys.exit(f"{Path(sys.argv[0]).name}: {error}" if is_writer() or distributed else 1)

    return told


def checkouts_script(name, upstream, folder):
    """The module of the checkout's own script `name`. Raises MagCacheError where there is none."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise MagCacheError(
            f"There is no {name}.py of {upstream} beside this script: python -m common install {folder} "
            f"/path/to/{upstream} puts it there."
        ) from None


def script_at(path):
    """The module of a script that lies in no package, by its path."""
    spec = importlib.util.spec_from_file_location(f"{Path(path).parent.name}_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def timesteps_noted(scheduler_classes):
    """A function that returns the timesteps last set on a scheduler of these classes, for samplers that keep theirs
    local; its `scheduler()` returns that scheduler."""
    noted = [None, None]

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
        timesteps = functools.partial(noted.__getitem__, 0)
        timesteps.scheduler = lambda: noted[1]
        yield timesteps
    finally:
        for scheduler, set_timesteps in plain.items():
            scheduler.set_timesteps = set_timesteps


@contextmanager
def checkpoints_noted(loader_class):
    """A dict {id of model: fingerprint} of all that `loader_class.from_pretrained` loads meanwhile: taken at once,
    since sharding and other types change what the weights look like."""
    noted, plain = {}, loader_class.__dict__["from_pretrained"]

    def from_pretrained(cls, *args, **kwargs):
        model = plain.__func__(cls, *args, **kwargs)
        noted[id(model)] = fingerprint(model)
        return model

    loader_class.from_pretrained = classmethod(from_pretrained)
    try:
        yield noted
    finally:
        loader_class.from_pretrained = plain
