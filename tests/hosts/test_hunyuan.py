"""HunyuanVideo's transformer: one shaped like the checkout's, and diffusers' own. test_hunyuan_upstream.py runs the
same checks on the checkout's transformer, and its scripts."""

import re

import pytest
import torch
from hunyuan_checks import (  # noqa: F401
    test_a_calibration_plans_the_next_run,
    test_hunyuans_residual_of_the_same_step_gives_full_computation,
    test_hunyuans_reused_steps_equal_the_oracle,
    test_off_is_the_untouched_hunyuan,
)
from hunyuan_helpers import REPOSITORY, STRIPS, CallStrip, Diffusers, Flow, cached_flow, shaped

from common.schedule import Settings
from common.tables import load

PUBLISHED = Settings(0.24, 6, 0.2)


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


@pytest.mark.parametrize("steps", [50, 30, 8])
@pytest.mark.parametrize("size", STRIPS)
def test_published_tables_at_step_counts(size, steps):
    subject = shaped()
    sampler, blocks, table = Flow(subject), CallStrip(subject), load(f"hunyuanvideo-t2v-{size}")
    with cached_flow(sampler, table, PUBLISHED) as handle:
        sampler.run(steps=steps)
    assert blocks.strip == handle.reports[0].schedule.strip
    if steps == 50:
        assert table.fits(sampler.timesteps.numpy() / 1000) and blocks.strip == STRIPS[size]
    assert 1 <= blocks.strip.count(".") and not handle.reports[0].unplanned


def test_a_batch_equals_its_videos():
    subject = shaped()
    sampler = Flow(subject)
    with cached_flow(sampler):
        together = sampler.run(videos=2, size=(3, 8, 12))
        alone = torch.cat([sampler.run(seed=seed) for seed in range(2)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_first_latent_may_be_float16():
    """As in the checkout, where the text encoder's dtype is the noise's: the steps after it come in float32."""
    subject = shaped()
    sampler, blocks = Flow(subject), CallStrip(subject)
    with cached_flow(sampler, settings=Settings(1.0, 2, 0.0)) as handle:
        sampler.run(dtype=torch.float16)
    assert blocks.strip == "#..#..#..#.." and not handle.reports[0].unplanned


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
