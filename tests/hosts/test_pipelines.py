"""`magcache.enable` on real pipelines of eleven families with tiny random weights: plans, calibration, facts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny_pipelines import FAMILIES, denoiser, run_pipeline

from common.discover import discover, first_call, host_line, why_wrong
from common.errors import MagCacheError
from common.expert import argument_names
from common.hosts import HOSTS, class_name
from common.patch import magcache_forward
from common.payloads import MISFITS
from common.pipeline import disable, enable
from common.planner import Target

STEPS = 8


pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(pipeline, function of a prompt's seed: its arguments, un-cached latents of prompt 1)."""
    pipe, arguments = FAMILIES[request.param]()
    return pipe, arguments, run_pipeline(pipe, arguments(1), STEPS)


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
        cached = run_pipeline(pipe, arguments(1), STEPS)
        again = run_pipeline(pipe, arguments(1), STEPS)
    report = cache.reports[0]
    assert report.schedule.computed == STEPS // 2 and report.reused * 2 == len(report.calls) and not report.unplanned
    assert torch.equal(cached, again) and len(plans) == len(cache.reports) == 2
    assert 0 < (cached - plain).norm() / plain.norm() < 0.1
    assert set(denoiser(pipe).__dict__) == keys and torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    assert "of " in cache.report and "reused" in cache.report


def test_all_steps_computed_is_bit_equal(family):
    pipe, arguments, plain = family
    with enable(pipe, steps=STEPS, announce=None):
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)


def test_calibrated_and_by_the_papers_rule(family):
    """One run measures and is a normal result; then the rule reuses residuals whose facts were proved, or outputs."""
    pipe, arguments, plain = family
    model = denoiser(pipe)
    if not HOSTS[class_name(model)].blocks:
        with pytest.raises(MagCacheError, match="only the output can be predicted"):
            enable(pipe, calibrate=True)
        return
    with pytest.raises(MagCacheError, match="measure them with enable.pipe, calibrate=True"):
        enable(pipe, thresh=0.5, K=1, retention_ratio=0.2, calibrate=False)
    with pytest.raises(MagCacheError, match="calibrate=True computes everything"):
        enable(pipe, speedup=2, calibrate=True)
    with enable(pipe, calibrate=True, announce=None):
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    with pytest.raises(MagCacheError, match="no published settings; give magcache_K, retention_ratio too"):
        enable(pipe, thresh=0.5)
    with enable(pipe, thresh=5.0, K=1, retention_ratio=0.2, announce=None) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
    report = cache.reports[0]
    assert report.reused and not report.unplanned and not report.notes
    assert report.verified and "facts verified on this model" in cache.report
    assert 0 < (cached - plain).norm() / plain.norm() < 0.1


def test_facts_are_found_without_any(family):
    """Their blocks are those that a person wrote down, where one did."""
    pipe, arguments, _ = family
    model, args, kwargs = first_call(pipe, **arguments(1), num_inference_steps=STEPS, output_type="latent")
    with torch.no_grad():
        found = discover(model, args, kwargs)
    known = HOSTS[class_name(model)]
    assert found.host.blocks == known.blocks
    assert f'"{class_name(model)}": Host(' in host_line(model, found)


def test_facts_hold_and_wrong_ones_do_not(family):
    """Of each class: as written; with one token for all; with the first module that runs for the final layer."""
    pipe, arguments, _ = family
    model, args, kwargs = first_call(pipe, **arguments(1), num_inference_steps=STEPS, output_type="latent")
    host, given = HOSTS[class_name(model)], {**dict(zip(argument_names(model), args)), **kwargs}
    if not host.blocks:
        return

    def why(**facts):
        try:
            with torch.no_grad():
                return why_wrong(model, replace(host, **facts), given, lambda: model.forward(*args, **kwargs))
        except (MagCacheError, *MISFITS) as error:  # as `payloads.Residual` takes it
            return str(error)

    first = next(name for name, child in model.named_children() if not isinstance(child, torch.nn.ModuleList))
    assert not why() and why(output_tokens=lambda model, forward: 1) and why(final_layer=first)


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
    plain, said = run_pipeline(pipe, arguments(1), STEPS), []
    with enable(pipe, calibrate=True, announce=None):
        run_pipeline(pipe, arguments(2), STEPS)
    rule, known = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2}, HOSTS[class_name(model)]
    monkeypatch.setitem(HOSTS, class_name(model), replace(known, blocks=(), final_layer=None))
    with enable(pipe, **rule, announce=None) as outputs:
        by_output = run_pipeline(pipe, arguments(1), STEPS)
    monkeypatch.setitem(HOSTS, class_name(model), replace(known, **facts))
    with enable(pipe, **rule, announce=said.append) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
    assert sum("do not hold for this model" in text for text in said) == 1 == len(cache.reports[0].notes)
    assert not cache.reports[0].verified
    assert cache.reports[0].reused == outputs.reports[0].reused and torch.equal(cached, by_output)
    with pytest.raises(MagCacheError, match="residuals cannot be measured"):
        with enable(pipe, calibrate=True, announce=None):
            run_pipeline(pipe, arguments(2), STEPS)
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)


def test_every_class_is_known_by_its_facts_or_by_a_reason():
    for name, host in HOSTS.items():
        assert bool(host.blocks) != bool(host.why_output), name


@pytest.mark.parametrize("scheduler", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_another_scheduler_put_in_while_enabled(scheduler):
    """With a count of its steps, and without one."""
    import diffusers

    pipe, arguments = FAMILIES["sdxl"]()
    with enable(pipe, speedup=2, announce=None) as cache:
        run_pipeline(pipe, arguments(1), STEPS)
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
        cached = run_pipeline(pipe, arguments(1), STEPS)
    report = cache.reports[-1]
    assert report.complete and report.schedule.computed == STEPS // 2 == report.reused and not report.unplanned
    plain, fewer = run_pipeline(pipe, arguments(1), STEPS), run_pipeline(pipe, arguments(1), STEPS // 2)
    assert 0 < (cached - plain).norm() < (fewer - plain).norm()


@pytest.mark.robustness(
    "When nothing would be cached",
    "a scheduler that does not count its steps, in a pipeline that passes its step to `cache_context`",
    "cached by that step number",
)
@pytest.mark.parametrize("tells", ["step_index", "sigma", "the last steps"])
def test_a_pipeline_tells_its_step(tells, monkeypatch):
    """By diffusers' `cache_context`, as Wan does: then a scheduler that does not count its steps will do, too."""
    import diffusers

    class Uncounted(diffusers.FlowMatchEulerDiscreteScheduler):
        step_index = None

        def step(self, model_output, timestep, sample, **kwargs):
            at = int((self.timesteps == timestep).nonzero())
            return (sample + (self.sigmas[at + 1] - self.sigmas[at]) * model_output,)

    pipe, arguments = FAMILIES["wan"]()
    pipe.scheduler = Uncounted(shift=3.0)
    plain, told = run_pipeline(pipe, arguments(1), STEPS), type(pipe.transformer).cache_context

    def tell_less(model, name, step_index, sigma, num_inference_steps):
        if tells == "sigma":
            return told(model, name, sigma=sigma)
        return told(model, name, step_index=step_index - 2, num_inference_steps=num_inference_steps - 2)

    if tells != "step_index":
        monkeypatch.setattr(type(pipe.transformer), "cache_context", tell_less)
    with enable(pipe, speedup=2, announce=None) as cache:
        cached = run_pipeline(pipe, arguments(1), STEPS)
        copied = copy.deepcopy(pipe.transformer)
        assert copied.cache_context.__self__ is copied
    report = cache.reports[0]
    assert len(cache.reports) == 1 and report.complete and report.reused == STEPS and not report.unplanned
    assert 0 < (cached - plain).norm() / plain.norm() < 0.1 and "cache_context" not in vars(pipe.transformer)


def test_another_cache_is_refused_on_either_side():
    from diffusers import FirstBlockCacheConfig
    from diffusers.hooks import apply_first_block_cache

    pipe, _ = FAMILIES["flux"]()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(MagCacheError, match="disable_cache"):
        enable(pipe, speedup=2)
    pipe.transformer.disable_cache()
    enable(pipe, speedup=2, announce=None).disable()
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(MagCacheError, match="another cache"):
        enable(pipe, speedup=2)


def test_disable_and_what_cannot_be_enabled():
    pipe, arguments = FAMILIES["wan22"]()
    plain = run_pipeline(pipe, arguments(1), STEPS)
    cache = enable(pipe, speedup=2, announce=None)
    with pytest.raises(MagCacheError, match="patched already"):
        enable(pipe, steps=3)
    assert not torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    disable(pipe)
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain) and len(cache.reports) == 1
    with pytest.raises(MagCacheError, match="not enabled"):
        disable(pipe)
    pipe.transformer = pipe.transformer_2 = None
    with pytest.raises(MagCacheError, match="no transformer or U-Net"):
        enable(pipe)


def test_a_published_table_gives_the_settings_of_the_release(monkeypatch):
    """By the checkpoint's name: this tiny model is told to be FLUX.1-dev."""
    pipe, arguments = FAMILIES["flux"]()
    pipe.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    plans = []
    with enable(pipe, thresh=0.24, announce=plans.append) as cache:
        run_pipeline(pipe, arguments(1), 28)
    assert cache.reports[0].schedule.computed == 9 and "ratios of flux-dev (published)" in plans[0]
    assert not cache.reports[0].notes


def test_a_class_nobody_described_is_looked_at(monkeypatch):
    """Under the paper's rule, at its first call; a speed-up needs nothing."""
    pipe, arguments = FAMILIES["sd3"]()
    with enable(pipe, calibrate=True, announce=None):
        run_pipeline(pipe, arguments(1), STEPS)
    rule = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2, "announce": None}
    with enable(pipe, **rule):
        known = run_pipeline(pipe, arguments(1), STEPS)
    monkeypatch.delitem(HOSTS, class_name(pipe.transformer))
    with enable(pipe, **rule) as cache:
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), known)
    assert cache.reports[0].reused and "forward" not in pipe.transformer.__dict__
    with enable(pipe, speedup=2, announce=None) as cache:
        run_pipeline(pipe, arguments(1), STEPS)
    assert cache.reports[0].reused == STEPS // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_blocks(family):
    """The compiler's own tracing, without generating code; of a class that names no repeated blocks, all of it."""
    pipe, arguments = FAMILIES[family]()
    model, wishes, plain = denoiser(pipe), [{"speedup": 2}], []
    if HOSTS[class_name(model)].blocks:
        wishes.append({"thresh": 5.0, "K": 1, "retention_ratio": 0.2})
        with enable(pipe, calibrate=True, announce=None):
            run_pipeline(pipe, arguments(1), STEPS)
    for wish in wishes:
        with enable(pipe, **wish, announce=None):
            plain.append(run_pipeline(pipe, arguments(1), STEPS))
    (model.compile_repeated_blocks if getattr(model, "_repeated_blocks", None) else model.compile)(backend="eager")
    for wish, expected in zip(wishes, plain):
        with enable(pipe, **wish, announce=None) as cache:
            assert torch.allclose(run_pipeline(pipe, arguments(1), STEPS), expected, rtol=1e-4, atol=1e-4)
        assert cache.reports[0].reused and not cache.reports[0].notes


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "wan22"])
def test_the_times_of_the_facts_are_those_of_the_scheduler(name):
    """`magcache_forward` by facts alone, as for a loop of one's own, plans and draws what `enable` does by the
    scheduler: also where time runs from 0 to 1."""
    pipe, arguments = FAMILIES[name]()
    model = denoiser(pipe)
    with enable(pipe, steps=4, announce=None) as cache:
        expected = run_pipeline(pipe, arguments(1), STEPS)
    with magcache_forward(
        model,
        HOSTS[class_name(model)],
        None,
        Target(magcache_steps=4),
        lambda: pipe.scheduler.timesteps,
        announce=None,
        scheduler=lambda: pipe.scheduler,
    ) as handle:
        drawn = run_pipeline(pipe, arguments(1), STEPS)
    assert [report.schedule.strip for report in handle.reports] == [cache.reports[0].schedule.strip]
    assert torch.equal(drawn, expected) and handle.reports[0].complete
