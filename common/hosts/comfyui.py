"""ComfyUI's own classes. Facts are proved on the model in use, too, at the first computed call of a run
(`payloads.Residual`)."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod
from typing import Any

from ..blocks import Host


def pictures_own_tokens(forward: dict[str, Any]) -> int:
    """Number of tokens of the image itself, without those of reference images."""
    *frames, height, width = forward["x"].shape[2:]
    side = forward["patch_size"]
    return prod(frames) * ceil(height / side) * ceil(width / side)


FLUX = Host(
    blocks=("double_blocks", "single_blocks"),
    final_layer="final_layer",
    image_tokens="img",
    in_place=True,
    noise_tokens=pictures_own_tokens,
)
HUNYUANVIDEO = replace(FLUX, noise_tokens=None)
WAN = Host(blocks=("blocks",), final_layer="head", image_tokens=0)
QWEN_IMAGE = Host(blocks=("transformer_blocks",), final_layer="norm_out", noise_tokens=pictures_own_tokens)
BLOCKS = Host(blocks=("blocks",), final_layer="final_layer", image_tokens=0)
LAYERS = Host(blocks=("layers",), final_layer="final_layer", image_tokens=0)


def output_only(why: str) -> Host:
    """The facts of a class whose output alone can be predicted. why: goes into the message about it."""
    return Host(blocks=(), why_output=why)


U_NET = output_only("a U-Net has no stack of equally shaped blocks")
TWO_STREAMS = output_only("it denoises image and sound in two streams")
INSIDE = output_only("its blocks belong to another model nested in it")
HALVES = output_only("it swaps the halves of a batch")
PIXELS = output_only("the layers after its blocks also read the latent")

COMFYUI: dict[str, Host] = {
    "comfy.ACEStepTransformer2DModel": Host(blocks=("transformer_blocks",), final_layer="final_layer"),
    "comfy.AceStepConditionGenerationModel": INSIDE,
    "comfy.Anima": BLOCKS,
    "comfy.AnimateWanModel": WAN,
    "comfy.AsymmDiTJoint": BLOCKS,  # Mochi
    "comfy.AudioDiffusionTransformer": INSIDE,  # Stable Audio
    "comfy.BooguTransformer2DModel": Host(
        blocks=("double_stream_layers", "single_stream_layers"),
        final_layer="norm_out",
        image_tokens=0,
        output_tokens=lambda model, forward: pictures_own_tokens(forward),
    ),
    "comfy.CameraWanModel": WAN,
    "comfy.Chroma": FLUX,
    "comfy.ChromaRadiance": PIXELS,
    "comfy.CogVideoXTransformer3DModel": Host(blocks=("blocks",), final_layer="norm_final"),
    "comfy.ErnieImageModel": replace(LAYERS, final_layer="final_norm"),
    "comfy.Flux": FLUX,
    "comfy.GeneralDIT": output_only("its blocks are not in a list"),
    "comfy.HiDreamImageTransformer2DModel": Host(
        blocks=("double_stream_blocks", "single_stream_blocks"), final_layer="final_layer", image_tokens="image_tokens"
    ),
    "comfy.HiDreamO1Transformer": INSIDE,
    "comfy.HumoWanModel": WAN,
    "comfy.HunYuanDiT": BLOCKS,
    "comfy.HunYuanDiTPlain": HALVES,
    "comfy.Hunyuan3Dv2": HUNYUANVIDEO,
    "comfy.HunyuanVideo": HUNYUANVIDEO,
    "comfy.Ideogram4Transformer2DModel": replace(
        LAYERS, output_tokens=lambda model, forward: prod(forward["x"].shape[2:])
    ),
    "comfy.JoyImageTransformer3DModel": Host(blocks=("double_blocks",), final_layer="norm_out", tokens_lead=True),
    "comfy.Kandinsky5": Host(blocks=("visual_transformer_blocks",), image_tokens=0),
    "comfy.LTXAVModel": TWO_STREAMS,
    "comfy.LTXVModel": Host(blocks=("transformer_blocks",), final_layer="norm_out", image_tokens=0, in_place=True),
    "comfy.LatentSeqMMFlowModel": output_only("it denoises a shape and a camera in two streams"),  # TripoSplat
    "comfy.LensTransformer2DModel": replace(QWEN_IMAGE, noise_tokens=None),
    "comfy.MMDiT": Host(  # AuraFlow, which modulates its tokens between its blocks and its final layer
        blocks=("double_layers", "single_layers"),
        image_tokens=1,
        block_returns=lambda args, tokens: (args[0], tokens),  # text and image
        output_tokens=lambda model, forward: pictures_own_tokens(forward),
    ),
    "comfy.MageFlowTransformer2DModel": QWEN_IMAGE,
    "comfy.MiniMaxH3Model": TWO_STREAMS,
    "comfy.MiniTrainDIT": BLOCKS,  # Cosmos-Predict2
    "comfy.NaDiT": HALVES,  # SeedVR2
    "comfy.NextDiT": LAYERS,  # Z-Image, Lumina 2
    "comfy.NextDiTPixelSpace": PIXELS,
    "comfy.OmniGen2Transformer2DModel": replace(LAYERS, final_layer="norm_out"),
    "comfy.OpenAISignatureMMDITWrapper": Host(blocks=("joint_blocks",), final_layer="final_layer", image_tokens=1),
    "comfy.PidNet": PIXELS,
    "comfy.PixArtMS": BLOCKS,
    "comfy.PixDiT_T2I": PIXELS,
    "comfy.QwenImageTransformer2DModel": QWEN_IMAGE,
    "comfy.SCAIL2WanModel": WAN,
    "comfy.SCAILWanModel": WAN,
    "comfy.SingleStreamDiT": replace(BLOCKS, final_layer="last"),  # Krea 2
    "comfy.StageB": U_NET,
    "comfy.StageC": U_NET,
    "comfy.UNetModel": U_NET,
    "comfy.VaceWanModel": WAN,
    "comfy.WanDancerModel": WAN,
    "comfy.WanModel": WAN,
    "comfy.WanModel_S2V": WAN,
}
