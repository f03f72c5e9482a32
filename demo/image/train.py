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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from glyphs import BACKGROUNDS, TEMPLATES, compose, render_glyphs, to_tensor
from small_flux import TEXT_LENGTH, build_models, build_tokenizers, save_flux
from tqdm import tqdm
from transformers import CLIPTokenizerFast, T5TokenizerFast

BATCH = 48


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
