"""Shared by the benchmarks: the demo pipeline, its calibration, its images as arrays."""

import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(REPOSITORY))

from common.calibration import fingerprint  # noqa: E402
from common.hosts.diffusers import FLUX  # noqa: E402
from common.patch import magcache_calibration, magcache_forward  # noqa: E402
from common.scripts.flux import DEMO  # noqa: E402
from common.tables import load  # noqa: E402

NAMES = (
    "dog",
    "tiger",
    "frog",
    "penguin",
    "bee",
    "octopus",
    "whale",
    "rose",
    "banana",
    "strawberry",
    "hamburger",
    "guitar",
    "trophy",
    "bicycle",
    "helicopter",
    "castle",
    "sun",
    "fire",
    "balloon",
    "key",
    "camera",
    "top hat",
    "blue heart",
    "robot",
)
BACKGROUNDS = ("white", "black", "sky blue", "pink", "green", "yellow", "purple", "orange")
PROMPTS = [
    f"a {name} on a {BACKGROUNDS[index % 8]} background" for index, name in enumerate(NAMES)
]  # none is in the calibration


def load_demo():
    """(pipeline of the demo image model, its published RatioTable). Raises SystemExit if the weights differ."""
    from diffusers import FluxPipeline

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipe = FluxPipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    table = load("demo")
    if table.provenance["fingerprint"] != fingerprint(pipe.transformer):
        raise SystemExit(
            "common/presets/demo.json was not measured on demo/image/model; calibrate it again (demo/image/README.md)."
        )
    return pipe, table


def render(pipe, prompt, steps, seed):
    """(uint8 image (height, width, 3), seconds) of a prompt."""
    begin = time.perf_counter()
    image = pipe(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        max_sequence_length=16,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return (image * 255).round().astype(np.uint8), time.perf_counter() - begin


def patched_demo(pipe, table, settings, rule):
    """`magcache_forward` on the demo pipeline."""
    return magcache_forward(
        pipe.transformer, FLUX, table, settings, lambda: pipe.scheduler.timesteps, rule, announce=None
    )


def calibrated(pipe, prompts, steps, seed=0):
    """The RatioTable of un-cached runs, one per prompt."""
    with magcache_calibration(pipe.transformer, FLUX, lambda: pipe.scheduler.timesteps, "measured") as handle:
        for prompt in prompts:
            render(pipe, prompt, steps, seed)
    return handle.table
