"""What can be known without running a model, and the handling of files around it.

python -m common presets
python -m common plan flux-dev --steps 28
python -m common compare uncached.png cached.png
python -m common install MagCache4FLUX /path/to/checkout
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import MagCacheError, needs
from .report import plan_text
from .schedule import Settings
from .scripts.flags import add_target_flags, target_of
from .scripts.plots import plot_schedule
from .tables import calibrations_folder, load, preset_names, read


def presets(args):
    """List the ratio tables: those of the repository, then those measured on this machine."""
    tables = [load(name) for name in preset_names()]
    own = []
    for path in sorted(calibrations_folder().glob("*.json")):
        try:
            own.append((path, read(path)))
        except MagCacheError as error:
            print(error)
    rows = []
    for name, table in [(table.name, table) for table in tables] + [(str(path), table) for path, table in own]:
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


def thresholds(args, table):
    """Settings from the flags, the published ones where a flag is left out."""
    given = {name: getattr(args, name) for name in ("magcache_thresh", "magcache_K", "retention_ratio")}
    chosen = {**table.settings, **{name: value for name, value in given.items() if value is not None}}
    missing = [name for name in given if name not in chosen]
    if missing:
        raise MagCacheError(f"{table.name} has no published settings; give --{' --'.join(missing)}.")
    return Settings(**chosen)


def plan(args):
    """Print which steps a run would skip."""
    table = load(args.preset)
    levels = table.levels(table.steps if args.steps is None else args.steps, args.shift)
    settings = target_of(args) or thresholds(args, table)
    schedule = settings.plan(table, levels, table.switch_step(levels), interpolation=args.magcache_interp)
    print(plan_text(schedule, levels, table))
    if args.plot:
        plot_schedule(args.plot, schedule, levels, table.name)
        print(f"  picture: {args.plot}")


def compare(args):
    """PSNR, SSIM and MS-SSIM of B against A, and both side by side."""
    from .scripts.quality import quality, quality_text, read_frames, side_by_side

    (reference, fps), (result, _) = read_frames(args.a), read_frames(args.b)
    print(quality_text(quality(reference, result)))
    out = args.out or Path(f"compare_{Path(args.b).stem}").with_suffix(".png" if fps is None else ".mp4")
    side_by_side(out, [reference, result], fps)
    print(f"Side by side: {out}")


def install(args):
    """Copy a drop-in and `common/` into an upstream checkout."""
    from .scripts.install import install as copy

    command = copy(args.folder, args.path)
    print(f"Installed. Run it there:\n  cd {args.path}\n  {command}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m common", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser("presets", help=presets.__doc__).set_defaults(run=presets)

    command = commands.add_parser("plan", help=plan.__doc__)
    command.add_argument("preset", metavar="PRESET|FILE")
    command.add_argument("--steps", type=int, help="default: as calibrated")
    command.add_argument("--shift", type=float, help="shift of the sampler; default: as calibrated")
    command.add_argument("--magcache_thresh", type=float)
    command.add_argument("--magcache_K", type=int)
    command.add_argument("--retention_ratio", type=float)
    add_target_flags(command)
    command.add_argument("--magcache_interp", choices=("sigma", "nearest"), default="sigma")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw ratios, accumulated error and skipped steps"
    )
    command.set_defaults(run=plan)

    command = commands.add_parser("compare", help=compare.__doc__)
    command.add_argument("a", metavar="A", help="un-cached picture or video")
    command.add_argument("b", metavar="B", help="cached picture or video")
    command.add_argument("--out", type=Path, help="where the side-by-side picture or video goes")
    command.set_defaults(run=compare)

    command = commands.add_parser("install", help=install.__doc__)
    command.add_argument("folder", metavar="FOLDER", help="MagCache4...")
    command.add_argument("path", type=Path, help="the upstream checkout")
    command.set_defaults(run=install)

    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except MagCacheError as error:
        sys.exit(f"magcache: {error}")


if __name__ == "__main__":
    main()
