"""Measure common/presets/demo-video.json: UniPC, 30 steps, guidance 5, the prompts of calibration_prompts.txt.

python demo/video/calibrate.py
"""

from __future__ import annotations

import argparse
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    pipe = WanPipeline.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    prompts = (HERE / "calibration_prompts.txt").read_text(encoding="utf-8").splitlines()
    about = {
        "models": ["demo-video"],
        # Those released for Wan2.1's 1.3B model.
        "settings": {"magcache_thresh": 0.12, "magcache_K": 4, "retention_ratio": 0.2},
        "sampler": {"scheduler": type(pipe.scheduler).__name__, "steps": 30, "shift": 3.0, "guidance_scale": 5.0},
        "provenance": {
            "fingerprint": fingerprint(pipe.transformer),
            "prompts": prompts,
            "command": "python demo/video/calibrate.py",
            "date": time.strftime("%Y-%m-%d"),
        },
    }
    model = pipe.transformer
    with magcache_calibration(model, host_of(model), lambda: pipe.scheduler.timesteps, "demo-video", PRESET, about):
        for seed, prompt in enumerate(tqdm(prompts, desc="calibrating"), start=100):
            pipe(
                prompt,
                height=64,
                width=64,
                num_frames=17,
                max_sequence_length=16,
                num_inference_steps=30,
                guidance_scale=5.0,
                generator=torch.Generator().manual_seed(seed),
            )


if __name__ == "__main__":
    main()
