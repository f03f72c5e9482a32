"""FramePack's package from the index, one section sampled by it, and MagCache around that."""

import importlib
import sys
import types
from contextlib import contextmanager

import pytest
import torch
from framepack_cpu import IMAGE_WIDTH, TEXT_WIDTH
from magcache_framepack import section_timesteps
from packages import unpacked_package

from common.hosts.diffusers import FRAMEPACK
from common.patch import magcache_calibration, magcache_forward
from common.schedule import Settings
from common.tables import load

PUBLISHED = Settings(0.1, 3, 0.2)


TOKENS, PACKED = 32, 40  # of a section of 2 latent frames of 8 x 8, and of the frames around it


class Package:
    """The modules of the package `framepack` that this test runs."""

    def __init__(self):
        base = "framepack.diffusers_helper."
        self.sampler = importlib.import_module(base + "pipelines.k_diffusion_hunyuan")
        self.memory = importlib.import_module(base + "memory")
        self.transformer = importlib.import_module(
            base + "models.hunyuan_video_packed"
        ).HunyuanVideoTransformer3DModelPacked


def load_package():
    """The package, imported. Skips the test that asks for it where it cannot be had."""
    folders = [
        unpacked_package("framepack", "0.0.9", "82c452b40aebc8ec0d29c1735c49927b0eb68ea6179c83751c8f1890907d85cf"),
        unpacked_package("einops", "0.8.1", "919387eb55330f5757c6bea9165c5ff5cfe63a642682ea788a6d472576d81737"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        for name in ("cv2", "torchvision"):  # imported for functions that nothing here calls
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        loaded = Package()
    return loaded


def sample_section(
    package, model, steps=12, cfg=1.0, frames=2, seed=0, history=None, callback=None, shift=7.0, sampler=None
):
    """The latents of one section. frames: of the latent; history: latents of the section before."""
    made = torch.Generator().manual_seed(1000 + seed)

    def text():
        return {
            "embeds": torch.randn(1, 8, TEXT_WIDTH, generator=made).to(model.dtype),
            "embeds_mask": torch.ones(1, 8, dtype=torch.bool),
            "poolers": torch.randn(1, TEXT_WIDTH, generator=made).to(model.dtype),
        }

    prompts = {f"{kind}prompt_{name}": value for kind in ("", "negative_") for name, value in text().items()}
    around = torch.randn(1, 16, 20, 8, 8, generator=made)
    if history is not None:
        around[:, :, 1:3] = history[:, :, :2]
    return (sampler or package.sampler.sample_hunyuan)(
        transformer=model,
        sampler="unipc",
        width=64,
        height=64,
        frames=frames * 4 - 3,
        real_guidance_scale=cfg,
        distilled_guidance_scale=10.0,
        num_inference_steps=steps,
        shift=shift,
        generator=torch.Generator().manual_seed(seed),
        dtype=model.dtype,
        device=torch.device("cpu"),
        image_embeddings=torch.randn(1, 4, IMAGE_WIDTH, generator=made).to(model.dtype),
        latent_indices=torch.arange(frames)[None] + 1,
        clean_latents=around[:, :, :2],
        clean_latent_indices=torch.tensor([[0, 5]]),
        clean_latents_2x=around[:, :, 2:4],
        clean_latent_2x_indices=torch.tensor([[6, 7]]),
        clean_latents_4x=around[:, :, 4:],
        clean_latent_4x_indices=torch.arange(8, 24)[None],
        callback=callback,
        **prompts,
    )


def entered(model):
    """One letter a call of the model, # where every block ran and . where none did; filled as it runs."""
    calls, blocks = [], [*model.transformer_blocks, *model.single_transformer_blocks]
    model.register_forward_pre_hook(lambda module, args: calls.append(0))
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: calls.__setitem__(-1, calls[-1] + 1))

    def strip():
        assert set(calls) <= {0, len(blocks)}
        return "".join(".#"[count > 0] for count in calls)

    return strip


@contextmanager
def cached_sections(package, model, settings=PUBLISHED, table="framepack", host=FRAMEPACK):
    table = load(table) if isinstance(table, str) else table
    with section_timesteps(package.sampler) as timesteps:
        with magcache_forward(model, host, table, settings, timesteps, announce=None) as handle:
            yield handle


def measured_sections(package, model, path=None, host=FRAMEPACK, runs=({},), **description):
    with section_timesteps(package.sampler) as timesteps:
        with magcache_calibration(model, host, timesteps, "tiny", path, description) as handle:
            latents = [sample_section(package, model, **run) for run in runs]
    return handle.table, latents
