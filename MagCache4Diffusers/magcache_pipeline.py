"""Any diffusers pipeline with MagCache.

python magcache_pipeline.py --model demo-video --compare --magcache_speedup 2
python magcache_pipeline.py --model Qwen/Qwen-Image --prompt "A lighthouse." --num_inference_steps 50 --true_cfg_scale 4
python magcache_pipeline.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A cat." --num_frames 81 --compare
torchrun --nproc_per_node 4 magcache_pipeline.py --model MODEL --prompt_file prompts.txt

Every keyword of the pipeline's own call is a flag: --name value.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import subprocess
import sys
import time
import wave
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

import numpy as np  # noqa: E402
import torch  # noqa: E402

from common.denoisers import denoisers  # noqa: E402
from common.errors import MagCacheError, needs  # noqa: E402
from common.files import part_of  # noqa: E402
from common.pipeline import DEFAULT_SPEEDUP, enable  # noqa: E402
from common.planner import Target  # noqa: E402
from common.ranks import is_writer  # noqa: E402
from common.report import write_report  # noqa: E402
from common.schedule import Settings  # noqa: E402
from common.scripts.checkout import one_sentence  # noqa: E402
from common.scripts.flags import DTYPES, add_refine_flag, check_seed, check_writable  # noqa: E402
from common.scripts.install import REPOSITORY  # noqa: E402
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
    save_frames,
    side_by_side,
)
from common.scripts.refine import check_refining, refine  # noqa: E402
from common.tables import calibrations_folder  # noqa: E402

DEMOS = {"demo": REPOSITORY / "demo" / "image", "demo-video": REPOSITORY / "demo" / "video"}
# What the bundled models were trained for, in place of the defaults of a large FLUX and Wan.
TRAINED_FOR = {"height": 64, "width": 64, "max_sequence_length": 16}
DEMO_CALLS = {
    "demo": TRAINED_FOR,
    "demo-video": {**TRAINED_FOR, "num_frames": 17, "num_inference_steps": 30, "guidance_scale": 5.0},
}
KINDS = {".png": "a picture", ".mp4": "a video", ".wav": "a sound"}
ENDINGS = (*PICTURES, *VIDEO_SUFFIXES, ".wav")
SET_HERE = ("self", "generator", "output_type", "return_dict")  # keywords of a pipeline's call
SETTINGS = {
    "magcache_speedup": "speedup",
    "magcache_steps": "steps",
    "magcache_max_error": "max_error",
    "magcache_thresh": "thresh",
    "magcache_K": "K",
    "retention_ratio": "retention_ratio",
}


def flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(our flags, the rest: keywords of the pipeline). Raises MagCacheError for a flag of MagCache that it has not."""
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


def nearest_flag(flag: str, known) -> str:
    """The end of a sentence on a flag that there is not."""
    near = get_close_matches(flag, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


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
        draw_one(pipe, args, {**call, **({} if prompt is None else {"prompt": prompt})}, number, len(prompts), device)


def check_pipeline_flags(args) -> None:
    """What cannot work is found before anything is loaded. Raises MagCacheError."""
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


def check_settings(args) -> None:
    """What `enable` would refuse of the settings. Raises MagCacheError."""
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


def load_model(args):
    """The pipeline. Raises MagCacheError if it cannot be loaded."""
    dtype = getattr(torch, args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    pipe = load_pipeline(DEMOS[args.model] / "model" if args.model in DEMOS else args.model, dtype, args.lora)
    if args.model in DEMOS:
        torch.set_num_threads(1)  # so small that threads would only wait for each other
    return pipe


def keywords(pipe, rest: list[str], ours=()) -> dict:
    """What `--name value` says of the pipeline's own call. Raises MagCacheError for a keyword that it has not, or that
    this script sets. ours: names of its own flags."""
    parameters, found, flag = inspect.signature(type(pipe).__call__).parameters, {}, None
    known = {name: parameter for name, parameter in parameters.items() if name not in SET_HERE}
    for word in rest:
        if word.startswith("--"):
            flag, _, value = word[2:].partition("=")
            flag = flag.replace("-", "_")
            if flag in SET_HERE:
                raise MagCacheError(f"--{flag} is set by this script, which saves what comes out; leave it out.")
            if flag not in known:
                raise MagCacheError(f"{type(pipe).__name__} has no keyword {flag}{nearest_flag(flag, [*known, *ours])}")
            found[flag] = [value] if value else []
        elif flag is None:
            raise MagCacheError(f"'{word}' belongs to no flag.")
        else:
            found[flag].append(word)
    read = {name: [value_of(name, word) for word in words] or [True] for name, words in found.items()}
    for name, values in read.items():
        kinds = set(re.findall(r"\w+", str(known[name].annotation)))
        if kinds & {"int", "float"} and not kinds & {"str", "bool"} and {type(value) for value in values} & {str, bool}:
            raise MagCacheError(f"--{name} takes a number, not '{' '.join(found[name])}'.")
    call = {name: values[0] if len(values) == 1 else values for name, values in read.items()}
    if isinstance(call.get("num_inference_steps"), int) and call["num_inference_steps"] < 1:
        raise MagCacheError(f"--num_inference_steps must be at least 1, not {call['num_inference_steps']}.")
    return call


def value_of(name: str, word: str):
    """A number, list, True, False or None; a picture or video where the keyword means one; else the word itself."""
    suffix = Path(word).suffix.lower()
    if suffix in (*PICTURES, *VIDEO_SUFFIXES) and "prompt" not in name:
        from diffusers.utils import load_image, load_video

        try:
            return load_image(word) if suffix in PICTURES else load_video(word)
        except Exception as error:  # what the decoders and the network bring
            raise MagCacheError(f"--{name} {word} cannot be read ({error}).") from None
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word


def prompts_of(args) -> list[str | None]:
    if args.prompt_file:
        return prompts_in(args.prompt_file)
    if args.prompt is None and args.model in DEMOS:
        return (DEMOS[args.model] / "prompts.txt").read_text(encoding="utf-8").splitlines()[:1]
    return args.prompt or [None]  # some pipelines take none


def accelerator() -> str:
    """The device of this process."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def place(pipe, args) -> str:
    """Put the pipeline where it runs; returns the device."""
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


def share_one_picture(pipe, device: str) -> None:
    """diffusers' context parallelism: each rank holds a part of the tokens."""
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


def refine_pipeline(pipe, args, call: dict, prompts: list[str | None]) -> None:
    """--magcache_refine, on the prompts."""

    def drawn(prompt, title):
        return frames_of(draw(pipe, args, {**call, **({} if prompt is None else {"prompt": prompt})}, title)[0])

    asked = {ours: getattr(args, flag) for flag, ours in SETTINGS.items()}
    refine(pipe, drawn, prompts, **asked)


def draw_one(pipe, args, call: dict, number: int, count: int, device: str) -> None:
    """Draw one prompt, save it, and a report beside it."""
    say = print if is_writer() or not args.context_parallel else lambda *_: None
    if "prompt" in call:
        say(f"Prompt {number} of {count}: {call['prompt']}")
    if not args.magcache:
        output, seconds = draw(pipe, args, call, "un-cached")
        if is_writer() or not args.context_parallel:
            paths, _ = save(pipe, output, args, number, count)
            print(f"{', '.join(map(str, paths))}  ({seconds:.1f} s)")
        return
    asked = {ours: getattr(args, flag) for flag, ours in SETTINGS.items()}
    output = uncached = failure = None
    try:
        with enable(pipe, **asked, calibrate=args.magcache_calibration or None, announce=say) as cache:
            output, seconds = draw(pipe, args, call, "calibrating" if args.magcache_calibration else "MagCache")
            say(cache.report)
            if args.compare and cache.reports[-1].measuring:  # an un-cached run, which the next one is compared with
                uncached = output, seconds
                output, seconds = draw(pipe, args, call, "MagCache")
                say(cache.report)
    except MagCacheError as error:  # of a calibration, once the block ends
        if output is None:
            raise
        failure = error
    if cache.reports[-1].measuring and count == 1:
        say("Run the same command again to use what was measured, or ask for --magcache_speedup, which needs none.")
    if args.context_parallel and not is_writer():
        if args.compare:  # every rank has to take part
            compared(pipe, args, call, cache.reports[-1].schedule, output, seconds, uncached)
        return
    paths, frames = save(pipe, output, args, number, count)
    path = paths[0]
    say(f"{', '.join(map(str, paths))}  ({seconds:.1f} s)")
    about = {"model": args.model, "seed": args.seed, "device": device, "files": [one.name for one in paths]}
    about["call"] = {name: value for name, value in call.items() if isinstance(value, (str, int, float, bool))}
    if args.compare and frames is not None:
        with bookkeeping("The comparison", say):
            rows, pictures = compared(pipe, args, call, cache.reports[-1].schedule, output, seconds, uncached)
            print(quality_table(rows))
            about["quality"], ours = rows, files_of(path)
            sheet = own_place(beside(path, f"_compare{path.suffix}"), ours)
            side_by_side(sheet, list(pictures.values()), None if len(frames) == 1 else args.fps)
            print(f"Side by side: {sheet}")
            about["files"].append(sheet.name)
            if len(frames) > 1:
                moving = own_place(beside(path, "_compare.webp"), [name for name in ours if name != sheet.name])
                animation(moving, columns_of(rows, pictures), args.fps)
                print(f"Animation with the differences: {moving}")
                about["files"].append(moving.name)
    with bookkeeping("The report", say):
        write_report(report_place(path), cache.reports[-1], **about)
    if failure:
        raise failure


def draw(pipe, args, call: dict, title: str):
    """(output of the pipeline, seconds). title: of the progress bar."""
    pipe.set_progress_bar_config(disable=not is_writer(), desc=f"{title:11}")
    known, began = inspect.signature(type(pipe).__call__).parameters, time.perf_counter()
    if "generator" in known:
        call = {"generator": torch.Generator("cpu").manual_seed(args.seed), **call}
    if "output_type" in known:
        call = {"output_type": "np", **call}
    try:
        output = pipe(**call)
    except ValueError as error:  # what pipelines say of a call that they do not take
        raise MagCacheError(f"{type(pipe).__name__} does not take this call: {' '.join(str(error).split())}") from error
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return output, time.perf_counter() - began


def compared(
    pipe, args, call: dict, schedule, output, seconds: float, uncached: tuple | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """(figures, frames) of un-cached, cached, and the plain sampler with as many steps, by title. uncached: (output,
    seconds) where it is drawn already."""
    uncached, uncached_seconds = uncached or draw(pipe, args, call, "un-cached")
    fewer, fewer_seconds = draw(pipe, args, {**call, "num_inference_steps": schedule.computed}, "fewer steps")
    pictures = {"un-cached": frames_of(uncached), "MagCache": frames_of(output), "fewer steps": frames_of(fewer)}
    spent = {"un-cached": uncached_seconds, "MagCache": seconds, "fewer steps": fewer_seconds}
    computed = {"un-cached": schedule.steps, "MagCache": schedule.computed, "fewer steps": schedule.computed}
    rows = {}
    for title, frames in pictures.items():
        rows[title] = {"steps": computed[title], "seconds": spent[title], **quality(pictures["un-cached"], frames)}
    return rows, pictures


def columns_of(rows: dict, pictures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The columns of a video's animated picture by what is written above them: the clips, and where they differ."""
    columns, reference = {}, pictures["un-cached"]
    for title, frames in pictures.items():
        closeness = f"\n{rows[title]['psnr']:.1f} dB" if title != "un-cached" else ""
        columns[f"{title}, {rows[title]['steps']} steps{closeness}"] = frames
    for title in ("MagCache", "fewer steps"):
        columns[f"{title}:\ndifference x{MAGNIFIED}"] = magnified_difference(reference, pictures[title])
    return columns


def made_of(output, names: tuple[str, ...]):
    """The first of these that an output has: one for each picture, video or sound; None: it has none."""
    return next((output[name] for name in names if output.get(name) is not None), None)


def frames_of(output, index: int = 0) -> np.ndarray | None:
    """A picture or video of an output, uint8 (frames, height, width, 3); None: it has none."""
    made = made_of(output, ("images", "frames", "video"))
    if made is None:
        return None
    one = made[index]
    frames = np.asarray(one.float().cpu() if torch.is_tensor(one) else one)
    frames = frames[None] if frames.ndim == 3 else frames
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)


def sound_of(output, index: int = 0) -> np.ndarray | None:
    """A sound of an output, float (channels, samples); None: it has none."""
    made = made_of(output, ("audios", "audio", "sound"))
    if made is None:
        return None
    sound = np.asarray(torch.as_tensor(made[index]).float().cpu())
    return sound.reshape(-1, sound.shape[-1])


def sampling_rate(pipe) -> int:
    """Of the sounds that a pipeline makes, as its parts know it."""
    for part in ("vocoder", "audio_vae", "vae", "unet", "transformer"):
        config = getattr(getattr(pipe, part, None), "config", None)
        for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            if getattr(config, name, None):
                return int(getattr(config, name))
    return int(getattr(pipe, "sample_rate", 44100))


def save(pipe, output, args, number: int, count: int) -> tuple[list[Path], np.ndarray | None]:
    """Write the results whole: (files, frames of the first)."""
    made = made_of(output, ("images", "frames", "video", "audios"))
    if made is None:
        raise MagCacheError(
            f"Nothing is known of how to save a {type(output).__name__}; use magcache.enable in a script."
        )
    first, paths = frames_of(output), []
    suffix = ".wav" if first is None else ".png" if len(first) == 1 else ".mp4"
    target = args.output or Path(f"magcache_{Path(args.model).name}{suffix}")
    if target.suffix.lower() not in {".wav": [".wav"], ".png": PICTURES, ".mp4": [*VIDEO_SUFFIXES, ".webp"]}[suffix]:
        print(f"{target.name} is no name for {KINDS[suffix]}, so its ending becomes {suffix}.")
        target = target.with_suffix(suffix)
    target = target if count == 1 else beside(target, f"_{number}{target.suffix}")
    places = [target] if len(made) == 1 else [beside(target, f"_{one + 1}{target.suffix}") for one in range(len(made))]
    ours = files_of(places[0])
    for index, wanted in enumerate(places):
        path = own_place(wanted, ours)
        frames, sound = frames_of(output, index), sound_of(output, index)
        if frames is None:
            save_sound(path, sound, sampling_rate(pipe))
        else:
            path = save_frames(path, frames, None if len(frames) == 1 else args.fps)
            if sound is not None:
                add_sound(path, sound, sampling_rate(pipe))
        paths.append(path)
    return paths, first


def save_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """As a 16-bit wave file."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.T.clip(-1, 1) * 32767).astype("<i2").tobytes())


def add_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """Into a video. Where that fails the sound lies beside it."""
    beside_it = own_place(beside(path, ".wav"), files_of(path))
    whole = part_of(path)
    save_sound(beside_it, sound, rate)
    ffmpeg = needs("imageio_ffmpeg", "imageio[ffmpeg]").get_ffmpeg_exe()
    inputs = ["-i", str(path), "-i", str(beside_it), "-c:v", "copy"]
    done = subprocess.run(
        [ffmpeg, "-y", "-loglevel", "error", *inputs, str(whole)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        whole.unlink(missing_ok=True)
        print(f"The sound is in {beside_it} ({done.stderr.strip().splitlines()[-1]}).", file=sys.stderr)
        return
    whole.replace(path)
    beside_it.unlink()


if __name__ == "__main__":
    main()
