"""The demo video model as Wan2.2 has it: a high-noise and a low-noise expert, one LoRA each on the same transformer."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import WanPipeline
from structure import BOUNDARY, EXPERTS

HERE = Path(__file__).resolve().parent


def load_experts() -> WanPipeline:
    """A WanPipeline with two transformers, of float32; the second works at noise levels below its `boundary_ratio`."""
    pipe = WanPipeline.from_pretrained(HERE / "model", torch_dtype=torch.float32)
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=BOUNDARY)
    for name, second in zip(EXPERTS, (False, True)):
        pipe.load_lora_weights(HERE / "experts", weight_name=f"{name}.safetensors", load_into_transformer_2=second)
    for model in (pipe.transformer, pipe.transformer_2):
        model.fuse_lora()
        model.unload_lora()
    return pipe
