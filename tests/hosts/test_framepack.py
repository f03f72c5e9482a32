"""FramePack's transformer and sampler as the package `framepack` ships them, and the same transformer in diffusers.
Tiny random weights; latents are compared bit for bit."""

import numpy as np
import pytest
import torch
from framepack_cpu import IMAGE_WIDTH, TEXT_WIDTH, tiny_transformer
from framepack_helpers import PACKED, PUBLISHED, TOKENS, cached_sections, entered, measured_sections, sample_section

from common.hosts.diffusers import ALL_TOKENS, FRAMEPACK
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.schedule import Settings
from common.tables import load, read

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
    with cached_sections(package, transformer, settings, name) as handle:
        sample_section(package, transformer, steps)
    assert (
        [step for step, letter in enumerate(strip()) if letter == "."]
        == skipped
        == handle.reports[0].schedule.skipped_steps
    )
    assert handle.reports[0].complete


def test_both_branches_of_guidance_skip_together(package, transformer):
    strip = entered(transformer)
    with cached_sections(package, transformer) as handle:
        sample_section(package, transformer, 25, cfg=3.0)
    planned = handle.reports[0].schedule.strip
    assert strip() == "".join(letter * 2 for letter in planned) and "." in planned
    assert handle.reports[0].computed == 2 * 12


@pytest.mark.parametrize("settings", [Settings(0.1, 0, 0.2), Settings(0, 3, 0.2), Settings(0.1, 3, 1.0)])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_off_is_the_host_bit_for_bit(package, transformer, settings, cfg):
    plain = sample_section(package, transformer, cfg=cfg)
    with cached_sections(package, transformer, settings) as handle:
        assert torch.equal(sample_section(package, transformer, cfg=cfg), plain)
    assert handle.reports[0].reused == 0
    assert torch.equal(sample_section(package, transformer, cfg=cfg), plain) and "forward" not in vars(transformer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_residual_of_the_section_is_all_that_matters(package, transformer, dtype):
    """The release keeps the residual of all tokens; the packed frames' share of it never reaches the output."""
    transformer = transformer.to(dtype)
    with cached_sections(package, transformer) as handle:
        latents = sample_section(package, transformer, 25)
    with cached_sections(package, transformer, host=ALL_TOKENS) as all_tokens:
        assert torch.equal(sample_section(package, transformer, 25), latents)
    kept, of_all = handle.reports[0].peak_bytes, all_tokens.reports[0].peak_bytes
    assert kept == TOKENS * 32 * dtype.itemsize and of_all == (TOKENS + PACKED) * 32 * dtype.itemsize
    assert not torch.equal(sample_section(package, transformer, 25), latents)


@pytest.mark.parametrize("settings, steps", [(Target(7), 12), (PUBLISHED, 50), (PUBLISHED, 100)])
def test_steps_that_round_to_one_timestep_are_told_apart(package, transformer, settings, steps):
    """In bfloat16 the timesteps of FramePack's first steps are equal."""
    transformer = transformer.to(torch.bfloat16)
    strip = entered(transformer)
    table = measured_sections(package, transformer)[0] if isinstance(settings, Target) else "framepack"
    already = len(strip())
    with cached_sections(package, transformer, settings, table) as handle:
        sample_section(package, transformer, steps, cfg=2.0 if steps == 12 else 1.0)
    planned = handle.reports[0].schedule.strip
    assert strip()[already:] == "".join(letter * (2 if steps == 12 else 1) for letter in planned) and "." in planned


def test_dynamic_swap_changes_nothing(package, transformer):
    """The host's way of keeping weights on the CPU gives every module a class of its own."""
    with cached_sections(package, transformer):
        latents = sample_section(package, transformer, 25)
    package.memory.DynamicSwapInstaller.install_model(transformer, device=torch.device("cpu"))
    swapped = type(transformer)
    with cached_sections(package, transformer) as handle:
        assert torch.equal(sample_section(package, transformer, 25), latents)
    assert handle.reports[0].reused == 13 and type(transformer) is swapped


# --- sections ---


def test_every_section_begins_anew(package, transformer):
    alone = []
    for history in (None, "before"):
        with cached_sections(package, transformer):
            alone.append(sample_section(package, transformer, 25, history=alone[0] if history else None))
    with cached_sections(package, transformer) as handle:
        first = sample_section(package, transformer, 25)
        assert not handle.residuals.kept, "the VAE decodes now"
        second = sample_section(package, transformer, 25, history=first)
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1]) and not torch.equal(first, second)
    assert [report.reused for report in handle.reports] == [13, 13]


class Cancelled(KeyboardInterrupt):
    pass


def test_a_section_after_a_cancelled_one_is_as_alone(package, transformer):
    other = {"steps": 12, "frames": 3, "cfg": 2.0, "seed": 4}
    with cached_sections(package, transformer):
        alone = sample_section(package, transformer, **other)

    def cancel(state):
        if state["i"] == 9:
            raise Cancelled

    with cached_sections(package, transformer) as handle:
        with pytest.raises(Cancelled):
            sample_section(package, transformer, 25, callback=cancel)
        assert torch.equal(sample_section(package, transformer, **other), alone)
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
    sample_section(package, model, steps)
    for hook in hooks:
        hook.remove()
    return [residual[:, -kept:] for residual in found]


@pytest.mark.parametrize("host, kept", [(FRAMEPACK, TOKENS), (ALL_TOKENS, TOKENS + PACKED)])
def test_calibration_is_of_the_section_or_of_all_tokens(package, transformer, host, kept):
    residuals = residuals_by_hand(package, transformer, 12, kept)
    by_hand = [float((new.norm(dim=-1) / old.norm(dim=-1)).mean()) for old, new in zip(residuals, residuals[1:])]
    assert residuals[0].shape == (1, kept, 32)
    plain = sample_section(package, transformer)
    table, (latents,) = measured_sections(package, transformer, host=host)
    assert np.allclose(table.mag_ratios["cond"][1:], by_hand, atol=2e-6) and torch.equal(latents, plain)
    assert table.sampler["shift"] == pytest.approx(7, abs=1e-3)


def test_calibration_is_the_mean_over_sections(package, transformer, tmp_path):
    runs = [{"seed": 0}, {"seed": 1}, {"seed": 2}]
    alone = [measured_sections(package, transformer, runs=[run])[0].mag_ratios["cond"] for run in runs]
    table, _ = measured_sections(package, transformer, tmp_path / "t.json", runs=runs)
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

    transformer = tiny_transformer(HunyuanVideoFramepackTransformer3DModel)
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
