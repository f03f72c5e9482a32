"""The drop-in in checkouts of Open-Sora, with their own main(), models and configurations, on a CPU with tiny random
weights:

    MAGCACHE_OPENSORA=/path/to/2.0 MAGCACHE_OPENSORA_1_2=/path/to/1.2 MAGCACHE_OPENSORA_1_3=/path/to/1.3 \\
        python -m pytest tests/hosts/test_open_sora_upstream.py

Structure, not quality. Text encoders, VAEs, attention kernels and ColossalAI are replaced (opensora_cpu.py); nothing is
written into the checkouts. Needs mmengine, pandas, av, rotary-embedding-torch, beartype and omegaconf, which they
install too."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from readme_commands import of_script, readme
from wan_runs import WanRuns

from common.scripts.install import install
from common.tables import read


class OpenSoraRuns(WanRuns):
    """A folder that looks like the checkout, with the drop-in, and a server that runs scripts in it."""

    def __init__(self, folder, checkout):
        for name in ("opensora", "scripts", "configs", "assets"):
            (folder / name).symlink_to(checkout / name)
        install("MagCache4Open-Sora", folder)
        self.start(folder, "opensora_cpu.py")

    def torchrun(self, script, config, *flags, cwd, count=1, **env):
        """list of Finished, one a rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        argv = (self.folder / script, self.folder / config, *flags)
        done = self.together(
            [self.process(argv, cwd, RANK=str(rank), LOCAL_RANK=str(rank), **group, **env) for rank in range(count)]
        )
        assert not any(one.code for one in done), done[0].output
        return done


@pytest.fixture(scope="module")
def opensora_checkouts(tmp_path_factory):
    """variable -> OpenSoraRuns, started at first use."""
    started = {}

    def runs(variable):
        if variable not in os.environ:
            pytest.skip(f"{variable} names no checkout of Open-Sora.")
        if variable not in started:
            started[variable] = OpenSoraRuns(tmp_path_factory.mktemp("open-sora"), Path(os.environ[variable]))
        return started[variable]

    yield runs
    for one in started.values():
        one.close()


@pytest.fixture
def folder(tmp_path):
    """Where a test's scripts run."""
    Image.new("RGB", (96, 64), (200, 60, 20)).save(tmp_path / "cat.png")
    (tmp_path / "prompts.csv").write_text('text,ref\n"cat","cat.png"\n"dog walks","cat.png"\n')
    (tmp_path / "videos.csv").write_text('text,ref\n"cat","cat.mp4"\n"dog walks","dog.mp4"\n')
    write_lora(tmp_path / "lora")
    return tmp_path


def write_lora(folder):
    """An adapter for the projections of MMDiTModel's double blocks, made on a model that has nothing else."""

    def named(**modules):
        holder = torch.nn.Module()
        for name, module in modules.items():
            setattr(holder, name, module)
        return holder

    blocks = [named(img_attn=named(proj=torch.nn.Linear(64, 64))) for _ in range(2)]
    config = LoraConfig(target_modules=["img_attn.proj"], init_lora_weights=False)
    get_peft_model(named(double_blocks=torch.nn.ModuleList(blocks)), config).save_pretrained(folder)


def same_videos(results, others):
    return [torch.equal(one, other) for one, other in zip(results, others, strict=True)]


def strip_of(folder, name):
    (found,) = folder.rglob(f"{name}.magcache.json")
    return json.loads(found.read_text())


PLAIN_RULE = ("--magcache_corrector", "off")  # every reused step equals one of the host's with the residual put in
SMALL_2 = (
    "--resolution",
    "256px",
    "--num_frames",
    "5",
    "--num_steps",
    "12",
    "--num_workers",
    "0",
    "--save_dir",
    "out",
    "--dataset.data-path",
    "prompts.csv",
)
# name: (configuration, flags, processes)
RUNS_2 = {
    "t2v": ("256px", (), 1),
    "i2v_head": ("256px", ("--cond_type", "i2v_head"), 1),
    "i2v_loop": ("256px", ("--cond_type", "i2v_loop", "--num_frames", "9"), 1),
    "v2v_head": ("256px", ("--cond_type", "v2v_head", "--dataset.data-path", "videos.csv", "--num_frames", "41"), 1),
    "t2i2v": ("t2i2v_256px", ("--img_resolution", "256px"), 1),
    "high_compression": ("high_compression", ("--img_resolution", "256px", "--num_frames", "8"), 1),
    "lora": ("256px", ("--pretrained_lora_path", "lora"), 1),
    "sequence parallel": ("768px", (), 2),
    "sequence parallel t2i2v": ("t2i2v_768px", ("--img_resolution", "256px"), 2),
}


@pytest.mark.parametrize("name", RUNS_2)
def test_2(opensora_checkouts, folder, name):
    """A csv of two prompts. The first video is measured and equals the host's own; the second equals a full computation
    with the residuals of the skipped steps replaced."""
    runs, (config, flags, count) = opensora_checkouts("MAGCACHE_OPENSORA"), RUNS_2[name]
    flags = (f"configs/diffusion/inference/{config}.py", *SMALL_2, *flags)
    plain = runs.torchrun("scripts/diffusion/inference.py", *flags, cwd=folder, count=count)[0].latents
    first, *others = runs.torchrun(
        "magcache_inference.py", *flags, "--use_magcache", "--magcache_thresh", "0.5", cwd=folder, count=count
    )
    assert same_videos(first.latents[:-1], plain[:-1]) == [True] * (len(plain) - 1)
    assert not torch.equal(first.latents[-1], plain[-1])
    for other in others:
        assert same_videos(other.latents, first.latents) == [True] * len(plain)
    reports = sorted(
        (json.loads(path.read_text()) for path in folder.rglob("out/*/*.json")), key=lambda one: one["reused"]
    )
    assert (
        len(reports) == 2 and reports[0]["computed"] == 12 and reports[1]["reused"] >= 4 and not reports[1]["unplanned"]
    )
    (table,) = (folder / "home").iterdir()
    assert reports[0]["measured"] == str(table) and read(table).sampler["task"] == reports[1]["task"]

    strip = reports[1]["strip"]
    expected = runs.torchrun("scripts/diffusion/inference.py", *flags, cwd=folder, count=count, REUSE=strip)[0].latents
    assert torch.equal(first.latents[-1], expected[-1])
    off = runs.torchrun("magcache_inference.py", *flags, "--use_magcache", "--magcache_K", "0", cwd=folder, count=count)
    assert same_videos(off[0].latents, plain) == [True] * len(plain)


def test_2_data_parallel(opensora_checkouts, folder):
    """Two processes without sequence parallelism render one prompt each, and measure one table together."""
    runs, flags = opensora_checkouts("MAGCACHE_OPENSORA"), ("configs/diffusion/inference/256px.py", *SMALL_2)
    plain = runs.torchrun("scripts/diffusion/inference.py", *flags, cwd=folder, count=2)
    measured = runs.torchrun("magcache_inference.py", *flags, "--use_magcache", cwd=folder, count=2)
    for one, other in zip(plain, measured):
        assert same_videos(one.latents, other.latents) == [True]
    assert len(list((folder / "home").iterdir())) == 1
    later = runs.torchrun(
        "magcache_inference.py", *flags, "--use_magcache", "--magcache_thresh", "0.5", cwd=folder, count=2
    )
    reports = [json.loads(path.read_text()) for path in folder.rglob("out/*/*.json")]
    assert len(reports) == 2 and reports[0]["strip"] == reports[1]["strip"] and "." in reports[0]["strip"]
    assert not torch.equal(later[0].latents[0], plain[0].latents[0])


def test_2_one_prompt_and_a_comparison(opensora_checkouts, folder):
    runs = opensora_checkouts("MAGCACHE_OPENSORA")
    flags = (
        "configs/diffusion/inference/256px.py",
        *SMALL_2[:-2],
        "--prompt",
        "cat",
        "--magcache_steps",
        "5",
        "--magcache_predictor",
        "linear",
        "--compare",
    )
    (done,) = runs.torchrun("magcache_inference.py", *flags, cwd=folder)
    report = strip_of(folder, "prompt_0000")
    assert report["computed"] == 5 and list(report["quality"]) == [
        "un-cached, 12 steps",
        "MagCache, 5 of 12",
        "plain sampler, 5 steps",
    ]
    measured, cached, un_cached, _ = done.latents
    assert torch.equal(measured, un_cached) and not torch.equal(cached, un_cached)
    assert len(list(folder.rglob("prompt_0000_compare.mp4"))) == 1


SMALL_1 = ("--prompt", "cat", "dog walks", "--image-size", "64", "96", "--save-dir", "out")
# name: (environment variable, configuration, flags, processes)
RUNS_1 = {
    "1.2": ("MAGCACHE_OPENSORA_1_2", "opensora-v1-2/inference/sample", ("--num-frames", "17"), 1),
    "1.2 loop": ("MAGCACHE_OPENSORA_1_2", "opensora-v1-2/inference/sample", ("--num-frames", "17", "--loop", "2"), 1),
    "1.2 picture given": (
        "MAGCACHE_OPENSORA_1_2",
        "opensora-v1-2/inference/sample",
        ("--num-frames", "17", "--reference-path", "cat.png", "cat.png", "--mask-strategy", "0", "0"),
        1,
    ),
    "1.2 batch": (
        "MAGCACHE_OPENSORA_1_2",
        "opensora-v1-2/inference/sample",
        ("--num-frames", "17", "--batch-size", "2"),
        1,
    ),
    "1.2 sequence parallel": ("MAGCACHE_OPENSORA_1_2", "opensora-v1-2/inference/sample", ("--num-frames", "17"), 2),
    "1.3": ("MAGCACHE_OPENSORA_1_3", "opensora-v1-3/inference/t2v", ("--num-frames", "49"), 1),
    "1.2 in 1.3": ("MAGCACHE_OPENSORA_1_3", "opensora-v1-2/inference/sample", ("--num-frames", "49"), 1),
    "1.3 i2v": (
        "MAGCACHE_OPENSORA_1_3",
        "opensora-v1-3/inference/v2v",
        ("--num-frames", "49", "--cond-type", "i2v_head", "--reference-path", "cat.png", "cat.png"),
        1,
    ),
    "1.3 sequence parallel": ("MAGCACHE_OPENSORA_1_3", "opensora-v1-3/inference/t2v", ("--num-frames", "49"), 2),
}


@pytest.mark.parametrize("name", RUNS_1)
def test_1(opensora_checkouts, folder, name):
    """With what is published for 1.2, and measured in a first run for 1.3."""
    variable, config, flags, count = RUNS_1[name]
    runs, flags = opensora_checkouts(variable), (f"configs/{config}.py", *SMALL_1, *flags)
    plain = runs.torchrun("scripts/inference.py", *flags, cwd=folder, count=count)[0].latents
    if "v1-3" in config:
        measured = runs.torchrun("magcache_inference.py", *flags, "--magcache_calibration", cwd=folder, count=count)[
            0
        ].latents
        assert same_videos(measured, plain) == [True] * len(plain)
    first, *others = runs.torchrun(
        "magcache_inference.py", *flags, "--use_magcache", *PLAIN_RULE, cwd=folder, count=count
    )
    for other in others:  # in 1.3 only the first decodes
        assert other.latents == [] or same_videos(other.latents, first.latents) == [True] * len(plain)
    report = strip_of(folder, "sample_0000")
    assert not report["unplanned"] and report["calls"] == 30
    if "v1-2" in config:
        assert (report["computed"], report["mag_ratios_of"]) == (12, "open-sora-1.2")
    assert len(report.get("earlier_clips", ())) == ("--loop" in flags)
    expected = runs.torchrun("scripts/inference.py", *flags, cwd=folder, count=count, REUSE=report["strip"])[0].latents
    assert same_videos(first.latents, expected) == [True] * len(plain) and not any(same_videos(first.latents, plain))
    off = runs.torchrun("magcache_inference.py", *flags, "--use_magcache", "--magcache_K", "0", cwd=folder, count=count)
    assert same_videos(off[0].latents, plain) == [True] * len(plain)


def test_1_2_outside_of_torchrun(opensora_checkouts, folder):
    runs = opensora_checkouts("MAGCACHE_OPENSORA_1_2")
    flags = (runs.folder / "configs/opensora-v1-2/inference/sample.py", *SMALL_1, "--num-frames", "17", "--compare")
    done = runs.run(runs.folder / "magcache_inference.py", *flags, cwd=folder)
    assert done.code == 0, done.output
    report = strip_of(folder, "sample_0001")
    assert list(report["quality"]) == ["un-cached, 30 steps", "MagCache, 12 of 30", "plain sampler, 12 steps"]


@pytest.mark.parametrize("variable", ["MAGCACHE_OPENSORA", "MAGCACHE_OPENSORA_1_2"])
def test_help_and_mistyped_flags(opensora_checkouts, folder, variable):
    runs = opensora_checkouts(variable)
    shown = runs.run(runs.folder / "magcache_inference.py", "--help", cwd=folder)
    assert shown.code == 0 and "--use_magcache" in shown.output and "config" in shown.output
    mistyped = runs.run(runs.folder / "magcache_inference.py", "config.py", "--magcache_tresh", "1", cwd=folder)
    assert (
        mistyped.code == 1 and "There is no flag --magcache_tresh; did you mean --magcache_thresh?" in mistyped.output
    )


LESS = {
    "configs/diffusion": "--resolution 256px --num_frames 5 --num_steps 12 --num_workers 0 --save_dir out",
    "configs/opensora-v1-2": "--num-frames 17 --resolution 144p --num-sampling-steps 12 --save-dir out",
    "configs/opensora-v1-3": "--num-frames 49 --resolution 360p --num-sampling-steps 12 --save-dir out",
}
VARIABLES = {"diffusion": "MAGCACHE_OPENSORA", "opensora-v1-2": "MAGCACHE_OPENSORA_1_2"}
LINES = of_script(readme("MagCache4Open-Sora"), "magcache_inference.py")


@pytest.mark.parametrize("torchrun, argv", LINES, ids=[" ".join(argv)[8:70] for _, argv in LINES])
def test_a_line_of_opensoras_readme_renders(opensora_checkouts, folder, torchrun, argv):
    """Word for word, then smaller sizes and fewer steps; two processes for eight."""
    config, *flags = argv
    runs = opensora_checkouts(VARIABLES.get(config.split("/")[1], "MAGCACHE_OPENSORA_1_3"))
    (folder / "assets").symlink_to(runs.folder / "assets")
    less = next(less.split() for start, less in LESS.items() if config.startswith(start))
    if "t2i2v" in config:
        less += ["--img_resolution", "256px"]
    count = 2 if "8" in torchrun or "2" in torchrun else 1
    done = runs.torchrun("magcache_inference.py", config, *flags, *less, cwd=folder, count=count)
    assert done[0].latents
    if "--magcache_calibration" in flags:
        (table,) = (folder / "home").iterdir()
        assert read(table).steps == 12 and "Measured in" in done[0].output
    else:
        reports = [json.loads(path.read_text()) for path in folder.rglob("*.magcache.json")]
        assert reports and all(report["complete"] for report in reports)
