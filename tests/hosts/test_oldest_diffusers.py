"""The FLUX script on the oldest supported diffusers, installed beside the newest in a folder of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_flux import DEMO, DEV, PROMPT, dev_like  # noqa: F401  (a fixture)

OLDEST = ("diffusers==0.35.0", "transformers==4.57.6")


@pytest.fixture(scope="session")
def oldest(tmp_path_factory):
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "magcache-tests" / "-".join(OLDEST)
    if not cache.is_dir():
        building = tmp_path_factory.mktemp("oldest")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--target", building, *OLDEST],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            pytest.skip(f"{OLDEST[0]} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        building.rename(cache)
    return cache


@pytest.mark.parametrize("model", ["demo", "dev_like"])
def test_script_on_the_oldest_diffusers(oldest, model, dev_like, tmp_path):  # noqa: F811
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
    report = json.loads((tmp_path / "magcache_flux.json").read_text())
    ran = "".join("#" if call["kind"] == "computed" else "." for call in report["by_call"])
    assert ran == report["strip"] and "." in ran
    if model == "dev_like":
        assert ran == "###..#...#.#.....#.....#..#."
