"""The plans of runs against the schedules of the released scripts, and where they differ on purpose."""

import json
from pathlib import Path

import numpy as np
import pytest
from rule_by_definition import by_definition, plan_by_definition

from common.schedule import (
    Rule,
    Settings,
    first_reusable,
    magcache_schedule,
    retained_steps,
    rule_of,
)
from common.tables import load, preset_names

GOLDEN = json.loads((Path(__file__).parent / "golden_schedules.json").read_text())["runs"]
PRESET_OF = {
    "wan_t2v:T2V-1.3B": "wan2.1-t2v-1.3b",
    "wan_t2v:T2V-14B": "wan2.1-t2v-14b",
    "wan_i2v:480P": "wan2.1-i2v-14b-480p",
    "wan_i2v:720P": "wan2.1-i2v-14b-720p",
    "wan_vace:VACE-1.3B": "wan2.1-vace-1.3b",
    "wan_vace:VACE-14B": "wan2.1-vace-14b",
    "t2v-A14B": "wan2.2-t2v-a14b",
    "i2v-A14B": "wan2.2-i2v-a14b",
    "ti2v-5B:t2v": "wan2.2-ti2v-5b-t2v",
    "ti2v-5B:i2v": "wan2.2-ti2v-5b-i2v",
    "720": "hunyuanvideo-t2v-720p",
    "544": "hunyuanvideo-t2v-544p",
    "flux-dev": "flux-dev",
    "kontext": "flux-kontext-dev",
    "framepack": "framepack",
    "framepack-f1": "framepack-f1",
}

# Every place where ours differs from a release on purpose: what the release does, what ours does, golden runs that show
# it. Each has a test below, named test_difference_<key>.
DIFFERENCES = {
    "odd_start": (
        "counts model calls, so an odd start index lets the unconditional branch reuse one step before the conditional",
        "a step that either branch keeps is kept for both",
        149,
    ),
    "branches_disagree": (
        "decides for each branch alone, so that guidance mixes a fresh and a stale prediction",
        "one decision a step: reuse only if both branches may",
        10,
    ),
    "no_residual_yet": (
        "retention_ratio * steps below one step: reuses before there is a residual, and raises",
        "the first step always computes",
        11,
    ),
    "few_steps": (
        "applies the rule to runs of one to four steps as well, and mostly raises",
        "a preset's min_steps (5; flux-schnell 4): shorter runs compute every step",
        0,
    ),
    "off": ("threshold 0 with <= still reuses a ratio of exactly 1", "threshold 0 or K 0 is off", 0),
    "one_step": ("FLUX divides by steps - 1", "a run of one step computes it", 0),
}


def released_retention(run, branch):
    """Mask of the steps that the release computes anyway, told as its scripts do, by the number of the model call."""
    calls_a_step = 2 if "uncond" in run else 1
    calls, R = calls_a_step * run["steps"], run["R"]
    number = np.arange(run["steps"]) * calls_a_step + branch
    split = 2 * run.get("high_noise_steps", 0)
    if run["table"] == "t2v-A14B":
        return (number < int(split * R)) | ((split <= number) & (number <= split + (calls - split) * R))
    if run["table"] == "i2v-A14B":
        return number < int(split + (calls - split) * R)
    if run["rule"].startswith("flux"):
        return number < int(calls * R + 0.5)
    if run["rule"].startswith("framepack"):
        return number < max(1, int(calls * R))
    return number < int(calls * R)


def retention(run):
    return np.stack([released_retention(run, branch) for branch in range(2 if "uncond" in run else 1)])


def planned_reuse(run):
    preset = load(PRESET_OF[run["table"]])
    settings = Settings(run["thresh"], run["K"], run["R"])
    ratios = preset.at(preset.levels(run["steps"]), "nearest")
    return (
        magcache_schedule(ratios, settings, rule_of(preset), run.get("high_noise_steps")),
        ratios,
        settings,
        rule_of(preset),
    )


def difference(run):
    """Why ours is not the release's schedule, as a key of DIFFERENCES, or None."""
    if "crash_at_call" in run:
        return "no_residual_yet"
    if run["cond"] == run.get("uncond", run["cond"]):
        return None
    kept = retention(run)
    return "branches_disagree" if (kept[0] == kept[1]).all() else "odd_start"


def label(run):
    return {key: value for key, value in run.items() if key not in ("cond", "uncond")}


@pytest.mark.parametrize("table", PRESET_OF)
def test_golden_runs_are_reproduced(table):
    runs = [run for run in GOLDEN if run["table"] == table and difference(run) is None]
    assert len(runs) >= 19
    wrong = [label(run) for run in runs if planned_reuse(run)[0].skipped_steps != run["cond"]]
    assert not wrong


def test_no_golden_run_is_dropped():
    assert {run["table"] for run in GOLDEN} == set(PRESET_OF)
    reasons = [difference(run) for run in GOLDEN]
    counts = {name: reasons.count(name) for name in (None, *DIFFERENCES)}
    assert counts == {None: 614, **{name: runs for name, (_, _, runs) in DIFFERENCES.items()}}
    assert sum(counts.values()) == len(GOLDEN) == 784
    assert all(f"test_difference_{name}" in globals() for name in DIFFERENCES)


def test_definition_reproduces_every_golden_run():
    """`by_definition` is only worth comparing with if it gives the released schedules, those of each branch alone
    included."""
    for run in GOLDEN:
        _, ratios, settings, rule = planned_reuse(run)
        for row, kept, branch in zip(ratios, retention(run), ("cond", "uncond")[: len(ratios)]):
            assert by_definition([row], settings, rule, kept)[0] == run[branch], (branch, label(run))


def check_joint_decision(name):
    runs = [run for run in GOLDEN if difference(run) == name]
    assert len(runs) == DIFFERENCES[name][2]
    for run in runs:
        schedule, ratios, settings, rule = planned_reuse(run)
        kept = retention(run).any(axis=0)
        kept[0] = True
        assert schedule.skipped_steps == by_definition(ratios, settings, rule, kept)[0], label(run)
        assert schedule.skipped_steps != run["cond"] or schedule.skipped_steps != run["uncond"], label(run)


def test_difference_odd_start():
    check_joint_decision("odd_start")
    assert first_reusable(25, 0.1, "calls") == 3  # int(2 * 25 * 0.1) = 5 calls: two steps and a half
    schedule = plan_by_definition("wan2.1-t2v-1.3b", 25, magcache_thresh=0.24, magcache_K=5, retention_ratio=0.1)
    assert schedule.skipped_steps[:6] == [3, 4, 5, 6, 7, 9]


def test_difference_branches_disagree():
    check_joint_decision("branches_disagree")
    ratios = [[1, 1, 1.00, 1.0, 1.0, 1.05, 1.0, 1.0], [1, 1, 1.15, 1.0, 1.0, 1.00, 1.0, 1.0]]
    settings = Settings(0.1, 3, 0.25)
    assert magcache_schedule(ratios[0], settings).skipped_steps == [2, 3, 4, 6, 7]
    assert magcache_schedule(ratios[1], settings).skipped_steps == [3, 4, 5, 7]
    assert magcache_schedule(ratios, settings).skipped_steps == [3, 4, 5, 7]
    assert magcache_schedule(ratios[::-1], settings).skipped_steps == [3, 4, 5, 7]


def test_difference_no_residual_yet():
    for run in (run for run in GOLDEN if difference(run) == "no_residual_yet"):
        schedule, ratios, settings, rule = planned_reuse(run)
        kept = retention(run).any(axis=0)
        kept[0] = True
        assert 0 in run.get("uncond", run["cond"])
        assert schedule.skipped_steps == by_definition(ratios, settings, rule, kept)[0], label(run)
        assert schedule.skipped_steps[0] == 1


@pytest.mark.parametrize("name", preset_names())
def test_difference_few_steps(name):
    least = 4 if name == "flux-schnell" else 5
    for steps in range(1, least):
        schedule = plan_by_definition(name, steps, magcache_thresh=1e9, retention_ratio=0)
        assert schedule.skipped_steps == [] and schedule.computed == schedule.fewest_computed == steps
        assert schedule.why_none == f"a run of {steps} steps has nothing to gain (MagCache starts at {least})"
    assert plan_by_definition(name, least, magcache_thresh=1e9, retention_ratio=0).reuse.any()


def test_difference_off():
    ratios = np.ones((1, 28))
    assert magcache_schedule(ratios, Settings(1e-9, 5, 0.1)).reuse.any()
    for settings, text in (
        (Settings(0, 5, 0.1), "magcache_thresh is 0, which turns MagCache off"),
        (Settings(0.24, 0, 0.1), "magcache_K is 0, which turns MagCache off"),
    ):
        schedule = magcache_schedule(ratios, settings)
        assert schedule.strip == "#" * 28 and schedule.bound == 1 and schedule.why_none == text
        assert schedule.computed == schedule.fewest_computed == 28


@pytest.mark.parametrize("name", ["flux-dev", "flux-kontext-dev"])
def test_difference_one_step(name):
    with np.errstate(all="raise"):
        assert plan_by_definition(name, 1).strip == "#"
        assert retained_steps(1, 0.1, rule_of(load(name))).tolist() == [True]


@pytest.mark.parametrize(
    "name, settings, computed",
    [
        ("flux-dev", {}, "9 of 28"),
        ("flux-kontext-dev", {}, "14 of 28"),
        ("flux-schnell", {}, "3 of 4"),
        ("wan2.1-t2v-1.3b", {}, "21 of 50"),
        ("wan2.1-t2v-1.3b", {"magcache_K": 2}, "25 of 50"),
        ("wan2.1-t2v-14b", {}, "18 of 50"),
        ("wan2.1-i2v-14b-480p", {}, "15 of 40"),
        ("wan2.1-i2v-14b-720p", {}, "14 of 40"),
        ("wan2.1-i2v-14b-480p", {"magcache_thresh": 0.12, "magcache_K": 4}, "17 of 40"),
        ("wan2.1-i2v-14b-720p", {"magcache_thresh": 0.12, "magcache_K": 4}, "17 of 40"),
        ("wan2.1-vace-1.3b", {}, "29 of 50"),
        ("wan2.1-vace-14b", {}, "34 of 50"),
        ("wan2.2-ti2v-5b-t2v", {}, "25 of 50"),
        ("hunyuanvideo-t2v-544p", {}, "18 of 50"),
        ("hunyuanvideo-t2v-720p", {}, "19 of 50"),
        ("hunyuanvideo-t2v-720p", {"magcache_thresh": 0.12, "magcache_K": 4}, "22 of 50"),
        ("hunyuanvideo-1.5-t2v-20steps", {}, "12 of 20"),
        ("hunyuanvideo-1.5-t2v-40steps", {}, "21 of 40"),
        ("framepack", {}, "12 of 25"),
        ("framepack", {"magcache_thresh": 0.15, "magcache_K": 4}, "11 of 25"),
        ("framepack-f1", {}, "12 of 25"),
        ("framepack-f1", {"magcache_thresh": 0.15, "magcache_K": 4}, "10 of 25"),
        ("open-sora-1.2", {}, "12 of 30"),
        ("open-sora-1.2", {"magcache_thresh": 0.24, "magcache_K": 5}, "10 of 30"),
        ("qwen-image", {}, "37 of 50"),
        ("qwen-image-edit", {}, "35 of 50"),
        ("qwen-image-comfyui", {}, "27 of 40"),
        ("chroma", {}, "13 of 26"),
        ("flux-kontext-dev-comfyui", {}, "10 of 20"),
    ],
)
def test_published_settings_compute_what_the_release_computes(name, settings, computed):
    schedule = plan_by_definition(name, **settings)
    assert f"{schedule.computed} of {schedule.steps}" == computed


@pytest.mark.parametrize(
    "name, skipped",
    [
        ("flux-dev", [3, 4, 6, 7, 8, 10, 12, 13, 14, 15, 16, 18, 19, 20, 21, 22, 24, 25, 27]),
        ("flux-kontext-dev", [6, 8, 9, 12, 13, 14, 15, 17, 18, 19, 20, 22, 23, 25]),
        ("flux-schnell", [2]),
        ("framepack", [5, 6, 8, 10, 11, 13, 14, 16, 17, 19, 20, 21, 23]),
        ("framepack-f1", [5, 6, 8, 10, 11, 13, 14, 15, 17, 18, 19, 21, 23]),
        ("open-sora-1.2", [6, 7, 8, 10, 11, 12, 14, 15, 16, 18, 19, 20, 22, 23, 24, 26, 27, 28]),
        (
            "flux-kontext-dev-comfyui",
            [4, 6, 8, 9, 12, 13, 14, 15, 17, 18],
        ),  # its own rule: <, floor, never step 11 of 20
    ],
)
def test_published_settings_skip_what_the_release_skips(name, skipped):
    assert plan_by_definition(name).skipped_steps == skipped


def test_wan22_experts_at_published_settings():
    """The release skips forwards 20-23, 26-29, ..., 50, 51, 64, 65, 68, 69, 72, 73 with the second expert from step 26
    on."""
    schedule = plan_by_definition("wan2.2-t2v-a14b", switch_step=26)
    forwards = [forward for step in schedule.skipped_steps for forward in (2 * step, 2 * step + 1)]
    assert forwards == [
        20,
        21,
        22,
        23,
        26,
        27,
        28,
        29,
        32,
        33,
        34,
        35,
        38,
        39,
        40,
        41,
        44,
        45,
        46,
        47,
        50,
        51,
        64,
        65,
        68,
        69,
        72,
        73,
    ]
    assert schedule.retained[26:32].all() and not schedule.retained[32]
    # Its image-to-video settings start at forward 35, an odd index: 59 of 80 forwards there, 30 of 40 steps here.
    schedule = plan_by_definition("wan2.2-i2v-a14b", switch_step=15)
    assert schedule.skipped_steps == [18, 19, 21, 22, 24, 25, 27, 29, 31, 33]


@pytest.mark.parametrize("experts", ["each", "last"])
@pytest.mark.parametrize("switch_step", [1, 7, 19])
def test_both_experts_compute_first(experts, switch_step):
    """The other expert's residual must never be reused, whatever the retention ratio."""
    rule = Rule(experts=experts, retained_resets=False)
    schedule = magcache_schedule(np.ones(20), Settings(1, 5, 0), rule, switch_step)
    assert not schedule.reuse[0] and not schedule.reuse[switch_step]
    assert all(schedule.anchors(step)[0] >= switch_step for step in schedule.skipped_steps if step > switch_step)
    assert experts == "each" or not schedule.reuse[:switch_step].any()


@pytest.mark.parametrize("switch_step", [None, 0, 20])
def test_one_expert_alone_is_one_model(switch_step):
    mask = retained_steps(20, 0.31, Rule(experts="each"), switch_step)
    assert mask.tolist() == [True] * 6 + [False] * 14
