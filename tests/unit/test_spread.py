"""Where computed steps lie."""

import numpy as np
import pytest

from common.errors import MagCacheError
from common.planner import Target
from common.ratios import flow_sigmas
from common.spread import ends_in_nothing, spread_steps

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps, computed", [(28, 14), (28, 7), (50, 20), (8, 5), (5, 2), (100, 100)])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_computed_steps_are_spread_from_the_first_to_the_last(steps, computed, shift):
    chosen = spread_steps(flow_sigmas(steps, shift), computed)
    assert chosen[0] == 0 and chosen[-1] == steps - 1 and len(set(chosen)) == len(chosen) == computed
    assert chosen == sorted(chosen) and max(np.diff(chosen)) <= 2 * steps / computed
    gaps = np.diff(spread_steps(np.linspace(1, 0, steps, endpoint=False), computed))
    assert (np.diff(gaps) >= -1).all() and gaps[0] <= gaps[-1]  # dense at the beginning, wide at the end


@pytest.mark.parametrize(
    "computed, strip",
    [(14, "####.#..#.#..#.#..#..#.#.#.#"), (11, "##.#.#..#..#...#..#..#..#..#"), (7, "#.#...#....#.....#.....#...#")],
)
def test_computed_steps_lie_densest_at_the_beginning(computed, strip):
    """As they did where docs/quality.md was measured."""
    chosen = spread_steps(flow_sigmas(28, 3.0), computed)
    assert "".join("#" if step in chosen else "." for step in range(28)) == strip


def test_caps_and_experts_of_a_spread():
    levels = flow_sigmas(30, 5.0)
    assert max(np.diff(spread_steps(levels, 12, magcache_K=2))) <= 3
    assert spread_steps(levels, 12, retained=5)[:6][:5] == [0, 1, 2, 3, 4]
    chosen = spread_steps(levels, 12, switch_step=13)
    assert {0, 12, 13, 29} <= set(chosen) and len(set(chosen)) == 12
    with pytest.raises(MagCacheError, match="Of 30 steps, between 10 and 30 can be computed, not 5"):
        Target(5, magcache_K=2).plan(None, levels)
    for count in range(10, 31):
        assert Target(count, magcache_K=2).plan(None, levels).computed == count
    assert Target(magcache_speedup=2.5).plan(None, levels, switch_step=13).computed == 12
    assert "a run of 4 steps has nothing to gain" in Target(2).plan(None, levels[:4]).why_none


def own_levels(name, steps):
    """The noise levels that a pipeline of diffusers runs at."""
    scheduler = {
        "Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "UniPC": lambda: diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }
    if name == "FLUX":  # whose pipeline hands noise levels to Euler
        return flow_sigmas(steps, 3.0)
    scheduler = scheduler[name]()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.numpy()[:steps]


@pytest.mark.parametrize("steps", [10, 30, 50, 100])
@pytest.mark.parametrize("name, last", [("Euler", 2), ("UniPC", 1), ("FLUX", 1)])
def test_a_last_step_that_moves_next_to_nothing_leaves_its_place(name, last, steps):
    levels = own_levels(name, steps)
    assert ends_in_nothing(levels) == (last == 2)
    chosen = spread_steps(levels, steps // 2)
    assert chosen[-1] == steps - last and len(chosen) == steps // 2
    assert spread_steps(levels, steps) == list(range(steps))
    assert spread_steps(levels, steps - 1)[-1] == steps - last
    compute_the_end = np.arange(steps) == steps - 1
    assert spread_steps(levels, steps // 2, must_compute=compute_the_end)[-1] == steps - 1


def test_the_only_step_of_an_expert_computes():
    levels = own_levels("Euler", 30)
    assert spread_steps(levels, 12, switch_step=29)[-2:] == [28, 29]
    assert spread_steps(levels, 12, switch_step=20)[-1] == 28
    for count in range(10, 30):  # with a cap, too
        chosen = spread_steps(levels, count, magcache_K=2)
        assert len(chosen) == count and max(np.diff([*chosen, 30])) <= 3
