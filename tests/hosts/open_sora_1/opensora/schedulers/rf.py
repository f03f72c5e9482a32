import torch


class RFLOW:
    def __init__(self, type, num_sampling_steps=10, cfg_scale=4.0):
        self.num_sampling_steps, self.cfg_scale, self.num_timesteps = num_sampling_steps, cfg_scale, 1000

    def sample(self, model, text_encoder, z, prompts, device, additional_args=None, mask=None, progress=True):
        model_args = {"y": text_encoder(prompts), **(additional_args or {})}
        timesteps = [
            torch.tensor([(1 - i / self.num_sampling_steps) * 1000.0] * len(z)) for i in range(self.num_sampling_steps)
        ]
        timesteps = [1000 * 4 * t / (1000 + 3 * t) for t in timesteps]
        noise_added = None if mask is None else mask == 1
        for i, t in enumerate(timesteps):
            if mask is not None:
                free = mask * 1000 >= t[:, None]
                model_args["x_mask"] = free.repeat(2, 1)
                held = z.clone()
                noisy = held + torch.randn_like(held) * (t / 1000)[:, None, None, None, None]
                z = torch.where((free & ~noise_added)[:, None, :, None, None], noisy, held)
                noise_added = free
            pred = model(torch.cat([z, z]), torch.cat([t, t]), **model_args).chunk(2, dim=1)[0]
            cond, uncond = pred.chunk(2)
            dt = (t - timesteps[i + 1] if i < len(timesteps) - 1 else t) / 1000
            z = z + (uncond + self.cfg_scale * (cond - uncond)) * dt[:, None, None, None, None]
            if mask is not None:
                z = torch.where(free[:, None, :, None, None], z, held)
        return z
