"""What computed outputs tell of those after and between them, with a calibration and without."""

import numpy as np
import pytest
import torch

from common.interpolation import gram_of_data, gram_weights, interpolation_weights
from common.ratios import flow_sigmas
from common.trajectory import Trajectory

LEVELS = flow_sigmas(8)


def kept(outputs, guided=False, gram=None):
    """A Trajectory after these computed outputs, {step: output}."""
    trajectory = Trajectory(LEVELS, gram)
    trajectory.guided = guided
    for step, output in outputs.items():
        trajectory.computed(step, output)
    return trajectory


def on_a_line(*steps):
    return {step: torch.full((2, 3), 1 + 2 * LEVELS[step]) for step in steps}


def test_outputs_on_a_line_are_predicted_and_interpolated():
    outputs = on_a_line(0, 1, 3, 5, 6, 7)
    for guided in (True, False):
        straight = kept(on_a_line(0, 1, 3, 5), guided)
        torch.testing.assert_close(straight.predicted(6, outputs[5]), outputs[6])
        torch.testing.assert_close(straight.corrected([(6, outputs[5])], 7, outputs[7])[0], outputs[6])


def test_with_guidance_the_line_is_followed_once_it_served():
    """Until the first prediction can be judged: held with guidance, followed without."""
    outputs = on_a_line(0, 1, 3, 4)
    early = on_a_line(0, 1, 3)
    assert torch.equal(kept(early, guided=True).predicted(4, outputs[3]), outputs[3])
    torch.testing.assert_close(kept(early).predicted(4, outputs[3]), outputs[4])


def test_a_line_that_never_serves_is_let_go():
    """There and back: with guidance at once, without it one step against the four that it begins with."""
    there_and_back = {step: torch.full((1, 3), value) for step, value in ((1, 1.0), (3, 2.0), (5, 1.0))}
    held = torch.ones(1, 3)
    assert torch.equal(kept(there_and_back, guided=True).predicted(6, held), held)
    followed = kept(there_and_back)
    share = (4 + followed.seen / followed.length) / 5
    assert 0 < share < 1
    line = (LEVELS[6] - LEVELS[5]) / (LEVELS[5] - LEVELS[3]) * (1.0 - 2.0)
    torch.testing.assert_close(followed.predicted(6, held), held + share * line)


def test_each_sample_of_a_batch_follows_its_own_line():
    both, alone = Trajectory(LEVELS), Trajectory(LEVELS)
    outputs = {step: torch.tensor([[1 + 2 * LEVELS[step]], [(-1.0) ** step]]) for step in (1, 2, 5)}
    for step, output in outputs.items():
        both.computed(step, output)
        alone.computed(step, output[:1])
    torch.testing.assert_close(both.predicted(6, outputs[5])[:1], alone.predicted(6, outputs[5][:1]))


def test_weights_are_lagranges():
    levels = flow_sigmas(9)
    assert interpolation_weights(levels, 3, [3, 5]) == [1.0, 0.0]
    weights = interpolation_weights(levels, 4, [6, 3, 1])
    for power in range(3):
        assert sum(weight * levels[at] ** power for weight, at in zip(weights, [6, 3, 1])) == pytest.approx(
            levels[4] ** power
        )


def run_of(seed=0, steps=9, shift=3.0):
    """(levels, outputs (steps, numbers), x0 less the first latent) of a run of Euler that bends."""
    levels, generator = np.array(flow_sigmas(steps, shift)), np.random.default_rng(seed)
    bends = generator.standard_normal((3, 40))
    outputs = np.stack([np.sin(3 * level) * bends[0] + level**4 * bends[1] + bends[2] for level in levels])
    latents = np.concatenate([np.zeros((1, 40)), np.cumsum(np.diff(levels)[:, None] * outputs[:-1], axis=0)])
    return levels, outputs, latents - levels[:, None] * outputs


def test_a_calibration_interpolates_its_own_outputs_better_than_a_parabola():
    levels, outputs, _ = run_of()
    weights = gram_weights(outputs @ outputs.T, 5, [7, 4, 2])
    assert sum(weights) == pytest.approx(1)
    found, parabola = (w @ outputs[[7, 4, 2]] for w in (weights, interpolation_weights(levels, 5, [7, 4, 2])))
    assert np.linalg.norm(found - outputs[5]) < 0.5 * np.linalg.norm(parabola - outputs[5])
    others = np.stack([outputs[7] - outputs[4], outputs[2] - outputs[4]])
    best = np.linalg.lstsq(others.T, outputs[5] - outputs[4], rcond=None)[0]
    np.testing.assert_allclose([weights[0], weights[2]], best, rtol=0.02)


def test_weights_of_x0_follow_from_the_outputs():
    levels, outputs, x0 = run_of()
    shifted = x0 + 7.0  # whatever the first latent was
    for at in ([7, 4, 2], [1, 0]):
        expected = gram_weights(shifted @ shifted.T, 5, at)
        np.testing.assert_allclose(gram_weights(gram_of_data(outputs @ outputs.T, levels), 5, at), expected, rtol=1e-4)


def test_steps_that_no_calibration_covers_are_interpolated_without_it():
    levels, outputs, _ = run_of()
    gram = outputs @ outputs.T
    gram[:2], gram[:, :2] = np.nan, np.nan
    trajectory = Trajectory(levels.tolist(), gram_of_data(gram, levels))
    assert trajectory.weights(5, [7, 4, 1]) == interpolation_weights(levels, 5, [7, 4, 1])
    np.testing.assert_allclose(
        trajectory.weights(5, [7, 4, 2]), gram_weights(gram_of_data(outputs @ outputs.T, levels), 5, [7, 4, 2])
    )


def test_a_calibration_of_one_branch_says_nothing_of_guided_outputs():
    levels, outputs, _ = run_of()
    trajectory = Trajectory(levels.tolist(), outputs @ outputs.T)
    assert trajectory.weights(5, [7, 4, 2]) == gram_weights(outputs @ outputs.T, 5, [7, 4, 2])
    trajectory.guided = True
    assert trajectory.weights(5, [7, 4, 2]) == interpolation_weights(levels, 5, [7, 4, 2])


def test_a_first_output_made_of_noise_alone_is_not_weighed_by_a_calibration():
    levels, outputs, _ = run_of()
    trajectory = Trajectory(levels.tolist(), outputs @ outputs.T)
    assert trajectory.weights(4, [6, 2, 0]) == interpolation_weights(levels, 4, [6, 2, 0])
    assert trajectory.weights(4, [6, 2, 1]) == gram_weights(outputs @ outputs.T, 4, [6, 2, 1])


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_last_step_that_is_not_computed_is_made_of_three_outputs_of_a_calibration(calibrated, guided):
    levels, outputs, _ = run_of()
    trajectory, last = Trajectory(levels.tolist(), outputs @ outputs.T if calibrated else None), len(levels) - 1
    trajectory.guided = guided
    for step in (0, 2, 4, 7):
        trajectory.computed(step, torch.tensor(outputs[step])[None])
    by_calibration = calibrated and not guided
    assert len(trajectory.tensors) == (3 if by_calibration else 2)
    made = trajectory.predicted(last, torch.tensor(outputs[7])[None]).numpy()[0]
    if by_calibration:
        np.testing.assert_allclose(
            made, gram_weights(outputs @ outputs.T, last, [7, 4, 2]) @ outputs[[7, 4, 2]], atol=1e-5
        )
    on_the_line = outputs[7] + trajectory.share().item() * trajectory.line(last).numpy()[0]
    if by_calibration:
        assert np.linalg.norm(made - outputs[last]) < 0.5 * np.linalg.norm(on_the_line - outputs[last])
    else:
        np.testing.assert_allclose(made, on_the_line, atol=1e-5)
