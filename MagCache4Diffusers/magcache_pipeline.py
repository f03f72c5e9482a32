"""Any diffusers pipeline with MagCache.

python magcache_pipeline.py --model demo-video --compare --magcache_speedup 2
python magcache_pipeline.py --model Qwen/Qwen-Image --prompt "A lighthouse." --num_inference_steps 50 --true_cfg_scale 4
python magcache_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A cat." --num_frames 81 --compare
torchrun --nproc_per_node 4 magcache_pipeline.py --model MODEL --prompt_file prompts.txt

Every keyword of the pipeline's own call is a flag: --name value.
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from common.denoisers import denoisers  # noqa: E402
from common.errors import MagCacheError, needs  # noqa: E402
from common.pipeline import DEFAULT_SPEEDUP, enable  # noqa: E402
from common.planner import Target  # noqa: E402
from common.ranks import is_writer  # noqa: E402
from common.report import RunReport, write_report  # noqa: E402
from common.schedule import Settings  # noqa: E402
from common.scripts.checkout import one_sentence  # noqa: E402
from common.scripts.flags import DTYPES, add_refine_flag, check_seed, check_writable  # noqa: E402
from common.scripts.install import REPOSITORY  # noqa: E402
from common.scripts.keywords import keywords, nearest_flag  # noqa: E402
from common.scripts.outputs import beside, bookkeeping, files_of, own_place, report_place  # noqa: E402
from common.scripts.pipelines import load_pipeline, prompts_in  # noqa: E402
from common.scripts.quality import (  # noqa: E402
    MAGNIFIED,
    PICTURES,
    VIDEO_SUFFIXES,
    animation,
    magnified_difference,
    quality,
    quality_table,
    side_by_side,
)
from common.scripts.refine import check_refining, refine  # noqa: E402
from common.scripts.results import (  # noqa: E402
    FRAMES,
    entry_of,
    frames_of,
    save_results,
    suffix_of,
    with_suitable_ending,
)
from common.tables import calibrations_folder  # noqa: E402

DEMOS = {"demo": REPOSITORY / "demo" / "image", "demo-video": REPOSITORY / "demo" / "video"}
# What the bundled models were trained for, in place of the defaults of a large FLUX and Wan.
TRAINED_FOR = {"height": 64, "width": 64, "max_sequence_length": 16}
DEMO_CALLS = {
    "demo": TRAINED_FOR,
    "demo-video": {**TRAINED_FOR, "num_frames": 17, "num_inference_steps": 30, "guidance_scale": 5.0},
}
ENDINGS = (*PICTURES, *VIDEO_SUFFIXES, ".wav")
SETTINGS = {
    "magcache_speedup": "speedup",
    "magcache_steps": "steps",
    "magcache_max_error": "max_error",
    "magcache_thresh": "thresh",
    "magcache_K": "K",
    "retention_ratio": "retention_ratio",
}


def flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(this script's flags, the other words: keywords of the pipeline). Raises MagCacheError for an unknown flag of
    MagCache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model", default="demo", help="hub id or folder; demo and demo-video are small bundled models"
    )
    parser.add_argument("--prompt", nargs="+", help="one or more prompts")
    parser.add_argument("--prompt_file", type=Path, help="text file, one prompt per line")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="image, video or sound to write; several are numbered")
    parser.add_argument("--fps", type=float, default=16, help="frames per second of a video")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument(
        "--offload", choices=("none", "model", "sequential"), default="none", help="keep weights in main memory"
    )
    parser.add_argument("--lora", help="hub id, folder or file of LoRA weights")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of the transformer")
    parser.add_argument("--context_parallel", action="store_true", help="with torchrun: split one image over all GPUs")
    group = parser.add_argument_group("MagCache")
    group.add_argument(
        "--magcache_speedup", type=float, metavar="X", help=f"how much faster; default {DEFAULT_SPEEDUP:g}"
    )
    group.add_argument("--magcache_steps", type=int, metavar="N", help="or: compute exactly N steps")
    group.add_argument(
        "--magcache_max_error",
        type=float,
        metavar="ERROR",
        help="or: largest expected error of a skipped step; the first run of a checkpoint calibrates",
    )
    group.add_argument(
        "--magcache_thresh",
        type=float,
        metavar="ERROR",
        help="or the paper's rule: bound on the accumulated error; without published ratios the first run calibrates",
    )
    group.add_argument("--magcache_K", type=int, metavar="STEPS", help="most skipped steps in a row")
    group.add_argument(
        "--retention_ratio", type=float, metavar="SHARE", help="share of the steps, from the first, that always compute"
    )
    group.add_argument(
        "--magcache_calibration", action="store_true", help="compute every step and measure, for later runs"
    )
    add_refine_flag(group)
    group.add_argument("--no-magcache", dest="magcache", action="store_false", help="run the plain pipeline")
    group.add_argument(
        "--compare", action="store_true", help="also render un-cached and with as few plain steps as MagCache computes"
    )
    args, rest = parser.parse_known_args(argv)
    args.flags = [action.option_strings[0][2:] for action in parser._actions]
    for flag in (word[2:].partition("=")[0] for word in rest if word.startswith("--")):
        if "magcache" in flag:  # of no pipeline, which would have to be loaded first
            raise MagCacheError(f"There is no flag --{flag}{nearest_flag(flag, args.flags)}")
    return args, rest


@one_sentence
def main() -> None:
    args, rest = flags(sys.argv[1:])
    check_pipeline_flags(args)
    prompts = prompts_of(args)
    pipe = load_model(args)
    call = {**DEMO_CALLS.get(args.model, {}), **keywords(pipe, rest, args.flags)}
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = place(pipe, args)
    if args.magcache_refine:
        refine_pipeline(pipe, args, call, prompts)
        return
    numbered = list(enumerate(prompts, 1))
    if not args.context_parallel:
        numbered = numbered[rank::ranks]  # each rank its share
    for number, prompt in numbered:
        draw_one(pipe, args, with_prompt(call, prompt), number, len(prompts), device)


def check_pipeline_flags(args: argparse.Namespace) -> None:
    """Raises MagCacheError for flags that cannot work, before anything is loaded."""
    if args.compare and not args.magcache:
        raise MagCacheError("--compare compares MagCache with the un-cached model: leave out --no-magcache.")
    check_refining(args, ("compare", "magcache_calibration", "magcache_thresh", "magcache_max_error"))
    if args.magcache_refine and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MagCacheError("--magcache_refine compares all its images in one process: start it without torchrun.")
    if args.compare and args.magcache_calibration:
        raise MagCacheError("A calibration computes everything: --compare in a run after it.")
    if args.compare:
        for package in ("torchmetrics", "tabulate"):
            needs(package, package)
    if args.output is not None:
        if args.output.suffix.lower() not in ENDINGS:
            raise MagCacheError(f"--output {args.output} has no ending that can be written; {', '.join(ENDINGS)} can.")
        check_writable("--output", args.output)
    check_seed(args.seed)
    if not 0 < args.fps < np.inf:
        raise MagCacheError(f"--fps must be larger than 0, not {args.fps:g}.")
    check_settings(args)
    if args.model in DEMOS and not (DEMOS[args.model] / "model").is_dir():
        raise MagCacheError(f"The model {args.model} is not at {DEMOS[args.model]}: run from a whole clone.")


def check_settings(args: argparse.Namespace) -> None:
    """Raises MagCacheError for settings that `enable` would refuse."""
    asked = {flag: getattr(args, flag) for flag in SETTINGS if getattr(args, flag) is not None}
    if args.magcache_calibration:
        if asked:
            raise MagCacheError(f"A calibration computes everything: leave out --{' --'.join(asked)} in this run.")
        check_writable("The calibration", calibrations_folder() / "calibration.json")
    elif {"magcache_speedup", "magcache_steps", "magcache_max_error"} & asked.keys():
        if "magcache_thresh" in asked:
            raise MagCacheError(
                "Ask for a speed-up, steps or an error, or for the paper's rule: leave out --magcache_thresh."
            )
        Target(**asked, payload="output")
    else:
        Settings(**{"magcache_thresh": 0.0, "magcache_K": 1, "retention_ratio": 0.0, **asked})


def load_model(args: argparse.Namespace) -> Any:
    """The pipeline that --model and --lora name. Raises MagCacheError if it cannot be loaded."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    pipe = load_pipeline(DEMOS[args.model] / "model" if args.model in DEMOS else args.model, dtype, args.lora)
    if args.model in DEMOS:
        torch.set_num_threads(1)  # so small that threads would only wait for each other
    return pipe


def prompts_of(args: argparse.Namespace) -> list[str | None]:
    """The prompts of the command line, its file or a demo; [None]: there are none, which some pipelines need not."""
    if args.prompt_file:
        return prompts_in(args.prompt_file)
    if args.prompt is None and args.model in DEMOS:
        return (DEMOS[args.model] / "prompts.txt").read_text(encoding="utf-8").splitlines()[:1]
    return args.prompt or [None]


def accelerator() -> str:
    """The device of this process."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def place(pipe: Any, args: argparse.Namespace) -> str:
    """Move the pipeline to the device of this process, compile and share it as asked. Returns the device. Raises
    MagCacheError if --offload or --context_parallel is impossible."""
    device = accelerator()
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    if args.offload != "none" and device == "cpu":
        raise MagCacheError(f"--offload {args.offload} moves weights to a GPU, and there is none here; leave it out.")
    if args.context_parallel:
        share_one_picture(pipe, device)
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.to(device)
    if args.compile:
        for model in (model for group in denoisers(pipe) for model in group.models):
            (model.compile_repeated_blocks if getattr(model, "_repeated_blocks", None) else model.compile)()
    return device


def share_one_picture(pipe: Any, device: str) -> None:
    """Turn on diffusers' context parallelism: each rank computes a part of the tokens. Raises MagCacheError if the
    models cannot be divided among the ranks."""
    from diffusers import ContextParallelConfig

    ranks = int(os.environ.get("WORLD_SIZE", 0))
    if not ranks:
        raise MagCacheError("--context_parallel needs several processes: start it with torchrun --nproc_per_node N.")
    models = [model for group in denoisers(pipe) for model in group.models]
    for model in models:
        heads = getattr(model.config, "num_attention_heads", None)
        if isinstance(heads, int) and heads % ranks:
            raise MagCacheError(
                f"{type(model).__name__} has {heads} attention heads, which {ranks} processes cannot share evenly: "
                "start as many as divide that."
            )
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    config = ContextParallelConfig(ulysses_degree=ranks)
    for model in models:
        try:
            model.enable_parallelism(config=config)
        except (ArithmeticError, NotImplementedError, RuntimeError, ValueError) as error:  # no GPU: a division by zero
            raise MagCacheError(f"{type(model).__name__} cannot be shared by several GPUs ({error}).") from None


def asked_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of the flags, by their names in `enable`."""
    return {name: getattr(args, flag) for flag, name in SETTINGS.items()}


def with_prompt(call: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    """The keywords of a call, with the prompt if there is one."""
    return call if prompt is None else {**call, "prompt": prompt}


def refine_pipeline(pipe: Any, args: argparse.Namespace, call: dict[str, Any], prompts: list[str | None]) -> None:
    """--magcache_refine, with these prompts."""

    def drawn(prompt: str | None, title: str) -> np.ndarray | None:
        return frames_of(draw(pipe, args, with_prompt(call, prompt), title).output)

    refine(pipe, drawn, prompts, **asked_of(args))


class Drawn(NamedTuple):
    """An output of the pipeline, and the seconds it took."""

    output: Any
    seconds: float


class CachedDrawing(NamedTuple):
    """What was drawn with MagCache.

    report: of the newest run; uncached: the un-cached output, if the first run had to be one to calibrate; failure: of
    a calibration that was measured and not saved.
    """

    drawn: Drawn
    report: RunReport
    uncached: Drawn | None
    failure: MagCacheError | None


def draw_one(pipe: Any, args: argparse.Namespace, call: dict[str, Any], number: int, count: int, device: str) -> None:
    """Draw one prompt and save what comes out. With MagCache, a report lies beside it, and the comparison if asked for.

    call: keywords of the pipeline's call; number, count: of the prompt, and of all; device: for the report.
    """
    writes = is_writer() or not args.context_parallel
    say = print if writes else lambda *_: None
    if "prompt" in call:
        say(f"Prompt {number} of {count}: {call['prompt']}")
    if not args.magcache:
        drawn = draw(pipe, args, call, "un-cached")
        if writes:
            save(pipe, drawn, args, number, count)
        return
    cached = draw_cached(pipe, args, call, say)
    if cached.report.measuring and count == 1:
        say("Run the same command again to use what was measured, or ask for --magcache_speedup, which needs none.")
    compares = args.compare and entry_of(cached.drawn.output, FRAMES) is not None
    if not writes:
        if compares:  # every rank has to take part
            compared(pipe, args, call, cached)
        return
    paths = save(pipe, cached.drawn, args, number, count)
    files = [path.name for path in paths]
    about: dict[str, Any] = {"model": args.model, "seed": args.seed, "device": device, "files": files}
    about["call"] = {name: value for name, value in call.items() if isinstance(value, (str, int, float, bool))}
    if compares:
        with bookkeeping("The comparison", say):
            rows, pictures = compared(pipe, args, call, cached)
            print(quality_table(rows))
            about["quality"] = rows
            for file in saved_comparison(paths[0], rows, pictures, args.fps):
                files.append(file.name)
    with bookkeeping("The report", say):
        write_report(report_place(paths[0]), cached.report, **about)
    if cached.failure:
        raise cached.failure


def draw_cached(pipe: Any, args: argparse.Namespace, call: dict[str, Any], say: Callable[..., object]) -> CachedDrawing:
    """Draw with MagCache; for --compare once more if the first run calibrated. Raises MagCacheError if nothing could
    be drawn."""
    drawn = uncached = failure = None
    try:
        with enable(pipe, **asked_of(args), calibrate=args.magcache_calibration or None, announce=say) as cache:
            drawn = draw(pipe, args, call, "calibrating" if args.magcache_calibration else "MagCache")
            say(cache.report)
            if args.compare and cache.reports[-1].measuring:
                uncached = drawn
                drawn = draw(pipe, args, call, "MagCache")
                say(cache.report)
    except MagCacheError as error:  # of a calibration, once the block ends
        if drawn is None:
            raise
        failure = error
    return CachedDrawing(drawn, cache.reports[-1], uncached, failure)


def draw(pipe: Any, args: argparse.Namespace, call: dict[str, Any], title: str) -> Drawn:
    """Call the pipeline. title: of the progress bar. Raises MagCacheError if it refuses the call."""
    pipe.set_progress_bar_config(disable=not is_writer(), desc=f"{title:11}")
    known, began = inspect.signature(type(pipe).__call__).parameters, time.perf_counter()
    if "generator" in known:
        call = {"generator": torch.Generator("cpu").manual_seed(args.seed), **call}
    if "output_type" in known:
        call = {"output_type": "np", **call}
    try:
        output = pipe(**call)
    except ValueError as error:  # how pipelines refuse a call
        raise MagCacheError(f"{type(pipe).__name__} does not take this call: {' '.join(str(error).split())}") from error
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Drawn(output, time.perf_counter() - began)


def save(pipe: Any, drawn: Drawn, args: argparse.Namespace, number: int, count: int) -> list[Path]:
    """Save what was drawn for a prompt, and print the names and the seconds. Returns the files."""
    suffix = suffix_of(drawn.output)
    target = with_suitable_ending(args.output or Path(f"magcache_{Path(args.model).name}{suffix}"), suffix)
    target = target if count == 1 else beside(target, f"_{number}{target.suffix}")
    paths = save_results(pipe, drawn.output, target, args.fps)
    print(f"{', '.join(map(str, paths))}  ({drawn.seconds:.1f} s)")
    return paths


def compared(
    pipe: Any, args: argparse.Namespace, call: dict[str, Any], cached: CachedDrawing
) -> tuple[dict[str, dict[str, float]], dict[str, np.ndarray]]:
    """(figures, uint8 frames (frames, height, width, 3)) by title: un-cached, MagCache, and the plain sampler with as
    few steps as MagCache computed."""
    schedule = cached.report.schedule
    drawings = {
        "un-cached": cached.uncached or draw(pipe, args, call, "un-cached"),
        "MagCache": cached.drawn,
        "fewer steps": draw(pipe, args, {**call, "num_inference_steps": schedule.computed}, "fewer steps"),
    }
    steps = {"un-cached": schedule.steps, "MagCache": schedule.computed, "fewer steps": schedule.computed}
    pictures = {title: frames_of(drawn.output) for title, drawn in drawings.items()}
    rows = {}
    for title, drawn in drawings.items():
        closeness = quality(pictures["un-cached"], pictures[title])
        rows[title] = {"steps": steps[title], "seconds": drawn.seconds, **closeness}
    return rows, pictures


def saved_comparison(path: Path, rows: dict, pictures: dict[str, np.ndarray], fps: float) -> Iterator[Path]:
    """Write `compared` beside its output: side by side, and for a video the animation with the differences. Yields each
    file once it is written, so that the report lists the first even if the second fails."""
    ours, is_video = files_of(path), len(pictures["MagCache"]) > 1
    sheet = own_place(beside(path, f"_compare{path.suffix}"), ours)
    side_by_side(sheet, list(pictures.values()), fps if is_video else None)
    print(f"Side by side: {sheet}")
    yield sheet
    if is_video:
        moving = own_place(beside(path, "_compare.webp"), [name for name in ours if name != sheet.name])
        animation(moving, columns_of(rows, pictures), fps)
        print(f"Animation with the differences: {moving}")
        yield moving


def columns_of(rows: dict, pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """{heading: frames} of the animation: the videos, and where the second and third differ from the first."""
    columns, reference = {}, pictures["un-cached"]
    for title, frames in pictures.items():
        closeness = f"\n{rows[title]['psnr']:.1f} dB" if title != "un-cached" else ""
        columns[f"{title}, {rows[title]['steps']} steps{closeness}"] = frames
    for title in ("MagCache", "fewer steps"):
        columns[f"{title}:\ndifference x{MAGNIFIED}"] = magnified_difference(reference, pictures[title])
    return columns


if __name__ == "__main__":
    main()
