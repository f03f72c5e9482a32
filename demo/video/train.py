"""Train the bundled demo video model: a small Wan that draws moving emoji, in the ordinary diffusers folder format.

    python demo/video/train.py                     # about two hours on two CPU cores; writes demo/video/model
    python demo/video/train.py --work training     # keeps its state there: the same command goes on after a stop

Data: `clips.py`, from the glyphs of Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from pathlib import Path

import clips
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm import tqdm
from transformers import T5TokenizerFast, UMT5Config, UMT5EncoderModel

CHANNELS, TEXT_WIDTH, TEXT_LENGTH = 64, 64, 512
WORDS, SHIFT, DROPPED, BATCH = 16, 3.0, 0.12, 32
CELL, CHUNK = 16, 4  # pixels and frames of a latent
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------- data


def render_pool(variants: int, rng: random.Random) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """Clips as bytes, [clips, 3, FRAMES, SIZE, SIZE], and the words of each."""
    sprites = clips.render_sprites()
    rows = [
        (name, motion, background)
        for name in clips.OBJECTS
        for motion in clips.MOTIONS
        for background in clips.BACKGROUNDS
        for _ in range(variants)
    ]
    pool = torch.empty(len(rows), 3, clips.FRAMES, clips.SIZE, clips.SIZE, dtype=torch.uint8)
    for index, row in enumerate(tqdm(rows, desc="render", mininterval=5)):
        pool[index] = ((clips.clip(sprites, *row, rng) + 1) * 127.5).round().byte()
    return pool, rows


def floats(clips_as_bytes: torch.Tensor) -> torch.Tensor:
    return clips_as_bytes.float() / 127.5 - 1


def cells(batch: torch.Tensor) -> torch.Tensor:
    """[clips, 3, 1 + 4 k, H, W] as [clips, 1 + k, H / 16, W / 16, pixels of a cell]; the first frame fills a cell."""
    batch = torch.cat([batch[:, :, :1].expand(-1, -1, CHUNK, -1, -1), batch[:, :, 1:]], dim=2)
    count, _, frames, height, width = batch.shape
    parts = batch.reshape(count, 3, frames // CHUNK, CHUNK, height // CELL, CELL, width // CELL, CELL)
    return parts.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


class Latents:
    """What a latent holds: the leading principal components of a cell of 16 by 16 pixels and 4 frames.

    Half of the spread between the components is evened out, so that the noise of sampling hides fine detail first.
    """

    def __init__(self, pool: torch.Tensor, rng: random.Random):
        sample = cells(floats(pool[rng.sample(range(len(pool)), min(len(pool), 800))])).flatten(0, 3)
        self.mean = sample.mean(0)
        values, vectors = torch.linalg.eigh((sample - self.mean).T @ (sample - self.mean) / len(sample))
        self.basis = vectors.flip(1)[:, :CHANNELS].contiguous()
        spread = values.flip(0)[:CHANNELS].clamp(min=1e-6).sqrt()
        self.scale = spread.sqrt() * math.sqrt(spread.mean())  # the latents' variance is one on average

    def encode(self, batch: torch.Tensor) -> torch.Tensor:
        """Clips in -1..1 as latents [clips, CHANNELS, 1 + k, H / 16, W / 16]."""
        return (((cells(batch) - self.mean) @ self.basis) / self.scale).permute(0, 4, 1, 2, 3).contiguous()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The linear way back, which the VAE's decoder improves on."""
        parts = (latents.permute(0, 2, 3, 4, 1) * self.scale) @ self.basis.T + self.mean
        count, chunks, rows, columns, _ = parts.shape
        parts = parts.view(count, chunks, rows, columns, 3, CHUNK, CELL, CELL).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return parts.reshape(count, 3, chunks * CHUNK, rows * CELL, columns * CELL)[:, :, CHUNK - 1 :]


# ---------------------------------------------------------------------------------------------- models


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
        num_attention_heads=5,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=64,
        ffn_dim=480,
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
    words = sorted({"▁" + word.strip(",") for text in texts for word in text.split()})
    letters = "▁abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -50.0), *((word, -5.0) for word in words)]
    pieces += [(letter, -20.0) for letter in letters if letter not in words]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=2))
    unigram.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.decoder = decoders.Metaspace()
    unigram.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    unigram.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "extra_ids": 0,
        "model_max_length": TEXT_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
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


# ---------------------------------------------------------------------------------------------- optimizer


class Optimizer:
    """Muon for matrices and kernels, AdamW for the rest, on float32 copies of a model; keeps their moving average."""

    def __init__(self, named: list[tuple[str, torch.nn.Parameter]], muon, decay: float = 0.998):
        self.working = [p for _, p in named]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.working]
        # Muon takes matrices: a kernel is one, [out, in * taps].
        self.matrices = [
            (m, torch.nn.Parameter(m.detach().reshape(len(m), -1).clone()))
            for (name, p), m in zip(named, self.master)
            if muon(name, p)
        ]
        chosen = {id(m) for m, _ in self.matrices}
        rest = [m for m in self.master if id(m) not in chosen]
        self.muon = torch.optim.Muon(
            [flat for _, flat in self.matrices], lr=1e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self.average, self.decay, self.steps = [m.detach().clone() for m in self.master], decay, 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for working, master in zip(self.working, self.master):
            master.grad, working.grad = working.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master, 1.0)
        for master, flat in self.matrices:
            flat.grad = master.grad.reshape(len(master), -1)
        for optimizer in (self.muon, self.adamw):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
        for master, flat in self.matrices:
            master.copy_(flat.view_as(master))
        self.steps += 1
        decay = min(self.decay, (self.steps + 1) / (self.steps + 20))
        torch._foreach_lerp_(self.average, [m.detach() for m in self.master], 1 - decay)
        torch._foreach_copy_(self.working, [m.detach() for m in self.master])

    def state(self) -> dict:
        return {
            "master": self.master,
            "average": self.average,
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load(self, state: dict) -> None:
        torch._foreach_copy_(self.master, state["master"])
        torch._foreach_copy_(self.working, state["master"])
        torch._foreach_copy_(self.average, state["average"])
        for master, flat in self.matrices:
            flat.copy_(master.reshape(len(master), -1))
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
        self.steps = state["steps"]


# ---------------------------------------------------------------------------------------------- VAE


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """As the VAE decodes, without the clamp at its end, which lets no gradient through."""
    frames = []
    vae.clear_cache()
    latents = vae.post_quant_conv(latents)
    for index in range(latents.shape[2]):
        vae._conv_idx = [0]
        part = latents[:, :, index : index + 1]
        frames.append(vae.decoder(part, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=index == 0))
    vae.clear_cache()
    packed = torch.cat(frames, dim=2).float()
    count, _, length, height, width = packed.shape
    size = vae.config.patch_size
    # The VAE's own order of a patch's pixels: channel, column, row.
    pixels = packed.view(count, 3, size, size, length, height, width).permute(0, 1, 4, 5, 3, 6, 2)
    return pixels.reshape(count, 3, length, height * size, width * size)


def train_vae(vae: AutoencoderKLWan, pool: torch.Tensor, latents: torch.Tensor, minutes: float, folder: Path) -> dict:
    """The decoder learns to draw clips from slightly noisy latents; goes on from folder/vae.pt."""
    for layer in vae.decoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, torch.nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    named = [(n, p) for n, p in vae.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    optimizer = Optimizer(named, lambda name, p: p.ndim >= 4 and p.numel() > p.shape[1] and len(p) > 1, decay=0.99)
    spent, errors, kept = 0.0, [], folder / "vae.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=False)
        optimizer.load(state["optimizer"])
        spent, errors = state["spent"], state["errors"]
    torch.manual_seed(optimizer.steps)
    last = time.time()
    while True:
        now = time.time()
        spent, last = spent + now - last, now
        if optimizer.steps and (optimizer.steps % 100 == 0 or spent >= minutes * 60):
            torch.save({"optimizer": optimizer.state(), "spent": spent, "errors": errors}, kept.with_suffix(".part"))
            kept.with_suffix(".part").replace(kept)
        if spent >= minutes * 60:
            break
        # Mostly the first 9 frames of 8 clips; now and then all frames of 4.
        count, length = ((8, 3), (8, 3), (8, 3), (4, latents.shape[2]))[optimizer.steps % 4]
        chosen = torch.randint(len(pool), (count,))
        target = floats(pool[chosen][:, :, : CHUNK * length - 3])
        noisy = latents[chosen][:, :, :length]
        noisy = noisy + 0.06 * torch.randn_like(noisy)
        with torch.autocast("cpu", torch.bfloat16):
            output = decode(vae, noisy)
        edges = sum(F.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (3, 4))
        loss = F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges
        loss.backward()
        optimizer.step(3e-3 * min(1, (optimizer.steps + 1) / 50) * max(0.02, 1 - spent / (minutes * 60)))
        errors.append(F.mse_loss(output.detach().clamp(-1, 1), target).item() / 4)
        if optimizer.steps % 25 == 0:
            psnr = -10 * np.log10(np.mean(errors[-25:]))
            print(f"VAE step {optimizer.steps}, {spent / 60:.1f} min, {psnr:.2f} dB", flush=True)
    with torch.no_grad():
        torch._foreach_copy_(optimizer.working, optimizer.average)
    return {"steps": optimizer.steps, "psnr": round(-10 * float(np.log10(np.mean(errors[-200:]))), 2)}


# ---------------------------------------------------------------------------------------------- transformer


class Attention:
    """The attention of Wan's blocks for training on a CPU: bfloat16 projections, float32 attention.

    Wan fills prompts up to 512 tokens with zeros. All of these have one key and one value, so that one token
    stands for the rest: `bias` [batch, 1, 1, tokens] adds the logarithm of their number to its score.
    """

    bias = None

    def __call__(self, attention, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attention.norm_q(attention.to_q(hidden_states)).unflatten(2, (attention.heads, -1)).float()
        key = attention.norm_k(attention.to_k(context)).unflatten(2, (attention.heads, -1)).float()
        value = attention.to_v(context).unflatten(2, (attention.heads, -1)).float()
        if rotary_emb is not None:
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]

            def turned(x):
                even, odd = x[..., 0::2], x[..., 1::2]
                return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

            query, key = turned(query), turned(key)
        mixed = F.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value)),
            attn_mask=None if encoder_hidden_states is None else Attention.bias,
        )
        return attention.to_out[0](mixed.transpose(1, 2).flatten(2).type_as(hidden_states))


class Prompts:
    """The embeddings of all captions and of no caption at all."""

    def __init__(self, tokenizer, encoder):
        self.index, texts = {}, [""]
        for name in clips.OBJECTS:
            for motion in clips.MOTIONS:
                for background in clips.BACKGROUNDS:
                    for number, template in enumerate(clips.TEMPLATES):
                        self.index[name, motion, background, number] = len(texts)
                        texts.append(clips.caption(name, motion, background, template))
        tokens = tokenizer(texts, padding="max_length", max_length=WORDS, return_tensors="pt")
        self.lengths = tokens.attention_mask.sum(1)
        assert self.lengths.max() < WORDS
        with torch.no_grad():
            self.embeddings = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        self.embeddings *= tokens.attention_mask[:, :, None]

    def batch(self, rows, rng: random.Random):
        """Embeddings [batch, WORDS, width] and the bias that makes them as long as a pipeline's prompts."""
        chosen = torch.tensor(
            [0 if rng.random() < DROPPED else self.index[(*row, rng.randrange(len(clips.TEMPLATES)))] for row in rows]
        )
        lengths = self.lengths[chosen]
        total = (
            TEXT_LENGTH if rng.random() < 0.6 else int(math.exp(rng.uniform(math.log(WORDS), math.log(TEXT_LENGTH))))
        )
        filling = torch.log((total - lengths) / (WORDS - lengths))[:, None]
        bias = torch.where(torch.arange(WORDS) < lengths[:, None], 0.0, filling)
        return self.embeddings[chosen], bias[:, None, None]


def train_transformer(latents, rows, prompts: Prompts, minutes: float, folder: Path, seed: int, save) -> dict:
    """Rectified flow matching; state is kept in folder/transformer.pt every three minutes, from which it goes on."""
    torch.manual_seed(seed)
    model = build_transformer().to(torch.bfloat16)
    model.set_attn_processor(Attention())
    optimizer = Optimizer(list(model.named_parameters()), lambda name, p: name.startswith("blocks.") and p.ndim == 2)
    spent, losses, kept = 0.0, [], folder / "transformer.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=False)
        optimizer.load(state["optimizer"])
        spent, losses = state["spent"], state["losses"]
    torch.manual_seed(seed + optimizer.steps)
    rng = random.Random(seed + optimizer.steps)

    def keep():
        torch.save({"optimizer": optimizer.state(), "spent": spent, "losses": losses}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        full = build_transformer()
        with torch.no_grad():
            torch._foreach_copy_(list(full.parameters()), optimizer.average)
        save(full)

    last, kept_at = time.time(), time.time()
    while spent < minutes * 60:
        now = time.time()
        spent, last = spent + now - last, now
        rate = 2e-3 * min(1, (optimizer.steps + 1) / 100) * max(0.01, 1 - spent / (minutes * 60))
        chosen = torch.randint(len(rows), (BATCH,))
        clean = latents[chosen]
        noise = torch.randn_like(clean)
        sigma = torch.sigmoid(torch.randn(BATCH))
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        level = sigma.view(-1, 1, 1, 1, 1)
        text, Attention.bias = prompts.batch([rows[index] for index in chosen.tolist()], rng)
        velocity = model(
            hidden_states=((1 - level) * clean + level * noise).to(torch.bfloat16),
            timestep=sigma * 1000,
            encoder_hidden_states=text.to(torch.bfloat16),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        loss.backward()
        optimizer.step(rate)
        losses.append(loss.item())
        if optimizer.steps % 50 == 0:
            print(
                f"step {optimizer.steps}, {spent / 60:.1f} min, loss {np.mean(losses[-50:]):.4f}, "
                f"last 300 {np.mean(losses[-300:]):.4f}",
                flush=True,
            )
        if now - kept_at > 180:
            kept_at = now
            keep()
    keep()
    return {"steps": optimizer.steps, "loss": round(float(np.mean(losses[-300:])), 5)}


# ---------------------------------------------------------------------------------------------- the folder


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
    (part / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time of the transformer")
    parser.add_argument("--vae_minutes", type=float, default=25, help="training time of the VAE's decoder")
    parser.add_argument("--variants", type=int, default=14, help="clips of each object, motion and background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for the state, about 1.5 GB")
    parser.add_argument("--output", type=Path, default=HERE / "model")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    pool, rows = render_pool(args.variants, random.Random(0))
    linear = Latents(pool, random.Random(0))
    latents = torch.cat([linear.encode(floats(part)) for part in pool.split(128)])
    tokenizer = build_tokenizer(args.work / "tokenizer")
    encoder = build_text_encoder(len(tokenizer))
    prompts = Prompts(tokenizer, encoder)
    torch.manual_seed(0)
    vae = build_vae()
    drawn = train_vae(vae, pool, latents, args.vae_minutes, args.work)
    trained = train_transformer(
        latents,
        rows,
        prompts,
        args.minutes,
        args.work,
        args.seed,
        lambda transformer: save_model(args.output, transformer, vae, encoder),
    )
    card = {"clips": len(pool), "vae": drawn, "transformer": trained, "date": time.strftime("%Y-%m-%d")}
    (args.output / "training.json").write_text(json.dumps(card, indent=2) + "\n")


if __name__ == "__main__":
    main()
