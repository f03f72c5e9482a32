"""Scripts in a Wan checkout, run on the CPU by one `wan_cpu.py --serve`, for test_wan21.py and
test_wan22.py."""

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.scripts.install import install

REPOSITORY = Path(__file__).resolve().parents[2]
# The package with the code of Wan2.2, as `packages.unpacked` takes it.
WAN22_WHEEL = "wan22", "2.2.11", "1e776684c18d5ca245f5e2e03e19a003deb55b629ea1a450e7bb8f95b78a77bc"


@dataclass
class Finished:
    """A process that ended. latents: of each video that it decoded; entered: {class of module: calls}."""

    code: int
    output: str
    latents: list
    entered: dict


class WanRuns:
    """A copy of a drop-in beside the `wan` and the generate.py of a checkout, and a server that runs scripts with
    them."""

    def __init__(self, folder, package, generate, drop_in):
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        (folder / "wan").symlink_to(package)
        shutil.copy(generate, folder / "generate.py")
        install(drop_in, folder)
        self.start(folder, "wan_cpu.py")

    def start(self, folder, harness):
        """Start the server, a script of this folder, in a folder."""
        self.folder, self.count = folder, 0
        self.log = folder / "server.log"
        self.server = subprocess.Popen(
            [sys.executable, REPOSITORY / "tests" / "hosts" / harness, "--serve"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        )

    def close(self):
        os.killpg(self.server.pid, signal.SIGTERM)
        self.server.wait()

    def together(self, processes, limit=300):
        """Run them at the same time; list of Finished. limit: seconds."""
        try:
            self.server.stdin.write(json.dumps(processes) + "\n")
            self.server.stdin.flush()
        except BrokenPipeError:
            pytest.fail(f"The server ended: {self.log.read_text()}")
        ready, *_ = select.select([self.server.stdout], [], [], limit)
        answer = self.server.stdout.readline() if ready else ""
        if not answer:
            logs = [Path(process["log"]) for process in processes]
            pytest.fail("\n".join(path.read_text() for path in [self.log, *logs] if path.is_file()))
        return [
            Finished(code, Path(process["log"]).read_text(), **torch.load(f"{process['log']}.pt"))
            for process, code in zip(processes, json.loads(answer))
        ]

    def process(self, argv, cwd, **env):
        self.count += 1
        return {
            "argv": list(map(str, argv)),
            "cwd": str(cwd),
            "log": str(self.folder / f"{self.count}.log"),
            "env": {"MAGCACHE_HOME": str(Path(cwd) / "home"), **env},
        }

    def run(self, *argv, cwd):
        """Run one script in a folder that takes what it writes."""
        return self.together([self.process(argv, cwd)])[0]

    def ranks(self, *argv, cwd, count=2):
        """Run a script as torchrun does; list of Finished, one a rank."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
        return self.together(
            [self.process(argv, cwd, RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(count)]
        )

    def checkpoint(self, kind):
        """The folder of a tiny checkpoint (`wan_cpu.write_wan`), written at first use."""
        folder = self.checkpoints / kind
        if not folder.is_dir():
            written = self.run("--checkpoint", kind, folder, cwd=self.folder)
            assert written.code == 0, written.output
        return folder

    def published(self, kind, width, folder):
        """A copy of a tiny checkpoint with the width of a published one in its config.json, by which the scripts know
        it (`wan_cpu.tiny_for_published` reads it all the same)."""
        shutil.copytree(self.checkpoint(kind), folder)
        for path in folder.rglob("config.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), "dim": width}))
