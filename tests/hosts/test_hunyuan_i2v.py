"""The drop-in in a checkout of HunyuanVideo-I2V, with its own sample_image2video.py, pipeline and transformer, on a CPU
with tiny random weights (hunyuan_cpu.py):

MAGCACHE_HUNYUANVIDEO_I2V=/path/to/HunyuanVideo-I2V python -m pytest tests/hosts/test_hunyuan_i2v.py"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.scripts.install import install
from common.scripts.quality import read_frames

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO_I2V")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO_I2V names no checkout of HunyuanVideo-I2V")
HERE = Path(__file__).resolve().parent
SMALL = (
    "--model HYVideo-T/2 --prompt Grass --i2v-mode --i2v-image-path cat.png --i2v-resolution 360p --i2v-stability "
    "--infer-steps 12 --video-length 9 --flow-reverse --flow-shift 7.0 --seed 5 --embedded-cfg-scale 6.0 --save-path "
    "results --precision fp32 --text-encoder-precision fp32 --text-encoder-precision-2 fp32 --vae-precision fp32"
).split()


@pytest.fixture(scope="module")
def run_i2v(tmp_path_factory):
    """Run a script in a copy of the checkout with the drop-in; (what it said, frames of its video, its report)."""
    folder = tmp_path_factory.mktemp("hunyuan_i2v")
    shutil.copytree(Path(CHECKOUT) / "hyvideo", folder / "hyvideo")
    shutil.copy(Path(CHECKOUT) / "sample_image2video.py", folder)
    assert "magcache_sample_image2video.py" in install("MagCache4HunyuanVideo", folder)
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(folder / "cat.png")
    environment = {**os.environ, "MAGCACHE_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}

    def start(*arguments, fails=False):
        shutil.rmtree(folder / "results", ignore_errors=True)
        done = subprocess.run(
            [sys.executable, HERE / "hunyuan_cpu.py", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert (done.returncode != 0) is fails, done.stdout + done.stderr
        videos = sorted(folder.glob("results/*.mp4"))
        reports = [json.loads(path.read_text()) for path in folder.glob("results/*.magcache.json")]
        frames = read_frames(videos[0])[0].astype(int) if videos else None
        return done.stdout + done.stderr, frames, reports[0] if reports else None

    start("--checkpoint")
    return start


@pytest.mark.parametrize("condition", ["token_replace", "latent_concat"])
def test_hunyuan_i2v_reuses_what_an_independent_recomputation_gives(run_i2v, condition):
    said, *_ = run_i2v(HERE / "hunyuan_subjects.py", condition)
    assert "passed" in said.splitlines()


def test_measured_then_planned(run_i2v):
    said, *_ = run_i2v("magcache_sample_image2video.py", *SMALL, fails=True)
    assert "No magnitude ratios are known for hunyuanvideo-i2v-token_replace" in said
    _, plain, _ = run_i2v("sample_image2video.py", *SMALL)
    _, measured, _ = run_i2v("magcache_sample_image2video.py", *SMALL, "--magcache_calibration")
    assert np.array_equal(measured, plain)
    _, off, report = run_i2v("magcache_sample_image2video.py", *SMALL, "--magcache_thresh", "0")
    assert np.array_equal(off, plain) and report["reused"] == 0
    _, frames, report = run_i2v("magcache_sample_image2video.py", *SMALL, "--magcache_steps", "6")
    assert report["computed"] == 6 and report["calls"] == 12 and not report["unplanned"]
    assert report["i2v_image_path"] == "cat.png" and frames.shape == plain.shape and report["reused"] == 6


def test_a_lora_of_hunyuan(run_i2v, tmp_path):
    """The host adds it to the weights after they were patched."""
    name, made = "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc1", torch.Generator().manual_seed(0)
    low_rank = {"lora_up": (128, 4), "lora_down": (4, 64)}
    weights = {f"{name}.{part}.weight": torch.randn(*shape, generator=made) for part, shape in low_rank.items()}
    save_file(weights, tmp_path / "rain.safetensors")
    flags = (*SMALL, "--use-lora", "--lora-path", str(tmp_path / "rain.safetensors"), "--lora-scale", "0.5")
    _, without, _ = run_i2v("sample_image2video.py", *SMALL)
    _, plain, _ = run_i2v("sample_image2video.py", *flags)
    _, off, _ = run_i2v("magcache_sample_image2video.py", *flags, "--magcache_steps", "12")
    assert np.array_equal(off, plain) and not np.array_equal(plain, without)
    _, cached, report = run_i2v("magcache_sample_image2video.py", *flags, "--magcache_steps", "6")
    assert report["task"] == "hunyuanvideo-i2v-token_replace-rain-0.5" and report["computed"] == 6
    assert report["reused"] == 6 and not np.array_equal(cached, plain)
