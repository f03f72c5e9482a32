"""The command-line flags that all scripts share, and what they mean."""
import sys
import tempfile
from pathlib import Path

from .planner import PREDICTORS, Target
from .ratios import MagCacheError, calibrations_folder, find, load
from .report import needs
from .schedule import Settings

DTYPES = ("float32", "bfloat16", "float16")


def add_magcache_flags(parser):
    """Add the MagCache group to a parser. Settings left out stand for the lines at the top of the script or the
    published ones (`settings_of`)."""
    group = parser.add_argument_group("MagCache")
    group.add_argument("--magcache_thresh", type=float, metavar="ERROR",
                       help="bound on the accumulated error of a reuse; larger is faster and less exact; 0 turns it off")
    group.add_argument("--magcache_K", type=int, metavar="STEPS", help="most reuses in a row; 0 turns it off")
    group.add_argument("--retention_ratio", type=float, metavar="SHARE", help="share of the steps, from the first on, "
                       "that always compute")
    group.add_argument("--magcache_speedup", type=float, metavar="X", help="plan the run for a bound of X, and predict "
                       "skipped residuals from the two newest; needs a calibration of this checkpoint")
    group.add_argument("--magcache_steps", type=int, metavar="N", help="the same, with exactly N computed steps")
    group.add_argument("--magcache_predictor", choices=PREDICTORS, default="linear", help="how a planned run predicts")
    group.add_argument("--no-magcache", dest="magcache", action="store_false", help="run the model as it is")
    group.add_argument("--magcache_calibration", nargs="?", const="", metavar="FILE",
                       help="run un-cached, measure the magnitude ratios and save them, by default where the next run of "
                       "this checkpoint finds them")
    group.add_argument("--mag_ratios", metavar="PRESET|FILE", help="ratios to use instead of those found for the checkpoint")
    group.add_argument("--magcache_interp", choices=("sigma", "nearest"), default="sigma", help="ratios at other step "
                       "counts: kept along the noise level, or repeated by index as the released scripts do")
    group.add_argument("--magcache_cache_device", metavar="DEVICE", help="keep residuals there (cpu saves GPU memory)")
    group.add_argument("--magcache_cache_dtype", choices=DTYPES, help="keep residuals in this type")
    group.add_argument("--magcache_plot", action="store_true", help="also draw ratios, error and skipped steps as a PNG")
    group.add_argument("--compare", action="store_true", help="also render un-cached, and with the plain sampler at as many "
                       "steps as MagCache computes, at the same seed; write them side by side with the figures")
    return group


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
        raise MagCacheError(f"--magcache_cache_device {args.magcache_cache_device} is no device of this machine.") from None


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
    return {"interpolation": args.magcache_interp, "device": args.magcache_cache_device,
            "dtype": getattr(torch, args.magcache_cache_dtype) if args.magcache_cache_dtype else None}


def settings_of(args, script_settings, mag_ratios, is_default_model):
    """What a run is to do: a Target if a number of steps or a speed-up is asked for, else Settings. Of these a flag wins; else
    the script's lines hold for the script's own model, and another takes what was published for it, where something was."""
    if args.magcache_steps is not None or args.magcache_speedup is not None:
        if args.magcache_thresh is not None or args.retention_ratio is not None:
            raise MagCacheError("--magcache_thresh and --retention_ratio are the paper's: leave them out of a planned run.")
        return Target(args.magcache_steps, args.magcache_speedup, args.magcache_predictor, args.magcache_K)
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
        raise MagCacheError(f"No magnitude ratios are known for {model}: measure them once with `python {script} --model "
                            f"{model} --magcache_calibration`, use another model's with --mag_ratios PRESET, or run with "
                            "--no-magcache.")
    return found


def calibration_path(args, model, fingerprint):
    """Where `--magcache_calibration` writes: the file named, else one that `find` knows by the weights' fingerprint."""
    name = Path(str(model)).name
    return Path(args.magcache_calibration) if args.magcache_calibration else \
        calibrations_folder() / f"{name}-{fingerprint}.json"
