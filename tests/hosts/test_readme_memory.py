"""The memory that the READMEs name is what the facts of the hosts give at those sizes."""

import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.hosts.checkouts import HUNYUANVIDEO_15_CHECKOUT, HUNYUANVIDEO_CHECKOUT, STDIT3, WAN, mmdit
from common.hosts.diffusers import FLUX, FRAMEPACK

REPOSITORY = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30


def wan_bytes(dim, frames, height, width, side=16, every=4):
    """Pixels; side: of a patch; every: frames in one of the latent."""
    tokens = ((frames - 1) // every + 1) * (height // side) * (width // side)
    return WAN.residual_shape(SimpleNamespace(dim=dim), {"x": [None], "seq_len": tokens})


def hunyuan_bytes(height, width):
    model = SimpleNamespace(patch_size=[1, 2, 2], hidden_size=3072)
    latent = torch.empty(1, 16, 33, height // 8, width // 8, device="meta")
    return HUNYUANVIDEO_CHECKOUT.residual_shape(model, {"x": latent})


def hunyuan15(height, width):
    """Of both branches, on one rank."""
    model = SimpleNamespace(patch_size=[1, 1, 1], hidden_size=2048)
    latents = torch.empty(2, 32, 31, height // 16, width // 16, device="meta")
    alone = SimpleNamespace(get_parallel_state=lambda: SimpleNamespace(sp=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hyvideo.commons.parallel_states", alone)
        return HUNYUANVIDEO_15_CHECKOUT.residual_shape(model, {"hidden_states": latents})


def open_sora(height, width):
    """2.0, 129 frames, the three branches of its guidance; a latent is a sixteenth of the picture."""
    tokens = torch.empty(3, 33 * (height // 16) * (width // 16), 64, device="meta")
    text = torch.empty(3, 512, 4096, device="meta")
    return mmdit().residual_shape(SimpleNamespace(hidden_size=3072), {"img": tokens, "txt": text})


def open_sora_12():
    """480p, 51 frames: 15 of the latent, in patches of 16 x 16."""
    model = SimpleNamespace(
        enable_sequence_parallelism=False, hidden_size=1152, get_dynamic_size=lambda x: (15, 480 // 16, 854 // 16)
    )
    return STDIT3.residual_shape(model, {"x": [None, None]})


def framepack():
    config = {"patch_size": 2, "patch_size_t": 1, "num_attention_heads": 24, "attention_head_dim": 128}
    latent = torch.empty(1, 16, 9, 80, 80, device="meta")
    return FRAMEPACK.residual_shape(SimpleNamespace(config=config), {"hidden_states": latent})


def flux_bytes():
    tokens = torch.empty(1, 4096, 64, device="meta")
    return FLUX.residual_shape(SimpleNamespace(inner_dim=3072), {"hidden_states": tokens})


@pytest.mark.parametrize(
    "folder, said, shape, bytes_each, unit",
    [
        ("MagCache4FLUX", "24 MiB in bfloat16", flux_bytes(), 2, MIB),
        ("MagCache4FLUX", "0.5 MiB each", (4096, 64), 2, MIB),
        ("MagCache4Wan2.1", "1.44 GiB for each of the two calls", wan_bytes(5120, 81, 720, 1280), 4, GIB),
        ("MagCache4Wan2.2", "1.44 GiB", wan_bytes(5120, 81, 720, 1280), 4, GIB),
        ("MagCache4Wan2.2", "0.31 GiB", wan_bytes(3072, 121, 704, 1280, side=32), 4, GIB),
        ("MagCache4HunyuanVideo", "696 MiB in bfloat16 at 720x1280", hunyuan_bytes(720, 1280), 2, MIB),
        ("MagCache4HunyuanVideo", "394 MiB at 544x960", hunyuan_bytes(544, 960), 2, MIB),
        ("MagCache4HunyuanVideo-1.5", "385 MiB at 848x480", hunyuan15(480, 848), 2, MIB),
        ("MagCache4HunyuanVideo-1.5", "872 MiB at 1280x720", hunyuan15(720, 1280), 2, MIB),
        ("MagCache4Open-Sora", "146 MiB", open_sora(192, 336), 2, MIB),
        ("MagCache4Open-Sora", "1.3 GiB", open_sora(576, 1024), 2, GIB),
        ("MagCache4Open-Sora", "105 MiB", open_sora_12(), 2, MIB),
        ("MagCache4FramePack", "84 MiB at 640x640", framepack(), 2, MIB),
    ],
)
def test_memory(folder, said, shape, bytes_each, unit):
    page = " ".join((REPOSITORY / folder / "README.md").read_text().split())
    assert said in page
    number = said.split()[0]
    decimals = len(number.partition(".")[2])
    assert f"{prod(shape) * bytes_each / unit:.{decimals}f}" == number
