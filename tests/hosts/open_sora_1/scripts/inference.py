import argparse
import os
import runpy

import imageio
import numpy as np
import torch
from open_sora_toys import WIDTH, decoded, pixels_of
from opensora.models.stdit.stdit3 import STDiT3
from opensora.registry import Config
from opensora.schedulers.rf import RFLOW


class VAE(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def get_latent_size(self, size):
        return 5, 2, 4

    def decode(self, latents, num_frames=None):
        decoded.append(latents.clone())
        return pixels_of(latents[:, :3])


def texts(prompts):
    made = torch.Generator().manual_seed(sum(map(len, prompts)))
    return torch.randn(2 * len(prompts), 6, WIDTH, generator=made)


def parse_configs(training=False):
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--prompt", nargs="+")
    parser.add_argument("--loop", type=int, default=1)
    parser.add_argument("--num-frames")
    parser.add_argument("--save-dir")
    args = parser.parse_args()
    cfg = Config(runpy.run_path(args.config))
    cfg.update({key: value for key, value in vars(args).items() if value is not None})
    return cfg


def get_image_size(resolution, aspect_ratio):
    return 480, 854


def get_num_frames(frames):
    return int(frames)


def build_module(config, registry=None, **kwargs):
    builders = {"model": STDiT3, "vae": VAE}
    return RFLOW(**config) if registry == "scheduler" else builders[registry]()


def save_sample(x, save_path=None, fps=8, force_video=False, verbose=True):
    save_path += ".mp4"
    frames = ((x.permute(1, 2, 3, 0) + 1) * 127).numpy().astype(np.uint8)
    imageio.mimwrite(save_path, frames, fps=fps, macro_block_size=None)
    return save_path


def main():
    torch.set_grad_enabled(False)
    cfg = parse_configs(training=False)
    torch.manual_seed(cfg.seed)
    vae = build_module(cfg.vae, "vae").eval()
    model = build_module(cfg.model, "model").to("cpu", torch.bfloat16).eval()
    scheduler = build_module(cfg.scheduler, "scheduler")
    os.makedirs(cfg.save_dir, exist_ok=True)
    for index, prompt in enumerate(cfg.prompt):
        clips = []
        for loop in range(cfg.loop):
            z, mask = torch.randn(1, 4, *vae.get_latent_size(None), dtype=torch.bfloat16), None
            if loop:
                z[:, :, :2], mask = clips[-1][:, :, -2:], torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
            samples = scheduler.sample(
                model, texts, z=z, prompts=[prompt], device="cpu", additional_args={}, progress=False, mask=mask
            )
            clips.append(samples)
        video = torch.cat([vae.decode(clip.to(torch.bfloat16))[0] for clip in clips], dim=1)
        save_sample(video.float(), fps=24, save_path=os.path.join(cfg.save_dir, f"sample_{index:04d}"), verbose=False)


if __name__ == "__main__":
    main()
