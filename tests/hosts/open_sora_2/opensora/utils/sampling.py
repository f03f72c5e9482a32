import random
from dataclasses import dataclass

import torch
from open_sora_toys import WIDTH, MMDiT, decoded, pixels_of


@dataclass
class SamplingOption:
    width: int
    height: int
    num_frames: int = 1
    num_steps: int = 50
    guidance: float = 4.0
    seed: int | None = None


def sanitize_sampling_option(option):
    return option


def get_schedule(steps, shift):
    levels = torch.linspace(1, 0, steps + 1)
    return (shift * levels / (1 + (shift - 1) * levels)).tolist()


class Decoder(torch.nn.Module):
    def decode(self, latents):
        decoded.append(latents.clone())
        return pixels_of(latents[:, :, :3].transpose(1, 2).unflatten(2, (-1, 2, 4)))


def prepare_models(cfg, device, dtype, offload_model=False):
    pictures = {"img_flux": MMDiT(seed=1), "img_flux_ae": Decoder()} if cfg.get("use_t2i2v") else {}
    model = MMDiT(seed=cfg.get("weights", 0))
    if cfg.get("lora"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["own"], init_lora_weights=False))
    return model, Decoder(), None, None, pictures


def prepare_api(model, model_ae, model_t5, model_clip, optional_models):
    @torch.inference_mode()
    def api_fn(opt, cond_type="t2v", seed=None, text=None, channel=8, **batch):
        if seed is None:
            seed = opt.seed if opt.seed is not None else random.randint(0, 2**32 - 1)
        made = torch.Generator().manual_seed(seed)
        img = torch.randn(1, 8 * opt.num_frames, channel, generator=made)
        texts = torch.randn(3, 6, WIDTH, generator=torch.Generator().manual_seed(len(text[0])))
        cond = torch.zeros(3, img.shape[1], channel + 4)
        if cond_type != "t2v" and "ref" in batch:
            cond[:2, :8] = float(batch.pop("ref")[0] != "")
        picture = model is optional_models.get("img_flux")
        timesteps = get_schedule(opt.num_steps, 3.0)
        for here, there in zip(timesteps[:-1], timesteps[1:]):
            both = img if picture else torch.cat([img, img, img])
            level = torch.full((len(both),), here, dtype=img.dtype)
            pred = model(
                img=both,
                img_ids=None,
                txt=texts[: len(both)],
                txt_ids=None,
                timesteps=level,
                y_vec=texts[: len(both)].mean(1),
                cond=None if picture else cond,
                guidance=level,
            )
            if not picture:
                given, without, neither = pred.chunk(3)
                pred = neither + 2 * (without - neither) + opt.guidance * (given - without)
            img = img + (there - here) * pred
        return model_ae.decode(img)

    return api_fn
