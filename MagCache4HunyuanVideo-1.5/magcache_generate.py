"""HunyuanVideo-1.5's generate.py with MagCache: the same flags, the same files, sooner.

    python magcache_generate.py --prompt "A cat walks on the grass." --resolution 480p \\
        --model_path ./ckpts --output_path ./outputs/cat.mp4

Belongs beside generate.py in a HunyuanVideo-1.5 checkout, with `common/`. --no-magcache runs generate.py unchanged.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

with suppress(ImportError):  # `main` says what is missing
    import generate  # noqa: F401  before torch: it sets environment variables that torch reads

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up
if find_spec("common") is None:
    sys.exit(f"{Path(__file__).name} needs the folder common of its repository beside it: copy that as well.")

from common.calibration import fingerprint  # noqa: E402
from common.errors import MagCacheError  # noqa: E402
from common.hosts.checkouts import HUNYUANVIDEO_15_CHECKOUT  # noqa: E402
from common.ranks import is_writer  # noqa: E402
from common.scripts.checkout import checkouts_script, one_sentence  # noqa: E402
from common.scripts.flags import add_magcache_flags, check_flags, flags_taken, named_settings  # noqa: E402
from common.scripts.quality import VIDEO_SUFFIXES  # noqa: E402
from common.scripts.session import Session  # noqa: E402
from common.tables import load  # noqa: E402

if TYPE_CHECKING:
    import torch

# Ratio tables (common/presets) of each checkpoint; the one measured at the nearest number of steps is taken, with the
# settings published for it. The flags --magcache_thresh, --magcache_K and --retention_ratio win over these lines.
# table: (bound on the accumulated error, most reuses in a row, share of the steps that always computes)
SETTINGS = {
    "hunyuanvideo-1.5-t2v-20steps": (0.03, 2, 0.25),
    "hunyuanvideo-1.5-t2v-40steps": (0.06, 2, 0.2),
}
PUBLISHED_FOR = ("480p_t2v", "720p_t2v")

SQUARES = {"480p": 640, "720p": 960}  # side of the square with as many pixels; sides are multiples of 16


@one_sentence
def main() -> None:
    """Run the checkout's generate.py with MagCache."""
    args = flags_taken(add_magcache_flags)
    check_flags(args)
    generate = checkouts_script("generate", "HunyuanVideo-1.5", "MagCache4HunyuanVideo-1.5")
    if not hasattr(generate, "HunyuanVideo_1_5_Pipeline"):
        raise MagCacheError(
            "The generate.py beside this script is not that of HunyuanVideo-1.5: python -m common install tells which "
            "folder fits it."
        )
    plain = generate.generate_video

    def generate_video(host_args: argparse.Namespace) -> Any:
        if session := hunyuan15_session(args, host_args, generate):
            generate.HunyuanVideo_1_5_Pipeline = hunyuan15_with_session(generate.HunyuanVideo_1_5_Pipeline, session)
            generate.save_video = saving(generate.save_video, session)
        return plain(host_args)

    generate.generate_video = generate_video
    generate.main()


def hunyuan15_session(args: argparse.Namespace, host_args: argparse.Namespace, generate: Any) -> Session | None:
    """The Session of a command line; None: MagCache is off. Sets a seed where none is given.

    args: MagCache's flags; host_args: those of the module `generate`. Raises MagCacheError for what cannot work, before
    anything is loaded.
    """
    if not args.magcache and args.magcache_calibration is None:
        return None
    if host_args.enable_cache:
        raise MagCacheError(
            f"--enable_cache ({host_args.cache_type}) and MagCache both skip blocks: leave out one of them "
            "(--enable_cache false, or --no-magcache)."
        )
    if args.compare and host_args.rewrite:
        raise MagCacheError(
            "--compare renders three times, and --rewrite would write another prompt each time: add --rewrite false, "
            "with the rewritten prompt as --prompt."
        )
    version = generate.HunyuanVideo_1_5_Pipeline.get_transformer_version(
        host_args.resolution,
        "i2v" if host_args.image_path else "t2v",
        host_args.cfg_distilled,
        host_args.enable_step_distill,
        host_args.sparse_attn,
    )
    if host_args.enable_step_distill and not args.given:
        if is_writer():
            print(
                "MagCache is off: the step-distilled model takes 8 or 12 steps that differ more from one to the next "
                "than 50 do, so there is little to skip. --magcache_calibration measures how much, --magcache_steps "
                "then says how many to compute."
            )
        return None
    if host_args.seed in (None, -1):
        host_args.seed = random.randint(100_000, 999_999)  # the same for each rendering of --compare
    steps = host_args.num_inference_steps or steps_of(version)
    table = min(SETTINGS, key=lambda name: abs(load(name).steps - steps))
    session = Session(
        args,
        named_settings(SETTINGS[table]),
        f"hunyuanvideo-1.5-{version}",
        "{}x{}".format(*video_size(host_args)),
        host_args.video_length,
        steps,
        table if version in PUBLISHED_FOR else None,
        {"prompt": host_args.prompt, "seed": host_args.seed, "version": version},
        videos=lambda made: 2 * getattr(made, "sr_videos", made.videos) - 1,
        family="hunyuanvideo-1.5",
    )
    session.check(host_args.output_path or "outputs/output.mp4", VIDEO_SUFFIXES)
    return session


def steps_of(version: str) -> int:
    """The checkout's default number of steps for a version of its transformer."""
    from hyvideo.commons import PIPELINE_CONFIGS

    return PIPELINE_CONFIGS.get(version, {}).get("num_inference_steps", 50)


def video_size(host_args: argparse.Namespace) -> tuple[int, int]:
    """(width, height) in pixels of the video before super-resolution, as the pipeline chooses it by the aspect ratio.
    Raises MagCacheError for a bad image or aspect ratio."""
    from hyvideo.utils.data_utils import generate_crop_size_list, get_closest_ratio

    if host_args.image_path:
        from PIL import Image

        try:
            with Image.open(host_args.image_path) as picture:
                width, height = picture.size
        except OSError:
            raise MagCacheError(f"--image_path {host_args.image_path} cannot be read as an image.") from None
    else:
        width, _, height = host_args.aspect_ratio.partition(":")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise MagCacheError(f"--aspect_ratio {host_args.aspect_ratio} is not like 16:9.")
    sizes = generate_crop_size_list(SQUARES[host_args.resolution], 16)
    (height, width), _ = get_closest_ratio(
        float(height), float(width), [round(height / width, 5) for height, width in sizes], sizes
    )
    return width, height


def hunyuan15_with_session(pipeline_class: Any, session: Session) -> type:
    """A subclass of the checkout's pipeline that renders with MagCache."""

    class Cached(pipeline_class):
        def __call__(self, *args: Any, num_inference_steps: int | None = None, **kwargs: Any) -> Any:
            steps, plain = num_inference_steps or self.config.num_inference_steps, super().__call__
            session.patch(
                self.transformer,
                HUNYUANVIDEO_15_CHECKOUT,
                lambda: self.scheduler.timesteps,
                fingerprint(self.transformer),
                scheduler=lambda: self.scheduler,
            )
            try:
                return session.render(lambda steps: plain(*args, num_inference_steps=steps, **kwargs), steps)
            finally:
                session.unpatch()

    Cached.__name__ = pipeline_class.__name__
    return Cached


def saving(save_video: Callable[..., Any], session: Session) -> Callable[..., Any]:
    """generate.py's save_video, but writing whole files and a report. The video before super-resolution, a second file
    of the same rendering, is written by save_video alone."""
    whole = session.saving(lambda tensor, save_file, fps: save_video(tensor, save_file))

    @functools.wraps(save_video)
    def save(video: torch.Tensor, path: str) -> Any:
        if Path(path).stem.endswith("_before_sr") and session.files_saved:
            return save_video(video, path)
        return whole(tensor=video, save_file=path, fps=24)

    return save


if __name__ == "__main__":
    main()
