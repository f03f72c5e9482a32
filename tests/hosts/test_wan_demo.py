"""The trained demo video model rendered by Wan's own code, from the package wan22 and from a checkout of Wan2.1: the
same clip as diffusers draws from the same weights, and one close to it with MagCache.

    MAGCACHE_WAN21=/path/to/Wan2.1 python -m pytest tests/hosts/test_wan_demo.py
"""

import os
from pathlib import Path

import numpy as np
import packages
import pytest
import torch
from wan_runs import REPOSITORY, WAN22_WHEEL, WanRuns

from common.scripts.quality import quality, read_frames

DEMO = REPOSITORY / "demo" / "video" / "model"
PROMPT, STEPS, GUIDANCE, SHIFT, SEED = "a fox moves to the right on a green background", 20, 4.0, 3.0, 7
HOSTS = {
    "wan22": ("MagCache4Wan2.2", ("--task", "ti2v-5B", "--size", "1280*704")),
    "MAGCACHE_WAN21": ("MagCache4Wan2.1", ("--task", "t2v-1.3B", "--size", "832*480")),
}
CACHED = ("--magcache_thresh", "0.12", "--magcache_K", "2", "--retention_ratio", "0.2")
# dB to the un-cached clip, both as mp4. Measured on 2026-11-26, less 1.5: 34.6 in wan22.
FLOOR = 33.1


@pytest.fixture(scope="module", params=HOSTS)
def demo_checkout(request, tmp_path_factory):
    """(WanRuns, flags of the task, folder of the converted checkpoint)"""
    drop_in, task = HOSTS[request.param]
    if request.param == "wan22":
        package, generate = (
            packages.unpacked_package(*WAN22_WHEEL) / "wan",
            Path(__file__).with_name("wan22_generate.py"),
        )
    else:
        if request.param not in os.environ:
            pytest.skip(f"{request.param} names no checkout of Wan2.1.")
        checkout = Path(os.environ[request.param])
        package, generate = checkout / "wan", checkout / "generate.py"
    runs = WanRuns(tmp_path_factory.mktemp("wan"), package, generate, drop_in)
    checkpoint = runs.folder / "demo-video"
    written = runs.run("--checkpoint", "demo-video", checkpoint, cwd=runs.folder)
    assert written.code == 0, written.output
    yield runs, task, checkpoint
    runs.close()


def clip_of(host, folder, *flags):
    """(latents, uint8 frames, number of calls of a block) of one run of the drop-in."""
    runs, task, checkpoint = host
    argv = [runs.folder / "magcache_generate.py", *task, "--ckpt_dir", checkpoint, "--prompt", PROMPT]
    argv += ["--frame_num", "17", "--sample_steps", str(STEPS), "--sample_shift", str(SHIFT)]
    argv += ["--sample_guide_scale", str(GUIDANCE), "--base_seed", str(SEED), "--save_file", "clip.mp4", *flags]
    (done,) = runs.together([runs.process(argv, folder, DEMO_VIDEO=str(DEMO))])
    assert done.code == 0, done.output
    entered = sum(count for name, count in done.entered.items() if name.endswith("AttentionBlock"))
    return done.latents[0], read_frames(folder / "clip.mp4")[0], entered


@pytest.fixture(scope="module")
def latents_of_diffusers():
    """Latents [channels, frames, height, width] of diffusers' own pipeline, un-cached."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    class WansLevels(UniPCMultistepScheduler):
        """diffusers' solver at the noise levels of Wan's own, which begin at 0.999 in place of 1."""

        def set_timesteps(self, steps, device=None, **kwargs):
            super().set_timesteps(steps, device, **kwargs)
            levels = torch.linspace(0.999, 0, steps + 1, dtype=torch.float64)[:-1]
            levels = SHIFT * levels / (1 + (SHIFT - 1) * levels)
            self.sigmas = torch.cat([levels, levels.new_zeros(1)]).float()
            self.timesteps = (levels * 1000).long()

    pipe = WanPipeline.from_pretrained(DEMO, torch_dtype=torch.float32)
    pipe.scheduler = WansLevels.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPT,
        height=64,
        width=64,
        num_frames=17,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).frames[0]


def test_wans_own_code_draws_the_clip_of_diffusers(demo_checkout, latents_of_diffusers, tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "cached").mkdir()
    latents, frames, blocks = clip_of(demo_checkout, tmp_path / "plain", "--no-magcache")
    error = float((latents - latents_of_diffusers).norm() / latents_of_diffusers.norm())
    assert error < 1e-4, error
    table = REPOSITORY / "common" / "presets" / "demo-video.json"
    _, cached, fewer = clip_of(demo_checkout, tmp_path / "cached", "--mag_ratios", table, *CACHED)
    assert fewer < 0.75 * blocks
    figures = quality(frames, cached)
    assert figures["psnr"] > FLOOR and not np.array_equal(frames, cached), figures
