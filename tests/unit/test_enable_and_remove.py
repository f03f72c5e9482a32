"""The patch put on and taken off, beside other wrappers, on classes that change, and the memory that it takes. On a
tiny FLUX, bit for bit."""

import functools
import gc
import itertools
import re
import weakref

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_runs import BASE, RUNS, Broken, alone, class_forward, is_one_sentence

import common.patch
from common.errors import MagCacheError
from common.schedule import Settings

# Putting it on and taking it off


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


@pytest.mark.robustness(
    "When nothing would be cached",
    "a second MagCache on the same model",
    "refused, unless each belongs to a different pipeline",
)
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
        assert is_one_sentence(caught) and "patched already" in str(caught.value)
    first.remove()
    cached(sampler).remove()
    assert class_forward(model)


def test_a_patch_that_was_bypassed_says_so(model, euler, cached):
    sampler = euler(model)
    unused = Bypass(model)
    with pytest.raises(MagCacheError) as caught, cached(sampler) as handle:
        sampler.model = unused
        sampler.run(steps=5)
    assert is_one_sentence(caught) and "never called" in str(caught.value) and class_forward(model)
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


def test_an_unknown_class_is_refused(euler, cached):
    with pytest.raises(MagCacheError) as caught:
        cached(euler(torch.nn.Linear(2, 2)))
    assert "Linear has no transformer_blocks" in str(caught.value)


def test_a_sampler_without_timesteps_is_refused(model, euler, cached, host, ratios):
    sampler = euler(model)
    with pytest.raises(MagCacheError) as caught:
        with common.patch.magcache_forward(model, host, ratios, Settings(1.0, 2, 0.2), lambda: None, announce=None):
            sampler.run()
    assert is_one_sentence(caught) and "no timesteps" in str(caught.value) and class_forward(model)


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
        number, unit = re.search(r"extra memory: ([\d.]+) (\w+) per branch", plans[0]).groups()
        branches = 2 if run.get("cfg") else 1
        assert float(number) * units[unit] * branches == handle.reports[0].peak_bytes > 0
