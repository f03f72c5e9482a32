"""What every HunyuanVideo transformer has to pass: run by the test files that import these, each with a fixture
`subject` of its own, and by hunyuan_subjects.py."""

import copy

import numpy as np
import pytest
import torch
from hunyuan_helpers import RATIOS, SHORT, CallStrip, Flow, HunyuanOracle, cached_flow

from common.blocks import BlockStack
from common.patch import magcache_calibration
from common.plan_text import memory_text
from common.planner import Target
from common.schedule import Settings, magcache_schedule
from common.tables import read


@pytest.mark.parametrize("settings", [Settings(0.0, 6, 0.2), Settings(0.24, 0, 0.2)], ids=["thresh", "K"])
def test_off_is_the_untouched_hunyuan(subject, settings):
    sampler = Flow(subject)
    plain = sampler.run()
    with cached_flow(sampler, settings=settings) as handle:
        assert torch.equal(sampler.run(), plain)
    assert handle.reports[-1].reused == 0
    assert torch.equal(sampler.run(), plain)


@pytest.mark.parametrize("run", [{}, {"cfg": True}, {"videos": 2}, {"steps": 17, "shift": 5.0}], ids=str)
def test_hunyuans_reused_steps_equal_the_oracle(subject, run):
    """And what was planned is what ran, with one call a step."""
    sampler, reference = Flow(copy.deepcopy(subject)), Flow(copy.deepcopy(subject))
    blocks, plans, plain = CallStrip(sampler.subject), [], list(Flow(subject).iterate(**run))
    with cached_flow(sampler, announce=plans.append) as handle:
        mine = list(sampler.iterate(**run))
    report = handle.reports[0]
    planned = magcache_schedule(RATIOS.at(sampler.timesteps.numpy() / 1000), SHORT).strip
    assert blocks.strip == report.schedule.strip == planned and f"  {planned}   # computes" in plans[0]
    assert (
        report.complete
        and not report.unplanned
        and f"extra memory: {memory_text(report.peak_bytes)} per branch" in plans[0]
    )
    HunyuanOracle(reference, report.schedule.reuse)
    theirs = list(reference.iterate(**run))
    first = planned.index(".")
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(mine[first - 1], plain[first - 1]) and not torch.equal(mine[first], plain[first])


def test_hunyuans_residual_of_the_same_step_gives_full_computation(subject):
    """In float64 where the model can, since a + (b - a) is b up to rounding only."""
    dtype, tolerance = subject.exact
    subject.model.to(dtype)
    plain = Flow(subject).run(steps=5, dtype=dtype)
    stack, velocity, calls = BlockStack(subject.model, subject.host), subject.velocity, []

    def twice(*args):
        stack.record()
        full = velocity(*args)
        stack.replace(stack.finish())
        again = velocity(*args)
        stack.restore()
        calls.append(full)
        torch.testing.assert_close(again, full, rtol=0, atol=tolerance)
        return again

    subject.velocity = twice
    torch.testing.assert_close(Flow(subject).run(steps=5, dtype=dtype), plain, rtol=0, atol=10 * tolerance)
    assert len(calls) == 5


def test_a_calibration_plans_the_next_run(subject, tmp_path):
    sampler = Flow(copy.deepcopy(subject))
    plain = Flow(subject).run(cfg=True)
    norms, watched = [], Flow(subject)
    oracle = HunyuanOracle(watched, np.zeros(12, dtype=bool))
    for _ in watched.iterate(cfg=True):
        norms.append(oracle.residual.norm(dim=-1))
    with magcache_calibration(
        sampler.subject.model, subject.host, lambda: sampler.timesteps, "tiny", tmp_path / "tiny.json"
    ):
        assert torch.equal(sampler.run(cfg=True), plain)
    table = read(tmp_path / "tiny.json")
    expected = [1.0, *(float((new / old).mean()) for old, new in zip(norms, norms[1:]))]
    assert list(table.mag_ratios) == ["cond"] and table.mag_ratios["cond"] == pytest.approx(expected, abs=1e-5)
    blocks = CallStrip(sampler.subject)
    with cached_flow(sampler, table, Target(magcache_steps=6)) as handle:
        sampler.run(cfg=True)
    assert (
        blocks.strip == handle.reports[0].schedule.strip
        and blocks.strip.count("#") == 6
        and not handle.reports[0].unplanned
    )
