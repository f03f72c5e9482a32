"""The classes of diffusers. Every fact was proved on the class itself: the residual of a call, put back on the same
inputs, made the same output with no block run (tests/hosts/test_pipelines.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any

from ..blocks import Host


def shared_residual(model: Any, forward: dict[str, Any]) -> tuple[int, ...]:
    """(batch, tokens, width) for a latent of tokens."""
    return *forward["hidden_states"].shape[:2], model.inner_dim


def patches(sizes: Iterable[int], patch: Iterable[int]) -> int:
    """Number of tokens of a latent: each patch, of these side lengths, is one token."""
    return prod(size // side for size, side in zip(sizes, patch))


# FLUX.1, Kontext and their fine-tunes: Kontext's reference tokens have 1 in the first of their coordinates.
FLUX = Host(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    final_layer="norm_out",
    timestep_scale=1.0,
    residual_shape=shared_residual,
    noise_tokens=lambda forward: int((forward["img_ids"][..., 0] == 0).sum()),
)


def tokens_of_hunyuanvideo(model: Any, forward: dict[str, Any]) -> int:
    """Number of tokens of a latent (batch, channels, frames, height, width)."""
    config = model.config
    sides = config["patch_size_t"], config["patch_size"], config["patch_size"]
    return patches(forward["hidden_states"].shape[2:], sides)


def residual_of_hunyuanvideo(model: Any, forward: dict[str, Any]) -> tuple[int, ...]:
    """(batch, tokens, width)."""
    width = model.config["num_attention_heads"] * model.config["attention_head_dim"]
    return len(forward["hidden_states"]), tokens_of_hunyuanvideo(model, forward), width


# Text-to-video, and image-to-video with the picture as further channels or as the first frame's tokens.
HUNYUANVIDEO = Host(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    final_layer="norm_out",
    residual_shape=residual_of_hunyuanvideo,
)

# FramePack, of diffusers and of lllyasviel/FramePack: the packed frames around a section precede its tokens and are no
# output. ALL_TOKENS is what the published tables are a statistic of.
FRAMEPACK = replace(HUNYUANVIDEO, output_tokens=tokens_of_hunyuanvideo)
ALL_TOKENS = replace(FRAMEPACK, output_tokens=None)

# What several classes share.
JOINT = Host(blocks=("transformer_blocks", "single_transformer_blocks"), final_layer="norm_out")
BLOCKS = Host(blocks=("blocks",), final_layer="norm_out")
TRANSFORMER_BLOCKS = Host(blocks=("transformer_blocks",), final_layer="norm_out")
LAYERS = Host(blocks=("layers",), final_layer="norm_out")


def rising(timestep: str = "timestep", scale: float = 1.0) -> dict:
    """Facts of a class whose time rises from 0, noise, to `scale`, image. timestep: the name of that argument."""
    return {"timestep": timestep, "noise_level": lambda forward: 1 - forward[timestep] / scale}


def frames_tokens(model: Any, forward: dict[str, Any]) -> int:
    """Number of tokens of a latent (batch, frames, channels, height, width)."""
    frames, _, height, width = forward["hidden_states"].shape[1:]
    return patches((frames, height, width), (1, model.config.patch_size, model.config.patch_size))


def fills_a_cache(forward: dict[str, Any]) -> bool:
    """Whether a call of GLM-Image fills its cache with the reference images, before the first step."""
    return getattr(forward.get("kv_caches"), "mode", None) == "write"


U_NET = Host(blocks=(), latent="sample", why_output="a U-Net has no stack of equally shaped blocks")
TWO_STREAMS = Host(blocks=(), why_output="it denoises image and sound in two streams")

DIFFUSERS: dict[str, Host] = {
    "diffusers.AceStepTransformer1DModel": replace(LAYERS, timestep_scale=1.0, reads_blocks=True),
    "diffusers.AllegroTransformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.AnyFlowFARTransformer3DModel": replace(
        BLOCKS, outside=lambda forward: not forward["timestep"].any()
    ),  # it fills its cache with finished frames at timestep 0
    "diffusers.AnyFlowTransformer3DModel": BLOCKS,
    "diffusers.AuraFlowTransformer2DModel": Host(
        blocks=("joint_transformer_blocks", "single_transformer_blocks"), final_layer="norm_out", timestep_scale=1.0
    ),
    "diffusers.BriaFibo2Transformer2DModel": Host(
        blocks=(), timestep_scale=1.0, why_output="its samples hold their image at different places"
    ),
    "diffusers.BriaFiboTransformer2DModel": JOINT,
    "diffusers.BriaTransformer2DModel": JOINT,
    "diffusers.ChromaTransformer2DModel": replace(JOINT, timestep_scale=1.0),
    "diffusers.ChronoEditTransformer3DModel": BLOCKS,
    "diffusers.CogVideoXTransformer3DModel": replace(TRANSFORMER_BLOCKS, final_layer="norm_final"),
    "diffusers.CogView3PlusTransformer2DModel": TRANSFORMER_BLOCKS,
    "diffusers.CogView4Transformer2DModel": TRANSFORMER_BLOCKS,
    "diffusers.ConsisIDTransformer3DModel": replace(
        TRANSFORMER_BLOCKS, final_layer="norm_final", output_tokens=frames_tokens
    ),
    "diffusers.Cosmos3OmniTransformer": Host(
        blocks=("layers",),
        final_layer="norm_moe_gen",
        image_tokens=1,
        latent="vision_tokens",
        timestep="vision_timesteps",
    ),
    "diffusers.CosmosTransformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.DiTTransformer2DModel": replace(TRANSFORMER_BLOCKS, reads_blocks=True),
    "diffusers.EasyAnimateTransformer3DModel": replace(TRANSFORMER_BLOCKS, final_layer="norm_final"),
    "diffusers.ErnieImageTransformer2DModel": replace(LAYERS, final_layer="final_norm"),
    "diffusers.Flux2Transformer2DModel": replace(JOINT, timestep_scale=1.0),
    "diffusers.Flux3Transformer2DModel": Host(
        blocks=("single_transformer_blocks",), final_layer="norm_out", timestep_scale=1.0, tokens_lead=True
    ),
    "diffusers.FluxTransformer2DModel": FLUX,
    "diffusers.GlmImageTransformer2DModel": replace(
        TRANSFORMER_BLOCKS, noise_level=lambda forward: (forward["timestep"] + 1) / 1000, outside=fills_a_cache
    ),
    "diffusers.HeliosTransformer3DModel": BLOCKS,
    "diffusers.HiDreamImageTransformer2DModel": Host(
        blocks=("double_stream_blocks", "single_stream_blocks"), final_layer="final_layer", timestep="timesteps"
    ),
    "diffusers.HunyuanDiT2DModel": BLOCKS,
    "diffusers.HunyuanImageTransformer2DModel": JOINT,
    "diffusers.HunyuanVideo15Transformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.HunyuanVideoFramepackTransformer3DModel": FRAMEPACK,
    "diffusers.HunyuanVideoTransformer3DModel": HUNYUANVIDEO,
    "diffusers.I2VGenXLUNet": U_NET,
    "diffusers.Ideogram4Transformer2DModel": replace(LAYERS, final_layer="final_layer", **rising()),
    "diffusers.JoyImageEditPlusTransformer3DModel": Host(blocks=("double_blocks",), final_layer="norm_out"),
    "diffusers.JoyImageEditTransformer3DModel": Host(blocks=("double_blocks",), final_layer="norm_out"),
    "diffusers.Kandinsky3UNet": U_NET,
    "diffusers.Kandinsky5Transformer3DModel": Host(blocks=("visual_transformer_blocks",), image_tokens=0),
    "diffusers.Kandinsky6Transformer3DModel": TWO_STREAMS,
    "diffusers.Krea2Transformer2DModel": Host(
        blocks=("transformer_blocks",), final_layer="final_layer", timestep_scale=1.0
    ),
    "diffusers.LTX2VideoTransformer3DModel": TWO_STREAMS,
    "diffusers.LTXVideoTransformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.LatteTransformer3DModel": Host(
        blocks=("transformer_blocks", "temporal_transformer_blocks"), final_layer="norm_out"
    ),
    "diffusers.LongCatAudioDiTTransformer": Host(blocks=("blocks",), **rising()),
    "diffusers.LongCatImageTransformer2DModel": replace(JOINT, timestep_scale=1.0),
    "diffusers.Lumina2Transformer2DModel": replace(LAYERS, **rising()),
    "diffusers.LuminaNextDiT2DModel": replace(LAYERS, **rising()),
    "diffusers.MiniMaxH3Transformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.MiniMaxMusic3Transformer1DModel": replace(TRANSFORMER_BLOCKS, final_layer="proj_out"),
    "diffusers.MochiTransformer3DModel": replace(TRANSFORMER_BLOCKS, **rising(scale=1000)),
    "diffusers.MotifVideoTransformer3DModel": JOINT,
    "diffusers.NucleusMoEImageTransformer2DModel": replace(TRANSFORMER_BLOCKS, timestep_scale=1.0),
    "diffusers.OmniGenTransformer2DModel": replace(LAYERS, final_layer="norm", **rising()),
    "diffusers.OvisImageTransformer2DModel": replace(JOINT, timestep_scale=1.0),
    "diffusers.PRXTransformer2DModel": Host(blocks=("blocks",), final_layer="final_layer", timestep_scale=1.0),
    "diffusers.PixArtTransformer2DModel": TRANSFORMER_BLOCKS,
    "diffusers.QwenImage21Transformer2DModel": Host(
        blocks=(), timestep_scale=1.0, why_output="the number of its tokens changes after the first step"
    ),
    "diffusers.QwenImageTransformer2DModel": replace(TRANSFORMER_BLOCKS, timestep_scale=1.0),
    "diffusers.SD3Transformer2DModel": TRANSFORMER_BLOCKS,
    "diffusers.SanaTransformer2DModel": TRANSFORMER_BLOCKS,
    "diffusers.SanaVideoTransformer3DModel": TRANSFORMER_BLOCKS,
    "diffusers.SkyReelsV2Transformer3DModel": BLOCKS,
    "diffusers.StableAudio3DiTModel": replace(TRANSFORMER_BLOCKS, final_layer="proj_out"),
    "diffusers.StableAudioDiTModel": replace(TRANSFORMER_BLOCKS, final_layer="proj_out"),
    "diffusers.StableCascadeUNet": replace(U_NET, timestep="timestep_ratio", timestep_scale=1.0),
    "diffusers.UNet2DConditionModel": U_NET,
    "diffusers.UNet2DModel": U_NET,
    "diffusers.UNet3DConditionModel": U_NET,
    "diffusers.UNetMotionModel": U_NET,
    "diffusers.UNetSpatioTemporalConditionModel": U_NET,
    "diffusers.WanAnimate2Transformer3DModel": Host(blocks=("blocks",), final_layer="head"),
    "diffusers.WanAnimateTransformer3DModel": BLOCKS,
    "diffusers.WanTransformer3DModel": BLOCKS,
    "diffusers.WanVACETransformer3DModel": Host(blocks=("vace_blocks", "blocks"), final_layer="norm_out"),
    "diffusers.ZImageTransformer2DModel": Host(
        blocks=("layers",), final_layer="all_final_layer", image_tokens=0, latent="x", **rising("t")
    ),
}
