"""Every command of Wan2.1's and Wan2.2's READMEs that starts magcache_generate.py, in their order, in real checkouts:

    MAGCACHE_WAN21=/path/to/Wan2.1 MAGCACHE_WAN22=/path/to/Wan2.2 python -m pytest tests/hosts/test_wan_readmes.py

Word for word but for the number of processes, two for eight. The folders that they name hold tiny random weights with
the width of the published checkpoints in their config.json; sizes, number formats and kernels are wan_cpu.py's."""

import json
import os
import re
import subprocess
import wave
from pathlib import Path

import imageio_ffmpeg
import pytest
from PIL import Image
from readme_commands import changed, of_script, readme
from wan_runs import WanRuns

from common.scripts.quality import read_frames

# folder: (tiny checkpoint, width of the published one)
FOLDERS = {
    "MagCache4Wan2.1": {
        "Wan2.1-T2V-1.3B": ("t2v", 1536),
        "Wan2.1-T2V-14B": ("t2v", 5120),
        "Wan2.1-I2V-14B-480P": ("i2v", 5120),
        "Wan2.1-I2V-14B-720P": ("i2v", 5120),
        "Wan2.1-FLF2V-14B-720P": ("flf2v", 5120),
        "Wan2.1-VACE-1.3B": ("vace", 1536),
    },
    "MagCache4Wan2.2": {
        "Wan2.2-T2V-A14B": ("t2v-experts", 5120),
        "Wan2.2-I2V-A14B": ("i2v-experts", 5120),
        "Wan2.2-TI2V-5B": ("ti2v", 3072),
        "Wan2.2-S2V-14B": ("s2v", 48),
        "Wan2.2-Animate-14B": ("animate", 48),
    },
}
VARIABLES = {"MagCache4Wan2.1": "MAGCACHE_WAN21", "MagCache4Wan2.2": "MAGCACHE_WAN22"}
# What the README says of a command: the published table that it runs by, and how many of its steps compute.
PUBLISHED = {
    "Wan2.1-T2V-14B": ("wan2.1-t2v-14b", "18 of 50"),
    "Wan2.1-I2V-14B-480P": ("wan2.1-i2v-14b-480p", "15 of 40"),
    "Wan2.1-I2V-14B-720P": ("wan2.1-i2v-14b-720p", "14 of 40"),
    "Wan2.1-VACE-1.3B": ("wan2.1-vace-1.3b", "29 of 50"),
    "Wan2.2-T2V-A14B": ("wan2.2-t2v-a14b", "26 of 40"),
    "Wan2.2-I2V-A14B": ("wan2.2-i2v-a14b", "30 of 40"),
    "Wan2.2-TI2V-5B": ("wan2.2-ti2v-5b-t2v", "25 of 50"),
}
FRAMES = {"Wan2.2-TI2V-5B": 121, "Wan2.2-Animate-14B": 17}


@pytest.fixture(params=FOLDERS)
def checkout(request, tmp_path, tmp_path_factory, monkeypatch):
    """(a copy of a checkout's code with the drop-in, what its README's commands name beside it, the folder's name)"""
    variable = VARIABLES[request.param]
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout of {request.param.removeprefix('MagCache4')}")
    path = Path(os.environ[variable])
    (tmp_path / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())  # S2V puts the sound into the video by it
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    runs = WanRuns(tmp_path_factory.mktemp("wan"), path / "wan", path / "generate.py", request.param)
    for name, (kind, width) in FOLDERS[request.param].items():
        runs.published(kind, width, runs.folder / name)
    for name in ("cat.jpg", "girl.png", "snake.png", "a.png", "b.png"):
        Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(runs.folder / name)
    with wave.open(str(runs.folder / "talk.wav"), "wb") as sound:
        sound.setparams((1, 2, 16000, 0, "NONE", ""))
        sound.writeframes(bytes(2 * 16000))
    (runs.folder / "process_results").mkdir()
    yield runs, request.param
    runs.close()


def run_line(runs, argv, count=1):
    """(what was said, the video, its report or None) of one command, in the checkout."""
    before = set(runs.folder.iterdir())
    argv = (runs.folder / "magcache_generate.py", *argv)
    group = runs.ranks(*argv, cwd=runs.folder, count=count) if count > 1 else [runs.run(*argv, cwd=runs.folder)]
    assert not any(one.code for one in group), "\n".join(one.output[-3000:] for one in group)
    (video,) = [path for path in runs.folder.iterdir() if path.suffix == ".mp4" and path not in before]
    report = video.with_suffix(".magcache.json")
    return group[0].output, video, json.loads(report.read_text()) if report.exists() else None


def test_every_command_of_wan(checkout):
    """And, of those that measure, the same with --use_magcache after it."""
    runs, folder = checkout
    commands = of_script(readme(folder), "magcache_generate.py")
    assert len(commands) == {"MagCache4Wan2.1": 8, "MagCache4Wan2.2": 9}[folder]
    tables = dict(PUBLISHED)
    for torchrun, argv in commands:
        count = 2 if torchrun else 1
        if torchrun:
            assert torchrun == ("--nproc_per_node=8",)
            argv = changed(argv, ulysses_size=count)
        name = argv[argv.index("--ckpt_dir") + 1].removeprefix("./")
        if "--magcache_calibration" in argv:
            said, video, report = run_line(runs, argv, count)
            tables[name] = re.search(r"Measured in .*, saved as \S+/([\w.-]+?)(-[0-9a-f]{12})+\.json", said)[1], None
            assert report is None and not video.name.startswith("magcache_")
            argv = [*argv[:-1], "--use_magcache"]
        said, video, report = run_line(runs, argv, count)
        assert report["unplanned"] == {} and report["complete"] and video.name.startswith("magcache_")
        assert report["prompt"] in ("...", "anything") or "--prompt" not in argv
        frames, _ = read_frames(video)
        assert len(frames) == FRAMES.get(name, 81) or "--audio" in argv  # as long as the sound
        assert ("--audio" in argv) is has_sound(video)
        computed = f"{report['planned_computed']} of {len(report['strip'])}"
        if "--magcache_speedup" in argv:
            steps = len(report["strip"])
            assert computed == f"{steps // 2} of {steps}" and "no calibration needed" in said
        else:
            table, steps = tables[name]
            assert report["mag_ratios_of"] == table and report["reused"] > 0 and steps in (None, computed)


def has_sound(video):
    told = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", video], capture_output=True, text=True).stderr
    return "Audio:" in told
