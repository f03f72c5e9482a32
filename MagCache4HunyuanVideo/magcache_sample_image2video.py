"""HunyuanVideo-I2V's sample_image2video.py with MagCache: the same flags, the same files, sooner.

    python3 magcache_sample_image2video.py --model HYVideo-T/2 --i2v-mode --i2v-image-path ./cat.jpg \\
        --i2v-resolution 720p --i2v-stability --infer-steps 50 --video-length 129 --flow-reverse --flow-shift 7.0 \\
        --seed 0 --use-cpu-offload --prompt "..." --save-path ./results --magcache_calibration

Belongs beside sample_image2video.py in a HunyuanVideo-I2V checkout, with magcache_sample_video.py and `common/`. No
ratios were published: the command above measures them; --magcache_speedup needs none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from magcache_sample_video import check_sampling, lines_and, main, output_of

from common.errors import MagCacheError
from common.scripts.session import Session

# Sizes with as many pixels as the video, which has the shape of the image.
SIZES = {"720p": "1280x720", "540p": "960x540", "360p": "640x360"}


def session_of_image(args: argparse.Namespace, host_args: argparse.Namespace) -> Session:
    """The Session of image-to-video. args: MagCache's flags; host_args: those of the checkout. Raises MagCacheError for
    what cannot work, before anything is loaded."""
    check_sampling(host_args)
    if not host_args.i2v_mode:
        raise MagCacheError("Without --i2v-mode this checkout renders from text alone; add it, or --no-magcache.")
    task = f"hunyuanvideo-i2v-{host_args.i2v_condition_type}"
    if host_args.use_lora:  # loaded after the fingerprint is taken
        task = f"{task}-{Path(host_args.lora_path).stem}-{host_args.lora_scale:g}"
    lines, about = lines_and(host_args, "i2v_image_path", "i2v_stability")
    session = Session(
        args,
        lines,
        task,
        SIZES[host_args.i2v_resolution],
        host_args.video_length,
        host_args.infer_steps,
        None,
        about,
        videos=lambda outputs: 2 * outputs["samples"] - 1,
        family="hunyuanvideo-i2v",
    )
    session.check(output_of(host_args))
    return session


if __name__ == "__main__":
    main("sample_image2video", "HunyuanVideo-I2V", session_of_image)
