"""What a table covers and how finely, which table stands for a checkpoint, and the tables of other programs."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_tables import refusal

from common import __version__
from common.__main__ import main
from common.gram import packed
from common.plan_text import plan_text
from common.planner import Target
from common.ratios import flow_sigmas
from common.schedule import Settings
from common.tables import (
    FORMAT,
    RatioTable,
    best,
    calibrations,
    find,
    import_table,
    load,
    preset_names,
    read,
    save_calibration,
    write,
)

STUDIO = Path(__file__).parent / "framepack_studio_ratios.json"


def table_of(levels, name="mine", **fields):
    ratios = {"cond": [1.0, *np.linspace(0.99, 0.9, len(levels) - 1)]}
    return RatioTable(name=name, mag_ratios=ratios, sigmas=tuple(levels), origin="measured", **fields)


# --- what a table covers ---


@pytest.mark.parametrize("steps", [8, 28, 50, 1000])
@pytest.mark.parametrize("shift", [1, 3, 12])
def test_a_full_run_covers_every_full_run(steps, shift):
    table = table_of(flow_sigmas(28, 3.0))
    assert table.covers(flow_sigmas(steps, shift))
    assert table_of(flow_sigmas(steps, shift)).covers(table.sigmas)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_covers_a_full_run(name):
    assert load(name).covers(flow_sigmas(100, 3.0))


def test_a_run_that_starts_later_covers_what_it_saw():
    levels = flow_sigmas(28, 3.0)
    table = table_of(levels[17:])  # image to image
    covered = table.covered(levels)
    assert covered.tolist() == [False] * 17 + [True] * 11
    assert not table.covers(levels) and table.covers(levels[17:]) and table.covers(flow_sigmas(50, 3.0)[35:])


def test_a_run_that_ends_early_covers_what_it_saw():
    levels = flow_sigmas(20, 8.0)
    table = table_of(levels[:10])  # the first of two samplers
    assert table.covered(levels).tolist() == [True] * 10 + [False] * 10


def test_a_level_rounded_by_its_sampler_is_covered():
    table = table_of([0.9999, *flow_sigmas(28, 5.0)[1:]])
    assert table.covers([1.0]) and not table_of(flow_sigmas(28, 1.0)[1:]).covers([1.0])


@pytest.mark.robustness(
    "Files",
    "a run beyond the calibrated noise levels",
    "the steps beyond them compute, and no error is predicted for them",
)
def test_the_rule_reuses_nothing_beyond_the_calibrated_levels():
    levels, settings = flow_sigmas(28, 3.0), Settings(0.5, 3, 0.1)
    full, partial = table_of(levels), table_of(levels[17:])
    assert settings.plan(full, levels).reuse[:18].any()
    schedule = settings.plan(partial, levels)
    assert not schedule.reuse[:18].any() and schedule.reuse[18:].any() and not schedule.why_none
    assert settings.plan(partial, levels[:17]).why_none == "the table covers no step that could be reused"
    assert settings.plan(table_of(levels[:10]), levels).computed > settings.plan(full, levels).computed


@pytest.mark.robustness("Files", "a run beyond the calibrated noise levels")
@pytest.mark.parametrize("part", [slice(10, None), slice(0, 12)])
@pytest.mark.parametrize("predictor", ["linear", "reuse"])
def test_a_plan_skips_and_predicts_within_the_calibrated_levels_only(part, predictor):
    levels = flow_sigmas(28, 3.0)
    own = levels[part]
    vectors = np.stack([np.cos(3 * own), np.sin(3 * own), own], axis=1)
    gram = {"cond": packed(vectors @ vectors.T)}
    table = table_of(own, statistics={"gram": gram, "gram_of_outputs": gram})
    covered = table.covered(levels)
    for target in (
        Target(magcache_speedup=1.3, predictor=predictor),
        Target(magcache_max_error=0.2, predictor=predictor),
        Target(magcache_steps=int((~covered).sum()) + 8, predictor=predictor),
    ):
        schedule = target.plan(table, levels)
        skipped = np.flatnonzero(schedule.reuse)
        assert len(skipped) and covered[skipped].all() and np.isfinite(schedule.expected_error).all()
        assert all(covered[schedule.anchors(step)[0]] for step in skipped)
        assert "lie beyond the noise levels of this table" in plan_text(schedule, levels, table)
    fewest = int((~covered).sum()) + 1
    assert Target(magcache_steps=fewest, predictor=predictor).plan(table, levels).computed == fewest
    assert f"between {fewest} and 28" in refusal(Target(magcache_steps=3, predictor=predictor).plan, table, levels)


def test_a_coarse_calibration_predicts_nothing():
    gram = {"cond": packed(np.eye(3))}
    coarse = table_of(flow_sigmas(3, 3.0), statistics={"gram": gram, "gram_of_outputs": gram})
    target = Target(magcache_steps=20, predictor="linear")
    assert "calibrated in 3 steps, too few to predict a run of 50" in refusal(target.plan, coarse, flow_sigmas(50, 3.0))
    schedule = Settings(0.5, 3, 0.1).plan(coarse, flow_sigmas(50, 3.0))
    assert schedule.reuse.any()  # ratios are carried over all the same
    assert "expected relative error" not in plan_text(schedule, flow_sigmas(50, 3.0), coarse)


def test_one_step_covers_itself():
    table = table_of([0.5])
    assert table.covered([0.6, 0.5, 0.4]).tolist() == [False, True, False]


# --- how fine it is ---


@pytest.mark.parametrize(
    "measured, run, fine",
    [(28, 28, True), (28, 50, True), (28, 100, True), (14, 50, True), (50, 8, True), (3, 4, True)]
    + [(3, 50, False), (2, 25, False), (8, 50, False), (28, 200, False)],
)
def test_too_coarse_for_a_run(measured, run, fine):
    assert table_of(flow_sigmas(measured, 3.0)).fine_enough(flow_sigmas(run, 3.0)) == fine


def test_coarse_at_one_end_is_coarse():
    table = table_of(flow_sigmas(30, 12.0))  # two levels below 0.45
    assert table.fine_enough(flow_sigmas(30, 12.0)[5:]) and not table.fine_enough(flow_sigmas(30, 1.0))


# --- files ---


@pytest.mark.robustness(
    "Files",
    "a calibration in an older or a newer format",
    "the older one loads; the newer one is refused, with the version that wrote it",
)
def test_a_file_says_its_format_and_who_wrote_it(tmp_path):
    write(tmp_path / "mine.json", table_of(flow_sigmas(5, 3.0)))
    content = json.loads((tmp_path / "mine.json").read_text())
    assert content["format"] == FORMAT and content["magcache_version"] == __version__
    del content["format"], content["magcache_version"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert read(tmp_path / "old.json").mag_ratios == read(tmp_path / "mine.json").mag_ratios
    (tmp_path / "new.json").write_text(json.dumps({**content, "format": FORMAT + 1, "magcache_version": "9.1"}))
    text = refusal(read, tmp_path / "new.json")
    assert f"format {FORMAT + 1}, written by MagCache 9.1" in text and f"this is {__version__}" in text


@pytest.mark.robustness("Files", "a table with numpy arrays and numbers", "written, and read back unchanged")
def test_numbers_of_numpy_are_written(tmp_path):
    sigmas = np.array([1.0, 0.5])
    numbers = {"runs": np.int64(3), "gram": {"cond": [np.array([1.0, 0.5]), np.array([1.0])]}}
    ratios = {"cond": np.array([1.0, 0.9], dtype=np.float32)}
    write(tmp_path / "mine.json", RatioTable("mine", ratios, sigmas, "measured", statistics=numbers))
    table = read(tmp_path / "mine.json")
    assert table.sigmas == [1.0, 0.5] and table.mag_ratios["cond"] == pytest.approx([1.0, 0.9])
    assert table.statistics == {"runs": 3, "gram": {"cond": [[1.0, 0.5], [1.0]]}}


FULL = flow_sigmas(25, 3.0)
OURS = {"provenance": {"fingerprint": "abc", "date": "2026-11-25"}}


@pytest.mark.robustness(
    "Files",
    "a calibration that covers a part of the noise levels, or is coarser, where there is a better one",
    "kept beside it; the better one stays in use for runs that the new one does not cover",
)
@pytest.mark.parametrize("levels", [FULL[10:], FULL[:10], flow_sigmas(2, 3.0), flow_sigmas(20, 3.0)])
def test_a_partial_or_coarser_table_goes_beside_a_better_one(home, levels):
    path = home / "m-abc.json"
    assert save_calibration(path, table_of(FULL, "full", **OURS)) == path
    other = save_calibration(path, table_of(levels, "other", **OURS))
    assert other != path and read(path).name == "full" and read(other).name == "other"
    assert save_calibration(path, table_of(levels, "again", **OURS)) == other and read(other).name == "again"
    assert find("m", "abc").name == "full" and find("m", "abc", levels).name == "again"
    assert find("m", "abc", flow_sigmas(30, 3.0)).name == "full"


def test_a_table_as_good_replaces_the_old(home):
    save_calibration(home / "m-abc.json", table_of(FULL, "old"))
    for levels in (FULL, flow_sigmas(40, 5.0)):
        assert save_calibration(home / "m-abc.json", table_of(levels, "new")) == home / "m-abc.json"
        assert read(home / "m-abc.json").steps == len(levels)


@pytest.mark.robustness(
    "Files",
    "a calibration is to be saved where a file that is not a table exists",
    "the file stays; the calibration goes beside it",
)
def test_a_file_that_is_no_table_is_not_written_over(home):
    home.mkdir()
    (home / "mine.json").write_text('{"somebody": "else"}')
    path = save_calibration(home / "mine.json", table_of(FULL))
    assert (home / "mine.json").read_text() == '{"somebody": "else"}' and read(path).steps == 25


@pytest.mark.robustness("Files", "a broken file among the calibrations", "ignored with a line; the others are used")
def test_a_broken_calibration_is_passed_over_with_a_line(home):
    write(home / "a-abc.json", table_of(FULL, "good"))
    (home / "b-abc.json").write_text("{")
    lines = []
    assert [table.name for table in calibrations("*-abc.json", lines.append).values()] == ["good"]
    assert len(lines) == 1 and "b-abc.json" in lines[0]
    assert find("nobody/s-model", "abc").name == "good"


def test_of_two_alike_the_newest_serves():
    tables = [table_of(FULL, date, provenance={"date": date}) for date in ("2026-01-02", "2026-01-03", "2026-01-01")]
    assert best(tables).name == best(tables, FULL).name == "2026-01-03"
    assert best([]) is None


# --- tables of other programs ---

FLUX, WAN = load("flux-dev").mag_ratios["cond"], load("wan2.1-t2v-14b").mag_ratios
IN_TURN = [ratio for both in zip(WAN["cond"], WAN["uncond"]) for ratio in both]
PAPER = {"magcache_thresh": 0.1, "magcache_K": 2, "retention_ratio": 0.2}
DIFFUSERS = {"threshold": 0.1, "max_skip_steps": 2, "retention_ratio": 0.2, "num_inference_steps": 28}
LIGHTX2V = {"magcache_thresh": 0.1, "magcache_K": 2, "magcache_retention_ratio": 0.2, "infer_steps": 50}
TELEFUSER = {"cond_mag_ratios": WAN["cond"], "uncond_mag_ratios": WAN["uncond"], "num_inference_steps": 50}
PEERS = {  # what is in the file, which flags it needs, which branches and settings it gives
    "diffusers, the printed list": (FLUX, {"steps": 28, "shift": 3.0}, {"cond": FLUX}, {}),
    "diffusers, the config": (DIFFUSERS | {"mag_ratios": FLUX}, {"shift": 3.0}, {"cond": FLUX}, PAPER),
    "the release, in turn": (IN_TURN, {"steps": 50, "shift": 5.0}, WAN, {}),
    "the release, as its calibration saves it": (IN_TURN[2:], {"steps": 50, "shift": 5.0}, WAN, {}),
    "the release, one branch": (FLUX[1:], {"steps": 28, "shift": 3.0}, {"cond": FLUX}, {}),
    "LightX2V, the pair": (list(WAN.values()), {"shift": 5.0}, WAN, {}),
    "LightX2V, a config": (
        LIGHTX2V | {"sample_shift": 5, "magcache_ratios": list(WAN.values())},
        {},
        WAN,
        PAPER,
    ),
    "TeleFuser": (TELEFUSER | {"sigma_shift": 8.0, "K": 2, "retention_ratio": 0.2, "thresh": 0.1}, {}, WAN, PAPER),
    "TeleFuser, as calibrated": (
        TELEFUSER | {"sigma_shift": 8.0, "K": 0, "retention_ratio": 0, "thresh": 0},
        {},
        WAN,
        {},
    ),
    "Kandinsky-5, no guidance": (
        [value for ratio in WAN["cond"][1:] for value in (ratio, 0)],
        {"steps": 50, "shift": 5.0},
        {"cond": WAN["cond"]},
        {},
    ),
    "Kandinsky-5, a config": (
        {"num_steps": 50, "scheduler_scale": 5.0, "mag_ratios": IN_TURN[2:]},
        {},
        WAN,
        {},
    ),
}


@pytest.mark.robustness(
    "Files",
    "tables of diffusers, the release, LightX2V, TeleFuser, Kandinsky-5 and FramePack-Studio",
    "loaded where steps and shift are given or in the file, and the noise levels marked as assumed",
)
@pytest.mark.parametrize("peer", PEERS)
def test_a_peers_table_is_imported(tmp_path, peer):
    content, flags, branches, settings = PEERS[peer]
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    table = import_table(tmp_path / "theirs.json", **flags)
    assert table.mag_ratios == branches and table.settings == settings
    assert table.sampler["assumed"] is True and table.origin == "published" and table.source == "theirs.json"
    assert np.allclose(table.sigmas, flow_sigmas(table.steps, table.sampler["shift"]), atol=1e-6)
    if not flags:  # nothing is missing: it serves as it is
        assert read(tmp_path / "theirs.json") == table
    write(tmp_path / "ours.json", table)
    assert load(tmp_path / "ours.json").at(table.sigmas).shape == (len(branches), table.steps)


@pytest.mark.robustness(
    "Files",
    "such a table without steps or shift, or a file that is not a table",
    "one sentence says what is missing and gives the command",
)
@pytest.mark.parametrize(
    "content, flags, says",
    [
        (FLUX, {}, "a list of 28 ratios, of one branch or of two in turn: give the number of steps"),
        (FLUX, {"steps": 28}, "ratios of 28 steps, but not the shift of their sampler"),
        (FLUX, {"steps": 20, "shift": 3.0}, "has 28 ratios a branch, which do not fit 20 steps"),
        ([FLUX, FLUX[1:]], {"shift": 3.0}, "has 28 and 27 ratios for its branches"),
        ({"model": "x"}, {}, "holds no magnitude ratios"),
        ("text", {}, "holds no magnitude ratios"),
        ({"a": {"25": FLUX}, "b": {"25": FLUX}}, {}, "holds several tables: name one of a/25, b/25"),
        ({"a": {"25": FLUX}}, {"entry": "a/50"}, "has no entry 50; there are 25"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(tmp_path, content, flags, says):
    (tmp_path / "theirs.json").write_text(json.dumps(content))
    assert says in refusal(lambda: import_table(tmp_path / "theirs.json", **flags))


@pytest.mark.robustness("Files", "such a table without steps or shift, or a file that is not a table")
def test_a_peers_table_named_as_ratios_says_how_to_import_it(tmp_path):
    (tmp_path / "theirs.json").write_text(json.dumps(DIFFUSERS | {"mag_ratios": FLUX}))
    assert "`magcache import theirs.json --shift 3`" in refusal(load, tmp_path / "theirs.json")


@pytest.mark.robustness(
    "Files",
    "tables of diffusers, the release, LightX2V, TeleFuser, Kandinsky-5 and FramePack-Studio",
)
def test_the_command_imports_one_of_framepack_studios(home, capsys):
    command = ["import", str(STUDIO), "--entry", "mag_ratios/512/25", "--shift", "7", "--out", "studio.json"]
    main([*command, "--steps", "25"])
    assert "--mag_ratios studio.json" in capsys.readouterr().out
    theirs = json.loads(STUDIO.read_text())["mag_ratios"]["512"]["25"]
    assert read("studio.json").mag_ratios == {"cond": theirs}
    with pytest.raises(SystemExit, match="already exists"):
        main([*command, "--steps", "25"])
    main(["plan", "studio.json", "--magcache_steps", "10"])
    assert "computes 10 of 25" in capsys.readouterr().out
