"""Train the bundled demo model: a small FLUX that draws emoji, in the ordinary diffusers folder format.

    python demo/image/train.py --minutes 75          # two CPU cores; writes demo/image/model
    python demo/image/train.py --minutes 8 --device cuda

Data: glyphs of Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1) with their Unicode names as
captions, on a handful of plain backgrounds. Loss: rectified flow matching, as in FLUX.
"""

import argparse
import json
import random
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
GLYPHS = (
    "😀😍😎😭😴🤖👻💀👽🤡🎃"
    "🐶🐱🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐔🐧🦉🦄🐝🦋🐢🐙🦀🐠🐳🐘"
    "🌹🌻🌵🌴🍀🍄"
    "🍎🍏🍊🍋🍌🍉🍇🍓🍒🍍🥑🥕🍔🍕🍟🍩🎂🍦🍺☕"
    "⚽🏀🎸🎺🎨🎲🏆🚗🚌🚲🚂🚁🚀🛸⛵⛄🏠🏰"
    "🌞🌈🌍⚡🔥⭐🌙🎈🎁🔔💎🔑💡⏰📷⚓☂👑🎩💛💙"
)
NAMES = {
    "😀": "grinning face",
    "😍": "face with heart eyes",
    "😎": "face with sunglasses",
    "😭": "crying face",
    "👽": "alien",
    "🎃": "pumpkin",
    "🍊": "orange",
    "🎂": "birthday cake",
    "🍦": "ice cream",
    "🍺": "beer mug",
    "☕": "coffee cup",
    "🍀": "four leaf clover",
    "⚽": "soccer ball",
    "🏀": "basketball",
    "🎲": "dice",
    "🚗": "red car",
    "🚂": "steam train",
    "⛵": "sailboat",
    "⛄": "snowman",
    "🏠": "house",
    "🏰": "castle",
    "🌞": "sun",
    "🌍": "globe",
    "⚡": "lightning",
    "⭐": "star",
    "🌙": "moon",
    "🎁": "gift",
    "💎": "diamond",
    "💡": "light bulb",
    "☂": "umbrella",
    "🎩": "top hat",
    "🍕": "pizza",
    "🐝": "bee",
    "🐳": "whale",
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "sky blue": (150, 205, 245),
    "pink": (250, 190, 210),
    "green": (120, 190, 120),
    "yellow": (250, 225, 120),
    "purple": (150, 115, 190),
    "orange": (245, 165, 95),
}
TEMPLATES = (
    "{name} on a {background} background",
    "a {name} on a {background} background",
    "an emoji of a {name}, {background} background",
    "{background} background, {name}",
)
SIZE, TEXT_LENGTH, WIDTH, BATCH = 64, 16, 160, 48


def caption_of(glyph):
    return NAMES.get(glyph) or unicodedata.name(glyph).lower().removesuffix(" face")


def render_glyphs():
    """Every glyph as a 128x128 RGBA picture cropped to its ink."""
    font, pictures = ImageFont.truetype(FONT, 109), {}
    for glyph in GLYPHS:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
        pictures[caption_of(glyph)] = canvas.crop(canvas.getbbox())
    return pictures


def compose(picture, color, rng):
    """One training picture: the glyph at a random size, place and (half of the time) mirrored, on a plain
    background."""
    side = rng.randint(50, 58)
    scaled = picture.resize(
        (
            max(1, round(side * picture.width / max(picture.size))),
            max(1, round(side * picture.height / max(picture.size))),
        ),
        Image.LANCZOS,
    )
    if rng.random() < 0.5:
        scaled = scaled.transpose(Image.FLIP_LEFT_RIGHT)
    image = Image.new("RGB", (SIZE, SIZE), color)
    image.paste(scaled, tuple((SIZE - extent) // 2 + rng.randint(-2, 2) for extent in scaled.size), scaled)
    return image


def to_tensor(images):
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_tokenizers(folder, captions):
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

    # Whole words first, single characters for everything else.
    words = sorted({"▁" + word.strip(",") for caption in captions for word in caption.split()})
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -50.0),
        *((word, -5.0) for word in words),
        *((letter, -20.0) for letter in "▁abcdefghijklmnopqrstuvwxyz0123456789,.-'" if letter not in words),
    ]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T5TokenizerFast(
        tokenizer_object=unigram,
        model_max_length=TEXT_LENGTH,
        extra_ids=0,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )
    t5.save_pretrained(folder / "tokenizer_2")
    for name, tokenizer, config in (
        (
            "tokenizer",
            bpe,
            {
                "tokenizer_class": "CLIPTokenizer",
                "bos_token": "<|startoftext|>",
                "eos_token": "<|endoftext|>",
                "unk_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
            },
        ),
        (
            "tokenizer_2",
            unigram,
            {
                "tokenizer_class": "T5Tokenizer",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "extra_ids": 0,
            },
        ),
    ):
        # What transformers 5 writes here, transformers 4 cannot read.
        tokenizer.save(str(folder / name / "tokenizer.json"))
        config |= {"model_max_length": TEXT_LENGTH}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return clip, t5


def build_models(clip_vocabulary, t5_vocabulary):
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


def train_image_vae(vae, pictures, minutes, device, rng):
    """Reconstruction with a light KL term on random 32x32 crops (the network is fully convolutional)."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    glyphs, colors = list(pictures.values()), list(BACKGROUNDS.values())
    pool = to_tensor([compose(rng.choice(glyphs), rng.choice(colors), rng) for _ in range(3000)])
    start, bar, loss_average = time.time(), tqdm(total=round(minutes * 60), desc="VAE", unit="s"), None
    while (elapsed := time.time() - start) < minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, elapsed / 20) * (1 - elapsed / (minutes * 60)) ** 0.7
        batch = pool[torch.randint(len(pool), (32,))]
        top, left = rng.randrange(0, 33, 4), rng.randrange(0, 33, 4)
        batch = batch[:, :, top : top + 32, left : left + 32].to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(reconstruction, batch) + F.mse_loss(reconstruction, batch) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        loss_average = loss.item() if loss_average is None else 0.98 * loss_average + 0.02 * loss.item()
        bar.n = min(bar.total, round(elapsed))
        bar.set_postfix(loss=f"{loss_average:.4f}")
    bar.close()


@torch.no_grad()
def encode_pictures(vae, pictures, variants, device, rng):
    """Latents of every glyph on every background in several placements; also sets the VAE's scaling factors."""
    rows, latents = [(name, background) for name in pictures for background in BACKGROUNDS for _ in range(variants)], []
    for begin in tqdm(range(0, len(rows), 64), desc="encode"):
        batch = to_tensor(
            [compose(pictures[name], BACKGROUNDS[background], rng) for name, background in rows[begin : begin + 64]]
        )
        latents.append(vae.encode(batch.to(device)).latent_dist.mode().cpu())
    latents = torch.cat(latents)
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor, rows


def train_flux_transformer(transformer, clip, t5, tokenizers, latents, rows, minutes, device, rng, save):
    parameters = [p for model in (transformer, clip, t5) for p in model.parameters()]
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.01)
    height = latents.shape[-1] // 2
    packed = latents.reshape(-1, 16, height, 2, height, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, height**2, 64)
    image_ids = FluxPipeline._prepare_latent_image_ids(1, height, height, device, torch.float32)
    text_ids = torch.zeros(TEXT_LENGTH, 3, device=device)
    sequences = {
        (name, background, template): template.format(name=name, background=background)
        for name, background in set(rows)
        for template in TEMPLATES
    }
    texts = list(sequences.values()) + [""]
    clip_ids, t5_ids = (
        tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt").input_ids
        for tokenizer in tokenizers
    )
    index_of = {key: index for index, key in enumerate(sequences)}
    start, bar, step, losses = time.time(), tqdm(total=round(minutes * 60), desc="FLUX", unit="s"), 0, []
    last_save = start
    while (elapsed := time.time() - start) < minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, (step + 1) / 300) * max(0.02, 1 - elapsed / (minutes * 60))
        chosen = torch.randint(len(rows), (BATCH,))
        text = torch.tensor(
            [
                len(texts) - 1 if rng.random() < 0.1 else index_of[(*rows[i], rng.choice(TEMPLATES))]
                for i in chosen.tolist()
            ]
        )
        clean, noise = packed[chosen].to(device), torch.randn(BATCH, height**2, 64, device=device)
        sigma = torch.sigmoid(torch.randn(BATCH, device=device))
        sigma = 3 * sigma / (1 + 2 * sigma)
        noisy = (1 - sigma.view(-1, 1, 1)) * clean + sigma.view(-1, 1, 1) * noise
        with torch.autocast(device, torch.bfloat16):
            prompt = t5(t5_ids[text].to(device))[0]
            pooled = clip(clip_ids[text].to(device)).pooler_output
            velocity = transformer(
                hidden_states=noisy,
                encoder_hidden_states=prompt,
                pooled_projections=pooled,
                timestep=sigma,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        decay = min(0.9995, (step + 1) / (step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
        if step % 20 == 0:
            bar.n = min(bar.total, round(elapsed))
            bar.set_postfix(step=step, loss=f"{np.mean(losses[-500:]):.4f}")
        if time.time() - last_save > 600:
            last_save = time.time()
            with_ema(parameters, ema, save)
    bar.close()
    with_ema(parameters, ema, save)
    return step, float(np.mean(losses[-500:]))


def with_ema(parameters, ema, action):
    """Run `action` while the averaged weights stand in for the trained ones."""
    trained = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, ema)
        action()
        torch._foreach_copy_(parameters, trained)


def save_flux(folder, vae, transformer, clip, t5):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=75, help="training time of the transformer")
    parser.add_argument("--vae_minutes", type=float, default=12)
    parser.add_argument("--vae", type=Path, help="folder of a trained VAE, to train the rest only")
    parser.add_argument(
        "--start", type=Path, help="folder of a trained model, to go on from its weights and tokenizers"
    )
    parser.add_argument("--variants", type=int, default=8, help="placements of each glyph on each background")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model")
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = random.Random(0)
    pictures = render_glyphs()
    captions = [
        template.format(name=name, background=background)
        for name in pictures
        for background in BACKGROUNDS
        for template in TEMPLATES
    ]
    building = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    if args.start:
        for name in ("tokenizer", "tokenizer_2"):
            shutil.copytree(args.start / name, building / name)
        tokenizers = (
            CLIPTokenizerFast.from_pretrained(building / "tokenizer"),
            T5TokenizerFast.from_pretrained(building / "tokenizer_2"),
        )
    else:
        tokenizers = build_tokenizers(building, captions)
    vae, transformer, clip, t5 = build_models(len(tokenizers[0]), len(tokenizers[1]))
    if args.start:
        for model, name in ((transformer, "transformer"), (clip, "text_encoder"), (t5, "text_encoder_2")):
            model.load_state_dict(
                type(model).from_pretrained(args.start / name, torch_dtype=torch.float32).state_dict()
            )
        args.vae = args.vae or args.start / "vae"
    for model in (vae, transformer, clip, t5):
        model.to(args.device)
    print(
        f"{len(pictures)} glyphs; transformer {sum(p.numel() for p in transformer.parameters()) / 1e6:.2f} M, "
        f"VAE {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters",
        flush=True,
    )
    if args.vae:
        vae.load_state_dict(AutoencoderKL.from_pretrained(args.vae).state_dict())
    else:
        train_image_vae(vae, pictures, args.vae_minutes, args.device, rng)
        vae.save_pretrained(building / "vae")
    latents, rows = encode_pictures(vae, pictures, args.variants, args.device, rng)
    step, loss = train_flux_transformer(
        transformer,
        clip,
        t5,
        tokenizers,
        latents,
        rows,
        args.minutes,
        args.device,
        rng,
        lambda: save_flux(building, vae, transformer, clip, t5),
    )
    (building / "training.json").write_text(
        json.dumps(
            {
                "glyphs": len(pictures),
                "latents": len(rows),
                "vae": str(args.vae) if args.vae else f"{args.vae_minutes} minutes",
                "start": str(args.start or ""),
                "minutes": args.minutes,
                "steps": step,
                "batch": BATCH,
                "loss": round(loss, 5),
                "device": args.device,
                "date": time.strftime("%Y-%m-%d"),
            },
            indent=2,
        )
        + "\n",
        encoding="utf-8",
    )
    shutil.rmtree(args.out, ignore_errors=True)
    building.rename(args.out)


if __name__ == "__main__":
    main()
