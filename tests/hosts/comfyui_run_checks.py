"""Families, samplers, steps and conditionings: what is reused, bit for bit. Run by comfyui_worker.py."""

import copy

import comfy.model_management
import comfy.samplers
import nodes
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_helpers import (
    SETTINGS,
    STEPS,
    Said,
    Watched,
    cached_patcher,
    caching,
    expected_of,
    measuring,
    model_state,
    nodes_of,
    plan_of_levels,
    sample,
    sampler_levels,
    tables,
    tiny_table,
    transformer_of,
    untouched,
)
from comfyui_models import build, latent, prompt


def nothing_skipped_is_plain(family, cfg):
    patcher = build(family)
    plain = sample(patcher, family, cfg=cfg, steps=5)
    before = model_state(transformer_of(patcher))
    for off in ({"magcache_thresh": 0.0}, {"magcache_K": 0}, {"retention_ratio": 1.0}):
        patched, said = cached_patcher(patcher, thresholds={**SETTINGS, **off})
        assert torch.equal(sample(patched, family, cfg=cfg, steps=5), plain), off
        assert "nothing will be reused" in said[0], said
        untouched(transformer_of(patcher), before)


def reuse_is_what_it_should_be(family, cfg):
    """Bit for bit the oracle's latent; exactly the planned steps run their blocks; twice the same; nothing is left
    behind."""
    patcher = build(family)
    plain = sample(patcher, family, cfg=cfg)
    expected, schedule = expected_of(patcher, family, cfg=cfg)
    assert schedule.strip == "##..#..#..#.", schedule.strip
    assert not torch.allclose(expected, plain)

    before = model_state(transformer_of(patcher))
    patched, said = cached_patcher(patcher)
    watched = Watched(patched)
    for _ in range(2):
        watched.ran.clear()
        result = sample(watched.patcher, family, cfg=cfg)
        assert torch.equal(result, expected)
        per_step = len(watched.ran) // STEPS
        assert watched.strip[::per_step] == schedule.strip and per_step * STEPS == len(watched.ran)
    watched.remove()
    untouched(transformer_of(patcher), before)
    assert "MagCache plan: 12 steps" in said[0] and "7 reused" in said[1] and "s saved" in said[1], said


def sampler_skips_the_planned_steps(sampler):
    """No sampler fails; a call that runs no block belongs to a step that is to be reused; nothing skipped is plain."""
    patcher = build("flux")
    off, _ = cached_patcher(patcher, thresholds={**SETTINGS, "retention_ratio": 1.0})
    plain = sample(patcher, sampler=sampler)
    assert torch.equal(sample(off, sampler=sampler), plain)
    discards = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    levels = np.asarray(sampler_levels(patcher, STEPS + 1)[:-1] if discards else sampler_levels(patcher))
    reuse = plan_of_levels(levels).reuse
    patched, said = cached_patcher(patcher)
    watched = Watched(patched)
    result = sample(watched.patcher, sampler=sampler)
    watched.remove()
    assert torch.isfinite(result).all() and not torch.equal(result, plain)
    steps = [max(0, int((levels >= sigma * 0.9999).sum()) - 1) for sigma in watched.sigmas]
    assert all(ran or reuse[step] for ran, step in zip(watched.ran, steps))
    if sampler not in ("dpm_fast", "dpm_adaptive"):  # which choose their own steps
        assert all(ran != reuse[step] for ran, step in zip(watched.ran, steps)), (watched.strip, steps)
    assert "." in watched.strip, said


def batched_is_split(family):
    """Conditional and unconditional in one call, in two, and in one or two by turns as memory has it: the same steps
    are skipped and the same picture comes out, to rounding."""
    patcher = build(family)
    roomy = type(patcher).get_free_memory
    results, strips = [], []
    for free in (lambda call: 2**40, lambda call: 0, lambda call: 2**40 * (call % 3 == 0)):
        calls = iter(range(10**6))
        type(patcher).get_free_memory = lambda self, device, free=free, calls=calls: free(next(calls))
        try:
            patched, said = cached_patcher(patcher)
            watched = Watched(patched)
            results.append(sample(watched.patcher, family))
        finally:
            type(patcher).get_free_memory = roomy
            watched.remove()
        steps = {}
        for sigma, ran in zip(watched.sigmas, watched.ran):
            steps.setdefault(sigma, set()).add(ran)
        strips.append("".join(".#"[ran] for (ran,) in steps.values()))
    assert strips == ["##..#..#..#."] * 3, strips
    assert len({len(calls) for calls in watched.branches}) == 2, "memory was to run short at some steps"
    for result in results[1:]:
        assert float((result - results[0]).abs().max()) <= 2e-4 * float(results[0].abs().max())


def image_to_image(denoise):
    """The ratios are looked up by noise level, not by the index of the step."""
    patcher = build("flux")
    expected, schedule = expected_of(patcher, denoise=denoise)
    levels = sampler_levels(patcher, denoise=denoise)
    assert levels[0] < 0.95 and np.allclose(schedule.ratios, tables.load(tiny_table()).at(levels))
    patched, said = cached_patcher(patcher)
    assert torch.equal(sample(patched, denoise=denoise), expected)
    assert schedule.strip in said[0]


def two_stages():
    """KSampler (Advanced): each stage is planned over its own noise levels and begins with a computed step."""
    patcher = build("wan")
    patched, said = cached_patcher(patcher)
    watched = Watched(patched)
    halfway = nodes.KSamplerAdvanced().sample(
        watched.patcher,
        "enable",
        0,
        STEPS,
        1.0,
        "euler",
        "simple",
        prompt(0),
        prompt(1),
        {"samples": latent("wan")},
        0,
        6,
        "enable",
    )[0]
    first = watched.strip
    watched.ran.clear()
    nodes.KSamplerAdvanced().sample(
        watched.patcher, "disable", 0, STEPS, 1.0, "euler", "simple", prompt(0), prompt(1), halfway, 6, 10000, "disable"
    )
    watched.remove()
    levels = sampler_levels(patcher)
    assert first == plan_of_levels(levels[:6]).strip and watched.strip == plan_of_levels(levels[6:]).strip
    assert "." in first and "." in watched.strip and watched.strip[0] == "#", said


def a_run_knows_nothing_of_the_one_before():
    """Run B after run A is B alone, bit for bit, whatever A was, and also where A breaks off at any of its calls."""
    patcher = build("flux")
    runs = {
        "base": {},
        "steps": {"steps": 7},
        "cfg": {"cfg": 1.0},
        "seed": {"seed": 5},
        "batch": {"batch": 2},
        "sampler": {"sampler": "heun"},
        "prompt": {"positive": prompt(7)},
        "size": {"samples": torch.zeros(1, 16, 12, 8)},
    }
    alone = {name: sample(cached_patcher(patcher)[0], **run) for name, run in runs.items()}
    patched, said = cached_patcher(patcher)
    before = model_state(transformer_of(patcher))
    for name, run in runs.items():
        assert torch.equal(sample(patched, **run), alone[name]), name
        assert torch.equal(sample(patched), alone["base"]), f"base after {name}"
    for stop in range(STEPS):
        calls = iter(range(10**6))

        def interrupt(module, args, calls=calls, stop=stop):
            if next(calls) == stop:
                raise comfy.model_management.InterruptProcessingException

        # Of the final layer: forward is under way, with stand-ins in place, when the interruption comes.
        hook = transformer_of(patcher).final_layer.register_forward_pre_hook(interrupt)
        try:
            sample(patched)
            raise AssertionError("was to be interrupted")
        except comfy.model_management.InterruptProcessingException:
            pass
        finally:
            hook.remove()
        untouched(transformer_of(patcher), before)
        assert torch.equal(sample(patched), alone["base"])


def nothing_is_kept_after_a_run():
    made = []

    class Spied(caching.NodeCache):
        def begin(self, circumstances):
            made.append(super().begin(circumstances))
            return made[-1]

    def outermost(executor, *args, **kwargs):
        before = executor.class_obj.model_options
        result = executor(*args, **kwargs)
        assert executor.class_obj.model_options is before
        return result

    patcher = build("flux").clone()
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "outermost", outermost)
    patched = Spied(Said(), thresholds=SETTINGS, mag_ratios=tiny_table(), corrector=True).on(patcher)
    sample(patched)
    assert made[0].run.report.peak_bytes > 0 and not made[0].run.residuals.kept
    assert not made[0].run.follower.branches
    assert "magcache" not in patched.model_options["transformer_options"]


def regions_and_schedules(family):
    """Several conditionings a branch, by area and by part of the run: each has a residual of its own, and where one
    begins all compute."""
    patcher = build(family)
    height = latent(family).shape[-2]
    positive = (
        prompt(0, area=(height // 2, height, 0, 0))
        + prompt(3, area=(height // 2, height, height // 2, 0))
        + prompt(4, start_percent=0.0, end_percent=0.5)
        + prompt(5, start_percent=0.5, end_percent=1.0)
    )
    half = patcher.model.model_sampling.percent_to_sigma(0.5)
    expected, schedule = expected_of(patcher, family, begins=half, positive=positive)
    patched, said = cached_patcher(patcher)
    assert torch.equal(sample(patched, family, positive=positive), expected), said


def context_windows():
    patcher = build("wan")
    window = nodes_of("nodes_context_windows").ContextWindowsManualNode.execute
    frames = torch.zeros(1, 16, 9, 8, 8)
    windowed = window(patcher, 4, 1, "standard_static", 1, False, "pyramid", 2, False).args[0]
    expected, schedule = expected_of(windowed, "wan", samples=frames)
    plain = sample(windowed, "wan", samples=frames)
    patched, said = cached_patcher(windowed)
    assert torch.equal(sample(patched, "wan", samples=frames), expected) and not torch.equal(expected, plain)


def skip_layer_guidance():
    """Skip-layer guidance calls the model with the same conditioning again, but without some blocks: another
    residual."""
    patcher = build("wan")
    guided = nodes_of("nodes_slg").SkipLayerGuidanceDiT.execute(patcher, 2.0, 0.0, 1.0, "1,2", "").args[0]
    plain = sample(patcher, "wan")
    assert not torch.allclose(sample(guided, "wan"), plain)
    expected, _ = expected_of(guided, "wan")
    patched, said = cached_patcher(guided)
    assert torch.equal(sample(patched, "wan"), expected)


def reference_pictures():
    """Kontext: tokens of a reference picture follow those of the picture. HunyuanVideo: they precede and are cut
    off."""
    for family, key in (
        ("flux", "reference_latents"),
        ("flux2", "reference_latents"),
        ("qwen", "reference_latents"),
        ("hunyuan", "ref_latent"),
    ):
        patcher, reference = (
            build(family),
            torch.randn(latent(family).shape, generator=torch.Generator().manual_seed(1)),
        )
        about = (
            {key: [reference]}
            if key == "reference_latents"
            else {"guiding_frame_index": None, key: reference[:, :, :1]}
        )
        plain = sample(patcher, family)
        positive = prompt(0, **about)
        expected, _ = expected_of(patcher, family, positive=positive)
        assert not torch.allclose(sample(patcher, family, positive=positive), plain), family
        patched, said = cached_patcher(patcher)
        assert torch.equal(sample(patched, family, positive=positive), expected), family


def controls_count_once(family):
    """What forward adds between its blocks (control nets, block patches) is in the residual and not added a second
    time."""
    patcher = build(family).clone()
    made = torch.Generator().manual_seed(3)
    if family == "qwen":
        patcher.set_model_patch(lambda args: {**args, "img": args["img"] + 0.3}, "double_block")
    else:
        control = {
            "input": [torch.randn(1, 16, 64, generator=made)] * 2,
            "output": [torch.randn(1, 16, 64, generator=made)] * 2,
        }
        patcher.set_model_unet_function_wrapper(
            lambda apply, call: apply(
                call["input"], call["timestep"], **{**call["c"], "control": copy.deepcopy(control)}
            )
        )
    assert not torch.allclose(sample(patcher, family), sample(build(family), family))
    expected, _ = expected_of(patcher, family)
    patched, said = cached_patcher(patcher)
    assert torch.equal(sample(patched, family), expected)


def replaced_first_block():
    """Patches that take the place of the first block. Where what they do keeps the residual true it is used; where they
    change what enters the block, or never call it, the proof notices and the output is predicted."""

    def adds(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + 0.1}

    def scales(args, extra):
        return extra["original_block"]({**args, "img": args["img"] * 1.1})

    def skips(args, extra):
        return {"img": args["img"], "txt": args["txt"]}

    for replaces, wrong in ((adds, ""), (scales, "its own residual makes another output"), (skips, "did not pass")):
        patcher = build("flux").clone()
        patcher.set_model_patch_replace(replaces, "dit", "double_block", 0)
        plain = sample(patcher)
        off, _ = cached_patcher(patcher, thresholds={**SETTINGS, "retention_ratio": 1.0})
        assert torch.equal(sample(off), plain)
        patched, said = cached_patcher(patcher)
        result = sample(patched)
        assert torch.isfinite(result).all() and not torch.equal(result, plain)
        text = "\n".join(said)
        assert ("The facts of Flux do not hold" in text) == bool(wrong) and wrong in text, text
        assert ("payload output" in text) == bool(wrong) and "reused; transformer" in text, text


def beside_other_wrappers():
    """EasyCache and MagCache on one model, in both orders: neither breaks, and where EasyCache rests all is as without
    it."""
    easy = nodes_of("nodes_easycache").EasyCacheNode.execute
    patcher = build("flux")
    before = model_state(transformer_of(patcher))
    alone = sample(cached_patcher(patcher)[0])
    for threshold in (0.0, 3.0):
        for magcache_first in (True, False):
            if magcache_first:
                both = easy(cached_patcher(patcher)[0], threshold, 0.15, 0.95, False).args[0]
            else:
                both = cached_patcher(easy(patcher, threshold, 0.15, 0.95, False).args[0])[0]
            result = sample(both)
            assert torch.isfinite(result).all()
            assert torch.equal(result, alone) == (threshold == 0)
            untouched(transformer_of(patcher), before)


def the_last_magcache_node_holds():
    """Two MagCache nodes in a chain, and a calibration behind one: the last takes the place of the others."""
    patcher = build("flux")
    off, _ = cached_patcher(patcher, thresholds={**SETTINGS, "magcache_thresh": 0.0})
    twice, said = cached_patcher(off)
    assert torch.equal(sample(twice), sample(cached_patcher(patcher)[0]))
    calibration = measuring.NodeCalibration(Said())
    assert torch.equal(sample(calibration.on(twice)), sample(patcher)) and calibration.failure is None
