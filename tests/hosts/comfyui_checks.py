"""What must hold of the ComfyUI nodes, run by comfyui_worker.py against real ComfyUI code and tiny random models."""

import copy
import json
import sys
from pathlib import Path

import comfy.model_management
import comfy.samplers
import folder_paths
import nodes
import numpy as np
import torch
from comfy.patcher_extension import WrappersMP
from comfyui_models import build, latent, prompt

PACKAGE = next(name for name in sys.modules if name.endswith("ComfyUI-MagCache"))
wrappers, models, package_nodes = (sys.modules[f"{PACKAGE}.{name}"] for name in ("wrappers", "models", "nodes"))
ratios, tables, schedules, blocks, hosts, errors = (
    sys.modules[f"{PACKAGE}.common.{name}"] for name in ("ratios", "tables", "schedule", "blocks", "hosts", "errors")
)
WORK = Path(folder_paths.get_output_directory())
# Reuses ##..#..#..#. of twelve steps, with both branches a little different.
SETTINGS = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}
STEPS = 12


def table(steps=28, name="tiny", **more):
    made = tables.RatioTable(
        name=name,
        origin="measured",
        sigmas=tuple(ratios.flow_sigmas(steps, 3.0)),
        mag_ratios={"cond": [1.0] + [0.98] * (steps - 1), "uncond": [1.0] + [0.97] * (steps - 1)},
        **more,
    )
    path = WORK / f"{name}.json"
    tables.write(path, made)
    return str(path)


class Said(list):
    def __call__(self, text):
        self.append(text)


def cached(patcher, **options):
    """(patched model, what it says, the runs that it makes)."""
    said = Said()
    magcache = wrappers.MagCache(said, **{"thresholds": SETTINGS, "mag_ratios": table(), **options})
    return magcache.on(patcher), said


def sample(
    patcher,
    family="flux",
    steps=STEPS,
    cfg=3.0,
    sampler="euler",
    scheduler="simple",
    seed=0,
    denoise=1.0,
    batch=1,
    positive=None,
    negative=None,
    samples=None,
):
    made = nodes.KSampler().sample(
        patcher,
        seed,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompt(0),
        negative or prompt(1),
        {"samples": latent(family, batch) if samples is None else samples},
        denoise,
    )
    return made[0]["samples"]


def transformer(patcher):
    return patcher.model.diffusion_model


class Watched:
    """Hooks on an unpatched transformer: what enters its first block and its final layer, and which calls ran
    blocks."""

    def __init__(self, patcher):
        model = transformer(patcher)
        self.host = hosts.host_of(model)
        first = next(blocks for blocks in (getattr(model, name) for name in self.host.blocks) if len(blocks))[0]
        self.before, self.ran, self.sigmas, self.branches = None, [], [], []
        self.hooks = [
            first.register_forward_pre_hook(self.enter, with_kwargs=True),
            getattr(model, self.host.final_layer).register_forward_pre_hook(self.leave),
        ]
        self.patcher = patcher.clone()
        self.patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "watch", self.call)

    def call(self, executor, *args, **kwargs):
        options = args[5]
        window = options.get("context_window")
        replaced = sorted(map(str, options.get("patches_replace", {}).get("dit", {})))
        circumstances = window and tuple(window.index_list), str(replaced)
        uuids = options["uuids"]
        self.sigma = float(options["sigmas"][0])
        self.keys = [(uuid, uuids[:index].count(uuid), *circumstances) for index, uuid in enumerate(uuids)]
        self.branches.append(list(options["cond_or_uncond"]))
        self.sigmas.append(self.sigma)
        self.ran.append(False)
        return executor(*args, **kwargs)

    def enter(self, module, args, kwargs):
        key = self.host.image_tokens
        self.ran[-1] = True
        self.before = (args[key] if isinstance(key, int) else kwargs[key]).clone()

    def leave(self, module, args):
        self.after = args[0]

    @property
    def strip(self):
        return "".join(".#"[ran] for ran in self.ran)

    def remove(self):
        for hook in self.hooks:
            hook.remove()


class Oracle(Watched):
    """What caching must give, made the expensive way: all blocks run at every step, and where `reuse` says so the final
    layer gets the tokens that entered the first block plus the residual of the last computed call with the same
    conditioning, window and replaced blocks. A call for which there is none computes."""

    def __init__(self, patcher, reuse, levels):
        super().__init__(patcher)
        self.reuse, self.levels, self.residuals = reuse, np.asarray(levels), {}

    def leave(self, module, args):
        after, *rest = args
        before = self.before[:, -after.shape[1] :]
        rows = after.shape[0] // len(self.keys)
        step = max(0, int((self.levels >= self.sigma * 0.9999).sum()) - 1)
        if self.reuse[step] and all(key in self.residuals for key in self.keys):
            return before + torch.cat([self.residuals[key] for key in self.keys]), *rest
        for index, key in enumerate(self.keys):
            self.residuals[key] = (after - before)[index * rows : (index + 1) * rows]


def levels_of(patcher, steps=STEPS, scheduler="simple", denoise=1.0):
    total = int(steps / denoise)
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, total)[
        -steps - 1 : -1
    ].tolist()


def expected_of(patcher, family="flux", **options):
    """The oracle's latent at the levels of a run, and the schedule."""
    run = {key: value for key, value in options.items() if key in ("steps", "scheduler", "denoise")}
    levels = levels_of(patcher, **run)
    schedule = plan(levels)
    oracle = Oracle(patcher, schedule.reuse, levels)
    made = sample(oracle.patcher, family, **options)
    oracle.remove()
    return made, schedule


def plan(levels, settings=SETTINGS):
    return schedules.magcache_schedule(tables.load(table()).at(levels), schedules.Settings(**settings))


def untouched(model, state):
    """Nothing of ours is left on a transformer."""
    assert type(model).__mro__ == state[0] and set(model.__dict__) == state[1]


def state_of(model):
    return type(model).__mro__, set(model.__dict__)


# Every family


def nothing_skipped_is_plain(family, cfg):
    patcher = build(family)
    plain = sample(patcher, family, cfg=cfg, steps=5)
    before = state_of(transformer(patcher))
    for off in ({"magcache_thresh": 0.0}, {"magcache_K": 0}, {"retention_ratio": 1.0}):
        patched, said = cached(patcher, thresholds={**SETTINGS, **off})
        assert torch.equal(sample(patched, family, cfg=cfg, steps=5), plain), off
        assert "nothing will be reused" in said[0], said
        untouched(transformer(patcher), before)


def reuse_is_what_it_should_be(family, cfg):
    """Bit for bit the oracle's latent; exactly the planned steps run their blocks; twice the same; nothing is left
    behind."""
    patcher = build(family)
    plain = sample(patcher, family, cfg=cfg)
    expected, schedule = expected_of(patcher, family, cfg=cfg)
    assert schedule.strip == "##..#..#..#.", schedule.strip
    assert not torch.allclose(expected, plain)

    before = state_of(transformer(patcher))
    patched, said = cached(patcher)
    watched = Watched(patched)
    for _ in range(2):
        watched.ran.clear()
        result = sample(watched.patcher, family, cfg=cfg)
        assert torch.equal(result, expected)
        per_step = len(watched.ran) // STEPS
        assert watched.strip[::per_step] == schedule.strip and per_step * STEPS == len(watched.ran)
    watched.remove()
    untouched(transformer(patcher), before)
    assert "MagCache plan: 12 steps" in said[0] and "7 reused" in said[1] and "s saved" in said[1], said


# Samplers, steps, branches


def sampler_skips_the_planned_steps(sampler):
    """No sampler fails; a call that runs no block belongs to a step that is to be reused; nothing skipped is plain."""
    patcher = build("flux")
    off, _ = cached(patcher, thresholds={**SETTINGS, "retention_ratio": 1.0})
    plain = sample(patcher, sampler=sampler)
    assert torch.equal(sample(off, sampler=sampler), plain)
    discards = sampler in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    levels = np.asarray(levels_of(patcher, STEPS + 1)[:-1] if discards else levels_of(patcher))
    reuse = plan(levels).reuse
    patched, said = cached(patcher)
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
            patched, said = cached(patcher)
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
    levels = levels_of(patcher, denoise=denoise)
    assert levels[0] < 0.95 and np.allclose(schedule.ratios, tables.load(table()).at(levels))
    patched, said = cached(patcher)
    assert torch.equal(sample(patched, denoise=denoise), expected)
    assert schedule.strip in said[0]


def two_stages():
    """KSampler (Advanced): each stage is planned over its own noise levels and begins with a computed step."""
    patcher = build("wan")
    patched, said = cached(patcher)
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
    levels = levels_of(patcher)
    assert first == plan(levels[:6]).strip and watched.strip == plan(levels[6:]).strip
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
    alone = {name: sample(cached(patcher)[0], **run) for name, run in runs.items()}
    patched, said = cached(patcher)
    before = state_of(transformer(patcher))
    for name, run in runs.items():
        assert torch.equal(sample(patched, **run), alone[name]), name
        assert torch.equal(sample(patched), alone["base"]), f"base after {name}"
    for stop in range(STEPS):
        calls = iter(range(10**6))

        def interrupt(module, args, calls=calls, stop=stop):
            if next(calls) == stop:
                raise comfy.model_management.InterruptProcessingException

        # Of the final layer: forward is under way, with stand-ins in place, when the interruption comes.
        hook = transformer(patcher).final_layer.register_forward_pre_hook(interrupt)
        try:
            sample(patched)
            raise AssertionError("was to be interrupted")
        except comfy.model_management.InterruptProcessingException:
            pass
        finally:
            hook.remove()
        untouched(transformer(patcher), before)
        assert torch.equal(sample(patched), alone["base"])


def nothing_is_kept_after_a_run():
    made = []

    class Spied(wrappers.MagCache):
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
    patched = Spied(Said(), thresholds=SETTINGS, mag_ratios=table()).on(patcher)
    sample(patched)
    assert made[0].report.peak_bytes > 0 and not made[0].residuals
    assert "magcache" not in patched.model_options["transformer_options"]


def regions_and_schedules(family):
    """Several conditionings a branch, by area and by part of the run: each has a residual of its own."""
    patcher = build(family)
    height = latent(family).shape[-2]
    positive = (
        prompt(0, area=(height // 2, height, 0, 0))
        + prompt(3, area=(height // 2, height, height // 2, 0))
        + prompt(4, start_percent=0.0, end_percent=0.5)
        + prompt(5, start_percent=0.5, end_percent=1.0)
    )
    expected, schedule = expected_of(patcher, family, positive=positive)
    patched, said = cached(patcher)
    assert torch.equal(sample(patched, family, positive=positive), expected), said


def context_windows():
    patcher = build("wan")
    window = nodes_of("nodes_context_windows").ContextWindowsManualNode.execute
    frames = torch.zeros(1, 16, 9, 8, 8)
    windowed = window(patcher, 4, 1, "standard_static", 1, False, "pyramid", 2, False).args[0]
    expected, schedule = expected_of(windowed, "wan", samples=frames)
    plain = sample(windowed, "wan", samples=frames)
    patched, said = cached(windowed)
    assert torch.equal(sample(patched, "wan", samples=frames), expected) and not torch.equal(expected, plain)


def nodes_of(module):
    import importlib

    return importlib.import_module(f"comfy_extras.{module}")


def skip_layer_guidance():
    """Skip-layer guidance calls the model with the same conditioning again, but without some blocks: another
    residual."""
    patcher = build("wan")
    guided = nodes_of("nodes_slg").SkipLayerGuidanceDiT.execute(patcher, 2.0, 0.0, 1.0, "1,2", "").args[0]
    plain = sample(patcher, "wan")
    assert not torch.allclose(sample(guided, "wan"), plain)
    expected, _ = expected_of(guided, "wan")
    patched, said = cached(guided)
    assert torch.equal(sample(patched, "wan"), expected)


def references():
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
        patched, said = cached(patcher)
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
    patched, said = cached(patcher)
    assert torch.equal(sample(patched, family), expected)


def replaced_first_block():
    """A patch that calls the first block itself is cached like any other; one that never calls it is left alone."""

    def calls_it(args, extra):
        out = extra["original_block"]({**args, "img": args["img"] * 1.1})
        return {**out, "img": out["img"] + 0.1}

    def skips_it(args, extra):
        return {"img": args["img"], "txt": args["txt"]}

    patcher = build("flux").clone()
    patcher.set_model_patch_replace(calls_it, "dit", "double_block", 0)
    off, _ = cached(patcher, thresholds={**SETTINGS, "retention_ratio": 1.0})
    plain = sample(patcher)
    assert torch.equal(sample(off), plain)
    assert "7 reused" in speech_of(patcher) and not torch.equal(sample(cached(patcher)[0]), plain)

    patcher = build("flux").clone()
    patcher.set_model_patch_replace(skips_it, "dit", "double_block", 0)
    said = speech_of(patcher)
    assert torch.equal(sample(cached(patcher)[0]), sample(patcher))
    assert "reused nothing" in said and "another patch skipped or replaced the first block" in said, said


def speech_of(patcher, **options):
    patched, said = cached(patcher)
    sample(patched, **options)
    return "\n".join(said)


def beside_other_wrappers():
    """EasyCache and MagCache on one model, in both orders: neither breaks, and where EasyCache rests all is as without
    it."""
    easy = nodes_of("nodes_easycache").EasyCacheNode.execute
    patcher = build("flux")
    before = state_of(transformer(patcher))
    alone = sample(cached(patcher)[0])
    for threshold in (0.0, 3.0):
        for magcache_first in (True, False):
            if magcache_first:
                both = easy(cached(patcher)[0], threshold, 0.15, 0.95, False).args[0]
            else:
                both = cached(easy(patcher, threshold, 0.15, 0.95, False).args[0])[0]
            result = sample(both)
            assert torch.isfinite(result).all()
            assert torch.equal(result, alone) == (threshold == 0)
            untouched(transformer(patcher), before)


def the_last_magcache_node_holds():
    """Two MagCache nodes in a chain, and a calibration behind one: the last takes the place of the others."""
    patcher = build("flux")
    off, _ = cached(patcher, thresholds={**SETTINGS, "magcache_thresh": 0.0})
    twice, said = cached(off)
    assert torch.equal(sample(twice), sample(cached(patcher)[0]))
    calibration = wrappers.Calibration(Said())
    assert torch.equal(sample(calibration.on(twice)), sample(patcher)) and calibration.failure is None


# Settings and mistakes


def window_of_steps():
    patcher = build("flux")
    for first, last, strip in (
        (0, -1, "##..#..#..#."),
        (0, -2, "##..#..#..##"),
        (5, -1, "#####..#..#."),
        (0, 6, "##..#..#####"),
        (-4, -1, "########..#."),
    ):
        patched, said = cached(patcher, start_step=first, end_step=last)
        watched = Watched(patched)
        sample(watched.patcher)
        watched.remove()
        assert watched.strip == strip and strip in said[0], (first, last, watched.strip)


def cache_on_the_cpu():
    patcher = build("flux")
    assert torch.equal(sample(cached(patcher, device=torch.device("cpu"))[0]), sample(cached(patcher)[0]))


def unknown_models_render_uncached():
    """Another class, another make of a known class, a wrong model type, no ratios: a sentence, and the plain
    picture."""
    patcher = build("flux", seed=1)  # one that no other check calibrates
    plain = sample(patcher)
    model = transformer(patcher)
    known = type(model)

    def uncached(sentence, **options):
        patched, said = cached(patcher, **options)
        assert torch.equal(sample(patched), plain)
        assert len(said) == 1 and said[0].startswith("MagCache is off in this run") and sentence in said[0], said

    model.__class__ = type("Fluxus", (known,), {})
    uncached("does not know the model class Fluxus")
    model.__class__ = known
    name = hosts.class_name(model)
    hosts.HOSTS[name] = blocks.Host(blocks=("double_blocks", "triple_blocks"), final_layer="final_layer")
    try:
        uncached("Flux is not built as MagCache knows it")
    finally:
        hosts.HOSTS[name] = hosts.COMFY_FLUX
    uncached("model_type wan2.1_t2v_14B is for a WanModel", model_type="wan2.1_t2v_14B")
    uncached("no magnitude ratios are known for this Flux", mag_ratios="")


def mistakes_are_refused_by_the_node():
    node = nodes.NODE_CLASS_MAPPINGS["MagCache"]
    defaults = {
        "model": build("flux"),
        "model_type": "auto",
        "magcache_thresh": -1,
        "retention_ratio": -1,
        "magcache_K": -1,
    }
    for mistake, sentence in (
        ({"mag_ratios": "no-such"}, "There is no preset 'no-such'"),
        ({"mag_ratios": "/no/such.json"}, "there is no calibration file"),
        ({"retention_ratio": 2.0}, "retention_ratio is a share"),
        ({"speedup": 0.5}, "magcache_speedup must be a number of 1 or more"),
        ({"speedup": 2.0, "end_step": -2}, "start_step and end_step go with the thresholds"),
    ):
        try:
            node.execute(**{**defaults, **mistake})
        except errors.MagCacheError as error:
            assert sentence in str(error), error
        else:
            raise AssertionError(f"{mistake} was taken")


def recommended_settings():
    """With the node's defaults each model type plans with what was published for it."""
    table_of_the_release = {
        "flux": (0.24, 0.1, 5),
        "chroma": (0.10, 0.25, 2),
        "hunyuan_video": (0.24, 0.2, 6),
        "wan2.1_t2v_1.3B": (0.12, 0.2, 4),
        "wan2.1_t2v_14B": (0.24, 0.2, 6),
        "wan2.1_i2v_480p_14B": (0.24, 0.2, 6),
        "wan2.1_i2v_720p_14B": (0.24, 0.2, 6),
        "flux_kontext": (0.05, 0.2, 4),
        "qwen_image": (0.10, 0.2, 2),
        "hunyuan_video1.5": (0.03, 0.25, 2),
        "wan2.1_vace_1.3B": (0.02, 0.2, 3),
        "wan2.1_vace_14B": (0.02, 0.2, 3),
        "wan2.2_t2v_14B": (0.06, 0.4, 2),
        "wan2.2_i2v_14B": (0.06, 0.1, 2),
        "wan2.2_ti2v_5B_t2v": (0.06, 0.2, 2),
    }
    family = {
        "Flux": "flux",
        "Chroma": "chroma",
        "HunyuanVideo": "hunyuan",
        "WanModel": "wan",
        "VaceWanModel": "vace",
        "QwenImageTransformer2DModel": "qwen",
    }
    for model_type, (thresh, retention, K) in table_of_the_release.items():
        name = family[models.MODEL_TYPES[model_type][0]]
        patched, said = cached(build(name), model_type=model_type, thresholds={}, mag_ratios="")
        sample(patched, name, steps=20)
        settings = f"magcache_thresh {thresh:g}, magcache_K {K}, retention_ratio {retention:g}"
        assert settings in said[0] and " reused; transformer" in said[1], (model_type, said)


def wan22_in_two_samplers():
    """T2V: each expert keeps its share of the start, as in the release. I2V: the high-noise expert is not cached."""
    patcher = build("wan")
    for model_type, high_is_cached in (("wan2.2_t2v_14B", True), ("wan2.2_i2v_14B", False)):
        patched, said = cached(patcher, model_type=model_type, thresholds={}, mag_ratios="")
        sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 40)
        halves = sigmas[:27], sigmas[26:]
        strips = []
        for part in halves:
            watched = Watched(patched)
            comfy.samplers.sample(
                watched.patcher,
                torch.randn(1, 16, 2, 8, 8),
                prompt(0),
                prompt(1),
                1.0,
                torch.device("cpu"),
                comfy.samplers.sampler_object("euler"),
                part,
                latent_image=latent("wan"),
            )
            strips.append(watched.strip)
            watched.remove()
        table_ = tables.load(models.MODEL_TYPES[model_type][1][0])
        assert ("." in strips[0]) == high_is_cached and "." in strips[1], (model_type, strips)
        share = table_.settings["retention_ratio"]
        assert strips[0].index(".") >= 26 * share - 1 if high_is_cached else "high-noise expert" in said[0]
        assert strips[1].index(".") >= 14 * share - 1


# Calibration


def calibrated(patcher, family="flux", **options):
    said = Said()
    calibration = wrappers.Calibration(said)
    return calibration, sample(calibration.on(patcher), family, **options), said


class Ratios(Watched):
    """Measured by hooks, for each branch and step: the mean over tokens of |r_t| / |r_{t-1}|, and the model's output
    squared."""

    def __init__(self, patcher, tokens):
        super().__init__(patcher)
        self.tokens, self.previous, self.ratios, self.energies = tokens, {}, {0: [1.0], 1: [1.0]}, {0: [], 1: []}
        self.hooks.append(transformer(patcher).register_forward_hook(self.output))

    def output(self, module, args, output):
        for branch, part in zip(self.branches[-1], output.chunk(len(self.branches[-1]))):
            self.energies[branch].append(float(part.double().square().sum()))

    def leave(self, module, args):
        after = args[0]
        residual = (after - self.before[:, -after.shape[1] :])[:, : self.tokens].double()
        for branch, part in zip(self.branches[-1], residual.chunk(len(self.branches[-1]))):
            if branch in self.previous:
                self.ratios[branch].append(float((part.norm(dim=-1) / self.previous[branch].norm(dim=-1)).mean()))
            self.previous[branch] = part


def calibration_measures(family, cfg, free):
    """The picture is the plain one and the file holds what hooks measure, batched or split; MagCache then takes the
    file."""
    patcher = build(family, seed=11)
    reference = torch.randn(latent(family).shape, generator=torch.Generator().manual_seed(1))
    positive = prompt(0, reference_latents=[reference]) if family == "flux" else prompt(0)  # not to be counted
    roomy = type(patcher).get_free_memory
    type(patcher).get_free_memory = lambda self, device: free
    try:
        measured = Ratios(patcher, tokens=16 if family == "flux" else None)
        plain = sample(measured.patcher, family, cfg=cfg, positive=positive)
        measured.remove()
        calibration, result, said = calibrated(patcher, family, cfg=cfg, positive=positive)
    finally:
        type(patcher).get_free_memory = roomy
    assert torch.equal(result, plain) and calibration.failure is None, said
    file = tables.read(calibration.path)
    assert list(file.mag_ratios) == (["cond", "uncond"] if cfg > 1 else ["cond"])
    for branch, values in zip(file.mag_ratios, measured.ratios.values()):
        assert np.allclose(file.mag_ratios[branch], values, rtol=2e-4, atol=2e-6), (file.mag_ratios[branch], values)
    for rows, energies in zip(file.statistics["gram_of_outputs"].values(), measured.energies.values()):
        assert np.allclose([row[0] for row in rows], energies, rtol=1e-3)
    assert (
        np.allclose(file.sigmas, levels_of(patcher), atol=1e-6)
        and file.origin == "measured"
        and "gram" in file.statistics
    )
    assert "written; MagCache nodes take it" in said[-1]
    patched, heard = cached(patcher, mag_ratios="")
    sample(patched, family, cfg=cfg)
    assert f"ratios of {calibration.path.stem} (measured)" in heard[0], heard
    calibration.path.unlink()


def calibration_with_a_sampler(sampler):
    patcher = build("flux", seed=12)
    calibration, result, said = calibrated(patcher, sampler=sampler)
    assert torch.equal(result, sample(patcher, sampler=sampler)) and calibration.table.steps == STEPS, said
    calibration.path.unlink()


def interrupted_calibration_writes_nothing():
    patcher = build("flux", seed=13)
    calls = iter(range(10**6))

    def interrupt(module, args):
        if next(calls) == STEPS - 1:
            raise comfy.model_management.InterruptProcessingException

    before = set(tables.calibrations_folder().glob("*"))
    said = Said()
    calibration = wrappers.Calibration(said)
    hook = transformer(patcher).final_layer.register_forward_pre_hook(interrupt)
    try:
        sample(calibration.on(patcher))
        raise AssertionError("was to be interrupted")
    except comfy.model_management.InterruptProcessingException:
        hook.remove()
    assert set(tables.calibrations_folder().glob("*")) == before and calibration.failure == "the run broke off", said
    for mistake, sentence in (
        ({"steps": 1}, "at least 2"),
        (
            {
                "positive": prompt(0, start_percent=0.0, end_percent=0.5)
                + prompt(1, start_percent=0.5, end_percent=1.0),
                "cfg": 1.0,
            },
            "runs of one kind",
        ),
    ):
        calibration, _, said = calibrated(patcher, **mistake)
        assert sentence in calibration.failure and sentence in said[-1], said
        try:
            package_nodes.MagCacheCalibrationResultNode.execute(calibration, None)
            raise AssertionError("there was nothing to show")
        except RuntimeError as error:
            assert sentence in str(error)
    assert set(tables.calibrations_folder().glob("*")) == before


def planned_speedup():
    """A calibration plans for a speed-up with predicted residuals and comes closer to the plain picture than the
    paper's rule with more computed steps; with ratios alone the plan is the weaker one."""
    patcher = build("wan", seed=14)
    patched, said = cached(patcher, speedup=2.0, thresholds={})
    sample(patched, "wan")
    assert "computes 6 of 12" in said[0] and "6 reused" in said[1], said
    calibration, plain, _ = calibrated(patcher, "wan")
    seconds = calibration.table.statistics["seconds"]
    assert 0 < seconds["reused"] < seconds["computed"], seconds
    file = json.loads(calibration.path.read_text())
    file["statistics"]["seconds"] = {
        "computed": 1.0,
        "reused": 0.0,
    }  # so that the plan does not hang on this machine's load
    calibration.path.write_text(json.dumps(file))
    errors = {}
    for name, computed, options in (
        ("planned", 6, {"speedup": 2.0, "thresholds": {}}),
        ("rule", 7, {"thresholds": {**SETTINGS, "magcache_K": 1}}),
    ):
        patched, said = cached(patcher, mag_ratios="", **options)
        errors[name] = float((sample(patched, "wan") - plain).norm())
        assert f"computes {computed} of 12" in said[0] and "--" not in said[0], said
        assert f"MagCache: {computed} of 12 model calls computed" in said[1], said
    assert errors["planned"] < errors["rule"], errors
    calibration.path.unlink()


def loras_have_calibrations_of_their_own():
    """In whatever order the nodes stand, and whether the weights were patched in place by an earlier run or not."""
    patcher = build("flux", seed=15)
    calibration, _, _ = calibrated(patcher)
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    weight = transformer(patcher).double_blocks[0].img_mlp[0].weight
    difference = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def with_lora(model):
        model = model.clone()
        assert model.add_patches({key: ("diff", (difference,))}, 0.8)
        return model

    def lora_first():
        return cached(with_lora(patcher), mag_ratios="")

    def lora_last():
        patched, said = cached(patcher, mag_ratios="")
        return with_lora(patched), said

    patched, said = lora_first()
    sample(patched)
    assert "was measured without the LoRAs of this model" in said[0] and calibration.path.stem in said[1], said
    own, _, _ = calibrated(with_lora(patcher))
    assert own.path != calibration.path
    for order, path in (
        (lora_first, own.path),
        (lora_last, own.path),
        (lambda: cached(patcher, mag_ratios=""), calibration.path),
        (lora_last, own.path),
        (lora_first, own.path),
    ):
        patched, said = order()
        sample(patched)
        assert path.stem in said[0], said
    own.path.unlink()
    calibration.path.unlink()


def weights_that_cannot_be_read():
    """A loader's own kind of tensor: published ratios are used all the same, and a calibration says why it writes
    nothing."""

    class Packed(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.flatten:
                raise NotImplementedError("flatten of packed weights")
            with torch._C.DisableTorchFunctionSubclass():
                made = function(*args, **(kwargs or {}))
            return made.as_subclass(Packed) if function is torch.Tensor.detach else made

    other, _, _ = calibrated(build("wan", seed=16), "wan", steps=2)
    patcher = build("flux", seed=16)
    layer = transformer(patcher).img_in
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)
    patched, said = cached(patcher, mag_ratios="", model_type="flux", thresholds={})
    sample(patched)
    assert "looks for no calibration: the weights of this model cannot be read" in said[0] and "8 reused" in said[2], (
        said
    )
    calibration, _, said = calibrated(patcher)
    assert "cannot be read" in calibration.failure and calibration.path is None, said
    other.path.unlink()


# Compilation


class Backend:
    """Counts graphs, and attention layers run."""

    def __init__(self):
        self.graphs = self.attentions = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        attentions = sum("scaled_dot_product_attention" in str(node.target) for node in graph.graph.nodes)

        def run(*args):
            self.attentions += attentions
            return graph.forward(*args)

        return run


def compiled(family, order, fullgraph):
    """Compile Model before or after MagCache: the steps that are skipped are those of MagCache alone, the picture is
    the same, and a second run makes no new graph."""
    torch._dynamo.reset()
    patcher, backend = build(family), Backend()
    compile_node = nodes.NODE_CLASS_MAPPINGS["CompileModel"].execute

    def compile_model(model):
        return compile_node(model, "default", backend, fullgraph, False).args[0]

    plain = compile_model(patcher)
    uncompiled, _ = cached(patcher)
    expected = sample(uncompiled, family, cfg=1.0)
    assert torch.allclose(sample(plain, family, cfg=1.0), sample(patcher, family, cfg=1.0), atol=1e-4)
    a_step = backend.attentions // STEPS
    assert a_step * STEPS == backend.attentions > 0
    if order == "compile first":
        both, said = cached(plain)
    else:
        both, said = cached(patcher)
        both = compile_model(both)
    for run in range(3):
        graphs, backend.attentions = backend.graphs, 0
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            result = sample(both, family, cfg=1.0)
        assert torch.allclose(result, expected, atol=1e-4), float((result - expected).abs().max())
        assert backend.attentions == a_step * 5, (backend.attentions, a_step, said)
        assert "5 of 12 model calls computed, 7 reused" in said[-1]
        if run:
            assert backend.graphs == graphs, "another graph was made"
    torch._dynamo.reset()


def compile_options(mode):
    """Each of the node's modes is one that torch.compile takes."""
    torch._dynamo.reset()
    model = nodes.NODE_CLASS_MAPPINGS["CompileModel"].execute(build("flux"), mode, "inductor", False, False).args[0]
    made = model.get_wrappers("apply_model", "torch.compile")
    options = model.model_options["torch_compile_kwargs"]["options"]
    assert len(made) == 1 and (len(options.keys() - {"guard_filter_fn"}) > 0) == (mode != "default"), options


# Recognition


def recognised():
    """ComfyUI's classes at their real sizes, without memory: what auto takes them for."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model
    import comfy.ldm.hunyuan_video.model
    import comfy.ldm.qwen_image.model
    import comfy.ldm.wan.model
    import comfy.ops
    from comfyui_models import FLUX, HUNYUAN, WAN

    def real(module, name, config):
        with torch.device("meta"):
            return getattr(sys.modules[f"comfy.ldm.{module}.model"], name)(
                **config, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
            )

    dev = {
        **FLUX,
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 19,
        "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56],
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "mlp_ratio": 4.0,
    }
    flux = real("flux", "Flux", dev)
    assert models.recognise(flux) == "flux" and models.recognise(flux, references=True) == "flux_kontext"
    assert models.recognise(real("flux", "Flux", {**dev, "guidance_embed": False})) == "flux_schnell"
    assert models.recognise(real("flux", "Flux", {**dev, "in_channels": 96})) is None  # FLUX Fill
    chroma = {
        **{key: value for key, value in dev.items() if key != "guidance_embed"},
        "image_model": "chroma",
        "in_channels": 64,
        "out_channels": 64,
        "in_dim": 64,
        "out_dim": 3072,
        "hidden_dim": 5120,
        "n_layers": 5,
    }
    assert models.recognise(real("chroma", "Chroma", chroma)) == "chroma"
    hunyuan = {
        **HUNYUAN,
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 20,
        "depth_single_blocks": 40,
        "axes_dim": [16, 56, 56],
        "vec_in_dim": 768,
        "context_in_dim": 4096,
        "mlp_ratio": 4.0,
    }
    assert models.recognise(real("hunyuan_video", "HunyuanVideo", hunyuan)) == "hunyuan_video"
    later = {
        **hunyuan,
        "hidden_size": 2048,
        "num_heads": 16,
        "depth": 54,
        "depth_single_blocks": 0,
        "in_channels": 65,
        "out_channels": 32,
        "patch_size": [1, 1, 1],
        "vec_in_dim": None,
        "vision_in_dim": 1152,
        "context_in_dim": 3584,
        "guidance_embed": False,
        "byt5": True,
        "use_cond_type_embedding": True,
    }
    assert models.recognise(real("hunyuan_video", "HunyuanVideo", later)) == "hunyuan_video1.5"

    def wan(**sizes):
        return real(
            "wan",
            "VaceWanModel" if "vace_layers" in sizes else "WanModel",
            {**WAN, "text_dim": 4096, "freq_dim": 256, "num_layers": 2, **sizes},
        )

    small, large = {"dim": 1536, "num_heads": 12}, {"dim": 5120, "num_heads": 40}
    assert models.recognise(wan(**small)) == "wan2.1_t2v_1.3B"
    assert models.recognise(wan(**large), "/models/wan2.1_t2v_14B_fp16.safetensors") == "wan2.1_t2v_14B"
    assert models.recognise(wan(**large), "/models/wan2.2_t2v_high_noise_14B_fp16.safetensors") == "wan2.2_t2v_14B"
    to_video = wan(**large, in_dim=36, model_type="i2v")
    assert models.recognise(to_video, latent=(60, 104)) == "wan2.1_i2v_480p_14B"
    assert models.recognise(to_video, latent=(90, 160)) == "wan2.1_i2v_720p_14B"
    assert models.recognise(wan(**large, in_dim=36)) == "wan2.2_i2v_14B"
    five = wan(dim=3072, num_heads=24, in_dim=48)
    assert (
        models.recognise(five) == "wan2.2_ti2v_5B_t2v"
        and models.recognise(five, start_image=True) == "wan2.2_ti2v_5B_i2v"
    )
    for sizes, name in ((small, "wan2.1_vace_1.3B"), (large, "wan2.1_vace_14B")):
        assert models.recognise(wan(**sizes, model_type="vace", vace_layers=2, vace_in_dim=96)) == name
    for family in ("flux", "flux2", "chroma", "wan", "vace", "hunyuan", "hunyuan1.5", "qwen"):
        assert models.recognise(transformer(build(family))) is None, family
    from comfyui_models import FAMILIES

    qwen = {**FAMILIES["qwen"][2], "num_layers": 60}
    picture = real("qwen_image", "QwenImageTransformer2DModel", qwen)
    assert models.recognise(picture) == "qwen_image" and models.recognise(picture, references=True) == "qwen_image_edit"


# The package


def as_prompt(workflow):
    """A workflow as the page saves it, in the format of the API: values of widgets in the order of the inputs, links by
    name."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        types = nodes.NODE_CLASS_MAPPINGS[node["type"]].INPUT_TYPES()
        values, inputs = list(node["widgets_values"]), {}
        for name, (kind, *options) in {**types.get("required", {}), **types.get("optional", {})}.items():
            if not (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")):
                continue
            inputs[name] = values.pop(0)
            about = options[0] if options else {}
            if about.get("control_after_generate"):
                assert values.pop(0) == "fixed"
            if about.get("image_upload"):
                assert values.pop(0) == "image"
        assert not values, (node["type"], values)
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def example_is_valid(name):
    """The host's own validation takes the workflow, with every file that it names in its place, and MagCache stands in
    it with the recommended settings of its model type."""
    import asyncio

    import execution

    if "SaveWEBM" not in nodes.NODE_CLASS_MAPPINGS:
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
    workflow = json.loads((Path(PACKAGE.replace("_x_", ".")) / "examples" / name).read_text())
    (note,) = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    for line in note.splitlines():
        if line.startswith("* `"):
            path = WORK / "models" / line[3:-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            folder_paths.add_model_folder_path(path.parent.name, str(path.parent))
    folder_paths.filename_list_cache.clear()
    prompt = as_prompt(workflow)
    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("examples", prompt, None))
    assert valid and not errors and outputs, (error, errors)
    ours = [node for node in prompt.values() if node["class_type"].startswith("MagCache")]
    if "calibration" in name:
        assert [node["class_type"] for node in ours] == ["MagCacheCalibration", "MagCacheCalibrationResult"]
        return
    (node,) = ours
    steps = next(node["inputs"]["steps"] for node in prompt.values() if node["class_type"] == "KSampler")
    recommended = wrappers.published_table(node["inputs"]["model_type"], steps).settings
    assert {name: node["inputs"][name] for name in recommended} == recommended


def the_released_package_is_not_replaced():
    """Whichever of the two loads first, the console says so; nodes of the released package that are there stay."""
    import asyncio
    import logging

    ours = dict(nodes.NODE_CLASS_MAPPINGS)
    folder = WORK.parent / "custom_nodes"
    theirs = folder / "comfyui-magcache"
    theirs.mkdir()
    (theirs / "pyproject.toml").write_text('[project]\nname = "magcache"\n')
    (theirs / "__init__.py").write_text(
        "class Theirs:\n    @classmethod\n    def INPUT_TYPES(cls):\n        return {}\n\n\n"
        "NODE_CLASS_MAPPINGS = {'MagCache': Theirs}\n"
    )
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    folder_paths.add_model_folder_path("custom_nodes", str(folder))
    try:
        asyncio.run(nodes.load_custom_node(PACKAGE.replace("_x_", ".")))
        assert any("comfyui-magcache is a MagCache package with nodes of the same names" in line for line in heard), (
            heard
        )
        heard.clear()
        asyncio.run(nodes.load_custom_node(str(theirs)))
        asyncio.run(nodes.load_custom_node(PACKAGE.replace("_x_", ".")))
        assert nodes.NODE_CLASS_MAPPINGS["MagCache"].__name__ == "Theirs"
        assert nodes.NODE_CLASS_MAPPINGS["CompileModel"].__name__ == "CompileModelNode"
        assert any("custom_nodes.comfyui-magcache already provides the nodes MagCache" in line for line in heard), heard
    finally:
        logging.getLogger().removeHandler(listener)
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(ours)


def without_common_it_says_what_to_do():
    """A copy of the folder alone; and one with another package's module `common` around."""
    import asyncio
    import logging
    import shutil

    copied = WORK.parent / "copied" / "ComfyUI-MagCache"
    shutil.copytree(PACKAGE.replace("_x_", "."), copied, ignore=shutil.ignore_patterns("common", "__pycache__"))
    heard = []
    listener = logging.Handler()
    listener.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger().addHandler(listener)
    ours = dict(nodes.NODE_CLASS_MAPPINGS)
    try:
        assert not asyncio.run(nodes.load_custom_node(str(copied)))
        assert any("lacks its folder common" in line and "python -m common install" in line for line in heard), heard
        shutil.copytree(Path(sys.modules[f"{PACKAGE}.common"].__path__[0]), copied / "common")
        sys.modules["common"] = other = object()
        assert asyncio.run(nodes.load_custom_node(str(copied)))
        assert sys.modules.pop("common") is other
        loaded = sys.modules[f"{copied}.common".replace(".common", "").replace(".", "_x_") + ".common.ratios"]
        assert Path(loaded.__file__).parent == copied / "common" and loaded is not ratios
    finally:
        logging.getLogger().removeHandler(listener)
        nodes.NODE_CLASS_MAPPINGS.clear()
        nodes.NODE_CLASS_MAPPINGS.update(ours)
