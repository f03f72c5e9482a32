"""The session that drop-ins share, on a tiny FLUX transformer and a plain sampler: what is found before anything is
loaded, that a finished result is saved whatever goes wrong afterwards, and that nothing of somebody else is touched."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.calibration import fingerprint
from common.errors import MagCacheError
from common.scripts import session as module
from common.scripts.flags import add_magcache_flags, add_opt_in_flags, flags_and_rest, switched_on
from common.scripts.outputs import beside, fitting, own_place, report_place
from common.scripts.session import Session
from common.tables import calibrations_folder, load, read, write

LINEAR = ("--magcache_predictor", "linear")  # from a calibration
LINES = {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}


pytestmark = pytest.mark.usefixtures("home")


def toy_session(*flags, steps=12, preset=None, add=add_magcache_flags, size="64x64", **options):
    args, rest = flags_and_rest(add, list(flags))
    assert rest == []
    return Session(args, LINES, "tiny", size, 1, steps, preset, {}, videos=pictures, **options)


def pictures(latents):
    return [torch.tanh(latents[..., :3]).reshape(1, 8, 8, 3).permute(3, 0, 1, 2)]


def host_write(tensor, save_file, **options):
    frames = ((pictures(tensor)[0].permute(1, 2, 3, 0)[0] + 1) * 127.5).byte().numpy()
    Image.fromarray(frames).save(save_file)


@pytest.fixture
def session_command(euler, model, host, capsys):
    """Run one command with a session; returns (what was said, the latents)."""

    def run(one, name="out.png", steps=None):
        sampler = euler(model)
        one.check(name)
        one.patch(model, host, lambda: sampler.timesteps, fingerprint(model))
        latents = one.render(lambda count: sampler.run(steps=count), steps or one.steps)
        one.saving(host_write)(tensor=latents, save_file=name)
        one.unpatch()
        assert "forward" not in vars(model)
        return capsys.readouterr().out, latents

    return run


@pytest.fixture
def table_of_ratios(ratios):
    write("tiny.json", ratios)
    return "--mag_ratios", "tiny.json"


def test_a_report_lies_beside_the_output(session_command, table_of_ratios):
    session_command(toy_session(*table_of_ratios, "--compare", "--magcache_plot"))
    report = json.loads(Path("out.magcache.json").read_text())
    assert report["reused"] > 0 and report["files"] == ["out.schedule.png", "out_compare.png"]
    assert list(report["quality"])[0] == "un-cached, 12 steps"
    assert {path.name for path in Path().iterdir()} == {"tiny.json", "out.png", "out.magcache.json", *report["files"]}


@pytest.mark.parametrize(
    "broken, flags",
    [
        ("plot_schedule", ["--magcache_plot"]),
        ("side_by_side", ["--compare"]),
        ("quality", ["--compare"]),
        ("write_report", []),
    ],
)
@pytest.mark.parametrize(
    "error", [OSError("disk full"), ValueError("disk full"), MagCacheError("Disk full.")], ids=repr
)
def test_a_finished_result_is_saved_whatever_breaks_afterwards(
    session_command, table_of_ratios, monkeypatch, broken, flags, error
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(module, broken, fail)
    said, _ = session_command(toy_session(*table_of_ratios, *flags))
    session_command(toy_session(*table_of_ratios), "again.png")
    assert Path("out.png").read_bytes() == Path("again.png").read_bytes()
    (sentence,) = [line for line in said.splitlines() if " failed (" in line]
    assert re.search(r"isk full\); the rendering is kept\.$", sentence)
    assert Path("out.magcache.json").exists() == (broken != "write_report")


def test_a_comparison_that_is_interrupted(session_command, table_of_ratios, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "compare", interrupted)
    said, _ = session_command(toy_session(*table_of_ratios, "--compare"))
    assert "The comparison failed (KeyboardInterrupt" in said and Path("out.magcache.json").exists()


def test_a_measurement_that_cannot_be_saved(session_command, monkeypatch):
    """The disk fills up while the last step is computed."""
    one = toy_session("--magcache_calibration", "mine.json")

    def fail(path, table):
        raise MagCacheError("mine.json cannot be written (No space left on device); choose another place.")

    monkeypatch.setattr("common.patch.save_calibration", fail)
    said, _ = session_command(one)
    assert "The measurement failed (mine.json cannot be written" in said and Path("out.png").is_file()


def test_levels_a_little_above_1_are_measured(session_command, monkeypatch):
    """Open-Sora 1.2 begins at timestep 1006.4 for pictures of some sizes, by its arithmetic in bfloat16."""
    raised = torch.tensor([1.0064] + [1.0] * 11)
    monkeypatch.setattr(
        "tiny_flux.flow_sigmas", lambda steps, shift: (torch.linspace(1, 1 / steps, steps) * raised).tolist()
    )
    said, _ = session_command(toy_session("--magcache_calibration", "mine.json"))
    assert "saved as mine.json" in said and read("mine.json").sigmas[0] == 1.0
    said, _ = session_command(toy_session("--mag_ratios", "mine.json", "--magcache_steps", "6", *LINEAR))
    assert json.loads(Path("out.magcache.json").read_text())["computed"] == 6


def test_what_is_not_ours_is_never_written_over(session_command, table_of_ratios):
    theirs = {"out.magcache.json": '{"their": "notes"}', "out_compare.png": "a picture", "out.schedule.png": "a plan"}
    for name, content in theirs.items():
        Path(name).write_text(content)
    for _ in range(2):  # the second replaces what the first wrote
        session_command(toy_session(*table_of_ratios, "--compare", "--magcache_plot"))
    assert {name: Path(name).read_text() for name in theirs} == theirs
    report = json.loads(Path("out_2.magcache.json").read_text())
    assert report["strip"] and "out_compare_2.png" in report["files"]
    shown = Path("tiny.json").read_text()
    Path("mine.json").write_text(shown.replace("tiny", "finer"))
    Path("notes.json").write_text("[1, 2]")
    said, _ = session_command(toy_session("--magcache_calibration", "notes.json"))
    assert Path("notes.json").read_text() == "[1, 2]" and "saved as notes-12-steps" in said


def test_our_own_files_are_replaced(session_command, table_of_ratios):
    for thresh in ("1", "0"):
        session_command(toy_session(*table_of_ratios, "--compare", "--magcache_thresh", thresh))
    assert json.loads(Path("out.magcache.json").read_text())["reused"] == 0
    assert not [path.name for path in Path().iterdir() if "_2" in path.name]


def test_names_of_any_length():
    """255 bytes hold them; what tells two outputs apart stands at the end."""
    prompt = "雨" * 100
    names = [fitting(f"seed3_{prompt}_2026010{day}_120000", ".mp4") for day in (1, 2)]
    assert len(set(names)) == 2 and all(len(name.encode()) <= 255 for name in names)
    assert names[0].startswith("seed3_雨雨") and names[0].endswith("_20260101_120000.mp4")
    assert fitting("x" * 251, ".mp4") == "x" * 251 + ".mp4"
    target = Path(fitting("x" * 300, ".mp4"))
    for ending in (".magcache.json", "_compare.mp4", ".schedule.png"):
        assert len(beside(target, ending).name.encode()) <= 255 and beside(target, ending).name.endswith(ending)
    assert own_place(target, []) == target and len(report_place(target).name.encode()) <= 255


def test_the_users_own_name_is_kept_or_refused():
    toy_session("--mag_ratios", "flux-dev").check("x" * 251 + ".png")
    with pytest.raises(MagCacheError, match="longer than 255 bytes"):
        toy_session("--mag_ratios", "flux-dev").check("x" * 252 + ".png")


def test_a_number_of_steps_is_checked_against_the_run():
    """Of the 28 steps that `demo` was measured at, no fewer than 10 could compute with this K."""
    asked = ("--mag_ratios", "demo", "--magcache_K", "2", *LINEAR, "--magcache_steps")
    toy_session(*asked, "6", steps=8).check("out.png")
    with pytest.raises(MagCacheError, match="Of 8 steps, between 3 and 8"):
        toy_session(*asked, "2", steps=8).check("out.png")


def test_the_advice_after_a_measurement_works(session_command):
    said, _ = session_command(toy_session("--magcache_calibration", "mine"))
    assert "use it with --mag_ratios mine.json." in said
    session_command(toy_session("--mag_ratios", "mine.json", "--magcache_steps", "6", *LINEAR))
    assert json.loads(Path("out.magcache.json").read_text())["computed"] == 6


def test_a_short_run_does_not_poison_later_ones(session_command, model):
    """Open-Sora measures unasked."""
    one = toy_session("--magcache_steps", "3", "--magcache_predictor", "linear", steps=4, measures=True)
    said, _ = session_command(one)
    assert "A run of 4 steps has nothing to skip" in said and not calibrations_folder().exists()
    session_command(toy_session("--magcache_steps", "3", "--magcache_predictor", "linear", steps=6, measures=True))
    said, _ = session_command(
        toy_session("--magcache_steps", "20", "--magcache_predictor", "linear", steps=50, measures=True)
    )
    assert "has 6 steps, too few for a run of 50" in said and "every step to measure them" in said
    said, _ = session_command(
        toy_session("--magcache_steps", "20", "--magcache_predictor", "linear", steps=50, measures=True)
    )
    assert json.loads(Path("out.magcache.json").read_text())["computed"] == 20
    assert [read(path).steps for path in calibrations_folder().iterdir()] == [50]
    session_command(toy_session("--magcache_calibration", steps=6))
    assert sorted(read(path).steps for path in calibrations_folder().iterdir()) == [6, 50]
    said, _ = session_command(
        toy_session("--magcache_steps", "20", "--magcache_predictor", "linear", steps=50, measures=True)
    )
    assert "measure them" not in said
    coarse = str(next(path for path in calibrations_folder().iterdir() if read(path).steps == 6))
    with pytest.raises(MagCacheError, match="was measured at 6 steps, too few to predict a run of 50"):
        toy_session("--mag_ratios", coarse, "--magcache_steps", "20", "--magcache_predictor", "linear", steps=50).check(
            "out.png"
        )


def test_a_session_passes_over_a_broken_calibration(session_command, capsys):
    session_command(toy_session("--magcache_calibration"))
    (good,) = calibrations_folder().iterdir()
    (calibrations_folder() / f"broken-{good.stem[-12:]}.json").write_text("{")
    said, _ = session_command(toy_session("--magcache_steps", "6", "--magcache_predictor", "linear"))
    assert said.count("cannot be read as a calibration file") == 1
    assert json.loads(Path("out.magcache.json").read_text())["computed"] == 6


def test_a_preset_of_another_family_is_refused():
    with pytest.raises(MagCacheError, match="the ratios of another model; those for this one are wan2.1"):
        toy_session("--mag_ratios", "flux-dev", family="wan").check("out.png")


def test_a_fine_tune_is_told_whose_ratios_it_takes(session_command):
    weights = {"family": "flux", "preset": "flux-dev"}
    said, _ = session_command(toy_session(weights="./my-finetune", **weights))
    assert said.count("were published for black-forest-labs/FLUX.1-dev. If ./my-finetune was trained further") == 1
    for known in ("black-forest-labs/FLUX.1-dev", ""):
        assert "trained further" not in session_command(toy_session(weights=known, **weights))[0]


def test_only_the_first_rank_decides(monkeypatch):
    """A second node has neither the file nor the folder."""
    monkeypatch.setenv("RANK", "1")
    toy_session("--mag_ratios", "only-on-the-first-node.json").check("/proc/nowhere/out.mp4", (".mp4",))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(MagCacheError, match="cannot be written"):
        toy_session("--mag_ratios", "only-on-the-first-node.json").check("/proc/nowhere/out.mp4", (".mp4",))


@pytest.mark.parametrize(
    "flags",
    [
        ["--magcache_predictor", "linear"],
        ["--magcache_payload", "residual"],
        ["--magcache_guard", "2"],
        ["--magcache_interp", "sigma"],
        ["--magcache_cache_device", "cpu"],
        ["--magcache_cache_dtype", "bfloat16"],
        ["--magcache_plot"],
        ["--compare"],
        ["--magcache_steps", "5", "--magcache_predictor", "linear"],
        ["--use_magcache"],
    ],
    ids=" ".join,
)
def test_any_setting_turns_magcache_on(flags):
    assert switched_on(flags_and_rest(add_opt_in_flags, flags)[0])
    assert not switched_on(flags_and_rest(add_opt_in_flags, [*flags, "--no-magcache"])[0])


def test_flags_of_the_host_pass_through():
    argv = ["--prompt", "a cat", "--seed", "-1", "--magcache_K", "3", "--size", "832*480", "picture.png"]
    args, rest = flags_and_rest(add_opt_in_flags, argv)
    assert rest == ["--prompt", "a cat", "--seed", "-1", "--size", "832*480", "picture.png"]
    assert args.given == {"magcache_K"} and args.magcache_K == 3
    assert not switched_on(flags_and_rest(add_opt_in_flags, ["--prompt", "x"])[0])


def test_the_picture_is_the_hosts_where_nothing_is_skipped(session_command, table_of_ratios, euler, model):
    _, latents = session_command(toy_session(*table_of_ratios, "--magcache_thresh", "0"))
    assert torch.equal(latents, euler(model).run(steps=12)) and load("tiny.json").name == "tiny"
    host_write(latents, "plain.png")
    assert np.array_equal(np.asarray(Image.open("plain.png")), np.asarray(Image.open("out.png")))
