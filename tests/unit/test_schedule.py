"""The plan of a run against the rule written down from its definition, and what every plan keeps."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rule_by_definition import by_definition, plan_by_definition

from common.errors import MagCacheError
from common.schedule import (
    Rule,
    Settings,
    compute_all,
    decide,
    first_reusable,
    magcache_schedule,
    retained_steps,
)
from common.tables import preset_names


@pytest.mark.parametrize(
    "steps, retention_ratio, starts",
    [
        (25, 0.1, {"floor": 2, "half_up": 3, "ceil": 3, "calls": 3}),
        (28, 0.1, {"floor": 2, "half_up": 3, "ceil": 3, "calls": 3}),
        (23, 0.1, {"floor": 2, "half_up": 2, "ceil": 3, "calls": 2}),
        (50, 0.2, {"floor": 10, "half_up": 10, "ceil": 10, "calls": 10}),
        (4, 0.1, {"floor": 1, "half_up": 1, "ceil": 1, "calls": 1}),
        (50, 0, {"floor": 1, "half_up": 1, "ceil": 1, "calls": 1}),
        (50, 1, {"floor": 50, "half_up": 50, "ceil": 50, "calls": 50}),
    ],
)
def test_first_reusable(steps, retention_ratio, starts):
    assert {start: first_reusable(steps, retention_ratio, start) for start in starts} == starts


def test_never_reuse_scales_with_the_steps():
    def kept(steps):
        return np.flatnonzero(retained_steps(steps, 0, Rule(never_reuse=((11, 28),)))).tolist()

    assert kept(28) == [0, 11]
    assert kept(20) == [0, 8]
    assert kept(50) == [0, 20]
    assert kept(56) == [0, 22, 23]


def cases(count=400):
    """Random runs: (ratios, settings, rule, switch_step)."""
    random = np.random.default_rng(0)
    for _ in range(count):
        steps, branches = int(random.integers(5, 61)), int(random.integers(1, 4))
        common = random.normal(-0.01, random.choice([0.01, 0.05]), steps)
        ratios = np.exp(common + random.normal(0, 0.003, (branches, steps)))
        settings = Settings(
            float(random.choice([0.02, 0.06, 0.12, 0.24, 1.0])),
            int(random.integers(1, 8)),
            float(random.choice([0, 0.1, 0.2, 0.25, 0.4, 0.9])),
        )
        experts = [None, "each", "last"][random.integers(3)]
        rule = Rule(
            strict=bool(random.integers(2)),
            start=str(random.choice(["floor", "half_up", "ceil", "calls"])),
            never_reuse=((11, 28),) if random.integers(2) else (),
            experts=experts,
            max_deviation=0.03 if random.integers(2) else None,
            retained_resets=experts is None or bool(random.integers(2)),
        )
        yield ratios, settings, rule, int(random.integers(1, steps)) if experts else None


def longest_reuse(schedule):
    return max((len(run) for run in schedule.strip.split("#")), default=0)


def test_any_plan_keeps_its_promises():
    reused = 0
    for ratios, settings, rule, switch_step in cases():
        schedule = magcache_schedule(ratios, settings, rule, switch_step)
        retained = retained_steps(ratios.shape[1], settings.retention_ratio, rule, switch_step)
        assert (schedule.retained == retained).all() and not (schedule.reuse & retained).any()
        assert not schedule.reuse[0]
        assert longest_reuse(schedule) <= settings.magcache_K
        assert schedule.fewest_computed <= schedule.computed <= schedule.steps == ratios.shape[1]
        assert bool(schedule.why_none) != schedule.reuse.any()
        reused += schedule.reuse.any()
    assert reused > 200  # else the cases say nothing


def test_error_is_the_accumulated_error():
    for ratios, settings, rule, switch_step in cases():
        schedule = magcache_schedule(ratios, settings, rule, switch_step)
        reused, errors = by_definition(ratios, settings, rule, schedule.retained)
        assert schedule.skipped_steps == reused
        assert np.allclose(
            schedule.accumulated_error[~schedule.retained], errors[~schedule.retained], rtol=0, atol=1e-12
        )
        assert (schedule.accumulated_error[schedule.reuse] <= settings.magcache_thresh).all()


def test_error_by_hand():
    """Ratio 0.9 throughout: |1 - 0.9| = 0.1, then + |1 - 0.81| = 0.29, then + |1 - 0.729| = 0.561."""
    schedule = magcache_schedule(np.full(8, 0.9), Settings(0.3, 3, 0.25))
    assert np.allclose(schedule.accumulated_error, [0, 0.1, 0.1, 0.29, 0.561, 0.1, 0.29, 0.561])
    assert schedule.strip == "##..#..#"
    assert magcache_schedule(np.full(8, 0.9), Settings(0.3, 1, 0.25)).strip == "##.#.#.#"
    assert magcache_schedule(np.full(8, 1.5), Settings(0.5, 3, 0.25)).strip == "##.#.#.#"
    assert magcache_schedule(np.full(8, 1.5), Settings(0.5, 3, 0.25), Rule(strict=True)).strip == "#" * 8


def test_branches_alike_decide_as_one():
    for ratios, settings, rule, switch_step in cases(50):
        one = magcache_schedule(ratios[0], settings, rule, switch_step)
        three = magcache_schedule(np.stack([ratios[0]] * 3), settings, rule, switch_step)
        assert one.strip == three.strip and (one.accumulated_error == three.accumulated_error).all()


def test_fewest_computed_is_reached_without_a_threshold():
    for ratios, settings, rule, switch_step in cases():
        unbounded = Settings(1e9, settings.magcache_K, settings.retention_ratio)
        schedule = magcache_schedule(ratios, unbounded, rule, switch_step)
        assert schedule.computed == schedule.fewest_computed


@pytest.mark.parametrize(
    "name, switch_step",
    [
        *((name, None) for name in preset_names()),
        ("wan2.2-i2v-a14b", 15),
        ("wan2.2-t2v-a14b", 26),
    ],
)
def test_ceiling_of_each_preset_is_reached(name, switch_step):
    schedule = plan_by_definition(name, switch_step=switch_step, magcache_thresh=1e9)
    assert (
        schedule.computed
        == schedule.fewest_computed
        == plan_by_definition(name, switch_step=switch_step).fewest_computed
    )


def test_fewest_computed_against_every_possible_schedule():
    random = np.random.default_rng(1)
    for _ in range(40):
        retained, K = random.random(9) < 0.3, int(random.integers(1, 5))
        retained[0] = True
        allowed = [
            choice
            for choice in itertools.product("#.", repeat=9)
            if all(letter == "#" for letter, kept in zip(choice, retained) if kept)
            and "." * (K + 1) not in "".join(choice)
        ]
        reuse, _ = decide(np.ones((1, 9)), 1e9, K, Rule(), retained)
        assert (~reuse).sum() == min(choice.count("#") for choice in allowed)


def test_anchor_is_the_newest_computed_step_before():
    schedule = magcache_schedule(np.full(8, 0.9), Settings(0.3, 3, 0.25))  # ##..#..#
    assert [schedule.anchors(step) for step in range(8)] == [[], [0], [1], [1], [1], [4], [4], [4]]


def test_schedule_describes_itself():
    schedule = plan_by_definition("flux-dev")
    assert schedule.strip == "###..#...#.#.....#.....#..#."
    assert schedule.steps == 28 and schedule.computed == 9 and schedule.bound == pytest.approx(28 / 9)
    assert schedule.fewest_computed == 7
    assert schedule.ratios.shape == (1, 28)


def test_compute_all():
    schedule = compute_all(7)
    assert schedule.strip == "#######" and schedule.bound == 1 and schedule.why_none == "MagCache is off"
    assert schedule.fewest_computed == 7


@pytest.mark.parametrize(
    "settings, text",
    [
        ((-0.1, 5, 0.2), "magcache_thresh must be 0 (off) or more, not -0.1."),
        ((float("nan"), 5, 0.2), "magcache_thresh must be 0 (off) or more, not nan."),
        ((0.1, -1, 0.2), "magcache_K must be 0 (off) or more, not -1."),
        ((0.1, 5, -0.1), "retention_ratio is a share of the steps, between 0 and 1, not -0.1."),
        ((0.1, 5, 1.1), "retention_ratio is a share of the steps, between 0 and 1, not 1.1."),
        ((0.1, 5, 20), "retention_ratio is a share of the steps, between 0 and 1, not 20."),
        ((0.1, 5, float("nan")), "retention_ratio is a share of the steps, between 0 and 1, not nan."),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(MagCacheError) as caught:
        Settings(*settings)
    assert str(caught.value) == text


def test_why_nothing_is_reused():
    assert plan_by_definition("flux-dev").why_none == ""
    assert plan_by_definition("flux-dev", retention_ratio=1).why_none == "retention_ratio keeps every step"
    assert plan_by_definition("flux-dev", 4).why_none == "a run of 4 steps has nothing to gain (MagCache starts at 5)"
    schedule = magcache_schedule(np.full(20, 0.9), Settings(0.05, 3, 0.2))
    assert schedule.why_none == "the smallest error of reusing a step is 0.100, above magcache_thresh 0.05"


def test_smallest_error_named_is_the_threshold_that_reuses():
    ratios = [1, 1.01, 0.98, 1.2, 0.85, 0.93, 0.9, 0.8]
    schedule = magcache_schedule(ratios, Settings(0.05, 3, 0.375))
    assert "0.070" in schedule.why_none
    assert magcache_schedule(ratios, Settings(0.0701, 3, 0.375)).skipped_steps == [5]
    assert magcache_schedule(ratios, Settings(0.0699, 3, 0.375)).skipped_steps == []


def test_why_nothing_names_max_deviation():
    schedule = magcache_schedule([1] + [1.08] * 20, Settings(0.1, 3, 0.2), Rule(max_deviation=0.06))
    assert not schedule.reuse.any() and "above magcache_thresh" not in schedule.why_none


def test_numpy_core_needs_no_torch():
    code = (
        "import sys, common.ratios, common.schedule, common.steps; "
        "sys.exit(len({'torch', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
