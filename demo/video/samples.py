"""Draw what the demo video model makes of 12 prompts: demo/video/samples.png and, moving, demo/video/samples.webp.

python demo/video/samples.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import clips
import torch
from diffusers import WanPipeline

HERE = Path(__file__).resolve().parent
PROMPTS = [
    clips.caption(name, clips.MOTIONS[index % len(clips.MOTIONS)], list(clips.BACKGROUNDS)[index % 4])
    for index, name in enumerate(clips.OBJECTS)
]
COLUMNS, ZOOM = 6, 2


def draw_samples(prompts: list[str], seed: int = 3) -> list[torch.Tensor]:
    """Clips [3, frames, height, width] in -1..1."""
    pipe = WanPipeline.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    frames = pipe(
        prompts,
        height=clips.SIZE,
        width=clips.SIZE,
        num_frames=clips.FRAMES,
        num_inference_steps=30,
        guidance_scale=5.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).frames
    return [one.permute(1, 0, 2, 3) * 2 - 1 for one in frames]


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    drawn = draw_samples(PROMPTS)
    clips.sheet(drawn, columns=2, zoom=ZOOM).save(HERE / "samples.png")
    moving = [clips.sheet(drawn, frames=(frame,), columns=COLUMNS, zoom=ZOOM) for frame in range(clips.FRAMES)]
    moving[0].save(HERE / "samples.webp", save_all=True, append_images=moving[1:], duration=110, loop=0, quality=85)
