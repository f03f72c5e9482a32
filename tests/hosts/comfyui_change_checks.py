"""What a call is conditioned on changes in the middle of a run. Run by comfyui_worker.py."""

import comfy.hooks
import comfy.lora
import comfy.samplers
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_fault_checks import Control
from comfyui_helpers import STEPS, Watched, cached_patcher, lora_of, plan_of_levels, sample, sampler_levels
from comfyui_model_checks import smooth_model
from comfyui_models import build, prompt

CHANGE = 6  # the step from which on something is another; a reuse in the plan ##..#..#..#.


def late(patcher, change):
    """A model on whose calls `change(arguments)` is run once the step is CHANGE: for what another node alters while the
    sampler is at work."""
    level, patched = sampler_levels(patcher)[CHANGE] * 1.0001, patcher.clone()

    def call(apply, asked):
        if float(asked["timestep"].max()) <= level:
            asked["c"] = change(dict(asked["c"]))
        return apply(asked["input"], asked["timestep"], **asked["c"])

    patched.set_model_unet_function_wrapper(call)
    return patched


def strength_of_a_control_net():
    patcher, net = build("flux").clone(), Control(1).set_cond_hint(None, 0.7)
    level = sampler_levels(patcher)[CHANGE] * 1.0001

    def weaken(executor, x, timestep, *args, **kwargs):
        net.strength = 0.2 if float(timestep.max()) <= level else 0.7
        return executor(x, timestep, *args, **kwargs)

    patcher.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "weaken", weaken)
    return patcher, lambda model: sample(model, positive=prompt(0, control=net, control_apply_to_uncond=True))


def scheduled_lora():
    """A LoRA hook with two keyframes: at full strength, then a quarter of it."""
    patcher = build("flux", seed=41)
    lora = lora_of(patcher)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    percent = next(
        percent / 1000
        for percent in range(1000)
        if patcher.model.model_sampling.percent_to_sigma(percent / 1000) <= sampler_levels(patcher)[CHANGE] * 1.0001
    )
    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.25, start_percent=percent))
    hooks.set_keyframes_on_hooks(keyframes)
    return patcher, lambda model: sample(
        model, positive=comfy.hooks.set_hooks_for_conditioning(prompt(0), hooks), negative=prompt(1)
    )


def changed_prompt():
    return late(build("flux"), lambda c: {**c, "c_crossattn": c["c_crossattn"] * 0.5}), sample


def changed_guidance():
    return late(build("flux"), lambda c: {**c, "guidance": c["guidance"] + 2.0}), sample


def prompt_in_ranges():
    """Core's ConditioningSetTimestepRange: other conditionings, by which residuals are kept anyway."""
    share = next(
        percent / 1000
        for percent in range(1000)
        if build("flux").model.model_sampling.percent_to_sigma(percent / 1000) <= sampler_levels(build("flux"))[CHANGE]
    )
    positive = prompt(4, start_percent=0.0, end_percent=share) + prompt(5, start_percent=share, end_percent=1.0)
    return build("flux"), lambda model: sample(model, positive=positive)


CHANGES = (strength_of_a_control_net, scheduled_lora, changed_prompt, changed_guidance, prompt_in_ranges)


def a_change_in_mid_run_computes(name):
    """The step at which something changes computes, though planned to be reused, with all branches; the others go by
    the plan. Off is plain."""
    model, run = next(change for change in CHANGES if change.__name__ == name)()
    plain = run(model)
    off, _ = cached_patcher(model, thresholds={"magcache_thresh": 0.0})
    assert torch.equal(run(off), plain)
    for options in ({}, {"thresholds": {}, "mag_ratios": "", "speedup": 2.0, "corrector": True}):
        patched, said = cached_patcher(model, **options)
        watched = Watched(patched)
        result = run(watched.patcher)
        watched.remove()
        computed = {sigma for sigma, ran in zip(watched.sigmas, watched.ran) if ran}
        levels = sampler_levels(model)
        strip = "".join(".#"[any(abs(sigma - level) < 1e-6 for sigma in computed)] for level in levels)
        planned = plan_of_levels(levels).strip if not options else said[0].splitlines()[1].split()[0]
        expected = planned[:CHANGE] + "#" + planned[CHANGE + 1 :]
        assert strip == expected and torch.isfinite(result).all(), (options, strip, expected, said)
        unplanned = planned[CHANGE] == "."
        at_the_change = [ran for sigma, ran in zip(watched.sigmas, watched.ran) if abs(sigma - levels[CHANGE]) < 1e-6]
        assert all(at_the_change), (options, at_the_change)  # of both branches
        assert not unplanned or "computed unplanned (the conditioning changed)" in said[-1], said


def a_third_call_of_a_guidance_has_residuals_of_its_own():
    """Of a guidance that calls the model once more for a conditioning, at another latent (self-attention guidance
    does), the ordinary calls know nothing: where nothing comes of that third call, the picture is the same."""
    patcher, thirds = build("flux"), []

    def guide(args):
        uncond, model, options = args["uncond"], args["model"], args["model_options"]
        thirds.append(comfy.samplers.calc_cond_batch(model, [uncond], 0.3 * args["input"], args["sigma"], options))
        return args["denoised"]

    guided = patcher.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    for options in ({}, {"thresholds": {}, "mag_ratios": "", "speedup": 2.0, "corrector": True}):
        alone, _ = cached_patcher(patcher, **options)
        beside, said = cached_patcher(guided, **options)
        assert torch.equal(sample(beside), sample(alone)) and "reused; transformer" in said[-1], (options, said)
    assert len(thirds) == 2 * STEPS


def smooth_prompted_model():
    """A model whose output changes smoothly, and is larger or smaller by the prompt."""
    patcher, _ = smooth_model(comfy.supported_models.WAN21_T2V)
    transformer = patcher.model.diffusion_model
    plain = transformer.forward
    transformer.forward = lambda x, t, context, **more: plain(x, t) * (1 + context.mean((1, 2)).view(-1, 1, 1, 1, 1))
    return patcher


def with_changing_guidance(patcher, step, before, after):
    """Guidance of one strength up to a step and of another from there on, as core's CFG Override makes it."""
    level, patched = sampler_levels(patcher)[step] * 1.0001, patcher.clone()

    def override(executor, x, timestep, *args, **kwargs):
        executor.class_obj.cfg = after if float(timestep.max()) <= level else before
        return executor(x, timestep, *args, **kwargs)

    patched.add_wrapper(WrappersMP.PREDICT_NOISE, override)
    return patched


def one_after_the_other(self, x, timestep, model_options=None, seed=None):
    """In the place of `CFGGuider.predict_noise`: each branch in a batch of its own, as core's Dual Model CFG Guider."""
    outputs = [
        comfy.samplers.calc_cond_batch(self.inner_model, [self.conds[name]], x, timestep, model_options)[0]
        for name in ("positive", "negative")[: 1 if self.cfg == 1.0 else 2]
    ]
    return outputs[-1] + self.cfg * (outputs[0] - outputs[-1])


def guidance_that_changes(before, after):
    """Guidance that begins, ends or gets stronger or weaker at any step of the plan, in one call for both branches, in
    two, or in two batches: what was predicted and what is corrected is not multiplied by it."""
    patcher = smooth_prompted_model()
    roomy, missed = type(patcher).get_free_memory, {}
    guider, together = comfy.samplers.CFGGuider, comfy.samplers.CFGGuider.predict_noise
    for step in range(3, STEPS - 2):
        model = with_changing_guidance(patcher, step, before, after)
        plain = sample(model, "wan")
        for corrector in (False, True):
            results = []
            for free, guide in ((2**40, together), (0, together), (2**40, one_after_the_other)):
                patched, said = cached_patcher(model, thresholds={}, mag_ratios="", speedup=2.0, corrector=corrector)
                type(patcher).get_free_memory = lambda self, device, free=free: free
                guider.predict_noise = guide
                try:
                    results.append(sample(patched, "wan"))
                finally:
                    type(patcher).get_free_memory, guider.predict_noise = roomy, together
            for one in results[1:]:
                assert torch.allclose(one, results[0], rtol=1e-4, atol=1e-4), (step, corrector, said)
            missed[step, corrector] = float((results[0] - plain).norm() / plain.norm())
    for step in range(3, STEPS - 2):
        assert missed[step, True] < 0.5 * missed[step, False] < 0.1, (step, missed)
