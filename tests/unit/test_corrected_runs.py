"""Runs of a patched model are corrected: with any scheduler, offloaded, on two ranks, by a calibration."""

import numpy as np
import pytest
import torch
from offloading import sequential, whole_model
from ranks import two_ranks
from schedulers import COMPUTED, SCHEDULERS, STEPS, scheduler_of

from common.blocks import Host
from common.errors import MagCacheError
from common.interpolation import gram_of_data
from common.patch import magcache_forward
from common.planner import Target
from common.ratios import flow_sigmas
from common.residuals import Residuals
from common.run import CachedRun
from common.schedule import Schedule, Settings
from common.tables import RatioTable
from common.trajectory import Trajectory


class SchedulerLoop:
    """A pipeline: a model, a scheduler, a loop."""

    def __init__(self, model, name="euler"):
        self.model, self.scheduler = model, scheduler_of(name)

    @property
    def timesteps(self):
        return self.scheduler.timesteps

    def run(self, stop=None):
        self.scheduler = type(self.scheduler).from_config(self.scheduler.config)
        self.scheduler.set_timesteps(STEPS)
        sample = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
        for step, timestep in enumerate(self.scheduler.timesteps):
            if step == stop:
                raise KeyboardInterrupt
            output = self.model(sample, timestep.expand(1) / 1000)
            sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]
        return sample


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(2))

    def forward(self, hidden_states, timestep):
        states = hidden_states + timestep.view(-1, 1, 1)
        for block in self.blocks:
            states = states + torch.tanh(block(states))
        return states


def patched_loop(sampler, settings=None, table=None, **options):
    host = Host(blocks=("blocks",), final_layer=None, timestep_scale=1.0)
    options = {"scheduler": lambda: sampler.scheduler, "announce": None, **options}
    return magcache_forward(sampler.model, host, table, settings or Target(6), lambda: sampler.timesteps, **options)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_runs_with_and_without(name):
    sampler, plans = SchedulerLoop(Tiny(), name), []
    plain = sampler.run()
    with patched_loop(sampler, announce=plans.append):
        corrected, again = sampler.run(), sampler.run()
    assert torch.equal(corrected, again) and torch.equal(sampler.run(), plain)
    with patched_loop(sampler, corrector=False, announce=plans.append) as handle:
        off = sampler.run()
    assert handle.reports[0].computed == 6 and "corrector on" in plans[0] and "it was turned off" in plans[-1]
    assert (corrected - plain).norm() < (off - plain).norm()
    with patched_loop(sampler, Target(STEPS)):
        assert torch.equal(sampler.run(), plain)
    assert "step" not in sampler.scheduler.__dict__


@pytest.mark.parametrize("offload", [sequential, whole_model])
def test_an_offloaded_model_is_corrected_alike(offload):
    sampler, offloaded = SchedulerLoop(Tiny(), "unipc"), SchedulerLoop(Tiny(), "unipc")
    offload(offloaded.model)
    with patched_loop(sampler), patched_loop(offloaded) as handle:
        assert torch.equal(offloaded.run(), sampler.run())
    assert handle.reports[0].computed == 6 and not handle.reports[0].unplanned


class Divided(Tiny):
    """As in sequence parallelism: a rank computes its share of the tokens, then all have all of them."""

    def forward(self, hidden_states, timestep):
        rank, shares = torch.distributed.get_rank(), hidden_states.chunk(2, dim=1)
        own = super().forward(shares[rank].contiguous(), timestep)
        gathered = [torch.empty_like(own) for _ in range(2)]
        torch.distributed.all_gather(gathered, own)
        return torch.cat(gathered, dim=1)


def sampled_by_a_rank(rank, folder):
    sampler = SchedulerLoop(Divided(), "unipc")
    with patched_loop(sampler) as handle:
        torch.save((sampler.run(), handle.reports[0].computed), f"{folder}/{rank}.pt")


def test_ranks_that_divide_the_tokens_are_corrected_alike(tmp_path):
    sampler = SchedulerLoop(Tiny(), "unipc")
    with patched_loop(sampler):
        alone = sampler.run()
    two_ranks(sampled_by_a_rank, tmp_path)
    (first, computed), (second, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert computed == 6 and torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_broken_off_run_leaves_no_corrector_behind(stop):
    sampler = SchedulerLoop(Tiny(), "unipc")
    with patched_loop(sampler):
        alone = sampler.run()
    with patched_loop(sampler):
        with pytest.raises(KeyboardInterrupt):
            sampler.run(stop)
        assert torch.equal(sampler.run(), alone)
    assert "step" not in sampler.scheduler.__dict__


def test_the_reason_is_in_the_plan():
    sampler, plans = SchedulerLoop(Tiny()), []
    with patched_loop(sampler, scheduler=None, announce=plans.append):
        sampler.run()
    assert "corrector off, because this sampler's steps cannot be followed" in plans[0]
    assert "no calibration needed, magcache_steps 6, predictor line, payload output" in plans[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Target(5, predictor="line", payload="residual"),
        lambda: Target(5, predictor="line", magcache_guard=2),
        lambda: Target(magcache_max_error=0.1, predictor="line"),
    ],
)
def test_the_line_predicts_outputs_and_knows_no_error(make):
    with pytest.raises(MagCacheError, match="ask for the predictor linear"):
        make()


def test_two_experts_are_not_mixed():
    """What the first expert skipped is not corrected with an output of the second."""
    one, two = Tiny(), Tiny()
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.mul_(-1)

    class Both(SchedulerLoop):
        def run(self):
            self.scheduler = scheduler_of("euler")
            sample = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
            for timestep in self.scheduler.timesteps:
                model = one if timestep >= 700 else two
                output = model(sample, timestep.expand(1) / 1000)
                sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]
            return sample

    sampler = Both([one, two])
    switch = int((scheduler_of("euler").timesteps >= 700).sum())
    seen = []
    with patched_loop(sampler, boundary=0.7) as handle:
        original = Trajectory.corrected

        def corrected(self, gap, step, output):
            seen.extend((skipped, step, min(at for at, _ in self.anchors)) for skipped, _ in gap)
            return original(self, gap, step, output)

        Trajectory.corrected = corrected
        try:
            sampler.run()
        finally:
            Trajectory.corrected = original
    assert handle.reports[0].complete and seen
    for skipped, step, anchor in seen:
        assert (skipped < switch) == (step < switch) == (anchor < switch)


def test_the_rule_is_corrected_too():
    sampler, farness = SchedulerLoop(Tiny()), {}
    plain = sampler.run()
    table = RatioTable("tiny", {"cond": [1.0] + [0.98] * (STEPS - 1)}, tuple(flow_sigmas(STEPS, 3.0)), "measured")
    for corrector in (True, False):
        with patched_loop(sampler, Settings(9.0, 2, 0.1), table, corrector=corrector) as handle:
            farness[corrector] = (sampler.run() - plain).norm()
        assert handle.reports[0].reused > 5
    assert farness[True] < farness[False]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_run_corrects_by_the_calibration_in_its_plan(name):
    """By its outputs, or by x0 made of them where the solver integrates that."""
    scheduler = scheduler_of(name)
    sigmas, rows = scheduler.sigmas.tolist()[:STEPS], np.random.default_rng(0).standard_normal((STEPS, 20))
    reuse = np.array([step not in COMPUTED for step in range(STEPS)])
    for gram in (rows @ rows.T, None):
        schedule = Schedule(reuse, ~reuse, settings=Target(6, predictor="linear"), gram=gram)
        follower = CachedRun(schedule, sigmas, Residuals(), scheduler=scheduler).follower
        kept = follower.trajectory.gram
        follower.detach()
        assert follower.predicts
        if gram is None:
            assert kept is None
        else:
            np.testing.assert_allclose(kept, gram if name == "euler" else gram_of_data(gram, sigmas))
