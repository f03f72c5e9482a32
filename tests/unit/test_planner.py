"""Planned schedules: exact against every possible one, and the prediction that they count on."""

import itertools
import re
import sys
import tracemalloc

import numpy as np
import pytest
from tiny_tables import gram_of, residuals, table

from common.errors import MagCacheError
from common.gram import (
    Forecast,
    error_by_gram,
    errors_and_weights,
    packed,
    pair_errors,
    resample_gram,
    table_grams,
    unpacked,
    unpredicted,
)
from common.plan_text import plan_text
from common.planner import Target, nearest_by_the_rule, speedup
from common.ratios import flow_sigmas
from common.refine import MEASURES, closeness_of, refined
from common.schedule import Rule, Settings, magcache_schedule
from common.shortest_path import plan_steps
from common.spread import MEASURE, spread_steps
from common.tables import load, read, write


def forecast_of(rows, predictor="linear", payload="residual"):
    return Forecast.of_grams(gram_of(rows)[None], predictor)


def error_of(rows, anchors, predictor, switch_step=0):
    """Squared relative errors of predicting every other row from the newest one or two anchors of its expert, by
    numpy's least squares."""
    errors = []
    for i in sorted(set(range(len(rows))) - set(anchors)):
        past = [anchor for anchor in sorted(anchors) if anchor < i and (anchor >= switch_step) == (i >= switch_step)][
            ::-1
        ]
        if predictor == "linear" and len(past) > 1:
            basis = rows[past[:2]].T
            predicted = basis @ np.linalg.lstsq(basis, rows[i], rcond=None)[0]
        else:
            predicted = rows[past[0]]
        errors.append(((rows[i] - predicted) ** 2).sum() / (rows[i] ** 2).sum())
    return np.array(errors)


def best_within(rows, bound, predictor, switch_step=0):
    """The anchors, as few as can be and then those with the least sum of fourth powers, with which no error exceeds a
    bound: found by trying all."""
    for count in range(len(rows)):
        costs = {}
        for rest in itertools.combinations(range(1, len(rows)), count):
            anchors = sorted({0, switch_step, *rest})
            errors = error_of(rows, anchors, predictor, switch_step)
            if len(anchors) == count + 1 and errors.max(initial=0) <= bound**2:
                costs[tuple(anchors)] = (errors**2).sum()
        if costs:
            return list(min(costs, key=costs.get))


@pytest.mark.parametrize("predictor", ["linear", "reuse"])
@pytest.mark.parametrize("switch_step", [0, 4])
@pytest.mark.parametrize("bound", [0.7, 0.5, 0.2, 0.05])
def test_a_bound_on_the_error_is_kept_by_the_best_of_all_schedules(predictor, switch_step, bound):
    rows, levels = residuals(9), flow_sigmas(9)
    schedule = Target(magcache_max_error=bound, predictor=predictor).plan(
        table(levels, cond=rows), levels, switch_step or None
    )
    anchors = best_within(rows, bound, predictor, switch_step)
    assert np.flatnonzero(~schedule.reuse).tolist() == anchors
    errors = schedule.expected_error[schedule.reuse]
    np.testing.assert_allclose(errors**2, error_of(rows, anchors, predictor, switch_step), rtol=2e-2, atol=1e-9)
    assert errors.max(initial=0) <= bound


def test_max_error_at_its_ends():
    synthetic = table(flow_sigmas(28, 3.0), cond=residuals(28))
    for bound, computed in ((0, 28), (10, 1)):
        assert Target(magcache_max_error=bound).plan(synthetic, flow_sigmas(28, 3.0)).computed == computed


@pytest.mark.parametrize(
    "caps, allowed",
    [
        ({"magcache_K": 1}, lambda strip: ".." not in strip),
        ({"magcache_K": 2}, lambda strip: "..." not in strip),
        ({"kept": 5}, lambda strip: strip.startswith("#####")),
        ({"kept": 5, "magcache_K": 2}, lambda strip: strip.startswith("#####") and "..." not in strip),
    ],
)
def test_caps(caps, allowed):
    levels, own = flow_sigmas(20), {"magcache_K": caps.get("magcache_K"), "retention_ratio": caps.get("kept", 0) / 20}
    synthetic = table(levels, cond=residuals(20))
    for asked in ({"magcache_max_error": 0.8}, {"magcache_steps": 11, "predictor": "linear"}, {"magcache_steps": 11}):
        schedule, free = (Target(**asked, **more).plan(synthetic, levels) for more in (own, {}))
        assert allowed(schedule.strip)
        if "magcache_steps" in asked:
            assert schedule.computed == 11
        else:
            assert schedule.computed > free.computed and not allowed(free.strip)


def test_a_calibration_spreads_the_steps_and_weighs_the_newest_two():
    """Whole schedules are not ranked by one-step errors: nothing of the calibration moves a computed step."""
    levels, strips = flow_sigmas(28, 3.0), set()
    for seed in range(3):
        rows = residuals(28, seed=seed)
        schedule = Target(11, predictor="linear", payload="residual").plan(table(levels, cond=rows), levels)
        anchors = np.flatnonzero(~schedule.reuse).tolist()
        assert anchors == spread_steps(levels, 11) and anchors[-1] == 27
        errors = schedule.expected_error[schedule.reuse]
        np.testing.assert_allclose(errors**2, error_of(rows, anchors, "linear"), rtol=2e-2)
        strips.add(schedule.strip)
    assert len(strips) == 1


def test_planned_outputs_are_those_without_a_calibration_but_for_the_corrector():
    levels = flow_sigmas(28, 3.0)
    synthetic = table(levels, cond=residuals(28))
    schedule, free = Target(11, predictor="linear").plan(synthetic, levels), Target(11).plan(synthetic, levels)
    assert schedule.strip == free.strip and schedule.follows_line and free.follows_line
    assert schedule.weights is None and schedule.settings.payload == "output" and free.gram is None
    np.testing.assert_allclose(schedule.gram, gram_of(residuals(28)), rtol=1e-9)
    computed, missed = np.flatnonzero(~schedule.reuse), []
    for step in np.flatnonzero(schedule.reuse):
        newest, before = computed[computed < step][::-1][:2] if (computed < step).sum() > 1 else (computed[0], 0)
        share = (levels[step] - levels[newest]) / (levels[newest] - levels[before]) if before else 0
        rows = residuals(28)
        predicted = rows[newest] + share * (rows[newest] - rows[before])
        missed.append(np.linalg.norm(rows[step] - predicted) / np.linalg.norm(rows[step]))
    np.testing.assert_allclose(schedule.expected_error[schedule.reuse], missed, rtol=1e-4)
    text = plan_text(schedule, levels, synthetic, why_uncorrected="")
    assert "corrector on: skipped steps are corrected with the calibration's weights when the next one" in text
    assert "with the calibration's weights" not in plan_text(free, levels, synthetic, why_uncorrected="")
    guided = table(levels, cond=residuals(28, seed=1), uncond=residuals(28, seed=2))
    assert Target(11, predictor="linear").plan(guided, levels).gram is None


def test_a_calibration_with_guidance_plans_as_none_does():
    """Guidance multiplies what weights miss: no step of such a run is weighed, and the plan says so."""
    levels = flow_sigmas(28, 3.0)
    guided = table(levels, cond=residuals(28, seed=1), uncond=residuals(28, seed=2))
    free = Target(11).plan(None, levels)
    for payload in ("residual", "output"):
        target = Target(11, predictor="linear", payload=payload)
        schedule, text = target.plan(guided, levels), plan_text(target.plan(guided, levels), levels, guided)
        assert schedule.strip == free.strip and schedule.weights is None and schedule.settings.payload == "output"
        assert schedule.predictor == "line" and "synthetic was calibrated with guidance" in text
    for more in ({"magcache_max_error": 0.3}, {"magcache_steps": 11, "magcache_guard": 2}):
        schedule = Target(**more).plan(guided, levels)
        assert schedule.weights is None and schedule.predictor == "reuse" and (schedule.expected_error[1:] > 0).any()
        assert "the newest is reused" in plan_text(schedule, levels, guided)
    rule = magcache_schedule(guided.at(levels), Settings(0.1, 3, 0.2))
    assert "expected relative error of a reused residual" in plan_text(rule, levels, guided)


@pytest.mark.parametrize("switch_step", [None, 3, 10, 19])
@pytest.mark.parametrize("covered", [slice(0, 15), slice(5, 20), slice(4, 16)])
def test_steps_beyond_a_calibration_compute(covered, switch_step):
    levels = flow_sigmas(20, 3.0)
    short = table(levels[covered], cond=residuals(20)[covered])
    beyond = unpredicted(short, levels)
    for computed in (14, 16):
        schedule = Target(computed, predictor="linear", payload="residual").plan(short, levels, switch_step)
        assert schedule.computed == computed and not schedule.reuse[beyond].any()
        assert not schedule.reuse[[0, switch_step or 0]].any()
        for step in schedule.skipped_steps:  # nor does one of them predict
            newest, *before = schedule.anchors(step)
            uncovered = ~short.covered(levels)
            assert not uncovered[newest]
            assert all(not uncovered[one] or schedule.weights[0, step, 1] == 0 for one in before)


def test_weights_predict_the_residual():
    """Also at computed steps, where a guard compares."""
    rows = residuals(12)
    levels = flow_sigmas(12)
    synthetic = table(levels, cond=rows)
    schedule = Target(5, predictor="linear", payload="residual").plan(synthetic, levels)
    for step in range(1, 12):
        anchors = schedule.anchors(step)
        weights = schedule.weights[0, step][: len(anchors)]
        assert len(anchors) == 1 or step > anchors[0] > anchors[1]
        missed = rows[step] - weights @ rows[anchors]
        assert np.linalg.norm(missed) / np.linalg.norm(rows[step]) == pytest.approx(
            schedule.expected_error[step], rel=1e-3
        )
    assert schedule.depth == 2 and Target(5, predictor="reuse").plan(synthetic, levels).depth == 1


def test_one_anchor_reuses_as_the_paper_does():
    errors, weights = pair_errors(gram_of(residuals(6)), "linear")
    assert np.array_equal(weights[4, 2, 2], [1, 0])
    assert errors[4, 2, 2] == pytest.approx(
        ((residuals(6)[4] - residuals(6)[2]) ** 2).sum() / (residuals(6)[4] ** 2).sum()
    )
    assert np.isinf(errors[2, 4, 4]) and np.isinf(errors[2, 2, 1])


def test_branches_count_alike_and_share_the_schedule():
    one, other = residuals(14, seed=1), residuals(14, seed=2)
    both = plan_steps(Forecast.of_grams([gram_of(one), gram_of(other)]), 0.3)
    scaled = plan_steps(Forecast.of_grams([gram_of(one), 1e4 * gram_of(other)]), 0.3)
    assert both.reuse.any() and both.strip == scaled.strip and both.weights.shape == (2, 14, 2)
    assert not np.allclose(both.weights[0], both.weights[1])


def test_gram_at_other_noise_levels():
    """The matrix of another run, interpolated, is close to the one measured there; straight lines are worse."""
    sigmas = flow_sigmas(28, 3.0)
    for steps, shift in ((20, 3.0), (28, 1.0), (50, 5.0), (50, 3.0)):
        wanted = flow_sigmas(steps, shift)
        true, got = gram_of(residuals(steps, shift)), resample_gram(gram_of(residuals(28)), sigmas, wanted)
        lines = np.stack([np.interp(-wanted, -sigmas, unit) for unit in np.eye(28)], axis=1)
        straight = lines @ gram_of(residuals(28)) @ lines.T
        inside = np.ix_(
            wanted >= sigmas[-1], wanted >= sigmas[-1]
        )  # below the last level there is only a straight line
        assert np.abs(got - true)[inside].max() < 0.02 * np.abs(true).max()
        assert np.abs(got - true)[inside].max() < np.abs(straight - true)[inside].max()
        assert np.abs(got - true).max() < 0.2 * np.abs(true).max()
    assert np.allclose(resample_gram(gram_of(residuals(28)), sigmas, sigmas), gram_of(residuals(28)))


def test_a_target_plans_for_the_steps_of_the_run():
    synthetic = table(flow_sigmas(28, 3.0), cond=residuals(28))
    for target, steps, computed in (
        (Target(14, predictor="linear", payload="residual"), 28, 14),
        (Target(14, predictor="linear", payload="residual"), 50, 14),
        (Target(14, predictor="linear", payload="residual"), 8, 8),
        (Target(magcache_speedup=2.5, predictor="linear", payload="residual"), 50, 20),
        (Target(magcache_speedup=2.5, predictor="linear", payload="residual"), 28, 11),
    ):
        schedule = target.plan(synthetic, flow_sigmas(steps, 3.0))
        assert schedule.computed == computed and schedule.steps == steps and not schedule.reuse[0]
    assert (
        Target(9, magcache_K=0, predictor="linear", payload="residual").plan(synthetic, flow_sigmas(28, 3.0)).computed
        == 28
    )
    assert (
        Target(28, predictor="linear", payload="residual").plan(synthetic, flow_sigmas(28, 3.0)).why_none
        == "every step was asked to compute"
    )


@pytest.mark.parametrize("share, wanted, computed", [(0.01, 2.0, 14), (0.1, 2.0, 12), (0.1, 100, 1), (0.5, 1.5, 9)])
def test_a_speedup_is_of_the_clock_where_step_times_are_known(share, wanted, computed):
    """28 / (computed + share * (28 - computed)), the nearest to what is asked for."""
    levels = flow_sigmas(28, 3.0)
    timed = table(levels, {"seconds": {"computed": 0.2, "reused": 0.2 * share}}, cond=residuals(28))
    schedule = Target(magcache_speedup=wanted, predictor="linear", payload="residual").plan(timed, levels)
    assert schedule.computed == computed
    expected = speedup(28, computed, share)
    for other in (computed - 1, computed + 1):
        assert not 0 < other < 29 or abs(speedup(28, other, share) - wanted) >= abs(expected - wanted)
    text = plan_text(schedule, levels, timed)
    assert f"{expected:.2f}x by the calibration's step times" in text
    assert ("out of reach" in text) == (wanted == 100)


def test_without_step_times_the_plan_says_so():
    levels = flow_sigmas(28, 3.0)
    synthetic = table(levels, cond=residuals(28))
    text = plan_text(Target(14, predictor="linear", payload="residual").plan(synthetic, levels), levels, synthetic)
    assert "at most 2.00x faster (the table has no step times)" in text


def test_a_plan_names_the_expected_error_of_the_rule_too():
    levels, table_ = load("demo").sigmas, load("demo")
    planned = Target(12, predictor="linear", payload="residual").plan(table_, levels)
    rule = nearest_by_the_rule(table_, levels, Rule(), 12)
    assert (
        rule.computed == 12
        and rule.expected_error[rule.reuse].mean() > 2 * planned.expected_error[planned.reuse].mean()
    )
    text = plan_text(planned, levels, table_)
    assert (
        f"{planned.expected_error[planned.reuse].mean():.4f}" in text
        and f"{rule.expected_error[rule.reuse].mean():.4f}" in text
    )
    paper = magcache_schedule(table_.at(levels), Settings(0.1, 3, 0.2), Rule())
    text = plan_text(paper, levels, table_)
    assert f"{error_by_gram(paper, levels, table_).mean():.4f}" in text
    assert f"magcache_steps 12: {planned.expected_error[planned.reuse].mean():.4f}" in text


def test_error_by_gram_is_that_of_reusing_the_newest():
    rows, levels = residuals(20), flow_sigmas(20)
    schedule = magcache_schedule(np.full(20, 0.98), Settings(0.1, 2, 0.2))
    anchors = np.flatnonzero(~schedule.reuse)
    got = error_by_gram(schedule, levels, table(levels, cond=rows))
    np.testing.assert_allclose(got**2, error_of(rows, anchors, "reuse"), rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Target(40, predictor="linear", payload="residual"),
        lambda: Target(40),
        lambda: Target(magcache_max_error=0.05),
        lambda: Target(40, predictor="reuse"),
    ],
)
def test_a_hundred_steps_take_few_operations(make):
    """Calls of Python and numpy functions; the arrays they work on have at most 4 million numbers. A second is some
    300,000."""
    synthetic, calls = table(flow_sigmas(100), cond=residuals(100)), []
    sys.setprofile(lambda frame, event, argument: calls.append(None) if event in ("call", "c_call") else None)
    try:
        make().plan(synthetic, flow_sigmas(100))
    finally:
        sys.setprofile(None)
    assert len(calls) < 60_000


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: Target(0), "magcache_steps must be at least 1"),
        (lambda: Target(magcache_speedup=0.5), "magcache_speedup must be a number of 1 or more"),
        (lambda: Target(magcache_max_error=-1), "magcache_max_error must be 0 (off) or more"),
        (lambda: Target(9, retention_ratio=2), "retention_ratio is a share"),
        (lambda: Target(9, magcache_guard=0.5), "magcache_guard must be 1 or more"),
        (lambda: Target(9, magcache_speedup=2), "Ask for only one of"),
        (lambda: Target(), "Ask for one of"),
        (lambda: Target(9, magcache_K=-1), "magcache_K must be 0 (off) or more"),
        (
            lambda: Target(14, predictor="linear", payload="residual").plan(load("flux-dev"), flow_sigmas(28, 3.0)),
            "the Gram matrix that a cal",
        ),
        (
            lambda: Target(14, predictor="linear", payload="output").plan(load("flux-dev"), flow_sigmas(28, 3.0)),
            "the Gram matrix that a cal",
        ),
        (
            lambda: Target(14, magcache_guard=2).plan(load("flux-dev"), flow_sigmas(28, 3.0)),
            "the Gram matrix that a cal",
        ),
        (
            lambda: Target(14, predictor="linear").plan(
                table(flow_sigmas(20), {"gram_of_outputs": {}}, cond=residuals(20)), flow_sigmas(20)
            ),
            "without the Gram matrix of the output",
        ),
        (
            lambda: Target(5, magcache_K=2, predictor="linear", payload="residual").plan(
                table(flow_sigmas(20), cond=residuals(20)), flow_sigmas(20)
            ),
            "between 7 and 20 can be computed, not 5",
        ),
        (
            lambda: Target(14, predictor="linear", payload="residual").plan(
                table(flow_sigmas(20), {"seconds": {"computed": 0}}, cond=residuals(20)), flow_sigmas(20)
            ),
            "its step times cannot be read",
        ),
    ],
)
def test_a_target_that_makes_no_sense_gets_one_sentence(make, part):
    with pytest.raises(MagCacheError, match=re.escape(part)) as error:
        make()
    assert "\n" not in str(error.value) and str(error.value).endswith(".")


def test_packed_keeps_ten_digits():
    gram = gram_of(residuals(30))
    assert np.allclose(unpacked(packed(gram)), gram, rtol=1e-9, atol=0)


# Long runs


@pytest.mark.parametrize("switch_step", [None, 30])
@pytest.mark.parametrize("predictor", ["linear", "reuse"])
def test_a_schedules_own_predictions_are_those_of_the_whole_forecast(predictor, switch_step):
    levels = flow_sigmas(60)
    both = table(levels, cond=residuals(60, seed=1), uncond=residuals(60, seed=2))
    reuse = np.ones(60, dtype=bool)
    reuse[spread_steps(levels, 17, None, 1, switch_step)] = False
    error, weights = errors_and_weights(table_grams(both, levels), reuse, predictor, switch_step)
    forecast = Forecast.of_table(both, levels, predictor, "residual", switch_step)
    np.testing.assert_allclose(error, forecast.error_of(reuse), atol=1e-9)
    if predictor == "linear":
        np.testing.assert_allclose(weights[:, 1:][:, reuse[1:]], forecast.weights_of(reuse)[:, 1:][:, reuse[1:]])


@pytest.mark.robustness(
    "Memory and time",
    "1000 steps, planned from a calibration of 1000 steps, text included",
    "under 200 MiB; about half a second on one CPU core",
)
def test_a_thousand_steps_are_planned_in_bounded_memory():
    """From a calibration of as many steps, the plan's text included."""
    levels = flow_sigmas(1000)
    steps = np.arange(1000)
    gram = np.exp(-np.abs(steps[:, None] - steps) / 300.0) * (1 + steps[:, None]) * (1 + steps) / 1e6
    long = table(levels, {"gram": {"cond": packed(gram)}}, cond=np.ones((1000, 2)))
    tracemalloc.start()
    for wish in (
        Target(500, predictor="linear", payload="residual"),
        Target(magcache_speedup=4, predictor="linear", payload="residual"),
        Target(magcache_max_error=0.1),
        Target(magcache_speedup=3),
        Settings(0.1, 3, 0.2),
    ):
        schedule = wish.plan(long, levels)
        text = plan_text(schedule, levels, long)
        assert f"of {schedule.steps}" in text and schedule.reuse.any()
        if isinstance(wish, Target) and wish.magcache_max_error:
            assert schedule.expected_error[schedule.reuse].max() <= 0.1 < 0.2
    assert tracemalloc.get_traced_memory()[1] < 200 * 2**20
    tracemalloc.stop()


# The measure in which steps are spread


def found(table_, levels, closeness, computed=14):
    schedule = Target(computed).plan(None, levels)
    return refined(table_, closeness, schedule, 4)


@pytest.mark.parametrize("gain, measure", [(0.9, MEASURE), (1.1, (0.5, 0.8))])
def test_a_refined_calibration_spreads_the_steps_of_any_later_speedup(tmp_path, gain, measure):
    levels = flow_sigmas(28, 3.0)
    closeness = dict.fromkeys(MEASURES, 40.0) | {(0.5, 0.8): 40.0 + gain}
    write(tmp_path / "mine.json", found(table(levels, cond=residuals(28)), levels, closeness))
    mine = read(tmp_path / "mine.json")
    for target, steps in ((Target(14), 28), (Target(magcache_speedup=3), 50)):
        schedule = target.plan(mine, flow_sigmas(steps, 3.0))
        wanted = spread_steps(flow_sigmas(steps, 3.0), schedule.computed, measure=measure)
        assert np.flatnonzero(~schedule.reuse).tolist() == wanted
        assert (wanted == spread_steps(flow_sigmas(steps, 3.0), schedule.computed)) == (measure == MEASURE)
        assert f"measure {measure}" in plan_text(schedule, flow_sigmas(steps, 3.0), mine)
    own = Target(14, measure=(1.0, 1.0)).plan(mine, levels)  # a measure that is asked for wins
    assert np.flatnonzero(~own.reuse).tolist() == spread_steps(levels, 14, measure=(1.0, 1.0))


def test_every_measure_draws_once_and_equal_pictures_do_not_outweigh_the_rest():
    asked = []
    closeness = closeness_of(lambda measure: asked.append(measure) or [40.0, np.inf])
    assert asked == list(MEASURES) and set(closeness.values()) == {(40 + 99) / 2}


@pytest.mark.parametrize("content", [{"measure": [0.5]}, {"measure": "x"}, {"measure": [2, 1]}, {"measure": [0, 0]}, 3])
def test_a_measure_that_cannot_be_read_gets_one_sentence(content):
    levels = flow_sigmas(28, 3.0)
    broken = table(levels, {"refined": content}, cond=residuals(28))
    with pytest.raises(MagCacheError, match="its refined measure cannot be read; refine again"):
        Target(14).plan(broken, levels)
    with pytest.raises(MagCacheError, match="There is nothing to refine: a run of 4 steps"):
        refined(broken, dict.fromkeys(MEASURES, 40.0), Target(2).plan(None, flow_sigmas(4)), 1)
