"""`magcache.enable` on real pipelines of ten families, with tiny random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_pipelines import FAMILIES, run

from common.discover import describe, discover, first_call
from common.errors import MagCacheError
from common.hosts import HOSTS, class_name
from common.pipeline import enable

STEPS = 8


@pytest.fixture(autouse=True)
def own_calibrations(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(pipeline, function of a prompt's seed: its arguments, un-cached latents of prompt 1)."""
    pipe, arguments = FAMILIES[request.param]()
    return pipe, arguments, run(pipe, arguments(1), STEPS)


def denoiser(pipe):
    return getattr(pipe, "transformer", None) or pipe.unet


class Calls:
    """Counts the calls that reach the forward of a model, which predicted outputs do not."""

    def __init__(self, model):
        self.count = 0
        self.hook = next(model.children()).register_forward_pre_hook(self.add)

    def add(self, *args):
        self.count += 1


def test_a_plain_speedup(family):
    """Nothing known, nothing calibrated: fewer calls, nearly the same latents, and no trace left behind."""
    pipe, arguments, plain = family
    keys, plans = set(denoiser(pipe).__dict__), []
    with enable(pipe, speedup=2, announce=plans.append) as cache:
        cached = run(pipe, arguments(1), STEPS)
        again = run(pipe, arguments(1), STEPS)
    report = cache.reports[0]
    assert report.schedule.computed == STEPS // 2 and report.reused * 2 == len(report.calls) and not report.unplanned
    assert torch.equal(cached, again) and len(plans) == len(cache.reports) == 2
    assert 0 < (cached - plain).norm() / plain.norm() < 0.1
    assert set(denoiser(pipe).__dict__) == keys and torch.equal(run(pipe, arguments(1), STEPS), plain)
    assert "of " in cache.report and "reused" in cache.report


def test_all_steps_computed_is_bit_equal(family):
    pipe, arguments, plain = family
    with enable(pipe, steps=STEPS, announce=None):
        assert torch.equal(run(pipe, arguments(1), STEPS), plain)


def test_a_run_leaves_nothing_for_the_next(family):
    """Another prompt, other steps and a broken-off run in between change nothing."""
    pipe, arguments, _ = family
    with enable(pipe, speedup=2, announce=None) as cache:
        alone = run(pipe, arguments(1), STEPS)
        run(pipe, arguments(2), STEPS + 3)

        def stop(pipe, step, timestep, kwargs):
            if step == 3:
                raise KeyboardInterrupt
            return kwargs

        if "callback_on_step_end" in type(pipe).__call__.__code__.co_varnames:
            with pytest.raises(KeyboardInterrupt):
                run(pipe, arguments(2), STEPS, callback_on_step_end=stop)
        assert torch.equal(run(pipe, arguments(1), STEPS), alone)
        assert cache.reports[-1].complete


def test_calibrated_and_by_the_papers_rule(family):
    """One run measures and is a normal result; then the rule reuses residuals whose facts were proved, or outputs."""
    pipe, arguments, plain = family
    model = denoiser(pipe)
    if not HOSTS[class_name(model)].blocks:
        with pytest.raises(MagCacheError, match="only the output can be predicted"):
            enable(pipe, calibrate=True)
        return
    with pytest.raises(MagCacheError, match="calibrate=True"):
        enable(pipe, thresh=0.5)
    with enable(pipe, calibrate=True, announce=None):
        assert torch.equal(run(pipe, arguments(1), STEPS), plain)
    with pytest.raises(MagCacheError, match="no published settings; give magcache_K, retention_ratio too"):
        enable(pipe, thresh=0.5)
    with enable(pipe, thresh=5.0, K=1, retention_ratio=0.2, announce=None) as cache:
        cached = run(pipe, arguments(1), STEPS)
    report = cache.reports[0]
    assert report.reused and not report.unplanned and not report.notes
    assert 0 < (cached - plain).norm() / plain.norm() < 0.1


def test_facts_are_found_without_any(family):
    """Their blocks are those that a person wrote down, where one did."""
    pipe, arguments, _ = family
    model, args, kwargs = first_call(pipe, **arguments(1), num_inference_steps=STEPS, output_type="latent")
    with torch.no_grad():
        found = discover(model, args, kwargs)
    known = HOSTS[class_name(model)]
    assert found.host.blocks == known.blocks
    assert f'"{class_name(model)}": Host(' in describe(model, found)


# Seven ways to be wrong, on the class where each does most harm. None may change a picture.
WRONG = {
    "a module in the middle": ("flux", {"final_layer": "x_embedder"}),
    "half of the stack": ("flux", {"blocks": ("transformer_blocks",)}),
    "the text in place of the picture": ("sd3", {"image_tokens": "encoder_hidden_states"}),
    "the time in place of the picture": ("wan", {"image_tokens": 2}),
    "no final layer where the last block returns two": ("qwen_image", {"final_layer": None}),
    "too few tokens kept": ("ltx", {"output_tokens": lambda model, forward: 3}),
    "the tokens at the wrong end": ("cogvideox", {"output_tokens": lambda model, forward: 2, "tokens_lead": True}),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_facts_never_make_a_wrong_picture(what, monkeypatch):
    family, facts = WRONG[what]
    pipe, arguments = FAMILIES[family]()
    model = pipe.transformer
    plain, said = run(pipe, arguments(1), STEPS), []
    with enable(pipe, calibrate=True, announce=None):
        run(pipe, arguments(2), STEPS)
    rule, known = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2}, HOSTS[class_name(model)]
    monkeypatch.setitem(HOSTS, class_name(model), replace(known, blocks=(), final_layer=None))
    with enable(pipe, **rule, announce=None) as outputs:
        by_output = run(pipe, arguments(1), STEPS)
    monkeypatch.setitem(HOSTS, class_name(model), replace(known, **facts))
    with enable(pipe, **rule, announce=said.append) as cache:
        cached = run(pipe, arguments(1), STEPS)
    assert sum("do not hold for this model" in text for text in said) == 1 == len(cache.reports[0].notes)
    assert cache.reports[0].reused == outputs.reports[0].reused and torch.equal(cached, by_output)
    with pytest.raises(MagCacheError, match="residuals cannot be measured"):
        with enable(pipe, calibrate=True, announce=None):
            run(pipe, arguments(2), STEPS)
    assert torch.equal(run(pipe, arguments(1), STEPS), plain)
