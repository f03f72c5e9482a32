"""hunyuan_checks.py on the transformer of a checkout, in a process of its own, since all of them call their package
hyvideo:

hunyuan15_cpu.py hunyuan_subjects.py 1.5
hunyuan_cpu.py hunyuan_subjects.py token_replace|latent_concat"""

import sys
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(REPOSITORY))

from hunyuan_checks import (  # noqa: E402
    test_hunyuans_residual_of_the_same_step_gives_full_computation,
    test_hunyuans_reused_steps_equal_the_oracle,
    test_off_is_the_untouched_hunyuan,
)
from hunyuan_helpers import HunyuanSubject  # noqa: E402

from common.hosts.checkouts import HUNYUANVIDEO_15_CHECKOUT, HUNYUANVIDEO_CHECKOUT  # noqa: E402
from common.schedule import Settings  # noqa: E402


class Hunyuan15(HunyuanSubject):
    """HunyuanVideo_1_5_DiffusionTransformer, as text-to-video calls it."""

    exact = torch.float32, 1e-4

    def __init__(self, task):
        import hunyuan15_cpu

        super().__init__(
            hunyuan15_cpu.tiny_hunyuan15(),
            HUNYUANVIDEO_15_CHECKOUT,
            channels=8,
            text_width=48,
        )

    def velocity(self, latents, timestep, text, pooled):
        batch = len(latents)
        return self.model(
            torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1),
            timestep,
            text,
            None,
            (torch.arange(text.shape[1]) < 4).long().repeat(batch, 1),
            vision_states=torch.zeros(batch, 729, 1152),
            extra_kwargs={
                "byt5_text_states": torch.zeros(batch, 16, 1472),
                "byt5_text_mask": torch.zeros(batch, 16, dtype=torch.int64),
            },
        )[0]


class HunyuanI2V(HunyuanSubject):
    """HYVideoDiffusionTransformer of HunyuanVideo-I2V with the picture as the first frame's tokens, or as channels."""

    exact = torch.float32, 1e-4

    def __init__(self, condition):
        import hunyuan_cpu

        self.condition = condition
        super().__init__(
            hunyuan_cpu.tiny_hunyuan(condition),
            HUNYUANVIDEO_CHECKOUT,
            channels=16,
            text_width=4096,
            pooled_width=768,
        )
        self.picture = torch.randn(1, 16, 1, 8, 12, generator=torch.Generator().manual_seed(5))

    def velocity(self, latents, timestep, text, pooled):
        from hyvideo.modules.posemb_layers import get_nd_rotary_pos_embed

        picture = self.picture.repeat(len(latents), 1, 1, 1, 1)
        if self.condition == "token_replace":
            given = torch.cat([picture, latents[:, :, 1:]], dim=2)
        else:
            given = torch.cat(
                [latents, picture.repeat(1, 1, latents.shape[2], 1, 1), torch.zeros_like(latents[:, :1])], dim=1
            )
        sizes = [latents.shape[2], *(size // 2 for size in latents.shape[3:])]
        cos, sin = get_nd_rotary_pos_embed(
            self.model.rope_dim_list, sizes, theta=256, use_real=True, theta_rescale_factor=1
        )
        return self.model(
            given,
            timestep,
            text_states=text,
            text_mask=(torch.arange(text.shape[1]) < 4).long().repeat(len(text), 1),
            text_states_2=pooled,
            freqs_cos=cos,
            freqs_sin=sin,
            guidance=torch.full((len(latents),), 6000.0),
            return_dict=True,
        )["x"]


if __name__ == "__main__":
    name = sys.argv[1]
    make = Hunyuan15 if name == "1.5" else HunyuanI2V
    if name == "1.5":
        from hyvideo.commons.parallel_states import initialize_parallel_state

        initialize_parallel_state()
    with torch.no_grad():
        test_off_is_the_untouched_hunyuan(make(name), Settings(0.0, 6, 0.2))
        for run in ({}, {"cfg": True}, {"steps": 17, "shift": 5.0}):
            test_hunyuans_reused_steps_equal_the_oracle(make(name), run)
        test_hunyuans_residual_of_the_same_step_gives_full_computation(make(name))
    print("passed")
