"""Train the bundled demo video model: a small Wan that draws moving emoji, in the ordinary diffusers folder format.

    python demo/video/train.py --device cuda       # about nine minutes of a large GPU; writes demo/video/model
    python demo/video/train.py                     # on a CPU: a rougher one, in an hour and a half
    python demo/video/train.py --work training     # keeps its state there: the same command goes on after a stop

With --expert_minutes, two experts are fine-tuned from it, as LoRAs, for the noise levels above and below the boundary
of Wan2.2: demo/video/experts.

Data: `clips.py`, from the glyphs of Debian's `fonts-noto-color-emoji` (SIL Open Font License 1.1).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import clips
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from latents import Latents, floats
from optimizer import Optimizer
from structure import (
    CHUNK,
    EXPERTS,
    SHIFT,
    TEXT_LENGTH,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
    save_model,
)
from tqdm import tqdm

WORDS, DROPPED = 16, 0.12
LORA = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------- data


def render_pool(
    variants: int, rng: random.Random, font: str, device: torch.device
) -> tuple[torch.Tensor, list[tuple[str, str, str]]]:
    """Clips as bytes, [clips, 3, FRAMES, SIZE, SIZE], and the words of each."""
    sprites = {name: sprite.to(device) for name, sprite in clips.render_sprites(font).items()}
    rows = [
        (name, motion, background)
        for name in clips.OBJECTS
        for motion in clips.MOTIONS
        for background in clips.BACKGROUNDS
        for _ in range(variants)
    ]
    pool = torch.empty(len(rows), 3, clips.FRAMES, clips.SIZE, clips.SIZE, dtype=torch.uint8, device=device)
    for first in tqdm(range(0, len(rows), 64), desc="render", mininterval=5):
        pool[first : first + 64] = (
            ((clips.rendered_clips(rows[first : first + 64], sprites, rng) + 1) * 127.5).round().byte()
        )
    return pool, rows


class TrainingTime:
    """Seconds of training, over stops."""

    def __init__(self, spent: float, minutes: float):
        self.spent, self.whole, self.last = spent, minutes * 60, time.time()

    def share(self) -> float:
        """What is spent of the whole; 1: it is over."""
        now = time.time()
        self.spent, self.last = self.spent + now - self.last, now
        return min(1.0, self.spent / self.whole) if self.whole else 1.0


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


def train_vae(
    vae: AutoencoderKLWan, pool: torch.Tensor, latents: torch.Tensor, minutes: float, batch: int, folder: Path
) -> dict:
    """The decoder learns to draw clips from slightly noisy latents; goes on from folder/vae.pt."""
    device = pool.device
    vae.to(device)
    for layer in vae.decoder.modules():
        if isinstance(layer, torch.nn.Conv3d):
            layer.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, torch.nn.Conv2d):
            layer.to(memory_format=torch.channels_last)
    named = [(n, p) for n, p in vae.named_parameters() if n.startswith(("decoder.", "post_quant_conv."))]
    optimizer = Optimizer(named, lambda name, p: p.ndim >= 4 and p.numel() > p.shape[1] and len(p) > 1, decay=0.99)
    clock, errors, kept = TrainingTime(0.0, minutes), [], folder / "vae.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=False, map_location=device)
        optimizer.load(state["optimizer"])
        clock.spent, errors = state["spent"], state["errors"]
    torch.manual_seed(optimizer.steps)
    while True:
        share = clock.share()
        if optimizer.steps and (optimizer.steps % 100 == 0 or share >= 1):
            errors = [float(error) for error in errors]
            torch.save(
                {"optimizer": optimizer.state(), "spent": clock.spent, "errors": errors}, kept.with_suffix(".part")
            )
            kept.with_suffix(".part").replace(kept)
        if share >= 1:
            break
        # Mostly the first 9 frames of a batch; now and then all frames of half of it.
        whole = optimizer.steps % 4 == 3
        count, length = (batch // 2, latents.shape[2]) if whole else (batch, 3)
        chosen = torch.randint(len(pool), (count,), device=device)
        target = floats(pool[chosen][:, :, : CHUNK * length - 3])
        noisy = latents[chosen][:, :, :length]
        noisy = noisy + 0.06 * torch.randn_like(noisy)
        with torch.autocast(device.type, torch.bfloat16):
            output = decode(vae, noisy)
        edges = sum(F.l1_loss(output.diff(dim=axis), target.diff(dim=axis)) for axis in (3, 4))
        loss = F.l1_loss(output, target) + F.mse_loss(output, target) + 0.5 * edges
        loss.backward()
        optimizer.step(3e-3 * min(1, (optimizer.steps + 1) / 50) * max(0.02, 1 - share))
        errors.append(F.mse_loss(output.detach().clamp(-1, 1), target) / 4)
        if optimizer.steps % 25 == 0:
            psnr = -10 * math.log10(np.mean([float(error) for error in errors[-25:]]))
            print(f"VAE step {optimizer.steps}, {clock.spent / 60:.1f} min, {psnr:.2f} dB", flush=True)
    with torch.no_grad():
        for working, average in zip(optimizer.working, optimizer.average):
            working.copy_(average)
    return {"steps": optimizer.steps, "batch": batch, "psnr": round(-10 * math.log10(np.mean(errors[-200:])), 2)}


# ---------------------------------------------------------------------------------------------- transformer


class Attention:
    """The attention of Wan's blocks for training: bfloat16 projections, on a CPU float32 attention.

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
        kind = torch.float32 if query.device.type == "cpu" else torch.bfloat16
        mixed = F.scaled_dot_product_attention(
            *(part.transpose(1, 2).to(kind) for part in (query, key, value)),
            attn_mask=None if encoder_hidden_states is None else Attention.bias.to(kind),
        )
        return attention.to_out[0](mixed.transpose(1, 2).flatten(2).type_as(hidden_states))


class Prompts:
    """The embeddings of all captions and of no caption at all, and which caption says what a clip shows."""

    def __init__(self, tokenizer, encoder, rows: list[tuple[str, str, str]], device: torch.device):
        said = list(dict.fromkeys(rows))
        texts = ["", *(clips.caption(*words, template) for words in said for template in clips.TEMPLATES)]
        tokens = tokenizer(texts, padding="max_length", max_length=WORDS, return_tensors="pt")
        lengths = tokens.attention_mask.sum(1)
        assert lengths.max() < WORDS
        with torch.no_grad():
            parts = zip(tokens.input_ids.split(256), tokens.attention_mask.split(256))
            embeddings = torch.cat([encoder(ids, mask).last_hidden_state for ids, mask in parts])
        self.embeddings = (embeddings * tokens.attention_mask[:, :, None]).to(device)
        self.lengths = lengths.to(device)
        place = {words: index for index, words in enumerate(said)}
        self.of_row = torch.tensor([place[words] for words in rows], device=device)

    def batch(self, rows: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [batch, WORDS, width] and the bias that makes them as long as a pipeline's prompts."""
        templates = len(clips.TEMPLATES)
        chosen = 1 + self.of_row[rows] * templates + torch.randint(templates, rows.shape, device=rows.device)
        chosen = torch.where(torch.rand(rows.shape, device=rows.device) < DROPPED, 0, chosen)
        lengths = self.lengths[chosen]
        total = (
            TEXT_LENGTH if rng.random() < 0.6 else int(math.exp(rng.uniform(math.log(WORDS), math.log(TEXT_LENGTH))))
        )
        filling = torch.log((total - lengths) / (WORDS - lengths))[:, None]
        bias = torch.where(torch.arange(WORDS, device=rows.device) < lengths[:, None], 0.0, filling)
        return self.embeddings[chosen], bias[:, None, None]


class Velocity(torch.nn.Module):
    """A transformer with the arguments that a CUDA graph takes."""

    def __init__(self, transformer: WanTransformer3DModel):
        super().__init__()
        self.transformer = transformer

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, bias: torch.Tensor):
        Attention.bias = bias
        # A CUDA graph must cast the weights itself, not find them cast.
        with torch.autocast(noisy.device.type, torch.bfloat16, cache_enabled=False):
            return self.transformer(noisy, timesteps, text, return_dict=False)[0]


class FlowMatching:
    """Rectified flow matching: batches of the clips, at noise levels from low to high."""

    def __init__(self, latents, prompts: Prompts, batch: int, rng: random.Random, low: float = 0.0, high: float = 1.0):
        self.latents, self.prompts, self.batch, self.rng, self.low, self.high = latents, prompts, batch, rng, low, high

    def levels(self) -> torch.Tensor:
        """[batch] noise levels, logit-normal and shifted, within low..high."""
        unshift = [level / (SHIFT - (SHIFT - 1) * level) for level in (self.low, self.high)]
        low, high = (torch.special.ndtr(torch.logit(torch.tensor(edge))) for edge in unshift)
        drawn = low + (high - low) * torch.rand(self.batch, device=self.latents.device)
        sigma = torch.sigmoid(torch.special.ndtri(drawn.clamp(1e-4, 1 - 1e-4)))
        return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)

    def inputs(self, kind: torch.dtype):
        """(what a `Velocity` takes, the velocity it should give)"""
        rows = torch.randint(len(self.latents), (self.batch,), device=self.latents.device)
        clean, sigma = self.latents[rows], self.levels()
        noise, level = torch.randn_like(clean), sigma.view(-1, 1, 1, 1, 1)
        text, bias = self.prompts.batch(rows, self.rng)
        noisy = (1 - level) * clean + level * noise
        return (noisy.to(kind), sigma * 1000, text.to(kind), bias), noise - clean


def quick(model: Velocity, flow: FlowMatching, kind: torch.dtype) -> Velocity:
    """The model as CUDA graphs where there is a GPU: so small a one only waits for launches otherwise."""
    if flow.latents.device.type == "cuda":
        return torch.cuda.make_graphed_callables(model, flow.inputs(kind)[0])
    return model


def train_transformer(flow: FlowMatching, minutes: float, folder: Path, save) -> dict:
    """Keeps its state in folder/transformer.pt every three minutes, from which it goes on; `save` gets the model."""
    device = flow.latents.device
    model = build_transformer().to(device, torch.bfloat16)
    model.set_attn_processor(Attention())
    optimizer = Optimizer(list(model.named_parameters()), lambda name, p: name.startswith("blocks.") and p.ndim == 2)
    clock, losses, kept = TrainingTime(0.0, minutes), [], folder / "transformer.pt"
    if kept.exists():
        state = torch.load(kept, weights_only=False, map_location=device)
        optimizer.load(state["optimizer"])
        clock.spent, losses = state["spent"], state["losses"]
    torch.manual_seed(flow.rng.randrange(1000) + optimizer.steps)
    velocity = quick(Velocity(model), flow, torch.bfloat16)

    def keep():
        losses[:] = [float(loss) for loss in losses]
        torch.save({"optimizer": optimizer.state(), "spent": clock.spent, "losses": losses}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
        full = build_transformer()
        with torch.no_grad():
            for parameter, average in zip(full.parameters(), optimizer.average):
                parameter.copy_(average)
        save(full)
        return full

    kept_at = time.time()
    while (share := clock.share()) < 1:
        inputs, target = flow.inputs(torch.bfloat16)
        loss = F.mse_loss(velocity(*inputs).float(), target)
        loss.backward()
        optimizer.step(2e-3 * min(1, (optimizer.steps + 1) / 100) * max(0.01, 1 - share))
        losses.append(loss.detach())
        if optimizer.steps % 100 == 0:
            recent = np.mean([float(loss) for loss in losses[-100:]])
            print(f"step {optimizer.steps}, {clock.spent / 60:.1f} min, loss {recent:.4f}", flush=True)
        if time.time() - kept_at > 180:
            keep()
            kept_at = time.time()
    full = keep()
    parts = np.array_split(losses, 20)
    return full, {
        "steps": optimizer.steps,
        "batch": flow.batch,
        "loss": round(float(np.mean(losses[-300:])), 5),
        "losses, 20 parts": [round(float(part.mean()), 4) for part in parts if len(part)],
    }


def train_expert(name: str, trained: WanTransformer3DModel, flow: FlowMatching, minutes: float, folder: Path) -> dict:
    """A LoRA of the trained model for the noise levels of `flow`, in diffusers' format: folder/name.safetensors."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    device = flow.latents.device
    model = build_transformer()
    model.load_state_dict(trained.state_dict())
    model.requires_grad_(False).to(device)
    model.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=list(LORA)))
    model.set_attn_processor(Attention())
    velocity = Velocity(model)
    velocity = quick(velocity, flow, torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    clock, losses = TrainingTime(0.0, minutes), []
    while (share := clock.share()) < 1:
        inputs, target = flow.inputs(torch.float32)
        loss = F.mse_loss(velocity(*inputs).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (len(losses) + 1) / 50) * max(0.01, 1 - share)
        optimizer.step()
        losses.append(loss.detach())
    layers = {key: value.half().cpu().contiguous() for key, value in get_peft_model_state_dict(model).items()}
    WanPipeline.save_lora_weights(folder, transformer_lora_layers=layers, weight_name=f"{name}.safetensors")
    ends = [round(float(torch.stack(part).mean()), 5) for part in (losses[:100], losses[-100:])]
    print(f"{name}: {len(losses)} steps, loss {ends[0]:.4f} to {ends[1]:.4f}", flush=True)
    return {"steps": len(losses), "batch": flow.batch, "loss, first and last 100": ends}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="training time of the transformer")
    parser.add_argument("--vae_minutes", type=float, default=25, help="training time of the VAE's decoder")
    parser.add_argument("--expert_minutes", type=float, default=0, help="training time of each of two experts")
    parser.add_argument("--batch", type=int, default=32, help="clips a step of the transformer; a GPU takes 256")
    parser.add_argument("--variants", type=int, default=5, help="clips of each object, motion and background")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--font", default=clips.FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder for the state")
    parser.add_argument("--output", type=Path, default=HERE / "model")
    parser.add_argument("--experts", type=Path, default=HERE / "experts")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.time()

    pool, rows = render_pool(args.variants, random.Random(0), args.font, args.device)
    linear = Latents(pool, random.Random(0))
    latents = torch.cat([linear.encode(floats(part)) for part in pool.split(128)])
    tokenizer = build_tokenizer(args.work / "tokenizer")
    encoder = build_text_encoder(len(tokenizer))
    prompts = Prompts(tokenizer, encoder, rows, args.device)
    torch.manual_seed(args.seed)
    vae = build_vae()
    drawn = train_vae(vae, pool, latents, args.vae_minutes, max(8, args.batch // 8), args.work)
    flow = FlowMatching(latents, prompts, args.batch, random.Random(args.seed))
    full, trained = train_transformer(
        flow, args.minutes, args.work, lambda transformer: save_model(args.output, transformer, vae, encoder)
    )
    device = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    card = {"device": device, "clips": len(pool), "vae": drawn, "transformer": trained}
    if args.expert_minutes:
        for name, (low, high) in EXPERTS.items():
            part = FlowMatching(latents, prompts, args.batch, random.Random(args.seed), low, high)
            card[name] = train_expert(name, full, part, args.expert_minutes, args.experts)
    card |= {"minutes": round((time.time() - started) / 60, 1), "date": time.strftime("%Y-%m-%d")}
    (args.output / "training.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
