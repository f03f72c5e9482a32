"""Whether a run has guidance is seen from its calls, however a pipeline makes them: two calls a step, one call for a
batch of both branches, a list of latents. On it depends how far skipped outputs follow the line."""

import pytest
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


@pytest.mark.parametrize("name", WITHOUT)
def test_guidance_is_seen(name, monkeypatch):
    followers = []

    def recorded(*args):
        follower, why = follower_of(*args)
        followers.append(follower)
        return follower, why

    monkeypatch.setattr(run_module, "follower_of", recorded)
    pipe, arguments = FAMILIES[name]()
    for more in ({}, WITHOUT[name]):
        with common.enable(pipe, speedup=2.0, announce=None):
            run_pipeline(pipe, arguments(0), **more)
    seen = [getattr(one, "trajectory", one).guided for one in followers]
    assert seen == [name != "flux", False]
