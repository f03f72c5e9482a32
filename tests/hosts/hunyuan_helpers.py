"""A transformer shaped like that of HunyuanVideo's checkout, written for these tests, and diffusers' own, both with
random weights; the sampler that drives them; and what a drop-in left in its folder."""

import functools
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT
from common.hosts.diffusers import HUNYUANVIDEO
from common.patch import magcache_forward
from common.ratios import flow_sigmas
from common.schedule import Settings
from common.scripts.quality import read_frames
from common.tables import RatioTable

REPOSITORY = Path(__file__).resolve().parents[2]


GOLDEN = json.loads((REPOSITORY / "tests" / "unit" / "golden_schedules.json").read_text())["runs"]


RATIOS = RatioTable(
    name="tiny",
    origin="measured",
    sigmas=tuple(flow_sigmas(12, 7.0)),
    mag_ratios={"cond": [1.0] + [0.98] * 11},
    sampler={"shift": 7.0},
)


def released_strip(size):
    """The 50 steps of the released code at its own settings, one letter a step."""
    (run,) = [
        run
        for run in GOLDEN
        if (run["rule"], run["table"], run["thresh"], run["K"], run["R"], run["steps"])
        == ("hunyuan", size.rstrip("p"), 0.24, 6, 0.2, 50)
    ]
    return "".join(".#"[step not in run["cond"]] for step in range(50))


STRIPS = {size: released_strip(size) for size in ("544p", "720p")}


SHORT = Settings(1.0, 2, 0.2)  # ##..#..#..#. of 12 steps


def mixed(q, k, v, parallel, image):
    """Attention; under sequence parallelism (`parallel`) to the image tokens of all ranks."""
    if parallel:
        k, v = (torch.cat([parallel(part[:, :image], 1), part[:, image:]], 1) for part in (k, v))
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Double(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.image, self.text = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.hybrid_seq_parallel_attn = None

    def forward(self, img, txt, vec, *rest):
        parts = [
            torch.cat(pair, 1)
            for pair in zip((self.image(img) + vec[:, None].repeat(1, 1, 3)).chunk(3, -1), self.text(txt).chunk(3, -1))
        ]
        out = mixed(*parts, self.hybrid_seq_parallel_attn, img.shape[1])
        return img + out[:, : img.shape[1]], txt + out[:, img.shape[1] :]


class Single(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear, self.hybrid_seq_parallel_attn = nn.Linear(width, 3 * width), None

    def forward(self, x, vec, txt_len, *rest):
        parts = (self.linear(x) + vec[:, None].repeat(1, 1, 3)).chunk(3, -1)
        return x + mixed(*parts, self.hybrid_seq_parallel_attn, x.shape[1] - txt_len)


class Final(nn.Module):
    def __init__(self, width, channels):
        super().__init__()
        self.linear = nn.Linear(width, 4 * channels)

    def forward(self, x, vec):
        return self.linear(x * (1 + vec[:, None]))


class Shaped(nn.Module):
    """The interface and the order of HYVideoDiffusionTransformer: the image's tokens first, the text's appended."""

    def __init__(self, channels=4, width=16, double=2, single=3):
        super().__init__()
        self.patch_size, self.hidden_size, self.channels = [1, 2, 2], width, channels
        self.img_in, self.txt_in, self.time_in = (
            nn.Linear(4 * channels, width),
            nn.Linear(8, width),
            nn.Linear(1, width),
        )
        self.vector_in = nn.Linear(8, width)
        self.double_blocks = nn.ModuleList([Double(width) for _ in range(double)])
        self.single_blocks = nn.ModuleList([Single(width) for _ in range(single)])
        self.final_layer = Final(width, channels)

    def forward(
        self,
        x,
        t,
        text_states=None,
        text_mask=None,
        text_states_2=None,
        freqs_cos=None,
        freqs_sin=None,
        guidance=None,
        return_dict=True,
    ):
        dtype = self.img_in.weight.dtype
        vec = self.time_in(t[:, None].to(dtype) / 1000) + self.vector_in(text_states_2)
        tiles = (
            x.to(dtype).unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        )  # batch, channels, frames, rows, 2, columns, 2
        img, txt = self.img_in(tiles.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)), self.txt_in(text_states)
        length, text_length = img.shape[1], txt.shape[1]
        for block in self.double_blocks:
            img, txt = block(img, txt, vec)
        x = torch.cat((img, txt), 1)
        if len(self.single_blocks) > 0:
            for block in self.single_blocks:
                x = block(x, vec, text_length)
        img = self.final_layer(x[:, :length], vec)
        img = img.reshape(len(img), *tiles.shape[2:4], tiles.shape[5], self.channels, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
        img = img.flatten(-2).flatten(-3, -2)
        return {"x": img} if return_dict else img


class HunyuanSubject:
    """A transformer with the facts of its class; `velocity` calls it as its pipeline does. exact: the dtype in which a
    + (b - a) is b closely enough, and how closely."""

    exact = torch.float64, 1e-9

    def __init__(self, model, host=HUNYUANVIDEO_CHECKOUT, channels=4, text_width=8, pooled_width=8):
        self.model, self.host, self.channels = model, host, channels
        self.text_width, self.pooled_width = text_width, pooled_width

    def prompt(self, batch, seed, dtype=torch.float32):
        made = torch.Generator().manual_seed(1000 + seed)
        return (
            torch.randn(1, 6, self.text_width, generator=made).to(dtype).repeat(batch, 1, 1),
            torch.randn(1, self.pooled_width, generator=made).to(dtype).repeat(batch, 1),
        )

    def velocity(self, latents, timestep, text, pooled):
        return self.model(
            latents,
            timestep,
            text_states=text,
            text_mask=torch.ones(text.shape[:2], dtype=torch.long),
            text_states_2=pooled,
            freqs_cos=None,
            freqs_sin=None,
            guidance=torch.full((len(latents),), 6000.0),
            return_dict=True,
        )["x"]

    @property
    def lists(self):
        return [getattr(self.model, name) for name in self.host.blocks]


class Diffusers(HunyuanSubject):
    def __init__(self, condition=None):
        from diffusers import HunyuanVideoTransformer3DModel

        self.condition = condition
        torch.manual_seed(0)
        model = HunyuanVideoTransformer3DModel(
            in_channels={"latent_concat": 9}.get(condition, 4),
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            image_condition_type=condition,
        )
        super().__init__(model.eval().requires_grad_(False), HUNYUANVIDEO)
        self.picture = torch.randn(1, 4, 1, 8, 12, generator=torch.Generator().manual_seed(5))

    def velocity(self, latents, timestep, text, pooled):
        given, picture = latents, self.picture.to(latents.dtype).repeat(len(latents), 1, 1, 1, 1)
        if self.condition == "latent_concat":
            given = torch.cat(
                [latents, picture.repeat(1, 1, latents.shape[2], 1, 1), torch.zeros_like(latents[:, :1])], dim=1
            )
        elif self.condition == "token_replace":
            given = torch.cat([picture, latents[:, :, 1:]], dim=2)
        return self.model(
            hidden_states=given,
            timestep=timestep,
            encoder_hidden_states=text,
            encoder_attention_mask=torch.ones(text.shape[:2]),
            pooled_projections=pooled,
            guidance=torch.full((len(latents),), 6000.0),
            return_dict=False,
        )[0]


def shaped(**sizes):
    torch.manual_seed(0)
    return HunyuanSubject(Shaped(**sizes).eval().requires_grad_(False))


class Flow:
    """The sampler of both: Euler from noise level 1, one call a step. `timesteps` is new for each run."""

    def __init__(self, subject):
        self.subject, self.timesteps, self.step = subject, None, None

    def run(self, **options):
        *_, latents = self.iterate(**options)
        return latents

    def iterate(self, steps=12, size=(3, 8, 12), videos=1, cfg=False, shift=7.0, seed=0, dtype=torch.float32):
        """Yields the latents after each step. cfg: both prompts in one call; dtype: of the first latents."""
        shape = self.subject.channels, *size
        latents = torch.cat(
            [torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(videos)]
        )
        latents = latents.to(dtype)
        sigmas = torch.tensor([*flow_sigmas(steps, shift), 0.0], dtype=torch.float32)
        self.timesteps = sigmas[:-1] * 1000
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        prompts = [self.subject.prompt(videos, seed, wide) for seed in range(2 if cfg else 1)]
        text, pooled = (torch.cat(parts) for parts in zip(*prompts))
        for self.step in range(steps):
            given = torch.cat([latents] * len(prompts))
            output = self.subject.velocity(given, self.timesteps[self.step].repeat(len(given)), text, pooled)
            if cfg:
                uncond, cond = output.chunk(2)
                output = uncond + 2.0 * (cond - uncond)
            latents = latents.to(wide) + (sigmas[self.step + 1] - sigmas[self.step]) * output.to(wide)
            yield latents


def cached_flow(sampler, ratios=RATIOS, settings=SHORT, announce=None, **options):
    model, host = sampler.subject.model, sampler.subject.host
    return magcache_forward(model, host, ratios, settings, lambda: sampler.timesteps, announce=announce, **options)


class CallStrip:
    """Which calls of the model ran every block (#) and which ran none (.)."""

    def __init__(self, subject):
        self.calls, self.every = [], sum(map(len, subject.lists))
        subject.model.register_forward_pre_hook(lambda module, args: self.calls.append(0))
        for block in [block for blocks in subject.lists for block in blocks]:
            block.register_forward_pre_hook(self.count)

    def count(self, module, args):
        self.calls[-1] += 1

    @property
    def strip(self):
        assert set(self.calls) <= {0, self.every}
        return "".join("#" if blocks else "." for blocks in self.calls)


class HunyuanOracle:
    """What caching must give, made the expensive way: every block runs at every step, and where `reuse` says so the
    final layer gets the tokens that entered the first block plus the residual of the newest step that was not
    reused."""

    def __init__(self, sampler, reuse):
        self.sampler, self.reuse, self.residual, self.before = sampler, reuse, None, None
        first = next(blocks for blocks in sampler.subject.lists if len(blocks))[0]
        first.register_forward_pre_hook(self.enter, with_kwargs=True)
        getattr(sampler.subject.model, sampler.subject.host.final_layer).register_forward_pre_hook(self.leave)

    def enter(self, module, args, kwargs):
        self.before = kwargs["img"] if "img" in kwargs else args[0]

    def leave(self, module, args):
        if self.reuse[self.sampler.step]:
            return self.before + self.residual, *args[1:]
        self.residual = args[0] - self.before


def gathered(tensor, dim):
    """The parts of all ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def parallelize(model):
    """As the checkout's parallelize_transformer: take hold of the forward that is there; at every call, take this
    rank's rows and set the attention of every block."""
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, x, *args, **kwargs):
        for block in model.double_blocks + model.single_blocks:
            block.hybrid_seq_parallel_attn = gathered
        if dist.is_initialized():
            x = x.chunk(dist.get_world_size(), dim=-2)[dist.get_rank()]
        output = original(x, *args, **kwargs)
        return {"x": gathered(output["x"], dim=-2)}

    model.forward = forward.__get__(model)


def videos(folder="results"):
    return {
        path.name: read_frames(path)[0] for path in sorted(Path(folder).glob("*.mp4")) if "_compare" not in path.name
    }


def reports(folder="results"):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.magcache.json"))]
