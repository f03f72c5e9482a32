"""Wan2.2's own code, from the package wan22, on a CPU with tiny random weights: structure, not quality. Its two
experts, its samplers, its sequence parallelism and sharding; only text encoder, VAE and attention kernel are replaced
(wan_cpu.py)."""

import argparse
import json
import re
from pathlib import Path

import packages
import pytest
import torch
from PIL import Image
from wan_runs import WAN22_WHEEL, WanRuns

from common.errors import MagCacheError
from common.scripts.quality import read_frames
from common.scripts.session import Session
from common.tables import read

HERE = Path(__file__).resolve().parent
KINDS = ("t2v", "i2v", "ti2v-t2v", "ti2v-i2v")
SMALL = ("--frame_num", "5", "--sample_steps", "12", "--base_seed", "1", "--prompt", "a cat")
TASKS = {
    "t2v": ("--task", "t2v-A14B", "--size", "832*480"),
    "i2v": ("--task", "i2v-A14B", "--size", "832*480"),
    "ti2v-t2v": ("--task", "ti2v-5B", "--size", "1280*704"),
    "ti2v-i2v": ("--task", "ti2v-5B", "--size", "1280*704"),
    "s2v": ("--task", "s2v-14B", "--size", "832*480", "--infer_frames", "8", "--audio", "talk.wav"),
    "animate": ("--task", "animate-14B", "--size", "1280*720", "--src_root_path", "."),
}
CHECKPOINTS = {"t2v": "t2v-experts", "i2v": "i2v-experts", "ti2v-t2v": "ti2v", "ti2v-i2v": "ti2v"}
CHECKPOINTS |= {"s2v": "s2v", "animate": "animate"}

# What the release computes (#) and skips (.) at its published settings (unit/test_released_schedules.py has its rule).
PUBLISHED = {
    "wan2.2-t2v-a14b": "##########..#..#..#..#..#.######.#.#.###",
    "wan2.2-i2v-a14b": "##################..#..#..#.#.#.#.######",
    "wan2.2-ti2v-5b-t2v": "##########..#..#..#..#..#..#..#..#..#.#.#.#.#.#.#.",
    "wan2.2-ti2v-5b-i2v": "##########..#..#..#..#..#..#..#..#..#.#.#.#.#.###.",
    "wan2.1-t2v-1.3b": "##########....#....#....#....#....#...#..#..#.#.##",
    "wan2.1-t2v-14b": "##########......#......#......#.....#....#..#..#.#",
    "wan2.1-i2v-14b-480p": "########......#.....#....#....#...#..#.#",
    "wan2.1-i2v-14b-720p": "########......#......#.....#....#..#..#.",
    "wan2.1-vace-1.3b": "##########...#...#...#..#..#..#..#.#.#.#.#########",
}


@pytest.fixture(scope="module")
def wan22_runs(tmp_path_factory):
    package = packages.unpacked_package(*WAN22_WHEEL) / "wan"
    runs = WanRuns(tmp_path_factory.mktemp("wan22"), package, HERE / "wan22_generate.py", "MagCache4Wan2.2")
    yield runs
    runs.close()


@pytest.fixture
def case(wan22_runs, tmp_path):
    """Run a case of wan_cases.py; what it returns."""

    def run(name, *arguments):
        for kind in set(CHECKPOINTS.values()):
            wan22_runs.checkpoint(kind)
        done = wan22_runs.run(HERE / "wan_cases.py", name, wan22_runs.checkpoints, *arguments, cwd=tmp_path)
        assert done.code == 0, done.output
        return json.loads((tmp_path / "result.json").read_text())

    return run


@pytest.fixture
def wan22_command(wan22_runs, tmp_path):
    """Run the drop-in, or another script beside it, as a user does, in a folder of its own."""

    def run(kind, *flags, script="magcache_generate.py", ranks=1, code=0, checkpoint=None):
        if kind.endswith(("i2v", "s2v")):
            Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "cat.png")
            flags = ("--image", "cat.png", *flags)
        argv = (
            wan22_runs.folder / script,
            *TASKS[kind],
            *SMALL,
            "--ckpt_dir",
            checkpoint or wan22_runs.checkpoint(CHECKPOINTS[kind]),
            *flags,
        )
        done = (
            [wan22_runs.run(*argv, cwd=tmp_path)] if ranks == 1 else wan22_runs.ranks(*argv, cwd=tmp_path, count=ranks)
        )
        assert [one.code for one in done] == [code] * ranks, "\n".join(one.output for one in done)
        return done[0] if ranks == 1 else done

    return run


# The models alone


@pytest.mark.parametrize("kind", (*KINDS, "s2v", "animate"))
def test_off_is_the_host_to_the_bit(case, kind):
    result = case("uncached_is_the_same_to_the_bit", kind)
    assert result == {"equal": True, "equal_after": True, "cached_differs": True, "reused": 0}


@pytest.mark.parametrize(
    "kind, solver", [("t2v", "unipc"), ("t2v", "dpm++"), ("i2v", "unipc"), ("ti2v-t2v", "dpm++"), ("ti2v-i2v", "unipc")]
)
def test_a_reused_call_of_wan22_is_the_hosts_forward_with_the_residual(case, kind, solver):
    for run in case("reused_calls_are_the_hosts_forward_with_the_residual", kind, solver):
        assert run["cond"] == run["uncond"] == run["planned"] and "." in run["planned"]
        assert run["unplanned"] == {} and run["runs"] == 1 and run["complete"]


@pytest.mark.parametrize("kind, solver", [("s2v", "unipc"), ("s2v", "dpm++"), ("animate", "dpm++")])
def test_each_segment_is_a_run(case, kind, solver):
    """And what is added between the blocks, of the sound or the face, is not added twice."""
    for run in case("reused_calls_are_the_hosts_forward_with_the_residual", kind, solver):
        assert run["cond"] == run["planned"] and "." in run["planned"] and run["runs"] == 2
        assert run["uncond"] == (run["planned"] if kind == "s2v" else "")  # Animate has no guidance
        assert run["unplanned"] == {} and run["complete"]


@pytest.mark.parametrize(
    "preset, solver",
    [
        *((preset, "unipc") for preset in PUBLISHED),
        ("wan2.2-t2v-a14b", "dpm++"),
        ("wan2.2-i2v-a14b", "dpm++"),
        ("wan2.1-t2v-1.3b", "dpm++"),
    ],
)
def test_published_settings_skip_the_published_steps(case, preset, solver):
    result = case("published_schedule", preset, solver)
    assert result["cond"] == result["uncond"] == PUBLISHED[preset]
    assert result["fits"]


def test_any_boundary(case):
    """Blurred or mosaic videos come of caches that step across the switch: here each call is repeated without the
    patch."""
    results = case("any_boundary", "t2v")
    assert [run["high_noise_steps"] for run in results] == [8, 1, 2, 5, 8, 0]
    for run in results:
        switch = run["high_noise_steps"]
        assert run["experts"] == [0] * switch + [1] * (8 - switch)
        assert run["strip"] == run["planned"] and "." in run["strip"] and run["unplanned"] == {}
        assert run["strip"][switch : switch + 1] in ("#", "")


@pytest.mark.parametrize("kind", ["t2v", "i2v", "ti2v-i2v"])
def test_runs_do_not_see_each_other(case, kind):
    result = case("runs_after_another", kind)
    assert result.pop("reused") > 0
    assert all(result.values()), result


def test_without_guidance(case):
    result = case("without_guidance")
    assert result["branches"] == [0] and result["calls"] == 9 and result["complete"]
    assert result["strip"] == result["planned"] and "." in result["strip"]


@pytest.mark.parametrize("kind", ["t2v", "ti2v-t2v"])
def test_calibration_serves_a_planned_run(case, kind):
    result = case("calibration_serves_a_planned_run", kind)
    assert result["uncached"] and result["found"] and result["differs"]
    assert result["calls"] == 32 and result["computed"] == 16 and result["unplanned"] == {} == result["other_unplanned"]
    assert result["ratios_there"] == [1.0, 1.0] and result["anywhere_else_1"] == 0
    assert (0 < result["switch"] < 16) == (result["boundary"] is not None) == (kind == "t2v")
    assert result["strip"][result["switch"]] == "#" and result["strip"].count("#") == 8
    assert result["other_strip"].count("#") == 5 and len(result["other_strip"]) == 10


# The command


@pytest.mark.parametrize("kind", KINDS)
def test_without_magcache_it_is_the_hosts_command(wan22_command, kind, tmp_path):
    plain = wan22_command(kind, "--save_file", "plain.mp4", script="generate.py")
    off = wan22_command(kind)
    assert "MagCache is off; --use_magcache turns it on." in off.output
    assert torch.equal(off.latents[0], plain.latents[0]) and len(off.latents) == len(plain.latents) == 1
    assert "MagCache" not in wan22_command(kind, "--no-magcache", "--use_magcache").output
    task = TASKS[kind][1]
    assert {path.name for path in tmp_path.iterdir()} - {"cat.png"} == {"plain.mp4", f"{task}_1.mp4"}
    assert (tmp_path / "plain.mp4").read_bytes() == (tmp_path / f"{task}_1.mp4").read_bytes()


PRESET = {
    "t2v": "wan2.2-t2v-a14b",
    "i2v": "wan2.2-i2v-a14b",
    "ti2v-t2v": "wan2.2-ti2v-5b-t2v",
    "ti2v-i2v": "wan2.2-ti2v-5b-i2v",
}


@pytest.mark.parametrize("kind", KINDS)
def test_cached_wan22(wan22_command, kind, tmp_path):
    settings = ("--magcache_thresh", "0.5", "--magcache_K", "3", "--retention_ratio", "0.2")
    done = wan22_command(kind, "--use_magcache", "--mag_ratios", PRESET[kind], *settings)
    report = json.loads((tmp_path / f"magcache_{TASKS[kind][1]}_1.magcache.json").read_text())
    assert report["calls"] == 24 and 0 < report["reused"] and report["unplanned"] == {} and report["complete"]
    models = 1 if kind.startswith("ti2v") else 2
    # The facts of each model are proved once, by a forward without its blocks.
    assert done.entered["WanAttentionBlock"] == 4 * report["computed"] and done.entered["Head"] == 24 + models
    assert report["settings"] == {"magcache_thresh": 0.5, "magcache_K": 3, "retention_ratio": 0.2}
    assert report["mag_ratios_of"] == PRESET[kind] and report["seed"] == 1 and report["prompt"] == "a cat"
    assert report["task"] == {"t2v": "t2v-A14B", "i2v": "i2v-A14B"}.get(kind, f"ti2v-5B-{kind[5:]}")
    frames, _ = read_frames(tmp_path / f"magcache_{TASKS[kind][1]}_1.mp4")
    assert frames.shape[0] == 5 and not list(tmp_path.glob("*part*"))
    assert done.output.count(report["strip"]) == 1 and "MagCache:" in done.output


def test_published_settings_are_the_default_and_printed(wan22_command, tmp_path):
    done = wan22_command(
        "t2v", "--use_magcache", "--mag_ratios", "wan2.2-t2v-a14b", "--sample_steps", "40", "--sample_shift", "12"
    )
    assert "magcache_thresh 0.06, magcache_K 2, retention_ratio 0.4" in done.output
    strip = json.loads((tmp_path / "magcache_t2v-A14B_1.magcache.json").read_text())["strip"]
    assert strip == PUBLISHED["wan2.2-t2v-a14b"]


def test_compare(wan22_command, tmp_path):
    done = wan22_command(
        "t2v",
        "--compare",
        "--mag_ratios",
        "wan2.2-t2v-a14b",
        "--magcache_thresh",
        "0.5",
        "--magcache_plot",
        "--save_file",
        "out/cat.mp4",
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "cat.mp4",
        "cat.magcache.json",
        "cat_compare.mp4",
        "cat.schedule.png",
    }
    report = json.loads((tmp_path / "out" / "cat.magcache.json").read_text())
    uncached, cached, fewer = report["quality"].values()
    assert (uncached["steps"], cached["steps"], fewer["steps"]) == (
        12,
        report["planned_computed"],
        report["planned_computed"],
    )
    assert all(0 < row["psnr"] < 100 and 0 < row["ssim"] <= 1 for row in (cached, fewer))
    assert cached["psnr"] > fewer["psnr"]
    video, fps = read_frames(tmp_path / "out" / "cat.mp4")
    sheet, sheet_fps = read_frames(tmp_path / "out" / "cat_compare.mp4")
    assert len(sheet) == len(video) and sheet_fps == fps and sheet.shape[2] >= 3 * video.shape[2]
    plain = wan22_command("t2v", "--save_file", "plain.mp4", script="generate.py")
    assert [torch.equal(plain.latents[0], latents) for latents in done.latents] == [False, True, False]


def test_calibration_is_found_by_the_next_run(wan22_command, tmp_path):
    measured = wan22_command("i2v", "--magcache_calibration")
    (path,) = (tmp_path / "home").iterdir()
    assert str(path) in measured.output and path.name.startswith("i2v-A14B-832x480x5-")
    assert torch.equal(
        measured.latents[0], wan22_command("i2v", "--save_file", "plain.mp4", script="generate.py").latents[0]
    )
    table = read(path)
    assert table.origin == "measured" and table.steps == 12 and table.sampler["boundary"] == 0.9
    assert list(table.mag_ratios) == ["cond", "uncond"]
    planned = wan22_command("i2v", "--magcache_steps", "6", "--magcache_predictor", "linear")
    report = json.loads((tmp_path / "magcache_i2v-A14B_1.magcache.json").read_text())
    assert report["mag_ratios_of"] == table.name and report["planned_computed"] == 6 and report["computed"] == 12
    assert planned.entered["WanAttentionBlock"] == 4 * 12
    wan22_command("i2v", "--use_magcache", "--magcache_thresh", "9")
    assert json.loads((tmp_path / "magcache_i2v-A14B_1.magcache.json").read_text())["reused"] > 0


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_a_speedup_needs_no_calibration_and_is_corrected(wan22_command, solver):
    """Wan's own schedulers are followed, in both experts; with the corrector the latents come nearer."""
    flags = ("--sample_solver", solver, "--save_file")
    (plain,) = wan22_command("t2v", *flags, "plain.mp4", script="generate.py").latents
    missed = {}
    for corrector in ("on", "off"):
        done = wan22_command(
            "t2v", *flags, f"{corrector}.mp4", "--magcache_speedup", "2", "--magcache_corrector", corrector
        )
        assert "no calibration needed" in done.output and f"corrector {corrector}" in done.output
        missed[corrector] = float((done.latents[0] - plain).norm())
    assert missed["on"] < missed["off"]


def test_calibration_goes_to_the_file_that_is_named(wan22_command, tmp_path):
    done = wan22_command("ti2v-t2v", "--magcache_calibration", "mine.json")
    assert read(tmp_path / "mine.json").steps == 12 and not (tmp_path / "home").exists()
    assert "use it with --mag_ratios mine.json" in done.output
    wan22_command("ti2v-t2v", "--magcache_steps", "6", "--magcache_predictor", "linear", "--mag_ratios", "mine.json")
    assert json.loads((tmp_path / "magcache_ti2v-5B_1.magcache.json").read_text())["planned_computed"] == 6


def test_a_table_of_another_checkpoint_is_not_borrowed(wan22_command, wan22_runs, tmp_path):
    wan22_command("t2v", "--magcache_calibration")
    other = tmp_path / "swapped"
    other.mkdir()
    plain = wan22_runs.checkpoint("t2v-experts")
    (other / "low_noise_model").symlink_to(plain / "high_noise_model")
    (other / "high_noise_model").symlink_to(plain / "low_noise_model")
    done = wan22_command("t2v", "--use_magcache", checkpoint=other, code=1)
    assert "No magnitude ratios are known for t2v-A14B with this checkpoint" in done.output and not done.latents


@pytest.mark.parametrize(
    "flags, part",
    [
        (("--use_magcache",), "for t2v-A14B with this checkpoint, and the paper's rule needs them. Ask for a speed-up"),
        (("--compare", "--no-magcache"), "leave out --no-magcache"),
        (("--compare", "--magcache_calibration"), "one at a time"),
        (("--use_magcache", "--mag_ratios", "nonesuch"), "There is no preset 'nonesuch'"),
        (("--use_magcache", "--mag_ratios", "nonesuch.json"), "There is no calibration file nonesuch.json"),
        (
            ("--magcache_steps", "9", "--magcache_predictor", "linear", "--mag_ratios", "wan2.2-t2v-a14b"),
            "need the Gram matrix",
        ),
        (
            ("--use_magcache", "--mag_ratios", "wan2.2-t2v-a14b", "--save_file", "video.txt"),
            "has no ending that can be written",
        ),
        (
            ("--magcache_speedup", "2", "--magcache_thresh", "1", "--mag_ratios", "wan2.2-t2v-a14b"),
            "leave it out of a planned run",
        ),
        (
            ("--use_magcache", "--magcache_K", "-1", "--mag_ratios", "wan2.2-t2v-a14b"),
            "magcache_K must be 0 (off) or more",
        ),
        (("--use_magcache", "--task", "s2v-14B"), "No magnitude ratios are known for s2v-14B"),
        (("--use_magcache", "--magcache_cache_device", "nonesuch"), "is not a device of this machine"),
        (
            ("--use_magcache", "--mag_ratios", "wan2.2-t2v-a14b", "--save_file", "/dev/null/cat.mp4"),
            "cannot be written",
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_costs_nothing(wan22_command, wan22_runs, flags, part, tmp_path):
    weightless = tmp_path / "checkpoint"
    (weightless / "high_noise_model").mkdir(parents=True)
    config = wan22_runs.checkpoint("t2v-experts") / "high_noise_model" / "config.json"
    (weightless / "high_noise_model" / "config.json").write_bytes(config.read_bytes())
    done = wan22_command("t2v", *flags, code=1, checkpoint=weightless)  # loading it would be another error
    last = done.output.strip().splitlines()[-1]
    assert last.startswith("magcache_generate.py: ") and part in last and last.endswith(".")
    assert "Traceback" not in done.output and [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_save_that_fails_says_so_and_leaves_the_old_file(tmp_path):
    """The host's writer prints what went wrong and returns."""

    def write(tensor, save_file):
        Path(save_file).with_suffix(".log").write_text("")

    (tmp_path / "cat.mp4").write_text("old")
    session = Session(argparse.Namespace(magcache_calibration=None), {}, "t2v-A14B", "96x64", 5, 12, None, {})
    with pytest.raises(MagCacheError, match=r"cat\.mp4 could not be written"):
        session.saving(write)(tensor=None, save_file=str(tmp_path / "cat.mp4"))
    assert (tmp_path / "cat.mp4").read_text() == "old" and not list(tmp_path.glob("*.part.mp4"))


def test_no_generate_py_beside_the_script(wan22_runs, tmp_path):
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    for name in ("magcache_generate.py", "common", "wan"):
        (lonely / name).symlink_to(wan22_runs.folder / name)
    (lonely / "magcache_generate.py").unlink()
    (lonely / "magcache_generate.py").write_bytes((wan22_runs.folder / "magcache_generate.py").read_bytes())
    done = wan22_runs.run(lonely / "magcache_generate.py", "--use_magcache", cwd=tmp_path)
    assert done.code == 1 and "There is no generate.py of Wan2.2 beside this script" in done.output
    assert "python -m common install MagCache4Wan2.2" in done.output and "Traceback" not in done.output


# Two processes, by the package's own means; the 45 tokens of ODD are filled up to 46

ODD = ("--size", "480*832", "--frame_num", "9")


@pytest.mark.parametrize(
    "kind, flags",
    [
        ("t2v", ("--ulysses_size", "2", "--dit_fsdp", *ODD)),
        ("i2v", ("--ulysses_size", "2")),
        ("ti2v-t2v", ("--dit_fsdp",)),
    ],
)
def test_two_processes_of_wan22_render_what_one_does(wan22_command, kind, flags, tmp_path):
    cached = ("--mag_ratios", PRESET[kind], "--magcache_thresh", "0.5")
    name = f"magcache_{TASKS[kind][1]}_1.magcache.json"
    one = wan22_command(kind, *cached, *(ODD if "480*832" in flags else ()))
    report = json.loads((tmp_path / name).read_text())
    (tmp_path / name).unlink()
    first, second = wan22_command(kind, *cached, *flags, ranks=2)
    assert json.loads((tmp_path / name).read_text())["strip"] == report["strip"] and report["reused"] > 0
    torch.testing.assert_close(first.latents[0], one.latents[0], rtol=0, atol=1e-3)
    assert not second.latents
    assert first.entered["WanAttentionBlock"] == second.entered["WanAttentionBlock"] == one.entered["WanAttentionBlock"]
    assert first.entered.get("FullyShardedDataParallel", 0) > 0 or "--dit_fsdp" not in flags
    assert first.output.count("MagCache plan") == 1 and "MagCache" not in second.output
    assert len(list(tmp_path.glob("*.json"))) == 1 and len(list(tmp_path.glob("*.mp4"))) == 1


def test_two_processes_of_wan22_measure_what_one_does(wan22_command, tmp_path):
    wan22_command("t2v", "--magcache_calibration", "one.json", *ODD)
    wan22_command("t2v", "--magcache_calibration", "two.json", *ODD, "--ulysses_size", "2", "--dit_fsdp", ranks=2)
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    for branch, ratios in one.mag_ratios.items():
        assert two.mag_ratios[branch] == pytest.approx(ratios, rel=1e-3)
        assert two.statistics["cos_dis"][branch] == pytest.approx(one.statistics["cos_dis"][branch], abs=1e-3)
    assert one.provenance["fingerprint"] == two.provenance["fingerprint"]
    assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]{12}", two.provenance["fingerprint"])
    assert one.sigmas == two.sigmas and not list(tmp_path.glob(".*part*"))


@pytest.mark.parametrize("kind, calls", [("s2v", 2), ("animate", 1)])
def test_segments_by_command(wan22_command, kind, calls, tmp_path):
    """Calibrated over both segments, on one rank and on two; planned; and the ranks render what one renders."""
    flags = ("--frame_num", "9", "--save_file")
    measured, planned = {}, {}
    for ranks in (1, 2):
        parallel = ("--ulysses_size", ranks)
        wan22_command(kind, *flags, "a.mp4", *parallel, "--magcache_calibration", f"{ranks}.json", ranks=ranks)
        measured[ranks] = read(tmp_path / f"{ranks}.json")
        planned[ranks] = wan22_command(
            kind, *flags, f"{ranks}.mp4", *parallel, "--mag_ratios", "1.json", "--magcache_steps", "6", ranks=ranks
        )
    table, shared = measured.values()
    assert table.statistics["runs"] == 2 and len(table.mag_ratios) == calls and table.sampler["frames"] in (8, 9)
    assert shared.mag_ratios["cond"] == pytest.approx(table.mag_ratios["cond"], abs=1e-3)
    report = json.loads((tmp_path / "1.magcache.json").read_text())
    for segment in (report, *report["earlier_clips"]):
        assert segment["computed"] == 6 * calls and segment["unplanned"] == {} and segment["complete"]
    assert len(report["earlier_clips"]) == 1 and "Segment 2: MagCache: " in planned[1].output
    last, of_two, plain = (
        planned[1].latents[-1],
        planned[2][0].latents[-1],
        wan22_command(kind, *flags, "plain.mp4").latents[-1],
    )
    assert 0 < (last - plain).abs().mean() and (last - of_two).abs().mean() < (last - plain).abs().mean() / 10


@pytest.mark.parametrize("kind", ["s2v", "animate"])
def test_segments_are_compared(wan22_command, kind, tmp_path):
    """What the README advises where no settings were measured: all segments of the three renderings, and the sheet."""
    wan22_command(kind, "--frame_num", "9", "--magcache_speedup", "2", "--compare", "--save_file", "cat.mp4")
    report = json.loads((tmp_path / "cat.magcache.json").read_text())
    assert report["files"] == ["cat_compare.mp4"] and len(report["earlier_clips"]) == 1
    uncached, cached, fewer = report["quality"].values()
    assert (uncached["steps"], cached["steps"], fewer["steps"]) == (12, 6, 6)
    assert 0 < cached["psnr"] < 100 and 0 < fewer["psnr"] < 100
    video, sheet = (read_frames(tmp_path / name)[0] for name in ("cat.mp4", "cat_compare.mp4"))
    assert len(sheet) == len(video) > 8 and sheet.shape[2] >= 3 * video.shape[2]
