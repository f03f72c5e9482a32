"""A real checkpoint that torchao quantised, through the FLUX script; needs `pip install torchao`."""

import shutil
import subprocess
import sys

import pytest
import torch
from wan_runs import REPOSITORY

torchao = pytest.importorskip("torchao")

from diffusers import FluxTransformer2DModel, TorchAoConfig  # noqa: E402
from torchao.quantization import Int8WeightOnlyConfig  # noqa: E402

DEMO = REPOSITORY / "demo" / "image" / "model"


@pytest.fixture(scope="module")
def quantised_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchao") / "model"
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = FluxTransformer2DModel.from_pretrained(
        DEMO / "transformer", torch_dtype=torch.bfloat16, quantization_config=config
    )
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("transformer"))
    model.save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize(
    "flags, said",
    [(["--no-magcache"], "magcache_flux.png"), (["--magcache_speedup", "2"], "3 of 6 model calls computed")],
    ids=["off", "cached"],
)
def test_a_torchao_checkpoint_in_the_flux_script(quantised_checkpoint, tmp_path, flags, said):
    script = REPOSITORY / "MagCache4FLUX" / "magcache_flux.py"
    run = [sys.executable, script, "--model", quantised_checkpoint, "--prompt", "a cat", "--steps", "6"]
    done = subprocess.run(
        [*run, "--height", "64", "--width", "64", *flags], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert said in done.stdout + done.stderr and list(tmp_path.glob("*.png"))
