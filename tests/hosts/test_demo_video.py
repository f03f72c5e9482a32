"""The trained demo video model in diffusers' own WanPipeline: it draws what the prompt says, and cached clips are close
to un-cached ones."""

import sys
import warnings

import numpy as np
import pytest
import torch
from wan_runs import REPOSITORY

from common.hosts import host_of
from common.patch import magcache_forward
from common.pipeline import enable
from common.planner import Target
from common.schedule import Rule, Settings
from common.scripts.quality import quality
from common.tables import load

DEMO = REPOSITORY / "demo" / "video"
sys.path.insert(1, str(DEMO))
import clips  # noqa: E402

# What is said, and how the middle (x, y) and the area of the object must change from the first frame to the last.
SAID = {
    ("apple", "rises", "white"): {"y": -12},
    ("red balloon", "falls", "sky blue"): {"y": 12},
    ("frog", "moves to the left", "white"): {"x": -12},
    ("fox", "moves to the right", "dark blue"): {"x": 12},
    ("heart", "grows", "green"): {"area": 2.5},
    ("star", "shrinks", "dark blue"): {"area": 0.4},
}
# Which of red, green and blue is the strongest, and which the weakest, where the object is.
COLOURS = {"apple": "rb", "red balloon": "r", "frog": "gb", "fox": "rb", "heart": "r", "star": "b"}


@pytest.fixture(scope="module")
def video_pipe():
    from diffusers import WanPipeline

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipe = WanPipeline.from_pretrained(DEMO / "model", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_clips(pipe, prompts, steps=14, guidance=5.0, seed=3):
    """uint8 (clips, frames, height, width, 3)"""
    frames = pipe(
        list(prompts),
        height=clips.SIZE,
        width=clips.SIZE,
        num_frames=clips.FRAMES,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    ).frames
    return (np.asarray(frames) * 255).round().astype(np.uint8)


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in (DEMO / "model").rglob("*") if path.is_file()) < 16e6


def test_clips_show_what_the_prompts_say(video_pipe):
    drawn = draw_clips(video_pipe, [clips.caption(*words) for words in SAID])
    for (name, motion, background), frames in zip(SAID, drawn.astype(float)):
        said = f"{name} {motion}"
        ground = np.array(clips.BACKGROUNDS[background])
        corners = frames[:, [0, 0, -1, -1], [0, -1, 0, -1]].reshape(-1, 3)
        assert np.abs(np.median(corners, axis=0) - ground).max() < 16, said
        object_ = np.abs(frames - ground).max(axis=3) > 48
        area = object_.sum(axis=(1, 2))
        assert 40 < area.min() and area.max() < 0.7 * clips.SIZE**2, (said, area)
        middles = {axis: [np.nonzero(one)[index].mean() for one in object_] for axis, index in (("y", 0), ("x", 1))}
        for what, change in SAID[name, motion, background].items():
            if what == "area":
                grown = area[-3:].mean() / area[:3].mean()
                assert (grown > change) if change > 1 else (grown < change), (said, grown)
            else:
                moved = middles[what][-1] - middles[what][0]
                assert moved / change > 1, (said, moved)
        strength = dict(zip("rgb", frames[object_].mean(axis=0)))
        order = COLOURS[name]
        if order[0] == "b":
            assert min(strength, key=strength.get) == "b", (said, strength)
        else:
            assert max(strength, key=strength.get) == order[0], (said, strength)
            assert len(order) == 1 or min(strength, key=strength.get) == order[1], (said, strength)


def test_guidance_was_trained_with_dropped_prompts(video_pipe):
    """Without a prompt it draws some object on some background: clips that differ among seeds, none of them empty."""
    drawn = draw_clips(video_pipe, ["", ""], guidance=1.0).astype(float)
    assert np.abs(drawn[0] - drawn[1]).mean() > 8
    for frames in drawn:
        assert frames[8].std(axis=(0, 1)).max() > 12


@pytest.mark.parametrize(
    "settings, floor",
    [(Settings(0.12, 4, 0.2), 39.2), (Target(15), 41.2)],
    ids=["the settings released for Wan", "half the steps"],
)
def test_cached_clips_are_close_to_uncached_ones(video_pipe, settings, floor):
    """Floors: 1.5 dB below what was measured on 2026-11-26."""
    prompts = [clips.caption(*words) for words in list(SAID)[:4]]
    plain = draw_clips(video_pipe, prompts, steps=30)
    with magcache_forward(
        video_pipe.transformer,
        host_of(video_pipe.transformer),
        load("demo-video"),
        settings,
        lambda: video_pipe.scheduler.timesteps,
        Rule(),
        announce=None,
        scheduler=lambda: video_pipe.scheduler,
    ) as handle:
        cached = draw_clips(video_pipe, prompts, steps=30)
    assert handle.reports[-1].reused >= 30 and handle.reports[-1].complete
    psnr = np.mean([quality(one, other)["psnr"] for one, other in zip(plain, cached)])
    assert psnr > floor, psnr


def test_two_experts_of_a_trained_model():
    """A gap never reaches across the change of experts, and cached clips are close. Floor: as above."""
    from experts import load_experts

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.*")
        pipe = load_experts()
    pipe.set_progress_bar_config(disable=True)
    prompts = [clips.caption(*words) for words in list(SAID)[:2]]
    plain = draw_clips(pipe, prompts, steps=20)
    with enable(pipe, steps=10, announce=None) as cache:
        cached = draw_clips(pipe, prompts, steps=20)
    (report,) = cache.reports
    levels = [float(level) / 1000 for level in pipe.scheduler.timesteps]
    switch = next(step for step, level in enumerate(levels) if level < pipe.config.boundary_ratio)
    assert 0 < switch < 19 and report.reused == 20 and report.complete
    assert {kind for step, _, kind, *_ in report.calls if step == switch} == {"computed"}
    psnr = np.mean([quality(one, other)["psnr"] for one, other in zip(plain, cached)])
    assert psnr > 34.1, psnr
