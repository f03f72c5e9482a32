"""A residual belongs to its conditioning and its trajectory, not to the order of calls."""

import copy
import itertools

import pytest
import torch
from tiny_flux import CHANNELS, TEXT_TOKENS, TEXT_WIDTH
from tiny_runs import SHORT, Oracle, alone

from common.corrector import EULER
from common.errors import MagCacheError
from common.hosts.diffusers import FLUX
from common.patch import magcache_forward
from common.planner import Target
from common.ratios import flow_sigmas


class Loop:
    """A hand-written sampler: at each step it calls the model for each of a list of calls, (latent, prompt) numbers,
    and moves each latent by the mean of its velocities."""

    dtype = torch.float32

    def __init__(self, model, latents=1, prompts=1, steps=8, size=64):
        made = torch.Generator().manual_seed(0)
        self.model, self.steps, self.size = model, steps, size
        self.latents = [torch.randn(1, size, CHANNELS, generator=made) for _ in range(latents)]
        self.prompts = [torch.randn(1, TEXT_TOKENS, TEXT_WIDTH, generator=made) for _ in range(prompts)]
        self.pooled = [torch.randn(1, TEXT_WIDTH, generator=made) for _ in range(prompts)]
        self.timesteps, self.step = None, None

    def run(self, calls, between=None):
        """calls: step -> [(latent, prompt), ...]; between: called with the step before it begins."""
        latents = [latent.clone() for latent in self.latents]
        sigmas = [*flow_sigmas(self.steps, 3.0), 0.0]
        self.timesteps = torch.tensor(sigmas[:-1], dtype=torch.float32) * 1000
        side = torch.arange(self.size)
        img_ids = torch.stack([torch.zeros(self.size), side // 8, side % 8], dim=1)
        for step in range(self.steps):
            self.step = step
            if between:
                between(self.step)
            velocities = {}
            for latent, prompt in calls(self.step):
                velocity = self.model(
                    hidden_states=latents[latent],
                    timestep=self.timesteps[self.step].expand(1) / 1000,
                    guidance=torch.full((1,), 3.5),
                    pooled_projections=self.pooled[prompt],
                    encoder_hidden_states=self.prompts[prompt],
                    txt_ids=torch.zeros(TEXT_TOKENS, 3),
                    img_ids=img_ids,
                    return_dict=False,
                )[0]
                velocities.setdefault(latent, []).append(velocity)
            change = sigmas[self.step + 1] - sigmas[self.step]
            for latent, made in velocities.items():
                latents[latent] = latents[latent] + change * sum(made) / len(made)
        return latents


class ByCall(Oracle):
    """`Oracle` that knows each call by its latent and prompt, as only the sampler does."""

    def __init__(self, loop, reuse, calls):
        self.calls, self.index = calls, -1
        super().__init__(loop, reuse)

    def enter(self, module, args, kwargs):
        super().enter(module, args, kwargs)
        self.index = self.index + 1 if getattr(self, "at", None) == self.sampler.step else 0
        self.at = self.sampler.step
        self.sampler.branch = self.calls(self.sampler.step)[self.index]


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "a third call at each step, one that joins later, a changing order, two latents (FlowEdit), tiles, tiles"
    " with guidance",
    "each call uses its own residual, as with an oracle that knows which call is which",
)
@pytest.mark.parametrize(
    "calls",
    [
        lambda step: [(0, 0), (0, 1)],
        lambda step: [(0, 0), (0, 1), (0, 2)],  # semantic guidance: a third prompt
        lambda step: [(0, 0), (0, 1)] if step < 5 else [(0, 2), (0, 0), (0, 1)],  # which joins in front
        lambda step: [(0, 0), (0, 1)] if step % 2 else [(0, 1), (0, 0)],  # in an order that changes
        lambda step: [(0, 0), (1, 1)],  # FlowEdit: two latents with their prompts
        lambda step: [(0, 0), (1, 0), (2, 0)],  # tiles
        lambda step: [(0, 0), (0, 1), (1, 0), (1, 1)],  # tiles with guidance
    ],
    ids=["guidance", "third call", "joins", "order", "edit", "tiles", "tiles with guidance"],
)
def test_calls_take_their_own_residuals(model, cached, calls):
    """Equal to an oracle that is told which call is which."""
    mine, theirs = (Loop(copy.deepcopy(model), latents=3, prompts=3) for _ in range(2))
    with cached(mine) as handle:
        latents = mine.run(calls)
    report = handle.reports[0]
    joins = calls(7) != calls(0) and len(calls(7)) > len(calls(0))
    assert len(handle.reports) == 1 and report.complete and bool(report.unplanned) == joins and report.reused > 0
    ByCall(theirs, report.schedule.reuse, calls)
    assert all(map(torch.equal, latents, theirs.run(calls)))


CHANGES = {
    "prompt": lambda loop: loop.prompts.__setitem__(0, loop.prompts[0] + 1),
    "pooled": lambda loop: loop.pooled.__setitem__(0, loop.pooled[0] + 1),
    "prompt in place": lambda loop: loop.prompts[0].add_(1),
    "prompt's length": lambda loop: loop.prompts.__setitem__(0, loop.prompts[0][:, :-2]),
}


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "a callback changes the prompt, the pooled embedding, the prompt's length, or writes into the prompt",
    "the next call computes, with the input's name as the reason",
)
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("payload", ["residual", "output"])
def test_a_changed_conditioning_ends_the_gap(model, calibrating, what, payload):
    """A callback changes it in the middle of a gap: the next call computes, and later ones take what it made."""
    with calibrating(measured := Loop(copy.deepcopy(model))) as measuring:
        measured.run(lambda step: [(0, 0)])
    loop = Loop(model)
    if what == "prompt's length":  # txt_ids have no batch
        loop.model = lambda **kwargs: model(
            **{**kwargs, "txt_ids": kwargs["txt_ids"][: kwargs["encoder_hidden_states"].shape[1]]}
        )
    target = Target(3, payload=payload)
    with magcache_forward(model, FLUX, measuring.table, target, lambda: loop.timesteps, announce=None) as handle:
        strip = []

        def between(step):
            gap = handle.run and not handle.run.schedule.reuse[step - 1] and handle.run.schedule.reuse[step]
            if step > 1 and gap and not strip:
                strip.append(step)
                CHANGES[what](loop)

        loop.run(lambda step: [(0, 0)], between)
    report = handle.reports[0]
    ((why, calls),) = report.unplanned.items()
    assert calls == 1 and why.startswith("the conditioning changed (")
    assert [call[2] for call in report.calls][strip[0]] == "computed" and report.computed == 4


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "a host creates new inputs at each step, with the same values",
    "reuse as planned",
)
def test_new_tensors_with_the_same_numbers_are_the_same_conditioning(model, euler, cached):
    result = alone(model, euler, cached, **SHORT)

    class Anew:
        dtype = model.dtype

        def __call__(self, **kwargs):
            latent = kwargs.pop("hidden_states")
            kwargs = {name: one.clone() if torch.is_tensor(one) else one for name, one in kwargs.items()}
            return model(hidden_states=latent, **kwargs)

    sampler = euler(Anew())
    with cached(sampler, model) as handle:
        assert torch.equal(sampler.run(**SHORT), result)
    assert not handle.reports[0].unplanned


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "an input that differs at every step",
    "at most one extra call computes",
)
def test_an_input_that_each_step_has_anew_tells_nothing(model, euler, cached):
    """A keyword with the number of the step: two steps show that it changes always."""

    def forward(*args, step_now=None, **kwargs):
        return plain(*args, **kwargs)

    plain, model.forward = model.forward, forward
    sampler = euler(model)
    with cached(sampler, K=5) as handle:
        sampler.run(extra=lambda step, branch: {"step_now": step})
    report = handle.reports[0]
    assert report.reused >= 5 and sum(report.unplanned.values()) <= 1


@pytest.mark.robustness(
    "Which residual a call may reuse", "a control net ends (at 0.42 of a run)", "the next call computes"
)
def test_a_control_net_that_ends(model, euler, cached):
    """Its samples are new at each step; they turn to zeros when its time is over, or are gone."""
    made = torch.Generator().manual_seed(0)

    def samples(step, branch, end, left_out):
        block = [torch.randn(1, 64, 32, generator=made) * (step < end) for _ in range(2)]
        return {} if left_out and step >= end else {"controlnet_block_samples": block}

    for left_out in (False, True):
        sampler = euler(copy.deepcopy(model))
        with cached(sampler) as handle:
            sampler.run(extra=lambda step, branch, left_out=left_out: samples(step, branch, 6, left_out))
        report = handle.reports[0]
        assert report.schedule.reuse[6] and [call[2] for call in report.calls][6] == "computed"
        ((why, calls),) = report.unplanned.items()
        assert calls == 1 and "controlnet_block_samples" in why


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "a gradient with respect to the latent or the prompt is asked for at some of the steps",
    "these steps compute, and the gradient is the un-cached one",
)
@pytest.mark.parametrize("of_prompt", [True, False])
@pytest.mark.parametrize("scheduler", [None, EULER])
def test_a_gradient_goes_through_the_model(model, euler, cached, scheduler, of_prompt):
    sampler = euler(model)

    def sampled():
        gradients, (noise, prompt) = [], torch.randn(2, 1, 64, 32, generator=torch.Generator().manual_seed(0))
        latents, prompt = noise[..., :16], prompt[:, :8]
        sampler.timesteps = 1000 * torch.tensor(flow_sigmas(12, 3.0)).float()
        for step, timestep in enumerate(sampler.timesteps):
            wanted = prompt if of_prompt else latents
            wanted.requires_grad_(step < 7)
            with torch.set_grad_enabled(step < 7):
                made = model(
                    1.0 * latents, prompt, torch.zeros(1, 32), timestep[None] / 1000, torch.zeros(64, 3),
                    torch.zeros(8, 3), torch.ones(1), return_dict=False,
                )[0]  # fmt: skip
            if step < 7:
                gradients += torch.autograd.grad(made.square().sum(), wanted)
            latents = latents.detach() - 0.08 * made.detach()
        return gradients

    expected = sampled()
    with cached(sampler, scheduler=scheduler) as handle:
        gradients = sampled()
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected))
        report = handle.reports[0]
        assert report.unplanned == {"a gradient is asked for": int(report.schedule.reuse[:7].sum())}
        assert report.reused == report.schedule.reuse[7:].sum() > 0


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "the scale of a LoRA changes, in a hand-written loop",
    "the next call computes",
)
def test_the_scale_of_an_adapter_changes(model, euler, cached):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    sampler = euler(model)
    with cached(sampler) as handle:
        for _ in sampler.iterate():
            if sampler.step == 4:
                assert handle.run.schedule.reuse[5]
                model.set_adapters(["default"], [0.1])
    report = handle.reports[0]
    assert [call[2] for call in report.calls][5] == "computed"
    assert report.unplanned == {"the conditioning changed (adapters)": 1}


# What is known of the sampler is wrong


@pytest.mark.robustness(
    "When nothing would be cached",
    "timesteps of another sampler",
    "refused in the first steps; a call between two known timesteps computes",
)
def test_timesteps_of_another_sampler(model, euler, cached):
    """28 timesteps under a run of 50, and 10 under 20: refused, or no reuse between the timesteps known."""
    sampler = euler(model)
    other = torch.tensor(flow_sigmas(28, 3.0), dtype=torch.float32) * 1000
    with cached(sampler) as handle:
        handle.timesteps = lambda: other
        with pytest.raises(MagCacheError, match="none of the timesteps that MagCache was given") as caught:
            sampler.run(steps=50)
        assert str(caught.value).count(". ") == 0 and len(handle.reports) <= 4
        coarse = torch.tensor(flow_sigmas(20, 3.0)[::2], dtype=torch.float32) * 1000
        handle.timesteps = lambda: coarse
        sampler.run(steps=20)
    kinds = [call[2] for call in handle.reports[-1].calls]
    assert kinds[1::2] == ["computed"] * 10
    assert "the noise level is not one of the sampler's timesteps" in handle.reports[-1].unplanned


@pytest.mark.robustness(
    "When nothing would be cached",
    "a model that gets 1 - noise level",
    "refused; the message says what to tell MagCache",
)
def test_levels_that_rise(model, euler, cached):
    """A model that is given 1 - noise level."""

    class Other:
        dtype = model.dtype

        def __call__(self, **kwargs):
            return model(**{**kwargs, "timestep": 1 - kwargs["timestep"]})

    sampler = euler(Other())
    with cached(sampler, model), pytest.raises(MagCacheError, match="rises from step to step"):
        sampler.run()


@pytest.mark.robustness(
    "When nothing would be cached",
    "a cache of diffusers on the same model, before or after",
    "refused: call `disable_cache()` first",
)
@pytest.mark.parametrize("theirs", ["first block", "MagCache"])
def test_diffusers_own_cache_is_refused(model, euler, cached, theirs):
    pytest.importorskip("diffusers", "0.35")
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    config = FirstBlockCacheConfig(threshold=0.1)
    if theirs == "MagCache":
        config = MagCacheConfig(mag_ratios=[1.0] * 8, num_inference_steps=8)
    sampler = euler(model)
    model.enable_cache(config)
    with pytest.raises(MagCacheError, match="disable_cache"):
        cached(sampler)
    model.disable_cache()
    with cached(sampler):
        sampler.run(**SHORT)
        model.enable_cache(config)
        with pytest.raises(MagCacheError, match="disable_cache"):
            sampler.run(**SHORT)
        model.disable_cache()
        sampler.run(**SHORT)


@pytest.mark.robustness(
    "When nothing would be cached",
    "a run that reuses nothing although reuse was planned, or that was interrupted first",
    "it says so, with the reasons",
)
def test_a_run_that_reuses_nothing_says_so(model, euler, cached):
    said = []

    class Grown:
        """Another shape at each step."""

        dtype = model.dtype

        def __call__(self, **kwargs):
            count = 1 + sampler.step % 2
            names = ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states")
            return (model(**{**kwargs, **{name: torch.cat([kwargs[name]] * count) for name in names}})[0][:1],)

    sampler = euler(Grown())
    with cached(sampler, model, announce=said.append, K=1) as handle:
        sampler.run(steps=8)
    assert handle.reports[0].reused == 0 and handle.reports[0].schedule.reuse.any()
    assert said[-1].startswith("MagCache reused nothing in 8 calls: ") and len(said) == 2


@pytest.mark.robustness(
    "When nothing would be cached",
    "a run that reuses nothing although reuse was planned, or that was interrupted first",
)
@pytest.mark.parametrize("end", ["the next run", "an exception", "the end of the block"])
def test_a_run_that_broke_off_says_so(model, euler, cached, end):
    """Before the first reuse that was planned, ##..#..#..#."""
    said, sampler = [], euler(model)
    with cached(sampler, announce=said.append) as handle:
        if end == "an exception":
            model.x_embedder.register_forward_pre_hook(lambda module, args: 1 / (2 - sampler.step) and None)
            with pytest.raises(ZeroDivisionError):
                sampler.run()
        else:
            *_, _ = itertools.islice(sampler.iterate(), 2)
        if end == "the next run":
            sampler.run()
    assert said[1] == "MagCache reused nothing in 2 calls: the run was interrupted."
    assert not handle.reports[0].complete and len(said) == (3 if end == "the next run" else 2)


@pytest.mark.robustness("Memory and time", "many runs with one handle", "only the newest 128 reports are kept")
def test_the_newest_reports_are_kept(model, euler, cached, monkeypatch):
    monkeypatch.setattr("common.handle.KEPT_REPORTS", 3)
    sampler = euler(model)
    with cached(sampler) as handle:
        for steps in range(5, 11):
            sampler.run(steps=steps, size=4)
    assert [len(report.levels) for report in handle.reports] == [8, 9, 10]
