"""HunyuanVideo under sequence parallelism: the patch beneath the forward that the checkout puts on."""

import pytest
import torch
from hunyuan_helpers import CallStrip, Flow, cached_flow, gathered, parallelize, shaped
from ranks import two_ranks

from common.hosts.checkouts import HUNYUANVIDEO_CHECKOUT
from common.patch import magcache_calibration
from common.tables import read


def render_parallel(early=True, **run):
    """(latents, strip of what ran) of a parallelised model, patched before or after."""
    sampler = Flow(shaped())
    blocks = CallStrip(sampler.subject)
    if early:
        handle = cached_flow(sampler)
        parallelize(sampler.subject.model)
    else:
        parallelize(sampler.subject.model)
        handle = cached_flow(sampler)
    with handle:
        latents = sampler.run(**run)
    uncached = sampler.run(**run)
    assert {block.hybrid_seq_parallel_attn for blocks in sampler.subject.lists for block in blocks} == {gathered}
    torch.testing.assert_close(uncached, Flow(shaped()).run(**run))  # the patch is out of the chain by now
    return latents, blocks.strip


def test_a_patch_beneath_parallelising_is_active():
    sampler = Flow(shaped())
    with cached_flow(sampler):
        expected = sampler.run()
    latents, strip = render_parallel()
    assert torch.equal(latents, expected) and strip == "##..#..#..#." + "#" * 12


def test_a_patch_above_parallelising_is_an_error():
    """It would have set its attribute on a stand-in, and the real block would have gone on without its other ranks."""
    subject = shaped()
    parallelize(subject.model)
    sampler = Flow(subject)
    with pytest.raises((TypeError, AttributeError)), cached_flow(sampler):
        sampler.run()
    torch.testing.assert_close(sampler.run(), Flow(shaped()).run())


def one_rank(rank, folder):
    torch.save(render_parallel(cfg=True), folder / f"rank{rank}.pt")
    try:
        render_parallel(early=False)
    except TypeError as error:
        (folder / f"late{rank}").write_text(str(error))
    sampler = Flow(shaped())
    with magcache_calibration(
        sampler.subject.model, HUNYUANVIDEO_CHECKOUT, lambda: sampler.timesteps, "tiny", folder / "two.json"
    ):
        parallelize(sampler.subject.model)
        sampler.run()


def test_two_ranks_render_and_measure_what_one_does(tmp_path):
    two_ranks(one_rank, tmp_path)
    expected, strip = render_parallel(cfg=True)
    for rank in range(2):
        latents, its_strip = torch.load(tmp_path / f"rank{rank}.pt")
        torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)
        assert its_strip == strip and "can only concatenate" in (tmp_path / f"late{rank}").read_text()
    sampler = Flow(shaped())
    with magcache_calibration(
        sampler.subject.model, HUNYUANVIDEO_CHECKOUT, lambda: sampler.timesteps, "tiny", tmp_path / "one.json"
    ):
        sampler.run()
    one, two = (read(tmp_path / f"{name}.json").mag_ratios["cond"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)
