"""Whether a run has guidance is seen from its calls, however a pipeline makes them: two calls a step, one call for a
batch of both branches, a list of latents. On it depends how far skipped outputs follow the line."""

import pytest
import torch
from tiny_pipelines import FAMILIES, run_pipeline

import common
from common import run as run_module
from common.corrector import follower_of

WITHOUT = {
    "sd3": {"guidance_scale": 1.0},  # with it one batch
    "cogvideox": {"guidance_scale": 1.0},
    "z_image": {"guidance_scale": 0.0},  # a list
    "wan": {"guidance_scale": 1.0},  # two calls
    "qwen_image": {"true_cfg_scale": 1.0},
    "flux": {},
}


@pytest.fixture
def seen(monkeypatch):
    """Gives () -> whether each run so far had guidance, as its follower saw."""
    followers = []

    def recorded(*args):
        follower, why = follower_of(*args)
        followers.append(follower)
        return follower, why

    monkeypatch.setattr(run_module, "follower_of", recorded)
    return lambda: [getattr(one, "trajectory", one).guided for one in followers]


@pytest.mark.parametrize("name", WITHOUT)
def test_guidance_is_seen(name, seen):
    pipe, arguments = FAMILIES[name]()
    for more in ({}, WITHOUT[name]):
        with common.enable(pipe, speedup=2.0, announce=None):
            run_pipeline(pipe, arguments(0), **more)
    assert seen() == [name != "flux", False]


def test_two_pictures_of_one_seed_are_not_taken_for_guidance(seen):
    """Their first latents are one."""
    pipe, arguments = FAMILIES["sd3"]()
    both = [arguments(seed) for seed in (0, 1)]
    together = {
        name: torch.cat([one[name] for one in both]) if torch.is_tensor(value) else value
        for name, value in both[0].items()
    }
    for guidance in (4.0, 1.0):
        generators = [torch.Generator().manual_seed(0) for _ in both]
        with common.enable(pipe, speedup=2.0, announce=None):
            run_pipeline(pipe, together, guidance_scale=guidance, generator=generators)
    assert seen() == [True, False]
