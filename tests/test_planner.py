"""Planned schedules: exact against every possible one, and the prediction that they count on."""
import itertools
import re

import numpy as np
import pytest

from common.planner import Target, packed, pair_errors, plan_steps, resample_gram, unpacked
from common.ratios import MagCacheError, MagRatios, flow_sigmas, load


def residuals(steps, shift=3.0, width=200, seed=0):
    """Smooth curves over the noise level: (steps, width)."""
    random = np.random.default_rng(seed)
    sigma, phase, speed = flow_sigmas(steps, shift)[:, None], random.random(width) * 6, 1 + 2 * random.random(width)
    return np.sin(speed * 2 * sigma + phase) + 0.3 * sigma**2 * np.cos(6 * sigma + 2 * phase)


def gram_of(rows):
    return rows @ rows.T


def table(rows, sigmas, **branches):
    ratios = {name: [1.0] * len(sigmas) for name in branches}
    return MagRatios("synthetic", ratios, tuple(sigmas), "measured",
                     statistics={"gram": {name: packed(gram_of(rows)) for name, rows in branches.items()}})


def error_of(rows, anchors, predictor):
    """Squared errors of predicting every other row from the newest one or two anchors, by numpy's least squares."""
    errors = []
    for i in set(range(len(rows))) - set(anchors):
        past = [anchor for anchor in sorted(anchors) if anchor < i][::-1]
        if predictor == "linear" and len(past) > 1:
            basis = rows[past[:2]].T
            predicted = basis @ np.linalg.lstsq(basis, rows[i], rcond=None)[0]
        else:
            predicted = rows[past[0]]
        errors.append(((rows[i] - predicted) ** 2).sum())
    return np.array(errors)


@pytest.mark.parametrize("predictor", ["linear", "reuse"])
@pytest.mark.parametrize("computed", [2, 3, 4, 6])
def test_plan_is_the_best_of_all_schedules(predictor, computed):
    rows = residuals(9)
    best = min(itertools.combinations(range(1, 9), computed - 1),
               key=lambda rest: (error_of(rows, (0, *rest), predictor) ** 2).sum())
    schedule = plan_steps(gram_of(rows)[None], computed, predictor)
    assert np.flatnonzero(~schedule.reuse).tolist() == [0, *best]
    energy = (rows**2).sum() / 9
    assert (schedule.error**2).sum() * energy == pytest.approx(error_of(rows, (0, *best), predictor).sum(), rel=1e-3)


@pytest.mark.parametrize("K", [1, 2, 3])
def test_cap_on_reuses_in_a_row(K):
    rows = residuals(20)
    schedule = plan_steps(gram_of(rows)[None], 11, magcache_K=K)
    assert schedule.computed == 11 and "." * (K + 1) not in schedule.strip
    allowed = plan_steps(gram_of(rows)[None], 11)
    assert (allowed.error**4).sum() <= (schedule.error**4).sum()


def test_weights_predict_the_residual():
    rows = residuals(12)
    schedule = plan_steps(gram_of(rows)[None], 5)
    energy = (rows**2).sum() / 12
    for step in schedule.skipped_steps:
        anchors = schedule.anchors(step)
        weights = schedule.weights[0, step][:len(anchors)]
        assert len(anchors) == 1 or step > anchors[0] > anchors[1]
        missed = rows[step] - weights @ rows[anchors]
        assert np.sqrt((missed**2).sum() / energy) == pytest.approx(schedule.error[step], rel=1e-4)
    assert schedule.depth == 2 and plan_steps(gram_of(rows)[None], 5, "reuse").depth == 1


def test_one_anchor_reuses_as_the_paper_does():
    errors, weights = pair_errors(gram_of(residuals(6)), "linear")
    assert np.array_equal(weights[4, 2, 2], [1, 0])
    assert errors[4, 2, 2] == pytest.approx(((residuals(6)[4] - residuals(6)[2]) ** 2).sum())
    assert np.isinf(errors[2, 4, 4]) and np.isinf(errors[2, 2, 1])


def test_branches_count_alike_and_share_the_schedule():
    one, other = residuals(14, seed=1), residuals(14, seed=2)
    both = plan_steps(np.stack([gram_of(one), gram_of(other)]), 6)
    scaled = plan_steps(np.stack([gram_of(one), 1e4 * gram_of(other)]), 6)
    assert both.strip == scaled.strip and both.weights.shape == (2, 14, 2)
    assert not np.allclose(both.weights[0], both.weights[1])


def test_gram_at_other_noise_levels():
    """The matrix of another run, interpolated, is close to the one measured there; straight lines are worse."""
    sigmas = flow_sigmas(28, 3.0)
    for steps, shift in ((20, 3.0), (28, 1.0), (50, 5.0), (50, 3.0)):
        wanted = flow_sigmas(steps, shift)
        true, got = gram_of(residuals(steps, shift)), resample_gram(gram_of(residuals(28)), sigmas, wanted)
        lines = np.stack([np.interp(-wanted, -sigmas, unit) for unit in np.eye(28)], axis=1)
        straight = lines @ gram_of(residuals(28)) @ lines.T
        inside = np.ix_(wanted >= sigmas[-1], wanted >= sigmas[-1])  # below the last level there is only a straight line
        assert np.abs(got - true)[inside].max() < 0.02 * np.abs(true).max()
        assert np.abs(got - true)[inside].max() < np.abs(straight - true)[inside].max()
        assert np.abs(got - true).max() < 0.2 * np.abs(true).max()
    assert np.allclose(resample_gram(gram_of(residuals(28)), sigmas, sigmas), gram_of(residuals(28)))


def test_a_target_plans_for_the_steps_of_the_run():
    synthetic = table(None, flow_sigmas(28, 3.0), cond=residuals(28))
    for target, steps, computed in ((Target(14), 28, 14), (Target(14), 50, 14), (Target(14), 8, 8),
                                    (Target(magcache_speedup=2.5), 50, 20), (Target(magcache_speedup=2.5), 28, 11)):
        schedule = target.plan(synthetic, flow_sigmas(steps, 3.0))
        assert schedule.computed == computed and schedule.steps == steps and not schedule.reuse[0]
    assert Target(9, magcache_K=0).plan(synthetic, flow_sigmas(28, 3.0)).computed == 28
    assert Target(28).plan(synthetic, flow_sigmas(28, 3.0)).why_none == "every step was asked to compute"


def test_a_hundred_steps_are_planned_at_once():
    schedule = plan_steps(gram_of(residuals(100))[None], 40)
    assert schedule.computed == 40


@pytest.mark.parametrize("make, part", [
    (lambda: Target(0), "magcache_steps must be at least 1"),
    (lambda: Target(magcache_speedup=0.5), "magcache_speedup must be a number of 1 or more"),
    (lambda: Target(9, magcache_speedup=2), "not for both"),
    (lambda: Target(9, magcache_K=-1), "magcache_K must be 0 (off) or more"),
    (lambda: Target(14).plan(load("flux-dev"), flow_sigmas(28, 3.0)), "needs the Gram matrix that --magcache_calibration"),
    (lambda: plan_steps(gram_of(residuals(20))[None], 5, magcache_K=2), "between 7 and 20 can be computed, not 5"),
])
def test_a_mistake_gets_one_sentence(make, part):
    with pytest.raises(MagCacheError, match=re.escape(part)) as error:
        make()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_packed_keeps_ten_digits():
    gram = gram_of(residuals(30))
    assert np.allclose(unpacked(packed(gram)), gram, rtol=1e-9, atol=0)
