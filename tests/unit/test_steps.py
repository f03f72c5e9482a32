"""Steps and branches told from noise levels and latents, in the orders in which samplers call a model."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler

from common.expert import level_tolerance
from common.ratios import flow_sigmas
from common.steps import Call, StepTracker, same

torch.set_num_threads(1)
EXACT = 1e-6


def fresh():
    return torch.randn(2, 3)


def follow(levels, calls, tolerance=EXACT):
    """[(step, branch), ...] of one run's calls (level, latent); None where a new run would begin."""
    tracker = StepTracker(levels, calls[0][0], tolerance)
    observed = [tracker.observe(level, latent, tolerance) for level, latent in calls]
    return [call and (call.step, call.branch) for call in observed]


def expected_branches(counts):
    """What a sampler with counts[i] branches at step i should be told."""
    return [(step, branch) for step, count in enumerate(counts) for branch in range(count)]


def sequential_calls(levels, counts, again):
    """counts[i] calls at step i; again(latent): what the later branches are given."""
    calls = []
    for level, count in zip(levels, counts):
        latent = fresh()
        calls += [(level, latent if branch == 0 else again(latent)) for branch in range(count)]
    return calls


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_call_a_step(steps, batch):
    """No guidance, or both branches in one batched call."""
    levels = flow_sigmas(steps, 3)
    assert follow(levels, [(level, torch.randn(batch, 3)) for level in levels]) == expected_branches([1] * steps)


SAME_OR_COPY = pytest.mark.parametrize(
    "again", [lambda latent: latent, torch.clone, lambda latent: latent[:]], ids=["same tensor", "equal copy", "view"]
)


@SAME_OR_COPY
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 28])
def test_sequential_guidance(steps, branches, again):
    levels = flow_sigmas(steps, 3)
    counts = [branches] * steps
    assert follow(levels, sequential_calls(levels, counts, again)) == expected_branches(counts)


@SAME_OR_COPY
def test_steps_with_guidance_for_a_part_of_the_run(again):
    levels = flow_sigmas(28, 3)
    counts = [2 if 5 <= step <= 15 else 1 for step in range(28)]
    assert follow(levels, sequential_calls(levels, counts, again)) == expected_branches(counts)


def test_latent_changed_in_place():
    levels, latent = flow_sigmas(10, 3), fresh()
    tracker = StepTracker(levels, 1.0, EXACT)
    for step, level in enumerate(levels):
        assert [tracker.observe(level, latent, EXACT) for _ in range(2)] == [Call(step, 0), Call(step, 1)]
        latent += 1


@pytest.mark.parametrize("branches", [1, 2])
def test_heun_that_lists_its_second_evaluations(branches):
    """diffusers: the list has every evaluation, so each is a step."""
    listed = [1.0, 0.9, 0.9, 0.7, 0.7, 0.4, 0.4]
    counts = [branches] * len(listed)
    assert follow(listed, sequential_calls(listed, counts, torch.clone)) == expected_branches(counts)


def diffusers_heun(steps, start=0):
    """Levels listed and calls made by diffusers' own scheduler, from step `start` of `steps` on."""
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(start * scheduler.order)
    latent, calls = fresh(), []
    for timestep in scheduler.timesteps[start * scheduler.order :]:
        calls.append((float(timestep) / 1000, latent))
        latent = scheduler.step(-latent + 0.1 * fresh(), timestep, latent).prev_sample
    return scheduler.timesteps.double().numpy() / 1000, calls


def test_heun_of_diffusers():
    levels, calls = diffusers_heun(8)
    assert len(levels) == len(calls) == 15
    assert follow(levels, calls) == expected_branches([1] * 15)


@pytest.mark.parametrize("start", [1, 3, 6])
def test_heun_of_diffusers_from_the_middle(start):
    levels, calls = diffusers_heun(8, start)
    steps = [call and call[0] for call in follow(levels, calls)]
    assert None not in steps and steps[-1] - steps[1] == len(calls) - 2


def k_diffusion_heun(levels, branches):
    """(calls, steps): each step evaluates at its level and at the next one, which is not listed twice; the last step
    once."""
    calls, steps = [], []
    for step in range(len(levels)):
        for evaluation in range(1 if step == len(levels) - 1 else 2):
            calls += sequential_calls([levels[step + evaluation]], [branches], torch.clone)
            steps += [(step + evaluation, branch) for branch in range(branches)]
    return calls, steps


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_heun_that_does_not_list_them(steps, branches):
    """k-diffusion: the second evaluation is at the next step's level, and so is the first of the next step."""
    levels = flow_sigmas(steps, 3)
    calls, expected = k_diffusion_heun(levels, branches)
    assert follow(levels, calls) == expected


@pytest.mark.parametrize("branches", [1, 2])
def test_evaluations_between_levels(branches):
    """k-diffusion's dpm_2: one at the step's level, one half-way to the next. Both belong to the step."""
    levels, calls, expected = flow_sigmas(12, 3), [], []
    for step, level in enumerate(levels):
        following = levels[step + 1] if step + 1 < len(levels) else 0
        for evaluation in (level, (level * following) ** 0.5 if following else level / 2):
            calls += sequential_calls([evaluation], [branches], torch.clone)
            expected += [(step, branch) for branch in range(branches)]
    assert follow(levels, calls) == expected


@pytest.mark.parametrize("steps", [2, 28])
def test_start_in_the_middle(steps):
    levels = flow_sigmas(steps, 3)
    for start in range(steps):
        tracker = StepTracker(levels, levels[start], EXACT)
        assert tracker.levels.tolist() == levels[start:].tolist()
        counts = [2] * (steps - start)
        assert follow(levels, sequential_calls(levels[start:], counts, torch.clone)) == expected_branches(counts)


def test_start_between_levels_is_the_step_above():
    assert StepTracker([1.0, 0.8, 0.5], 0.79, EXACT).levels.tolist() == [0.8, 0.5]
    assert StepTracker([1.0, 0.8, 0.5], 0.81, EXACT).levels.tolist() == [1.0, 0.8, 0.5]
    assert StepTracker([1.0, 0.8, 0.5], 0.1, EXACT).levels.tolist() == [0.5]
    assert StepTracker([0.9, 0.8, 0.5], 1.0, EXACT).levels.tolist() == [0.9, 0.8, 0.5]


def tracker_at(step, levels):
    tracker = StepTracker(levels, levels[0], EXACT)
    for level in levels[: step + 1]:
        call = tracker.observe(level, fresh(), EXACT)
    assert call == Call(step, 0)
    return tracker


@pytest.mark.parametrize("step", [2, 5, 27])
def test_an_earlier_level_is_a_new_run(step):
    levels = flow_sigmas(28, 3)
    for earlier in {0, 1, step - 1} & set(range(step)):
        assert tracker_at(step, levels).observe(levels[earlier], fresh(), EXACT) is None
    assert tracker_at(step, levels).observe((levels[0] + levels[1]) / 2, fresh(), EXACT) is None
    assert tracker_at(step, levels).observe(1.5, fresh(), EXACT) is None


@pytest.mark.parametrize(
    "other",
    [flow_sigmas(20, 3), flow_sigmas(28, 1), flow_sigmas(50, 3)[10:]],
    ids=["fewer steps", "other shift", "from the middle"],
)
def test_a_run_at_other_levels_is_a_new_run(other):
    """After a whole run, and after one that was interrupted."""
    levels = flow_sigmas(28, 3)
    assert tracker_at(27, levels).observe(other[0], fresh(), EXACT) is None
    assert tracker_at(14, levels).observe(other[0], fresh(), EXACT) is None


def test_a_run_that_breaks_off_at_its_first_step_begins_there_again():
    assert tracker_at(0, flow_sigmas(28, 3)).observe(1.0, fresh(), EXACT) == Call(0, 0)


def test_a_jump_over_levels_is_a_new_run():
    levels = flow_sigmas(28, 3)
    for step in (0, 5, 25):
        for later in {step + 2, 27}:
            assert tracker_at(step, levels).observe(levels[later], fresh(), EXACT) is None
        assert tracker_at(step, levels).observe((levels[step + 1] + levels[step + 2]) / 2, fresh(), EXACT) is None
    assert tracker_at(27, levels).observe(0.0, fresh(), EXACT) is None


def rounded_levels(levels, dtype):
    """(levels as a model gets them in its own dtype, tolerance): timestep cast, then divided by 1000, as in
    diffusers."""
    timesteps = [torch.tensor(1000 * level, dtype=torch.float32).to(dtype) / 1000 for level in levels]
    return [float(timestep) for timestep in timesteps], level_tolerance(timesteps[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [1, 3, 6])
@pytest.mark.parametrize("steps", [28, 200])
def test_rounded_timesteps(steps, shift, dtype):
    levels = flow_sigmas(steps, shift)
    given, tolerance = rounded_levels(levels, dtype)
    if steps == 200 and shift > 1 and dtype == torch.bfloat16:
        assert len(set(given)) < 200  # several steps come with one timestep
    for counts in ([1] * steps, [2] * steps, [2 if 5 <= step <= 15 else 1 for step in range(steps)]):
        assert follow(levels, sequential_calls(given, counts, torch.clone), tolerance) == expected_branches(counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_timesteps_from_the_middle(dtype):
    levels = flow_sigmas(28, 3)
    given, tolerance = rounded_levels(levels, dtype)
    for start in range(28):
        counts = [2] * (28 - start)
        assert follow(levels, sequential_calls(given[start:], counts, torch.clone), tolerance) == expected_branches(
            counts
        )


def test_colliding_timesteps_from_the_middle():
    levels = flow_sigmas(200, 3)
    given, tolerance = rounded_levels(levels, torch.bfloat16)
    for start in range(200):
        steps = follow(levels, sequential_calls(given[start:], [1] * (200 - start), torch.clone), tolerance)
        assert None not in steps, start


def test_rounded_levels_are_no_new_run_and_new_runs_are_seen():
    """The tolerance of a coarse dtype must not hide that a run begins again."""
    levels = flow_sigmas(28, 3)
    given, tolerance = rounded_levels(levels, torch.bfloat16)
    for step in range(2, 28):
        tracker = StepTracker(levels, given[0], tolerance)
        for level in given[: step + 1]:
            tracker.observe(level, fresh(), tolerance)
        assert tracker.observe(given[0], fresh(), tolerance) is None


def test_integer_timesteps_that_repeat():
    """Wan's samplers list whole numbers; with a large shift neighbours are equal."""
    levels = np.round(flow_sigmas(100, 16) * 1000) / 1000
    assert len(set(levels)) < 100
    assert follow(levels, sequential_calls(levels, [2] * 100, torch.clone)) == expected_branches([2] * 100)


def test_same_latent():
    latent = fresh()
    assert same(latent, latent) and same(latent, latent.clone()) and same(latent, latent[:])
    broken = torch.full_like(latent, float("nan"))
    assert same(broken, broken[:])
    assert not same(latent, latent + 1e-3)
    assert not same(latent, latent.double()) and not same(latent, latent[:1]) and not same(latent, latent.reshape(3, 2))
    other = latent.clone()
    other[-1, -1] += 1
    assert not same(latent, other)
