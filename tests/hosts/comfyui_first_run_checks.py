"""What `measure_first_run` does with a model without ratios: its first run is measured, the next is faster. Run by
comfyui_worker.py."""

import comfy.model_management
import nodes
import torch
from comfyui_helpers import (
    SETTINGS,
    STEPS,
    Watched,
    cached_patcher,
    calibrated_patcher,
    fingerprints,
    hosts,
    lora_of,
    sample,
    tables,
    transformer_of,
)
from comfyui_model_checks import known_here
from comfyui_models import build, latent, prompt

MEASURING = "MagCache: measuring; next queue is faster."


def node(patcher, **options):
    """(patched model, what it says) of a node without ratios."""
    return cached_patcher(patcher, **{"mag_ratios": "", **options})


def written():
    return set(tables.calibrations_folder().glob("*"))


def unlinked(before=frozenset()):
    """Take away the calibrations that a check has made."""
    for path in written() - before:
        path.unlink()


def first_run_is_measured(family, cfg):
    """The first run is the plain one, bit for bit, and what it measures is what a Calibration node does; the second
    reuses by it, as another node that is given the file."""
    if not known_here(family):
        return
    patcher, before = build(family, seed=41), written()
    plain = sample(patcher, family, cfg=cfg)
    patched, said = node(patcher)
    assert torch.equal(sample(patched, family, cfg=cfg), plain)
    (path,) = written() - before
    assert said[0].startswith(f"{MEASURING}\n  ############   # computes\n  The paper's rule needs"), said
    assert said[1] == f"MagCache: {path} written; this node takes it from the next queue on.", said
    assert said[2].startswith("MagCache reused nothing in ") and said[2].endswith(MEASURING.partition(": ")[2]), said
    second = sample(patched, family, cfg=cfg)
    assert f"ratios of {path.stem} (measured)" in said[3] and " reused; transformer" in said[4], said
    assert not torch.equal(second, plain)
    explicit, _ = cached_patcher(patcher, mag_ratios=str(path))
    assert torch.equal(second, sample(explicit, family, cfg=cfg))
    table = tables.read(path)
    path.unlink()
    calibration, _, _ = calibrated_patcher(patcher, family, cfg=cfg)
    assert calibration.path == path and table.mag_ratios == calibration.table.mag_ratios
    assert table.sigmas == calibration.table.sigmas and table.provenance == calibration.table.provenance
    assert table.statistics.keys() == calibration.table.statistics.keys()
    unlinked(before)


def the_switch_holds():
    """on: also without a threshold, by settings that suit most; off: never; auto without a threshold: at once twice as
    fast; and where nothing could be gained nothing is measured."""
    patcher, before = build("flux", seed=42), written()
    plain = sample(patcher)
    for options, sentence in (
        ({"thresholds": {}}, "no calibration needed"),
        ({"measure": "off"}, "The paper's rule has no ratios for this model: set measure_first_run to auto"),
        ({"speedup": 2.0, "measure": "on"}, "no calibration needed"),
    ):
        patched, said = node(patcher, **options)
        sample(patched)
        assert sentence in said[0] and "6 of 12 model calls computed" in said[1], (options, said)
    for options, steps, sentence in (
        ({"thresholds": {**SETTINGS, "magcache_thresh": 0.0}}, STEPS, "magcache_thresh is 0, which turns MagCache off"),
        ({"thresholds": {"magcache_K": 0}, "measure": "on"}, STEPS, "every step was asked to compute"),
        ({}, 4, "a run of 4 steps has nothing to gain"),
    ):
        patched, said = node(patcher, **options)
        assert torch.equal(sample(patched, steps=steps), plain if steps == STEPS else sample(patcher, steps=steps))
        assert f"nothing will be reused: {sentence}" in said[0] and len(said[0].splitlines()) < 5, said
    assert written() == before
    patched, said = node(patcher, thresholds={}, measure="on")
    for _ in range(2):
        sample(patched)
    (path,) = written() - before
    assert said[0].startswith(MEASURING) and f"ratios of {path.stem} (measured), magcache_thresh 0.06" in said[3], said
    unlinked(before)
    # A threshold of one kind alone asks for the rule, too, and so does a window of steps.
    for options in ({"thresholds": {"magcache_K": 1}}, {"thresholds": {}, "end_step": -2}):
        patched, said = node(patcher, **options)
        sample(patched)
        assert said[0].startswith(MEASURING), said
        unlinked(before)


def a_model_with_published_ratios_is_not_measured():
    patcher, before = build("flux", seed=42), written()
    patched, said = node(patcher, model_type="flux", thresholds={}, measure="on")
    sample(patched)
    assert "ratios of flux-dev (published)" in said[0] and written() == before, said


def interrupted_first_run_writes_nothing():
    """Broken off near its end: nothing is kept, the node says so, and the next queue measures again."""
    patcher, before = build("flux", seed=43), written()
    patched, said = node(patcher)
    calls = iter(range(10**6))

    def interrupt(module, args):
        if next(calls) == STEPS - 1:
            raise comfy.model_management.InterruptProcessingException

    hook = transformer_of(patcher).final_layer.register_forward_pre_hook(interrupt)
    try:
        sample(patched)
        raise AssertionError("was to be interrupted")
    except comfy.model_management.InterruptProcessingException:
        hook.remove()
    assert written() == before and "the run was interrupted, nothing was measured" in said[-1], said
    said.clear()
    sample(patched)
    assert said[0].startswith(MEASURING) and len(written() - before) == 1, said
    unlinked(before)


def a_partial_first_run_stands_for_no_fuller_one():
    """A table of the last 0.4 serves such runs and no others: a full run is measured itself, and its table then serves
    both."""
    patcher, before = build("flux", seed=44), written()
    patched, said = node(patcher)

    def begun(**options):
        said.clear()
        sample(patched, **options)
        return said[0]

    assert begun(denoise=0.4).startswith(MEASURING)
    (part,) = written() - before
    assert f"ratios of {part.stem} (measured)" in begun(denoise=0.4)
    told = begun()
    assert told.startswith(MEASURING) and f"those of {part.stem} cover only part of this run" in told, told
    (full,) = written() - before  # which has taken the place of what it covers
    assert tables.read(full).sigmas[0] == 1.0
    assert f"ratios of {full.stem} (measured)" in begun() and f"ratios of {full.stem} (measured)" in begun(denoise=0.4)
    # A node that may not measure computes what a table does not cover, and says so.
    unlinked(before)
    begun(denoise=0.4)
    patched, said = node(patcher, measure="off")
    watched = Watched(patched)
    sample(watched.patcher)
    watched.remove()
    count = int(said[0].partition(" of the steps compute because they lie beyond the noise levels")[0].split()[-1])
    assert watched.strip.startswith("#" * count) and "." in watched.strip[count:], (watched.strip, count)
    unlinked(before)


def first_runs_of_loras_are_their_own():
    """A LoRA, loaded after the base model was measured, is told; measured before it, it is no table of the base
    model."""
    patcher, before = build("flux", seed=45), written()
    weights, difference = lora_of(patcher), "diffusion_model.double_blocks.0.img_mlp.0"
    change = weights[f"{difference}.lora_up.weight"] @ weights[f"{difference}.lora_down.weight"]
    with_lora = patcher.clone()
    assert with_lora.add_patches({f"{difference}.weight": ("diff", (change,))}, 0.5)
    for model in (with_lora, patcher):
        patched, said = node(model)
        sample(patched)
        assert said[0].startswith(MEASURING), said
    files = written() - before
    assert len(files) == 2
    for model in (with_lora, patcher):
        patched, said = node(model)
        sample(patched)
        _, own = fingerprints.fingerprints(model, transformer_of(model))
        (path,) = [path for path in files if own in path.name]
        assert f"ratios of {path.stem} (measured)" in said[0], said
    unlinked(before)


def both_of_two_samplers_are_measured():
    """One node, two samplers that share the steps: each measures its part in the first queue, each takes its own in the
    second."""
    patcher, before = build("wan", seed=46), written()
    patched, said = node(patcher)
    common = (0, STEPS, 1.0, "euler", "simple", prompt(0), prompt(1))

    def both(model):
        noisy = {"samples": latent("wan")}
        halfway = nodes.KSamplerAdvanced().sample(model, "enable", *common, noisy, 0, 6, "enable")[0]
        done = nodes.KSamplerAdvanced().sample(model, "disable", *common, halfway, 6, 10000, "disable")
        return done[0]["samples"]

    assert torch.equal(both(patched), both(patcher))
    assert [text.startswith(MEASURING) for text in said] == [True, False, False] * 2 and len(written() - before) == 2
    said.clear()
    assert not torch.equal(both(patched), both(patcher))
    ranges = [tables.read(path).sigmas for path in written() - before]
    assert sorted(len(one) for one in ranges) == [6, 6] and min(ranges[0]) != min(ranges[1])
    assert all("(measured)" in text and "converted" not in text for text in said[::2]), said
    unlinked(before)


def what_cannot_be_measured_is_cached_all_the_same():
    """Wrong facts: the run goes on with predicted outputs. A prompt that changes in the middle: the picture is there,
    the node says why, and the next queue is twice as fast by the outputs."""
    patcher, before = build("flux", seed=47), written()
    plain, facts = sample(patcher), hosts.HOSTS["comfy.Flux"]
    hosts.HOSTS["comfy.Flux"] = hosts.Host(
        **{**vars(facts), "in_place": False}  # the first block writes into what it is given
    )
    try:
        patched, said = node(patcher)
        result = sample(patched)
    finally:
        hosts.HOSTS["comfy.Flux"] = facts
    assert said[0].startswith(MEASURING) and "The facts of Flux do not hold for this model" in said[1], said
    assert "6 of 12 model calls computed, 6 reused" in said[2] and not torch.equal(result, plain), said
    hosts.HOSTS["comfy.Flux"] = hosts.Host(blocks=("double_blocks", "triple_blocks"), final_layer="final_layer")
    try:
        patched, said = node(patcher)
        sample(patched)
    finally:
        hosts.HOSTS["comfy.Flux"] = facts
    assert "Nothing could be measured: in this version of ComfyUI Flux is not built" in said[0], said
    assert "6 of 12 model calls computed" in said[1], said
    ranges = prompt(0, start_percent=0.0, end_percent=0.5) + prompt(1, start_percent=0.5, end_percent=1.0)
    patched, said = node(patcher)
    assert torch.equal(sample(patched, positive=ranges, cfg=1.0), sample(patcher, positive=ranges, cfg=1.0))
    assert "MagCache measured nothing: Calibration needs runs of one kind" in said[1], said
    sample(patched, positive=ranges, cfg=1.0)
    assert "Nothing could be measured: Calibration needs" in said[3] and "model calls computed, " in said[4], said
    assert written() == before
