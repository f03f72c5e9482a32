"""What MagCache has to know of ComfyUI's transformer classes, and which published ratios belong to which model."""

from math import prod

from .common.errors import MagCacheError

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


def require_class(model_type, model):
    """Raises MagCacheError if a model type was chosen that belongs to another class."""
    wanted = MODEL_TYPES[model_type][0]
    if type(model).__name__ != wanted:
        raise MagCacheError(
            f"model_type {model_type} is for a {wanted}, and this model is a {type(model).__name__}: choose auto."
        )


def recognise(model, file_name="", references=False, start_image=False, latent=(1, 1)):
    """The model type of a transformer by its sizes, or None if no ratios were published for such a one.

    file_name: tells Wan2.2 T2V from Wan2.1, whose transformers are built alike. references: reference pictures are
    given (Kontext, Qwen-Image-Edit); start_image: the latent holds a first frame; latent: (height, width) of the
    latent.
    """
    return {
        "Flux": flux_type,
        "Chroma": chroma_type,
        "QwenImageTransformer2DModel": qwen_type,
        "HunyuanVideo": hunyuan_type,
        "WanModel": wan_type,
        "VaceWanModel": vace_type,
    }[type(model).__name__](model, file_name.lower(), references, start_image, latent)


def flux_type(model, file_name, references, start_image, latent):
    params = model.params
    if (params.hidden_size, params.depth, params.depth_single_blocks, params.in_channels) != (3072, 19, 38, 16):
        return None
    if not params.guidance_embed:
        return "flux_schnell"
    return "flux_kontext" if references else "flux"


def chroma_type(model, *circumstances):
    params = model.params
    return "chroma" if (params.hidden_size, params.depth, params.depth_single_blocks) == (3072, 19, 38) else None


def qwen_type(model, file_name, references, start_image, latent):
    if len(model.transformer_blocks) != 60:
        return None
    return "qwen_image_edit" if references else "qwen_image"


def hunyuan_type(model, *circumstances):
    params = model.params
    if params.hidden_size == 2048 and getattr(params, "vision_in_dim", None):
        return "hunyuan_video1.5"
    sizes = params.hidden_size, params.depth, params.depth_single_blocks, params.in_channels
    return "hunyuan_video" if sizes == (3072, 20, 40, 16) else None


def wan_type(model, file_name, references, start_image, latent):
    if (model.dim, model.in_dim) == (3072, 48):
        return "wan2.2_ti2v_5B_i2v" if start_image else "wan2.2_ti2v_5B_t2v"
    if (model.dim, model.in_dim) == (1536, 16):
        return "wan2.1_t2v_1.3B"
    if (model.dim, model.in_dim) == (5120, 36):
        if model.model_type == "t2v":  # Wan2.2's has no image encoder
            return "wan2.2_i2v_14B"
        pixels = prod(latent) * PIXELS_A_LATENT
        return "wan2.1_i2v_480p_14B" if pixels < (PIXELS_480P * PIXELS_720P) ** 0.5 else "wan2.1_i2v_720p_14B"
    if (model.dim, model.in_dim) == (5120, 16):
        return (
            "wan2.2_t2v_14B" if any(name in file_name for name in ("wan2.2", "wan2_2", "wan22")) else "wan2.1_t2v_14B"
        )
    return None


def vace_type(model, *circumstances):
    return {1536: "wan2.1_vace_1.3B", 5120: "wan2.1_vace_14B"}.get(model.dim)
