"""The FLUX pipelines of diffusers with MagCache: what MagCache4FLUX and MagCache4FLUX_schnell share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import fingerprint
from ..errors import MagCacheError
from ..hosts.diffusers import FLUX
from ..tables import SETTING_NAMES, published
from .checkout import one_sentence
from .flags import (
    DTYPES,
    add_magcache_flags,
    add_refine_flag,
    check_calibration,
    check_flags,
    check_seed,
    check_writable,
    flags_taken,
    settings_of,
)
from .install import REPOSITORY
from .outputs import REPORT, beside, files_of, own_place, report_at
from .pipelines import load_pipeline, prompts_in
from .quality import MAGNIFIED, PICTURES, contact_sheet, magnified_difference, quality_table, save_frames
from .refine import check_refining, refine
from .session import Session

DEMO = REPOSITORY / "demo" / "image"


@dataclass(frozen=True)
class Script:
    """The lines at the top of a script, the defaults of its flags."""

    model: str
    prompt: str
    steps: int
    seed: int
    height: int
    width: int
    guidance_scale: float
    output: str
    magcache_thresh: float
    magcache_K: int
    retention_ratio: float
    min_steps: int

    @property
    def settings(self) -> dict[str, float]:
        """The three settings of the paper's rule, by name."""
        return {name: getattr(self, name) for name in SETTING_NAMES}


@one_sentence
def main(*, description: str | None, **lines: Any) -> None:
    """Run a script. description: shown by --help; lines: the fields of `Script`."""
    script = Script(**lines)
    ours = flags_taken(add_flux_flags)
    args = parse(script, description)
    check_flux_flags(args, ours, script)
    choose_model(args, script)
    run(args, ours, script)


def add_flux_flags(parser: argparse.ArgumentParser) -> None:
    add_refine_flag(add_magcache_flags(parser))


def parse(script: Script, description: str | None) -> argparse.Namespace:
    """The script's own flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help=f"hub id or folder, or 'demo' for the bundled model; default {script.model}")
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--prompt_file", type=Path, help="text file, one prompt per line")
    parser.add_argument("--negative_prompt", help="with --true_cfg_scale: two model calls per step")
    parser.add_argument("--true_cfg_scale", type=float, default=4.0, help="guidance with a negative prompt")
    parser.add_argument("--guidance_scale", type=float, default=script.guidance_scale, help="embedded guidance")
    parser.add_argument("--image", type=Path, help="reference image, for FLUX.1-Kontext")
    parser.add_argument("--steps", type=int, default=script.steps)
    parser.add_argument("--seed", type=int, default=script.seed)
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
    parser.add_argument("--output", type=Path, default=Path(script.output), help="image to write; several are numbered")
    return parser.parse_args()


def check_flux_flags(args: argparse.Namespace, ours: argparse.Namespace, script: Script) -> None:
    """Raises MagCacheError for what cannot work, before anything is loaded or rendered."""
    if args.steps < 1:
        raise MagCacheError(f"--steps must be at least 1, not {args.steps}.")
    check_flags(ours, ("torchmetrics", "tabulate", "matplotlib"))
    settings_of(ours, script.settings)
    check_calibration(ours, args.steps)
    check_refining(ours, ("compare", "magcache_calibration", "magcache_thresh", "magcache_predictor", "mag_ratios"))
    if args.output.suffix.lower() not in PICTURES:
        raise MagCacheError(f"--output {args.output} is no image format; end it in .png, .jpg or .webp.")
    check_writable("--output", args.output)
    check_seed(args.seed)


def run(args: argparse.Namespace, ours: argparse.Namespace, script: Script) -> None:
    """Draw the prompts, with what the flags ask for beside each picture. args: the script's flags; ours: MagCache's."""
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    pipe = load_flux(args, dtype)
    checkpoint = fingerprint(pipe.transformer)
    height, width = picture_size(args, script, pipe)
    draw = partial(draw_flux, pipe, args.seed, pipeline_arguments(args, pipe, height, width))
    if ours.magcache_refine:
        place_flux(pipe, args, device)
        asked = {"speedup": ours.magcache_speedup, "steps": ours.magcache_steps}
        draw_refining = partial(draw, args.steps)
        refine(pipe, draw_refining, args.prompts, **asked, K=ours.magcache_K, retention_ratio=ours.retention_ratio)
        return
    session = None
    if ours.magcache or ours.magcache_calibration is not None:
        about = {"model": args.model, "lora": args.lora or "", "seed": args.seed, "device": device}
        about["dtype"] = str(dtype).removeprefix("torch.")
        every_prompt = {**about, "prompts": args.prompts}
        session = flux_session(args, ours, script, pipe, checkpoint, f"{width}x{height}", every_prompt)
        session.check(args.output)
        session.patch(
            pipe.transformer,
            FLUX,
            lambda: pipe.scheduler.timesteps,
            checkpoint,
            min_steps=script.min_steps,
            scheduler=lambda: pipe.scheduler,
        )
        session.about = about  # a calibration names every prompt, a report its own
        say_what_a_lora_changes(args, session, checkpoint)
    # Offload hooks go off and on again after every picture: the patch has to lie below them.
    place_flux(pipe, args, device)
    draw_prompts(args, ours, script, session, draw)


def draw_flux(pipe: Any, seed: int, call: dict[str, Any], steps: int, prompt: str, title: str) -> np.ndarray:
    """A picture, uint8 (1, height, width, 3). call: what every call of the pipeline gets; title: of the progress
    bar."""
    pipe.set_progress_bar_config(desc=title)
    generator = torch.Generator("cpu").manual_seed(seed)
    image = pipe(prompt=prompt, num_inference_steps=steps, output_type="np", generator=generator, **call)
    return (image.images * 255).round().astype(np.uint8)


def draw_prompts(
    args: argparse.Namespace,
    ours: argparse.Namespace,
    script: Script,
    session: Session | None,
    draw: Callable[..., np.ndarray],
) -> None:
    """Draw and save every prompt, through a session or (None) as it is. draw: (steps, prompt, title) -> picture."""
    compared, outputs = [], numbered(args.output, len(args.prompts))
    about = session.about if session else {}
    if args.output != Path(script.output):  # a name of the user's
        outputs = [own_place(path, [path.name] if report_at(beside(path, REPORT)) else []) for path in outputs]
    if session and ours.compare:
        sheet = own_place(beside(args.output, "_compare.png"), files_of(outputs[0]))
        session.files = [sheet.name]
    for prompt, output in zip(args.prompts, outputs):

        def draw_prompt(steps: int, prompt: str = prompt) -> np.ndarray:
            return draw(steps, prompt, f"{steps} steps")

        if session:
            session.about = {**about, "prompt": prompt}
        picture = session.render(draw_prompt, args.steps) if session else draw_prompt(args.steps)
        output = save_frames(output, picture)
        print(f"{output}  ({prompt})")
        if session:
            session.saved(output, sheet=False)
            if session.comparison:
                compared.append((prompt, session.frames_rendered, session.comparison))
    if session and compared:
        with session.bookkeeping("The side-by-side image"):
            show_comparison(compared, sheet)


def picture_size(args: argparse.Namespace, script: Script, pipe: Any) -> tuple[int, int]:
    """(height, width): what is asked for, otherwise the script's for its own model, or the model's own."""
    own = pipe.vae.config.sample_size
    height, width = (script.height, script.width) if args.model == script.model else (own, own)
    height = args.height if args.height is not None else height
    width = args.width if args.width is not None else width
    multiple = 2 * pipe.vae_scale_factor
    if min(height, width) < multiple or height % multiple or width % multiple:
        raise MagCacheError(f"--height and --width must be multiples of {multiple}, not {height} and {width}.")
    return height, width


def flux_session(
    args: argparse.Namespace,
    ours: argparse.Namespace,
    script: Script,
    pipe: Any,
    checkpoint: str,
    size: str,
    about: dict[str, Any],
) -> Session:
    table = published(args.model, checkpoint)
    sampler = {"scheduler": type(pipe.scheduler).__name__, "guidance_scale": args.guidance_scale}
    if args.negative_prompt is not None:
        sampler["true_cfg_scale"] = args.true_cfg_scale
    return Session(
        ours,
        script.settings,
        Path(args.model).name,
        size,
        1,
        args.steps,
        table.name if table else None,
        about,
        one_task=True,
        published_settings=args.model != script.model,
        sampler=sampler,
        family=("flux", "demo"),
        models=() if Path(args.model).is_dir() and args.model != "demo" else (args.model,),
    )


def say_what_a_lora_changes(args: argparse.Namespace, session: Session, checkpoint: str) -> None:
    if args.lora and session.table and session.table.provenance.get("fingerprint") != checkpoint:
        session.say(
            f"The LoRA changes the model; {session.table.name} was measured without it. --magcache_calibration "
            "measures again."
        )


def choose_model(args: argparse.Namespace, script: Script) -> None:
    """Fill in the model and the prompts; without a GPU and without --model, those of the bundled demo."""
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
    args.model = args.model or script.model
    is_demo = args.model == "demo"
    if is_demo:
        if not (DEMO / "model").is_dir():
            raise MagCacheError(f"The demo model is not at {DEMO / 'model'}; run from a whole clone or name a --model.")
        torch.set_num_threads(1)  # so small that threads would only wait for each other
    if args.prompt_file:
        args.prompts = prompts_in(args.prompt_file)
    else:
        args.prompts = args.prompt or (
            (DEMO / "prompts.txt").read_text(encoding="utf-8").splitlines() if is_demo else [script.prompt]
        )


def load_flux(args: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The pipeline. Raises MagCacheError if it cannot be loaded, or takes no reference picture where one is given."""
    pipe = load_pipeline(DEMO / "model" if args.model == "demo" else args.model, dtype, args.lora)
    if args.image and "Kontext" not in type(pipe).__name__:
        raise MagCacheError(f"--image needs FLUX.1-Kontext; {args.model} is a {type(pipe).__name__}.")
    return pipe


def pipeline_arguments(args: argparse.Namespace, pipe: Any, height: int, width: int) -> dict[str, Any]:
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


def place_flux(pipe: Any, args: argparse.Namespace, device: str) -> None:
    """Put the pipeline where it runs, with the offloading that was asked for."""
    if args.offload == "model":
        if device == "cpu":
            raise MagCacheError("--offload model moves models to a GPU, and there is none here; leave it out.")
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "group":
        groups: dict[str, Any] = {"onload_device": torch.device(device), "offload_device": torch.device("cpu")}
        pipe.transformer.enable_group_offload(**groups, offload_type="block_level", num_blocks_per_group=1)
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(pipe.text_encoder_2, **groups, offload_type="leaf_level")
        for component in (pipe.text_encoder, pipe.vae):
            component.to(device)
    else:
        pipe.to(device)


def show_comparison(compared: list[tuple[str, dict, dict]], sheet: Path) -> None:
    """The figures of all pictures on average, and the pictures with their differences on one sheet.

    compared: (prompt, {title: [uint8 (1, height, width, 3)]}, {title: figures}) of each picture.
    """
    titles = list(compared[0][1])
    if len(compared) > 1:
        table = {title: mean_figures([figures[title] for _, _, figures in compared]) for title in titles}
        print(f"Averaged over {len(compared)} prompts:\n{quality_table(table)}")
    seconds = [sum(figures[title]["seconds"] for _, _, figures in compared) for title in titles]
    print(f"Whole pipeline {seconds[0] / seconds[1]:.2f}x faster than un-cached.")
    rows, labels = [], []
    for prompt, pictures, figures in compared:
        uncached, *others = (frames[0][0] for frames in pictures.values())
        rows.append([uncached, *others, *(magnified_difference(uncached, other) for other in others)])
        scores = [f"{figures[title]['psnr']:.1f} dB, SSIM {figures[title]['ssim']:.3f}" for title in titles[1:]]
        labels.append([prompt, *scores, "", ""])
    differences = [f"difference x{MAGNIFIED}: {name}" for name in ("MagCache", "fewer steps")]
    contact_sheet(sheet, rows, [*titles, *differences], labels)
    print(f"Side by side: {sheet}")


def mean_figures(rows: list[dict]) -> dict:
    return {
        key: None if value is None else float(np.mean([row[key] for row in rows])) for key, value in rows[0].items()
    }


def numbered(output: Path, count: int) -> list[Path]:
    """A file for each prompt: name.png, or name_1.png, name_2.png, ..."""
    return (
        [output]
        if count == 1
        else [output.with_name(f"{output.stem}_{index + 1}{output.suffix}") for index in range(count)]
    )
