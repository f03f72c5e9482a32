"""HunyuanVideo-1.5's generate.py with MagCache: the same flags, the same files, sooner.

    python magcache_generate.py --prompt "A cat walks on the grass." --resolution 480p \\
        --model_path ./ckpts --output_path ./outputs/cat.mp4

Lies beside generate.py in a HunyuanVideo-1.5 checkout, with `common/`. --no-magcache runs generate.py as it is.
"""

from __future__ import annotations

import functools
import math
import random
import sys
from contextlib import suppress
from pathlib import Path

with suppress(ImportError):  # `main` says what is missing
    import generate  # noqa: F401  before torch, whose settings it puts into the environment

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE if (HERE / "common").is_dir() else HERE.parent))  # in a clone `common` is one folder up

from common.blocks import Host  # noqa: E402
from common.calibration import fingerprint  # noqa: E402
from common.errors import MagCacheError  # noqa: E402
from common.ranks import is_writer  # noqa: E402
from common.scripts.checkout import checkouts_script, one_sentence  # noqa: E402
from common.scripts.flags import add_magcache_flags, check_flags, flags_taken  # noqa: E402
from common.scripts.session import Session  # noqa: E402
from common.tables import load  # noqa: E402

# Ratio tables (common/presets) of each checkpoint; the one measured at the nearest number of steps is taken, with the
# settings published for it. The flags --magcache_thresh, --magcache_K and --retention_ratio win over these lines.
# table: (bound on the accumulated error, most reuses in a row, share of the steps that always computes)
SETTINGS = {
    "hunyuanvideo-1.5-t2v-20steps": (0.03, 2, 0.25),
    "hunyuanvideo-1.5-t2v-40steps": (0.06, 2, 0.2),
}
PUBLISHED_FOR = ("480p_t2v", "720p_t2v")

SQUARES = {"480p": 640, "720p": 960}  # side of the square that has as many pixels; sides go by 16


def residual_shape(model, forward):
    """Of one rank, where several share the tokens."""
    from hyvideo.commons.parallel_states import get_parallel_state

    latents = forward["hidden_states"]
    tokens = math.prod(size // patch for size, patch in zip(latents.shape[2:], model.patch_size))
    return len(latents), -(-tokens // get_parallel_state().sp), model.hidden_size


# The transformer: image and text tokens apart in double_blocks; single_blocks, where there are any, have them joined.
HOST = Host(
    blocks=("double_blocks", "single_blocks"),
    final_layer="final_layer",
    image_tokens="img",
    residual_shape=residual_shape,
)


@one_sentence
def main():
    generate = checkouts_script("generate", "HunyuanVideo-1.5", "MagCache4HunyuanVideo-1.5")
    if not hasattr(generate, "HunyuanVideo_1_5_Pipeline"):
        raise MagCacheError(
            "The generate.py beside this script is not that of HunyuanVideo-1.5: python -m common install tells which "
            "folder fits it."
        )
    args = flags_taken(add_magcache_flags)
    check_flags(args)
    plain = generate.generate_video

    def generate_video(host_args):
        if session := session_of(args, host_args, generate):
            generate.HunyuanVideo_1_5_Pipeline = cached(generate.HunyuanVideo_1_5_Pipeline, session)
            generate.save_video = saving(generate.save_video, session)
        return plain(host_args)

    generate.generate_video = generate_video
    generate.main()


def session_of(args, host_args, generate):
    """The Session of a command line; None where MagCache is off. Raises MagCacheError for what cannot work, before
    anything is loaded."""
    calibrating = args.magcache_calibration is not None
    if not args.magcache and not calibrating:
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
    task = "i2v" if host_args.image_path else "t2v"
    version = generate.HunyuanVideo_1_5_Pipeline.get_transformer_version(
        host_args.resolution, task, host_args.cfg_distilled, host_args.enable_step_distill, host_args.sparse_attn
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
        host_args.seed = random.randint(100_000, 999_999)  # --compare renders it more than once
    steps = host_args.num_inference_steps or steps_of(version)
    preset = published(version, steps, SETTINGS)
    settings = SETTINGS[preset or nearest(steps, SETTINGS)]
    about = {"prompt": host_args.prompt, "seed": host_args.seed, "version": version}
    session = Session(
        args,
        dict(zip(("magcache_thresh", "magcache_K", "retention_ratio"), settings)),
        f"hunyuanvideo-1.5-{version}",
        "{}x{}".format(*size_of(host_args)),
        host_args.video_length,
        steps,
        preset,
        about,
        videos=lambda made: 2 * getattr(made, "sr_videos", made.videos) - 1,
        family="hunyuanvideo-1.5",
    )
    session.check(host_args.output_path)
    return session


def steps_of(version):
    from hyvideo.commons import PIPELINE_CONFIGS

    return PIPELINE_CONFIGS.get(version, {}).get("num_inference_steps", 50)


def published(version, steps, tables):
    """The name of the table that was published for a checkpoint, or None."""
    return nearest(steps, tables) if version in PUBLISHED_FOR else None


def nearest(steps, tables):
    return min(tables, key=lambda name: abs(load(name).steps - steps))


def size_of(args):
    """(width, height) of the video before super-resolution, which the pipeline chooses by the aspect ratio."""
    from hyvideo.utils.data_utils import generate_crop_size_list, get_closest_ratio

    if args.image_path:
        from PIL import Image

        try:
            with Image.open(args.image_path) as picture:
                width, height = picture.size
        except OSError:
            raise MagCacheError(f"--image_path {args.image_path} is no picture that can be read.") from None
    else:
        width, _, height = args.aspect_ratio.partition(":")
        if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
            raise MagCacheError(f"--aspect_ratio {args.aspect_ratio} is not like 16:9.")
    sizes = generate_crop_size_list(SQUARES[args.resolution], 16)
    (height, width), _ = get_closest_ratio(
        float(height), float(width), [round(height / width, 5) for height, width in sizes], sizes
    )
    return width, height


def cached(pipeline_class, session):
    """The checkout's pipeline, rendering through a session."""

    class Cached(pipeline_class):
        def __call__(self, *args, num_inference_steps=None, **kwargs):
            plain = super().__call__
            checkpoint = fingerprint(self.transformer)
            session.patch(
                self.transformer,
                HOST,
                lambda: self.scheduler.timesteps,
                checkpoint,
                scheduler=lambda: self.scheduler,
            )
            return session.render(
                lambda steps: plain(*args, num_inference_steps=steps, **kwargs),
                num_inference_steps or self.config.num_inference_steps,
            )

    Cached.__name__ = pipeline_class.__name__
    return Cached


def saving(save_video, session):
    """generate.py's save_video, through the session; a second file of one rendering (the video before super-resolution)
    as generate.py writes it."""
    whole = session.saving(lambda tensor, save_file, fps: save_video(tensor, save_file))

    @functools.wraps(save_video)
    def save(video, path):
        if Path(path).stem.endswith("_before_sr") and session.files_saved:
            return save_video(video, path)
        return whole(tensor=video, save_file=path, fps=24)

    return save


if __name__ == "__main__":
    main()
