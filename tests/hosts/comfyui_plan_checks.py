"""Settings, mistakes, and which model is taken for which. Run by comfyui_worker.py."""

import sys

import comfy.samplers
import nodes
import torch
from comfyui_families import FAMILIES
from comfyui_helpers import Watched, blocks, cached_patcher, errors, hosts, models, sample, tables, transformer_of
from comfyui_model_checks import PUBLISHED
from comfyui_models import build, latent, prompt
from comfyui_published import FLUX, HUNYUAN, WAN


def window_of_steps():
    patcher = build("flux")
    for first, last, strip in (
        (0, -1, "##..#..#..#."),
        (0, -2, "##..#..#..##"),
        (5, -1, "#####..#..#."),
        (0, 6, "##..#..#####"),
        (-4, -1, "########..#."),
    ):
        patched, said = cached_patcher(patcher, start_step=first, end_step=last)
        watched = Watched(patched)
        sample(watched.patcher)
        watched.remove()
        assert watched.strip == strip and strip in said[0], (first, last, watched.strip)


def cache_on_the_cpu():
    patcher = build("flux")
    assert torch.equal(
        sample(cached_patcher(patcher, device=torch.device("cpu"))[0]), sample(cached_patcher(patcher)[0])
    )


def what_cannot_be_cached_renders_plain():
    """A wrong model type, another make of a known class, a model that needs each of its calls, rising noise levels: a
    sentence, and the plain picture."""
    patcher = build("flux", seed=1)  # one that no other check calibrates
    plain = sample(patcher)
    model = transformer_of(patcher)
    known = type(model)

    def uncached(sentence, **options):
        patched, said = cached_patcher(patcher, **options)
        assert torch.equal(sample(patched), plain)
        assert len(said) == 1 and said[0].startswith("MagCache is off in this run") and sentence in said[0], said

    name = hosts.class_name(model)
    facts = hosts.HOSTS[name]
    hosts.HOSTS[name] = blocks.Host(blocks=("double_blocks", "triple_blocks"), final_layer="final_layer")
    try:
        uncached("Flux is not built as MagCache knows it")
    finally:
        hosts.HOSTS[name] = facts
    uncached("model_type wan2.1_t2v_14B is for a WanModel", model_type="wan2.1_t2v_14B")
    model.__class__ = type("CausalWanModel", (known,), {})
    uncached("CausalWanModel keeps the keys and values of earlier frames")
    model.__class__ = known


def a_model_without_ratios_is_planned():
    """Of a class that MagCache does not know, or of a model for which no ratios were published: twice as fast in the
    first run, by the model's outputs alone."""
    patcher = build("flux", seed=1)
    plain = sample(patcher)
    patched, said = cached_patcher(patcher, mag_ratios="", thresholds={})
    assert not torch.equal(sample(patched), plain) and "6 of 12 model calls computed, 6 reused" in said[1], said
    model = transformer_of(patcher)
    known = type(model)
    model.__class__ = type("Fluxus", (known,), {})
    try:
        for options in ({"mag_ratios": "", "thresholds": {}}, {"mag_ratios": "flux-dev", "thresholds": {}}):
            patched, said = cached_patcher(patcher, **options)
            assert not torch.equal(sample(patched), plain) and "6 of 12 model calls computed" in said[1], said
    finally:
        model.__class__ = known


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
        ({"speedup": 2.0, "end_step": -2}, "start_step and end_step belong to the thresholds"),
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
        patched, said = cached_patcher(build(name), model_type=model_type, thresholds={}, mag_ratios="")
        sample(patched, name, steps=20)
        settings = f"magcache_thresh {thresh:g}, magcache_K {K}, retention_ratio {retention:g}"
        assert settings in said[0] and " reused; transformer" in said[1], (model_type, said)


def wan22_in_two_samplers():
    """T2V: each expert keeps its share of the start, as in the release. I2V: the high-noise expert is not cached."""
    patcher = build("wan")
    for model_type, high_is_cached in (("wan2.2_t2v_14B", True), ("wan2.2_i2v_14B", False)):
        patched, said = cached_patcher(patcher, model_type=model_type, thresholds={}, mag_ratios="")
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


def classes_are_recognised():
    """ComfyUI's classes at their real sizes, without memory: what auto takes them for, and that MODELS.md names these
    types where ComfyUI takes such a file for that model."""
    import comfy.ldm.chroma.model
    import comfy.ldm.flux.model
    import comfy.ldm.hunyuan_video.model
    import comfy.ldm.qwen_image.model
    import comfy.ldm.wan.model
    import comfy.model_detection
    import comfy.ops

    supported, published = {}, {}

    def named(model, file_name="", **signs):
        model_type = models.recognise(model, models.Signs(file_name, **signs))[0]
        if model_type:
            published.setdefault(supported[model], set()).add(model_type)
        return model_type

    def real(module, name, config):
        with torch.device("meta"):
            model = getattr(sys.modules[f"comfy.ldm.{module}.model"], name)(
                **config, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init
            )
        supported[model] = type(comfy.model_detection.model_config_from_unet_config(config)).__name__
        return model

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
    assert named(flux) == "flux" and named(flux, references=True) == "flux_kontext"
    assert named(real("flux", "Flux", {**dev, "guidance_embed": False})) == "flux_schnell"
    assert named(real("flux", "Flux", {**dev, "in_channels": 96})) is None  # FLUX Fill
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
    assert named(real("chroma", "Chroma", chroma)) == "chroma"
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
    assert named(real("hunyuan_video", "HunyuanVideo", hunyuan)) == "hunyuan_video"
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
    assert named(real("hunyuan_video", "HunyuanVideo", later)) == "hunyuan_video1.5"

    def wan(**sizes):
        return real(
            "wan",
            "VaceWanModel" if "vace_layers" in sizes else "WanModel",
            {**WAN, "text_dim": 4096, "freq_dim": 256, "num_layers": 2, **sizes},
        )

    small, large = {"dim": 1536, "num_heads": 12}, {"dim": 5120, "num_heads": 40}
    assert named(wan(**small)) == "wan2.1_t2v_1.3B"
    assert named(wan(**large), "/models/wan2.1_t2v_14B_fp16.safetensors") == "wan2.1_t2v_14B"
    assert named(wan(**large), "/models/wan2.2_t2v_high_noise_14B_fp16.safetensors") == "wan2.2_t2v_14B"
    to_video = wan(**large, in_dim=36, model_type="i2v")
    assert named(to_video, latent=(60, 104)) == "wan2.1_i2v_480p_14B"
    assert named(to_video, latent=(90, 160)) == "wan2.1_i2v_720p_14B"
    assert named(wan(**large, in_dim=36)) == "wan2.2_i2v_14B"
    five = wan(dim=3072, num_heads=24, in_dim=48, out_dim=48)
    assert named(five) == "wan2.2_ti2v_5B_t2v" and named(five, start_image=True) == "wan2.2_ti2v_5B_i2v"
    for sizes, name in ((small, "wan2.1_vace_1.3B"), (large, "wan2.1_vace_14B")):
        assert named(wan(**sizes, model_type="vace", vace_layers=2, vace_in_dim=96)) == name
    for family in ("flux", "flux2", "chroma", "wan", "vace", "hunyuan", "hunyuan1.5", "qwen"):
        assert named(transformer_of(build(family))) is None, family
    qwen = {**FAMILIES["qwen"][2], "num_layers": 60}
    picture = real("qwen_image", "QwenImageTransformer2DModel", qwen)
    assert named(picture) == "qwen_image" and named(picture, references=True) == "qwen_image_edit"
    assert published == {name: set(model_types) for name, model_types in PUBLISHED.items()}
