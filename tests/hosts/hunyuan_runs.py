"""HunyuanVideo's scripts in a checkout, run on a CPU by hunyuan_cpu.py, as torchrun starts them where several processes
are asked for."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).with_name("hunyuan_cpu.py")


def run_hunyuan(arguments, folder, ranks=1, fails=False, **environment):
    """What each process said of a script run in a folder, whose results end there. fails: whether it has to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(ranks)}
    processes = [
        subprocess.Popen(
            [sys.executable, HARNESS, *map(str, arguments)],
            cwd=folder,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                **environment,
                **({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            },
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate(timeout=500)[0] for process in processes]
    assert all((process.returncode != 0) is fails for process in processes), "\n".join(said)
    return said
