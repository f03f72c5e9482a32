"""What only a GPU shows, on real pipelines of diffusers with tiny random weights in bfloat16; skipped without CUDA.

python -m pytest tests/gpu && python benchmarks/speed.py
"""

import contextlib
import gc

import pytest
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from diffusers.hooks import apply_group_offloading
from tiny_pipelines import flux, wan

from common.hosts import host_of
from common.patch import magcache_calibration, magcache_forward
from common.ranks import broadcast_from_writer
from common.ratios import flow_sigmas
from common.schedule import Settings
from common.tables import RatioTable

DEVICE, STEPS = "cuda", 12
TABLE = RatioTable(
    name="tiny",
    origin="measured",
    sigmas=tuple(flow_sigmas(28, 3.0)),
    mag_ratios={"cond": [1.0] + [0.98] * 27, "uncond": [1.0] + [0.97] * 27},
)
REUSES, OFF = Settings(1.0, 2, 0.2), Settings(1.0, 0, 0.2)


class GpuSubject:
    """A pipeline, the calls that ran its blocks, and what to put on its transformer."""

    def __init__(self, make):
        self.pipe, self.arguments = make()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.to(DEVICE, torch.bfloat16)
        self.model, self.computed = self.pipe.transformer, 0
        self.host = host_of(self.model)
        first = getattr(self.model, self.host.blocks[0])[0]
        first.register_forward_pre_hook(self.count)

    @torch.compiler.disable
    def count(self, *_):
        self.computed += 1

    def run(self, seed=0):
        given = {
            name: value.to(DEVICE, torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in self.arguments(seed).items()
        }
        generator = torch.Generator().manual_seed(seed)
        result = self.pipe(**given, num_inference_steps=STEPS, generator=generator, output_type="latent")
        return result[0].float().cpu()

    def offload(self, **how):
        devices = {"onload_device": torch.device(DEVICE), "offload_device": torch.device("cpu")}
        apply_group_offloading(self.model, **devices, use_stream=True, **how)

    def cached(self, settings=REUSES, **options):
        sampler = self.pipe.scheduler
        return magcache_forward(
            self.model, self.host, TABLE, settings, lambda: sampler.timesteps, announce=None, **options
        )


@pytest.fixture(params=[flux, wan], ids=lambda make: make.__name__)
def gpu_subject(request):
    yield GpuSubject(request.param)
    torch._dynamo.reset()


def test_skipping_nothing_changes_nothing(gpu_subject):
    plain = gpu_subject.run()
    with gpu_subject.cached(OFF) as handle:
        assert torch.equal(gpu_subject.run(), plain)
    assert handle.reports[0].reused == 0
    assert torch.equal(gpu_subject.run(), plain)


def test_reused_calls_run_no_block(gpu_subject):
    plain, calls = gpu_subject.run(), gpu_subject.computed
    with gpu_subject.cached() as handle:
        cached = gpu_subject.run()
    report = handle.reports[0]
    assert gpu_subject.computed - calls == report.computed < calls and report.reused == calls - report.computed
    assert not torch.equal(cached, plain) and torch.isfinite(cached).all()


def test_residuals_kept_on_the_cpu_are_the_same(gpu_subject):
    results = []
    for device in (None, "cpu"):
        with gpu_subject.cached(device=device) as handle:
            results.append(gpu_subject.run())
        assert handle.reports[0].reused > 0
    assert torch.equal(*results)


def test_seconds_are_those_of_events_that_a_run_does_not_wait_for(gpu_subject, monkeypatch):
    gpu_subject.run()  # warms up, which synchronises

    def waited(*_):
        raise AssertionError("the run waited for the GPU")

    with gpu_subject.cached() as handle:
        with monkeypatch.context() as patched:
            patched.setattr(torch.cuda.Event, "synchronize", waited)
            patched.setattr(torch.cuda, "synchronize", waited)
            gpu_subject.run()
        report = handle.reports[0]
    assert all(lap() > 0 for kind in ("computed", "reused") for lap in report.laps(kind))
    assert "s saved" in report.line()


def test_memory_is_given_back(gpu_subject):
    gpu_subject.run()
    gc.collect()
    before = torch.cuda.memory_allocated()
    with gpu_subject.cached() as handle:
        gpu_subject.run()
        gc.collect()
        assert torch.cuda.memory_allocated() == before
    assert handle.reports[0].peak_bytes > 0
    with gpu_subject.cached(), contextlib.suppress(KeyboardInterrupt):
        gpu_subject.pipe(
            **{name: value for name, value in gpu_subject.arguments(0).items() if not torch.is_tensor(value)},
            **{
                name: value.to(DEVICE, torch.bfloat16)
                for name, value in gpu_subject.arguments(0).items()
                if torch.is_tensor(value)
            },
            num_inference_steps=STEPS,
            output_type="latent",
            callback_on_step_end=interrupt,
        )
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def interrupt(pipe, step, timestep, tensors):
    if step == STEPS // 2:
        raise KeyboardInterrupt
    return tensors


@pytest.mark.parametrize("order", ["offload first", "patch first"])
def test_group_offload_with_streams(gpu_subject, order):
    with gpu_subject.cached():
        expected = gpu_subject.run()

    def offload():
        gpu_subject.offload(offload_type="block_level", num_blocks_per_group=1)

    if order == "offload first":
        offload()
    with gpu_subject.cached() as handle:
        if order == "patch first":
            offload()
        assert torch.equal(gpu_subject.run(), expected)
        assert torch.equal(gpu_subject.run(), expected)
    assert [report.reused > 0 for report in handle.reports] == [True, True]


def test_layers_that_are_fetched_one_after_the_other(gpu_subject):
    """A layer is fetched while the one before it runs, so that the final layer may not run without the blocks: that is
    found out at the first call, and the output is predicted instead."""
    plain = gpu_subject.run()
    gpu_subject.offload(offload_type="leaf_level")
    with gpu_subject.cached(OFF):
        assert torch.equal(gpu_subject.run(), plain)
    with gpu_subject.cached() as handle:
        first, second = gpu_subject.run(), gpu_subject.run()
    assert torch.equal(first, second) and [report.reused > 0 for report in handle.reports] == [True, True]
    report = handle.reports[0]
    assert report.verified or "output is predicted instead" in report.notes[0]
    assert (first - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "model"])
def test_compiled_on_a_gpu(gpu_subject, options, whole):
    with gpu_subject.cached():
        expected = gpu_subject.run()
    gpu_subject.model.compile(**options) if whole else gpu_subject.model.compile_repeated_blocks(**options)
    try:
        gpu_subject.run()
    except RuntimeError as error:
        if "CUDAGraphs" not in str(error):
            raise
        pytest.skip("compiled so, this model does not run un-cached either")
    with gpu_subject.cached() as handle:
        first, second = gpu_subject.run(), gpu_subject.run()
    assert torch.equal(first, second) and handle.reports[1].reused > 0
    # Other kernels, in bfloat16: near, and nearer than what skipping changes.
    assert (first - expected).norm() < 0.05 * expected.norm()


def test_layerwise_casting_to_fp8(gpu_subject):
    gpu_subject.model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    plain = gpu_subject.run()
    with gpu_subject.cached(OFF):
        assert torch.equal(gpu_subject.run(), plain)
    with gpu_subject.cached() as handle:
        cached = gpu_subject.run()
    assert handle.reports[0].reused > 0 and torch.isfinite(cached).all()


def test_nccl_with_one_rank_measures_and_plans_what_no_group_does(gpu_subject, tmp_path):
    def measured():
        sampler = gpu_subject.pipe.scheduler
        with magcache_calibration(gpu_subject.model, gpu_subject.host, lambda: sampler.timesteps, "tiny") as handle:
            gpu_subject.run()
        return handle

    alone = measured()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        grouped = measured()
        assert broadcast_from_writer(lambda: "found") == "found"
    finally:
        dist.destroy_process_group()
    assert [handle.reports[0].complete for handle in (alone, grouped)] == [True, True]
    for branch, ratios in alone.table.mag_ratios.items():
        assert grouped.table.mag_ratios[branch] == pytest.approx(ratios, abs=1e-5)
