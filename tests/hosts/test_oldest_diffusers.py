"""The FLUX script on the oldest supported diffusers, installed beside the newest in a folder of its own."""

import json
import os
import subprocess
import sys

import pytest
from flux_scripts import DEMO, DEV, PROMPT
from packages import installed

OLDEST = ("diffusers==0.35.0", "transformers==4.57.6")


@pytest.fixture(scope="session")
def oldest():
    return installed("-".join(OLDEST), *OLDEST)


@pytest.mark.parametrize("model", ["demo", "dev_like"])
def test_script_on_the_oldest_diffusers(oldest, model, dev_like, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(oldest), "OMP_NUM_THREADS": "1"}
    version = subprocess.run(
        [sys.executable, "-c", "import diffusers; print(diffusers.__version__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert version == "0.35.0"
    folder, table = {"demo": (DEMO, "demo"), "dev_like": (dev_like, "flux-dev")}[model]
    done = subprocess.run(
        [
            sys.executable,
            DEV,
            "--model",
            folder,
            "--mag_ratios",
            table,
            "--magcache_interp",
            "nearest",
            "--prompt",
            PROMPT,
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "magcache_flux.magcache.json").read_text())
    ran = "".join("#" if call["kind"] == "computed" else "." for call in report["by_call"])
    assert ran == report["strip"] and "." in ran
    if model == "dev_like":
        assert ran == "###..#...#.#.....#.....#..#."
