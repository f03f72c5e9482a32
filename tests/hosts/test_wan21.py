"""The drop-ins in checkouts of Wan2.1 and Wan2.2, whose generate.py no package has, on a CPU with tiny random weights:

    MAGCACHE_WAN21=/path/to/Wan2.1 MAGCACHE_WAN22=/path/to/Wan2.2 python -m pytest tests/hosts/test_wan21.py

Structure, not quality. Text encoder, VAE, CLIP, xfuser and the attention kernel are replaced (wan_cpu.py); nothing is
written into the checkouts."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from wan_runs import WanRuns

from common.scripts.quality import read_frames
from common.tables import read

SMALL = ("--sample_steps", "10", "--base_seed", "1", "--prompt", "a cat / a dog", "--size")
# name: (environment variable with the checkout, checkpoint, preset, flags)
RUNS = {
    "t2v": ("MAGCACHE_WAN21", "t2v", "wan2.1-t2v-1.3b", ("832*480", "--task", "t2v-1.3B", "--frame_num", "5")),
    "i2v": (
        "MAGCACHE_WAN21",
        "i2v",
        "wan2.1-i2v-14b-480p",
        ("832*480", "--task", "i2v-14B", "--frame_num", "5", "--image", "cat.png"),
    ),
    "flf2v": (
        "MAGCACHE_WAN21",
        "flf2v",
        None,
        ("832*480", "--task", "flf2v-14B", "--first_frame", "cat.png", "--last_frame", "cat.png"),
    ),
    "vace": (
        "MAGCACHE_WAN21",
        "vace",
        "wan2.1-vace-1.3b",
        ("832*480", "--task", "vace-1.3B", "--frame_num", "5", "--src_ref_images", "cat.png"),
    ),
    "t2i": ("MAGCACHE_WAN21", "t2v", None, ("832*480", "--task", "t2i-14B")),
    "2.2 t2v": (
        "MAGCACHE_WAN22",
        "t2v-experts",
        "wan2.2-t2v-a14b",
        ("832*480", "--task", "t2v-A14B", "--frame_num", "5"),
    ),
    "2.2 i2v": (
        "MAGCACHE_WAN22",
        "i2v-experts",
        "wan2.2-i2v-a14b",
        ("832*480", "--task", "i2v-A14B", "--frame_num", "5", "--image", "cat.png"),
    ),
    "2.2 ti2v": ("MAGCACHE_WAN22", "ti2v", "wan2.2-ti2v-5b-t2v", ("1280*704", "--task", "ti2v-5B", "--frame_num", "5")),
}
PUBLISHED = [name for name, (_, _, preset, _) in RUNS.items() if preset]
UNPUBLISHED = [name for name, (_, _, preset, _) in RUNS.items() if not preset]
REUSING = ("--magcache_thresh", "0.9", "--magcache_K", "3", "--retention_ratio", "0.2")
DROP_IN = {"MAGCACHE_WAN21": "MagCache4Wan2.1", "MAGCACHE_WAN22": "MagCache4Wan2.2"}


@pytest.fixture(scope="module")
def wan_checkouts(tmp_path_factory):
    """variable -> WanRuns, started at first use."""
    started = {}

    def runs(variable):
        if variable not in os.environ:
            pytest.skip(f"{variable} names no checkout of {DROP_IN[variable].removeprefix('MagCache4')}.")
        if variable not in started:
            checkout = Path(os.environ[variable])
            started[variable] = WanRuns(
                tmp_path_factory.mktemp("wan"), checkout / "wan", checkout / "generate.py", DROP_IN[variable]
            )
        return started[variable]

    yield runs
    for one in started.values():
        one.close()


@pytest.fixture
def wan21_command(wan_checkouts, tmp_path):
    """Run the drop-in, or the checkout's own generate.py, in a folder of its own."""

    def run(name, *flags, script="magcache_generate.py", ranks=1, code=0):
        variable, kind, _, task = RUNS[name]
        runs = wan_checkouts(variable)
        Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "cat.png")
        argv = (runs.folder / script, "--ckpt_dir", runs.checkpoint(kind), *SMALL, *task, *flags)
        done = [runs.run(*argv, cwd=tmp_path)] if ranks == 1 else runs.ranks(*argv, cwd=tmp_path, count=ranks)
        assert [one.code for one in done] == [code] * ranks, "\n".join(one.output for one in done)
        return done[0] if ranks == 1 else done

    return run


def blocks_entered(done):
    """(calls of main blocks, calls of VACE's hint blocks)"""
    entered = done.entered
    return sum(entered.get(name, 0) for name in ("WanAttentionBlock", "BaseWanAttentionBlock")), entered.get(
        "VaceWanAttentionBlock", 0
    )


def files_written(folder):
    return sorted(path.name for path in folder.iterdir() if path.name not in ("cat.png", "home"))


@pytest.mark.parametrize("name", RUNS)
def test_off_is_the_checkouts_own_command(wan21_command, name, tmp_path):
    """The same latents to the bit, and the checkout's own name for the file."""
    suffix = "png" if name == "t2i" else "mp4"
    plain = wan21_command(name, "--save_file", f"plain.{suffix}", script="generate.py")
    off = wan21_command(name)
    assert torch.equal(off.latents[0], plain.latents[0]) and len(off.latents) == len(plain.latents) == 1
    assert "MagCache is off; --use_magcache turns it on." in off.output and off.entered == plain.entered
    (default,) = set(files_written(tmp_path)) - {f"plain.{suffix}"}
    task = RUNS[name][3][2]
    assert re.fullmatch(re.escape(task) + r"_\d+\*\d+_1(_1)?_a_cat___a_dog_\d+_\d+\." + suffix, default)
    assert (tmp_path / default).read_bytes() == (tmp_path / f"plain.{suffix}").read_bytes()
    named = wan21_command(name, "--no-magcache", "--use_magcache", "--save_file", f"named.{suffix}")
    assert torch.equal(named.latents[0], plain.latents[0]) and "MagCache" not in named.output


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "vace"])
def test_a_reused_call_is_the_hosts_forward_with_the_residual_in_place_of_the_blocks(wan_checkouts, kind, tmp_path):
    """VACE too, whose hint blocks run in that forward and must have no effect."""
    runs = wan_checkouts("MAGCACHE_WAN21")
    runs.checkpoint(kind)
    done = runs.run(
        Path(__file__).parent / "wan_cases.py",
        "reused_calls_are_the_hosts_forward_with_the_residual",
        runs.checkpoints,
        f"2.1 {kind}",
        "unipc",
        cwd=tmp_path,
    )
    assert done.code == 0, done.output
    for run in json.loads((tmp_path / "result.json").read_text()):
        assert run["cond"] == run["uncond"] == run["planned"] and "." in run["planned"]
        assert run["unplanned"] == {} and run["runs"] == 1 and run["complete"]


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_cached_wan21(wan21_command, name, solver, tmp_path):
    preset = RUNS[name][2]
    done = wan21_command(name, "--use_magcache", "--mag_ratios", preset, *REUSING, "--sample_solver", solver)
    report_name, video = files_written(tmp_path)
    report = json.loads((tmp_path / report_name).read_text())
    assert video.startswith(f"magcache_{RUNS[name][3][2]}_") and report_name == video.replace(".mp4", ".magcache.json")
    assert report["calls"] == 20 and report["reused"] >= 6 and report["unplanned"] == {} and report["complete"]
    assert report["mag_ratios_of"] == preset and report["prompt"] == "a cat / a dog" and report["solver"] == solver
    assert report["bound"] == pytest.approx(10 / report["planned_computed"], abs=1e-3)
    hints = 2 * report["computed"] if name == "vace" else 0  # two hint blocks, none of them on a reused step
    # The facts of each model are proved once, by a forward without its blocks.
    models = 2 if name in ("2.2 t2v", "2.2 i2v") else 1
    assert blocks_entered(done) == (4 * report["computed"], hints) and done.entered["Head"] == 20 + models
    frames, _ = read_frames(tmp_path / video)
    assert frames.shape[:1] == (5,)


@pytest.mark.parametrize("name", ["t2v", "vace", "2.2 t2v"])
def test_compare_into_a_file_that_is_named(wan21_command, name, tmp_path):
    done = wan21_command(name, "--compare", "--mag_ratios", RUNS[name][2], *REUSING, "--save_file", "out/cat.mp4")
    assert files_written(tmp_path / "out") == ["cat.magcache.json", "cat.mp4", "cat_compare.mp4"]
    uncached, cached, fewer = json.loads((tmp_path / "out" / "cat.magcache.json").read_text())["quality"].values()
    assert uncached["steps"] == 10 and cached["steps"] == fewer["steps"] < 10
    assert 0 < cached["psnr"] < 100 and 0 < cached["ssim"] <= 1
    plain = wan21_command(name, "--save_file", "plain.mp4", script="generate.py")
    assert [torch.equal(plain.latents[0], latents) for latents in done.latents] == [False, True, False]


@pytest.mark.parametrize("name", UNPUBLISHED)
def test_a_task_without_a_table_says_so_then_calibrates(wan21_command, name, tmp_path):
    refused = wan21_command(name, "--use_magcache", code=1)
    task = RUNS[name][3][2]
    assert f"No magnitude ratios are known for {task} with this checkpoint" in refused.output
    assert (
        "--magcache_calibration" in refused.output and "Traceback" not in refused.output and not files_written(tmp_path)
    )


@pytest.mark.parametrize("name", ["flf2v", "t2i", "i2v", "vace", "2.2 ti2v"])
def test_a_calibration_serves_the_next_command(wan21_command, name, tmp_path):
    measured = wan21_command(name, "--magcache_calibration")
    assert not [file for file in files_written(tmp_path) if file.startswith("magcache_") or file.endswith(".json")]
    (path,) = (tmp_path / "home").iterdir()
    table = read(path)
    assert table.steps == 10 and list(table.mag_ratios) == ["cond", "uncond"] and measured.output.count(str(path)) == 1
    planned = wan21_command(name, "--magcache_steps", "5", "--magcache_predictor", "linear")
    report = json.loads(next(tmp_path.glob("magcache_*.json")).read_text())
    assert report["mag_ratios_of"] == table.name and report["computed"] == 10 and report["unplanned"] == {}
    assert blocks_entered(planned)[0] == 40 and not torch.equal(planned.latents[0], measured.latents[0])


@pytest.mark.parametrize(
    "flags",
    [("--ulysses_size", "2"), ("--dit_fsdp",), ("--ulysses_size", "2", "--dit_fsdp", "--t5_fsdp")],
    ids=["ulysses", "fsdp", "both"],
)
@pytest.mark.parametrize("name", ["t2v", "vace", "2.2 t2v"])
def test_two_processes_render_what_one_does(wan21_command, name, flags, tmp_path):
    cached = ("--mag_ratios", RUNS[name][2], *REUSING, "--save_file")
    one = wan21_command(name, *cached, "one.mp4")
    first, second = wan21_command(name, *cached, "two.mp4", *flags, ranks=2)
    reports = [json.loads((tmp_path / f"{which}.magcache.json").read_text()) for which in ("one", "two")]
    assert reports[0]["strip"] == reports[1]["strip"] and reports[1]["unplanned"] == {} and reports[1]["reused"] >= 6
    torch.testing.assert_close(first.latents[0], one.latents[0], rtol=0, atol=1e-3)
    assert blocks_entered(first) == blocks_entered(second) == blocks_entered(one)
    assert not second.latents and "MagCache" not in second.output
    assert files_written(tmp_path) == ["one.magcache.json", "one.mp4", "two.magcache.json", "two.mp4"]


@pytest.mark.parametrize("name", ["t2v", "vace", "2.2 t2v"])
def test_two_processes_measure_what_one_does(wan21_command, name, tmp_path):
    odd = () if name == "vace" else ("--size", "480*832", "--frame_num", "9")  # 45 tokens, filled up to 46
    wan21_command(name, "--magcache_calibration", "one.json", "--save_file", "one.mp4", *odd)
    wan21_command(
        name,
        "--magcache_calibration",
        "two.json",
        "--save_file",
        "two.mp4",
        *odd,
        "--ulysses_size",
        "2",
        "--dit_fsdp",
        ranks=2,
    )
    one, two = read(tmp_path / "one.json"), read(tmp_path / "two.json")
    for branch, ratios in one.mag_ratios.items():
        assert two.mag_ratios[branch] == pytest.approx(ratios, rel=1e-3)
        assert two.statistics["mag_std"][branch] == pytest.approx(one.statistics["mag_std"][branch], abs=1e-3)
    assert one.provenance["fingerprint"] == two.provenance["fingerprint"] and one.sigmas == two.sigmas
