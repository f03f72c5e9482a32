"""ComfyUI's own classes."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

from ..blocks import Host


def pictures_own_tokens(forward):
    """In ComfyUI, the tokens of the picture itself; those of reference pictures follow them."""
    *frames, height, width = forward["x"].shape[2:]
    side = forward["patch_size"]
    return prod(frames) * ceil(height / side) * ceil(width / side)


COMFY_FLUX = Host(
    blocks=("double_blocks", "single_blocks"),
    final_layer="final_layer",
    image_tokens="img",
    in_place=True,
    noise_tokens=pictures_own_tokens,
)
COMFY_HUNYUANVIDEO = replace(COMFY_FLUX, noise_tokens=None)
COMFY_WAN = Host(blocks=("blocks",), final_layer="head", image_tokens=0)
COMFY_QWEN_IMAGE = Host(blocks=("transformer_blocks",), final_layer="norm_out", noise_tokens=pictures_own_tokens)

COMFYUI: dict[str, Host] = {
    "comfy.Chroma": COMFY_FLUX,
    "comfy.Flux": COMFY_FLUX,
    "comfy.HunyuanVideo": COMFY_HUNYUANVIDEO,
    "comfy.QwenImageTransformer2DModel": COMFY_QWEN_IMAGE,
    "comfy.VaceWanModel": COMFY_WAN,
    "comfy.WanModel": COMFY_WAN,
}
