"""What the Wan2.1 and Wan2.2 folders share: the facts of Wan's transformer, and their checkouts' generate.py with
MagCache."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import MagCacheError
from ..expert import inner_module
from ..hosts import WAN
from ..ranks import is_writer
from .checkout import (
    add_flags,
    checkouts_script,
    checkpoints_noted,
    flags_added,
    run_script,
    switched_on,
    timesteps_noted,
)
from .flags import check_flags
from .session import Session

SAVERS = (
    "cache_video",
    "cache_image",
    "save_video",
)  # what generate.py writes its result with, in one version or another


def main(script):
    """Run a magcache_generate.py, given its settings by name (`globals()`)."""
    run_script(run, script)


def run(script):
    generate = checkouts_script("generate", script["UPSTREAM"], script["FOLDER"])
    with flags_added(generate, add_flags):
        args = generate._parse_args()
    check_flags(args)
    if args.magcache_calibration is None and not switched_on(args):
        if is_writer() and args.magcache:
            print("MagCache is off; --use_magcache turns it on.")
        return generate.generate(args)
    wan = importlib.import_module("wan")
    session = session_of(args, script)
    session.check(args.save_file)
    for name in script["PIPELINES"]:
        if hasattr(wan, name):
            setattr(wan, name, cached(getattr(wan, name), session))
    rename = None if args.save_file else "magcache_{}".format
    for name in SAVERS:
        if hasattr(generate, name):
            setattr(generate, name, session.saving(getattr(generate, name), rename))
    generate.generate(args)


def session_of(args, script):
    """The Session of a command line. Raises MagCacheError for a task that MagCache does not know."""
    if args.task not in script["SETTINGS"]:
        raise MagCacheError(
            f"MagCache knows the tasks {', '.join(script['SETTINGS'])}, not {args.task}; leave out --use_magcache."
        )
    lines = dict(zip(("magcache_thresh", "magcache_K", "retention_ratio"), script["SETTINGS"][args.task]))
    task = args.task if args.task != "ti2v-5B" else f"ti2v-5B-{'i2v' if args.image else 't2v'}"
    width, height = map(int, args.size.split("*"))
    about = {
        "prompt": args.prompt,
        "seed": args.base_seed,
        "solver": args.sample_solver,
        "shift": args.sample_shift,
        "guide_scale": args.sample_guide_scale,
    }
    return Session(
        args, lines, task, f"{width}x{height}", args.frame_num, published(args, script["TABLES"], task), about
    )


def published(args, tables, task):
    """The name of the table that was published for the checkpoint, as its own config.json describes it, or None.

    tables: {"model_type dim": preset}, with the task after it where one checkpoint serves two, or 480p or 720p where
    checkpoints differ in nothing but the size that they were trained for.
    """
    config = checkpoint_config(args)
    kind = f"{config.get('model_type')} {config.get('dim')}"
    width, height = map(int, args.size.split("*"))
    size = "480p" if width * height <= 832 * 480 else "720p"
    if args.frame_num == 1:
        return None  # every table is of a video
    return next((tables[key] for key in (f"{kind} {task}", f"{kind} {size}", kind) if key in tables), None)


def checkpoint_config(args):
    """config.json of the transformer, or of the high-noise expert; empty where the host will miss it too."""
    folder = Path(args.ckpt_dir)
    for path in (folder / "high_noise_model" / "config.json", folder / "config.json"):
        if path.is_file():
            return json.loads(path.read_text())
    return {}


def cached(pipeline_class, session):
    """A pipeline class of the checkout whose `generate` goes through a session."""

    class Cached(pipeline_class):
        def __init__(self, *args, **kwargs):
            from diffusers import ModelMixin

            with checkpoints_noted(ModelMixin) as self.checkpoints:
                super().__init__(*args, **kwargs)

        def generate(self, *args, sampling_steps, **kwargs):
            models = experts_of(self)
            checkpoint = "-".join(self.checkpoints[id(inner_module(model))] for model in models)
            host = host_of(self, inner_module(models[0]))
            plain = super().generate
            with timesteps_noted(schedulers_of(pipeline_class)) as timesteps:
                session.patch(models, host, timesteps, checkpoint, self.boundary if len(models) == 2 else None)
                return session.render(lambda steps: plain(*args, sampling_steps=steps, **kwargs), sampling_steps)

    Cached.__name__ = pipeline_class.__name__
    return Cached


def experts_of(pipe):
    """The transformer of a pipeline; with two experts, both, the one for high noise first."""
    return [pipe.high_noise_model, pipe.low_noise_model] if hasattr(pipe, "high_noise_model") else [pipe.model]


def schedulers_of(pipeline_class):
    module = vars(sys.modules[pipeline_class.__module__])
    return [value for value in module.values() if isinstance(value, type) and hasattr(value, "set_timesteps")]


def host_of(pipe, model):
    """WAN, with what is particular to a VACE model and to sequence parallelism."""
    host = replace(WAN, hint_methods=("forward_vace",)) if hasattr(model, "forward_vace") else WAN
    if pipe.sp_size == 1:
        return host
    rank = torch.distributed.get_rank()

    def share(forward):
        """Tokens of this rank that are no padding: the sequence is made up to a multiple of the ranks."""
        tokens = math.prod(size // patch for size, patch in zip(forward["x"][0].shape[1:], model.patch_size))
        mine = forward["seq_len"] // pipe.sp_size
        return min(max(tokens - rank * mine, 0), mine)

    return replace(
        host,
        noise_tokens=share,
        residual_shape=lambda model, forward: (len(forward["x"]), forward["seq_len"] // pipe.sp_size, model.dim),
    )
