"""The classes in the repositories of Wan, HunyuanVideo, FramePack and Open-Sora."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from ..blocks import Host
from .diffusers import FRAMEPACK, patches

if TYPE_CHECKING:
    import torch

# The checkouts of Wan2.1 and Wan2.2, and the package wan22.
WAN = Host(
    blocks=("blocks",),
    final_layer="head",
    image_tokens=0,
    latent="x",
    timestep="t",
    residual_shape=lambda model, forward: (len(forward["x"]), forward["seq_len"], model.dim),
)


def denoised_tokens_of_s2v(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The tokens being denoised, gathered from all ranks: (batch, tokens, width). Those of the reference image and of
    the motion, which follow them, are cut off."""
    if model.use_context_parallel:
        from wan.distributed.util import gather_forward  # of the checkout

        tokens = gather_forward(tokens.contiguous(), dim=1)
    return tokens[:, : model.original_seq_len]


# Wan2.2's S2V: sound is added between the blocks; reference and motion are cut off in front of the head.
WAN_S2V = replace(
    WAN,
    on_the_way=denoised_tokens_of_s2v,
    residual_shape=lambda model, forward: (
        len(forward["x"]),
        patches(forward["x"][0].shape[1:], model.patch_size),
        model.dim,
    ),
)

# The checkout of HunyuanVideo: image and text apart in double_blocks, joined in single_blocks with the image first.
HUNYUANVIDEO_CHECKOUT = Host(
    blocks=("double_blocks", "single_blocks"),
    final_layer="final_layer",
    image_tokens=0,
    latent="x",
    timestep="t",
    residual_shape=lambda model, forward: (
        len(forward["x"]),
        patches(forward["x"].shape[2:], model.patch_size),
        model.hidden_size,
    ),
)


def residual_of_hunyuanvideo_15(model: Any, forward: dict[str, Any]) -> tuple[int, ...]:
    """(batch, tokens of this rank, width)."""
    from hyvideo.commons.parallel_states import get_parallel_state  # of the checkout

    latents = forward["hidden_states"]
    tokens = patches(latents.shape[2:], model.patch_size)
    return len(latents), ceil(tokens / get_parallel_state().sp), model.hidden_size


# The checkout of HunyuanVideo-1.5, whose single_blocks are empty.
HUNYUANVIDEO_15_CHECKOUT = Host(
    blocks=("double_blocks", "single_blocks"),
    final_layer="final_layer",
    image_tokens="img",
    residual_shape=residual_of_hunyuanvideo_15,
)


def residual_of_stdit3(model: Any, forward: dict[str, Any]) -> tuple[int, ...]:
    """(batch, tokens of this rank, width)."""
    ranks = 1
    if model.enable_sequence_parallelism:
        from torch.distributed import get_world_size

        ranks = get_world_size()
    return len(forward["x"]), prod(model.get_dynamic_size(forward["x"])) // ranks, model.hidden_size


# Open-Sora 1.2 and 1.3. Under sequence parallelism it gathers the tokens between its last block and its final layer.
# It casts to its weights' type.
STDIT3 = Host(
    blocks=("spatial_blocks", "temporal_blocks"),
    final_layer=None,
    image_tokens=0,
    latent="x",
    residual_shape=residual_of_stdit3,
    residual_dtype=lambda model: model.x_embedder.proj.weight.dtype,
)


def mmdit(ranks: int = 1) -> Host:
    """The facts of Open-Sora 2.0. ranks: size of the sequence-parallel group that shares the tokens of text and
    image."""

    def residual_shape(model: Any, forward: dict[str, Any]) -> tuple[int, ...]:
        batch, tokens, _ = forward["img"].shape
        largest_share = ceil((forward["txt"].shape[1] + tokens) / ranks)
        return batch, min(tokens, largest_share), model.hidden_size

    return Host(
        blocks=("double_blocks", "single_blocks"),
        final_layer="final_layer",
        image_tokens=0,
        latent="img",
        timestep="timesteps",
        timestep_scale=1.0,
        residual_shape=residual_shape,
    )


CHECKOUTS: dict[str, Host] = {
    "diffusers_helper.HunyuanVideoTransformer3DModelPacked": FRAMEPACK,
    "hyvideo.HYVideoDiffusionTransformer": HUNYUANVIDEO_CHECKOUT,
    "opensora.MMDiTModel": mmdit(),
    "opensora.STDiT3": STDIT3,
    "wan.WanModel": WAN,
    "wan.VaceWanModel": replace(WAN, hint_methods=("forward_vace",)),
}
