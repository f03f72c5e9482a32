"""Faults that users met, each so that it failed before. Run by comfyui_worker.py."""

import comfy.controlnet
import comfy.samplers
import comfy.sd
import folder_paths
import nodes
import torch
from comfyui_helpers import (
    SETTINGS,
    STEPS,
    WORK,
    Said,
    Watched,
    cached_patcher,
    caching,
    calibrated_patcher,
    expected_of,
    fingerprints,
    lora_of,
    models,
    nodes_of,
    plan_of_levels,
    sample,
    sampler_levels,
    tables,
    tiny_table,
    transformer_of,
)
from comfyui_models import build, latent, prompt
from safetensors.torch import save_file


class Shape:
    """Stands for a transformer of which its sizes alone are asked."""

    def __init__(self, **sizes):
        self.__dict__.update(sizes)


def sized(name, **sizes):
    return type(name, (Shape,), {})(**sizes)


WAN_14B = {"dim": 5120, "in_dim": 16, "model_type": "t2v"}


def wan22_is_told_from_wan21():
    """By every spelling of the name, by a sampler that does a part of the steps; and the rest is said."""
    wan = sized("WanModel", **WAN_14B)
    for name in (
        "wan2.2_t2v_high_noise_14B_fp16.safetensors",
        "wan_2.2_t2v.safetensors",
        "Wan-2.2-T2V.safetensors",
        "Wan2_2-T2V-A14B_HIGH_fp8.safetensors",
        "T2V-A14B-high_noise.safetensors",
        "lowNoise/model.safetensors",
        "/models/Wan 2.2/model.safetensors",
        "C:\\models\\WAN22\\model.gguf",
    ):
        assert models.recognise(wan, models.Signs(name)) == ("wan2.2_t2v_14B", ""), name
    for name in ("wan2.1_t2v_14B_fp16.safetensors", "Wan2_1-T2V-14B.safetensors", "/wan2.2/wan_2.1_t2v.safetensors"):
        assert models.recognise(wan, models.Signs(name)) == ("wan2.1_t2v_14B", ""), name
    model_type, said = models.recognise(wan, models.Signs("model-q8_0.gguf", midway=True))
    assert model_type == "wan2.2_t2v_14B" and "choose wan2.1_t2v_14B" in said
    model_type, said = models.recognise(wan, models.Signs(""))
    assert model_type == "wan2.1_t2v_14B" and "choose wan2.2_t2v_14B" in said


def a_part_of_the_steps_is_noticed():
    """Both of two samplers that share the steps know that another one is beside them; image to image is none."""
    seen = []

    class Spied(caching.NodeCache):
        def begin(self, about):
            seen.append(about.signs.midway)
            return super().begin(about)

    patched = Spied(Said(), thresholds=SETTINGS, mag_ratios=tiny_table()).on(build("wan"))
    noisy = {"samples": latent("wan")}
    common = (0, STEPS, 1.0, "euler", "simple", prompt(0), prompt(1))
    halfway = nodes.KSamplerAdvanced().sample(patched, "enable", *common, noisy, 0, 6, "enable")[0]
    nodes.KSamplerAdvanced().sample(patched, "disable", *common, halfway, 6, 10000, "disable")
    sample(patched, "wan")
    sample(patched, "wan", denoise=0.5)
    assert seen == [True, True, False, False]


def no_table_is_borrowed():
    """What shares a class and sizes with a model that has a table, and is another model."""
    hunyuan = {"hidden_size": 2048, "vision_in_dim": 1152, "depth": 54, "depth_single_blocks": 0}
    for in_channels, signs, expected in (
        (65, models.Signs(), "hunyuan_video1.5"),
        (65, models.Signs(start_image=True), None),  # image to video
        (98, models.Signs(), None),  # super-resolution
    ):
        model = sized("HunyuanVideo", params=Shape(in_channels=in_channels, **hunyuan))
        assert models.recognise(model, signs) == (expected, ""), (in_channels, signs)
    vace = sized("VaceWanModel", dim=5120)
    assert models.recognise(vace)[0] == "wan2.1_vace_14B"
    assert models.recognise(vace, models.Signs("Wan2.2-VACE-Fun-A14B_high.safetensors"))[0] is None
    assert models.recognise(vace, models.Signs(midway=True))[0] is None


def a_partial_run_replaces_no_calibration():
    """One Calibration node feeds two samplers, the second of which does the last 0.4: the full one is kept and used."""
    patcher = build("flux", seed=31)
    full, _, _ = calibrated_patcher(patcher)
    part, _, said = calibrated_patcher(patcher, denoise=0.4)
    assert part.path != full.path and full.path.exists() and str(part.path) in said[-1], said
    patched, said = cached_patcher(patcher, mag_ratios="")
    sample(patched)
    assert f"ratios of {full.path.stem} (measured)" in said[0] and "converted" not in said[0], said
    for calibration in (full, part):
        calibration.path.unlink()


def moving_windows_hoard_nothing():
    """Windows that move from step to step leave residuals that no later step takes."""
    patcher = build("wan")
    window = nodes_of("nodes_context_windows").ContextWindowsManualNode.execute
    windowed = window(patcher, 4, 2, "standard_uniform", 2, False, "pyramid", 2, False).args[0]
    frames, most = torch.zeros(1, 16, 21, 8, 8), []

    class Spied(caching.NodeCache):
        def begin(self, about):
            made = super().begin(about)
            computed = made.run.computed

            def counted(*args):
                computed(*args)
                most.append(len(made.run.residuals.kept))

            made.run.computed = counted
            return made

    watched = Watched(windowed)
    sample(watched.patcher, "wan", samples=frames)
    watched.remove()
    a_step = max(watched.sigmas.count(sigma) for sigma in watched.sigmas) * 2  # both branches
    patched = Spied(Said(), thresholds=SETTINGS, mag_ratios=tiny_table(), corrector=False).on(windowed)
    sample(patched, "wan", samples=frames)
    assert max(most) <= 2 * a_step, (max(most), a_step)


def what_exceeds_the_limit_computes():
    """Not more than cache_limit is kept; what does not fit computes, and the node says why. One branch may fit."""
    patcher = build("flux")
    plain, whole = sample(patcher), sample(cached_patcher(patcher)[0])
    patched, said = cached_patcher(patcher, limit=1e-6)
    assert torch.equal(sample(patched), plain)
    assert "reused nothing" in said[-1] and "more than cache_limit, 1e-06 GiB, would be kept" in said[-1], said
    patched, said = cached_patcher(patcher, limit=1e-3)
    assert torch.equal(sample(patched), whole) and "unplanned" not in said[-1], said


def fewer_tokens_compute():
    """Flux KV Cache drops the tokens of reference pictures after the first step: a residual of more tokens is not used
    for fewer. Nor is it where a patch drops them that acts by the noise level."""
    reference = torch.randn(latent("flux2").shape, generator=torch.Generator().manual_seed(1))
    run = {"cfg": 1.0, "positive": prompt(0, reference_latents=[reference])}
    settings = {**SETTINGS, "retention_ratio": 0.0}
    levels = sampler_levels(build("flux2"))
    strip = plan_of_levels(levels, settings).strip
    assert strip.startswith("#..")  # the second step is to be reused, and has fewer tokens than the first

    def drop(inputs):
        options = inputs["transformer_options"]
        if float(options["sigmas"][0]) < levels[0] * 0.999:
            inputs["img"] = inputs["img"][:, : -sum(options["reference_image_num_tokens"])]
        return inputs

    kv_cache = getattr(nodes_of("nodes_flux"), "FluxKVCache", None)
    if kv_cache is not None:  # in this version, whose patches are told the noise level
        patcher = build("flux2").clone()
        patcher.set_model_post_input_patch(drop)
        patched, said = cached_patcher(patcher, thresholds=settings)
        watched = Watched(patched)
        result = sample(watched.patcher, "flux2", **run)
        watched.remove()
        # The second step's forward begins without blocks and, at the final layer, is broken off and begins again.
        assert torch.isfinite(result).all() and watched.strip == "#.#" + strip[2:], (watched.strip, strip)
        assert "1 computed unplanned (the number of image tokens changed)" in said[-1], said
        # The node acts by what was called before, which the proof of the class's facts notices.
        patched, said = cached_patcher(kv_cache.execute(build("flux2")).args[0], thresholds=settings)
        assert torch.isfinite(sample(patched, "flux2", **run)).all()
        assert "its output is predicted instead" in said[1] and "6 of 12 model calls computed" in said[-1], said


class Control(comfy.controlnet.ControlBase):
    """A control net of ComfyUI's kind that says when it runs."""

    def __init__(self, seed, tokens=16, width=64):
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.hints = [torch.randn(1, tokens, width, generator=made) for _ in range(2)]
        self.ran = []

    def get_control(self, x, t, cond, batched_number, transformer_options):
        before = self.previous_controlnet and self.previous_controlnet.get_control(
            x, t, cond, batched_number, transformer_options
        )
        if t[0] > self.timestep_range[0] or t[0] < self.timestep_range[1]:
            return before
        self.ran.append(float(t[0]))
        return self.control_merge({"input": [hint.clone() for hint in self.hints], "output": []}, before, None)

    def get_models(self):
        return []


def control_nets_rest_on_reused_steps(percent_from, percent_to):
    """A control net runs where a step computes and nowhere else; where its range begins or ends, the step computes."""
    patcher = build("flux")

    def controlled():
        nets = Control(1).set_cond_hint(None, 0.7), Control(2).set_cond_hint(None, 1.0, (percent_from, percent_to))
        nets[1].set_previous_controlnet(nets[0])
        return nets, prompt(0, control=nets[1], control_apply_to_uncond=True)

    nets, positive = controlled()
    uncontrolled = sample(patcher)
    plain = sample(patcher, positive=positive)
    assert not torch.allclose(plain, uncontrolled) and len(nets[0].ran) == STEPS
    acted = set(nets[1].ran)
    off, _ = cached_patcher(patcher, thresholds={**SETTINGS, "retention_ratio": 1.0})
    assert torch.equal(sample(off, positive=positive), plain)

    nets, positive = controlled()
    patched, said = cached_patcher(patcher)
    watched = Watched(patched)
    result = sample(watched.patcher, positive=positive)
    watched.remove()
    computed = {sigma for sigma, ran in zip(watched.sigmas, watched.ran) if ran}
    assert set(nets[0].ran) == computed and len(computed) < STEPS and torch.isfinite(result).all()
    assert set(nets[1].ran) == computed & acted
    levels = sampler_levels(patcher)
    changes = [sigma for before, sigma in zip(levels, levels[1:]) if (before in acted) != (sigma in acted)]
    assert all(any(abs(sigma - one) < 1e-6 for one in computed) for sigma in changes), (changes, computed)
    if not changes:
        expected, _ = expected_of(patcher, positive=controlled()[1])
        assert torch.equal(result, expected)


def rising_noise_computes():
    """Unsampling, by core's FlipSigmas: nothing is planned for noise levels that rise, and the node says so."""
    patcher = build("flux")
    flipped = nodes_of("nodes_custom_sampler").FlipSigmas.execute(torch.tensor([*sampler_levels(patcher), 0.0]))
    sigmas = flipped.args[0]

    def unsampled(model):
        euler = comfy.samplers.sampler_object("euler")
        start = torch.randn(latent("flux").shape, generator=torch.Generator().manual_seed(0))
        none, device = torch.zeros_like(start), torch.device("cpu")
        return comfy.samplers.sample(model, none, prompt(0), prompt(1), 1.0, device, euler, sigmas, latent_image=start)

    for options in ({}, {"speedup": 2.0}):
        patched, said = cached_patcher(patcher, **options)
        assert torch.equal(unsampled(patched), unsampled(patcher))
        assert "its noise levels rise (unsampling)" in said[0], said


def runs_without_a_step_pass():
    """Sigmas split at their end leave one for the second sampler, which returns what it was given."""
    patcher = build("flux")
    sigmas = torch.tensor([*sampler_levels(patcher), 0.0])[STEPS:]
    start, euler, device = torch.ones_like(latent("flux")), comfy.samplers.sampler_object("euler"), torch.device("cpu")

    def sampled(model):
        return comfy.samplers.sample(
            model, start * 0, prompt(0), prompt(1), 3.0, device, euler, sigmas, latent_image=start
        )

    for model in (cached_patcher(patcher)[0], cached_patcher(patcher, thresholds={}, mag_ratios="", speedup=2.0)[0]):
        assert torch.equal(sampled(model), sampled(patcher))


def short_runs_compute():
    """Four steps have nothing to gain, and the node says so; five have."""
    patcher = build("flux")
    for options in ({"speedup": 2.0}, {"model_type": "flux"}):
        patched, said = cached_patcher(patcher, thresholds={}, mag_ratios="", **options)
        assert torch.equal(sample(patched, steps=4), sample(patcher, steps=4))
        assert "nothing will be reused: a run of 4 steps has nothing to gain" in said[0], said
        sample(patched, steps=5)
        assert "3 of 5 model calls computed, 2 reused" in said[-1], said


def bypass_loras_have_calibrations_of_their_own():
    """An adapter that runs beside the weights (Load LoRA (Bypass)) is as much a part of the model as one that is added
    to them."""
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):  # of this version
        return
    patcher, folder = build("flux", seed=33), WORK / "loras"
    folder.mkdir(exist_ok=True)
    save_file(lora_of(patcher), folder / "bypassed.safetensors")
    folder_paths.add_model_folder_path("loras", str(folder))
    loader = nodes_of("nodes_lora_debug").LoraLoaderBypassModelOnly()
    (with_lora,) = loader.load_lora_model_only(patcher, "bypassed.safetensors", 0.8)
    (weaker,) = loader.load_lora_model_only(patcher, "bypassed.safetensors", 0.4)
    assert with_lora.injections and not torch.allclose(sample(with_lora), sample(patcher))
    found = [fingerprints.fingerprints(one, transformer_of(one))[1] for one in (patcher, with_lora, weaker)]
    assert len(set(found)) == 3, found


def a_name_with_dashes_is_shown():
    named = tiny_table(name="models--black-forest-labs--FLUX.1-dev")
    patched, said = cached_patcher(build("flux"), mag_ratios=named)
    sample(patched)
    assert "ratios of models--black-forest-labs--FLUX.1-dev" in said[0], said


def a_calibration_that_is_not_used_is_named():
    """Which table is used stands on the node, also where a model type was chosen and an own calibration is there."""
    patcher = build("flux", seed=34)
    calibration, _, _ = calibrated_patcher(patcher)
    patched, said = cached_patcher(patcher, mag_ratios="", model_type="flux", thresholds={})
    sample(patched)
    assert f"ratios of {calibration.path.stem} (measured)" in said[0], said
    assert tables.find("", "no-such") is None
    calibration.path.unlink()
