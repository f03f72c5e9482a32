"""Measure common/presets/demo-video.json: the demo video model with UniPC, 30 steps and guidance 5.

python demo/video/calibrate.py
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from diffusers import WanPipeline
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(1, str(REPOSITORY))

from common.calibration import fingerprint  # noqa: E402
from common.hosts import host_of  # noqa: E402
from common.patch import magcache_calibration  # noqa: E402

PRESET = REPOSITORY / "common" / "presets" / "demo-video.json"
STEPS, GUIDANCE = 30, 5.0

if __name__ == "__main__":
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = (HERE / "calibration_prompts.txt").read_text().splitlines()
    about = {
        "models": ["demo-video"],
        "settings": {"magcache_thresh": 0.12, "magcache_K": 4, "retention_ratio": 0.2},
        "sampler": {"scheduler": "UniPCMultistepScheduler", "steps": STEPS, "shift": 3.0, "guidance_scale": GUIDANCE},
        "provenance": {
            "fingerprint": fingerprint(pipe.transformer),
            "command": "python demo/video/calibrate.py",
            "prompts": prompts,
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    PRESET.unlink(missing_ok=True)
    with magcache_calibration(
        pipe.transformer, host_of(pipe.transformer), lambda: pipe.scheduler.timesteps, "demo-video", PRESET, about
    ):
        for seed, prompt in enumerate(tqdm(prompts), start=100):
            pipe(
                prompt,
                height=64,
                width=64,
                num_frames=17,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                max_sequence_length=16,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
            )
