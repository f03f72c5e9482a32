"""What MagCache knows of transformer classes: the facts (`blocks.Host`) of each, by its package and class name.

Every fact of diffusers' classes was proved on the class itself: the residual of a call, put back on the same inputs,
made the same output with no block run (tests/hosts/test_pipelines.py).
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

from .blocks import Host
from .errors import MagCacheError


def shared_residual(model, forward) -> tuple:
    """The shape where the latent comes as tokens: (batch, tokens, the model's width)."""
    return *forward["hidden_states"].shape[:2], model.inner_dim


def patches(sizes, patch) -> int:
    """How many tokens a latent of these sizes becomes, a patch a token."""
    return prod(size // side for size, side in zip(sizes, patch))


# diffusers. FLUX.1, Kontext and their fine-tunes: Kontext's reference tokens have 1 in the first of their coordinates.
FLUX = Host(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    final_layer="norm_out",
    timestep_scale=1.0,
    residual_shape=shared_residual,
    noise_tokens=lambda forward: int((forward["img_ids"][..., 0] == 0).sum()),
)


def tokens_of_hunyuanvideo(model, forward):
    config = model.config
    sides = config["patch_size_t"], config["patch_size"], config["patch_size"]
    return patches(forward["hidden_states"].shape[2:], sides)


def residual_of_hunyuanvideo(model, forward):
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

# The checkouts of Wan2.1 and Wan2.2, and the package wan22.
WAN = Host(
    blocks=("blocks",),
    final_layer="head",
    image_tokens=0,
    latent="x",
    timestep="t",
    residual_shape=lambda model, forward: (len(forward["x"]), forward["seq_len"], model.dim),
)


def denoised_tokens_of_s2v(model, tokens):
    """Of all ranks, without the reference picture and the motion that follow them."""
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


def residual_of_hunyuanvideo_15(model, forward):
    """Of one rank, where several share the tokens."""
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


def residual_of_stdit3(model, forward):
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
    """Open-Sora 2.0, whose joint sequence of text and image is shared by `ranks` of a sequence-parallel group."""

    def residual_shape(model, forward):
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


def pictures_own_tokens(forward):
    """In ComfyUI, the tokens of the picture itself; those of reference pictures follow them."""
    *frames, height, width = forward["x"].shape[2:]
    side = forward["patch_size"]
    return prod(frames) * ceil(height / side) * ceil(width / side)


# ComfyUI's own classes.
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

# diffusers, what several classes share.
JOINT = Host(blocks=("transformer_blocks", "single_transformer_blocks"), final_layer="norm_out")
BLOCKS = Host(blocks=("blocks",), final_layer="norm_out")
TRANSFORMER_BLOCKS = Host(blocks=("transformer_blocks",), final_layer="norm_out")
LAYERS = Host(blocks=("layers",), final_layer="norm_out")


def rising(timestep: str = "timestep", scale: float = 1.0) -> dict:
    """The fact of a time that runs from 0, noise, to `scale`, picture."""
    return {"timestep": timestep, "noise_level": lambda forward: 1 - forward[timestep] / scale}


def frames_tokens(model, forward):
    """Of a latent (batch, frames, channels, height, width)."""
    frames, _, height, width = forward["hidden_states"].shape[1:]
    return patches((frames, height, width), (1, model.config.patch_size, model.config.patch_size))


def fills_a_cache(forward):
    """GLM-Image runs its reference pictures through once before the first step."""
    return getattr(forward.get("kv_caches"), "mode", None) == "write"


U_NET = Host(blocks=(), latent="sample", why_output="a U-Net has no stack of blocks of one shape")
TWO_STREAMS = Host(blocks=(), why_output="it denoises picture and sound in two streams")

# By exact class: a subclass may run its blocks in another way.
HOSTS: dict[str, Host] = {
    "comfy.Chroma": COMFY_FLUX,
    "comfy.Flux": COMFY_FLUX,
    "comfy.HunyuanVideo": COMFY_HUNYUANVIDEO,
    "comfy.QwenImageTransformer2DModel": COMFY_QWEN_IMAGE,
    "comfy.VaceWanModel": COMFY_WAN,
    "comfy.WanModel": COMFY_WAN,
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
        blocks=(), timestep_scale=1.0, why_output="its samples hold their picture at different places"
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
    "diffusers.ZImageTransformer2DModel": Host(blocks=("layers",), image_tokens=0, latent="x", **rising("t")),
    "diffusers_helper.HunyuanVideoTransformer3DModelPacked": FRAMEPACK,
    "hyvideo.HYVideoDiffusionTransformer": HUNYUANVIDEO_CHECKOUT,
    "opensora.MMDiTModel": mmdit(),
    "opensora.STDiT3": STDIT3,
    "wan.WanModel": WAN,
    "wan.VaceWanModel": replace(WAN, hint_methods=("forward_vace",)),
}


def class_name(model) -> str:
    """A model's key in `HOSTS`: the first word of its module, a dot, and its class."""
    return f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"


def host_of(model) -> Host:
    """The facts of a model's class. Raises MagCacheError for a class that MagCache does not know."""
    if class_name(model) not in HOSTS:
        raise MagCacheError(
            f"MagCache does not know the model class {type(model).__name__}: add its facts to common/hosts.py "
            "(docs/design.md says what each is)."
        )
    return HOSTS[class_name(model)]


TIMES = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma", "vision_timesteps")


def output_host(model_name: str, names: list[str], why: str = "its class is not described") -> Host:
    """Facts enough to predict a model's output. names: of the arguments of its forward, the latent first. Raises
    MagCacheError for a model that is told no time."""
    timestep = next((name for name in names if name in TIMES), None)
    if timestep is None:
        raise MagCacheError(f"{model_name} is told no timestep, so MagCache cannot follow its sampler.")
    return Host(blocks=(), latent=names[0], timestep=timestep, why_output=why)
