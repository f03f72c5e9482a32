"""Fixtures of all tests, and how pytest runs them."""

import copy
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also of the processes that tests start: files run side by side

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
pytest.register_assert_rewrite("hunyuan_checks", "ranks")

from tiny_flux import RATIOS, Euler, Executed, tiny_flux  # noqa: E402

from common.hosts.diffusers import FLUX  # noqa: E402
from common.patch import magcache_calibration, magcache_forward  # noqa: E402
from common.schedule import Settings  # noqa: E402


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist, too
def pytest_xdist_auto_num_workers(config):
    """Two processes for the whole suite; a file or a test that is named runs in this one."""
    return 2 if config.args_source is not config.ArgsSource.ARGS else 0


def pytest_collection_modifyitems(items):
    """What starts hosts, servers and browsers takes most of the time."""
    for item in items:
        if item.path.parent.name in ("hosts", "page"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def first_model():
    return tiny_flux()


@pytest.fixture
def model(first_model):
    return copy.deepcopy(first_model)


@pytest.fixture
def make_model():
    return tiny_flux


@pytest.fixture
def euler():
    return Euler


@pytest.fixture
def executed():
    return Executed


@pytest.fixture
def host():
    return FLUX


@pytest.fixture
def ratios():
    return RATIOS


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of own calibrations, not there yet, in a working folder of the test's own."""
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def cached():
    """`magcache_forward` for a sampler's model. Defaults that reuse seven of twelve steps: ##..#..#..#."""

    def patch(sampler, model=None, thresh=1.0, K=2, retention=0.2, host=FLUX, ratios=RATIOS, announce=None, **options):
        return magcache_forward(
            sampler.model if model is None else model,
            host,
            ratios,
            Settings(thresh, K, retention),
            lambda: sampler.timesteps,
            announce=announce,
            **options,
        )

    return patch


@pytest.fixture
def calibrating():
    def patch(sampler, path=None, host=FLUX, **options):
        return magcache_calibration(sampler.model, host, lambda: sampler.timesteps, "tiny", path, **options)

    return patch
