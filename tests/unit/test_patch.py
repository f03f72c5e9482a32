"""The patch on a tiny FLUX: what runs, what is added, what is left behind. Results are compared bit for bit."""

import copy
import functools
import gc
import itertools
import re
import weakref

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

import common.patch
from common.blocks import BlockStack
from common.errors import MagCacheError
from common.schedule import Settings, magcache_schedule

BASE = {"steps": 12, "size": 64, "batch": 1, "cfg": False, "shift": 3.0, "seed": 0, "prompt": 0}
OTHERS = {"size": 48, "steps": 7, "prompt": 1, "cfg": True, "batch": 2, "shift": 1.0}
RUNS = {"base": BASE, **{key: {**BASE, key: value} for key, value in OTHERS.items()}, "all": {**BASE, **OTHERS}}
SHORT = {**BASE, "steps": 8}  # #..#..#. for what is tried at every step


def alone(model, euler, cached, **run):
    sampler = euler(copy.deepcopy(model))
    with cached(sampler) as handle:
        latents = sampler.run(**run)
    assert handle.reports[-1].reused > 0
    return latents


def control(step, branch):
    """ControlNet samples as large as the tokens themselves, so that a missing or a second addition is seen at once."""
    made = torch.Generator().manual_seed(step)
    return {
        "controlnet_block_samples": [torch.randn(1, 64, 32, generator=made) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(1, 64, 32, generator=made) for _ in range(3)],
    }


class Tokens:
    """Hooks on an unpatched model: the image tokens that enter the first block and those that enter norm_out."""

    def __init__(self, model):
        self.before = self.after = None
        model.transformer_blocks[0].register_forward_pre_hook(self.enter, with_kwargs=True)
        model.norm_out.register_forward_pre_hook(self.leave)

    def enter(self, module, args, kwargs):
        self.before = kwargs["hidden_states"]

    def leave(self, module, args):
        self.after = args[0]
        return self.changed(args)

    def changed(self, args):
        return args


class Oracle(Tokens):
    """What caching must give, made the expensive way: every block runs at every step, and where `reuse` says so
    norm_out gets the tokens that entered the first block plus this branch's residual, unless it is older than the plan
    has it."""

    def __init__(self, sampler, reuse):
        super().__init__(sampler.model)
        self.sampler, self.reuse, self.residuals = sampler, reuse, {}

    def changed(self, args):
        step, branch = self.sampler.step, self.sampler.branch
        made, residual = self.residuals.get(branch, (-1, None))
        if self.reuse[step] and made >= np.flatnonzero(~self.reuse[: step + 1])[-1]:
            return self.before + residual, *args[1:]
        self.residuals[branch] = step, self.after - self.before
        return args


# What runs, and what comes out


@pytest.mark.parametrize("run", [BASE, RUNS["all"]], ids=["base", "all"])
@pytest.mark.parametrize("off", [{"thresh": 0.0}, {"K": 0}], ids=["thresh", "K"])
def test_off_is_the_untouched_model(model, euler, cached, off, run):
    sampler = euler(model)
    plain = sampler.run(**run)
    with cached(sampler, **off) as handle:
        assert torch.equal(sampler.run(**run), plain)
    assert handle.reports[-1].reused == 0
    assert torch.equal(sampler.run(**run), plain)


@pytest.mark.parametrize("run", [BASE, RUNS["all"]], ids=["base", "all"])
def test_calibration_is_the_untouched_model(model, euler, calibrating, run):
    sampler = euler(model)
    plain = sampler.run(**run)
    with calibrating(sampler) as handle:
        assert torch.equal(sampler.run(**run), plain)
    assert handle.table.steps == run["steps"]


@pytest.mark.parametrize("name", RUNS)
def test_plan_is_what_ran(model, euler, cached, executed, ratios, name):
    sampler, blocks, plans = euler(model), executed(model), []
    with cached(sampler, announce=plans.append) as handle:
        sampler.run(**RUNS[name])
    report = handle.reports[0]
    planned = magcache_schedule(ratios.at(sampler.timesteps.numpy() / 1000), Settings(1.0, 2, 0.2)).strip
    branches = 2 if RUNS[name]["cfg"] else 1
    assert blocks.strip == "".join(letter * branches for letter in planned)
    assert report.schedule.strip == planned and f"  {planned}   # computes" in plans[0] and len(plans) == 1
    assert report.computed == branches * planned.count("#") and report.reused == branches * planned.count(".")
    assert report.complete and not report.unplanned


def test_a_run_that_starts_inside_is_planned_for_its_own_levels(model, euler, cached, executed, ratios):
    sampler, blocks = euler(model), executed(model)
    with cached(sampler) as handle:
        sampler.run(start=5)
    levels = sampler.timesteps.numpy()[5:] / 1000
    assert blocks.strip == magcache_schedule(ratios.at(levels), Settings(1.0, 2, 0.2)).strip == "#..#..#"
    assert handle.reports[0].levels == pytest.approx(levels)


@pytest.mark.parametrize("extra", [None, control], ids=["plain", "control"])
@pytest.mark.parametrize("name", ["base", "cfg", "shift"])
def test_reused_steps_equal_the_oracle(model, euler, cached, extra, name):
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    with cached(sampler) as handle:
        mine = list(sampler.iterate(**RUNS[name], extra=extra))
    reuse = handle.reports[0].schedule.reuse
    plain = list(euler(copy.deepcopy(model)).iterate(**RUNS[name], extra=extra))
    Oracle(reference, reuse)
    theirs = list(reference.iterate(**RUNS[name], extra=extra))
    first = int(np.flatnonzero(reuse)[0])
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert torch.equal(mine[first - 1], plain[first - 1]) and not torch.equal(mine[first], plain[first])


def test_the_residual_is_added_once(model, euler, cached):
    sampler, tokens, seen = euler(model), Tokens(model), []
    model.x_embedder.register_forward_hook(lambda module, args, output: seen.append(output))
    residual = None
    with cached(sampler) as handle:
        for _ in sampler.iterate():
            if handle.reports[0].schedule.reuse[sampler.step]:
                assert torch.equal(tokens.after, seen[-1] + residual)
            else:
                residual = tokens.after - seen[-1]
    assert len(seen) == 13  # twelve steps, and the proof of the first residual


@pytest.mark.parametrize("extra", [None, control], ids=["plain", "control"])
def test_a_residual_of_the_same_step_gives_full_computation(model, euler, host, extra):
    """Each step runs in full and then again from its own residual; the sampler goes on with the second. In float64,
    since a + (b - a) is b up to rounding only."""
    model.double()
    plain = euler(model).run(steps=6, extra=extra)
    stack, computed = BlockStack(model, host), []

    class Twice:
        dtype = model.dtype

        def __call__(self, **kwargs):
            stack.record()
            full = model(**kwargs)[0]
            stack.replace(stack.finish())
            again = model(**kwargs)[0]
            stack.restore()
            computed.append(full)
            torch.testing.assert_close(again, full, rtol=0, atol=1e-12)
            return (again,)

    torch.testing.assert_close(euler(Twice()).run(steps=6, extra=extra), plain, rtol=0, atol=1e-10)
    assert len(computed) == 6


# State belongs to one run


def test_a_run_after_another_equals_the_run_alone(model, euler, cached):
    results = {name: alone(model, euler, cached, **run) for name, run in RUNS.items()}
    sampler = euler(model)
    for first, second in itertools.product(RUNS, repeat=2):
        with cached(sampler) as handle:
            assert torch.equal(sampler.run(**RUNS[first]), results[first])
            assert torch.equal(sampler.run(**RUNS[second]), results[second]), f"{second} after {first}"
        assert [report.unplanned for report in handle.reports] == [{}, {}]


class Broken(Exception):
    pass


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("place", ["transformer_blocks.1", "norm_out"])
def test_a_run_after_an_exception_equals_the_run_alone(model, euler, cached, cfg, place):
    """At every call of the model: in a block where it computes, in front of the final layer where it reuses as well."""
    first = {**SHORT, "cfg": cfg}
    after = {"same": first, "other": {**SHORT, "cfg": not cfg, "size": 48}, "tail": {**SHORT, "start": 2}}
    results = {name: alone(model, euler, cached, **run) for name, run in after.items()}
    sampler, keys, raised = euler(model), set(model.__dict__) | {"forward"}, 0

    for call, (name, run) in itertools.product(range(16 if cfg else 8), after.items()):
        calls, handle = itertools.count(), cached(sampler)

        def trip(module, args, calls=calls, call=call):
            if next(calls) == call:
                raise Broken

        hook = model.get_submodule(place).register_forward_pre_hook(trip)
        try:
            sampler.run(**first)
        except Broken:
            raised += 1
        hook.remove()
        assert handle.residuals.bytes == 0 and set(model.__dict__) == keys
        assert torch.equal(sampler.run(**run), results[name]), f"{name} after a break in call {call}"
        assert not handle.reports[-1].unplanned
        handle.remove()
    computed = 3 if place.startswith("transformer") else 8
    assert raised == len(after) * computed * (2 if cfg else 1)


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_a_run_after_the_sampler_broke_off_equals_the_run_alone(model, euler, cached, cfg):
    """No exception reaches the model. The next run starts at the top, where the first stopped, where it would have gone
    on, or lower."""
    tails = {start: alone(model, euler, cached, **SHORT, start=start) for start in range(4)}
    tails |= {start: euler(model).run(**SHORT, start=start) for start in range(4, 8)}  # too short to reuse
    others = (
        RUNS["all"],
        {**SHORT, "cfg": lambda step: step >= 4},
    )  # guidance begins where another run's residual may be
    results = [alone(model, euler, cached, **run) for run in others]
    sampler = euler(model)
    for stop in range(8):
        for start in sorted({0, stop, *range(stop + 1, 8)}):
            with cached(sampler):
                *_, _ = itertools.islice(sampler.iterate(**{**SHORT, "cfg": cfg}), stop + 1)
                assert torch.equal(sampler.run(**SHORT, start=start), tails[start]), (
                    f"from {start} after a stop at {stop}"
                )
        for run, result in zip(others, results, strict=True):
            with cached(sampler):
                *_, _ = itertools.islice(sampler.iterate(**{**SHORT, "cfg": cfg}), stop + 1)
                assert torch.equal(sampler.run(**run), result)


def test_a_cancel_between_the_two_calls_of_a_step(model, euler, cached):
    """The conditional call of a step was made, its unconditional one was not."""
    run = {**SHORT, "cfg": True}
    result = alone(model, euler, cached, **run)
    sampler = euler(model)
    for stop in range(8):

        def cancel(step, branch, stop=stop):
            if (step, branch) == (stop, 1):
                raise Broken
            return {}

        with cached(sampler):
            with pytest.raises(Broken):
                sampler.run(**run, extra=cancel)
            assert torch.equal(sampler.run(**run), result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_many_steps_in_low_precision(model, euler, cached, executed, ratios, dtype, cfg):
    """The timestep comes in the model's dtype: in bfloat16 neighbouring levels of 50 steps may round to one number."""
    model.to(dtype)
    sampler, blocks = euler(model), executed(model)
    with cached(sampler, thresh=0.1, K=3) as handle:
        sampler.run(steps=50, size=16, cfg=cfg)
    planned = magcache_schedule(ratios.at(sampler.timesteps.numpy() / 1000), Settings(0.1, 3, 0.2)).strip
    assert len(handle.reports) == 1 and not handle.reports[0].unplanned and "." in planned
    assert blocks.strip == "".join(letter * (2 if cfg else 1) for letter in planned)


def test_two_models_interleaved_equal_each_alone(model, make_model, euler, cached):
    other = make_model(seed=1)
    results = alone(model, euler, cached, **RUNS["cfg"]), alone(other, euler, cached, **RUNS["size"])
    first, second = euler(model), euler(other)
    with cached(first) as one, cached(second) as two:
        *_, latents = zip(first.iterate(**RUNS["cfg"]), second.iterate(**RUNS["size"]), strict=True)
    assert torch.equal(latents[0], results[0]) and torch.equal(latents[1], results[1])
    assert (one.reports[0].reused, two.reports[0].reused) == (14, 7)


def test_guidance_for_a_part_of_the_run(model, euler, cached, executed):
    late = {**BASE, "cfg": lambda step: step >= 6}  # ##..#.+.#..#., where + is the first step with guidance
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    with cached(sampler) as handle:
        latents = sampler.run(**late)
    report = handle.reports[0]
    assert report.schedule.strip == "##..#..#..#."
    assert blocks.strip == "##..#." + ".#" + "##" + ".." + ".." + "##" + ".."
    assert (
        report.unplanned == {"no residual of this branch yet": 1}
        and "1 computed unplanned (no residual" in report.line()
    )
    assert report.complete
    Oracle(reference, report.schedule.reuse)
    assert torch.equal(latents, reference.run(**late))


def test_guidance_that_ends_early(model, euler, cached, executed):
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    early = {**BASE, "cfg": lambda step: step < 6}
    with cached(sampler) as handle:
        latents = sampler.run(**early)
    Oracle(reference, handle.reports[0].schedule.reuse)
    assert torch.equal(latents, reference.run(**early))
    assert handle.reports[0].complete and handle.residuals.bytes == 0
    assert blocks.strip == "####....##.." + ".#..#."


def test_guidance_that_pauses(model, euler, cached, executed):
    """The unconditional residual is from step 1 when step 5 is to reuse that of step 4."""
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    on_and_off = {**BASE, "cfg": lambda step: step != 4}
    with cached(sampler) as handle:
        latents = sampler.run(**on_and_off)
    Oracle(reference, handle.reports[0].schedule.reuse)
    assert torch.equal(latents, reference.run(**on_and_off))
    assert blocks.strip == "####...." + "#" + ".#.." + "##....##.."
    assert handle.reports[0].unplanned == {"no residual of this branch yet": 1}


def test_a_batch_that_grows_in_the_middle_of_a_run(model, euler, cached, executed):
    """A residual of another shape would be added to the wrong picture, or broadcast."""

    class Doubled:
        dtype = model.dtype

        def __call__(self, **kwargs):
            if sampler.step >= 5:
                kwargs |= {
                    name: torch.cat([kwargs[name]] * 2)
                    for name in ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states")
                }
            return (model(**kwargs)[0][:1],)

    sampler, blocks = euler(Doubled()), executed(model)
    with cached(sampler, model) as handle:
        sampler.run()
    assert handle.reports[0].schedule.strip == "##..#..#..#." and blocks.strip == "##..##.#..#."
    ((why, calls),) = handle.reports[0].unplanned.items()
    assert why == "the conditioning changed (guidance, pooled_projections, encoder_hidden_states)" and calls == 1


# Putting it on and taking it off


def class_forward(model):
    return model.forward.__func__ is type(model).forward and "forward" not in model.__dict__


def test_enable_remove_enable(model, euler, cached, calibrating):
    result, plain = alone(model, euler, cached), euler(model).run()
    sampler, keys = euler(model), list(model.__dict__)
    for _ in range(2):
        handle = cached(sampler)
        assert torch.equal(sampler.run(), result)
        handle.remove()
        assert class_forward(model) and list(model.__dict__) == keys
        assert torch.equal(sampler.run(), plain)
        with calibrating(sampler):
            sampler.run(steps=5)
        assert class_forward(model) and list(model.__dict__) == keys


def test_removed_in_the_middle_of_a_run(model, euler, cached, executed):
    sampler, keys = euler(model), list(model.__dict__)
    blocks, handle = executed(model), cached(sampler)
    for _ in sampler.iterate():
        if sampler.step == 3:
            handle.remove()
            assert handle.residuals.bytes == 0
    assert blocks.strip == "##.." + "#" * 8 and list(model.__dict__) == keys


def test_paused_runs_un_cached(model, euler, cached):
    result, plain = alone(model, euler, cached), euler(model).run()
    sampler = euler(model)
    with cached(sampler) as handle:
        *_, _ = itertools.islice(sampler.iterate(), 4)
        with handle.paused():
            assert torch.equal(sampler.run(), plain) and handle.residuals.bytes == 0
        assert torch.equal(sampler.run(), result) and len(handle.reports) == 2


def test_removed_under_another_wrapper(model, euler, cached):
    """As accelerate's hooks do: the wrapper keeps the patched forward and copies its attributes."""
    result, plain = alone(model, euler, cached), euler(model).run()
    sampler, keys = euler(model), list(model.__dict__)
    first = cached(sampler)
    inner = model.forward
    model.forward = functools.update_wrapper(lambda *args, **kwargs: inner(*args, **kwargs), inner)
    assert torch.equal(sampler.run(), result)
    first.remove()
    assert torch.equal(sampler.run(), plain) and list(model.__dict__) == [*keys, "forward"]
    second = cached(sampler)
    assert torch.equal(sampler.run(), result) and len(first.reports) == 1
    second.remove()
    assert torch.equal(sampler.run(), plain) and list(model.__dict__) == [*keys, "forward"]
    model.forward = inner  # the wrapper goes as well
    assert torch.equal(sampler.run(), plain)
    with cached(sampler):
        assert torch.equal(sampler.run(), result)


def test_put_on_over_another_wrapper(model, euler, cached):
    """A wrapper that keeps neither names nor signature."""
    result, plain, calls = alone(model, euler, cached), euler(model).run(), []
    inner = model.forward
    model.forward = wrapper = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
    sampler = euler(model)
    with cached(sampler):
        assert torch.equal(sampler.run(), result) and len(calls) == 13  # and the proof of the first
    assert model.__dict__["forward"] is wrapper and torch.equal(sampler.run(), plain)


def test_context_manager_restores_after_an_exception(model, euler, cached):
    sampler, keys = euler(model), list(model.__dict__)
    with pytest.raises(Broken), cached(sampler):
        raise Broken  # not "was never called": the exception is what the user has to see
    with pytest.raises(Broken), cached(sampler) as handle:
        for _ in sampler.iterate():
            if sampler.step == 3:
                raise Broken
    assert class_forward(model) and list(model.__dict__) == keys and handle.residuals.bytes == 0


def test_a_second_patch_is_refused(model, euler, cached, calibrating):
    sampler = euler(model)
    first = cached(sampler)
    for again in (
        lambda: cached(sampler),
        lambda: calibrating(sampler),
        lambda: cached(sampler, torch.compile(model, backend="eager")),
    ):
        with pytest.raises(MagCacheError) as caught:
            again()
        assert one_sentence(caught) and "patched already" in str(caught.value)
    first.remove()
    cached(sampler).remove()
    assert class_forward(model)


def test_a_patch_that_was_bypassed_says_so(model, euler, cached):
    sampler = euler(model)
    unused = Bypass(model)
    with pytest.raises(MagCacheError) as caught, cached(sampler) as handle:
        sampler.model = unused
        sampler.run(steps=5)
    assert one_sentence(caught) and "never called" in str(caught.value) and class_forward(model)
    with pytest.raises(MagCacheError):
        handle.require_reached()
    sampler.model = model
    with cached(sampler) as handle:
        sampler.run(steps=5)
        handle.require_reached()


class Bypass:
    """Calls the class's forward, past whatever sits on the instance."""

    def __init__(self, model):
        self.model, self.dtype = model, model.dtype

    def __call__(self, **kwargs):
        return type(self.model).forward(self.model, **kwargs)


def one_sentence(caught):
    text = str(caught.value)
    return text.endswith(".") and "\n" not in text and text.count(". ") == 0


def test_an_unknown_class_is_refused(euler, cached):
    with pytest.raises(MagCacheError) as caught:
        cached(euler(torch.nn.Linear(2, 2)))
    assert "Linear has no transformer_blocks" in str(caught.value)


def test_a_sampler_without_timesteps_is_refused(model, euler, cached, host, ratios):
    sampler = euler(model)
    with pytest.raises(MagCacheError) as caught:
        with common.patch.magcache_forward(model, host, ratios, Settings(1.0, 2, 0.2), lambda: None, announce=None):
            sampler.run()
    assert one_sentence(caught) and "no timesteps" in str(caught.value) and class_forward(model)


# Hosts that change


class NamedExtra(FluxTransformer2DModel):
    """A newer release with one more keyword."""

    def forward(
        self,
        hidden_states,
        encoder_hidden_states=None,
        pooled_projections=None,
        timestep=None,
        img_ids=None,
        txt_ids=None,
        guidance=None,
        brand_new=None,
        **kwargs,
    ):
        self.got.append(brand_new)
        return super().forward(
            hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance, **kwargs
        )


class CatchAll(FluxTransformer2DModel):
    """A subclass that names nothing but its own."""

    def forward(self, *args, brand_new=None, **kwargs):
        self.got.append(brand_new)
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("cls", [NamedExtra, CatchAll])
def test_unknown_keywords_pass_through(model, make_model, euler, cached, cls):
    newer = make_model(cls)
    newer.got = []
    sampler = euler(newer)
    with cached(sampler) as handle:
        latents = sampler.run(extra=lambda step, branch: {"brand_new": step, "controlnet_blocks_repeat": True})
    assert newer.got == [0, *range(12)] and handle.reports[0].reused == 7
    assert torch.equal(latents, alone(model, euler, cached))


class Positional:
    """Calls with everything that FluxPipeline names passed by position."""

    def __init__(self, model):
        self.model, self.dtype = model, model.dtype

    def __call__(self, **kwargs):
        order = (
            "hidden_states",
            "encoder_hidden_states",
            "pooled_projections",
            "timestep",
            "img_ids",
            "txt_ids",
            "guidance",
        )
        return self.model(*[kwargs.pop(name) for name in order], **kwargs)


@pytest.mark.parametrize("wrapped", [False, True])
def test_positional_arguments(model, euler, cached, wrapped):
    result = alone(model, euler, cached)
    if wrapped:
        inner = model.forward
        model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    sampler = euler(Positional(model))
    with cached(sampler, model):
        assert torch.equal(sampler.run(), result)


# Memory


@pytest.mark.parametrize("run", [BASE, RUNS["all"]], ids=["base", "all"])
def test_residuals_in_bfloat16_take_half(model, euler, cached, run):
    sampler = euler(model)
    plain = sampler.run(**run)
    with cached(sampler) as handle:
        full = sampler.run(**run)
    with cached(sampler, dtype=torch.bfloat16, device="cpu") as half_handle:
        half = sampler.run(**run)
    whole, halved = handle.reports[0].peak_bytes, half_handle.reports[0].peak_bytes
    assert whole == run["batch"] * run["size"] * 32 * 4 * (2 if run["cfg"] else 1) and 2 * halved == whole
    assert not torch.equal(half, full)
    assert (half - full).norm() < 0.1 * (full - plain).norm()


def test_residuals_are_freed_at_the_end(model, euler, cached):
    sampler, alive = euler(model), []
    with cached(sampler) as handle:
        for _ in sampler.iterate(cfg=True):
            alive += [weakref.ref(one.residual) for kept in handle.residuals.kept.values() for one in kept]
            if sampler.step < 11:
                assert (
                    bool(handle.residuals.bytes)
                    == handle.reports[0].schedule.reuse[sampler.step : sampler.step + 2].any()
                )
        assert handle.residuals.bytes == 0 and handle.reports[0].peak_bytes > 0
        gc.collect()
        assert len(alive) > 8 and not any(ref() is not None for ref in alive)


def test_residuals_are_freed_after_an_exception(model, euler, cached):
    sampler, alive = euler(model), []

    def trip(module, args):
        alive.extend(weakref.ref(one.residual) for kept in handle.residuals.kept.values() for one in kept)
        if sampler.step == 7:
            raise Broken

    with cached(sampler) as handle:
        hook = model.norm_out.register_forward_pre_hook(trip)
        with pytest.raises(Broken):
            sampler.run(cfg=True)
        hook.remove()
        assert handle.residuals.bytes == 0
        gc.collect()
        assert alive and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("end", ["complete", "exception", "removed"])
def test_calibration_keeps_nothing(model, euler, calibrating, end):
    sampler, alive = euler(model), []
    if end == "exception":
        model.norm_out.register_forward_pre_hook(lambda module, args: 1 / 0 if sampler.step == 7 else None)
    with calibrating(sampler) as handle:
        try:
            for _ in sampler.iterate():
                alive += [weakref.ref(residual) for residual in handle.statistics.previous.values()]
                if end == "removed" and sampler.step == 6:
                    handle.remove()
                    break
        except ZeroDivisionError:
            assert end == "exception"
        gc.collect()
        assert len(alive) == (11 if end == "complete" else 7) and not any(ref() is not None for ref in alive)


def test_announced_memory_is_the_peak(model, euler, cached):
    units = {"KiB": 2**10, "MiB": 2**20}
    for dtype, run in itertools.product(
        (None, torch.bfloat16), (BASE, RUNS["all"], {"size": 1024, "batch": 8, "steps": 5})
    ):
        sampler, plans = euler(model), []
        with cached(sampler, dtype=dtype, announce=plans.append) as handle:
            sampler.run(**run)
        number, unit = re.search(r"extra memory: ([\d.]+) (\w+) a branch", plans[0]).groups()
        branches = 2 if run.get("cfg") else 1
        assert float(number) * units[unit] * branches == handle.reports[0].peak_bytes > 0
