"""The memory that the READMEs name is what the facts of the hosts give at those sizes."""

from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT, WAN
from common.hosts.diffusers import FLUX, FRAMEPACK

REPOSITORY = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30


def wan(dim, frames, height, width, side=16, every=4):
    """Pixels; side: of a patch; every: frames in one of the latent."""
    tokens = ((frames - 1) // every + 1) * (height // side) * (width // side)
    return WAN.residual_shape(SimpleNamespace(dim=dim), {"x": [None], "seq_len": tokens})


def hunyuan(height, width):
    model = SimpleNamespace(patch_size=[1, 2, 2], hidden_size=3072)
    latent = torch.empty(1, 16, 33, height // 8, width // 8, device="meta")
    return HUNYUANVIDEO_CHECKOUT.residual_shape(model, {"x": latent})


def framepack():
    config = {"patch_size": 2, "patch_size_t": 1, "num_attention_heads": 24, "attention_head_dim": 128}
    latent = torch.empty(1, 16, 9, 80, 80, device="meta")
    return FRAMEPACK.residual_shape(SimpleNamespace(config=config), {"hidden_states": latent})


def flux():
    tokens = torch.empty(1, 4096, 64, device="meta")
    return FLUX.residual_shape(SimpleNamespace(inner_dim=3072), {"hidden_states": tokens})


@pytest.mark.parametrize(
    "folder, said, shape, bytes_each, unit",
    [
        ("MagCache4FLUX", "24 MiB in bfloat16", flux(), 2, MIB),
        ("MagCache4FLUX", "0.5 MiB each", (4096, 64), 2, MIB),
        ("MagCache4Wan2.1", "1.44 GiB for each of the two calls", wan(5120, 81, 720, 1280), 4, GIB),
        ("MagCache4Wan2.2", "1.44 GiB", wan(5120, 81, 720, 1280), 4, GIB),
        ("MagCache4Wan2.2", "0.31 GiB", wan(3072, 121, 704, 1280, side=32), 4, GIB),
        ("MagCache4HunyuanVideo", "696 MiB in bfloat16 at 720x1280", hunyuan(720, 1280), 2, MIB),
        ("MagCache4HunyuanVideo", "394 MiB at 544x960", hunyuan(544, 960), 2, MIB),
        ("MagCache4FramePack", "84 MiB at 640x640", framepack(), 2, MIB),
    ],
)
def test_memory(folder, said, shape, bytes_each, unit):
    page = " ".join((REPOSITORY / folder / "README.md").read_text().split())
    assert said in page
    number = said.split()[0]
    decimals = len(number.partition(".")[2])
    assert f"{prod(shape) * bytes_each / unit:.{decimals}f}" == number
