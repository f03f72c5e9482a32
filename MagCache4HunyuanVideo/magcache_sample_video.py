"""HunyuanVideo's sample_video.py with MagCache: the same flags, the same files, two to three times faster.

    python3 magcache_sample_video.py --video-size 544 960 --video-length 129 --infer-steps 50 --seed 0 --flow-reverse \\
        --use-cpu-offload --prompt "..." --save-path ./magcache_results

Lies beside sample_video.py in a HunyuanVideo checkout, with `common/`. --no-magcache runs sample_video.py as it is.
"""

import importlib
import math
import random

from common.calibration import fingerprint
from common.errors import MagCacheError
from common.hosts import HUNYUANVIDEO_CHECKOUT
from common.scripts.checkout import checkouts_script, flags_added, run_script
from common.scripts.flags import add_magcache_flags, check_flags
from common.scripts.session import Session, volume
from common.tables import load

# The flags of the same names win over these lines.
MAGCACHE_THRESH = 0.24  # bound on the accumulated error; 0.12 with K 4 is the release's gentler setting, 0 is off
MAGCACHE_K = 6  # most reuses in a row
RETENTION_RATIO = 0.2  # the first fifth of the steps always computes

# Ratio tables (common/presets) of each --model; that of the nearest picture size is taken.
TABLES = {"HYVideo-T/2-cfgdistill": ("hunyuanvideo-t2v-544p", "hunyuanvideo-t2v-720p")}


def run(script):
    sample_video = checkouts_script("sample_video", "HunyuanVideo", "MagCache4HunyuanVideo")
    with flags_added(importlib.import_module("hyvideo.config"), add_magcache_flags):
        args = sample_video.parse_args()
    check_flags(args)
    if len(args.video_size) == 1:  # --help offers it, and sample_video.py wants both
        args.video_size = args.video_size * 2
    session = session_of(args, script) if args.magcache or args.magcache_calibration is not None else None
    sample_video.parse_args = lambda: args
    sample_video.HunyuanVideoSampler = cached(sample_video.HunyuanVideoSampler, session)
    if session:
        save = sample_video.save_videos_grid
        sample_video.save_videos_grid = session.saving(lambda tensor, save_file, fps: save(tensor, save_file, fps=fps))
    sample_video.main()


def session_of(args, script):
    """The Session of a command line. Raises MagCacheError for what cannot work, before anything is loaded."""
    if not args.flow_reverse:
        raise MagCacheError(
            "Without --flow-reverse the sampler goes from noise level 0 to 1, where no ratios hold: add it, as "
            "HunyuanVideo's own commands do, or run with --no-magcache."
        )
    if args.video_length == 1:
        raise MagCacheError(
            "There are no ratios of stills, and sample_video.py cannot save one: give --video-length 5 or more."
        )
    if args.seed is None and args.ulysses_degree * args.ring_degree > 1:
        raise MagCacheError("Several processes must start from the same noise: give --seed.")
    args.seed = random.randint(0, 1_000_000) if args.seed is None else args.seed  # --compare renders it more than once
    height, width = args.video_size
    lines = {name: script[name.upper()] for name in ("magcache_thresh", "magcache_K", "retention_ratio")}
    about = {
        name: getattr(args, name)
        for name in ("prompt", "seed", "num_videos", "flow_shift", "cfg_scale", "embedded_cfg_scale", "use_fp8")
    }
    session = Session(
        args,
        lines,
        "hunyuanvideo-t2v",
        f"{width}x{height}",
        args.video_length,
        published(args, width * height),
        about,
        videos=lambda outputs: 2 * outputs["samples"] - 1,
    )
    folder = f"{args.save_path}_{args.save_path_suffix}" if args.save_path_suffix else args.save_path
    session.check(f"{folder}/video.mp4")
    return session


def published(args, pixels):
    """The name of the published table whose pictures are nearest in size; None for other checkpoints."""
    return min(
        TABLES.get(args.model, ()),
        default=None,
        key=lambda name: abs(math.log(volume({**load(name).sampler, "frames": 1}) / pixels)),
    )


def cached(sampler_class, session):
    """The checkout's sampler, rendering through a session (None: MagCache is off)."""

    class Cached(sampler_class):
        def load_diffusion_pipeline(self, *args, **kwargs):
            pipe = super().load_diffusion_pipeline(*args, **kwargs)
            if session:  # here, since parallelize_transformer afterwards calls the forward that it finds
                session.patch(
                    pipe.transformer,
                    HUNYUANVIDEO_CHECKOUT,
                    lambda: self.pipeline.scheduler.timesteps,
                    fingerprint(pipe.transformer),
                )
            return pipe

        def predict(self, *args, infer_steps, **kwargs):
            def draw(steps):
                return sampler_class.predict(self, *args, infer_steps=steps, **kwargs)

            outputs = session.render(draw, infer_steps) if session else draw(infer_steps)
            # sample_video.py looks for a prompt for each video, and there is one.
            return {**outputs, "prompts": outputs["prompts"] * len(outputs["samples"])}

    return Cached


if __name__ == "__main__":
    run_script(run, globals())
