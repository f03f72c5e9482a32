"""Every model of ComfyUI, planned for a speed-up by its output alone. Run by comfyui_worker.py."""

import inspect
import os
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import comfy.model_base
import comfy.nested_tensor
import comfy.supported_models
import comfyui_version
import torch
from comfy.ldm.audio.embedders import NumberConditioner
from comfy.model_patcher import ModelPatcher
from comfy.model_sampling import CONST, IMG_TO_IMG_FLOW
from comfyui_families import FAMILIES
from comfyui_helpers import (
    PACKAGE,
    STEPS,
    Watched,
    cached_patcher,
    calibrated_patcher,
    expected_of,
    hosts,
    model_state,
    models,
    sample,
    schedules,
    tables,
    transformer_of,
    untouched,
)
from comfyui_models import build, latent, prompt


def flat_latent(latent):
    """What is compared: video and sound are two tensors."""
    return torch.cat([part.flatten() for part in latent.unbind()]) if latent.is_nested else latent


def known_here(family):
    """Whether this version of ComfyUI has the model."""
    return hasattr(comfy.supported_models, FAMILIES[family][0])


def output_is_predicted(family):
    """Off is plain, bit for bit; half of the calls run the transformer, both streams of video and sound included; twice
    the same; nothing is left behind."""
    if not known_here(family):
        return
    patcher = build(family)
    plain = flat_latent(sample(patcher, family))
    off, said = cached_patcher(patcher, thresholds={"magcache_thresh": 0.0}, mag_ratios="")
    assert torch.equal(flat_latent(sample(off, family)), plain) and "nothing will be reused" in said[0], said
    ran = []
    hook = transformer_of(patcher).register_forward_hook(lambda *args: ran.append(1))
    patched, said = cached_patcher(patcher, thresholds={}, mag_ratios="", corrector=True)
    results = [flat_latent(sample(patched, family)) for _ in range(2)]
    hook.remove()
    assert torch.equal(*results) and not torch.equal(results[0], plain) and torch.isfinite(results[0]).all()
    a_step = len(ran) // STEPS  # two runs of half of the steps
    assert a_step in (1, 2) and a_step * STEPS == len(ran), (len(ran), said)
    assert f"MagCache: {len(ran) // 2} of {2 * (len(ran) // 2)} model calls computed" in said[1], said


def residual_is_put_back(family):
    """By thresholds: the facts of the class hold on a real model, which the first call proves; the planned steps run no
    block; the picture is the oracle's, bit for bit; nothing is left behind."""
    if not known_here(family):
        return
    patcher = build(family)
    plain, before = flat_latent(sample(patcher, family)), model_state(transformer_of(patcher))
    patched, said = cached_patcher(patcher)
    watched = Watched(patched)
    result = flat_latent(sample(watched.patcher, family))
    watched.remove()
    untouched(transformer_of(patcher), before)
    per_step = len(watched.ran) // STEPS
    assert "do not hold" not in "".join(said) and len(said) == 2, said
    assert watched.strip[::per_step] == "##..#..#..#." and not torch.equal(result, plain), (watched.strip, said)
    # Not where text follows the picture, and where the last block is the end, which the oracle does not know.
    if family not in ("boogu", "kandinsky5", "auraflow"):
        assert torch.equal(result, flat_latent(expected_of(patcher, family)[0]))


def facts_that_are_wrong_are_noticed():
    """At the first computed call the residual is put back: where that does not make the same output, the node says so,
    goes on with the output, and a calibration writes nothing and spoils nothing."""
    patcher, known = build("flux", seed=35), "comfy.Flux"
    plain, facts = sample(patcher), hosts.HOSTS[known]
    hosts.HOSTS[known] = replace(facts, in_place=False)  # the first block writes into what it is given
    try:
        patched, said = cached_patcher(patcher)
        result = sample(patched)
        calibration, calibrated_plain, told = calibrated_patcher(patcher)
    finally:
        hosts.HOSTS[known] = facts
    assert "The facts of Flux do not hold for this model (its own residual makes another output" in said[1], said
    assert "predictor line" in said[1] and "6 of 12 model calls computed, 6 reused" in said[2], said
    assert torch.isfinite(result).all() and not torch.equal(result, plain)
    assert torch.equal(calibrated_plain, plain) and calibration.table is None
    assert len(told) == 1 and "set speedup, which needs no calibration" in told[0], told


def thresholds_without_blocks_or_ratios_are_answered():
    """A model of whose class only the output is known, one without ratios, one without a threshold: planned for a
    speed-up, with the reason."""
    for family, options, why in (
        ("sd15", {}, "For UNetModel only the output is predicted, because a U-Net has no stack of equally"),
        ("ltxav", {}, "For LTXAVModel only the output is predicted, because it denoises image and sound in two"),
        ("zimage", {"mag_ratios": "", "measure": "off"}, "The paper's rule has no ratios for this model"),
        ("zimage", {"thresholds": {}}, "The ratios of tiny are used once magcache_thresh is set"),
    ):
        if not known_here(family):
            continue
        patched, said = cached_patcher(build(family), **options)
        sample(patched, family)
        assert why in said[0] and "payload output" in said[0], said
    calibration, _, said = calibrated_patcher(build("sd15"), "sd15")
    assert calibration.table is None and "a U-Net has no stack" in said[0] and "set speedup" in said[0], said


class Smooth(torch.nn.Module):
    """A transformer whose output changes smoothly with the noise level and with x; or, with `denoises`, a flow whose
    denoised latent does, whatever noise x holds. Models look for a few things on theirs; channels: of the latent, which
    others (masks, pictures) may follow in x."""

    def __init__(self, channels=4, **config):
        super().__init__()
        self.dtype, self.channels, self.in_channels, self.ran = torch.float32, channels, channels, []
        self.patch_size, self.num_layers = config.get("patch_size", 1), 0
        self.patch_embedding = torch.nn.Conv3d(channels, 1, 1)
        self.img_in = SimpleNamespace(proj=torch.nn.Conv3d(2 * channels + 1, 1, 1))
        self.ofs_proj_dim, self.denoises = None, False

    def forward(self, x, t, *args, **kwargs):
        t = t[0] if isinstance(t, (list, tuple)) else t
        self.ran.append(float(t.max()))
        t = t.flatten()[:1] / (1000 if t.max() > 2 else 1)
        made = [self.of(part, t) for part in (x if isinstance(x, (list, tuple)) else [x])]
        return made if len(made) > 1 else made[0]

    def of(self, x, t):
        x = x[:, : self.channels] if x.shape[1] > self.channels else x
        made = torch.Generator().manual_seed(0)
        first, second, third = (torch.randn(x.shape[1:], generator=made) for _ in range(3))
        smooth = 0.1 * torch.tanh(x) + first + second * torch.cos(2 * t) + third * t**2
        return (x - smooth) / t if self.denoises else smooth

    def preprocess_text_embeds(self, embeds, **kwargs):
        return embeds


@contextmanager
def smooth_transformers(replaced):
    """While a model is built, `Smooth` takes the place of its transformer, whose class goes into `replaced`."""
    plain = comfy.model_base.BaseModel.__init__
    given = inspect.signature(plain)

    def smooth(self, *args, **kwargs):
        bound = given.bind(self, *args, **kwargs)
        bound.apply_defaults()
        replaced.append(bound.arguments["unet_model"].__name__)
        channels = bound.arguments["model_config"].latent_format.latent_channels
        bound.arguments["unet_model"] = partial(Smooth, channels)
        return plain(*bound.args, **bound.kwargs)

    comfy.model_base.BaseModel.__init__ = smooth
    try:
        yield
    finally:
        comfy.model_base.BaseModel.__init__ = plain


SIZES = {1: (16,), 2: (8, 8), 3: (2, 8, 8)}  # by the dimensions of a latent
NOT_SAMPLED = {"RT_DETR_v4", "DepthAnything3", "SAM3", "SAM31"}  # detectors, depth and masks, which no sampler runs


CONFIG = {"in_channels": 16, "out_channels": 16, "hidden_size": 64, "timestep_features_type": "learned"}


def weights_of_a_file():
    """What models take from their file beside the transformer."""
    seconds = NumberConditioner(768).state_dict()
    return {
        "cc_projection.weight": torch.zeros(48, 48),
        "cc_projection.bias": torch.zeros(48),
        **{
            f"conditioner.conditioners.{name}.{key}": torch.zeros_like(value)
            for name in ("seconds_start", "seconds_total")
            for key, value in seconds.items()
        },
    }


@torch.no_grad()
def smooth_model(cls):
    """(ModelPatcher of a supported model with a smooth transformer, the class of its own)."""
    replaced = []
    with smooth_transformers(replaced):
        config = {key: value for key, value in cls.unet_config.items() if not isinstance(value, set)}
        configuration = cls({**CONFIG, **config, "dtype": torch.float32})
        configuration.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = configuration.get_model(weights_of_a_file(), device=cpu)
    return ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu), replaced[0]


# Names in the node of the models that have published settings; the check `classes_are_recognised` proves them.
PUBLISHED = {
    "Flux": ("flux", "flux_kontext"),
    "FluxSchnell": ("flux_schnell",),
    "Chroma": ("chroma",),
    "QwenImage": ("qwen_image", "qwen_image_edit"),
    "HunyuanVideo": ("hunyuan_video",),
    "HunyuanVideo15": ("hunyuan_video1.5",),
    "WAN21_T2V": ("wan2.1_t2v_1.3B", "wan2.1_t2v_14B", "wan2.2_t2v_14B", "wan2.2_i2v_14B"),
    "WAN21_I2V": ("wan2.1_i2v_480p_14B", "wan2.1_i2v_720p_14B"),
    "WAN21_Vace": ("wan2.1_vace_1.3B", "wan2.1_vace_14B"),
    "WAN22_T2V": ("wan2.2_ti2v_5B_t2v", "wan2.2_ti2v_5B_i2v"),
}
HEADING = """# ComfyUI's models and MagCache

What MagCache can do for every model of `comfy/supported_models.py` in ComfyUI 0.30.0.

* **speedup**: works in the first run with every sampler, by predicting the model's output.
* **thresholds**: the paper's rule, which needs the structure of the model's blocks. "published": settings and ratios
  were published for these model types; the node uses them while `speedup` is 0. "after calibration": the first run of
  the node with a threshold measures the ratios, or MagCache Calibration does. "no": only `speedup`, with the reason.

At the first computed call of each run the node checks the structure of the blocks on the model itself. If the check
fails, it says so and predicts the output instead.

`tests/hosts/test_comfyui.py::test_models` writes this table: it plans and samples each model through ComfyUI's own
classes, with a smooth function instead of the transformer. `test_residual` and `test_family` test every transformer
that has thresholds, with small random weights.

| model | transformer | speedup | thresholds |
|---|---|---|---|
"""


def samples_of(cls, patcher):
    if cls.__name__ == "LTXAV":
        return latent("ltxav")
    form = patcher.model.latent_format
    return torch.zeros(1, form.latent_channels, *SIZES[form.latent_dimensions])


def row_of(cls):
    """A line of the table; what it says is tried."""
    name = cls.__name__
    if name in NOT_SAMPLED:
        return f"| {name} | | no sampler runs it | |"
    patcher, transformer = smooth_model(cls)
    if transformer in models.NOT_POSSIBLE:
        return f"| {name} | {transformer} | no: it {models.NOT_POSSIBLE[transformer]} | |"
    ((text, about),) = prompt(0, **({"conditioning_lyrics": torch.zeros(1, 4)} if "ACE" in name else {}))
    if "StableAudio" in name:  # which puts its own 768 wide tokens behind the prompt
        text = text.repeat(1, 1, 16)
    asked = [[text, about]]
    run = {"cfg": 1.0, "samples": samples_of(cls, patcher), "positive": asked, "negative": asked}
    plain, missed = flat_latent(sample(patcher, "", **run)), {}
    for corrector in (False, True):
        patched, said = cached_patcher(patcher, thresholds={}, mag_ratios="", speedup=2.0, corrector=corrector)
        ran = patcher.model.diffusion_model.ran = []
        missed[corrector] = float((flat_latent(sample(patched, "", **run)) - plain).norm() / plain.norm())
        assert len(ran) == STEPS // 2 and "6 of 12 model calls computed" in said[-1], (name, said)
    assert missed[True] <= missed[False] < 0.25, (name, missed)
    sampling = patcher.model.model_sampling
    if isinstance(sampling, CONST) and not isinstance(sampling, IMG_TO_IMG_FLOW):  # whose output is no velocity
        assert missed[True] < missed[False] / 2 or missed[False] < 1e-2, (name, missed)
    return f"| {name} | {transformer} | yes | {thresholds_of(name, transformer)} |"


def thresholds_of(name, transformer):
    """A cell of the table."""
    host = hosts.HOSTS.get(f"comfy.{transformer}")
    if name in PUBLISHED:
        return "published: " + ", ".join(PUBLISHED[name])
    if host and host.blocks:
        return "after calibration"
    return f"no: {host.why_output if host else 'its class is not described'}"


def output_with_a_sampler(sampler):
    """With speedup a sampler of any kind gets what it takes for the model's output: about half of the calls run, and
    the picture is near the plain one, also where noise is added at each step."""
    cls = comfy.supported_models.Lumina2
    patcher, _ = smooth_model(cls)
    run = {"sampler": sampler, "cfg": 1.0, "samples": samples_of(cls, patcher)}
    transformer_of(patcher).denoises = True
    ran = patcher.model.diffusion_model.ran
    plain, calls = sample(patcher, "", **run), len(ran)
    off, _ = cached_patcher(patcher, thresholds={"magcache_thresh": 0.0}, mag_ratios="")
    assert torch.equal(sample(off, "", **run), plain)
    ran.clear()
    patched, said = cached_patcher(patcher, thresholds={}, mag_ratios="", speedup=2.0, corrector=True)
    missed = float((sample(patched, "", **run) - plain).norm() / plain.norm())
    assert len(ran) < 0.75 * calls and missed < 0.15, (len(ran), calls, missed, said)


def models_are_as_the_table_says():
    """Each supported model is planned and sampled; MODELS.md and the README's summary say what came of it in the newest
    version, and that it is the same in an older one."""
    rows = [row_of(cls) for cls in comfy.supported_models.models]
    version, path = comfyui_version.__version__, FOLDER / "MODELS.md"
    if f"in ComfyUI {version}." in HEADING:
        written_as(path, HEADING, "".join(f"{row}\n" for row in rows))
        written_as(FOLDER / "README.md", "| what works | models | which |\n|---|---|---|\n", summary_of(rows))
    else:
        known = path.read_text().partition(HEADING)[2].partition("\n\n")[0].splitlines()
        assert not set(rows) - set(known), sorted(set(rows) - set(known))
        missing = [row.split()[1] for row in known if row not in rows]
        counts = f"All rows of its {len(rows)} models are the same. It lacks {len(missing)}: {', '.join(missing)}.\n"
        written_as(path, f"## In ComfyUI {version}\n\n", counts)


def summary_of(rows):
    """Lines of the README: which models each kind of row has."""
    kinds = {}
    for name, _, speedup, thresholds in ([cell.strip() for cell in row.split("|")[1:5]] for row in rows):
        kind = f"thresholds {thresholds}" if speedup == "yes" else speedup
        kinds.setdefault(kind.partition(":")[0], []).append(name)
    says = {
        "thresholds published": "`speedup`; thresholds with published settings",
        "thresholds after calibration": "`speedup`; thresholds after a measured first run",
        "thresholds no": "`speedup` alone",
        "no": "not possible: each call depends on the earlier ones",
        "no sampler runs it": "no sampler runs it",
    }
    assert kinds.keys() == says.keys(), kinds.keys()
    return "".join(f"| {says[kind]} | {len(kinds[kind])} | {', '.join(kinds[kind])} |\n" for kind in says)


def every_described_class_is_tried():
    """On a real, tiny model (`residual_is_put_back`, `reuse_is_what_it_should_be`), not by a name alone."""
    described = {name.partition(".")[2] for name, host in hosts.COMFYUI.items() if host.blocks}
    tried = {type(transformer_of(build(family))).__name__ for family in FAMILIES}
    assert described <= tried, sorted(described - tried)


def settings_are_as_the_readme_says():
    """The published settings of every model type, and what they compute at the steps that they were published for."""
    lines = []
    for model_type, (_, names) in models.MODEL_TYPES.items():
        for table in map(tables.load, names):
            levels = table.levels(table.steps)
            planned = schedules.Settings(**table.settings).plan(table, levels, table.switch_step(levels))
            settings = " / ".join(f"{value:g}" for value in table.settings.values())
            counts = f"{planned.computed} of {planned.steps} | {planned.bound:.2f}x"
            lines.append(f"| `{model_type}` | `{table.name}` | {settings} | {counts} |\n")
    written_as(
        FOLDER / "README.md",
        "| model_type | table | thresh / K / retention | computed | at most |\n|---|---|---|---|---|\n",
        "".join(lines),
    )


FOLDER = Path(PACKAGE.replace("_x_", "."))


def written_as(path, heading, lines):
    """Whether a table stands in a file after its heading. MAGCACHE_WRITE_TABLES=1 puts it there."""
    before, found, after = path.read_text().partition(heading)
    assert found, f"{path.name} lacks the heading of the table: {heading}"
    rest = after.partition("\n\n")
    whole = before + heading + lines + (f"\n{rest[2]}" if rest[1] else "")
    if os.environ.get("MAGCACHE_WRITE_TABLES"):
        path.write_text(whole)
    assert path.read_text() == whole, f"{path.name} is not up to date: run this test with MAGCACHE_WRITE_TABLES=1"
