"""Print plans and ratio tables, compare results, install drop-ins, import tables.

{prog} presets
{prog} plan flux-dev --steps 28
{prog} compare uncached.png cached.png
{prog} install MagCache4FLUX /path/to/checkout
{prog} import ratios.json --steps 28 --shift 3
{prog} describe my/finetune
"""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import MagCacheError, escape_unprintable, needs

if TYPE_CHECKING:
    from .schedule import Settings
    from .tables import RatioTable

# Each command imports what it uses: `install` needs the standard library only, `plan` no torch.
PROG = "python -m common" if __package__ == "common" else "magcache"


def presets(arguments: list[str]) -> None:
    """List the ratio tables: those of the repository, then those measured on this machine."""
    from .schedule import Settings
    from .tables import calibrations, load, preset_names

    parser_of("presets").parse_args(arguments)
    tables = [load(name) for name in preset_names()]
    own = {str(path): table for path, table in calibrations().items()}
    rows = []
    for name, table in [(table.name, table) for table in tables] + list(own.items()):
        levels = table.levels(table.steps)
        schedule = Settings(**table.settings).plan(table, levels, table.switch_step(levels)) if table.settings else None
        rows.append(
            [
                name,
                table.origin,
                table.steps,
                len(table.mag_ratios),
                *table.settings.values(),
                *[""] * (3 - len(table.settings)),
                f"{schedule.computed}/{schedule.steps}" if schedule else "",
                f"{schedule.bound:.2f}x" if schedule else "",
            ]
        )
    print(
        needs("tabulate", "tabulate").tabulate(
            rows,
            headers=["name", "origin", "steps", "branches", "thresh", "K", "retention", "computed", "at most"],
            disable_numparse=True,
        )
    )


def plan(arguments: list[str]) -> None:
    """Print which steps a run would skip."""
    from .plan_text import plan_text
    from .scripts.flags import add_target_flags, target_of
    from .tables import load

    parser = parser_of("plan")
    parser.add_argument("preset", metavar="PRESET|FILE")
    parser.add_argument("--steps", type=int, help="default: as calibrated")
    parser.add_argument("--shift", type=float, help="shift of the sampler; default: as calibrated")
    parser.add_argument("--magcache_thresh", type=float)
    parser.add_argument("--magcache_K", type=int)
    parser.add_argument("--retention_ratio", type=float)
    add_target_flags(parser)
    parser.add_argument("--magcache_interp", choices=("sigma", "nearest"), default="sigma")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="plot ratios, error and skipped steps")
    args = parser.parse_args(arguments)

    table = load(args.preset)
    levels = table.levels(table.steps if args.steps is None else args.steps, args.shift)
    settings = target_of(args) or thresholds(args, table)
    schedule = settings.plan(table, levels, table.switch_step(levels), interpolation=args.magcache_interp)
    print(plan_text(schedule, levels, table))
    if args.plot:
        from .scripts.plots import plot_schedule

        plot_schedule(args.plot, schedule, levels, table.name)
        print(f"  image: {args.plot}")


def thresholds(args: argparse.Namespace, table: RatioTable) -> Settings:
    """Settings from the flags, the published ones where a flag is left out."""
    from .schedule import Settings
    from .tables import SETTING_NAMES

    given = {name: getattr(args, name) for name in SETTING_NAMES}
    chosen = {**table.settings, **{name: value for name, value in given.items() if value is not None}}
    missing = [name for name in given if name not in chosen]
    if missing:
        raise MagCacheError(f"{table.name} has no published settings; give --{' --'.join(missing)}.")
    return Settings(**chosen)


def compare(arguments: list[str]) -> None:
    """PSNR, SSIM and MS-SSIM of B against A, and both side by side."""
    from .scripts.outputs import own_place
    from .scripts.quality import quality, quality_text, read_frames, side_by_side

    parser = parser_of("compare")
    parser.add_argument("a", metavar="A", help="un-cached image or video")
    parser.add_argument("b", metavar="B", help="cached image or video")
    parser.add_argument("--out", type=Path, help="where the side-by-side image or video goes")
    args = parser.parse_args(arguments)

    if args.out and args.out.resolve() in (Path(args.a).resolve(), Path(args.b).resolve()):
        raise MagCacheError(f"--out {args.out} is one of the two files that are compared; name another.")
    (reference, fps), (result, _) = read_frames(args.a), read_frames(args.b)
    print(quality_text(quality(reference, result)))
    out = args.out or own_place(Path(f"compare_{Path(args.b).stem}{'.png' if fps is None else '.mp4'}"), ())
    side_by_side(out, [reference, result], fps)
    print(f"Side by side: {out}")


def install_command(arguments: list[str]) -> None:
    """Copy a drop-in and `common/` into an upstream checkout."""
    from .scripts.install import install

    parser = parser_of("install")
    parser.add_argument("folder", metavar="FOLDER", help="MagCache4...")
    parser.add_argument("path", type=Path, help="the upstream checkout")
    args = parser.parse_args(arguments)

    command = install(args.folder, args.path)
    print("Installed. Run it there, in the environment of that checkout (torch 2.2 or newer):")
    print(f"  cd {args.path}\n  {command}")


def import_(arguments: list[str]) -> None:
    """Convert another program's magnitude ratios into a table for MagCache."""
    from .tables import import_table, write

    parser = parser_of("import")
    parser.add_argument(
        "file", type=Path, metavar="FILE.json", help="of diffusers, LightX2V, TeleFuser, Kandinsky-5 ..."
    )
    parser.add_argument("--steps", type=int, help="steps of the run it was measured in, if FILE does not say")
    parser.add_argument("--shift", type=float, help="shift of that run's sampler, if FILE does not say")
    parser.add_argument("--entry", default="", help="which of several tables, such as 512/25")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: in this folder, under its name")
    args = parser.parse_args(arguments)

    table = import_table(args.file, args.steps, args.shift, args.entry)
    out = args.out or Path(f"{table.name}.magcache.json")
    if out.exists():
        raise MagCacheError(f"{out} already exists; name another file with --out.")
    write(out, table)
    print(f"Ratios of {table.steps} steps; noise levels assumed from shift {table.sampler['shift']:g}. Saved as {out}:")
    print(f"use them with --mag_ratios {out}.")


PROOF_SIZE = {"height": 256, "width": 256, "num_frames": 9}  # facts hold at any size, and a large one takes long


def describe(arguments: list[str]) -> None:
    """Find and print what MagCache needs to know about the model of a diffusers pipeline."""
    import torch

    from .discover import discover, first_call, host_line
    from .scripts.pipelines import check_folder

    parser = parser_of("describe")
    parser.add_argument("model", metavar="MODEL", help="hub id or folder")
    parser.add_argument("--prompt", default="a photo of a cat")
    args = parser.parse_args(arguments)
    check_folder(args.model)
    try:
        pipe = needs("diffusers", "diffusers").DiffusionPipeline.from_pretrained(args.model)
        known = inspect.signature(type(pipe).__call__).parameters
        small = {name: size for name, size in PROOF_SIZE.items() if name in known}
        model, positional, named = first_call(pipe, prompt=args.prompt, **small)
    except (OSError, ValueError, TypeError) as error:  # what loading and calling an unknown pipeline bring
        raise MagCacheError(f"{args.model} cannot be loaded and run ({str(error).splitlines()[0]}).") from None
    with torch.no_grad():
        print(host_line(model, discover(model, positional, named)))


COMMANDS = {
    "presets": presets,
    "plan": plan,
    "compare": compare,
    "install": install_command,
    "import": import_,
    "describe": describe,
}


def parser_of(name: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{PROG} {name}", description=COMMANDS[name].__doc__)


def main(arguments: list[str] | None = None) -> None:
    """The command `magcache`; in a clone, and beside an installed drop-in, `python -m common`."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=(__doc__ or "").format(prog=PROG),
        epilog="\n".join(f"{name:10} {(command.__doc__ or '')}" for name, command in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"MagCache {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; COMMAND --help lists them")
    args = parser.parse_args(arguments)
    escape_unprintable()
    try:
        COMMANDS[args.command](args.arguments)
        sys.stdout.flush()
    except MagCacheError as error:
        sys.exit(f"magcache: {error}")
    except BrokenPipeError:  # as in `magcache presets | head`; the interpreter flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
