"""Shared by MagCache4Wan2.1 and MagCache4Wan2.2: the checkout's generate.py with MagCache."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..blocks import Host
from ..errors import MagCacheError
from ..expert import inner_module
from ..hosts.checkouts import WAN, WAN_S2V
from ..ranks import is_writer
from .checkout import checkouts_script, checkpoints_noted, one_sentence, timesteps_noted
from .flags import add_opt_in_flags, check_flags, flags_taken, named_settings, switched_on
from .quality import PICTURES, VIDEO_SUFFIXES
from .session import Session

SAVERS = ("cache_video", "cache_image", "save_video")  # the functions that write the result, by version


@one_sentence
def main(
    *, settings: dict[str, tuple], tables: dict[str, str], pipelines: Sequence[str], upstream: str, folder: str
) -> None:
    """Run the checkout's generate.py with MagCache.

    settings: {task: (magcache_thresh, magcache_K, retention_ratio)}; tables: see `published_for_task`; pipelines:
    names of the classes in the package `wan` that render; upstream, folder: names of the checkout and of this folder.
    """
    generate = checkouts_script("generate", upstream, folder)
    args = flags_taken(add_opt_in_flags)
    host_args = generate._parse_args()
    check_flags(args)
    if args.magcache_calibration is None and not switched_on(args):
        if is_writer() and args.magcache:
            print("MagCache is off; --use_magcache turns it on.")
        generate.generate(host_args)
        return
    wan = importlib.import_module("wan")
    session = wan_session(args, host_args, settings, tables)
    if host_args.save_file:
        session.check(host_args.save_file, (*PICTURES, ".tiff", ".gif") if "t2i" in host_args.task else VIDEO_SUFFIXES)
    else:
        session.check("output")
    for name in pipelines:
        if hasattr(wan, name):
            setattr(wan, name, wan_with_session(getattr(wan, name), lambda *args, **kwargs: session))
    rename = None if host_args.save_file else "magcache_{}".format

    def saving(write):
        save = session.saving(write, rename)

        def save_and_note(**kwargs):  # generate.py adds the sound to the file of this name
            host_args.save_file = save(**kwargs)

        return save_and_note

    for name in SAVERS:
        if hasattr(generate, name):
            setattr(generate, name, saving(getattr(generate, name)))
    generate.generate(host_args)


def wan_session(
    args: argparse.Namespace, host_args: argparse.Namespace, settings: dict[str, tuple], tables: dict[str, str]
) -> Session:
    """The Session of a command line. args: MagCache's flags; host_args: those of generate.py; settings, tables: see
    `main`. Raises MagCacheError for a task that MagCache does not know."""
    if host_args.task not in settings:
        raise MagCacheError(
            f"MagCache knows the tasks {', '.join(settings)}, not {host_args.task}; leave out --use_magcache."
        )
    task = host_args.task
    if task == "ti2v-5B":
        task = f"ti2v-5B-{'i2v' if host_args.image else 't2v'}"
    if getattr(host_args, "use_relighting_lora", False):  # loaded after the fingerprint is taken
        task = f"{task}-relighting"
    width, height = map(int, host_args.size.split("*"))
    about = {
        "prompt": host_args.prompt,
        "seed": host_args.base_seed,
        "solver": host_args.sample_solver,
        "shift": host_args.sample_shift,
        "guide_scale": host_args.sample_guide_scale,
    }
    return Session(
        args,
        named_settings(settings[host_args.task]),
        task,
        f"{width}x{height}",
        host_args.infer_frames if task == "s2v-14B" else host_args.frame_num,  # per segment
        host_args.sample_steps,
        published_for_task(host_args, tables, task),
        about,
        family="wan",
        weights=host_args.ckpt_dir,
    )


def published_for_task(args: argparse.Namespace, tables: dict[str, str], task: str) -> str | None:
    """The preset published for a checkpoint, which is recognised by its config.json; None: there is none.

    args: the flags of generate.py. tables: {"model_type dim": preset}; the key ends in the task if one checkpoint
    serves two, or in 480p or 720p if two checkpoints differ only in the size that they were trained for.
    """
    config = checkpoint_config(args.ckpt_dir)
    kind = f"{config.get('model_type')} {config.get('dim')}"
    width, height = map(int, args.size.split("*"))
    size = "480p" if width * height <= 832 * 480 else "720p"
    if args.frame_num == 1:
        return None  # every table was measured on videos
    return next((tables[key] for key in (f"{kind} {task}", f"{kind} {size}", kind) if key in tables), None)


def checkpoint_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of the transformer, or of the high-noise expert; {} if it is missing or cannot be read. Raises
    MagCacheError if there is no such folder."""
    folder = Path(folder)
    if is_writer() and not folder.is_dir():
        raise MagCacheError(f"There is no folder {folder}: --ckpt_dir names the folder of the checkpoint.")
    for path in (folder / "high_noise_model" / "config.json", folder / "config.json"):
        if path.is_file():
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                if is_writer():
                    print(f"Ignored: {path} cannot be read ({error}), so no published ratios are looked for.")
    return {}


def wan_with_session(pipeline_class: Any, session_of: Callable[..., Session | None]) -> type:
    """A subclass of a pipeline of the checkout, whose `generate` renders with MagCache.

    session_of: (pipeline, arguments of its `generate`) -> the Session; None: render without MagCache.
    """

    class Cached(pipeline_class):
        def __init__(self, config, checkpoint_dir, *args, **kwargs):
            from diffusers import ModelMixin

            self.checkpoint_dir = checkpoint_dir
            with checkpoints_noted(ModelMixin) as noted:
                super().__init__(config, checkpoint_dir, *args, **kwargs)
            self.checkpoint = "-".join(noted[id(inner_module(model))] for model in experts_of(self))

        def generate(self, *args, sampling_steps, **kwargs):
            session = session_of(self, *args, sampling_steps=sampling_steps, **kwargs)
            plain = super().generate
            if session is None:
                return plain(*args, sampling_steps=sampling_steps, **kwargs)
            models = experts_of(self)
            host = wan_host(self, inner_module(models[0]))
            with timesteps_noted(schedulers_of(pipeline_class)) as timesteps:
                session.patch(
                    models,
                    host,
                    timesteps,
                    self.checkpoint,
                    self.boundary if len(models) == 2 else None,
                    scheduler=timesteps.scheduler,
                )
                try:
                    return session.render(lambda steps: plain(*args, sampling_steps=steps, **kwargs), sampling_steps)
                finally:
                    session.unpatch()

    Cached.__name__ = pipeline_class.__name__
    return Cached


def experts_of(pipe: Any) -> list[torch.nn.Module]:
    """The transformer of a pipeline, or its two experts, the high-noise one first."""
    if hasattr(pipe, "high_noise_model"):
        return [pipe.high_noise_model, pipe.low_noise_model]
    return [pipe.noise_model if hasattr(pipe, "noise_model") else pipe.model]


def schedulers_of(pipeline_class: type) -> list[type]:
    """The scheduler classes that the module of a pipeline imports."""
    module = vars(sys.modules[pipeline_class.__module__])
    return [value for value in module.values() if isinstance(value, type) and hasattr(value, "set_timesteps")]


def wan_host(pipe: Any, model: Any) -> Host:
    """The facts of Wan's transformer, adapted to S2V, VACE and sequence parallelism. pipe: of the checkout."""
    if hasattr(model, "audio_injector"):
        return WAN_S2V
    host = replace(WAN, hint_methods=("forward_vace",)) if hasattr(model, "forward_vace") else WAN
    if pipe.sp_size == 1:
        return host
    rank = torch.distributed.get_rank()

    def own_tokens(forward: dict[str, Any]) -> int:
        """How many tokens of this rank are not padding, which makes the sequence a multiple of the ranks."""
        tokens = math.prod(size // patch for size, patch in zip(forward["x"][0].shape[1:], model.patch_size))
        mine = forward["seq_len"] // pipe.sp_size
        return min(max(tokens - rank * mine, 0), mine)

    return replace(
        host,
        noise_tokens=own_tokens,
        residual_shape=lambda model, forward: (len(forward["x"]), forward["seq_len"] // pipe.sp_size, model.dim),
    )
