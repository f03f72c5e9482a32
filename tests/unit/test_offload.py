"""The patch and offloading. Weights live on "meta" or are moved from CPU to CPU, which the hooks do not know to be
cheap."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from offloading import CPU, sequential, whole_model

from common.expert import forwards, patches_of

pytest.importorskip("diffusers", "0.35")
from diffusers.hooks.group_offloading import (  # noqa: E402
    GroupOffloadingType,
    LazyPrefetchGroupOffloadingHook,
    ModuleGroup,
)

ORDERS = pytest.mark.parametrize("order", ["offload first", "patch first"])
STRIP = "##..#..#..#."


def groups_of(blocks, level=GroupOffloadingType.BLOCK_LEVEL):
    def group_offload(model):
        model.enable_group_offload(
            onload_device=CPU, offload_device=CPU, offload_type=level, num_blocks_per_group=blocks, use_stream=False
        )

    return group_offload


@pytest.fixture
def moved(model, monkeypatch):
    """Counts the times that weights of a block, and other weights, are fetched: `moved["blocks"]`,
    `moved["others"]`."""
    counts = {"blocks": 0, "others": 0}
    inside = {
        id(parameter)
        for name in ("transformer_blocks", "single_transformer_blocks")
        for parameter in getattr(model, name).parameters()
    }
    modules = {
        id(module)
        for name in ("transformer_blocks", "single_transformer_blocks")
        for module in getattr(model, name).modules()
    }
    fetch, onload = AlignDevicesHook.pre_forward, ModuleGroup.onload_

    def counted_fetch(hook, module, *args, **kwargs):
        if hook.offload and any(True for _ in module.parameters(recurse=False)):
            counts["blocks" if id(module) in modules else "others"] += 1
        return fetch(hook, module, *args, **kwargs)

    def counted_onload(group):
        weights = {id(parameter) for module in group.modules for parameter in module.parameters()}
        counts["blocks" if weights & inside else "others"] += 1
        return onload(group)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", counted_fetch)
    monkeypatch.setattr(ModuleGroup, "onload_", counted_onload)
    return counts


def both(model, sampler, offload, patch, order):
    steps = [lambda: offload(model), lambda: patch(sampler)]
    first, second = (step() for step in (steps if order == "offload first" else reversed(steps)))
    return first or second


@pytest.fixture
def expected_results(model, euler, cached):
    """The cached and the un-cached result without offloading, with and without CFG."""
    sampler = euler(copy.deepcopy(model))
    plain = [sampler.run(cfg=cfg) for cfg in (False, True)]
    with cached(sampler):
        return [sampler.run(cfg=cfg) for cfg in (False, True)], plain


@ORDERS
@pytest.mark.parametrize(
    "offload",
    [sequential, whole_model, groups_of(1), groups_of(2), groups_of(None, "leaf_level")],
    ids=["sequential", "whole model", "groups of 1", "groups of 2", "leaves"],
)
def test_no_block_is_entered_or_fetched_on_a_reused_step(
    model, euler, cached, executed, moved, expected_results, offload, order
):
    (result, guided), (plain, _) = expected_results
    sampler, blocks = euler(model), executed(model)
    handle = both(model, sampler, offload, cached, order)
    seen, fetched = [], []
    for latents in sampler.iterate():
        seen.append(latents)
        fetched.append(dict(moved))
        moved.update(blocks=0, others=0)
    assert blocks.strip == STRIP and torch.equal(seen[-1], result)
    if offload is not whole_model:
        assert "".join("#" if step["blocks"] else "." for step in fetched) == STRIP
        assert all(step["others"] for step in fetched)
    assert torch.equal(sampler.run(cfg=True), guided) and handle.reports[-1].reused == 14
    handle.remove()
    assert torch.equal(sampler.run(), plain)


def prefetched(model):
    """Groups of one block, with the hook that watches their order in the first call."""
    groups_of(1)(model)
    model._diffusers_hook.register_hook(LazyPrefetchGroupOffloadingHook(), "lazy_prefetch_group_offloading")


@pytest.mark.robustness(
    "When nothing would be cached",
    "group offload with streams, whose hook that watches the first call then takes itself off, put on before or after",
    "every step is cached as planned; a patch that is removed in that call stays off",
)
@ORDERS
def test_a_hook_that_takes_itself_off_leaves_the_patch_on(model, euler, cached, executed, expected_results, order):
    """With streams, group offloading watches the first call and then takes its watching hook off."""
    (result, guided), (plain, _) = expected_results
    sampler, blocks = euler(model), executed(model)
    handle = both(model, sampler, prefetched, cached, order)
    for _ in range(2):
        assert torch.equal(sampler.run(), result) and blocks.strip == STRIP
        blocks.calls.clear()
    assert [report.reused for report in handle.reports] == [7, 7]
    assert torch.equal(sampler.run(cfg=True), guided)
    handle.remove()
    assert torch.equal(sampler.run(), plain) and not patches_of(model)


def test_a_patch_that_is_removed_in_that_call_stays_off(model, euler, cached, expected_results):
    _, (plain, _) = expected_results
    prefetched(model)
    sampler = euler(model)
    handle = cached(sampler)

    def remove_once(*_):
        hook.remove()
        handle.remove()

    hook = model.transformer_blocks[0].register_forward_pre_hook(remove_once)
    assert torch.equal(sampler.run(), plain)
    assert not any(hasattr(forward, "magcache") for forward in forwards(model))


@pytest.mark.parametrize("offload", [sequential, whole_model])
def test_hooks_that_are_renewed_after_each_image(model, euler, cached, executed, expected_results, offload):
    """Pipelines take accelerate's hooks off at the end of a call and put them on for the next: the patch lies below."""
    (result, guided), (plain, _) = expected_results
    sampler, blocks = euler(model), executed(model)
    handle = cached(sampler)
    for cfg in (False, True, False):
        blocks.calls.clear()
        offload(model)
        assert torch.equal(sampler.run(cfg=cfg), guided if cfg else result)
        assert blocks.strip == ("####....##....##....##.." if cfg else STRIP)
        remove_hook_from_module(model, recurse=True)
    handle.remove()
    assert torch.equal(sampler.run(), plain)
    offload(model)
    assert torch.equal(sampler.run(), plain)


@ORDERS
@pytest.mark.parametrize("offload", [sequential, groups_of(1)], ids=["sequential", "groups of 1"])
def test_calibration_under_offloading(model, euler, calibrating, expected_results, offload, order):
    (_, _), (plain, _) = expected_results
    sampler = euler(copy.deepcopy(model))
    with calibrating(sampler) as handle:
        sampler.run()
    ratios = handle.table.mag_ratios
    sampler = euler(model)
    handle = both(model, sampler, offload, calibrating, order)
    assert torch.equal(sampler.run(), plain) and handle.table.mag_ratios == ratios


@pytest.mark.parametrize("offload", [sequential, groups_of(1)], ids=["sequential", "groups of 1"])
def test_a_second_patch_is_refused_through_hooks(model, euler, cached, offload):
    sampler = euler(model)
    handle = cached(sampler)
    offload(model)
    with pytest.raises(Exception, match="patched already"):
        cached(sampler)
    handle.remove()
    cached(sampler)


@ORDERS
def test_after_an_exception_under_offloading(model, euler, cached, moved, expected_results, order):
    (result, _), _ = expected_results
    sampler = euler(model)
    handle = both(model, sampler, groups_of(1), cached, order)
    for step in (1, 2):
        hook = model.norm_out.register_forward_pre_hook(
            lambda module, args, step=step: 1 / 0 if sampler.step == step else None
        )
        with pytest.raises(ZeroDivisionError):
            sampler.run()
        hook.remove()
        assert handle.residuals.bytes == 0
        assert torch.equal(sampler.run(), result)
