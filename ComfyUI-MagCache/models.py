"""Which published ratios belong to which model of ComfyUI, and which models cannot be cached."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from .common.errors import MagCacheError
from .common.tables import RatioTable, load

# Name in the node: (class, tables). Of several tables the one with the run's number of steps nearest to its own is
# taken.
MODEL_TYPES = {
    "flux": ("Flux", ("flux-dev",)),
    "flux_kontext": ("Flux", ("flux-kontext-dev-comfyui",)),
    "flux_schnell": ("Flux", ("flux-schnell",)),
    "chroma": ("Chroma", ("chroma",)),
    "qwen_image": ("QwenImageTransformer2DModel", ("qwen-image-comfyui",)),
    "qwen_image_edit": ("QwenImageTransformer2DModel", ("qwen-image-edit",)),
    "hunyuan_video": ("HunyuanVideo", ("hunyuanvideo-t2v-720p",)),
    "hunyuan_video1.5": ("HunyuanVideo", ("hunyuanvideo-1.5-t2v-20steps", "hunyuanvideo-1.5-t2v-40steps")),
    "wan2.1_t2v_1.3B": ("WanModel", ("wan2.1-t2v-1.3b",)),
    "wan2.1_t2v_14B": ("WanModel", ("wan2.1-t2v-14b",)),
    "wan2.1_i2v_480p_14B": ("WanModel", ("wan2.1-i2v-14b-480p",)),
    "wan2.1_i2v_720p_14B": ("WanModel", ("wan2.1-i2v-14b-720p",)),
    "wan2.1_vace_1.3B": ("VaceWanModel", ("wan2.1-vace-1.3b",)),
    "wan2.1_vace_14B": ("VaceWanModel", ("wan2.1-vace-14b",)),
    "wan2.2_t2v_14B": ("WanModel", ("wan2.2-t2v-a14b",)),
    "wan2.2_i2v_14B": ("WanModel", ("wan2.2-i2v-a14b",)),
    "wan2.2_ti2v_5B_t2v": ("WanModel", ("wan2.2-ti2v-5b-t2v",)),
    "wan2.2_ti2v_5B_i2v": ("WanModel", ("wan2.2-ti2v-5b-i2v",)),
}
PIXELS_480P, PIXELS_720P, PIXELS_A_LATENT = 832 * 480, 1280 * 720, 8 * 8


# Transformers that keep something from call to call, so that a call left out changes the next.
NOT_POSSIBLE = {
    "CausalWanModel": "keeps the keys and values of earlier frames, so each of its calls is needed",
}


def published_table(model_type: str | None, steps: int) -> RatioTable | None:
    """The preset of a model type whose number of steps is nearest, or None."""
    tables = [load(name) for name in MODEL_TYPES[model_type][1]] if model_type else []
    return min(tables, key=lambda table: abs(table.steps - steps), default=None)


def require_class(model_type, model):
    """Raises MagCacheError if a model type was chosen that belongs to another class."""
    wanted = MODEL_TYPES[model_type][0]
    if type(model).__name__ != wanted:
        raise MagCacheError(
            f"model_type {model_type} is for a {wanted}, and this model is a {type(model).__name__}: choose auto."
        )


WAN_2_1, WAN_2_2 = (
    re.compile(r"wan[^a-z0-9]*v?2[^a-z0-9]*1(?![0-9])"),
    re.compile(r"wan[^a-z0-9]*v?2[^a-z0-9]*2(?![0-9])|a14b|(high|low)[^a-z0-9]*noise"),
)


@dataclass(frozen=True)
class Signs:
    """What tells apart models that are built alike.

    file_name: path of the file, if ComfyUI remembers it; references: whether reference pictures are given (Kontext,
    Qwen-Image-Edit); start_image: whether a first frame is given, in the latent or beside it; latent: its (height,
    width); midway: whether the run begins or ends half denoised, with another sampler before or after it.
    """

    file_name: str = ""
    references: bool = False
    start_image: bool = False
    latent: tuple = (1, 1)
    midway: bool = False


def recognise(model, signs: Signs = Signs()) -> tuple[str | None, str]:
    """(the model type of a transformer by its sizes, None if no ratios were published for it; a sentence if the signs
    do not settle it, otherwise "")."""
    known = {
        "Flux": flux_type,
        "Chroma": chroma_type,
        "QwenImageTransformer2DModel": qwen_type,
        "HunyuanVideo": hunyuan_type,
        "WanModel": wan_type,
        "VaceWanModel": vace_type,
    }.get(type(model).__name__)
    found = known(model, signs) if known else None
    return found if isinstance(found, tuple) else (found, "")


def flux_type(model, signs):
    params = model.params
    if (params.hidden_size, params.depth, params.depth_single_blocks, params.in_channels) != (3072, 19, 38, 16):
        return None
    if not params.guidance_embed:
        return "flux_schnell"
    return "flux_kontext" if signs.references else "flux"


def chroma_type(model, signs):
    params = model.params
    return "chroma" if (params.hidden_size, params.depth, params.depth_single_blocks) == (3072, 19, 38) else None


def qwen_type(model, signs):
    if len(model.transformer_blocks) != 60:
        return None
    return "qwen_image_edit" if signs.references else "qwen_image"


def hunyuan_type(model, signs):
    """Only for text to video were tables published; image to video and super-resolution share the class."""
    params = model.params
    if signs.start_image:
        return None
    if (params.hidden_size, params.in_channels) == (2048, 65) and getattr(params, "vision_in_dim", None):
        return "hunyuan_video1.5"
    sizes = params.hidden_size, params.depth, params.depth_single_blocks, params.in_channels
    return "hunyuan_video" if sizes == (3072, 20, 40, 16) else None


def wan_type(model, signs):
    if (model.dim, model.in_dim) == (3072, 48):
        return "wan2.2_ti2v_5B_i2v" if signs.start_image else "wan2.2_ti2v_5B_t2v"
    if (model.dim, model.in_dim) == (1536, 16):
        return "wan2.1_t2v_1.3B"
    if (model.dim, model.in_dim) == (5120, 36):
        if model.model_type == "t2v":  # Wan2.2's has no image encoder
            return "wan2.2_i2v_14B"
        pixels = prod(signs.latent) * PIXELS_A_LATENT
        return "wan2.1_i2v_480p_14B" if pixels < (PIXELS_480P * PIXELS_720P) ** 0.5 else "wan2.1_i2v_720p_14B"
    if (model.dim, model.in_dim) == (5120, 16):
        return wan_t2v_14b(signs)
    return None


def wan_version(file_name):
    """ "2.1" or "2.2" by the name of the file, else by those of its folders, else ""."""
    for part in reversed(re.split(r"[/\\\\]", file_name.lower())):
        for version, pattern in (("2.2", WAN_2_2), ("2.1", WAN_2_1)):
            if pattern.search(part):
                return version
    return ""


def wan_t2v_14b(signs):
    """Wan2.1 and the experts of Wan2.2 are built alike. They are told apart by the file's name, otherwise by whether
    the sampler leaves or finds the latent half denoised, as Wan2.2's two samplers do."""
    named = wan_version(signs.file_name)
    if named:
        return f"wan{named}_t2v_14B"
    if signs.midway:
        return "wan2.2_t2v_14B", (
            "taken for Wan2.2 T2V, since this sampler does a part of the steps; if it is Wan2.1, choose wan2.1_t2v_14B"
        )
    return "wan2.1_t2v_14B", (
        "taken for Wan2.1 T2V, which is built like Wan2.2: if it is Wan2.2, choose wan2.2_t2v_14B as model_type"
    )


def vace_type(model, signs):
    """No table was published for Wan2.2's VACE-Fun."""
    if signs.midway or wan_version(signs.file_name) == "2.2":
        return None
    return {1536: "wan2.1_vace_1.3B", 5120: "wan2.1_vace_14B"}.get(model.dim)
