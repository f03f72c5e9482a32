"""HunyuanVideo's own code: its transformer in hunyuan_checks.py, and its scripts, run by hunyuan_cpu.py with tiny
weights. MAGCACHE_HUNYUANVIDEO names a checkout with its requirements (einops, imageio, diffusers, transformers)."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hunyuan_checks import (  # noqa: F401
    test_a_calibration_plans_the_next_run,
    test_hunyuans_residual_of_the_same_step_gives_full_computation,
    test_hunyuans_reused_steps_equal_the_oracle,
    test_off_is_the_untouched_hunyuan,
)
from hunyuan_helpers import STRIPS, HunyuanSubject, reports, videos
from hunyuan_runs import run_hunyuan
from readme_commands import changed, of_script, readme

from common.scripts.install import install
from common.tables import read

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO names no checkout of Tencent/HunyuanVideo")
COMMANDS = of_script(readme("MagCache4HunyuanVideo"), "magcache_sample_video.py")
FP8_WEIGHTS = "ckpts/hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states_fp8.pt"
SMALL = (
    "--flow-reverse --video-size 512 768 --video-length 9 --infer-steps 20 --seed 5 --prompt Grass --precision fp32 "
    "--text-encoder-precision fp32 --text-encoder-precision-2 fp32 --vae-precision fp32"
).split()


class Upstream(HunyuanSubject):
    """HYVideoDiffusionTransformer, rotary embedding and text mask included. It mixes float32 in, so no float64."""

    exact = torch.float32, 1e-4

    def velocity(self, latents, timestep, text, pooled):
        from hyvideo.modules.posemb_layers import get_nd_rotary_pos_embed

        sizes = [latents.shape[2], *(size // 2 for size in latents.shape[3:])]
        cos, sin = get_nd_rotary_pos_embed(
            self.model.rope_dim_list, sizes, theta=256, use_real=True, theta_rescale_factor=1
        )
        mask = (torch.arange(text.shape[1]) < 4).long().repeat(len(text), 1)
        return self.model(
            latents,
            timestep,
            text_states=text,
            text_mask=mask,
            text_states_2=pooled,
            freqs_cos=cos,
            freqs_sin=sin,
            guidance=torch.full((len(latents),), 6000.0),
            return_dict=True,
        )["x"]


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT)
    import hunyuan_cpu
    from hyvideo.modules import attenion, models

    monkeypatch.setattr(attenion, "flash_attn_varlen_func", hunyuan_cpu.flash_attn_varlen_func)
    monkeypatch.setattr(models, "get_cu_seqlens", hunyuan_cpu.get_cu_seqlens)
    return Upstream(hunyuan_cpu.tiny_hunyuan(), channels=16, text_width=4096, pooled_width=768)


@pytest.fixture(scope="module")
def installed_checkout(tmp_path_factory):
    """A copy of the checkout's code with the drop-in installed, and tiny weights."""
    folder = tmp_path_factory.mktemp("hunyuan")
    shutil.copytree(Path(CHECKOUT) / "hyvideo", folder / "hyvideo")
    shutil.copy(Path(CHECKOUT) / "sample_video.py", folder)
    install("MagCache4HunyuanVideo", folder)
    run_hunyuan(["--checkpoint"], folder)
    return folder


@pytest.fixture
def run_upstream(installed_checkout, tmp_path, monkeypatch):
    """Runs a script with flags, in several processes if asked for; results lie under the working directory."""
    monkeypatch.chdir(installed_checkout)

    def start(*arguments, ranks=1, late=False, fails=False):
        for folder in Path().glob("*results*"):
            shutil.rmtree(folder)
        environment = {"MAGCACHE_HOME": str(tmp_path / "home"), **({"HUNYUAN_LATE": "1"} if late else {})}
        return run_hunyuan(arguments, installed_checkout, ranks, fails, **environment)

    return start


def frames(folder="results"):
    (video,) = videos(folder).values()
    return video.astype(int)


def far(one, other):
    return float(np.abs(one - other).mean())


@pytest.mark.parametrize("torchrun, command", COMMANDS, ids=map(str, range(len(COMMANDS))))
def test_every_command_of_hunyuan(run_upstream, torchrun, command, tmp_path):
    """Word for word, with two processes for eight, in a folder whose ckpts/ has tiny weights; "${DIT_CKPT_PATH}" is
    their file in FP8. Sizes are an eighth of those asked for (hunyuan_cpu.py)."""
    ranks = 2 if torchrun else 1
    command = [word.replace("${DIT_CKPT_PATH}", FP8_WEIGHTS) for word in command]
    if torchrun:
        assert torchrun == ("--nproc_per_node=8",)
        command = changed(command, ulysses_degree=ranks)
    said = run_upstream("magcache_sample_video.py", *command, ranks=ranks)
    height, width = command[command.index("--video-size") + 1 :][:2]
    folder = Path(command[command.index("--save-path") + 1] if "--save-path" in command else "results")
    (video,) = videos(folder).values()
    assert len(video) == 129
    if "--magcache_calibration" in command:
        (path,) = (tmp_path / "home").glob(f"hunyuanvideo-t2v-{width}x{height}x129-*.json")
        assert read(path).steps == 50 and not reports(folder)
        return
    (report,) = reports(folder)
    table = "544p" if height == "544" else "720p"
    assert f"  {STRIPS[table]}   # computes" in said[0] and report["strip"] == STRIPS[table]
    # Those for several GPUs and for FP8 ask for 720 pixels of width and 1280 of height.
    differs = f"These ratios were measured at 1280x720, 129 frames; this run is {width}x{height}, 129 frames."
    assert (differs in said[0]) is (height == "1280")
    assert report["calls"] == 50 and not report["unplanned"] and report["use_fp8"] is ("--use-fp8" in command)
    assert ranks == 1 or "MagCache plan" not in said[1]


def test_ranks_render_what_one_process_renders(run_upstream):
    results = {}
    for flags in ((), ("--no-magcache",)):
        run_upstream("magcache_sample_video.py", *SMALL, *flags)
        results[flags, 1] = frames()
        run_upstream("magcache_sample_video.py", *SMALL, *flags, "--ulysses-degree", 2, ranks=2)
        results[flags, 2] = frames()
    apart = far(results[(), 1], results[("--no-magcache",), 1])
    assert apart > 0
    for flags in ((), ("--no-magcache",)):
        assert far(results[flags, 1], results[flags, 2]) < apart / 20


def test_the_wrong_order_is_an_error(run_upstream):
    said = run_upstream("magcache_sample_video.py", *SMALL, "--ulysses-degree", 2, ranks=2, late=True, fails=True)
    assert all("can only concatenate" in text for text in said) and not list(Path("results").glob("*"))


@pytest.mark.parametrize(
    "flags", [[], ["--use-cpu-offload"], ["--use-fp8", "--dit-weight", FP8_WEIGHTS]], ids=["plain", "offload", "fp8"]
)
def test_off_saves_what_sample_video_saves(run_upstream, flags):
    run_upstream("sample_video.py", *SMALL, *flags)
    plain = frames()
    run_upstream("magcache_sample_video.py", *SMALL, *flags, "--magcache_thresh", 0)
    assert np.array_equal(frames(), plain) and reports()[0]["reused"] == 0
    run_upstream("magcache_sample_video.py", *SMALL, *flags)
    assert not np.array_equal(frames(), plain) and reports()[0]["reused"] > 0


def test_several_videos_at_other_settings(run_upstream):
    (said,) = run_upstream(
        "magcache_sample_video.py",
        *SMALL,
        "--num-videos",
        2,
        "--cfg-scale",
        6,
        "--flow-shift",
        5,
        "--compare",
        "--magcache_plot",
    )
    assert len(videos()) == len(reports()) == len(list(Path("results").glob("*.png"))) == 2
    assert len(list(Path("results").glob("*_compare.mp4"))) == 2 and "MS-SSIM" in said
    for report in reports():
        assert report["calls"] == 20 and list(report["quality"])[0] == "un-cached, 20 steps" and not report["unplanned"]


def test_calibration_on_one_and_on_two_ranks(run_upstream, tmp_path):
    run_upstream("sample_video.py", *SMALL)
    plain = frames()
    run_upstream("magcache_sample_video.py", *SMALL, "--magcache_calibration", tmp_path / "one.json")
    assert np.array_equal(frames(), plain)
    run_upstream("magcache_sample_video.py", *SMALL, "--magcache_calibration", "--ulysses-degree", 2, ranks=2)
    (path,) = (tmp_path / "home").glob("hunyuanvideo-t2v-768x512x9-*.json")
    one, two = read(tmp_path / "one.json"), read(path)
    assert one.steps == 20 and two.mag_ratios["cond"] == pytest.approx(one.mag_ratios["cond"], abs=2e-4)
    planned = {}
    for payload, ranks in (("residual", 1), ("output", 1), ("output", 2)):
        run_upstream(
            "magcache_sample_video.py",
            *SMALL,
            "--magcache_steps",
            8,
            "--magcache_payload",
            payload,
            "--ulysses-degree",
            ranks,
            ranks=ranks,
        )
        planned[payload, ranks] = frames()
        assert reports()[0]["computed"] == 8 and not reports()[0]["unplanned"]
    assert far(planned["output", 1], planned["output", 2]) < far(planned["output", 1], plain) / 20
    assert one.settings == two.settings == {"magcache_thresh": 0.24, "magcache_K": 6, "retention_ratio": 0.2}
