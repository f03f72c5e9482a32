"""Tiny random transformers of the families that the nodes know, built with ComfyUI's own classes, and what they are
asked."""

import comfy.model_base
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher

WIDTH, TEXT, TOKENS = 64, 48, 6  # of the transformer, of the text, and how many text tokens
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": TEXT,
    "context_in_dim": TEXT,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "txt_ids_dims": [],
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 48,
    "ffn_dim": 64,
    "num_heads": 2,
    "num_layers": 4,
    "in_dim": 16,
    "out_dim": 16,
    "text_dim": TEXT,
    "freq_dim": 32,
    "patch_size": (1, 2, 2),
}
HUNYUAN = {
    "image_model": "hunyuan_video",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "vec_in_dim": TEXT,
    "context_in_dim": TEXT,
    "hidden_size": WIDTH,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [8, 12, 12],
    "theta": 256,
    "qkv_bias": True,
    "guidance_embed": True,
    "byt5": False,
    "meanflow": False,
    "use_cond_type_embedding": False,
    "vision_in_dim": None,
    "meanflow_sum": False,
}
# family: (configuration class, class of the model, its configuration, shape of the latent)
FAMILIES = {
    "flux": ("Flux", None, FLUX, (1, 16, 8, 8)),
    "flux2": (
        "Flux2",
        None,
        {
            **FLUX,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "vec_in_dim": None,
            "axes_dim": [8, 8, 8, 8],
            "theta": 2000,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
        },
        (1, 128, 4, 4),
    ),
    "chroma": (
        "Chroma",
        None,
        {
            **{key: value for key, value in FLUX.items() if key != "guidance_embed"},
            "in_dim": 64,
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "out_dim": WIDTH,
            "hidden_dim": WIDTH,
            "n_layers": 2,
        },
        (1, 16, 8, 8),
    ),
    "wan": ("WAN21_T2V", None, WAN, (1, 16, 2, 8, 8)),
    "wan_i2v": ("WAN21_I2V", None, {**WAN, "model_type": "i2v", "in_dim": 36}, (1, 16, 2, 8, 8)),
    "vace": ("WAN21_Vace", None, {**WAN, "model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}, (1, 16, 2, 8, 8)),
    "hunyuan": ("HunyuanVideo", comfy.model_base.HunyuanVideo, HUNYUAN, (1, 16, 2, 8, 8)),
    "hunyuan1.5": (
        "HunyuanVideo15",
        None,
        {
            **HUNYUAN,
            "in_channels": 65,
            "out_channels": 32,
            "patch_size": [1, 1, 1],
            "vec_in_dim": None,
            "byt5": True,
            "guidance_embed": False,
            "use_cond_type_embedding": True,
            "vision_in_dim": 1152,
            "depth": 4,
            "depth_single_blocks": 0,
        },
        (1, 32, 2, 4, 4),
    ),
    "qwen": (
        "QwenImage",
        None,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "patch_size": 2,
            "num_layers": 4,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (8, 12, 12),
        },
        (1, 16, 1, 8, 8),
    ),
}


def build(family, seed=0):
    """A ModelPatcher of a tiny random model, as Load Diffusion Model returns it."""
    name, cls, config, _ = FAMILIES[family]
    configuration = getattr(comfy.supported_models, name)({**config, "dtype": torch.float32})
    configuration.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = cls(configuration, device=cpu) if cls else configuration.get_model({}, device=cpu)
    randomise(model.diffusion_model, seed)
    return ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def randomise(module, seed):
    """ComfyUI leaves weights empty, since they come from a file."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            scale = 0.05 if parameter.ndim < 2 else 1 / parameter[0].numel() ** 0.5
            values = torch.randn(parameter.shape, generator=generator) * scale
            is_norm = name.endswith(("norm.weight", "scale", "norm_q.weight", "norm_k.weight")) or (
                parameter.ndim == 1 and name.endswith("weight")
            )
            parameter.copy_(1 + values if is_norm else values)
            parameter.requires_grad_(False)


def prompt(seed, **more):
    """A conditioning as a text encoder node returns it."""
    generator = torch.Generator().manual_seed(100 + seed)
    about = {"guidance": 3.5, "pooled_output": torch.randn(1, TEXT, generator=generator)}
    return [[torch.randn(1, TOKENS, TEXT, generator=generator), {**about, **more}]]


def latent(family, batch=1):
    _, *shape = FAMILIES[family][3]
    return torch.zeros(batch, *shape)
