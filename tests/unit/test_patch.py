"""The patch on a tiny FLUX: what runs, what is added, what one run leaves to the next. Compared bit for bit."""

import copy
import itertools

import numpy as np
import pytest
import torch
from tiny_runs import BASE, RUNS, SHORT, Broken, Oracle, Tokens, alone, control

from common.blocks import BlockStack
from common.schedule import Settings, magcache_schedule

# What runs, and what comes out


@pytest.mark.parametrize("run", [BASE, RUNS["all"]], ids=["base", "all"])
@pytest.mark.parametrize("off", [{"thresh": 0.0}, {"K": 0}], ids=["thresh", "K"])
def test_off_is_the_untouched_model(model, euler, cached, off, run):
    sampler = euler(model)
    plain = sampler.run(**run)
    with cached(sampler, **off) as handle:
        assert torch.equal(sampler.run(**run), plain)
    assert handle.reports[-1].reused == 0
    assert torch.equal(sampler.run(**run), plain)


@pytest.mark.parametrize("run", [BASE, RUNS["all"]], ids=["base", "all"])
def test_calibration_is_the_untouched_model(model, euler, calibrating, run):
    sampler = euler(model)
    plain = sampler.run(**run)
    with calibrating(sampler) as handle:
        assert torch.equal(sampler.run(**run), plain)
    assert handle.table.steps == run["steps"]


@pytest.mark.parametrize("name", RUNS)
def test_plan_is_what_ran(model, euler, cached, executed, ratios, name):
    sampler, blocks, plans = euler(model), executed(model), []
    with cached(sampler, announce=plans.append) as handle:
        sampler.run(**RUNS[name])
    report = handle.reports[0]
    planned = magcache_schedule(ratios.at(sampler.timesteps.numpy() / 1000), Settings(1.0, 2, 0.2)).strip
    branches = 2 if RUNS[name]["cfg"] else 1
    assert blocks.strip == "".join(letter * branches for letter in planned)
    assert report.schedule.strip == planned and f"  {planned}   # computes" in plans[0] and len(plans) == 1
    assert report.computed == branches * planned.count("#") and report.reused == branches * planned.count(".")
    assert report.complete and not report.unplanned


def test_a_run_that_starts_inside_is_planned_for_its_own_levels(model, euler, cached, executed, ratios):
    sampler, blocks = euler(model), executed(model)
    with cached(sampler) as handle:
        sampler.run(start=5)
    levels = sampler.timesteps.numpy()[5:] / 1000
    assert blocks.strip == magcache_schedule(ratios.at(levels), Settings(1.0, 2, 0.2)).strip == "#..#..#"
    assert handle.reports[0].levels == pytest.approx(levels)


@pytest.mark.parametrize("extra", [None, control], ids=["plain", "control"])
@pytest.mark.parametrize("name", ["base", "cfg", "shift"])
def test_reused_steps_equal_the_oracle(model, euler, cached, extra, name):
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    with cached(sampler) as handle:
        mine = list(sampler.iterate(**RUNS[name], extra=extra))
    reuse = handle.reports[0].schedule.reuse
    plain = list(euler(copy.deepcopy(model)).iterate(**RUNS[name], extra=extra))
    Oracle(reference, reuse)
    theirs = list(reference.iterate(**RUNS[name], extra=extra))
    first = int(np.flatnonzero(reuse)[0])
    assert len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs))
    assert torch.equal(mine[first - 1], plain[first - 1]) and not torch.equal(mine[first], plain[first])


def test_the_residual_is_added_once(model, euler, cached):
    sampler, tokens, seen = euler(model), Tokens(model), []
    model.x_embedder.register_forward_hook(lambda module, args, output: seen.append(output))
    residual = None
    with cached(sampler) as handle:
        for _ in sampler.iterate():
            if handle.reports[0].schedule.reuse[sampler.step]:
                assert torch.equal(tokens.after, seen[-1] + residual)
            else:
                residual = tokens.after - seen[-1]
    assert len(seen) == 13  # twelve steps, and the proof of the first residual


@pytest.mark.parametrize("extra", [None, control], ids=["plain", "control"])
def test_a_residual_of_the_same_step_gives_full_computation(model, euler, host, extra):
    """Each step runs in full and then again from its own residual; the sampler goes on with the second. In float64,
    since a + (b - a) is b up to rounding only."""
    model.double()
    plain = euler(model).run(steps=6, extra=extra)
    stack, computed = BlockStack(model, host), []

    class Twice:
        dtype = model.dtype

        def __call__(self, **kwargs):
            stack.record()
            full = model(**kwargs)[0]
            stack.replace(stack.finish())
            again = model(**kwargs)[0]
            stack.restore()
            computed.append(full)
            torch.testing.assert_close(again, full, rtol=0, atol=1e-12)
            return (again,)

    torch.testing.assert_close(euler(Twice()).run(steps=6, extra=extra), plain, rtol=0, atol=1e-10)
    assert len(computed) == 6


# State belongs to one run


def test_a_run_after_another_equals_the_run_alone(model, euler, cached):
    results = {name: alone(model, euler, cached, **run) for name, run in RUNS.items()}
    sampler = euler(model)
    for first, second in itertools.product(RUNS, repeat=2):
        with cached(sampler) as handle:
            assert torch.equal(sampler.run(**RUNS[first]), results[first])
            assert torch.equal(sampler.run(**RUNS[second]), results[second]), f"{second} after {first}"
        assert [report.unplanned for report in handle.reports] == [{}, {}]


@pytest.mark.robustness(
    "Threads, copies and shared models",
    "an exception in the model, at any call",
    "nothing stays on the model; the next run equals the run alone",
)
@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
@pytest.mark.parametrize("place", ["transformer_blocks.1", "norm_out"])
def test_a_run_after_an_exception_equals_the_run_alone(model, euler, cached, cfg, place):
    """At every call of the model: in a block where it computes, in front of the final layer where it reuses as well."""
    first = {**SHORT, "cfg": cfg}
    after = {"same": first, "other": {**SHORT, "cfg": not cfg, "size": 48}, "tail": {**SHORT, "start": 2}}
    results = {name: alone(model, euler, cached, **run) for name, run in after.items()}
    sampler, keys, raised = euler(model), set(model.__dict__) | {"forward"}, 0

    for call, (name, run) in itertools.product(range(16 if cfg else 8), after.items()):
        calls, handle = itertools.count(), cached(sampler)

        def trip(module, args, calls=calls, call=call):
            if next(calls) == call:
                raise Broken

        hook = model.get_submodule(place).register_forward_pre_hook(trip)
        try:
            sampler.run(**first)
        except Broken:
            raised += 1
        hook.remove()
        assert handle.residuals.bytes == 0 and set(model.__dict__) == keys
        assert torch.equal(sampler.run(**run), results[name]), f"{name} after a break in call {call}"
        assert not handle.reports[-1].unplanned
        handle.remove()
    computed = 3 if place.startswith("transformer") else 8
    assert raised == len(after) * computed * (2 if cfg else 1)


@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_a_run_after_the_sampler_broke_off_equals_the_run_alone(model, euler, cached, cfg):
    """No exception reaches the model. The next run starts at the top, where the first stopped, where it would have gone
    on, or lower."""
    tails = {start: alone(model, euler, cached, **SHORT, start=start) for start in range(4)}
    tails |= {start: euler(model).run(**SHORT, start=start) for start in range(4, 8)}  # too short to reuse
    others = (
        RUNS["all"],
        {**SHORT, "cfg": lambda step: step >= 4},
    )  # guidance begins where another run's residual may be
    results = [alone(model, euler, cached, **run) for run in others]
    sampler = euler(model)
    for stop in range(8):
        for start in sorted({0, stop, *range(stop + 1, 8)}):
            with cached(sampler):
                *_, _ = itertools.islice(sampler.iterate(**{**SHORT, "cfg": cfg}), stop + 1)
                assert torch.equal(sampler.run(**SHORT, start=start), tails[start]), (
                    f"from {start} after a stop at {stop}"
                )
        for run, result in zip(others, results):
            with cached(sampler):
                *_, _ = itertools.islice(sampler.iterate(**{**SHORT, "cfg": cfg}), stop + 1)
                assert torch.equal(sampler.run(**run), result)


def test_a_cancel_between_the_two_calls_of_a_step(model, euler, cached):
    """The conditional call of a step was made, its unconditional one was not."""
    run = {**SHORT, "cfg": True}
    result = alone(model, euler, cached, **run)
    sampler = euler(model)
    for stop in range(8):

        def cancel(step, branch, stop=stop):
            if (step, branch) == (stop, 1):
                raise Broken
            return {}

        with cached(sampler):
            with pytest.raises(Broken):
                sampler.run(**run, extra=cancel)
            assert torch.equal(sampler.run(**run), result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cfg", [False, True], ids=["plain", "cfg"])
def test_many_steps_in_low_precision(model, euler, cached, executed, ratios, dtype, cfg):
    """The timestep comes in the model's dtype: in bfloat16 neighbouring levels of 50 steps may round to one number."""
    if dtype == torch.float16 and torch.__version__ < "2.3":
        pytest.skip("torch 2.2 computes no float16 on a CPU")
    model.to(dtype)
    sampler, blocks = euler(model), executed(model)
    with cached(sampler, thresh=0.1, K=3) as handle:
        sampler.run(steps=50, size=16, cfg=cfg)
    planned = magcache_schedule(ratios.at(sampler.timesteps.numpy() / 1000), Settings(0.1, 3, 0.2)).strip
    assert len(handle.reports) == 1 and not handle.reports[0].unplanned and "." in planned
    assert blocks.strip == "".join(letter * (2 if cfg else 1) for letter in planned)


def test_two_models_interleaved_equal_each_alone(model, make_model, euler, cached):
    other = make_model(seed=1)
    results = alone(model, euler, cached, **RUNS["cfg"]), alone(other, euler, cached, **RUNS["size"])
    first, second = euler(model), euler(other)
    with cached(first) as one, cached(second) as two:
        *_, latents = zip(first.iterate(**RUNS["cfg"]), second.iterate(**RUNS["size"]))
    assert torch.equal(latents[0], results[0]) and torch.equal(latents[1], results[1])
    assert (one.reports[0].reused, two.reports[0].reused) == (14, 7)


def test_guidance_for_a_part_of_the_run(model, euler, cached, executed):
    late = {**BASE, "cfg": lambda step: step >= 6}  # ##..#.+.#..#., where + is the first step with guidance
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    with cached(sampler) as handle:
        latents = sampler.run(**late)
    report = handle.reports[0]
    assert report.schedule.strip == "##..#..#..#."
    assert blocks.strip == "##..#." + ".#" + "##" + ".." + ".." + "##" + ".."
    assert (
        report.unplanned == {"no residual of this branch yet": 1}
        and "1 computed unplanned (no residual" in report.line()
    )
    assert report.complete
    Oracle(reference, report.schedule.reuse)
    assert torch.equal(latents, reference.run(**late))


def test_guidance_that_ends_early(model, euler, cached, executed):
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    early = {**BASE, "cfg": lambda step: step < 6}
    with cached(sampler) as handle:
        latents = sampler.run(**early)
    Oracle(reference, handle.reports[0].schedule.reuse)
    assert torch.equal(latents, reference.run(**early))
    assert handle.reports[0].complete and handle.residuals.bytes == 0
    assert blocks.strip == "####....##.." + ".#..#."


def test_guidance_that_pauses(model, euler, cached, executed):
    """The unconditional residual is from step 1 when step 5 is to reuse that of step 4."""
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    blocks = executed(sampler.model)
    on_and_off = {**BASE, "cfg": lambda step: step != 4}
    with cached(sampler) as handle:
        latents = sampler.run(**on_and_off)
    Oracle(reference, handle.reports[0].schedule.reuse)
    assert torch.equal(latents, reference.run(**on_and_off))
    assert blocks.strip == "####...." + "#" + ".#.." + "##....##.."
    assert handle.reports[0].unplanned == {"no residual of this branch yet": 1}


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "the batch grows in the middle of a run",
    "the next call computes",
)
def test_a_batch_that_grows_in_the_middle_of_a_run(model, euler, cached, executed):
    """A residual of another shape would be added to the wrong picture, or broadcast."""

    class Doubled:
        dtype = model.dtype

        def __call__(self, **kwargs):
            if sampler.step >= 5:
                kwargs |= {
                    name: torch.cat([kwargs[name]] * 2)
                    for name in ("hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states")
                }
            return (model(**kwargs)[0][:1],)

    sampler, blocks = euler(Doubled()), executed(model)
    with cached(sampler, model) as handle:
        sampler.run()
    assert handle.reports[0].schedule.strip == "##..#..#..#." and blocks.strip == "##..##.#..#."
    ((why, calls),) = handle.reports[0].unplanned.items()
    assert why == "the conditioning changed (guidance, pooled_projections, encoder_hidden_states)" and calls == 1
