"""The inference scripts of Open-Sora 2.0 (MMDiTModel), 1.3 and 1.2 (STDiT3) with MagCache."""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from common.blocks import Host
from common.calibration import fingerprint
from common.corrector import EULER
from common.errors import MagCacheError
from common.hosts.checkouts import STDIT3, mmdit
from common.ranks import is_writer
from common.scripts.checkout import one_sentence, script_at
from common.scripts.flags import add_opt_in_flags, check_flags, flags_taken, named_settings, switched_on
from common.scripts.session import Session
from common.steps import TRAIN_TIMESTEPS


@one_sentence
def main(*, settings: dict[str, tuple], tables: dict[str, str], versions: dict[str, str]) -> None:
    """Run the checkout's inference script with MagCache.

    settings: {version: (magcache_thresh, magcache_K, retention_ratio)}; tables: {"version model": preset}; versions:
    {type of the VAE: version}, for 1.2 and 1.3.
    """
    path, open_sora = inference_script(Path(sys.argv[0]).resolve().parent)
    args = flags_taken(add_opt_in_flags)
    check_flags(args)
    inference = script_at(path)
    if args.magcache_calibration is not None or switched_on(args):
        open_sora(inference, args, settings, tables, versions)
    elif is_writer() and args.magcache:
        print("MagCache is off; --use_magcache turns it on.")
    inference.main()


def inference_script(checkout: Path) -> tuple[Path, type[OpenSora]]:
    """(path of the checkout's script, the subclass of OpenSora for its version). Raises MagCacheError for a folder that
    is no such checkout."""
    if (checkout / "scripts/diffusion/inference.py").is_file():
        return checkout / "scripts/diffusion/inference.py", OpenSora2
    if (checkout / "opensora/models/stdit/stdit3.py").is_file():
        return checkout / "scripts/inference.py", OpenSora1
    raise MagCacheError(
        f"{checkout} is not a checkout of Open-Sora 2.0, 1.3 or 1.2: python -m common install MagCache4Open-Sora "
        "/path/to/Open-Sora puts this script there."
    )


class OpenSora:
    """An inference script of the checkout. Some of its functions are wrapped, to know what is rendered and to render it
    with MagCache.

    inference: the script's module; args: MagCache's flags; settings, tables, versions: see `main`.
    """

    session: Session
    cfg: Any

    def __init__(
        self,
        inference: Any,
        args: argparse.Namespace,
        settings: dict[str, tuple],
        tables: dict[str, str],
        versions: dict[str, str],
    ) -> None:
        self.inference, self.args = inference, args
        self.settings, self.tables, self.versions = settings, tables, versions
        self.timesteps: list[Any] | None = None  # of the sampler's run; 1000 is noise level 1
        self.wrap_functions()

    def session_of(
        self,
        version: str,
        task: str,
        height: int,
        width: int,
        frames: int,
        steps: int,
        cfg: Any,
        preset: str | None = None,
        **options: Any,
    ) -> Session:
        """The checked Session of a configuration. height, width: in pixels; cfg: the checkout's configuration; preset:
        the published table; options: of Session. Raises MagCacheError for what cannot work."""
        session = Session(
            self.args,
            named_settings(self.settings[version]),
            f"open-sora-{version}-{task}",
            f"{width}x{height}",
            frames,
            steps,
            preset,
            {"config": str(cfg.filename)},
            measures=True,
            family="open-sora",
            **options,
        )
        session.check(Path(cfg.save_dir) / ("video.mp4" if frames > 1 else "picture.png"))
        return session

    def render(
        self,
        transformer: torch.nn.Module,
        host: Host,
        checkpoint: str,
        draw: Callable[[int], Any],
        steps: int,
        scheduler: Any = EULER,
    ) -> Any:
        """Render with MagCache: the result of `draw(steps)`. With --compare it is rendered once more if the first
        rendering had to calibrate. checkpoint: fingerprint; scheduler: see `magcache_forward`."""
        draw = repeatable(draw)
        self.session.patch(transformer, host, lambda: self.timesteps, checkpoint, scheduler=scheduler)
        result = self.session.render(draw, steps)
        if self.session.measuring and self.args.compare:
            self.session.reports.clear()
            self.session.patch(transformer, host, lambda: self.timesteps, checkpoint, scheduler=scheduler)
            result = self.session.render(draw, steps)
        return result

    def save(self, save_sample: Callable[..., Any], x: torch.Tensor, save_path: str, **options: Any) -> Any:
        """The checkout's save_sample, which appends the ending to save_path, but writing whole files and a report.

        x: (channels, frames, height, width).
        """
        first_picture = not self.session.reports and not self.session.calibrating
        if first_picture:  # of text-to-image-to-video; the checkout reads it back
            return save_sample(x, save_path=save_path, **options)
        ending = ".png" if x.shape[1] == 1 and not options.get("force_video") else ".mp4"

        def write(tensor, save_file, **options):
            save_sample(tensor, save_path=save_file.removesuffix(ending), **{**options, "verbose": False})

        return self.session.saving(write)(tensor=x, save_file=save_path + ending, **options)


class OpenSora2(OpenSora):
    """scripts/diffusion/inference.py of 2.0, whose `prepare_api` returns the function that renders a batch of
    videos."""

    def wrap_functions(self) -> None:
        wrap(self.inference, "parse_alias", self.configured)
        wrap(self.inference, "prepare_models", self.models_made)
        wrap(self.inference, "prepare_api", self.api)
        wrap(import_module("opensora.utils.sampling"), "get_schedule", self.scheduled)
        wrap(import_module("opensora.utils.inference"), "save_sample", self.save)

    def configured(self, parse_alias: Callable[..., Any], cfg: Any) -> Any:
        """parse_alias, after which the configuration is known: create the session."""
        self.cfg = parse_alias(cfg)
        option = self.inference.sanitize_sampling_option(self.inference.SamplingOption(**self.cfg.sampling_option))
        cond_type = "i2v_head" if self.cfg.get("use_t2i2v") else self.cfg.get("cond_type", "t2v")
        self.session = self.session_of(
            "2.0",
            cond_type,
            option.height,
            option.width,
            option.num_frames,
            option.num_steps,
            self.cfg,
            videos=list,
        )
        return self.cfg

    def models_made(self, prepare_models: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """prepare_models, and the fingerprint before tensor parallelism divides the weights."""
        models = prepare_models(*args, **kwargs)
        self.checkpoint = fingerprint(models[0])
        return models

    def scheduled(self, get_schedule: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """get_schedule, noting the timesteps."""
        timesteps = get_schedule(*args, **kwargs)
        self.timesteps = [TRAIN_TIMESTEPS * level for level in timesteps[:-1]]
        return timesteps

    def api(
        self,
        prepare_api: Callable[..., Any],
        model: Any,
        model_ae: Any,
        model_t5: Any,
        model_clip: Any,
        optional_models: dict[str, Any],
    ) -> Callable[..., Any]:
        """prepare_api, returning a function that renders with MagCache."""
        plain = prepare_api(model, model_ae, model_t5, model_clip, optional_models)
        if model is optional_models.get("img_flux"):
            return self.without_report(plain)
        transformer = model.get_base_model() if hasattr(model, "get_base_model") else model  # of a LoRA
        hybrid = self.cfg.get("plugin") == "hybrid"
        host = mmdit(self.cfg.plugin_config["sp_size"] if hybrid else 1)

        def api_fn(opt, cond_type="t2v", seed=None, **batch):
            given = cond_type if "ref" in batch else "t2v"
            # No step can be corrected from another if the guidance changes from step to step.
            oscillates = any(getattr(opt, f"{what}_osci", False) for what in ("text", "image", "scale_temporal"))
            self.session.task = f"open-sora-2.0-{given if opt.num_frames > 1 else 't2i'}"
            self.session.about |= {"prompt": batch["text"], "seed": seed, "cond_type": given}
            return self.render(
                transformer,
                host,
                self.checkpoint,
                lambda steps: plain(replace(opt, num_steps=steps), cond_type, seed=seed, **batch),
                opt.num_steps,
                None if oscillates else EULER,
            )

        return api_fn

    def without_report(self, api_fn: Callable[..., Any]) -> Callable[..., Any]:
        """The image model of text-to-image-to-video, which renders without MagCache."""

        @functools.wraps(api_fn)
        def picture(*args, **kwargs):
            self.session.reports.clear()
            return api_fn(*args, **kwargs)

        return picture


class OpenSora1(OpenSora):
    """scripts/inference.py of 1.2 and 1.3, whose scheduler's `sample` renders the latents of a clip."""

    def wrap_functions(self) -> None:
        wrap(self.inference, "parse_configs", self.configured)
        wrap(self.inference, "build_module", self.built)
        wrap(self.inference, "save_sample", self.save)
        self.checkpoints: dict[int, str] = {}  # id of a model: its fingerprint

    def configured(self, parse_configs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """parse_configs, after which the configuration is known: create the session. Raises MagCacheError for other
        models than those of 1.2 and 1.3."""
        cfg = parse_configs(*args, **kwargs)
        version = self.versions.get(cfg.vae["type"])
        if version is None or not cfg.model["type"].startswith("STDiT3"):
            raise MagCacheError(
                "MagCache knows the configurations of Open-Sora 1.2 and 1.3, with an STDiT3 and their VAE; this "
                f"one has {cfg.model['type']} and {cfg.vae['type']}: leave out --use_magcache."
            )
        size = cfg.get("image_size") or self.inference.get_image_size(cfg.resolution, cfg.aspect_ratio)
        frames = self.inference.get_num_frames(cfg.num_frames)
        task = "t2i" if frames == 1 else cfg.get("cond_type") or "t2v"
        preset = self.tables.get(f"{version} {cfg.model['type']}") if frames > 1 else None
        steps = cfg.scheduler["num_sampling_steps"]
        weights = str(cfg.model.get("from_pretrained") or "")
        self.session = self.session_of(
            version, task, *size, frames, steps, cfg, preset, videos=self.decoded, weights=weights
        )
        return cfg

    def built(self, build_module: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """build_module, noting the VAE and wrapping the scheduler's `sample`."""
        module = build_module(*args, **kwargs)
        if hasattr(module, "get_latent_size"):
            self.vae = module
        if hasattr(module, "num_sampling_steps"):
            wrap(module, "sample", functools.partial(self.sampled, module))
        return module

    @contextmanager
    def loop_noted(self, scheduler: Any) -> Iterator[None]:
        """A context that notes the timesteps of the sampler's loop. They are local to it, so `enumerate`, which the
        loop calls on them, is replaced in its module."""

        def noting(values, start=0):
            values = [*values]
            if values and start == 0 and all(map(torch.is_tensor, values)):
                self.timesteps = [float(timestep.max()) for timestep in values]
            return enumerate(values, start)

        module = vars(sys.modules[type(scheduler).__module__])
        module["enumerate"] = noting
        try:
            yield
        finally:
            del module["enumerate"]

    def sampled(
        self, scheduler: Any, sample: Callable[..., Any], model: Any, *args: Any, prompts: list[str], **kwargs: Any
    ) -> Any:
        """`sample` of the scheduler, with MagCache: latents (batch, channels, frames, height, width)."""
        if id(model) not in self.checkpoints:
            self.checkpoints[id(model)] = fingerprint(model)
        self.session.about |= {"prompt": prompts}
        host = replace(STDIT3, blocks=tuple(name for name in STDIT3.blocks if hasattr(model, name)))

        def draw(steps):
            scheduler.num_sampling_steps, planned = steps, scheduler.num_sampling_steps
            try:
                return sample(model, *args, prompts=prompts, **kwargs)
            finally:
                scheduler.num_sampling_steps = planned

        with self.loop_noted(scheduler):
            return self.render(model, host, self.checkpoints[id(model)], draw, scheduler.num_sampling_steps)

    def decoded(self, latents: torch.Tensor) -> list[torch.Tensor]:
        """The videos of latents (batch, channels, frames, height, width)."""
        dtype = next(self.vae.parameters()).dtype
        return list(self.vae.decode(latents.to(dtype), num_frames=self.session.frames))


def wrap(place: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a function of a module, or a method of an object, so that a call becomes `wrapper(function, ...)`. Raises
    MagCacheError if there is none of this name."""
    if not hasattr(place, name):
        raise MagCacheError(
            f"This checkout of Open-Sora has no {name} where MagCache looks for it; run it with --no-magcache."
        )
    plain = getattr(place, name)
    setattr(place, name, functools.wraps(plain)(functools.partial(wrapper, plain)))


def repeatable(draw: Callable[[int], Any]) -> Callable[[int], Any]:
    """`draw` that can be repeated: each call starts from the random state of now, and leaves the state that the first
    call left."""
    begin, left = random_state(), []

    def draw_again(steps):
        if left:
            set_random_state(begin)
        result = draw(steps)
        if left:
            set_random_state(left[0])
        left.append(random_state())
        return result

    return draw_again


def random_state() -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """The states of Python's generator, torch's, and of each GPU."""
    return random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[Any, torch.Tensor, list[torch.Tensor]]) -> None:
    """Restore a `random_state`."""
    python, cpu, cuda = state
    random.setstate(python)
    torch.set_rng_state(cpu)
    for device, device_state in enumerate(cuda):
        torch.cuda.set_rng_state(device_state, device)
