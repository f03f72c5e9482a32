"""The command-line flags that all scripts share, and what they mean."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import MagCacheError, needs
from ..gram import GRAMS, PREDICTORS
from ..planner import Target
from ..schedule import Settings
from ..tables import SETTING_NAMES, preset_names

DTYPES = ("float32", "bfloat16", "float16")


def add_magcache_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the MagCache group to a parser, and return it. Settings that are left out are those of the script's lines or
    the published ones (`settings_of`)."""
    group = parser.add_argument_group("MagCache")
    group.add_argument(
        "--magcache_thresh",
        type=float,
        metavar="ERROR",
        help="bound on the accumulated error; higher is faster and less exact; 0 turns MagCache off",
    )
    group.add_argument("--magcache_K", type=int, metavar="STEPS", help="most skipped steps in a row; 0 is off")
    group.add_argument(
        "--retention_ratio",
        type=float,
        metavar="SHARE",
        help="share of the steps, from the first, that always compute",
    )
    add_target_flags(group)
    group.add_argument(
        "--magcache_guard",
        type=float,
        metavar="X",
        help="needs a calibration: stop skipping once a computed step is predicted X times worse than in it",
    )
    group.add_argument("--no-magcache", dest="magcache", action="store_false", help="run the plain model")
    group.add_argument(
        "--magcache_calibration",
        nargs="?",
        const="",
        metavar="FILE",
        help="run un-cached, measure the magnitude ratios and save them, by default where the next run of "
        "this checkpoint finds them",
    )
    group.add_argument(
        "--mag_ratios", metavar="PRESET|FILE", help="ratios to use instead of those found for the checkpoint"
    )
    group.add_argument(
        "--magcache_interp",
        choices=("sigma", "nearest"),
        default="sigma",
        help="ratios for other step counts: interpolated over the noise level, or repeated by index as the released "
        "scripts do",
    )
    group.add_argument(
        "--magcache_cache_device", metavar="DEVICE", help="where to keep residuals (cpu saves GPU memory)"
    )
    group.add_argument("--magcache_cache_dtype", choices=DTYPES, help="type to keep residuals in")
    group.add_argument("--magcache_plot", action="store_true", help="also plot ratios, error and skipped steps (PNG)")
    group.add_argument(
        "--compare",
        action="store_true",
        help="also render un-cached and with as few plain steps as MagCache computes, at the same seed; write all "
        "three side by side and print PSNR, SSIM and MS-SSIM",
    )
    return group


def add_refine_flag(group: argparse._ArgumentGroup) -> None:
    """The flag of scripts for diffusers pipelines (`refine.refine`)."""
    group.add_argument(
        "--magcache_refine",
        action="store_true",
        help="with --magcache_speedup or --magcache_steps: calibrate on the prompts, render each with five spreads of "
        "the computed steps, and use the closest in later runs of this checkpoint; saves no images",
    )


def add_opt_in_flags(parser: argparse.ArgumentParser) -> None:
    """The MagCache group for a script that computes everything unless it is told otherwise."""
    add_magcache_flags(parser).add_argument(
        "--use_magcache",
        action="store_true",
        help="render with MagCache at the settings of the task; any other flag of this group but "
        "--magcache_calibration implies it",
    )


def flags_taken(add: Callable[[argparse.ArgumentParser], Any]) -> argparse.Namespace:
    """Take the flags that `add(parser)` adds out of sys.argv, and leave the rest to the host's own parser."""
    args, sys.argv[1:] = flags_and_rest(add, sys.argv[1:])
    return args


def flags_and_rest(
    add: Callable[[argparse.ArgumentParser], Any], argv: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """(the flags that `add(parser)` adds, the rest of argv). The first has a further attribute `given`: the set of
    names of the flags that were given.

    Raises MagCacheError for a flag that is only similar to one of them, because the host might silently ignore it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    add(parser)
    untouched = object()
    args = argparse.Namespace(**{action.dest: untouched for action in parser._actions})
    args, rest = parser.parse_known_args(argv, args)
    given = {name for name, value in vars(args).items() if value is not untouched}
    args = argparse.Namespace(
        **{name: value if name in given else parser.get_default(name) for name, value in vars(args).items()},
        given=given,
    )
    ours = {action.option_strings[0].replace("-", "_"): action.option_strings[0] for action in parser._actions}
    for flag in (flag.split("=")[0] for flag in rest if flag.startswith("--")):
        near = get_close_matches(flag.replace("-", "_"), ours, n=1, cutoff=0.8)
        if near or "magcache" in flag:
            raise MagCacheError(f"There is no flag {flag}" + (f"; did you mean {ours[near[0]]}?" if near else "."))
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    return args, rest


def switched_on(args: argparse.Namespace) -> bool:
    """Whether the flags of `add_opt_in_flags` ask for MagCache: --use_magcache itself, or any setting."""
    return args.magcache and bool(args.given - {"magcache_calibration"})


def add_target_flags(group: Any) -> None:
    """The flags of a planned run."""
    group.add_argument(
        "--magcache_speedup",
        type=float,
        metavar="X",
        help="run X times faster; needs no calibration",
    )
    group.add_argument("--magcache_steps", type=int, metavar="N", help="compute exactly N steps; needs no calibration")
    group.add_argument(
        "--magcache_max_error",
        type=float,
        metavar="ERROR",
        help="needs a calibration: compute the fewest steps that keep every skipped step's expected relative error "
        "within this",
    )
    group.add_argument(
        "--magcache_predictor",
        choices=("line", *PREDICTORS),
        help="how skipped steps are predicted: along the line through the two newest computed outputs (line, the "
        "default); with a calibration, linear: the same, corrected with its weights (of residuals: a weighted sum of "
        "the two newest), or reuse: the newest, unchanged",
    )
    group.add_argument(
        "--magcache_payload",
        choices=GRAMS,
        help="with a calibration, what is kept and predicted: the model's output (default of linear; takes least "
        "memory, and skipped steps cost nothing) or the residual of the blocks (default of --magcache_max_error and "
        "--magcache_guard)",
    )
    group.add_argument(
        "--magcache_corrector",
        choices=("on", "off"),
        default="on",
        help="whether skipped steps are corrected when the next one is computed (costs no model call)",
    )


def target_of(args: argparse.Namespace) -> Target | None:
    """The Target that the flags ask for; None for the paper's rule. Raises MagCacheError for flags of both."""
    asked = {name: getattr(args, name) for name in ("magcache_steps", "magcache_speedup", "magcache_max_error")}
    guard = getattr(args, "magcache_guard", None)
    if all(value is None for value in asked.values()):
        if args.magcache_predictor is not None or args.magcache_payload is not None or guard is not None:
            raise MagCacheError(
                "--magcache_predictor, --magcache_payload and --magcache_guard are for planned runs: ask for one "
                "with --magcache_speedup, --magcache_steps or --magcache_max_error."
            )
        return None
    if args.magcache_thresh is not None:
        raise MagCacheError("--magcache_thresh belongs to the paper's rule: leave it out of a planned run.")
    return Target(
        **asked,
        predictor=args.magcache_predictor,
        magcache_K=args.magcache_K,
        retention_ratio=args.retention_ratio,
        payload=args.magcache_payload,
        magcache_guard=guard,
    )


def check_flags(
    args: argparse.Namespace, compared_with: Sequence[str] = ("torchmetrics", "tabulate", "imageio")
) -> None:
    """Raises MagCacheError for what cannot work, before anything is loaded or rendered. compared_with: the packages
    that --compare needs."""
    import torch

    if args.compare and not args.magcache:
        raise MagCacheError("--compare compares MagCache with the un-cached model: leave out --no-magcache.")
    if args.compare:
        for package in compared_with:
            needs(package, package)
    if args.magcache_plot:
        needs("matplotlib", "matplotlib")
    try:
        torch.empty(0, device=args.magcache_cache_device)
    except (RuntimeError, AssertionError):
        raise MagCacheError(
            f"--magcache_cache_device {args.magcache_cache_device} is not a device of this machine."
        ) from None


def check_seed(seed: int) -> None:
    """Raises MagCacheError for a seed that torch does not take."""
    if not 0 <= seed < 2**63:
        raise MagCacheError(f"--seed must be between 0 and 2^63 - 1, not {seed}.")


def check_writable(flag: str, path: Path) -> None:
    """Make the folder of an output file. Raises MagCacheError, which names the flag, if nothing can be written
    there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MagCacheError(f"{flag} {path} cannot be written ({error.strerror}); choose another place.") from None


def check_family(name: str, family: str | tuple[str, ...]) -> None:
    """Raises MagCacheError for a preset of another family of models."""
    if family and name in preset_names() and not name.startswith(family):
        fitting_ones = ", ".join(preset for preset in preset_names() if preset.startswith(family))
        raise MagCacheError(f"{name} holds the ratios of another model; those for this one are {fitting_ones}.")


def named_calibration(args: argparse.Namespace) -> Path | None:
    """The file that --magcache_calibration names, or None."""
    if not args.magcache_calibration:
        return None
    path = Path(args.magcache_calibration)
    return path if path.suffix else path.with_name(f"{path.name}.json")


def check_calibration(args: argparse.Namespace, steps: int) -> None:
    """Raises MagCacheError if --magcache_calibration is given and cannot work in a run of so many steps."""
    if args.magcache_calibration is not None:
        if steps < 2:
            raise MagCacheError("Calibration compares neighbouring steps: run at least 2.")
        if args.compare:
            raise MagCacheError(
                "--compare renders with MagCache, --magcache_calibration measures without: one at a time."
            )
        check_calibration_file(args)


def check_calibration_file(args: argparse.Namespace) -> None:
    """Raises MagCacheError if --magcache_calibration names a file that cannot be written."""
    path = named_calibration(args)
    if path is not None and path.suffix != ".json":
        raise MagCacheError(
            f"--magcache_calibration {path} is not a calibration file: end it in .json, or leave it out and put the "
            "flag last."
        )
    if path is not None:
        check_writable("The calibration file", path)


def cache_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `magcache_forward` for interpolating ratios and keeping residuals."""
    import torch

    return {
        "interpolation": args.magcache_interp,
        "device": args.magcache_cache_device,
        "dtype": getattr(torch, args.magcache_cache_dtype) if args.magcache_cache_dtype else None,
    }


def named_settings(values: Sequence[float]) -> dict[str, float]:
    """The settings of a script's line, (magcache_thresh, magcache_K, retention_ratio), by name."""
    return dict(zip(SETTING_NAMES, values))


def settings_of(args: argparse.Namespace, otherwise: dict[str, float]) -> Settings | Target:
    """What the flags ask for: a Target if steps, a speed-up or an error is named; otherwise Settings, of which those
    without a flag are taken from `otherwise`, {name: value}."""
    target = target_of(args)
    if target is not None:
        return target
    given = {name: getattr(args, name) for name in otherwise if getattr(args, name) is not None}
    return Settings(**{**otherwise, **given})
