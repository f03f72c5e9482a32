"""The parts of the demo video model: Wan's structures at a small width, and the diffusers folder that holds them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import clips
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from word_tokenizer import T5_CONFIG, save_tokenizer, word_tokenizer  # noqa: E402

CHANNELS, TEXT_WIDTH, TEXT_LENGTH, SHIFT = 96, 64, 512, 3.0
CELL, CHUNK = 16, 4  # pixels and frames of a latent
BOUNDARY = 0.875  # noise level at which the high-noise expert hands over to the low-noise one, as in Wan2.2
EXPERTS = {"high_noise": (BOUNDARY, 1.0), "low_noise": (0.0, BOUNDARY)}  # and the noise levels at which they work


def build_vae() -> AutoencoderKLWan:
    """Wan2.2's VAE at a small width: 16 by 16 pixels and 4 frames a latent. Its encoder is not trained (`Latents`)."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=48,
        out_channels=48,
        patch_size=4,
        scale_factor_temporal=CHUNK,
        scale_factor_spatial=CELL,
    )


def build_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=576,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_tokenizer(folder: Path) -> T5TokenizerFast:
    """A T5 (unigram) tokenizer in which every word of the captions is one token."""
    texts = [
        clips.caption(name, motion, background, template)
        for name in clips.OBJECTS
        for motion in clips.MOTIONS
        for background in clips.BACKGROUNDS
        for template in clips.TEMPLATES
    ]
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(folder, word_tokenizer(texts), {**T5_CONFIG, "model_max_length": TEXT_LENGTH})
    return T5TokenizerFast.from_pretrained(folder)


def build_text_encoder(vocabulary: int) -> UMT5EncoderModel:
    """One layer with random weights, which is not trained: a few dozen words need no more."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return UMT5EncoderModel(config).eval()


def half(model: torch.nn.Module) -> torch.nn.Module:
    """A copy in float16, as it is stored."""
    copy = type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.half()


def save_model(folder: Path, transformer, vae, encoder) -> None:
    """The diffusers folder, written beside its place and renamed: transformer and VAE in float16."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    build_tokenizer(part / "tokenizer")
    encoder.save_pretrained(part / "text_encoder")
    half(transformer).save_pretrained(part / "transformer")
    half(vae).save_pretrained(part / "vae")
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    scheduler.save_pretrained(part / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": None,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
