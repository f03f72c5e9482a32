"""The parts of the demo image model: FLUX's structures at a small width, and the diffusers folder that holds them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from glyphs import SIZE
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
from word_tokenizer import T5_CONFIG, save_tokenizer, word_tokenizer  # noqa: E402

TEXT_LENGTH, WIDTH = 16, 160


def build_tokenizers(folder: Path, captions: list[str]) -> tuple[CLIPTokenizerFast, T5TokenizerFast]:
    """A CLIP (BPE) and a T5 (unigram) tokenizer for the words of the captions, saved as transformers expects them."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    clip = CLIPTokenizerFast(
        tokenizer_object=bpe,
        model_max_length=TEXT_LENGTH,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    clip.save_pretrained(folder / "tokenizer")
    model = json.loads(bpe.to_str())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")

    unigram = word_tokenizer(captions)
    t5 = T5TokenizerFast(
        tokenizer_object=unigram,
        model_max_length=TEXT_LENGTH,
        extra_ids=0,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    t5.save_pretrained(folder / "tokenizer_2")
    clip_config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    save_tokenizer(folder / "tokenizer", bpe, {**clip_config, "model_max_length": TEXT_LENGTH})
    save_tokenizer(folder / "tokenizer_2", unigram, {**T5_CONFIG, "model_max_length": TEXT_LENGTH})
    return clip, t5


def build_models(
    clip_vocabulary: int, t5_vocabulary: int
) -> tuple[AutoencoderKL, FluxTransformer2DModel, CLIPTextModel, T5EncoderModel]:
    """(VAE, transformer, CLIP, T5) with random weights."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        latent_channels=16,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=7,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            projection_dim=64,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_vocabulary,
            d_model=64,
            d_kv=32,
            d_ff=128,
            num_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    return vae, transformer, clip, t5


def save_flux(
    folder: Path,
    vae: AutoencoderKL,
    transformer: FluxTransformer2DModel,
    clip: CLIPTextModel,
    t5: T5EncoderModel,
) -> None:
    """Write the diffusers folder: transformer and VAE in float16, the two tiny text encoders in float32."""
    for model, name in ((transformer, "transformer"), (vae, "vae")):
        half = type(model).from_config(model.config)
        half.load_state_dict(model.state_dict())
        half.half().save_pretrained(folder / name)
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "_diffusers_version": "0.35.0",
                "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": ["transformers", "CLIPTextModel"],
                "text_encoder_2": ["transformers", "T5EncoderModel"],
                "tokenizer": ["transformers", "CLIPTokenizer"],
                "tokenizer_2": ["transformers", "T5TokenizerFast"],
                "transformer": ["diffusers", "FluxTransformer2DModel"],
                "vae": ["diffusers", "AutoencoderKL"],
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
