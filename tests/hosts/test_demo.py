"""The trained demo model in diffusers' own pipelines: what a run leaves behind, and how good its pictures are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxInpaintPipeline, FluxPipeline
from PIL import Image

from common.hosts.diffusers import FLUX
from common.patch import magcache_forward
from common.planner import Target
from common.schedule import Rule, Settings
from common.scripts.quality import quality
from common.tables import load

DEMO = Path(__file__).resolve().parents[2] / "demo" / "image"
PROMPT = "a fox on a sky blue background"


def load_float32_demo():
    pipe = FluxPipeline.from_pretrained(DEMO / "model").to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def image_pipe():
    return load_float32_demo()


def draw_pictures(pipe, prompt=PROMPT, steps=12, size=64, seed=0, **options):
    """uint8 (pictures, height, width, 3)"""
    images = pipe(
        prompt,
        height=size,
        width=size,
        num_inference_steps=steps,
        max_sequence_length=16,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
        **options,
    ).images
    return (images * 255).round().astype(np.uint8)


def patched_pipe(pipe, thresh=0.12, K=3, retention=0.2, target=None, corrector=False):
    return magcache_forward(
        pipe.transformer,
        FLUX,
        load("demo"),
        target or Settings(thresh, K, retention),
        lambda: pipe.scheduler.timesteps,
        Rule(),
        announce=None,
        scheduler=lambda: pipe.scheduler,
        corrector=corrector,
    )


RUNS = {
    "plain": {},
    "steps": {"steps": 9},
    "size": {"size": 96},
    "prompt": {"prompt": "a crown on a purple background", "seed": 5},
    "batch": {"num_images_per_prompt": 2},
    "guidance": {"negative_prompt": "", "true_cfg_scale": 2.0},
}


FREE = {"target": Target(6), "corrector": True}


def each_alone(pipe, **how):
    """Each run by itself, on a model patched for it only."""
    pictures = {}
    for name, options in RUNS.items():
        with patched_pipe(pipe, **how) as handle:
            pictures[name] = draw_pictures(pipe, **options)
        assert handle.reports[-1].reused > 0 and handle.reports[-1].complete
    return pictures


@pytest.fixture(scope="module")
def uncached_picture(image_pipe):
    return each_alone(image_pipe)


@pytest.fixture(scope="module")
def alone_planned(image_pipe):
    return each_alone(image_pipe, target=Target(6, predictor="linear"))


@pytest.mark.parametrize("second", RUNS)
@pytest.mark.parametrize("first", RUNS)
def test_a_run_leaves_nothing_behind(image_pipe, uncached_picture, first, second):
    with patched_pipe(image_pipe):
        draw_pictures(image_pipe, **RUNS[first])
        assert np.array_equal(draw_pictures(image_pipe, **RUNS[second]), uncached_picture[second])


@pytest.mark.parametrize("second", RUNS)
def test_a_planned_run_leaves_nothing_behind(image_pipe, alone_planned, second):
    with patched_pipe(image_pipe, target=Target(6, predictor="linear")) as handle:
        draw_pictures(image_pipe, **RUNS["guidance"])
        assert np.array_equal(draw_pictures(image_pipe, **RUNS[second]), alone_planned[second])
        assert handle.residuals.bytes == 0


@pytest.mark.parametrize("step", range(12))
def test_a_run_that_breaks_off_leaves_nothing_behind(image_pipe, uncached_picture, step):
    def stop(pipe, at, timestep, tensors):
        if at == step:
            raise KeyboardInterrupt
        return tensors

    with patched_pipe(image_pipe) as handle:
        with pytest.raises(KeyboardInterrupt):
            draw_pictures(image_pipe, callback_on_step_end=stop)
        for name in ("plain", "guidance"):
            assert np.array_equal(draw_pictures(image_pipe, **RUNS[name]), uncached_picture[name])
        assert handle.residuals.bytes == 0


def test_two_pipelines_take_turns(image_pipe, uncached_picture):
    """A whole run of another pipeline between two steps of the first."""
    other = load_float32_demo()

    def interrupt(_, at, timestep, tensors):
        if at in (3, 7):
            assert np.array_equal(draw_pictures(other, **RUNS["prompt"]), uncached_picture["prompt"])
        return tensors

    with patched_pipe(image_pipe), patched_pipe(other):
        assert np.array_equal(draw_pictures(image_pipe, callback_on_step_end=interrupt), uncached_picture["plain"])


def test_threshold_zero_and_after_removal_is_the_plain_pipeline(image_pipe):
    plain = draw_pictures(image_pipe)
    with patched_pipe(image_pipe, thresh=0):
        assert np.array_equal(draw_pictures(image_pipe), plain)
    with patched_pipe(image_pipe):
        assert not np.array_equal(draw_pictures(image_pipe), plain)
    assert np.array_equal(draw_pictures(image_pipe), plain) and "forward" not in image_pipe.transformer.__dict__


def test_every_block_runs_at_computed_steps_and_none_at_reused_ones(image_pipe):
    blocks = [*image_pipe.transformer.transformer_blocks, *image_pipe.transformer.single_transformer_blocks]
    entered = []
    hooks = [block.register_forward_hook(lambda *_: entered.append(None)) for block in blocks]
    try:
        with patched_pipe(image_pipe) as handle:
            draw_pictures(image_pipe)
    finally:
        for hook in hooks:
            hook.remove()
    schedule = handle.reports[-1].schedule
    assert len(entered) == schedule.computed * len(blocks) and schedule.computed < schedule.steps
    assert [call[2] for call in handle.reports[-1].calls] == [
        "reused" if reuse else "computed" for reuse in schedule.reuse
    ]


def test_image_to_image_starts_in_the_middle(image_pipe):
    """strength 0.5: the ratios are those of the lower noise levels, and the first step of the run computes."""
    edit = pipeline_of_kind(image_pipe, FluxImg2ImgPipeline)
    start = Image.fromarray(draw_pictures(image_pipe, steps=28)[0])

    def change():
        return draw_pictures(edit, "a fox on a pink background", 28, image=start, strength=0.5)

    uncached = change()
    with patched_pipe(image_pipe) as handle:
        draw_pictures(image_pipe)
        cached = change()
    report = handle.reports[-1]
    assert report.schedule.steps == 14 and report.complete and report.reused > 0
    assert np.allclose(report.levels, load("demo").sigmas[14:], atol=1e-4)
    assert quality(uncached, cached)["psnr"] > 25


def edits_latents(pipe, step, timestep, tensors):
    if step == 5:
        tensors["latents"] = tensors["latents"] * 0.97
    return tensors


def pipeline_of_kind(pipe, kind):
    """Another pipeline of the same parts."""
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")
    other = kind(**{name: pipe.components[name] for name in parts})
    other.set_progress_bar_config(disable=True)
    return other


@pytest.mark.parametrize("name", ["plain", "batch", "guidance", "callback", "image", "mask", "bfloat16"])
def test_a_run_without_a_calibration_is_corrected(image_pipe, name):
    """Nearer to the un-cached picture than uncorrected, the same twice, and what a mask or a callback does stays."""
    start, mask = Image.fromarray(draw_pictures(image_pipe, steps=28)[0]), np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    drawn, options = image_pipe, {"steps": 16, **RUNS.get(name, {})}
    if name == "callback":
        options["callback_on_step_end"] = edits_latents
    if name == "image":
        drawn, options = (
            pipeline_of_kind(image_pipe, FluxImg2ImgPipeline),
            {"steps": 24, "image": start, "strength": 0.7},
        )
    if name == "mask":
        drawn = pipeline_of_kind(image_pipe, FluxInpaintPipeline)
        options = {"steps": 24, "image": start, "mask_image": Image.fromarray(mask), "strength": 0.9}
    if name == "bfloat16":
        drawn = load_float32_demo().to(torch.bfloat16)
    plain, psnr = draw_pictures(drawn, **options), {}
    for corrector in (True, False):
        with patched_pipe(drawn, target=Target(8), corrector=corrector) as handle:
            cached = draw_pictures(drawn, **options)
            assert np.array_equal(draw_pictures(drawn, **options), cached)
        assert handle.reports[-1].complete and not handle.reports[-1].unplanned and handle.reports[-1].reused > 0
        psnr[corrector] = quality(plain, cached)["psnr"]
    assert psnr[True] > (psnr[False] + 0.5 if name != "bfloat16" else 30)
    assert "step" not in drawn.scheduler.__dict__ and np.array_equal(draw_pictures(drawn, **options), plain)


@pytest.mark.parametrize("step", (0, 1, 4, 7, 10))
def test_a_corrected_run_that_breaks_off_leaves_nothing_behind(image_pipe, step):
    def stop(pipe, at, timestep, tensors):
        if at == step:
            raise KeyboardInterrupt
        return tensors

    with patched_pipe(image_pipe, **FREE):
        alone = draw_pictures(image_pipe)
    with patched_pipe(image_pipe, **FREE) as handle:
        with pytest.raises(KeyboardInterrupt):
            draw_pictures(image_pipe, callback_on_step_end=stop)
        assert np.array_equal(draw_pictures(image_pipe), alone)
    assert handle.residuals.bytes == 0 and "step" not in image_pipe.scheduler.__dict__


FLOORS = json.loads((Path(__file__).parent / "demo_floors.json").read_text())


@pytest.mark.parametrize("floor", FLOORS["floors"], ids=lambda floor: f"{floor['settings']}")
def test_quality_stays_above_what_was_measured(image_pipe, floor):
    """Mean PSNR against un-cached, eight prompts that were not calibrated on, less the margin in demo_floors.json."""
    psnr = []
    for seed, prompt in enumerate(FLOORS["prompts"]):
        uncached = draw_pictures(image_pipe, prompt, 28, seed=seed)
        with patched_pipe(image_pipe, *floor["settings"]) as handle:
            cached = draw_pictures(image_pipe, prompt, 28, seed=seed)
        psnr.append(quality(uncached, cached)["psnr"])
    assert handle.reports[-1].schedule.computed == floor["computed"]
    assert np.mean(psnr) > floor["psnr"] - FLOORS["margin"]


@pytest.mark.parametrize("floor", FLOORS["planned"], ids=lambda floor: f"{floor['computed']} steps")
def test_planned_quality_is_above_fewer_steps(image_pipe, floor):
    """As above but corrected, and against the plain sampler with as many steps, by the advantage then measured less the
    margin."""
    psnr, control = {"residual": [], "output": []}, []
    for seed, prompt in enumerate(FLOORS["prompts"]):
        uncached = draw_pictures(image_pipe, prompt, 28, seed=seed)
        for payload, values in psnr.items():
            target = Target(floor["computed"], predictor="linear", payload=payload)
            with patched_pipe(image_pipe, target=target, corrector=True):
                values.append(quality(uncached, draw_pictures(image_pipe, prompt, 28, seed=seed))["psnr"])
        control.append(quality(uncached, draw_pictures(image_pipe, prompt, floor["computed"], seed=seed))["psnr"])
    for payload, values in psnr.items():
        assert np.mean(values) > floor[payload] - FLOORS["margin"]
        assert np.mean(values) - np.mean(control) > floor[payload] - floor["fewer steps"] - FLOORS["margin"]
