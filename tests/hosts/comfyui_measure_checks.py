"""Calibration and compilation. Run by comfyui_worker.py."""

import re
import time

import comfy.model_management
import comfy.supported_models
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
    calibrated_patcher,
    fingerprints,
    measuring,
    nodes_of,
    package_nodes,
    sample,
    sampler_levels,
    tables,
    tiny_table,
    transformer_of,
)
from comfyui_model_checks import smooth_model
from comfyui_models import build, latent, prompt


class Ratios(Watched):
    """Measured by hooks, for each branch and step: the mean over tokens of |r_t| / |r_{t-1}|, and the model's output
    squared."""

    def __init__(self, patcher, tokens):
        super().__init__(patcher)
        self.tokens, self.previous, self.ratios, self.energies = tokens, {}, {0: [1.0], 1: [1.0]}, {0: [], 1: []}
        self.hooks.append(transformer_of(patcher).register_forward_hook(self.output))

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
        calibration, result, said = calibrated_patcher(patcher, family, cfg=cfg, positive=positive)
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
        np.allclose(file.sigmas, sampler_levels(patcher), atol=1e-6)
        and file.origin == "measured"
        and "gram" in file.statistics
    )
    assert "written; MagCache nodes take it" in said[-1]
    patched, heard = cached_patcher(patcher, mag_ratios="")
    sample(patched, family, cfg=cfg)
    assert f"ratios of {calibration.path.stem} (measured)" in heard[0], heard
    calibration.path.unlink()


def calibration_with_a_sampler(sampler):
    patcher = build("flux", seed=12)
    calibration, result, said = calibrated_patcher(patcher, sampler=sampler)
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
    calibration = measuring.NodeCalibration(said)
    hook = transformer_of(patcher).final_layer.register_forward_pre_hook(interrupt)
    try:
        sample(calibration.on(patcher))
        raise AssertionError("was to be interrupted")
    except comfy.model_management.InterruptProcessingException:
        hook.remove()
    assert set(tables.calibrations_folder().glob("*")) == before, said
    assert calibration.failure == "the run was interrupted", said
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
        calibration, _, said = calibrated_patcher(patcher, **mistake)
        assert sentence in calibration.failure and sentence in said[-1], said
        try:
            package_nodes.MagCacheCalibrationResultNode.execute(calibration, None)
            raise AssertionError("there was nothing to show")
        except RuntimeError as error:
            assert sentence in str(error)
    assert set(tables.calibrations_folder().glob("*")) == before


def planned_speedup():
    """Half of the steps compute, without a calibration; the corrector brings them closer at no further call, where the
    model's output changes smoothly."""
    patcher, _ = smooth_model(comfy.supported_models.WAN21_T2V)
    plain, missed = sample(patcher, "wan"), []
    for corrector in (True, False):
        patched, said = cached_patcher(patcher, corrector=corrector, speedup=2.0, thresholds={})
        missed.append(float((sample(patched, "wan") - plain).norm()))
        assert "no calibration needed" in said[0] and "computes 6 of 12" in said[0] and "--" not in said[0], said
        assert "MagCache: 6 of 12 model calls computed" in said[1], said
    assert missed[0] < missed[1], missed


def loras_have_calibrations_of_their_own():
    """In whatever order the nodes stand, and whether the weights were patched in place by an earlier run or not."""
    patcher = build("flux", seed=15)
    calibration, _, _ = calibrated_patcher(patcher)
    key = "diffusion_model.double_blocks.0.img_mlp.0.weight"
    weight = transformer_of(patcher).double_blocks[0].img_mlp[0].weight
    difference = 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))

    def with_lora(model):
        model = model.clone()
        assert model.add_patches({key: ("diff", (difference,))}, 0.8)
        return model

    def lora_first():
        return cached_patcher(with_lora(patcher), mag_ratios="")

    def lora_last():
        patched, said = cached_patcher(patcher, mag_ratios="")
        return with_lora(patched), said

    patched, said = lora_first()
    sample(patched)
    assert "was measured without the LoRAs of this model" in said[0] and calibration.path.stem in said[0], said
    own, _, _ = calibrated_patcher(with_lora(patcher))
    assert own.path != calibration.path
    for order, path in (
        (lora_first, own.path),
        (lora_last, own.path),
        (lambda: cached_patcher(patcher, mag_ratios=""), calibration.path),
        (lora_last, own.path),
        (lora_first, own.path),
    ):
        patched, said = order()
        sample(patched)
        assert path.stem in said[0], said
    own.path.unlink()
    calibration.path.unlink()


def packed_weights_are_not_unpacked():
    """Scaled fp8 in ComfyUI's own tensors: a fingerprint reads a few values of the storage, once per loaded model."""
    from comfy.quant_ops import QuantizedTensor

    other, _, _ = calibrated_patcher(build("wan", seed=16), "wan", steps=2)
    patcher = build("flux", seed=16)
    layer = transformer_of(patcher).img_in
    packed = QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreFP8Layout")
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    changed = build("flux", seed=16)
    packed = QuantizedTensor.from_float(transformer_of(changed).img_in.weight * 1.5, "TensorCoreFP8Layout", scale=1.0)
    transformer_of(changed).img_in.weight = torch.nn.Parameter(packed, requires_grad=False)
    unpacked, read = [], []
    dequantize, of = QuantizedTensor.dequantize, fingerprints.fingerprint_of
    QuantizedTensor.dequantize = lambda self: unpacked.append(self) or dequantize(self)
    fingerprints.fingerprint_of = lambda weights: read.append(1) or of(weights)
    try:
        made = [
            fingerprints.fingerprints(one, transformer_of(one)) for one in (patcher, changed, patcher, patcher.clone())
        ]
    finally:
        QuantizedTensor.dequantize, fingerprints.fingerprint_of = dequantize, of
    assert not unpacked and len(read) == 2, (len(unpacked), len(read))
    assert made[0] == made[2] == made[3] != made[1]
    other.path.unlink()


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
    uncompiled, _ = cached_patcher(patcher)
    expected = sample(uncompiled, family, cfg=1.0)
    assert torch.allclose(sample(plain, family, cfg=1.0), sample(patcher, family, cfg=1.0), atol=1e-4)
    a_step = backend.attentions // STEPS
    assert a_step * STEPS == backend.attentions > 0
    if order == "compile first":
        both, said = cached_patcher(plain)
    else:
        both, said = cached_patcher(patcher)
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


class SlowBackend(Backend):
    def __call__(self, graph, inputs):
        time.sleep(0.3)  # longer than all steps of a tiny model: counted as a call's own time it would be a loss
        return super().__call__(graph, inputs)


def compiled_runs_report_no_loss(node):
    """Calls that wait for torch.compile are no loss of the cache. In a first run those that compiled are left out of
    what is reported; where every call compiled, the node says so in place of a figure."""
    execute = {
        "CompileModel": lambda model: package_nodes.CompileModelNode.execute(
            model, "default", SlowBackend(), False, False
        ),
        "TorchCompileModel": lambda model: nodes_of("nodes_torch_compile").TorchCompileModel.execute(
            model, SlowBackend()
        ),
    }[node]
    reports = []

    class Spied(caching.NodeCache):
        def begin(self, about):
            made = super().begin(about)
            reports.append(made.run.report)
            return made

    torch._dynamo.reset()
    said = Said()
    patched = Spied(said, thresholds=SETTINGS, mag_ratios=tiny_table()).on(execute(build("wan", seed=17)).args[0])
    for _ in range(2):
        sample(patched, "wan", cfg=1.0)
    first, second = [[lap.compiled for _, _, _, lap, _ in report.calls] for report in reports]
    assert first == [True] + [False] * 11 and not any(second), (first, second)
    for line in (said[1], said[3]):
        saved, speedup = re.search(r"7 reused; transformer [\d.]+ s, (\S+) s saved \((\S+)x\)", line).groups()
        assert float(saved) >= 0 and float(speedup) >= 1, line
    if node == "TorchCompileModel":
        return
    # A run whose only reused call, the last of five, compiles.
    calls = iter(range(100))
    anew, said = cached_patcher(patched, thresholds={**SETTINGS, "retention_ratio": 0.8})
    anew.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL,
        "anew",
        lambda executor, *args, **kwargs: (next(calls) == 5 and torch._dynamo.reset()) or executor(*args, **kwargs),
    )
    sample(anew, "wan", cfg=1.0, steps=5)
    assert "4 of 5 model calls computed, 1 reused" in said[1] and ", 0.00 s saved (1.00x)" in said[1], said
    assert "no time was saved: torch.compile was at work in this run, and the next one tells what it gains" in said[1]
    torch._dynamo.reset()


def compile_options(mode):
    """Each of the node's modes is one that torch.compile takes."""
    torch._dynamo.reset()
    model = nodes.NODE_CLASS_MAPPINGS["CompileModel"].execute(build("flux"), mode, "inductor", False, False).args[0]
    made = model.get_wrappers("apply_model", "torch.compile")
    options = model.model_options["torch_compile_kwargs"]["options"]
    assert len(made) == 1 and (len(options.keys() - {"guard_filter_fn"}) > 0) == (mode != "default"), options
