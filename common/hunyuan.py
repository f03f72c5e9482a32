"""The facts of HunyuanVideoTransformer3DModel, HunyuanVideo in diffusers, for `magcache_forward` and
`magcache_calibration`."""

from __future__ import annotations

from .blocks import Host


def residual_shape(model, forward):
    batch, _, frames, height, width = forward["hidden_states"].shape
    config = model.config
    tokens = frames // config.patch_size_t * (height // config.patch_size) * (width // config.patch_size)
    return batch, tokens, config.num_attention_heads * config.attention_head_dim


# Text-to-video, and image-to-video with the picture as further channels or as the first frame's tokens.
HUNYUANVIDEO = Host(
    blocks=("transformer_blocks", "single_transformer_blocks"), final_layer="norm_out", residual_shape=residual_shape
)
