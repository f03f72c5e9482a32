"""HunyuanVideo: a transformer shaped like the checkout's, written for these tests, and diffusers' own with random
weights. tests/hosts/test_hunyuan_upstream.py runs the same on the checkout's transformer, and its scripts."""

import argparse
import copy
import functools
import json
import multiprocessing
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from common.blocks import BlockStack
from common.errors import MagCacheError
from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT
from common.hosts.diffusers import HUNYUANVIDEO
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.ratios import flow_sigmas
from common.report import memory_text
from common.schedule import Settings, magcache_schedule
from common.scripts.quality import read_frames
from common.tables import RatioTable, load, read

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(REPOSITORY / "MagCache4HunyuanVideo" / "magcache_sample_video.py"))
PUBLISHED = Settings(0.24, 6, 0.2)
GOLDEN = json.loads((REPOSITORY / "tests" / "unit" / "golden_schedules.json").read_text())["runs"]
RATIOS = RatioTable(
    name="tiny",
    origin="measured",
    sigmas=tuple(flow_sigmas(12, 7.0)),
    mag_ratios={"cond": [1.0] + [0.98] * 11},
    sampler={"shift": 7.0},
)


def released(size):
    """The 50 steps of the released code at its own settings, one letter a step."""
    (run,) = [
        run
        for run in GOLDEN
        if (run["rule"], run["table"], run["thresh"], run["K"], run["R"], run["steps"])
        == ("hunyuan", size.rstrip("p"), 0.24, 6, 0.2, 50)
    ]
    return "".join(".#"[step not in run["cond"]] for step in range(50))


STRIPS = {size: released(size) for size in ("544p", "720p")}
SHORT = Settings(1.0, 2, 0.2)  # ##..#..#..#. of 12 steps


# Transformers, all called the same way


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


class Subject:
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


class Diffusers(Subject):
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
    return Subject(Shaped(**sizes).eval().requires_grad_(False))


SUBJECTS = {
    "shaped": shaped,
    "no single blocks": lambda: shaped(single=0),
    "diffusers": Diffusers,
    "latent_concat": lambda: Diffusers("latent_concat"),
    "token_replace": lambda: Diffusers("token_replace"),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return SUBJECTS[request.param]()


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


def cached(sampler, ratios=RATIOS, settings=SHORT, announce=None, **options):
    model, host = sampler.subject.model, sampler.subject.host
    return magcache_forward(model, host, ratios, settings, lambda: sampler.timesteps, announce=announce, **options)


class Executed:
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


class Oracle:
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


# What runs, and what comes out


@pytest.mark.parametrize("settings", [Settings(0.0, 6, 0.2), Settings(0.24, 0, 0.2)], ids=["thresh", "K"])
def test_off_is_the_untouched_model(subject, settings):
    sampler = Flow(subject)
    plain = sampler.run()
    with cached(sampler, settings=settings) as handle:
        assert torch.equal(sampler.run(), plain)
    assert handle.reports[-1].reused == 0
    assert torch.equal(sampler.run(), plain)


@pytest.mark.parametrize("run", [{}, {"cfg": True}, {"videos": 2}, {"steps": 17, "shift": 5.0}], ids=str)
def test_reused_steps_equal_the_oracle(subject, run):
    """And what was planned is what ran, with one call a step."""
    sampler, reference = Flow(copy.deepcopy(subject)), Flow(copy.deepcopy(subject))
    blocks, plans, plain = Executed(sampler.subject), [], list(Flow(subject).iterate(**run))
    with cached(sampler, announce=plans.append) as handle:
        mine = list(sampler.iterate(**run))
    report = handle.reports[0]
    planned = magcache_schedule(RATIOS.at(sampler.timesteps.numpy() / 1000), SHORT).strip
    assert blocks.strip == report.schedule.strip == planned and f"  {planned}   # computes" in plans[0]
    assert (
        report.complete
        and not report.unplanned
        and f"extra memory: {memory_text(report.peak_bytes)} a branch" in plans[0]
    )
    Oracle(reference, report.schedule.reuse)
    theirs = list(reference.iterate(**run))
    first = planned.index(".")
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(mine[first - 1], plain[first - 1]) and not torch.equal(mine[first], plain[first])


def test_a_residual_of_the_same_step_gives_full_computation(subject):
    """In float64 where the model can, since a + (b - a) is b up to rounding only."""
    dtype, tolerance = subject.exact
    subject.model.to(dtype)
    plain = Flow(subject).run(steps=5, dtype=dtype)
    stack, velocity, calls = BlockStack(subject.model, subject.host), subject.velocity, []

    def twice(*args):
        stack.record()
        full = velocity(*args)
        stack.replace(stack.finish())
        again = velocity(*args)
        stack.restore()
        calls.append(full)
        torch.testing.assert_close(again, full, rtol=0, atol=tolerance)
        return again

    subject.velocity = twice
    torch.testing.assert_close(Flow(subject).run(steps=5, dtype=dtype), plain, rtol=0, atol=10 * tolerance)
    assert len(calls) == 5


@pytest.mark.parametrize("steps", [50, 30, 8])
@pytest.mark.parametrize("size", STRIPS)
def test_published_tables_at_step_counts(size, steps):
    subject = shaped()
    sampler, blocks, table = Flow(subject), Executed(subject), load(f"hunyuanvideo-t2v-{size}")
    with cached(sampler, table, PUBLISHED) as handle:
        sampler.run(steps=steps)
    assert blocks.strip == handle.reports[0].schedule.strip
    if steps == 50:
        assert table.fits(sampler.timesteps.numpy() / 1000) and blocks.strip == STRIPS[size]
    assert 1 <= blocks.strip.count(".") and not handle.reports[0].unplanned


def test_a_batch_equals_its_videos():
    subject = shaped()
    sampler = Flow(subject)
    with cached(sampler):
        together = sampler.run(videos=2, size=(3, 8, 12))
        alone = torch.cat([sampler.run(seed=seed) for seed in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_first_latent_may_be_float16():
    """As in the checkout, where the text encoder's dtype is the noise's: the steps after it come in float32."""
    subject = shaped()
    sampler, blocks = Flow(subject), Executed(subject)
    with cached(sampler, settings=Settings(1.0, 2, 0.0)) as handle:
        sampler.run(dtype=torch.float16)
    assert blocks.strip == "#..#..#..#.." and not handle.reports[0].unplanned


def test_a_calibration_plans_the_next_run(subject, tmp_path):
    sampler = Flow(copy.deepcopy(subject))
    plain = Flow(subject).run(cfg=True)
    norms, watched = [], Flow(subject)
    oracle = Oracle(watched, np.zeros(12, dtype=bool))
    for _ in watched.iterate(cfg=True):
        norms.append(oracle.residual.norm(dim=-1))
    with magcache_calibration(
        sampler.subject.model, subject.host, lambda: sampler.timesteps, "tiny", tmp_path / "tiny.json"
    ):
        assert torch.equal(sampler.run(cfg=True), plain)
    table = read(tmp_path / "tiny.json")
    expected = [1.0, *(float((new / old).mean()) for old, new in zip(norms, norms[1:]))]
    assert list(table.mag_ratios) == ["cond"] and table.mag_ratios["cond"] == pytest.approx(expected, abs=1e-5)
    blocks = Executed(sampler.subject)
    with cached(sampler, table, Target(magcache_steps=6)) as handle:
        sampler.run(cfg=True)
    assert (
        blocks.strip == handle.reports[0].schedule.strip
        and blocks.strip.count("#") == 6
        and not handle.reports[0].unplanned
    )


def test_the_snippet_of_the_readme(capsys):
    """On diffusers' real pipeline, with a small transformer and ready embeddings."""
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    page = (REPOSITORY / "MagCache4HunyuanVideo" / "README.md").read_text()
    real = HunyuanVideoPipeline(
        transformer=Diffusers().model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )

    class Small:
        transformer, scheduler = real.transformer, real.scheduler

        def __call__(self, prompt, height, width, num_frames):
            torch.manual_seed(0)
            return real(
                prompt_embeds=torch.randn(1, 6, 8),
                prompt_attention_mask=torch.ones(1, 6),
                output_type="latent",
                pooled_prompt_embeds=torch.randn(1, 8),
                height=64,
                width=96,
                num_frames=9,
            )

    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1], {"pipe": Small()})
    said = capsys.readouterr()
    assert f"  {STRIPS['720p']}   # computes" in said.out + said.err and "19 of 50 model calls computed" in said.out


# Sequence parallelism


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


def render(early=True, **run):
    """(latents, strip of what ran) of a parallelised model, patched before or after."""
    sampler = Flow(shaped())
    blocks = Executed(sampler.subject)
    if early:
        handle = cached(sampler)
        parallelize(sampler.subject.model)
    else:
        parallelize(sampler.subject.model)
        handle = cached(sampler)
    with handle:
        latents = sampler.run(**run)
    uncached = sampler.run(**run)
    assert {block.hybrid_seq_parallel_attn for blocks in sampler.subject.lists for block in blocks} == {gathered}
    torch.testing.assert_close(uncached, Flow(shaped()).run(**run))  # the patch is out of the chain by now
    return latents, blocks.strip


def test_a_patch_beneath_parallelising_is_active():
    sampler = Flow(shaped())
    with cached(sampler):
        expected = sampler.run()
    latents, strip = render()
    assert torch.equal(latents, expected) and strip == "##..#..#..#." + "#" * 12


def test_a_patch_above_parallelising_is_an_error():
    """It would have set its attribute on a stand-in, and the real block would have gone on without its other ranks."""
    subject = shaped()
    parallelize(subject.model)
    sampler = Flow(subject)
    with pytest.raises((TypeError, AttributeError)), cached(sampler):
        sampler.run()
    torch.testing.assert_close(sampler.run(), Flow(shaped()).run())


def one_rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(render(cfg=True), f"{folder}/rank{rank}.pt")
    try:
        render(early=False)
    except TypeError as error:
        Path(folder, f"late{rank}").write_text(str(error))
    sampler = Flow(shaped())
    with magcache_calibration(
        sampler.subject.model, HUNYUANVIDEO_CHECKOUT, lambda: sampler.timesteps, "tiny", f"{folder}/two.json"
    ):
        parallelize(sampler.subject.model)
        sampler.run()
    dist.destroy_process_group()


def test_two_ranks_render_and_measure_what_one_does(tmp_path):
    context = multiprocessing.get_context("fork")  # spawned processes would import torch and diffusers once more each
    processes = [context.Process(target=one_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected, strip = render(cfg=True)
    for rank in range(2):
        latents, its_strip = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        assert its_strip == strip and "can only concatenate" in (tmp_path / f"late{rank}").read_text()
    sampler = Flow(shaped())
    with magcache_calibration(
        sampler.subject.model, HUNYUANVIDEO_CHECKOUT, lambda: sampler.timesteps, "tiny", tmp_path / "one.json"
    ):
        sampler.run()
    one, two = (read(tmp_path / f"{name}.json").mag_ratios["cond"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)


# The command line, on a checkout of a few lines


def host_flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HYVideo-T/2-cfgdistill")
    parser.add_argument("--video-size", type=int, nargs="+", default=(720, 1280))
    numbers = {
        "video-length": 129,
        "infer-steps": 50,
        "num-videos": 1,
        "ulysses-degree": 1,
        "ring-degree": 1,
        "flow-shift": 7.0,
        "cfg-scale": 1.0,
        "embedded-cfg-scale": 6.0,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("flow-reverse", "use-fp8", "use-cpu-offload"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seed", type=int)
    for name, default in (("prompt", None), ("save-path", "./results"), ("save-path-suffix", "")):
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


class Sampler:
    """Renders 16x24 pixels and five frames; what surrounds the transformer is as in the checkout."""

    def __init__(self, args):
        self.args = args
        self.pipeline = self.load_diffusion_pipeline(args=args, model=shaped().model)
        parallelize(self.pipeline.transformer)

    def load_diffusion_pipeline(self, args, model):
        return types.SimpleNamespace(transformer=model, scheduler=None)

    def predict(self, prompt, seed, infer_steps, num_videos, cfg_scale):
        self.pipeline.scheduler = sampler = Flow(Subject(self.pipeline.transformer))
        latents = sampler.run(steps=infer_steps, seed=seed, videos=num_videos, size=(5, 16, 24), cfg=cfg_scale > 1)
        brightness = torch.linspace(0.3, 0.7, num_videos)[:, None, None, None, None]
        return {
            "samples": (latents[:, :3] / 12 + brightness).clamp(0, 1),
            "prompts": [prompt],
            "seeds": [seed + index for index in range(num_videos)],
        }


def save_videos_grid(videos, path, rescale=False, n_rows=1, fps=24):
    import imageio

    frames = (videos[0].permute(1, 2, 3, 0) * 255).byte().numpy()
    imageio.mimsave(path, list(frames), fps=fps, macro_block_size=2)


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """Runs magcache_sample_video.py with flags; returns what was printed."""
    sample_video = types.ModuleType("sample_video")

    def main():
        args = sample_video.parse_args()
        sampler = sample_video.HunyuanVideoSampler(args)
        outputs = sampler.predict(
            prompt=args.prompt,
            seed=args.seed,
            infer_steps=args.infer_steps,
            num_videos=args.num_videos,
            cfg_scale=args.cfg_scale,
        )
        folder = args.save_path if args.save_path_suffix == "" else f"{args.save_path}_{args.save_path_suffix}"
        Path(folder).mkdir(exist_ok=True)
        for index, sample in enumerate(outputs["samples"]):
            name = f"{folder}/seed{outputs['seeds'][index]}_{outputs['prompts'][index][:100]}.mp4"
            sample_video.save_videos_grid(sample.unsqueeze(0), name, fps=24)

    sample_video.main = main
    monkeypatch.setitem(sys.modules, "sample_video", sample_video)
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        sample_video.parse_args = host_flags
        sample_video.HunyuanVideoSampler, sample_video.save_videos_grid = Sampler, save_videos_grid
        monkeypatch.setattr(
            sys, "argv", ["magcache_sample_video.py", "--prompt", "A cat", "--seed", "3", *map(str, flags)]
        )
        SCRIPT["main"]()

    return run


def videos(folder="results"):
    return {
        path.name: read_frames(path)[0] for path in sorted(Path(folder).glob("*.mp4")) if "_compare" not in path.name
    }


def reports(folder="results"):
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.magcache.json"))]


@pytest.mark.parametrize(
    "size, table",
    [
        ((544, 960), "544p"),
        ((720, 1280), "720p"),
        ((1280, 720), "720p"),
        ((960, 544), "544p"),
        ((624, 832), "544p"),
        ((1104, 832), "720p"),
        ((720, 720), "544p"),
        ((960, 960), "720p"),
        ((544,), "544p"),
    ],
    ids=str,
)
def test_the_table_of_the_nearest_size(checkout, capsys, size, table):
    checkout("--flow-reverse", "--video-size", *size)
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert f"ratios of hunyuanvideo-t2v-{table} (published)" in said and f"  {STRIPS[table]}   # computes" in said
    height, width = size if len(size) == 2 else size * 2
    exact = (width, height) in ((960, 544), (1280, 720))
    assert ("These ratios were measured at" in said) is not exact
    assert exact or f"this run is {width}x{height}, 129 frames" in said
    assert reports()[0]["strip"] == STRIPS[table] and reports()[0]["mag_ratios_of"] == f"hunyuanvideo-t2v-{table}"


def test_off_saves_what_the_host_saves(checkout):
    flags = "--flow-reverse", "--num-videos", 2, "--infer-steps", 12, "--save-path"
    checkout(*flags, "cached")
    checkout(*flags, "plain", "--no-magcache")
    assert list(videos("plain")) == list(videos("cached")) == ["seed3_A cat.mp4", "seed4_A cat.mp4"]
    assert not any(map(np.array_equal, videos("cached").values(), videos("plain").values()))
    for off in ("--magcache_thresh", "--magcache_K"):
        checkout(*flags, "off", off, 0)
        assert all(map(np.array_equal, videos("off").values(), videos("plain").values()))


def test_several_videos_with_comparison(checkout, capsys):
    checkout("--flow-reverse", "--num-videos", 2, "--compare", "--infer-steps", 12, "--cfg-scale", 3)
    assert len(videos()) == 2 and len(reports()) == 2
    columns = {}
    for name in videos():
        sheet, _ = read_frames(Path("results") / name.replace(".mp4", "_compare.mp4"))
        assert sheet.shape == (5, 16, 84, 3)
        columns[name] = sheet[:, :, 28:52].astype(int)  # the second of three, 24 pixels wide with 4 between
    (one, its_column), (other, _) = columns.items()
    assert np.abs(its_column - videos()[one]).mean() < np.abs(its_column - videos()[other]).mean() / 2
    assert np.abs(columns[other] - videos()[other]).mean() < np.abs(columns[other] - videos()[one]).mean() / 2
    figures = reports()[0]["quality"]
    computed = reports()[0]["computed"]
    assert reports()[0]["calls"] == 12 and list(figures) == [
        "un-cached, 12 steps",
        f"MagCache, {computed} of 12",
        f"plain sampler, {computed} steps",
    ]
    assert all(figures[name]["psnr"] > 10 for name in list(figures)[1:])
    assert not list(Path("results").glob(".*"))


def test_a_long_prompt_does_not_lose_the_video(checkout, monkeypatch):
    checkout("--flow-reverse", "--infer-steps", 8, "--prompt", "雨" * 100, "--magcache_plot")
    (name,) = videos()
    assert name.startswith("seed3_雨雨") and len(name.encode()) <= 255
    assert {path.suffix for path in Path("results").iterdir()} == {".mp4", ".json", ".png"}


def test_calibration_is_used_from_then_on(checkout, capsys):
    flags = ["--flow-reverse", "--infer-steps", 20, "--video-size", 544, 960]
    checkout(*flags, "--no-magcache", "--save-path", "plain")
    checkout(*flags, "--magcache_calibration", "--save-path", "calibrated")
    (path,) = Path("home").glob("hunyuanvideo-t2v-960x544x129-*.json")
    assert np.array_equal(*[frames for folder in ("plain", "calibrated") for frames in videos(folder).values()])
    assert read(path).steps == 20 and read(path).settings == {
        "magcache_thresh": 0.24,
        "magcache_K": 6,
        "retention_ratio": 0.2,
    }
    capsys.readouterr()
    for payload in ("residual", "output"):
        checkout(*flags, "--magcache_steps", 10, "--magcache_payload", payload)
        assert reports()[0]["computed"] == 10 and not reports()[0]["unplanned"]
    checkout(*flags, "--magcache_calibration", "mine.json")
    assert read("mine.json").mag_ratios == read(path).mag_ratios


def test_the_lines_at_the_top_and_the_flags(checkout, monkeypatch):
    monkeypatch.setitem(SCRIPT["published"].__globals__, "MAGCACHE_K", 2)
    checkout("--flow-reverse", "--magcache_thresh", 0.12)
    assert reports()[0]["settings"] == {"magcache_thresh": 0.12, "magcache_K": 2, "retention_ratio": 0.2}
    assert reports()[0]["strip"].count(".") == 25


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "--flow-reverse"),
        (["--flow-reverse", "--model", "HYVideo-T/2"], "No magnitude ratios are known"),
        (["--flow-reverse", "--video-length", 1], "cannot save one"),
        (["--flow-reverse", "--save-path", "/proc/nowhere"], "cannot be written"),
        (["--flow-reverse", "--compare", "--no-magcache"], "leave out --no-magcache"),
        (["--flow-reverse", "--compare", "--magcache_calibration"], "one at a time"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_loading(checkout, monkeypatch, flags, sentence):
    monkeypatch.setattr(Sampler, "__init__", lambda self, args: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        checkout(*flags)


@pytest.mark.parametrize(
    "flag, package",
    [
        ("--compare", "torchmetrics"),
        ("--compare", "tabulate"),
        ("--compare", "imageio"),
        ("--magcache_plot", "matplotlib"),
    ],
)
def test_a_missing_package_is_found_before_loading(checkout, monkeypatch, flag, package):
    monkeypatch.setattr(Sampler, "__init__", lambda self, args: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        checkout("--flow-reverse", flag)


def test_ranks_need_a_seed():
    host_args = argparse.Namespace(flow_reverse=True, video_length=129, seed=None, ulysses_degree=8, ring_degree=1)
    with pytest.raises(MagCacheError, match="give --seed"):
        SCRIPT["session_of_text"](argparse.Namespace(), host_args)


def test_without_a_checkout(monkeypatch):
    monkeypatch.setitem(sys.modules, "sample_video", None)
    with pytest.raises(SystemExit, match="python -m common install MagCache4HunyuanVideo"):
        SCRIPT["main"]()
