"""The drop-in in a checkout of HunyuanVideo-I2V, with its own sample_image2video.py, pipeline and transformer, on a CPU
with tiny random weights (hunyuan_cpu.py):

MAGCACHE_HUNYUANVIDEO_I2V=/path/to/HunyuanVideo-I2V python -m pytest tests/hosts/test_hunyuan_i2v.py"""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hunyuan_runs import run_hunyuan
from PIL import Image
from readme_commands import of_script, readme
from safetensors.torch import save_file

from common.scripts.install import install
from common.scripts.quality import read_frames

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO_I2V")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO_I2V names no checkout of HunyuanVideo-I2V")
HERE, SCRIPT = Path(__file__).resolve().parent, "magcache_sample_image2video.py"
COMMANDS = [command for _, command in of_script(readme("MagCache4HunyuanVideo"), SCRIPT)]
SMALL = (
    "--model HYVideo-T/2 --prompt Grass --i2v-mode --i2v-image-path cat.png --i2v-resolution 360p --i2v-stability "
    "--infer-steps 12 --video-length 9 --flow-reverse --flow-shift 7.0 --seed 5 --embedded-cfg-scale 6.0 --save-path "
    "results --precision fp32 --text-encoder-precision fp32 --text-encoder-precision-2 fp32 --vae-precision fp32"
).split()


@pytest.fixture(scope="module")
def run_i2v(tmp_path_factory):
    """Run a script in a copy of the checkout with the drop-in; (what rank 0 said, frames of its video, its report)."""
    folder = tmp_path_factory.mktemp("hunyuan_i2v")
    for name in ("hyvideo", "assets"):
        shutil.copytree(Path(CHECKOUT) / name, folder / name)
    shutil.copy(Path(CHECKOUT) / "sample_image2video.py", folder)
    assert shlex.split(install("MagCache4HunyuanVideo", folder)) == ["python3", SCRIPT, *COMMANDS[0]]
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(folder / "cat.png")

    def start(*arguments, ranks=1, fails=False, home="home"):
        shutil.rmtree(folder / "results", ignore_errors=True)
        said = run_hunyuan(arguments, folder, ranks, fails, MAGCACHE_HOME=str(folder / home))[0]
        videos = sorted(folder.glob("results/*.mp4"))
        reports = [json.loads(path.read_text()) for path in folder.glob("results/*.magcache.json")]
        frames = read_frames(videos[0])[0].astype(int) if videos else None
        return said, frames, reports[0] if reports else None

    start("--checkpoint")
    return start


def test_every_command_of_i2v(run_i2v):
    """Word for word, in their order, at pictures of an eighth of the size (hunyuan_cpu.py)."""
    measuring, speedup = COMMANDS
    said, measured, report = run_i2v(SCRIPT, *measuring, home="readme")
    assert "Measured in an un-cached run" in said and len(measured) == 129 and report is None
    said, frames, report = run_i2v(SCRIPT, *speedup, home="readme")
    assert report["calls"] == 50 and report["computed"] == 25 and not report["unplanned"] and report["complete"]
    assert frames.shape == measured.shape and report["i2v_image_path"] == "./assets/demo/i2v/imgs/0.jpg"
    said, _, report = run_i2v(SCRIPT, *speedup[:-2], home="readme")  # the paper's rule, by what was measured
    assert report["mag_ratios_of"].startswith("hunyuanvideo-i2v-token_replace-1280x720x129") and report["complete"]


@pytest.mark.parametrize("condition", ["token_replace", "latent_concat"])
def test_hunyuan_i2v_reuses_what_an_independent_recomputation_gives(run_i2v, condition):
    said, *_ = run_i2v(HERE / "hunyuan_subjects.py", condition)
    assert "passed" in said.splitlines()


def test_measured_then_planned(run_i2v):
    said, *_ = run_i2v(SCRIPT, *SMALL, fails=True)
    assert "No magnitude ratios are known for hunyuanvideo-i2v-token_replace" in said
    _, plain, _ = run_i2v("sample_image2video.py", *SMALL)
    _, measured, _ = run_i2v(SCRIPT, *SMALL, "--magcache_calibration")
    assert np.array_equal(measured, plain)
    _, off, report = run_i2v(SCRIPT, *SMALL, "--magcache_thresh", "0")
    assert np.array_equal(off, plain) and report["reused"] == 0
    _, frames, report = run_i2v(SCRIPT, *SMALL, "--magcache_steps", "6")
    assert report["computed"] == 6 and report["calls"] == 12 and not report["unplanned"]
    assert report["i2v_image_path"] == "cat.png" and frames.shape == plain.shape and report["reused"] == 6


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lora_of_hunyuan(run_i2v, tmp_path, ranks):
    """The host adds it to the weights after they were patched, and on several GPUs before it parallelizes them."""
    name, made = "Hunyuan_video_I2V_lora_double_blocks_0_img_mlp_fc1", torch.Generator().manual_seed(0)
    low_rank = {"lora_up": (128, 4), "lora_down": (4, 64)}
    weights = {f"{name}.{part}.weight": torch.randn(*shape, generator=made) for part, shape in low_rank.items()}
    save_file(weights, tmp_path / "rain.safetensors")
    parallel = ("--ulysses-degree", ranks)
    flags = (*SMALL, "--use-lora", "--lora-path", tmp_path / "rain.safetensors", "--lora-scale", "0.5")
    _, without, _ = run_i2v("sample_image2video.py", *SMALL, *parallel, ranks=ranks)
    _, plain, _ = run_i2v("sample_image2video.py", *flags, *parallel, ranks=ranks)
    _, off, _ = run_i2v(SCRIPT, *flags, *parallel, "--magcache_steps", "12", ranks=ranks)
    assert np.array_equal(off, plain) and not np.array_equal(plain, without)
    said, cached, report = run_i2v(SCRIPT, *flags, *parallel, "--magcache_steps", "6", ranks=ranks)
    assert report["task"] == "hunyuanvideo-i2v-token_replace-rain-0.5" and report["computed"] == 6
    assert report["reused"] == 6 and not report["unplanned"] and not np.array_equal(cached, plain)
    _, alone, _ = run_i2v(SCRIPT, *flags, "--magcache_steps", "6")
    assert np.abs(cached - alone).mean() < np.abs(cached - plain).mean() / 20
