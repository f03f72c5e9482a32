"""The FLUX pipelines of diffusers with MagCache: what MagCache4FLUX and MagCache4FLUX_schnell share."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..calibration import fingerprint
from ..errors import MagCacheError
from ..hosts import FLUX
from ..patch import magcache_calibration, magcache_forward
from ..report import write_report
from ..schedule import rule_of
from ..tables import find
from .flags import (
    DTYPES,
    add_magcache_flags,
    cache_options,
    calibration_path,
    check_flags,
    check_writable,
    ratios_of,
    settings_of,
)
from .install import REPOSITORY
from .plots import plot_schedule
from .quality import MAGNIFIED, contact_sheet, magnified_difference, quality, quality_table, save_frames

DEMO = REPOSITORY / "demo" / "image"


def main(script):
    """Run a script, given its settings by name (`globals()`): they are the defaults of the flags."""
    try:
        run(parse(script), script)
    except MagCacheError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def parse(script):
    parser = argparse.ArgumentParser(
        description=script["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help=f"hub id or folder, or 'demo' for the bundled model; default {script['MODEL']}")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--prompt_file", type=Path, help="a text file with a prompt a line")
    parser.add_argument("--negative_prompt", help="with --true_cfg_scale: two calls of the model a step")
    parser.add_argument("--true_cfg_scale", type=float, default=4.0, help="guidance with a negative prompt")
    parser.add_argument("--guidance_scale", type=float, default=script["GUIDANCE_SCALE"], help="embedded guidance")
    parser.add_argument("--image", type=Path, help="reference picture, for FLUX.1-Kontext")
    parser.add_argument("--steps", type=int, default=script["STEPS"])
    parser.add_argument("--seed", type=int, default=script["SEED"])
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--offload",
        choices=("none", "model", "group"),
        default="none",
        help="keep weights in main memory: 'model' moves whole models, 'group' one block at a time",
    )
    parser.add_argument("--lora", help="hub id, folder or file of LoRA weights")
    parser.add_argument(
        "--output", type=Path, default=Path(script["OUTPUT"]), help="picture to write; several are numbered"
    )
    add_magcache_flags(parser)
    return parser.parse_args()


def run(args, script):
    check(args)
    choose_model(args, script)
    session = Session(args, script)
    if args.magcache_calibration is not None:
        calibrate(session)
    elif args.magcache:
        generate(session)
    else:
        generate_uncached(session)


def check(args):
    """Find what cannot work before anything is loaded or rendered."""
    if args.steps < 1:
        raise MagCacheError(f"--steps must be at least 1, not {args.steps}.")
    check_flags(args)
    if args.output.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise MagCacheError(f"--output {args.output} is no picture format; end it in .png, .jpg or .webp.")
    check_writable("--output", args.output)
    if not 0 <= args.seed < 2**63:
        raise MagCacheError(f"--seed must be between 0 and 2^63 - 1, not {args.seed}.")


class Session:
    """A loaded pipeline, what every call of it gets, and the pictures to draw."""

    def __init__(self, args, script):
        self.args, self.script, self.is_default_model = args, script, args.model == script["MODEL"]
        self.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.dtype = getattr(torch, args.dtype or ("float32" if self.device == "cpu" else "bfloat16"))
        self.pipe = load_pipeline(args, self.dtype)
        self.checkpoint = fingerprint(self.pipe.transformer)
        own_size = self.pipe.vae.config.sample_size
        self.height = (
            args.height if args.height is not None else script["HEIGHT"] if self.is_default_model else own_size
        )
        self.width = args.width if args.width is not None else script["WIDTH"] if self.is_default_model else own_size
        multiple = 2 * self.pipe.vae_scale_factor
        if min(self.height, self.width) < multiple or self.height % multiple or self.width % multiple:
            raise MagCacheError(
                f"--height and --width must be multiples of {multiple}, not {self.height} and {self.width}."
            )
        self.call = pipeline_arguments(args, self.pipe, self.height, self.width)
        self.jobs = [
            Job(prompt, output) for prompt, output in zip(args.prompts, numbered(args.output, len(args.prompts)))
        ]
        tables = {Path(name).resolve() for name in (args.mag_ratios, args.magcache_calibration) if name}
        if any(job.report_path.resolve() in tables for job in self.jobs):
            raise MagCacheError(
                f"The report of --output {args.output} would overwrite a calibration file; rename one of them."
            )

    def timesteps(self):
        return self.pipe.scheduler.timesteps

    def render(self, job, steps, name):
        """(uint8 picture, seconds of the whole pipeline)"""
        self.pipe.set_progress_bar_config(desc=name)
        begin = time.perf_counter()
        image = self.pipe(
            prompt=job.prompt,
            num_inference_steps=steps,
            output_type="np",
            generator=torch.Generator("cpu").manual_seed(self.args.seed),
            **self.call,
        ).images[0]
        return (image * 255).round().astype(np.uint8), time.perf_counter() - begin

    def about(self):
        """What a file written by this session says of its circumstances."""
        return {
            "size": f"{self.width}x{self.height}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device,
        }


class Job:
    """One prompt and what came of it."""

    def __init__(self, prompt, output):
        self.prompt, self.output, self.report_path, self.quality = prompt, output, output.with_suffix(".json"), None


def calibrate(session):
    """Draw the prompts un-cached and save the magnitude ratios; a known checkpoint keeps its published settings and
    rule."""
    args, pipe = session.args, session.pipe
    path, published, about = calibration_path(args, args.model, session.checkpoint), find(args.model), session.about()
    sampler = {
        "scheduler": type(pipe.scheduler).__name__,
        "size": about.pop("size"),
        "guidance_scale": args.guidance_scale,
    }
    if args.negative_prompt is not None:
        sampler["true_cfg_scale"] = args.true_cfg_scale
    handle = magcache_calibration(
        pipe.transformer,
        FLUX,
        session.timesteps,
        Path(args.model).name,
        path,
        {
            "models": [] if Path(args.model).is_dir() and args.model != "demo" else [args.model],
            "settings": published.settings if published else {},
            "rule": published.rule if published else {},
            "sampler": sampler,
            "provenance": {
                "fingerprint": session.checkpoint,
                "lora": args.lora or "",
                "prompts": args.prompts,
                "seed": args.seed,
                **about,
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
        },
    )
    place(pipe, args, session.device)
    with handle:
        for job in session.jobs:
            save_frames(job.output, session.render(job, args.steps, "calibrating")[0][None])
    path = handle.path  # beside the one asked for, where that covers more
    hint = (
        f"use it with --mag_ratios {path}."
        if args.magcache_calibration
        else "runs of this checkpoint use it from now on."
    )
    print(f"Measured in {len(session.jobs)} un-cached run{'s' * (len(session.jobs) > 1)}, saved as {path}; {hint}")


def generate_uncached(session):
    place(session.pipe, session.args, session.device)
    for job in session.jobs:
        save_frames(job.output, session.render(job, session.args.steps, "un-cached")[0][None])
        print(f"{job.output}  ({job.prompt})")


def generate(session):
    """Draw the prompts with MagCache; a report, on request a plot and a comparison, lie beside the pictures."""
    args = session.args
    mag_ratios = ratios_of(args, args.model, session.checkpoint)
    if args.lora and mag_ratios.provenance.get("fingerprint") != session.checkpoint:
        print(
            f"The LoRA changes the model; {mag_ratios.name} was measured without it. --magcache_calibration measures "
            f"anew."
        )
    handle = patch(session, mag_ratios)
    # Offload hooks are taken off and put on again after every picture: the patch has to lie below them.
    place(session.pipe, args, session.device)
    for job in session.jobs:
        job.image, job.seconds = session.render(job, args.steps, "MagCache")
        save_frames(job.output, job.image[None])
        handle.require_reached()
        job.report = handle.reports[-1]
        print(f"{job.output}  ({job.prompt})\n  {job.report.line()}")
        if args.magcache_plot:
            plot_schedule(
                job.output.with_suffix(".schedule.png"), job.report.schedule, job.report.levels, mag_ratios.name
            )
    if args.compare:
        with handle.paused():
            compare(session)
    for job in session.jobs:
        write_report(
            job.report_path,
            job.report,
            model=args.model,
            prompt=job.prompt,
            seed=args.seed,
            **session.about(),
            mag_ratios_of=mag_ratios.name,
            seconds_whole_pipeline=round(job.seconds, 4),
            quality=job.quality,
        )


def patch(session, mag_ratios):
    """Put MagCache on the session's transformer, with the settings of flags, script and table; returns the handle."""
    args, script = session.args, session.script
    lines = {name: script[name.upper()] for name in ("magcache_thresh", "magcache_K", "retention_ratio")}
    return magcache_forward(
        session.pipe.transformer,
        FLUX,
        mag_ratios,
        settings_of(args, lines, mag_ratios, session.is_default_model),
        session.timesteps,
        replace(rule_of(mag_ratios), min_steps=script["MIN_STEPS"]),
        **cache_options(args),
    )


def choose_model(args, script):
    """Fill in the model and the prompts; without a GPU and without --model the bundled demo model runs."""
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if args.model is None and not has_gpu:
        if not (DEMO / "model").is_dir():
            raise MagCacheError(
                f"No GPU here, and no demo model at {DEMO / 'model'}: name a --model to run it on the CPU."
            )
        print(
            "No GPU here: running the small bundled demo model (--model demo). Name a --model to run that one on the "
            "CPU."
        )
        args.model = "demo"
    args.model = args.model or script["MODEL"]
    is_demo = args.model == "demo"
    if is_demo:
        if not (DEMO / "model").is_dir():
            raise MagCacheError(f"The demo model is not at {DEMO / 'model'}; run from a whole clone or name a --model.")
        torch.set_num_threads(1)  # so small that threads would only wait for each other
    if args.prompt_file:
        try:
            lines = args.prompt_file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MagCacheError(f"--prompt_file {args.prompt_file} cannot be read ({error}).") from None
        args.prompts = [line.strip() for line in lines if line.strip()]
        if not args.prompts:
            raise MagCacheError(f"--prompt_file {args.prompt_file} has no prompts.")
    else:
        args.prompts = args.prompt or (
            (DEMO / "prompts.txt").read_text().splitlines() if is_demo else [script["PROMPT"]]
        )


def load_pipeline(args, dtype):
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # the name that diffusers 0.35 knows
            pipe = DiffusionPipeline.from_pretrained(
                DEMO / "model" if args.model == "demo" else args.model, torch_dtype=dtype
            )
        if args.lora:
            pipe.load_lora_weights(args.lora)
    except Exception as error:  # whatever the hub, the network or a malformed config brings
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MagCacheError(f"{args.lora or args.model} cannot be loaded ({reason}).") from None
    if args.image and "Kontext" not in type(pipe).__name__:
        raise MagCacheError(f"--image needs FLUX.1-Kontext; {args.model} is a {type(pipe).__name__}.")
    return pipe


def pipeline_arguments(args, pipe, height, width):
    """What every call of the pipeline gets."""
    call = {
        "height": height,
        "width": width,
        "guidance_scale": args.guidance_scale,
        "max_sequence_length": min(512, pipe.tokenizer_2.model_max_length),
    }
    if args.negative_prompt is not None:
        call.update(negative_prompt=args.negative_prompt, true_cfg_scale=args.true_cfg_scale)
    if args.image:
        from PIL import Image

        try:
            call.update(image=Image.open(args.image).convert("RGB"), max_area=height * width)
        except OSError as error:
            raise MagCacheError(f"--image {args.image} cannot be read ({error}).") from None
    return call


def place(pipe, args, device):
    """Put the pipeline where it runs, with the offloading that was asked for."""
    if args.offload == "model":
        if device == "cpu":
            raise MagCacheError("--offload model moves models to a GPU, and there is none here; leave it out.")
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "group":
        groups = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
        pipe.transformer.enable_group_offload(**groups, offload_type="block_level", num_blocks_per_group=1)
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(pipe.text_encoder_2, **groups, offload_type="leaf_level")
        for component in (pipe.text_encoder, pipe.vae):
            component.to(device)
    else:
        pipe.to(device)


def compare(session):
    """Un-cached, cached and the plain sampler with as many steps as were computed, at one seed."""
    args, jobs, render = session.args, session.jobs, session.render
    columns = {"un-cached": [], "MagCache": [], "fewer steps": []}
    for job in tqdm(jobs, desc="comparing", disable=len(jobs) < 2):
        computed = job.report.schedule.computed
        columns["un-cached"].append(render(job, args.steps, "un-cached"))
        columns["MagCache"].append((job.image, job.seconds))
        columns["fewer steps"].append(render(job, computed, f"{computed} steps"))
    figures = {
        name: [
            quality(reference[None], image[None]) | {"seconds": seconds}
            for (reference, _), (image, seconds) in zip(columns["un-cached"], column)
        ]
        for name, column in columns.items()
    }
    titles = {
        "un-cached": f"un-cached, {args.steps} steps",
        "MagCache": f"MagCache, {computed} of {args.steps}",
        "fewer steps": f"plain sampler, {computed} steps",
    }
    table = {
        titles[name]: mean_figures(rows) | {"steps": args.steps if name == "un-cached" else computed}
        for name, rows in figures.items()
    }
    table[titles["un-cached"]].update(psnr=None, ssim=None, ms_ssim=None)
    print(quality_table(table))
    print(
        f"Whole pipeline {table[titles['un-cached']]['seconds'] / table[titles['MagCache']]['seconds']:.2f}x faster "
        f"than "
        f"un-cached; PSNR, SSIM and MS-SSIM are against the un-cached pictures, averaged over {len(jobs)} "
        f"prompt{'s' * (len(jobs) > 1)}."
    )
    for index, job in enumerate(jobs):
        job.quality = {name: rows[index] for name, rows in figures.items() if name != "un-cached"}
        job.quality["un-cached"] = {"seconds": figures["un-cached"][index]["seconds"]}
    sheet = args.output.with_name(f"{args.output.stem}_compare.png")
    others = ("MagCache", "fewer steps")
    rows, labels = [], []
    for index, job in enumerate(jobs):
        images = {name: column[index][0] for name, column in columns.items()}
        rows.append([*images.values(), *(magnified_difference(images["un-cached"], images[name]) for name in others)])
        scores = [f"{job.quality[name]['psnr']:.1f} dB, SSIM {job.quality[name]['ssim']:.3f}" for name in others]
        labels.append([job.prompt, *scores, "", ""])
    contact_sheet(sheet, rows, [*titles.values(), *(f"difference x{MAGNIFIED}: {name}" for name in others)], labels)
    print(f"Side by side: {sheet}")


def mean_figures(rows):
    return {key: None if rows[0][key] is None else float(np.mean([row[key] for row in rows])) for key in rows[0]}


def numbered(output, count):
    """One file a prompt: name.png, or name_1.png, name_2.png, ..."""
    return (
        [output]
        if count == 1
        else [output.with_name(f"{output.stem}_{index + 1}{output.suffix}") for index in range(count)]
    )
