"""A drop-in beside an upstream checkout's own script: the script's parser with the MagCache flags, its rendering
cached, calibrated or compared, its output saved whole with a report beside it."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from ..calibration import fingerprint
from ..errors import MagCacheError
from .flags import add_magcache_flags

SETTING_FLAGS = (
    "magcache_thresh",
    "magcache_K",
    "retention_ratio",
    "magcache_speedup",
    "magcache_steps",
    "magcache_max_error",
    "mag_ratios",
)


def run_script(run, script):
    """Run a drop-in, given its settings by name (`globals()`); a mistake of the user ends it with one sentence."""
    try:
        run(script)
    except MagCacheError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


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
def flags_added(module, add):
    """For its duration, every ArgumentParser that `module` makes also has the flags of `add(parser)`."""

    class Parser(argparse.ArgumentParser):
        def parse_args(self, *args, **kwargs):
            add(self)
            return super().parse_args(*args, **kwargs)

    module.argparse, plain = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser}), module.argparse
    try:
        yield
    finally:
        module.argparse = plain


def add_flags(parser):
    """The MagCache flags of a drop-in whose host computes everything unless it is asked not to."""
    group = add_magcache_flags(parser)
    group.add_argument(
        "--use_magcache",
        action="store_true",
        help="render with MagCache, by the settings of the task; any setting of this group implies it",
    )


def flags_taken(add):
    """Take the flags of `add(parser)` out of sys.argv, for hosts whose own parser knows of nothing else. Returns them
    parsed. Raises MagCacheError for a flag that looks like one of them and is none: such hosts may pass over it in
    silence."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add(parser)
    args, rest = parser.parse_known_args(sys.argv[1:])
    ours = {action.option_strings[0].replace("-", "_"): action.option_strings[0] for action in parser._actions}
    for flag in (flag.split("=")[0] for flag in rest if flag.startswith("--")):
        near = get_close_matches(flag.replace("-", "_"), ours, n=1, cutoff=0.8)
        if near or "magcache" in flag:
            raise MagCacheError(f"There is no flag {flag}" + (f"; {ours[near[0]]} is the nearest." if near else "."))
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    sys.argv[1:] = rest
    return args


@contextmanager
def timesteps_noted(scheduler_classes):
    """A function that returns the timesteps last set on a scheduler of these classes, for samplers that keep theirs
    local."""
    noted = [None]

    def noting(set_timesteps):
        @functools.wraps(set_timesteps)
        def noting_set_timesteps(self, *args, **kwargs):
            result = set_timesteps(self, *args, **kwargs)
            noted[0] = self.timesteps
            return result

        return noting_set_timesteps

    plain = {scheduler: scheduler.set_timesteps for scheduler in scheduler_classes}
    for scheduler, set_timesteps in plain.items():
        scheduler.set_timesteps = noting(set_timesteps)
    try:
        yield lambda: noted[0]
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


def switched_on(args):
    """Whether the flags ask for MagCache: --use_magcache itself, or any of its settings."""
    return args.magcache and (
        args.use_magcache or args.compare or any(getattr(args, name) is not None for name in SETTING_FLAGS)
    )
