"""Magnitude ratios carried over to other noise levels."""

import bisect
import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny_tables import GOOD, ratios_of

from common.ratios import fitted_shift, flow_sigmas, log_magnitude, nearest_interp, resample
from common.schedule import Settings, magcache_schedule
from common.tables import load, preset_names

FRAMEPACK = json.loads((Path(__file__).parent / "framepack_studio_ratios.json").read_text())["mag_ratios"]


def slow_log_magnitude(ratios, sigmas, level):
    """The curve at one level, for distinct falling sigmas."""
    curve = [sum(math.log(ratio) for ratio in ratios[: step + 1]) for step in range(len(ratios))]
    if level >= sigmas[0]:
        return curve[0]
    right = min(bisect.bisect_left([-sigma for sigma in sigmas], -level), len(sigmas) - 1)
    slope = (curve[right] - curve[right - 1]) / (sigmas[right] - sigmas[right - 1])
    return curve[right] + slope * (level - sigmas[right])


# --- other noise levels ---


@pytest.mark.parametrize("name", ["flux-dev", "wan2.1-t2v-1.3b", "chroma"])
def test_log_magnitude_is_the_curve(name):
    preset = load(name)
    levels = np.concatenate([np.random.default_rng(0).uniform(0, 1.1, 60), preset.sigmas[::3], [0.0, 1.0]])
    expected = [slow_log_magnitude(preset.mag_ratios["cond"], preset.sigmas, level) for level in levels]
    assert np.allclose(log_magnitude(preset.mag_ratios["cond"], preset.sigmas, levels), expected, rtol=0, atol=1e-12)


def test_log_magnitude_by_hand():
    at = [2.0, 1.0, 0.75, 0.5, 0.3, 0.1, 0.0]
    assert np.allclose(
        np.exp(log_magnitude([1.0, 0.5, 0.25], [1.0, 0.5, 0.1], at)),
        [1, 1, 0.5**0.5, 0.5, 0.25, 0.125, 0.125 * 0.5**0.5],
    )


def test_log_magnitude_with_equal_levels():
    """A solver of two evaluations a step lists a level twice: the curve has passed both there."""
    assert np.allclose(
        np.exp(log_magnitude([1.0, 0.9, 0.8, 0.5], [1.0, 0.6, 0.6, 0.2], np.array([0.6, 0.4, 0.2]))),
        [0.72, 0.72 * 0.5**0.5, 0.36],
    )


@pytest.mark.parametrize("name", ["flux-dev", "wan2.1-t2v-14b", "wan2.2-t2v-a14b", "flux-schnell"])
@pytest.mark.parametrize("shift", [0.5, 1, 3, 7, 16])
def test_product_over_any_range_is_kept(name, shift):
    """Every number of steps, starting anywhere (image-to-image); the product between any two steps is a quotient of
    these."""
    preset = load(name)
    ratios, worst = preset.mag_ratios["cond"], 0
    for steps in range(1, 201):
        sigmas = flow_sigmas(steps, shift)
        logs = log_magnitude(ratios, preset.sigmas, sigmas)
        for start in {0, 1, steps // 3, steps // 2, steps - 1} & set(range(steps)):
            products = np.cumprod(resample(ratios, preset.sigmas, sigmas[start:]))
            worst = max(worst, np.abs(products / np.exp(logs[start:] - logs[start]) - 1).max())
    assert worst < 1e-6


@pytest.mark.parametrize("name", preset_names())
def test_product_between_calibrated_levels_is_the_calibration_s(name):
    preset, random = load(name), np.random.default_rng(0)
    for ratios in preset.mag_ratios.values():
        for extra in (0, 7, 150):
            sigmas = np.unique([*preset.sigmas, *random.uniform(preset.sigmas[-1], 1, extra)])[::-1]
            products = np.cumprod(resample(ratios, preset.sigmas, sigmas))
            there = products[np.searchsorted(-sigmas, -np.array(preset.sigmas))]
            assert np.allclose(there, np.cumprod(ratios), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", preset_names())
def test_identity_at_the_calibrated_levels(name):
    preset = load(name)
    table = np.stack([np.array(ratios) for ratios in preset.mag_ratios.values()])
    assert (preset.at(preset.sigmas) == table).all()
    assert (preset.at(preset.sigmas, "nearest") == table).all()
    for ratios in table:
        assert np.allclose(resample(ratios, preset.sigmas, preset.sigmas), ratios, rtol=1e-12, atol=0)
    tail = preset.at(preset.sigmas[1:])
    within = np.stack([preset.within_experts(ratios) for ratios in table])
    assert (tail[:, 0] == 1).all() and np.allclose(tail[:, 1:], within[:, 2:], rtol=1e-12, atol=0)
    assert (within != table).any() == ("boundary" in preset.sampler)


def test_at_resamples_each_branch_by_noise_level():
    table, sigmas = ratios_of(), np.array([1.0, 0.8, 0.4, 0.2])
    expected = [resample(ratios, GOOD["sigmas"], sigmas) for ratios in GOOD["mag_ratios"].values()]
    assert (table.at(sigmas) == expected).all()
    assert np.allclose(table.at([1.0, 0.6, 0.4, 0.2])[0], [1, 0.9, 0.8**0.5, 0.8**0.5])
    assert table.at(sigmas, "nearest").tolist() == [[1.0, 0.9, 0.9, 0.8], [1.0, 0.95, 0.95, 0.85]]


def test_same_length_at_other_levels_is_resampled():
    table = ratios_of()
    assert table.fits([1.0, 0.601, 0.2]) and not table.fits([1.0, 0.5, 0.2]) and not table.fits([1.0, 0.6])
    assert np.allclose(table.at([1.0, 0.8, 0.2])[0], [1, 0.9**0.5, 0.9**0.5 * 0.8])


@pytest.mark.parametrize(
    "steps, expected",
    [
        (1, [50]),
        (2, [10, 50]),
        (3, [10, 30, 50]),
        (4, [10, 20, 40, 50]),
        (5, [10, 20, 30, 40, 50]),
        (8, [10, 20, 20, 30, 30, 40, 40, 50]),
        (9, [10, 10, 20, 30, 30, 30, 40, 50, 50]),  # i / 2: halves go to the even entry
    ],
)
def test_nearest_interp_as_released(steps, expected):
    assert nearest_interp([10, 20, 30, 40, 50], steps).tolist() == expected


def test_nearest_interp_of_short_tables():
    assert nearest_interp([7], 4).tolist() == [7] * 4
    assert nearest_interp([7], 1).tolist() == [7]
    assert nearest_interp([1, 2], 3).tolist() == [1, 1, 2]


FRAMEPACK_CONVERSIONS = [
    (size, source, target)
    for size in FRAMEPACK
    for source in FRAMEPACK[size]
    for target in FRAMEPACK[size]
    if source != target
]


def converted(size, source, target):
    """(measured, nearest, resampled) ratios; FramePack's shift is 7 at both sizes."""
    given, measured = np.array(FRAMEPACK[size][source]), np.array(FRAMEPACK[size][target])
    assert (len(given), len(measured)) == (int(source), int(target))
    return (
        measured,
        nearest_interp(given, len(measured)),
        resample(given, flow_sigmas(len(given), 7), flow_sigmas(len(measured), 7)),
    )


def test_resampling_beats_nearest_on_real_calibrations():
    """Measured: mean |log error| .0131 against .0308 over twelve conversions, and better in each."""
    errors = []
    for conversion in FRAMEPACK_CONVERSIONS:
        measured, *others = converted(*conversion)
        errors.append([np.abs(np.log(other[1:] / measured[1:])).mean() for other in others])
        assert errors[-1][1] < errors[-1][0], conversion
    nearest, resampled = np.mean(errors, axis=0)
    assert len(errors) == 12
    assert 0.0300 < nearest < 0.0316 and 0.0126 < resampled < 0.0136


def test_resampled_ratios_plan_what_measured_ones_plan():
    """Number of computed steps, off from the plan of the measured table: 22 with nearest, 6 resampled, over the
    twelve."""
    off = np.zeros(2, dtype=int)
    for conversion in FRAMEPACK_CONVERSIONS:
        plans = [magcache_schedule(table, Settings(0.1, 3, 0.2)).computed for table in converted(*conversion)]
        off += np.abs(np.array(plans[1:]) - plans[0])
    assert off.tolist() == [22, 6]


@pytest.mark.parametrize("steps", [1, 2, 4, 28, 200])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.1582, 16.0])
def test_flow_sigmas(steps, shift):
    sigmas = flow_sigmas(steps, shift)
    assert len(sigmas) == steps and sigmas[0] == 1 and (np.diff(sigmas) < 0).all() and sigmas[-1] > 0
    assert fitted_shift(sigmas) == pytest.approx(shift if steps > 1 else 1)


def test_flow_sigmas_by_hand():
    assert np.allclose(flow_sigmas(4, 3.0), [1, 0.9, 0.75, 0.5])
    assert np.allclose(flow_sigmas(4), [1, 0.75, 0.5, 0.25])


def test_levels_of_another_run_by_the_same_sampler():
    preset = load("flux-dev")
    assert preset.levels(28).tolist() == list(preset.sigmas)
    assert np.allclose(preset.levels(28, 1.0), flow_sigmas(28, 1.0))
    assert np.allclose(preset.levels(50), flow_sigmas(50, preset.sampler["shift"]))
    assert load("chroma").levels(26).tolist() == list(load("chroma").sigmas)  # not a flow schedule
