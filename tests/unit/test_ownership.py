"""Who owns a call: several threads on one model, removal under way, copies and pickles of a patched model."""

import copy
import functools
import io
import pickle
import threading

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from offloading import sequential, whole_model
from tiny_runs import SHORT, alone, class_forward

from common.errors import MagCacheError
from common.first_run import MeasuredFirst
from common.schedule import Settings

RUNS = [{**SHORT, "prompt": 0}, {**SHORT, "prompt": 1, "cfg": True}, {**SHORT, "prompt": 2, "size": 48}]


def together(*tasks):
    """Run the tasks in threads of their own; returns their results, raises what one of them raised."""
    results, errors = [None] * len(tasks), []

    def run(index, task):
        try:
            results[index] = task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=one) for one in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Samplers:
    """One sampler a run on one model, and a function that gives each thread the timesteps of its own sampler."""

    def __init__(self, model, euler, runs):
        self.model, self.samplers, self.by_thread = model, [euler(model) for _ in runs], {}
        self.runs = runs

    @property
    def timesteps(self):
        return self.by_thread[threading.get_ident()].timesteps

    def tasks(self):
        def task(sampler, run):
            def draw():
                self.by_thread[threading.get_ident()] = sampler
                return sampler.run(**run)

            return draw

        return [task(*one) for one in zip(self.samplers, self.runs)]


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "several threads use one model, each with its own sampler",
    "their calls take turns; each thread has its own run; each result equals that run alone, bit for bit",
)
def test_each_thread_has_a_run_of_its_own(model, euler, cached):
    results = [alone(model, euler, cached, **run) for run in RUNS]
    plain, keys = [euler(model).run(**run) for run in RUNS], list(model.__dict__)
    samplers = Samplers(model, euler, RUNS)
    with cached(samplers) as handle:
        for _ in range(3):
            assert all(map(torch.equal, together(*samplers.tasks()), results))
    assert len(handle.reports) == 9 and all(report.complete and not report.unplanned for report in handle.reports)
    assert class_forward(model) and list(model.__dict__) == keys and handle.residuals.bytes == 0
    assert all(map(torch.equal, together(*samplers.tasks()), plain))


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "several pipelines on one model, and the patch knows only one pipeline's scheduler",
    "as above, if the samplers have the same steps",
)
def test_threads_that_share_one_samplers_timesteps(model, euler, cached):
    """The patch was told of one pipeline's scheduler; another pipeline on the same model has its own, alike."""
    runs = [{**SHORT, "prompt": prompt} for prompt in range(3)]
    results = [alone(model, euler, cached, **run) for run in runs]
    first = euler(model)
    first.run(**runs[0])
    others = [euler(model) for _ in runs]
    with cached(first) as handle:
        drawn = together(*(lambda one=one, run=run: one.run(**run) for one, run in zip(others, runs)))
    assert all(map(torch.equal, drawn, results)) and sum(report.reused for report in handle.reports) == 15


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "several threads during a calibration",
    "one is calibrated, the others run un-cached",
)
def test_one_thread_measures_and_the_others_run_as_they_are(model, euler, calibrating):
    plain = [euler(model).run(**run) for run in RUNS]
    samplers = Samplers(model, euler, RUNS)
    try:
        with calibrating(samplers) as handle:
            assert all(map(torch.equal, together(*samplers.tasks()), plain))
    except MagCacheError as error:  # a second run, of another size, began after the first was complete
        assert "runs of one kind" in str(error)
    assert handle.table.steps == 8 and handle.table.statistics["runs"] == 1


def test_one_thread_measures_its_first_run_and_all_are_cached_after_it(model, euler, host):
    runs = [{**SHORT, "prompt": prompt} for prompt in range(3)]
    plain = [euler(model).run(**run) for run in runs]
    samplers, begun = Samplers(model, euler, runs), threading.Barrier(3, timeout=60)
    handle = MeasuredFirst(
        [model], host, lambda: samplers.timesteps, lambda levels: None, Settings(1.0, 2, 0.2), "tiny", None, {}
    )

    def drawn(sampler, run):
        samplers.by_thread[threading.get_ident()] = sampler
        steps = sampler.iterate(**run)
        next(steps)
        begun.wait()  # none is complete before all have begun
        *_, latents = steps
        return latents

    tasks = [functools.partial(drawn, *one) for one in zip(samplers.samplers, runs)]
    with handle:
        assert all(map(torch.equal, together(*tasks), plain))
        (first,) = handle.reports
        assert first.measuring == "this run computes every step; the next one is faster" and first.complete
        again = together(*tasks)
    assert len(handle.reports) == 4 and all(report.reused and report.complete for report in handle.reports[1:])
    assert not any(map(torch.equal, again, plain)) and class_forward(model)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "`remove()`, `paused()` or `end_run()` from another thread",
    "takes effect between two calls; the run goes on",
)
@pytest.mark.parametrize("what", ["remove", "end_run", "paused"])
def test_a_server_cancels_from_another_thread(model, euler, cached, what):
    """The run goes on, un-cached or from a new residual, and nothing stays on the model."""
    plain, keys = euler(model).run(**SHORT), list(model.__dict__)
    result = alone(model, euler, cached, **SHORT)
    for step in range(8):
        sampler, reached, go_on = euler(model), threading.Event(), threading.Event()

        def inside(module, args, sampler=sampler, step=step, reached=reached, go_on=go_on):
            if sampler.step == step:  # the other thread asks while this call is under way
                reached.set()
                go_on.wait(0.05)

        hook = model.norm_out.register_forward_pre_hook(inside)

        handle = cached(sampler)

        def cancel(handle=handle, reached=reached, go_on=go_on):
            reached.wait()
            if what == "paused":
                with handle.paused():
                    pass
            else:
                getattr(handle, what)()
            go_on.set()

        latents, _ = together(lambda sampler=sampler: sampler.run(**SHORT), cancel)
        hook.remove()
        assert torch.isfinite(latents).all()
        if what != "remove":
            assert torch.equal(sampler.run(**SHORT), result)
            handle.remove()
        assert class_forward(model) and list(model.__dict__) == keys
        assert torch.equal(sampler.run(**SHORT), plain)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "a thread ends in the middle of a run",
    "the next run frees its residuals",
)
def test_a_thread_that_ended_keeps_nothing(model, euler, cached):
    sampler = euler(model)
    with cached(sampler) as handle:

        def broken_off():
            for _ in sampler.iterate(**SHORT):
                if sampler.step == 2:
                    return

        together(broken_off)
        (left,) = handle.samplings.values()
        assert left.run.residuals.bytes > 0
        sampler.run(**SHORT)
        assert left.run.residuals.bytes == 0 and len(handle.samplings) == 1


# Copies


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "`copy.deepcopy`, `pickle`, `torch.save` of a patched model",
    "the copy has no patch and runs its own weights",
)
@pytest.mark.parametrize("make", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("when", ["before the run", "in the run", "after removal"])
def test_a_copy_runs_its_own_weights_un_cached(model, euler, cached, executed, make, when):
    sampler, handle = euler(model), cached(euler(model))
    handle.timesteps = lambda: sampler.timesteps
    if when != "before the run":
        for _ in sampler.iterate(**SHORT):
            if sampler.step == 3 and when == "in the run":
                break
    if when == "after removal":
        handle.remove()
    twin = make(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.01)
    other = copy.deepcopy(model)
    other.__dict__.pop("forward", None)
    other.load_state_dict(twin.state_dict())
    expected, blocks = euler(other).run(**SHORT), executed(twin)
    reports = len(handle.reports)
    assert torch.equal(euler(twin).run(**SHORT), expected) and blocks.strip == "#" * 8
    assert len(handle.reports) == reports
    handle.remove()
    assert torch.equal(euler(twin).run(**SHORT), expected)
    twin_sampler = euler(twin)
    with cached(twin_sampler) as again:  # a copy can be patched like any model
        twin_sampler.run(**SHORT)
    assert again.reports[0].reused == 5


@pytest.mark.robustness("Threads, copies and shared models", "`quantize_dynamic` of a patched model", "as above")
def test_quantized_copies_run_their_own_weights(model, euler, cached, executed):
    sampler = euler(model)
    with cached(sampler):
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        assert any("quantized" in type(module).__module__ for module in quantized.modules())
        sampler.run(**SHORT)
        blocks = executed(quantized)
        twin = euler(quantized)
        twin.model = with_dtype(quantized)
        latents = twin.run(**SHORT)
        assert blocks.strip == "#" * 8
    apart = (latents - euler(model).run(**SHORT)).norm() / latents.norm()
    assert 0 < apart < 0.5


def with_dtype(model):
    """Quantised weights have none."""

    class Called:
        dtype = torch.float32

        def __call__(self, **kwargs):
            return model(**kwargs)

    return Called()


# On again


@pytest.mark.robustness(
    "When nothing would be cached",
    "`with handle:` a second time, or nested",
    "cached again; the outermost block ends it",
)
def test_a_handle_entered_again_caches_again(model, euler, cached):
    result, plain = alone(model, euler, cached, **SHORT), euler(model).run(**SHORT)
    sampler = euler(model)
    handle = cached(sampler)
    for _ in range(3):
        with handle:
            assert torch.equal(sampler.run(**SHORT), result)
        assert class_forward(model) and torch.equal(sampler.run(**SHORT), plain)


@pytest.mark.robustness("When nothing would be cached", "`with handle:` a second time, or nested")
def test_nested_blocks_end_with_the_outermost(model, euler, cached):
    result = alone(model, euler, cached, **SHORT)
    sampler = euler(model)
    with cached(sampler) as handle:
        with handle:
            assert torch.equal(sampler.run(**SHORT), result)
        assert torch.equal(sampler.run(**SHORT), result)
    assert class_forward(model)


@pytest.mark.robustness(
    "When nothing would be cached",
    "offload enabled before the patch, hooks renewed after each image",
    "every image is cached",
)
@pytest.mark.parametrize("offload", [sequential, whole_model])
def test_offload_before_the_patch_renewed_after_each_image(model, euler, cached, offload):
    """Pipelines take accelerate's hooks off at the end of a call, and on again, with what lies beneath them."""
    result, plain = alone(model, euler, cached, **SHORT), euler(model).run(**SHORT)
    sampler = euler(model)
    offload(model)
    handle = cached(sampler)
    for _ in range(3):
        assert torch.equal(sampler.run(**SHORT), result)
        remove_hook_from_module(model, recurse=True)
        offload(model)
    assert [report.reused for report in handle.reports] == [5, 5, 5]
    handle.remove()
    assert torch.equal(sampler.run(**SHORT), plain) and len(handle.reports) == 3
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(sampler.run(**SHORT), plain)
