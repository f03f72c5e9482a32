"""HunyuanVideo's sample_video.py with MagCache: the same flags, the same files, two to three times faster.

    python3 magcache_sample_video.py --video-size 544 960 --video-length 129 --infer-steps 50 --seed 0 --flow-reverse \\
        --use-cpu-offload --prompt "..." --save-path ./magcache_results

Belongs beside sample_video.py in a HunyuanVideo checkout, with `common/`. --no-magcache runs sample_video.py unchanged.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from common.calibration import fingerprint  # noqa: E402
from common.errors import MagCacheError  # noqa: E402
from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT  # noqa: E402
from common.scripts.checkout import checkouts_script, one_sentence  # noqa: E402
from common.scripts.flags import add_magcache_flags, check_flags, flags_taken  # noqa: E402
from common.scripts.session import Session, volume  # noqa: E402
from common.tables import load  # noqa: E402

# The flags of the same names win over these lines.
MAGCACHE_THRESH = 0.24  # bound on the accumulated error; 0.12 with K 4 is the release's gentler setting, 0 is off
MAGCACHE_K = 6  # most reuses in a row
RETENTION_RATIO = 0.2  # the first fifth of the steps always computes

# Ratio tables (common/presets) of each --model; the one of the nearest image size is used.
TABLES = {"HYVideo-T/2-cfgdistill": ("hunyuanvideo-t2v-544p", "hunyuanvideo-t2v-720p")}


@one_sentence
def main(
    name: str = "sample_video",
    upstream: str = "HunyuanVideo",
    session_of: Callable[[argparse.Namespace, argparse.Namespace], Session] | None = None,
) -> None:
    """Run a script of the checkout with MagCache.

    name: of the script; upstream: of the checkout; session_of: (MagCache's flags, the script's flags) -> the Session
    (None: that of text-to-video).
    """
    sample_video = checkouts_script(name, upstream, "MagCache4HunyuanVideo")
    args = flags_taken(add_magcache_flags)
    host_args = sample_video.parse_args()
    check_flags(args)
    if len(host_args.video_size) == 1:  # --help allows one side, but sample_video.py needs both
        host_args.video_size = host_args.video_size * 2
    session_of = session_of or session_of_text
    session = session_of(args, host_args) if args.magcache or args.magcache_calibration is not None else None
    sample_video.parse_args = lambda: host_args
    sample_video.HunyuanVideoSampler = hunyuan_with_session(sample_video.HunyuanVideoSampler, session)
    if session:
        save = sample_video.save_videos_grid
        sample_video.save_videos_grid = session.saving(lambda tensor, save_file, fps: save(tensor, save_file, fps=fps))
    sample_video.main()


def check_sampling(host_args: argparse.Namespace) -> None:
    """Set a seed where none is given. Raises MagCacheError for flags that cannot work, before anything is loaded."""
    if not host_args.flow_reverse:
        raise MagCacheError(
            "Without --flow-reverse the sampler goes from noise level 0 to 1, where no ratios hold: add it, as "
            "HunyuanVideo's own commands do, or run with --no-magcache."
        )
    if host_args.video_length == 1:
        raise MagCacheError(
            "There are no ratios of stills, and sample_video.py cannot save one: give --video-length 5 or more."
        )
    if host_args.seed is None:
        if host_args.ulysses_degree * host_args.ring_degree > 1:
            raise MagCacheError("Several processes must start from the same noise: give --seed.")
        host_args.seed = random.randint(0, 1_000_000)  # the same for each rendering of --compare


def lines_and(host_args: argparse.Namespace, *names: str) -> tuple[dict[str, float], dict[str, Any]]:
    """(the settings above, entries for the reports). names: further flags that the reports hold."""
    about = ("prompt", "seed", "num_videos", "flow_shift", "cfg_scale", "embedded_cfg_scale", *names)
    return (
        {"magcache_thresh": MAGCACHE_THRESH, "magcache_K": MAGCACHE_K, "retention_ratio": RETENTION_RATIO},
        {name: getattr(host_args, name) for name in about},
    )


def output_of(host_args: argparse.Namespace) -> str:
    """A file in the folder to which the script writes."""
    suffix = f"_{host_args.save_path_suffix}" if host_args.save_path_suffix else ""
    return f"{host_args.save_path}{suffix}/video.mp4"


def session_of_text(args: argparse.Namespace, host_args: argparse.Namespace) -> Session:
    """The Session of text-to-video. args: MagCache's flags; host_args: those of the checkout. Raises MagCacheError for
    what cannot work, before anything is loaded."""
    check_sampling(host_args)
    lines, about = lines_and(host_args, "use_fp8")
    height, width = host_args.video_size
    session = Session(
        args,
        lines,
        "hunyuanvideo-t2v",
        f"{width}x{height}",
        host_args.video_length,
        host_args.infer_steps,
        nearest_published(host_args.model, width * height),
        about,
        videos=lambda outputs: 2 * outputs["samples"] - 1,
        family="hunyuanvideo-t2v",
    )
    session.check(output_of(host_args))
    return session


def nearest_published(model: str, pixels: int) -> str | None:
    """The preset for a --model whose images have the nearest number of pixels; None: the model has none."""
    return min(
        TABLES.get(model, ()),
        default=None,
        key=lambda name: abs(math.log(volume({**load(name).sampler, "frames": 1}) / pixels)),
    )


def hunyuan_with_session(sampler_class: Any, session: Session | None) -> type:
    """A subclass of the checkout's sampler that renders with MagCache (session None: without)."""

    class Cached(sampler_class):
        def load_diffusion_pipeline(self, *args, **kwargs):
            pipe = super().load_diffusion_pipeline(*args, **kwargs)
            if session:  # before parallelize_transformer, which wraps the forward that it finds
                session.patch(
                    pipe.transformer,
                    HUNYUANVIDEO_CHECKOUT,
                    lambda: self.pipeline.scheduler.timesteps,
                    fingerprint(pipe.transformer),
                    scheduler=lambda: self.pipeline.scheduler,
                )
            return pipe

        def predict(self, *args, infer_steps, **kwargs):
            def draw(steps):
                return sampler_class.predict(self, *args, infer_steps=steps, **kwargs)

            outputs = session.render(draw, infer_steps) if session else draw(infer_steps)
            # sample_video.py reads one prompt per video, but gets one in all.
            return {**outputs, "prompts": outputs["prompts"] * len(outputs["samples"])}

    return Cached


if __name__ == "__main__":
    main()
