"""What the files of FramePack share: its package, and its transformer with random weights."""

import copy

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
