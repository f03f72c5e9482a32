"""Tiny random transformers of the families that the nodes know, built with ComfyUI's own classes, and what they are
asked."""

import sys
from functools import partial

import comfy.model_base
import comfy.nested_tensor
import comfy.supported_models
import comfy.supported_models_base
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_families import FAMILIES
from comfyui_published import TEXT, TOKENS, WIDTH

# What some of them want to be asked with: further entries of a conditioning.
MASK = {"attention_mask": torch.ones(1, TOKENS, dtype=torch.long)}
ASKED = {
    "ltxv": MASK,
    "ltxav": {"attention_mask": torch.ones(1, 1024, dtype=torch.long)},
    "omnigen2": MASK,
    "boogu": MASK,
    "hidream": {"conditioning_llama3": torch.ones(1, 2, TOKENS, TEXT)},
    "mochi": MASK,
    "hunyuandit": {
        **MASK,
        "conditioning_mt5xl": torch.ones(1, TOKENS, TEXT),
        "attention_mask_mt5xl": torch.ones(1, TOKENS, dtype=torch.long),
    },
    "acestep": {"conditioning_lyrics": torch.zeros(1, 4, dtype=torch.long)},
}


def build(family, seed=0):
    """A ModelPatcher of a tiny random model, as Load Diffusion Model returns it."""
    name, cls, config, _ = FAMILIES[family]
    configuration = getattr(comfy.supported_models, name)({**config, "dtype": torch.float32})
    configuration.unet_config |= config  # where the class has sizes of its own
    configuration.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    if family == "acestep":  # its encoder's sizes are fixed
        encoder = sys.modules["comfy.ldm.ace.model"].LyricEncoder
        few = {"output_size": WIDTH, "attention_heads": 2, "linear_units": WIDTH, "num_blocks": 1}
        sys.modules["comfy.ldm.ace.model"].LyricEncoder = partial(getattr(encoder, "func", encoder), **few)
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
