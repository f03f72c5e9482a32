"""The command-line flags that all scripts share, and what they mean."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from difflib import get_close_matches

from ..errors import MagCacheError, needs
from ..gram import GRAMS, PREDICTORS
from ..planner import Target
from ..schedule import Settings
from ..tables import SETTING_NAMES

DTYPES = ("float32", "bfloat16", "float16")


def add_magcache_flags(parser):
    """Add the MagCache group to a parser. Settings left out stand for the lines at the top of the script or the
    published ones (`settings_of`)."""
    group = parser.add_argument_group("MagCache")
    group.add_argument(
        "--magcache_thresh",
        type=float,
        metavar="ERROR",
        help="bound on the accumulated error of a reuse; larger is faster and less exact; 0 turns it off",
    )
    group.add_argument("--magcache_K", type=int, metavar="STEPS", help="most reuses in a row; 0 turns it off")
    group.add_argument(
        "--retention_ratio",
        type=float,
        metavar="SHARE",
        help="share of the steps, from the first on, that always compute",
    )
    add_target_flags(group)
    group.add_argument(
        "--magcache_guard",
        type=float,
        metavar="X",
        help="stop skipping in a planned run once a computed step is predicted X times worse than in the calibration",
    )
    group.add_argument("--no-magcache", dest="magcache", action="store_false", help="run the model as it is")
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
        help="ratios at other step counts: kept along the noise level, or repeated by index as the released scripts do",
    )
    group.add_argument("--magcache_cache_device", metavar="DEVICE", help="keep residuals there (cpu saves GPU memory)")
    group.add_argument("--magcache_cache_dtype", choices=DTYPES, help="keep residuals in this type")
    group.add_argument(
        "--magcache_plot", action="store_true", help="also draw ratios, error and skipped steps as a PNG"
    )
    group.add_argument(
        "--compare",
        action="store_true",
        help="also render un-cached, and with the plain sampler at as many "
        "steps as MagCache computes, at the same seed; write them side by side with the figures",
    )
    return group


def add_refine_flag(group):
    """For scripts of diffusers pipelines (`refine.refine`)."""
    group.add_argument(
        "--magcache_refine",
        action="store_true",
        help="with --magcache_speedup or --magcache_steps: calibrate on the prompts, draw each again in a few ways to "
        "spread the computed steps, and keep the closest for later runs of this checkpoint; saves no pictures",
    )


def add_opt_in_flags(parser):
    """The MagCache group of a host that computes everything unless it is asked not to."""
    add_magcache_flags(parser).add_argument(
        "--use_magcache",
        action="store_true",
        help="render with MagCache, by the settings of the task; any other flag of this group implies it",
    )


def flags_taken(add):
    """Take the flags of `add(parser)` out of sys.argv and leave the rest to the host's own parser; returns them as
    `flags_and_rest` does."""
    args, sys.argv[1:] = flags_and_rest(add, sys.argv[1:])
    return args


def flags_and_rest(add, argv: list) -> tuple:
    """(the flags of `add(parser)` with the set of those that were `given` by name, the rest of argv).

    Raises MagCacheError for a flag that looks like one of them and is none: a host may pass over it in silence.
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
            raise MagCacheError(f"There is no flag {flag}" + (f"; {ours[near[0]]} is the nearest." if near else "."))
    if {"-h", "--help"} & set(rest):
        print(parser.format_help())
    return args, rest


def switched_on(args):
    """Whether the flags of `add_opt_in_flags` ask for MagCache: --use_magcache itself, or any setting."""
    return args.magcache and bool(args.given - {"magcache_calibration"})


def add_target_flags(group):
    """The flags of a planned run."""
    group.add_argument(
        "--magcache_speedup",
        type=float,
        metavar="X",
        help="make the run X times faster; no calibration is needed",
    )
    group.add_argument("--magcache_steps", type=int, metavar="N", help="the same, with exactly N computed steps")
    group.add_argument(
        "--magcache_max_error",
        type=float,
        metavar="ERROR",
        help="plan from a calibration, with the fewest computed steps for which no skipped one's expected relative "
        "error exceeds this",
    )
    group.add_argument(
        "--magcache_predictor",
        choices=("line", *PREDICTORS),
        help="how a planned run predicts: along the line through the two newest outputs (line, the default), or with a "
        "calibration (linear: the same, corrected as the calibration tells, or the two newest residuals weighed; "
        "reuse: the newest as it is)",
    )
    group.add_argument(
        "--magcache_payload",
        choices=GRAMS,
        help="what a run planned from a calibration keeps and predicts: the model's output (the default for linear; "
        "least memory, and skipped steps cost nothing), or the residual of the blocks (that for "
        "--magcache_max_error and --magcache_guard)",
    )
    group.add_argument(
        "--magcache_corrector",
        choices=("on", "off"),
        default="on",
        help="whether skipped steps are made again when the next one is computed, which costs no call of the model",
    )


def target_of(args):
    """The Target that the flags ask for, or None: the paper's rule."""
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
        raise MagCacheError("--magcache_thresh is the paper's: leave it out of a planned run.")
    return Target(
        **asked,
        predictor=args.magcache_predictor,
        magcache_K=args.magcache_K,
        retention_ratio=args.retention_ratio,
        payload=args.magcache_payload,
        magcache_guard=guard,
    )


def check_flags(args, compared_with=("torchmetrics", "tabulate", "imageio")):
    """Find what cannot work before anything is loaded or rendered. compared_with: the packages that --compare needs.
    Raises MagCacheError."""
    import torch

    if args.compare and not args.magcache:
        raise MagCacheError("--compare sets MagCache against the un-cached model: leave out --no-magcache.")
    if args.compare:
        for package in compared_with:
            needs(package, package)
    if args.magcache_plot:
        needs("matplotlib", "matplotlib")
    try:
        torch.empty(0, device=args.magcache_cache_device)
    except (RuntimeError, AssertionError):
        raise MagCacheError(
            f"--magcache_cache_device {args.magcache_cache_device} is no device of this machine."
        ) from None


def check_writable(flag, path):
    """Make the folder of an output file. Raises MagCacheError if nothing can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise MagCacheError(f"{flag} {path} cannot be written ({error.strerror}); choose another place.") from None


def cache_options(args):
    """How ratios are carried over and residuals kept: arguments of `magcache_forward`."""
    import torch

    return {
        "interpolation": args.magcache_interp,
        "device": args.magcache_cache_device,
        "dtype": getattr(torch, args.magcache_cache_dtype) if args.magcache_cache_dtype else None,
    }


def named_settings(values: Sequence[float]) -> dict[str, float]:
    """The settings of a script's line, (magcache_thresh, magcache_K, retention_ratio), by name."""
    return dict(zip(SETTING_NAMES, values))


def settings_of(args, otherwise: dict):
    """What a run is to do: a Target if steps, a speed-up or an error is asked for, else Settings, where a flag wins
    over `otherwise` (magcache_thresh, magcache_K and retention_ratio)."""
    target = target_of(args)
    if target is not None:
        return target
    given = {name: getattr(args, name) for name in otherwise if getattr(args, name) is not None}
    return Settings(**{**otherwise, **given})
