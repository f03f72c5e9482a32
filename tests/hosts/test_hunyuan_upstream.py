"""HunyuanVideo's own code: its transformer in hunyuan_checks.py, and its scripts, run by hunyuan_cpu.py with tiny
weights. MAGCACHE_HUNYUANVIDEO names a checkout with its requirements (einops, imageio, diffusers, transformers)."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
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

from common.scripts.install import install
from common.tables import read

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO names no checkout of Tencent/HunyuanVideo")
REPOSITORY = Path(__file__).resolve().parents[2]
HARNESS = REPOSITORY / "tests" / "hosts" / "hunyuan_cpu.py"
README = (REPOSITORY / "MagCache4HunyuanVideo" / "README.md").read_text()
COMMANDS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)]
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
    subprocess.run([sys.executable, HARNESS, "--checkpoint"], cwd=folder, check=True)
    return folder


@pytest.fixture
def run_upstream(installed_checkout, tmp_path, monkeypatch):
    """Runs a script with flags, in several processes if asked for; results lie under the working directory."""
    monkeypatch.chdir(installed_checkout)

    def start(*arguments, ranks=1, late=False, fails=False):
        for folder in Path().glob("*results*"):
            shutil.rmtree(folder)
        environment = {**os.environ, "MAGCACHE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        environment |= {"HUNYUAN_LATE": "1"} if late else {}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        each = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            if ranks > 1
            else {}
            for rank in range(ranks)
        ]
        processes = [
            subprocess.Popen(
                [sys.executable, HARNESS, *map(str, arguments)],
                env=environment | own,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for own in each
        ]
        said = [process.communicate(timeout=500)[0] for process in processes]
        assert all((process.returncode != 0) is fails for process in processes), "\n".join(said)
        return said

    return start


def frames(folder="results"):
    (video,) = videos(folder).values()
    return video.astype(int)


def far(one, other):
    return float(np.abs(one - other).mean())


def arguments(word):
    """The script and its arguments in the README's command of the section Run that contains a word."""
    (command,) = [command for command in COMMANDS if word in command and "--video-length" in command]
    words = shlex.split(command.replace("${DIT_CKPT_PATH}", FP8_WEIGHTS))
    return words[words.index("magcache_sample_video.py") :]


@pytest.mark.parametrize(
    "word, table, exact", [("544 960", "544p", True), ("720 1280", "720p", True), ("--use-fp8", "720p", False)]
)
def test_the_commands_of_hunyuans_readme(run_upstream, word, table, exact):
    command = arguments(word)
    (said,) = run_upstream(*command)
    folder = Path(command[command.index("--save-path") + 1])
    (report,) = reports(folder)
    (video,) = videos(folder).values()
    assert f"  {STRIPS[table]}   # computes" in said and report["strip"] == STRIPS[table] and not report["unplanned"]
    assert (
        "These ratios were measured at 1280x720, 129 frames; this run is 720x1280, 129 frames." in said
    ) is not exact
    assert len(video) == 129 and report["use_fp8"] is (word == "--use-fp8") and report["calls"] == 50


def test_the_command_for_several_gpus_on_two_ranks(run_upstream):
    command = arguments("--ulysses-degree")
    command[command.index("--ulysses-degree") + 1] = "2"
    said = run_upstream(*command, ranks=2)
    folder = Path(command[command.index("--save-path") + 1])
    (report,) = reports(folder)
    assert report["strip"] == STRIPS["720p"] and len(videos(folder)) == 1
    assert "MagCache plan" in said[0] and "MagCache plan" not in said[1]


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
