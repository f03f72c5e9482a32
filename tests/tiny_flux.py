"""A tiny FLUX transformer, a plain sampler that drives it as FluxPipeline does, and hooks that say which blocks ran."""

import torch
from diffusers import FluxTransformer2DModel

from common.hosts.diffusers import FLUX
from common.ratios import flow_sigmas
from common.tables import RatioTable

CHANNELS, TEXT_TOKENS, TEXT_WIDTH = 16, 8, 32


# Both branches shrink a little at each step, not equally, so that plans have runs of reuse and depend on the noise
# levels.
RATIOS = RatioTable(
    name="tiny",
    origin="measured",
    sigmas=tuple(flow_sigmas(28, 3.0)),
    mag_ratios={"cond": [1.0] + [0.98] * 27, "uncond": [1.0] + [0.97] * 27},
    sampler={"shift": 3.0},
)


def tiny_flux(cls=FluxTransformer2DModel, seed=0):
    torch.manual_seed(seed)
    return (
        cls(
            in_channels=CHANNELS,
            num_layers=2,
            num_single_layers=3,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        .eval()
        .requires_grad_(False)
    )


class Euler:
    """Euler sampler with sequential true CFG. `timesteps` is a new tensor for each run, as in a diffusers scheduler.

    `step` and `branch` tell a test which call is under way.
    """

    def __init__(self, model):
        self.model, self.timesteps, self.step, self.branch = model, None, None, None

    def run(self, **options):
        *_, latents = self.iterate(**options)
        return latents

    def iterate(self, steps=12, size=64, batch=1, cfg=False, shift=3.0, seed=0, prompt=0, start=0, extra=None):
        """Yields the latents after each step.

        cfg: also a function of the step; start: first step (image-to-image); extra: function of the step and branch,
        more keywords for the model.
        """
        noise, text = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(1000 + prompt)
        dtype = self.model.dtype
        latents = torch.randn(batch, size, CHANNELS, generator=noise).to(dtype)
        prompts = torch.randn(2, batch, TEXT_TOKENS, TEXT_WIDTH, generator=text).to(dtype)
        pooled = torch.randn(2, batch, TEXT_WIDTH, generator=text).to(dtype)
        side = torch.arange(size)
        img_ids = torch.stack([torch.zeros(size), side // 8, side % 8], dim=1).to(dtype)
        sigmas = torch.tensor([*flow_sigmas(steps, shift), 0.0], dtype=torch.float32)
        self.timesteps = sigmas[:-1] * 1000
        for self.step in range(start, steps):
            velocity = []
            guided = cfg(self.step) if callable(cfg) else cfg
            for self.branch in range(2 if guided else 1):
                velocity.append(
                    self.model(
                        hidden_states=latents,
                        timestep=self.timesteps[self.step].expand(batch).to(dtype) / 1000,
                        guidance=torch.full((batch,), 3.5, dtype=dtype),
                        pooled_projections=pooled[self.branch],
                        encoder_hidden_states=prompts[self.branch],
                        txt_ids=torch.zeros(TEXT_TOKENS, 3, dtype=dtype),
                        img_ids=img_ids,
                        joint_attention_kwargs=None,
                        return_dict=False,
                        **(extra(self.step, self.branch) if extra else {}),
                    )[0]
                )
            output = velocity[1] + 2.0 * (velocity[0] - velocity[1]) if guided else velocity[0]
            latents = (latents.float() + (sigmas[self.step + 1] - sigmas[self.step]) * output.float()).to(dtype)
            yield latents


class Executed:
    """Which blocks each call of the model entered, told by forward hooks: `calls` has one list of names a call."""

    def __init__(self, model):
        self.calls = []
        model.register_forward_pre_hook(lambda module, args: self.calls.append([]))
        for name in FLUX.blocks:
            for index, block in enumerate(getattr(model, name)):
                block.register_forward_pre_hook(
                    lambda module, args, name=f"{name}.{index}": self.calls[-1].append(name)
                )

    @property
    def strip(self):
        """As `Schedule.strip`, one letter a call: # every block ran once, . none did."""
        every = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(3)]
        assert all(blocks in ([], every) for blocks in self.calls)
        return "".join("#" if blocks else "." for blocks in self.calls)
