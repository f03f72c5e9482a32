"""Residuals are gone when the loop of a real pipeline's sampler is over, whoever ended it."""

import copy
import pickle

import pytest
import torch
from tiny_pipelines import FAMILIES, Stopped, run_pipeline

from common.blocks import BlockStack
from common.hosts import HOSTS, class_name
from common.pipeline import enable


@pytest.fixture
def tiny_pipe(home):
    return FAMILIES["flux"]()


@pytest.mark.robustness(
    "Memory and time",
    "`pipe._interrupt`, or an exception in a callback",
    "residuals are gone when the sampler's loop is over, before the VAE decodes",
)
@pytest.mark.parametrize("end", ["complete", "interrupt", "exception"])
def test_nothing_is_kept_when_the_loop_is_over(tiny_pipe, end):
    tiny_pipe, arguments = tiny_pipe
    plain, kept = run_pipeline(tiny_pipe, arguments(1)), []
    cache = enable(tiny_pipe, speedup=2, announce=None)
    (handle,) = cache.handles

    def stop(pipe, step, timestep, tensors):
        kept.append(handle.residuals.bytes)
        if step == 4 and end == "interrupt":
            pipe._interrupt = True
        if step == 4 and end == "exception":
            raise Stopped
        return {}

    unpack, seen = tiny_pipe._unpack_latents, []
    decode = tiny_pipe.vae.decode
    tiny_pipe.vae.decode = lambda *args, **kwargs: seen.append(handle.run) or decode(*args, **kwargs)
    try:
        run_pipeline(tiny_pipe, arguments(1), output_type="pt", callback_on_step_end=stop)
    except Stopped:
        assert end == "exception"
    assert max(kept) > 0 and handle.run is None and handle.residuals.bytes == 0 and tiny_pipe._unpack_latents == unpack
    assert seen == ([] if end == "exception" else [None]), "the VAE decodes with nothing kept"
    assert handle.reports[-1].complete == (end == "complete")
    first = run_pipeline(tiny_pipe, arguments(1))
    cache.disable()
    assert "progress_bar" not in vars(tiny_pipe) and torch.equal(run_pipeline(tiny_pipe, arguments(1)), plain)
    with enable(tiny_pipe, speedup=2, announce=None):
        assert torch.equal(run_pipeline(tiny_pipe, arguments(1)), first)
    assert "progress_bar" not in vars(tiny_pipe)


def pickled_pipe(pipe):
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "`copy.deepcopy`, `pickle` of a pipeline that is enabled, before its first run, in one or after it",
    "the copy has no patch and runs its own weights",
)
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("make", [copy.deepcopy, pickled_pipe])
def test_a_copy_of_a_pipeline_runs_un_cached(tiny_pipe, make, described, monkeypatch):
    tiny_pipe, arguments = tiny_pipe
    plain, copies = run_pipeline(tiny_pipe, arguments(1)), []
    if not described:  # its facts are looked for at the first call
        monkeypatch.delitem(HOSTS, class_name(tiny_pipe.transformer))

    def copied(pipe, step, timestep, tensors):
        if step == 4:
            copies.append(make(pipe))
        return {}

    with enable(tiny_pipe, thresh=5.0, K=1, retention_ratio=0.2, announce=None) as cache:
        copies.append(make(tiny_pipe))
        for twin in copies:
            assert torch.equal(run_pipeline(twin, arguments(1)), plain) and not cache.reports
        for _ in range(2):  # the first is measured
            cached = run_pipeline(tiny_pipe, arguments(1), callback_on_step_end=copied)
        assert cache.reports[-1].reused and not torch.equal(cached, plain)
        for twin in copies:
            assert torch.equal(run_pipeline(twin, arguments(1)), plain) and len(cache.reports) == 2
            with enable(twin, speedup=2, announce=None) as again:  # a copy can be enabled like any pipeline
                run_pipeline(twin, arguments(1))
            assert again.reports[0].reused


@pytest.mark.robustness("Memory and time", "diffusers' Wan in bfloat16", "residuals are bfloat16")
def test_a_residual_has_the_type_of_the_blocks():
    """diffusers' Wan casts to float32 for its final layer alone."""
    pipe, arguments = FAMILIES["wan"]()
    model = pipe.transformer.to(torch.bfloat16)
    stack, seen = BlockStack(model, HOSTS[class_name(model)]), []
    model.blocks[-1].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    forward = model.forward

    def recorded(*args, **kwargs):
        stack.record()
        output = forward(*args, **kwargs)
        seen.append(stack.finish())
        return output

    model.forward = recorded
    run_pipeline(pipe, arguments(1), 2)
    assert seen[0] == (torch.bfloat16, torch.bfloat16) and seen[1].dtype == torch.bfloat16
