"""Tiny random transformers of the families that the nodes know, built with ComfyUI's own classes, and what they are
asked."""

import comfy.model_base
import comfy.nested_tensor
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


# Further models.
FAMILIES |= {
    "sd3": (
        "SD3",
        None,
        {
            "in_channels": 16,
            "input_size": None,
            "patch_size": 2,
            "depth": 3,
            "pos_embed_scaling_factor": None,
            "pos_embed_max_size": 16,
            "num_patches": 256,
            "adm_in_channels": TEXT,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": 192},
            },
            "context_size": TEXT,
            "qk_norm": "rms",
        },
        (1, 16, 8, 8),
    ),
    "zimage": (
        "ZImage",
        None,
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": TEXT,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "qk_norm": True,
            "n_heads": 8,
            "n_kv_heads": 8,
            "axes_dims": [8, 12, 12],
            "axes_lens": [64, 32, 32],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 8 / 3,
            "multiple_of": 32,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
        },
        (1, 16, 8, 8),
    ),
    "ltxv": (
        "LTXV",
        None,
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": TEXT,
            "num_layers": 3,
        },
        (1, 128, 2, 4, 4),
    ),
    "ltxav": (
        "LTXAV",
        None,
        {
            "image_model": "ltxav",
            "in_channels": 128,
            "audio_in_channels": 128,
            "cross_attention_dim": WIDTH,
            "audio_cross_attention_dim": 32,
            "attention_head_dim": 32,
            "audio_attention_head_dim": 16,
            "num_attention_heads": 2,
            "audio_num_attention_heads": 2,
            "caption_channels": TEXT,
            "connector_attention_head_dim": 24,
            "connector_num_attention_heads": 2,
            "connector_num_layers": 1,
            "num_layers": 2,
        },
        (1, 128, 2, 4, 4),
    ),
    "cosmos2": (
        "CosmosT2IPredict2",
        None,
        {
            "image_model": "cosmos_predict2",
            "max_img_h": 32,
            "max_img_w": 32,
            "max_frames": 8,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 96,
            "num_blocks": 3,
            "num_heads": 2,
            "crossattn_emb_channels": TEXT,
            "concat_padding_mask": True,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
            "rope_enable_fps_modulation": False,
        },
        (1, 16, 1, 8, 8),
    ),
    "sd15": (
        "SD15",
        None,
        {
            "image_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "model_channels": 32,
            "num_res_blocks": [1, 1],
            "channel_mult": [1, 2],
            "num_heads": 2,
            "num_head_channels": -1,
            "use_spatial_transformer": True,
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "context_dim": TEXT,
            "legacy": False,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
            "use_temporal_attention": False,
        },
        (1, 4, 8, 8),
    ),
    "auraflow": (
        "AuraFlow",
        None,
        {
            "cond_seq_dim": TEXT,
            "in_channels": 4,
            "out_channels": 4,
            "dim": 96,
            "n_layers": 3,
            "n_double_layers": 1,
            "n_heads": 2,
            "max_seq": 64,
        },
        (1, 4, 8, 8),
    ),
    "hidream": (
        "HiDream",
        None,
        {
            "image_model": "hidream",
            "attention_head_dim": 32,
            "axes_dims_rope": [8, 12, 12],
            "caption_channels": [TEXT, TEXT],
            "max_resolution": [16, 16],
            "in_channels": 16,
            "llama_layers": [0, 0, 0],
            "num_attention_heads": 2,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "num_layers": 2,
            "num_single_layers": 1,
            "out_channels": 16,
            "patch_size": 2,
            "text_emb_dim": TEXT,
        },
        (1, 16, 8, 8),
    ),
    "ernie": (
        "ErnieImage",
        None,
        {
            "image_model": "ernie",
            "hidden_size": 96,
            "num_attention_heads": 3,
            "num_layers": 3,
            "ffn_hidden_size": 128,
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "text_in_dim": TEXT,
            "rope_axes_dim": (8, 12, 12),
        },
        (1, 128, 4, 4),
    ),
    "krea2": (
        "Krea2",
        None,
        {
            "image_model": "krea2",
            "features": 96,
            "tdim": 32,
            "txtdim": TEXT,
            "heads": 3,
            "kvheads": 3,
            "layers": 3,
            "channels": 16,
            "txtlayers": 1,
            "txtheads": 2,
            "txtkvheads": 2,
        },
        (1, 16, 8, 8),
    ),
    "camera": ("WAN21_Camera", None, {**WAN, "model_type": "camera", "in_dim": 32}, (1, 16, 2, 8, 8)),
    "humo": ("WAN21_HuMo", None, {**WAN, "model_type": "humo", "in_dim": 36}, (1, 16, 2, 8, 8)),
    "omnigen2": (
        "Omnigen2",
        None,
        {
            "image_model": "omnigen2",
            "hidden_size": 96,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 3,
            "multiple_of": 32,
            "axes_dim_rope": (8, 12, 12),
            "axes_lens": (64, 32, 32),
            "text_feat_dim": TEXT,
            "in_channels": 16,
            "timestep_scale": 1000.0,
        },
        (1, 16, 8, 8),
    ),
    "kandinsky5": (
        "Kandinsky5",
        None,
        {
            "image_model": "kandinsky5",
            "model_dim": 96,
            "ff_dim": 128,
            "in_text_dim": TEXT,
            "in_text_dim2": TEXT,
            "time_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (8, 12, 12),
            "visual_embed_dim": 132,
        },
        (1, 16, 2, 8, 8),
    ),
    "cogvideox": (
        "CogVideoX_T2V",
        None,
        {
            "image_model": "cogvideox",
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 16,
            "out_channels": 16,
            "time_embed_dim": 32,
            "text_embed_dim": TEXT,
            "num_layers": 3,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "max_text_seq_length": 6,
            "use_rotary_positional_embeddings": True,
        },
        (1, 16, 2, 8, 8),
    ),
}
FAMILIES |= {
    "s2v": (
        "WAN22_S2V",
        None,
        {**WAN, "model_type": "s2v", "audio_dim": 32, "audio_inject_layers": [0, 2]},
        (1, 16, 2, 8, 8),
    ),
    "animate": ("WAN22_Animate", None, {**WAN, "model_type": "animate", "in_dim": 36}, (1, 16, 2, 8, 8)),
    "scail": ("WAN21_SCAIL", None, {**WAN, "model_type": "scail", "in_dim": 20}, (1, 16, 2, 8, 8)),
    "scail2": ("WAN21_SCAIL2", None, {**WAN, "model_type": "scail2", "in_dim": 20}, (1, 16, 2, 8, 8)),
    "wandancer": ("WAN22_WanDancer", None, {**WAN, "model_type": "wandancer", "in_dim": 36}, (1, 16, 2, 8, 8)),
    "anima": ("Anima", None, {**FAMILIES["cosmos2"][2], "image_model": "anima"}, (1, 16, 1, 8, 8)),
    "lens": (
        "Lens",
        None,
        {
            "image_model": "lens",
            "in_channels": 128,
            "out_channels": 128,
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "enc_hidden_dim": TEXT // 4,
            "axes_dims_rope": (8, 12, 12),
            "patch_size": 1,
        },
        (1, 128, 4, 4),
    ),
    "mageflow": (
        "MageFlow",
        None,
        {
            "image_model": "mage_flow",
            "num_layers": 3,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (8, 12, 12),
        },
        (1, 128, 4, 4),
    ),
    "pixart": (
        "PixArtSigma",
        None,
        {
            "image_model": "pixart_sigma",
            "hidden_size": 96,
            "depth": 3,
            "num_heads": 2,
            "caption_channels": TEXT,
            "micro_condition": False,
            "input_size": 40,
            "model_max_length": TOKENS,
        },
        (1, 4, 40, 40),
    ),
    "boogu": (
        "Boogu",
        None,
        {
            **{name: value for name, value in FAMILIES["omnigen2"][2].items() if name != "text_feat_dim"},
            "image_model": "boogu",
            "num_double_stream_layers": 2,
            "instruction_feat_dim": TEXT,
        },
        (1, 16, 8, 8),
    ),
    "hunyuan3d": (
        "Hunyuan3Dv2",
        None,
        {
            "image_model": "hunyuan3d2",
            "in_channels": 64,
            "context_in_dim": TEXT,
            "hidden_size": WIDTH,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
        },
        (1, 64, 16),
    ),
    "joyimage": (
        "JoyImage",
        None,
        {
            "image_model": "joyimage",
            "hidden_size": 128,
            "num_layers": 3,
            "num_attention_heads": 1,
            "text_dim": TEXT,
        },
        (1, 16, 1, 8, 8),
    ),
}
# What some of them want to be asked with: further entries of a conditioning.
MASK = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
ASKED = {
    "ltxv": MASK,
    "ltxav": {"attention_mask": torch.ones(1, 1024, dtype=torch.long)},
    "omnigen2": MASK,
    "boogu": MASK,
    "hidream": {"conditioning_llama3": torch.ones(1, 2, TOKENS, TEXT)},
}


def build(family, seed=0):
    """A ModelPatcher of a tiny random model, as Load Diffusion Model returns it."""
    name, cls, config, _ = FAMILIES[family]
    configuration = getattr(comfy.supported_models, name)({**config, "dtype": torch.float32})
    configuration.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    if family == "anima":  # its adapter's sizes are fixed
        comfy.ldm.anima.model.LLMAdapter = lambda **options: torch.nn.Linear(1, 1)
    model = cls(configuration, device=cpu) if cls else configuration.get_model({}, device=cpu)
    randomise(model.diffusion_model, seed)
    for buffer in model.diffusion_model.buffers():  # of SD3, which comes from the file
        if not (buffer.abs() < 1e6).all():
            buffer.zero_()
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


def prompt(seed, family="", **more):
    """A conditioning as a text encoder node returns it."""
    generator = torch.Generator().manual_seed(100 + seed)
    about = {"guidance": 3.5, "pooled_output": torch.randn(1, TEXT, generator=generator)}
    return [[torch.randn(1, TOKENS, TEXT, generator=generator), {**about, **ASKED.get(family, {}), **more}]]


def latent(family, batch=1):
    _, *shape = FAMILIES[family][3]
    made = torch.zeros(batch, *shape)
    if family == "ltxav":  # video and sound
        return comfy.nested_tensor.NestedTensor((made, torch.zeros(batch, 8, 8, 16)))
    return made
