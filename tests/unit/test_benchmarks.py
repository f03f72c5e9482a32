"""The benchmarks run, and the short one holds what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.ratios import flow_sigmas

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import demo_model  # noqa: E402
import experiments  # noqa: E402
import peers  # noqa: E402
import quality as quality_benchmark  # noqa: E402
import row_file  # noqa: E402
import speed  # noqa: E402

from common.errors import MagCacheError  # noqa: E402
from common.hosts import host_of  # noqa: E402


@pytest.fixture(scope="module")
def loaded_demo():
    return demo_model.load_demo()


def test_a_planned_run_is_above_the_rule_and_fewer_steps_by_the_measured_margins():
    """The command of CI: at half the steps, with MARGINS of benchmarks/quality.py."""
    done = subprocess.run([sys.executable, BENCHMARKS / "quality.py", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("14.0 of 28 computed") == 4


CALL = {"height": 64, "width": 64, "max_sequence_length": 16}


def test_the_short_mode_names_a_missed_margin(loaded_demo, monkeypatch):
    pipe, table = loaded_demo
    monkeypatch.setattr(quality_benchmark, "MARGINS", {"no calibration": ("fewer steps", 60.0)})
    subject = quality_benchmark.Subject(pipe, CALL, [(prompt, 1) for prompt in demo_model.PROMPTS[:2]])
    (missed,) = quality_benchmark.short(subject, table)
    assert missed.startswith("no calibration is ")
    assert missed.endswith("above fewer steps, which should be 60.0 or more.")


def test_rows_count_what_ran_and_measure_memory(loaded_demo, tmp_path):
    pipe, table = loaded_demo
    subject = quality_benchmark.Subject(pipe, CALL, [(prompt, 1) for prompt in demo_model.PROMPTS[:2]])
    reference = quality_benchmark.references(subject, 28)
    plain = subject.peak_bytes(quality_benchmark.nullcontext, 28)
    rows = [row for row in quality_benchmark.own_rows(subject, table, 28, [7]) if "released" not in row.family]
    results = [quality_benchmark.measured_row(subject, row, reference, plain, 28) for row in rows]
    assert [round(one["computed"]) for one in results] == [7] * 9
    by_family = {one["family"]: one for one in results}
    assert by_family["no calibration"]["psnr"] > by_family["paper's rule"]["psnr"]
    assert by_family["paper's rule"]["psnr"] > by_family["paper's rule, off"]["psnr"]
    assert (
        by_family["planned, linear, residual"]["bytes"] >= 2 * 64 * 160 * 4 and by_family["no calibration"]["bytes"] > 0
    )
    text = quality_benchmark.table_text(results, 28)
    assert "MS-SSIM" not in text and "±" in text
    quality_benchmark.draw_quality({(1.0, 28): results}, tmp_path / "figure.png")


def test_a_run_that_was_cut_short_goes_on_and_only_what_changed_is_measured_again(tmp_path, monkeypatch, loaded_demo):
    """With two kinds of this project's rows and the hooks of diffusers; cache-dit is not on every machine."""
    measured, done = quality_benchmark.measured_row, []

    def run(*more, breaks_after=None):
        done.clear()

        def counted(subject, row, *rest):
            if len(done) == breaks_after:
                raise KeyboardInterrupt
            done.append(row.family)
            return measured(subject, row, *rest)

        monkeypatch.setattr(quality_benchmark, "measured_row", counted)
        only = ["--only", "fewer steps", "no calibration", "diffusers"]
        argv = ["quality.py", "--guidance", "1", "3", "--steps", "6", "--prompts", "2", "--output", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [*argv, "--seeds", "1", *only, *more])
        quality_benchmark.main()
        return (tmp_path / "quality_table.md").read_text()

    monkeypatch.setattr(quality_benchmark, "load_demo", lambda: loaded_demo)
    monkeypatch.setattr(quality_benchmark.Subject, "calibrated", lambda *_: loaded_demo[1])
    monkeypatch.setattr(quality_benchmark, "SHARES", (0.7, 0.5))
    monkeypatch.setattr(peers, "HALVINGS", 2)
    monkeypatch.setitem(quality_benchmark.PROJECTS, "cache-dit", lambda *_: ())
    monkeypatch.setattr(quality_benchmark.Subject, "peak_bytes", lambda *_: 0)  # looks through all objects: slow here
    with pytest.raises(KeyboardInterrupt):
        run(breaks_after=3)
    table = run()
    rows = [line for line in table.splitlines() if line.startswith("| ") and "PSNR" not in line]
    assert len(done) == len(rows) - 3 and "2 images" in table and "guidance 1 and 3" in table
    for family, count in (("plain sampler", 4), ("no calibration", 4), ("FirstBlockCache", 2), ("TaylorSeer", 6)):
        assert sum(family in row for row in rows) >= count, family
    with monkeypatch.context() as searched_once:
        searched_once.setattr(peers, "computed_a_picture", lambda *_: pytest.fail("a threshold was searched again"))
        assert run() == table and not done
        searched_once.setattr(quality_benchmark, "digest_of_code", lambda files: "other")
        run()
    own = [row for row in rows if not any(other in row for other in ("diffusers", "fewer steps"))]
    assert len(done) == len(own) and not {"fewer steps", "diffusers MagCache"} & set(done)
    with pytest.raises(SystemExit, match="prompts and seeds differ. Name another --rows"):
        run("--seeds", "2")
    (tmp_path / "quality_rows.json").write_text("[]")
    with pytest.raises(SystemExit, match="holds no measured rows"):
        run()


def test_two_processes_share_a_file_of_rows(tmp_path):
    files = [row_file.RowFile(tmp_path / "new" / "rows.json", {"model": "demo"}) for _ in range(2)]
    assert [file.recall(str(index), lambda index=index: index) for index, file in enumerate(files)] == [0, 1]
    third = row_file.RowFile(files[0].path, {"model": "demo"})
    assert [third.recall(key, lambda: pytest.fail("measured again")) for key in ("0", "1")] == [0, 1]


def test_code_is_told_from_its_comments(tmp_path):
    one, other, changed = (tmp_path / name for name in "abc")
    one.write_text("x = 1\n")
    other.write_text("# why\nx  =  1\n")
    changed.write_text("x = 2\n")
    digests = [row_file.digest_of_code([path]) for path in (one, other, changed)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("scheduler", ["unipc", "dpm"])
def test_a_sampler_has_the_noise_levels_of_the_models_own(loaded_demo, scheduler):
    pipe, _ = loaded_demo
    own = pipe.scheduler
    try:
        subject = quality_benchmark.Subject(
            pipe, {**CALL, "negative_prompt": "", "true_cfg_scale": 3.0}, [(demo_model.PROMPTS[0], 1)] * 2, scheduler
        )
        assert subject.branches == 2
        quality_benchmark.references(subject, 6)
        levels = pipe.scheduler.sigmas.tolist()
        assert levels[:6] == pytest.approx(flow_sigmas(6, 3.0), abs=2e-3)
    finally:
        pipe.scheduler = own


def test_experiments_run(loaded_demo, monkeypatch, capsys):
    monkeypatch.setitem(experiments.PROMPTS, "demo", experiments.PROMPTS["demo"][:2])
    monkeypatch.setattr(quality_benchmark, "load_demo", lambda: loaded_demo)
    monkeypatch.setattr(experiments, "SHARES", (0.5,))
    monkeypatch.setattr(sys, "argv", ["experiments.py", "--steps", "12"])
    experiments.main()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[2:22]}
    assert (
        len(rows) == 20
        and rows["as implemented"] != rows["newest output held (s = 0)"] != rows["line followed throughout (s = 1)"]
    )
    assert rows["as implemented"] not in (rows["corrector off"], rows["corrected through two outputs"])
    under_euler = rows["model output instead of x0"]
    assert rows["as implemented"] == under_euler != rows["last step not computed"]
    assert rows["as implemented"] == rows["s starts at 1"] != rows["s starts at 0"]
    assert rows["as implemented"] == rows["last step always computed"]  # FLUX tells Euler its levels
    assert rows["as implemented"] != rows["corrected by a calibration"]
    assert all(" in 0." in cell for cell in rows["spread that --magcache_refine chooses"])


def test_settings_were_chosen_on_other_prompts_than_are_reported():
    reported = {*demo_model.PROMPTS, *(quality_benchmark.DEMO_VIDEO / "prompts.txt").read_text().splitlines()}
    assert not reported & {*experiments.PROMPTS["demo"], *experiments.PROMPTS["demo-video"]}


@pytest.mark.parametrize("name", speed.SMALL)
def test_speed_runs_every_structure(name):
    """Of six steps, one block a list: the facts in common/hosts are the real classes', and three steps are
    skipped."""
    make, config = speed.SMALL[name]
    shrunk = {**config, **{key: 1 for key in ("num_layers", "num_single_layers") if key in config}, "text": (4, 32)}
    shrunk.update({"latent": (1, 4, 4)} if "latent" in config else {"tokens": 16})
    sampler = speed.Sampler((make, shrunk), "cpu", torch.float32)
    executed = []
    [module for path, module in sampler.model.named_modules() if path.endswith("to_q")][-1].register_forward_hook(
        lambda *_: executed.append(None)
    )
    rows = list(speed.rows_of(name, sampler, 6, repeats=2))
    assert len(executed) == 3 * (6 + 6 + 3 + 3 + 3 + 3)  # also the other project's hook computes half
    assert [row[1] for row in rows] == [
        "un-cached",
        "skipping off",
        "paper's rule",
        "planned, linear",
        "planned, linear, residual",
        "diffusers MagCache",
    ]
    assert all(row[2] == 3 for row in rows[2:])


def test_the_speed_table_is_written(tmp_path, monkeypatch):
    make, config = speed.SMALL["FLUX, 3 + 6 blocks of width 256, 256 tokens"]
    monkeypatch.setattr(
        speed, "SMALL", {"one": (make, {**config, "num_layers": 1, "num_single_layers": 1, "tokens": 16})}
    )
    monkeypatch.setattr(speed, "RUN_SECONDS", {"cpu": 0.01})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)  # no compiler is tried out here
    monkeypatch.setattr(sys, "argv", ["speed.py", "--small", "--output", str(tmp_path / "speed.md")])
    speed.main()
    text = (tmp_path / "speed.md").read_text()
    assert "| one " in text and "| one, compiled " in text and "Planning takes" in text and "Left out" not in text


def test_a_transformer_without_facts_gets_a_sentence():
    with pytest.raises(MagCacheError, match="add its facts to common/hosts"):
        host_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("script", ["image/samples.py", "video/samples.py", "video/calibrate.py"])
def test_help_writes_nothing(script):
    """What takes no flags writes over files of the repository, so --help has to be answered first."""
    path = BENCHMARKS.parent / "demo" / script
    done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {path.name}"), done.stderr
