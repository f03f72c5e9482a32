"""What a latent of the demo video model is: the leading principal components of its pixels."""

from __future__ import annotations

import math
import random

import torch
from structure import CELL, CHANNELS, CHUNK


def floats(clips_as_bytes: torch.Tensor) -> torch.Tensor:
    return clips_as_bytes.float() / 127.5 - 1


def cells(batch: torch.Tensor) -> torch.Tensor:
    """[clips, 3, 1 + 4 k, H, W] as [clips, 1 + k, H / 16, W / 16, pixels of a cell]; the first frame fills a cell."""
    batch = torch.cat([batch[:, :, :1].expand(-1, -1, CHUNK, -1, -1), batch[:, :, 1:]], dim=2)
    count, _, frames, height, width = batch.shape
    parts = batch.reshape(count, 3, frames // CHUNK, CHUNK, height // CELL, CELL, width // CELL, CELL)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


class Latents:
    """What a latent holds: the leading principal components of a cell of 16 by 16 pixels and 4 frames.

    Half of the spread between the components is evened out, so that the noise of sampling hides fine detail first.
    """

    def __init__(self, pool: torch.Tensor, rng: random.Random):
        sample = cells(floats(pool[rng.sample(range(len(pool)), min(len(pool), 800))])).flatten(0, 3)
        self.mean = sample.mean(0)
        values, vectors = torch.linalg.eigh((sample - self.mean).T @ (sample - self.mean) / len(sample))
        self.basis = vectors.flip(1)[:, :CHANNELS].contiguous()
        spread = values.flip(0)[:CHANNELS].clamp(min=1e-6).sqrt()
        self.scale = spread.sqrt() * math.sqrt(spread.mean())  # the latents' variance is one on average

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Clips in -1..1 as latents [clips, CHANNELS, 1 + k, H / 16, W / 16]."""
        return (((cells(batch) - self.mean) @ self.basis) / self.scale).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The linear way back, which the VAE's decoder improves on."""
        parts = (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.basis.T + self.mean
        count, chunks, rows, columns, _ = parts.shape
        parts = parts.view(count, chunks, rows, columns, 3, CHUNK, CELL, CELL).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return parts.reshape(count, 3, chunks * CHUNK, rows * CELL, columns * CELL)[:, :, CHUNK - 1 :]
