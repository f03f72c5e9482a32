"""FramePack's transformer and sampler as the package `framepack` ships them, the same transformer in diffusers, and the
jobs of a demo. Tiny random weights; latents are compared bit for bit."""

import argparse
import copy
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import magcache_framepack_page as framepack_page
import numpy as np
import pytest
import torch
from framepack_cpu import IMAGE_WIDTH, TEXT_WIDTH, tiny_transformer
from magcache_framepack import Jobs, sections, timesteps_noted
from packages import unpacked

from common.errors import MagCacheError
from common.hosts.diffusers import ALL_TOKENS, FRAMEPACK
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.schedule import Settings
from common.scripts import controls
from common.scripts.controls import Choice
from common.scripts.install import install
from common.tables import load, read, write

PUBLISHED = Settings(0.1, 3, 0.2)
TOKENS, PACKED = 32, 40  # of a section of 2 latent frames of 8 x 8, and of the frames around it
REPOSITORY = Path(__file__).resolve().parents[2]


class Package:
    """The modules of the package `framepack` that this test runs."""

    def __init__(self):
        base = "framepack.diffusers_helper."
        self.sampler = importlib.import_module(base + "pipelines.k_diffusion_hunyuan")
        self.memory = importlib.import_module(base + "memory")
        self.transformer = importlib.import_module(
            base + "models.hunyuan_video_packed"
        ).HunyuanVideoTransformer3DModelPacked


@pytest.fixture(scope="module")
def package():
    folders = [
        unpacked("framepack", "0.0.9", "82c452b40aebc8ec0d29c1735c49927b0eb68ea6179c83751c8f1890907d85cf"),
        unpacked("einops", "0.8.1", "919387eb55330f5757c6bea9165c5ff5cfe63a642682ea788a6d472576d81737"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        for name in ("cv2", "torchvision"):  # imported for functions that nothing here calls
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        loaded = Package()
    return loaded


@pytest.fixture(scope="module")
def first_transformer(package):
    return tiny_transformer(package.transformer)


@pytest.fixture
def transformer(first_transformer):
    model = copy.deepcopy(first_transformer)
    model.register_to_config(_name_or_path="lllyasviel/FramePackI2V_HY")
    return model


def sample(package, model, steps=12, cfg=1.0, frames=2, seed=0, history=None, callback=None, shift=7.0, sampler=None):
    """The latents of one section. frames: of the latent; history: latents of the section before."""
    made = torch.Generator().manual_seed(1000 + seed)

    def text():
        return {
            "embeds": torch.randn(1, 8, TEXT_WIDTH, generator=made).to(model.dtype),
            "embeds_mask": torch.ones(1, 8, dtype=torch.bool),
            "poolers": torch.randn(1, TEXT_WIDTH, generator=made).to(model.dtype),
        }

    prompts = {f"{kind}prompt_{name}": value for kind in ("", "negative_") for name, value in text().items()}
    around = torch.randn(1, 16, 20, 8, 8, generator=made)
    if history is not None:
        around[:, :, 1:3] = history[:, :, :2]
    return (sampler or package.sampler.sample_hunyuan)(
        transformer=model,
        sampler="unipc",
        width=64,
        height=64,
        frames=frames * 4 - 3,
        real_guidance_scale=cfg,
        distilled_guidance_scale=10.0,
        num_inference_steps=steps,
        shift=shift,
        generator=torch.Generator().manual_seed(seed),
        dtype=model.dtype,
        device=torch.device("cpu"),
        image_embeddings=torch.randn(1, 4, IMAGE_WIDTH, generator=made).to(model.dtype),
        latent_indices=torch.arange(frames)[None] + 1,
        clean_latents=around[:, :, :2],
        clean_latent_indices=torch.tensor([[0, 5]]),
        clean_latents_2x=around[:, :, 2:4],
        clean_latent_2x_indices=torch.tensor([[6, 7]]),
        clean_latents_4x=around[:, :, 4:],
        clean_latent_4x_indices=torch.arange(8, 24)[None],
        callback=callback,
        **prompts,
    )


def entered(model):
    """One letter a call of the model, # where every block ran and . where none did; filled as it runs."""
    calls, blocks = [], [*model.transformer_blocks, *model.single_transformer_blocks]
    model.register_forward_pre_hook(lambda module, args: calls.append(0))
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: calls.__setitem__(-1, calls[-1] + 1))

    def strip():
        assert set(calls) <= {0, len(blocks)}
        return "".join(".#"[count > 0] for count in calls)

    return strip


@contextmanager
def cached(package, model, settings=PUBLISHED, table="framepack", host=FRAMEPACK):
    table = load(table) if isinstance(table, str) else table
    with timesteps_noted(package.sampler) as timesteps:
        with magcache_forward(model, host, table, settings, timesteps, announce=None) as handle:
            yield handle


def measured(package, model, path=None, host=FRAMEPACK, runs=({},), **description):
    with timesteps_noted(package.sampler) as timesteps:
        with magcache_calibration(model, host, timesteps, "tiny", path, description) as handle:
            latents = [sample(package, model, **run) for run in runs]
    return handle.table, latents


# --- one section ---


@pytest.mark.parametrize(
    "name, settings, steps, skipped",
    [
        ("framepack", PUBLISHED, 25, [5, 6, 8, 10, 11, 13, 14, 16, 17, 19, 20, 21, 23]),
        ("framepack", Settings(0.15, 4, 0.2), 25, [5, 6, 8, 9, 11, 12, 13, 15, 16, 17, 19, 20, 21, 22]),
        ("framepack-f1", PUBLISHED, 25, [5, 6, 8, 10, 11, 13, 14, 15, 17, 18, 19, 21, 23]),
    ],
)
def test_skips_the_steps_that_the_release_skips(package, transformer, name, settings, steps, skipped):
    strip = entered(transformer)
    with cached(package, transformer, settings, name) as handle:
        sample(package, transformer, steps)
    assert (
        [step for step, letter in enumerate(strip()) if letter == "."]
        == skipped
        == handle.reports[0].schedule.skipped_steps
    )
    assert handle.reports[0].complete


def test_both_branches_of_guidance_skip_together(package, transformer):
    strip = entered(transformer)
    with cached(package, transformer) as handle:
        sample(package, transformer, 25, cfg=3.0)
    planned = handle.reports[0].schedule.strip
    assert strip() == "".join(letter * 2 for letter in planned) and "." in planned
    assert handle.reports[0].computed == 2 * 12


@pytest.mark.parametrize("settings", [Settings(0.1, 0, 0.2), Settings(0, 3, 0.2), Settings(0.1, 3, 1.0)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_off_is_the_host_bit_for_bit(package, transformer, settings, cfg):
    plain = sample(package, transformer, cfg=cfg)
    with cached(package, transformer, settings) as handle:
        assert torch.equal(sample(package, transformer, cfg=cfg), plain)
    assert handle.reports[0].reused == 0
    assert torch.equal(sample(package, transformer, cfg=cfg), plain) and "forward" not in vars(transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_of_the_section_is_all_that_matters(package, transformer, dtype):
    """The release keeps the residual of all tokens; the packed frames' share of it never reaches the output."""
    transformer = transformer.to(dtype)
    with cached(package, transformer) as handle:
        latents = sample(package, transformer, 25)
    with cached(package, transformer, host=ALL_TOKENS) as all_tokens:
        assert torch.equal(sample(package, transformer, 25), latents)
    kept, of_all = handle.reports[0].peak_bytes, all_tokens.reports[0].peak_bytes
    assert kept == TOKENS * 32 * dtype.itemsize and of_all == (TOKENS + PACKED) * 32 * dtype.itemsize
    assert not torch.equal(sample(package, transformer, 25), latents)


@pytest.mark.parametrize("settings, steps", [(Target(7), 12), (PUBLISHED, 50), (PUBLISHED, 100)])
def test_steps_that_round_to_one_timestep_are_told_apart(package, transformer, settings, steps):
    """In bfloat16 the timesteps of FramePack's first steps are equal."""
    transformer = transformer.to(torch.bfloat16)
    strip = entered(transformer)
    table = measured(package, transformer)[0] if isinstance(settings, Target) else "framepack"
    already = len(strip())
    with cached(package, transformer, settings, table) as handle:
        sample(package, transformer, steps, cfg=2.0 if steps == 12 else 1.0)
    planned = handle.reports[0].schedule.strip
    assert strip()[already:] == "".join(letter * (2 if steps == 12 else 1) for letter in planned) and "." in planned


def test_dynamic_swap_changes_nothing(package, transformer):
    """The host's way of keeping weights on the CPU gives every module a class of its own."""
    with cached(package, transformer):
        latents = sample(package, transformer, 25)
    package.memory.DynamicSwapInstaller.install_model(transformer, device=torch.device("cpu"))
    swapped = type(transformer)
    with cached(package, transformer) as handle:
        assert torch.equal(sample(package, transformer, 25), latents)
    assert handle.reports[0].reused == 13 and type(transformer) is swapped


# --- sections ---


def test_every_section_begins_anew(package, transformer):
    alone = []
    for history in (None, "before"):
        with cached(package, transformer):
            alone.append(sample(package, transformer, 25, history=alone[0] if history else None))
    with cached(package, transformer) as handle:
        first = sample(package, transformer, 25)
        assert not handle.residuals.kept, "the VAE decodes now"
        second = sample(package, transformer, 25, history=first)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1]) and not torch.equal(first, second)
    assert [report.reused for report in handle.reports] == [13, 13]


class Cancelled(KeyboardInterrupt):
    pass


def test_a_section_after_a_cancelled_one_is_as_alone(package, transformer):
    other = {"steps": 12, "frames": 3, "cfg": 2.0, "seed": 4}
    with cached(package, transformer):
        alone = sample(package, transformer, **other)

    def cancel(state):
        if state["i"] == 9:
            raise Cancelled

    with cached(package, transformer) as handle:
        with pytest.raises(Cancelled):
            sample(package, transformer, 25, callback=cancel)
        assert torch.equal(sample(package, transformer, **other), alone)
    assert [report.complete for report in handle.reports] == [False, True]


# --- calibration ---


def residuals_by_hand(package, model, steps, kept):
    """Of the last `kept` tokens, one a step; computed with hooks on the first and the last block."""
    found, hooks = [], []
    hooks.append(
        model.transformer_blocks[0].register_forward_pre_hook(lambda module, args: found.append(args[0].clone()))
    )
    hooks.append(
        model.single_transformer_blocks[-1].register_forward_hook(
            lambda module, args, output: found.append(output[0] - found.pop())
        )
    )
    sample(package, model, steps)
    for hook in hooks:
        hook.remove()
    return [residual[:, -kept:] for residual in found]


@pytest.mark.parametrize("host, kept", [(FRAMEPACK, TOKENS), (ALL_TOKENS, TOKENS + PACKED)])
def test_calibration_is_of_the_section_or_of_all_tokens(package, transformer, host, kept):
    residuals = residuals_by_hand(package, transformer, 12, kept)
    by_hand = [float((new.norm(dim=-1) / old.norm(dim=-1)).mean()) for old, new in zip(residuals, residuals[1:])]
    assert residuals[0].shape == (1, kept, 32)
    plain = sample(package, transformer)
    table, (latents,) = measured(package, transformer, host=host)
    assert np.allclose(table.mag_ratios["cond"][1:], by_hand, atol=2e-6) and torch.equal(latents, plain)
    assert table.sampler["shift"] == pytest.approx(7, abs=1e-3)


def test_calibration_is_the_mean_over_sections(package, transformer, tmp_path):
    runs = [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    alone = [measured(package, transformer, runs=[run])[0].mag_ratios["cond"] for run in runs]
    table, _ = measured(package, transformer, tmp_path / "t.json", runs=runs)
    assert np.allclose(table.mag_ratios["cond"], np.mean(alone, axis=0), atol=2e-6)
    assert table.statistics["runs"] == 3 and read(tmp_path / "t.json").mag_ratios == table.mag_ratios
    assert np.std(alone, axis=0).max() > 1e-4


# --- the same transformer in diffusers ---


@pytest.fixture(scope="module")
def diffusers_pipe():
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoFramepackPipeline,
        HunyuanVideoFramepackTransformer3DModel,
    )

    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        rope_axes_dim=(4, 6, 6),
        has_image_proj=True,
        image_proj_dim=IMAGE_WIDTH,
        has_clean_x_embedder=True,
    )
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    pipe = HunyuanVideoFramepackPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        image_encoder=None,
        feature_extractor=None,
    )
    pipe.encode_image = lambda image, **kwargs: torch.nn.functional.adaptive_avg_pool2d(
        image, (4, IMAGE_WIDTH // 4)
    ).flatten(2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video(pipe, steps=12, **options):
    """Latents of a job of two sections, in each of which 2 latent frames are sampled."""
    made = torch.Generator().manual_seed(0)
    return pipe(
        image=torch.rand(1, 3, 64, 64, generator=made),
        height=64,
        width=64,
        num_frames=9,
        latent_window_size=2,
        num_inference_steps=steps,
        prompt_embeds=torch.randn(1, 8, TEXT_WIDTH, generator=made),
        pooled_prompt_embeds=torch.randn(1, TEXT_WIDTH, generator=made),
        prompt_attention_mask=torch.ones(1, 8),
        negative_prompt_embeds=torch.randn(1, 8, TEXT_WIDTH, generator=made),
        negative_pooled_prompt_embeds=torch.randn(1, TEXT_WIDTH, generator=made),
        negative_prompt_attention_mask=torch.ones(1, 8),
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **options,
    ).frames[-1]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_the_transformer_of_diffusers_runs_through_the_same_description(diffusers_pipe, cfg):
    pipe, table = diffusers_pipe, load("framepack")
    plain = video(pipe, true_cfg_scale=cfg)
    patched = magcache_forward(
        pipe.transformer, FRAMEPACK, table, Settings(0.3, 3, 0.2), lambda: pipe.scheduler.timesteps, announce=None
    )
    strip = entered(pipe.transformer)
    with patched as handle:
        latents = video(pipe, true_cfg_scale=cfg)
    calls = 1 if cfg == 1 else 2
    assert strip() == "".join(letter * calls for report in handle.reports for letter in report.schedule.strip)
    assert len(handle.reports) == 2 and all(report.reused > 0 and report.complete for report in handle.reports)
    assert handle.reports[0].peak_bytes == calls * TOKENS * 32 * 4
    assert not torch.equal(latents, plain) and torch.equal(video(pipe, true_cfg_scale=cfg), plain)
    with magcache_forward(
        pipe.transformer, FRAMEPACK, table, Settings(0.3, 0, 0.2), lambda: pipe.scheduler.timesteps, announce=None
    ):
        assert torch.equal(video(pipe, true_cfg_scale=cfg), plain)
    with magcache_calibration(pipe.transformer, FRAMEPACK, lambda: pipe.scheduler.timesteps, "tiny") as measuring:
        assert torch.equal(video(pipe, true_cfg_scale=cfg), plain)
    assert list(measuring.table.mag_ratios) == ["cond", "uncond"][:calls] and measuring.table.statistics["runs"] == 2


# --- jobs of a demo ---

OFF, CALIBRATE = (False, False, 0.1, 3, 0.2, "off"), (False, True, 0.1, 3, 0.2, "off")
ON, AT_TWICE = (True, False, 0.1, 3, 0.2, "off"), (True, False, 0.1, 3, 0.2, "2x")
JOB = {"steps": 12, "seconds": 0.5, "window": 2, "cfg": 1.0, "use_teacache": True}  # two sections


class Demo(types.ModuleType):
    """What a job passes through in FramePack's demo: `process`, which starts `worker` in a thread and follows the
    newest stream; `sample_hunyuan`, once a section; and End Generation. The sampler and the transformer are the
    package's."""

    def __init__(self, package, transformer, folder):
        super().__init__("demo_gradio")
        self.package, self.transformer, self.folder = package, transformer, folder
        self.ips = [*JOB]
        self.use_teacache, self.steps = "use_teacache", "steps"
        self.stream, self.plain_sampler = None, package.sampler.sample_hunyuan
        self.sample_hunyuan, self.latents, self.teacache, self.end_at = self.plain_sampler, [], [], None
        self.when_cancelled = lambda: None

    def worker(self, steps, seconds, window, cfg, use_teacache):
        self.teacache.append(use_teacache)
        try:
            for section in range(sections(seconds, window)):

                def callback(state, section=section):
                    if self.end_at == (section, state["i"]):
                        self.stream.put("end")
                        raise KeyboardInterrupt

                self.latents.append(
                    sample(
                        self.package,
                        self.transformer,
                        int(steps),
                        cfg,
                        sampler=self.sample_hunyuan,
                        history=self.latents[-1] if section else None,
                        callback=callback,
                    )
                )
                self.stream.put(str(self.folder / f"{section}.mp4"))
        except BaseException:
            self.when_cancelled()
        self.stream.put("end")

    def process(self, *inputs):
        yield None, "started"
        self.stream = queue.Queue()
        threading.Thread(target=self.worker, args=inputs).start()
        while (sent := self.stream.get(timeout=60)) != "end":
            yield sent, "file"
        yield None, "ended"


def flags(**given):
    parser = argparse.ArgumentParser()
    framepack_page.add_flags(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


@pytest.fixture
def demo(package, transformer, tmp_path, monkeypatch):
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    return Demo(package, transformer, tmp_path)


def jobs_of(demo, **given):
    return Jobs(demo, flags(**given), (0.1, 3, 0.2), "framepack")


def plan(jobs, steps, seconds, window, values, teacache=False):
    return jobs.plan(steps, seconds, window, teacache, Choice(*values))


def run(jobs, values, **changed):
    """(latents of each section, the last lines, every yield) of one job."""
    before = len(jobs.demo.latents)
    shown = list(jobs.process(*{**JOB, **changed}.values(), *values))
    jobs.idle.wait(60)
    return jobs.demo.latents[before:], shown[-1][1], shown


def equal(latents, others):
    return len(latents) == len(others) and all(torch.equal(one, other) for one, other in zip(latents, others))


@pytest.fixture
def plain(package, transformer, tmp_path):
    """The latents of the un-cached job, through a demo that MagCache never saw."""
    untouched = Demo(package, copy.deepcopy(transformer), tmp_path)
    list(untouched.process(*{**JOB, "use_teacache": False}.values()))
    return untouched.latents


def test_a_job_with_magcache(demo, plain):
    jobs = jobs_of(demo)
    latents, lines, shown = run(jobs, ON)
    assert len(latents) == 2 and not equal(latents, plain) and demo.teacache == [False]
    assert [line.partition(":")[0] for line in lines] == ["Section 1", "Section 2"]
    assert all("7 of 12 model calls computed, 5 reused" in line and "s saved" in line for line in lines)
    assert [shown[0][0], shown[-1][0]] == [(None, "started"), (None, "ended")]
    report = json.loads((demo.folder / "1.magcache.json").read_text())
    assert [section["reused"] for section in report["sections"]] == [5, 5] and report["mag_ratios_of"] == "framepack"
    assert "forward" not in vars(demo.transformer)


def test_jobs_without_magcache_are_the_hosts(demo, plain, package):
    jobs = jobs_of(demo)
    assert equal(run(jobs, OFF, use_teacache=False)[0], plain)
    assert equal(run(jobs, (True, False, 0.1, 0, 0.2, "off"))[0], plain)  # magcache_K 0
    assert equal(run(jobs, CALIBRATE)[0], plain)
    latents, lines, _ = run(jobs, OFF)
    assert lines == [] and demo.teacache == [False, False, False, True]
    teacache = Demo(package, demo.transformer, demo.folder)
    list(teacache.process(*JOB.values()))
    assert equal(latents, teacache.latents)


def test_the_job_after_an_ended_one_is_as_alone(demo):
    jobs = jobs_of(demo)
    alone, *_ = run(jobs, ON)
    kept = []

    def end_slowly():  # the worker's last word comes while the next job starts
        kept.append(dict(jobs.job.handle.residuals.kept))
        time.sleep(1)

    demo.end_at, demo.when_cancelled = (1, 9), end_slowly
    ended = list(jobs.process(*{**JOB, "steps": 25, "seconds": 1.0, "cfg": 2.0}.values(), *ON))
    assert len(ended[-1][1]) == 1 and not jobs.idle.is_set()
    demo.end_at = None
    latents, lines, shown = run(jobs, ON)
    assert "still ending" in shown[0][1][0] and kept == [{}]
    assert equal(latents[-2:], alone) and len(lines) == 2 and [outputs[1] for outputs, *_ in shown].count("file") == 2


def test_calibration_in_the_page_is_used_from_then_on(demo, tmp_path):
    jobs = jobs_of(demo)
    published = jobs.known_table(12)
    _, lines, shown = run(jobs, CALIBRATE)
    path = jobs.calibration_file
    assert path.parent == tmp_path / "home" and path.name == f"framepack-{jobs.checkpoint}.json"
    assert "Measured in 2 sections" in lines[-1] and shown[-1][0] is None
    assert jobs.newly_measured() and not jobs.newly_measured()
    assert published.origin == "published" and jobs.known_table(12).origin == "measured"
    table = read(path)
    assert (
        table.rule == {"max_deviation": 0.06}
        and table.statistics["runs"] == 2
        and table.mag_ratios == jobs.known_table(12).mag_ratios
    )
    assert plan(jobs, 12, 1, 2, AT_TWICE).summary.startswith("2x: ") and len(run(jobs, AT_TWICE)[0]) == 2
    again = jobs_of(Demo(demo.package, demo.transformer, demo.folder))  # the page of another day
    assert again.known_table(12).mag_ratios == table.mag_ratios and again.starts_cached()


def test_a_calibration_that_breaks_off_saves_what_is_complete(demo):
    jobs = jobs_of(demo)
    demo.end_at = (0, 5)
    _, lines, shown = run(jobs, CALIBRATE)
    assert "Nothing was saved" in lines[-1] and not jobs.newly_measured() and not jobs.calibration_file.exists()
    assert jobs.known_table(12).origin == "published"
    demo.end_at = (1, 5)
    _, lines, shown = run(jobs, CALIBRATE)
    assert "Measured in 1 section," in lines[-1] and read(jobs.calibration_file).statistics["runs"] == 1


def test_flags_name_the_files(demo, tmp_path):
    target = tmp_path / "deep" / "mine.json"
    run(jobs_of(demo, magcache_calibration=str(target), magcache_all_tokens=True), CALIBRATE)
    table = read(target)
    assert "all tokens" in table.notes and table.rule == {"max_deviation": 0.06}
    renamed = replace(table, name="renamed")
    write(tmp_path / "other.json", renamed)
    jobs = jobs_of(Demo(demo.package, demo.transformer, demo.folder), mag_ratios=str(tmp_path / "other.json"))
    assert jobs.known_table(25).name == "renamed" and "renamed" in " ".join(plan(jobs, 25, 5, 9, ON).lines)


def test_the_plan_follows_the_controls(demo):
    jobs = jobs_of(demo)
    shown = plan(jobs, 25, 5, 9, ON)
    assert shown.strip == "#####..#.#..#..#..#...#.#"
    assert shown.summary == "12 of 25 steps compute, at most 2.08x faster"
    assert shown.lines[:2] == (
        "4 sections: 48 of 100 steps of the job compute",
        "Ratios: framepack (published)",
    )
    assert plan(jobs, 25, 5, 9, (True, False, 0.15, 4, 0.2, "off")).summary.startswith("11 of 25 steps")
    longer = plan(jobs, 50, 10, 9, ON)
    assert longer.strip != shown.strip and longer.lines[0].startswith("8 sections")
    off = plan(jobs, 25, 5, 9, (True, False, 0.1, 0, 0.2, "off"))
    assert off.summary == "every step computes" and any("magcache_K is 0" in line for line in off.lines)
    twice = plan(jobs, 25, 5, 9, AT_TWICE)
    assert twice.summary == "2x: 13 of 25 steps compute, at most 1.92x faster, the nearest to it"
    assert twice.lines == ("4 sections: 52 of 100 steps of the job compute",)
    assert twice.strip[0] == twice.strip[-1] == "#" and twice.strip.count("#") == 13
    assert plan(jobs, 25, 5, 9, OFF).summary == "off, every step computes"
    assert plan(jobs, 25, 5, 9, OFF, teacache=True).summary == "off, TeaCache decides"
    assert str(jobs.calibration_file) in plan(jobs, 25, 5, 9, CALIBRATE).lines[0]
    words = [shown, longer, off, twice, plan(jobs, 25, 5, 9, OFF), plan(jobs, 25, 5, 9, CALIBRATE)]
    assert not any("--" in line or "payload" in line for one in words for line in (one.summary, *one.lines))


def test_a_short_calibration_is_not_used_for_a_long_job(demo, tmp_path):
    """And a finer table stays where it is."""
    jobs = jobs_of(demo)
    run(jobs, CALIBRATE, steps=2)
    assert jobs.known_table(8).steps == 2 and jobs.known_table(25).origin == "published"
    run(jobs, CALIBRATE, steps=12)
    run(jobs, CALIBRATE, steps=2)
    assert jobs.known_table(12).steps == jobs.known_table(25).steps == 12
    assert sorted(read(path).steps for path in (tmp_path / "home").iterdir()) == [2, 12]
    again = jobs_of(Demo(demo.package, demo.transformer, demo.folder))
    assert again.known_table(12).steps == 12
    run(again, ON, steps=12)
    assert json.loads((demo.folder / "1.magcache.json").read_text())["mag_ratios_of"] == again.known_table(12).name
    again.of_model, again.own = None, [table for table in again.own if table.steps == 2]
    with pytest.raises(MagCacheError, match="were measured at too few steps for this job: tick Calibrate"):
        run(again, ON, steps=25)


def test_a_report_that_cannot_be_written_or_is_not_ours(demo):
    jobs = jobs_of(demo)
    (demo.folder / "1.magcache.json").write_text('{"whose": "somebody\'s"}')
    (demo.folder / "0.magcache.json").mkdir()
    latents, lines, _ = run(jobs, ON)
    assert len(latents) == 2 and (demo.folder / "1.magcache.json").read_text() == '{"whose": "somebody\'s"}'
    assert len(json.loads((demo.folder / "1_2.magcache.json").read_text())["sections"]) == 2


@pytest.mark.parametrize("seconds, window, count", [(1, 9, 1), (5, 9, 4), (2.4, 9, 2), (120, 9, 100), (0.1, 33, 1)])
def test_sections_are_counted_as_the_host_counts_them(seconds, window, count):
    assert sections(seconds, window) == int(max(round((seconds * 30) / (window * 4)), 1)) == count


def test_a_checkpoint_without_a_table_is_told_how_to_get_one(demo):
    demo.transformer.register_to_config(_name_or_path="somebody/finetune")
    jobs = jobs_of(demo)
    assert not jobs.starts_cached()
    for attempt in (lambda: plan(jobs, 25, 5, 9, ON), lambda: run(jobs, ON)):
        with pytest.raises(MagCacheError, match="somebody/finetune are not known: tick Calibrate"):
            attempt()
    assert not demo.latents and equal(run(jobs, OFF)[0], demo.latents)
    latents, lines, _ = run(jobs, AT_TWICE)  # needs none
    assert len(latents) == 2 and all("6 of 12 model calls computed, 6 reused" in line for line in lines)
    assert json.loads((demo.folder / "1.magcache.json").read_text())["mag_ratios_of"] is None
    run(jobs, CALIBRATE)
    assert len(run(jobs, ON)[0]) == 2 and jobs.starts_cached()


def test_wrong_values_are_refused_before_anything_runs(demo):
    jobs = jobs_of(demo)
    with pytest.raises(MagCacheError, match="retention_ratio"):
        run(jobs, (True, False, 0.1, 3, 1.5, "off"))
    assert not demo.latents and len(run(jobs, ON)[0]) == 2


# --- around the page ---


def test_the_plan_is_drawn(demo):
    jobs = jobs_of(demo)
    drawn = controls.plan_html(plan(jobs, 25, 5, 9, ON))
    assert drawn.count(": computes") == 12 and drawn.count(": is skipped") == 13 and 'aria-label="#####..#.' in drawn
    assert "4 sections: 48 of 100 steps" in drawn
    assert controls.plan_html(plan(jobs, 25, 5, 9, OFF)) == "<div>off, every step computes</div>"
    assert controls.in_lines(["a < b"]) == "<div>a &lt; b</div>"


def test_the_gradio_that_the_checkout_pins_is_asked_for(monkeypatch, tmp_path):
    pinned = tmp_path / "requirements.txt"
    pinned.write_text("accelerate==1.6.0\ngradio==5.23.0\n")
    monkeypatch.setattr(framepack_page, "version", lambda package: "6.31.0")
    with pytest.raises(MagCacheError, match="pip install gradio==5.23.0"):
        framepack_page.check_gradio(pinned)
    framepack_page.check_gradio(tmp_path / "absent.txt")
    for fine in ("5.23.0", "5.50.0"):
        monkeypatch.setattr(framepack_page, "version", lambda package, fine=fine: fine)
        framepack_page.check_gradio(pinned)
    monkeypatch.undo()
    with pytest.raises(MagCacheError, match="This needs the package gradio"):
        monkeypatch.setattr(framepack_page, "version", lambda package: version("a-package-that-nobody-has"))
        framepack_page.check_gradio(pinned)


TOY_DEMO = """
import os

os.environ["HF_HOME"] = "beside the demo"
import toy_gradio

port = __import__("sys").argv[1:]
block = toy_gradio.Blocks()
block.launch(7, share=False)
"""
TOY_GRADIO = """
import os

HF_HOME = os.environ.get("HF_HOME")


class Blocks:
    def launch(self, *args, **kwargs):
        raise AssertionError("launched")
"""


def test_the_page_is_held_back_by_a_gradio_that_the_demo_imports(monkeypatch, tmp_path):
    """Whatever reads HF_HOME finds what the demo set, since nobody imports it before the demo does."""
    (tmp_path / "toy_demo.py").write_text(TOY_DEMO)
    (tmp_path / "toy_gradio.py").write_text(TOY_GRADIO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HOME", "elsewhere")
    finders = [*sys.meta_path]
    with framepack_page.launch_held_back("toy_gradio") as launches:
        demo = importlib.import_module("toy_demo")
    assert launches == [((7,), {"share": False})] and demo.toy_gradio.HF_HOME == "beside the demo"
    assert sys.meta_path == finders
    with pytest.raises(AssertionError, match="launched"):
        demo.block.launch()


def test_importing_the_drop_in_reads_no_environment_of_the_hub():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, magcache_framepack_page; print(*sys.modules)"],
        cwd=REPOSITORY / "MagCache4FramePack",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"gradio", "huggingface_hub", "diffusers", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"mag_ratios": "nothing.json"}, "no calibration file nothing.json"),
        ({"magcache_calibration": "/proc/none/x.json"}, "calibration file /proc/none/x.json cannot be written"),
    ],
)
def test_flags_are_checked_before_weights_are_loaded(given, sentence):
    with pytest.raises(MagCacheError, match=sentence):
        framepack_page.check_flags(flags(**given))


def test_a_torchvision_that_writes_no_videos_is_named(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torchvision", types.SimpleNamespace(io=types.SimpleNamespace(), __version__="0.28.0")
    )
    with pytest.raises(MagCacheError, match="torchvision 0.28.0"):
        framepack_page.check_flags(flags())


def test_install_knows_the_checkout(tmp_path):
    with pytest.raises(MagCacheError, match="demo_gradio.py"):
        install("MagCache4FramePack", tmp_path)
    known, windows = json.loads((REPOSITORY / "MagCache4FramePack" / "install.json").read_text())
    for name in known["recognised_by"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert install("MagCache4FramePack", tmp_path) == "python magcache_demo_gradio.py"
    assert (tmp_path / "magcache_demo_gradio_f1.py").is_file() and (tmp_path / "magcache_framepack.py").is_file()
    (tmp_path / "demo_gradio_f1.py").unlink()
    assert install("MagCache4FramePack", tmp_path) == windows["run"] and "f1" not in str(windows["files"])
