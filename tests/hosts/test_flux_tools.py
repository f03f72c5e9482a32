"""FLUX Fill, Control and Redux by the lines of MagCache4FLUX's README, with tiny random transformers among the parts of
the demo model."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from tiny_pipelines import random_model
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import common

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "MagCache4FLUX" / "README.md").read_text().partition("## FLUX Fill, Control and Redux")[2]
COMMANDS = [shlex.split(line)[1:] for line in re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1].splitlines()]
SMALL = ("--height", "64", "--width", "64", "--max_sequence_length", "16")  # after the line's own flags
KINDS = {"FLUX.1-Fill-dev": diffusers.FluxFillPipeline, "FLUX.1-Canny-dev": diffusers.FluxControlPipeline}


@pytest.fixture(scope="module")
def demo_flux():
    return diffusers.FluxPipeline.from_pretrained(REPOSITORY / "demo" / "image" / "model").to(torch.float32)


def small_picture(pipe, **changes):
    config = {name: value for name, value in pipe.transformer.config.items() if not name.startswith("_")}
    return random_model("FluxTransformer2DModel", **{**config, "num_layers": 1, "num_single_layers": 1, **changes})


@pytest.mark.parametrize("command", COMMANDS, ids=[words[2].partition("/")[2] for words in COMMANDS])
def test_the_line_renders(demo_flux, command, tmp_path, monkeypatch, capsys):
    name = command[2].partition("/")[2]
    pipeline = KINDS[name]
    own = demo_flux.transformer.config.in_channels
    channels = 2 * own + 4 * demo_flux.vae_scale_factor**2 if "Fill" in name else 2 * own
    parts = {
        key: part for key, part in demo_flux.components.items() if key not in ("image_encoder", "feature_extractor")
    }
    parts["transformer"] = small_picture(demo_flux, in_channels=channels, out_channels=own)
    pipeline(**parts).save_pretrained(tmp_path / name)
    for picture in ("cup.png", "mask.png", "edges.png"):
        Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    steps = command.index("--num_inference_steps") + 1
    words = [*command[:2], str(tmp_path / name), *command[3:steps], "8", *command[steps + 1 :], *SMALL]
    monkeypatch.setattr("sys.argv", words)
    runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")
    assert "4 of 8 model calls computed, 4 reused" in capsys.readouterr().out
    (picture,) = tmp_path.glob("magcache_*.png")
    assert Image.open(picture).size == (64, 64)


def test_redux(demo_flux, monkeypatch):
    monkeypatch.setitem(sys.modules, "magcache", common)
    config = SiglipVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    redux = diffusers.FluxPriorReduxPipeline(
        SiglipVisionModel(config),
        SiglipImageProcessor(size={"height": 224, "width": 224}),
        random_model("ReduxImageEncoder", redux_dim=16, txt_in_features=4096),
    )

    class Small(diffusers.FluxPipeline):
        def __call__(self, **options):
            return super().__call__(**{**options, "num_inference_steps": 8}, height=64, width=64)

    parts = {
        **demo_flux.components,
        "transformer": small_picture(demo_flux, joint_attention_dim=4096, pooled_projection_dim=768),
    }
    names = {"pipe": Small(**parts), "redux": redux, "picture": Image.radial_gradient("L").convert("RGB")}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    assert "4 of 8 model calls computed, 4 reused" in names["cache"].report and names["image"].size == (64, 64)
