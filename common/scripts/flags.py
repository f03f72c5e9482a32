"""The command-line flags that all scripts share, and what they mean."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from ..errors import MagCacheError, needs
from ..planner import GRAMS, PREDICTORS, Target
from ..schedule import Settings
from ..tables import calibrations_folder, find, load

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


def add_target_flags(group):
    """The flags of a planned run."""
    group.add_argument(
        "--magcache_speedup",
        type=float,
        metavar="X",
        help="plan the run to be X times faster, by the step times "
        "of the calibration, and predict skipped residuals from the two newest",
    )
    group.add_argument("--magcache_steps", type=int, metavar="N", help="the same, with exactly N computed steps")
    group.add_argument(
        "--magcache_max_error",
        type=float,
        metavar="ERROR",
        help="the same, with the fewest computed steps for which no skipped one's expected relative error exceeds this",
    )
    group.add_argument(
        "--magcache_predictor",
        choices=PREDICTORS,
        help="how a planned run predicts; default: linear, or reuse where there are published ratios only",
    )
    group.add_argument(
        "--magcache_payload",
        choices=GRAMS,
        default="residual",
        help="what a planned run keeps and predicts: the "
        "residual of the blocks, or the model's output (least memory, and skipped steps cost nothing)",
    )


def target_of(args):
    """The Target that the flags ask for, or None: the paper's rule."""
    asked = {name: getattr(args, name) for name in ("magcache_steps", "magcache_speedup", "magcache_max_error")}
    guard = getattr(args, "magcache_guard", None)
    if all(value is None for value in asked.values()):
        if args.magcache_predictor is not None or args.magcache_payload != "residual" or guard is not None:
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


def check_flags(args):
    """Find what cannot work before anything is loaded or rendered."""
    import torch

    if args.compare and not args.magcache:
        raise MagCacheError("--compare sets MagCache against the un-cached model: leave out --no-magcache.")
    for package in ("torchmetrics", "tabulate") * args.compare + ("matplotlib",) * args.magcache_plot:
        needs(package, package)
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


def settings_of(args, script_settings, mag_ratios, is_default_model):
    """What a run is to do: a Target if steps, a speed-up or an error is asked for, else Settings. Of these a flag wins;
    else the script's lines hold for the script's own model, and another takes what was published for it, where
    something was."""
    target = target_of(args)
    if target is not None:
        return target
    chosen = {**script_settings} if is_default_model else {**script_settings, **mag_ratios.settings}
    given = {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    return Settings(**{**chosen, **given})


def ratios_of(args, model, fingerprint):
    """The ratio table of a run: the one named, else the checkpoint's own. Raises MagCacheError when there is none."""
    if args.mag_ratios:
        return load(args.mag_ratios)
    found = find(model, fingerprint)
    if found is None:
        script = Path(sys.argv[0]).name
        raise MagCacheError(
            f"No magnitude ratios are known for {model}: measure them once with `python {script} --model "
            f"{model} --magcache_calibration`, use another model's with --mag_ratios PRESET, or run with "
            "--no-magcache."
        )
    return found


def calibration_path(args, model, fingerprint):
    """Where `--magcache_calibration` writes: the file named, else one that `find` knows by the weights' fingerprint."""
    name = Path(str(model)).name
    return (
        Path(args.magcache_calibration)
        if args.magcache_calibration
        else calibrations_folder() / f"{name}-{fingerprint}.json"
    )
