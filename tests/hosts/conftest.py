"""What several files share: FramePack's package and its transformer with random weights, and a FLUX checkpoint."""

import copy
import shutil

import pytest


@pytest.fixture(scope="session")
def package():
    from framepack_helpers import load_package

    return load_package()


@pytest.fixture(scope="session")
def first_transformer(package):
    from framepack_cpu import tiny_transformer

    return tiny_transformer(package.transformer)


@pytest.fixture
def transformer(first_transformer):
    model = copy.deepcopy(first_transformer)
    model.register_to_config(_name_or_path="lllyasviel/FramePackI2V_HY")
    return model


@pytest.fixture(scope="session")
def dev_like(tmp_path_factory):
    """A pipeline folder with random weights, the 19 double and 38 single blocks of FLUX.1-dev and its embedded
    guidance, narrow; the other parts are the demo's."""
    import torch
    from diffusers import FluxTransformer2DModel
    from flux_scripts import DEMO

    folder = tmp_path_factory.mktemp("flux") / "dev-like"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    FluxTransformer2DModel(
        in_channels=64,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).save_pretrained(folder / "transformer")
    return folder
