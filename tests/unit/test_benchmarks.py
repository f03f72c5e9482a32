"""The benchmarks run, and the short one holds what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flow_sigmas

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import demo_model  # noqa: E402
import experiments  # noqa: E402
import quality as quality_benchmark  # noqa: E402
import speed  # noqa: E402

from common.errors import MagCacheError  # noqa: E402
from common.hosts import host_of  # noqa: E402


@pytest.fixture(scope="module")
def demo():
    return demo_model.load_demo()


def test_a_planned_run_is_above_the_rule_and_fewer_steps_by_the_measured_margins():
    """The command of CI: at half the steps, with MARGINS of benchmarks/quality.py."""
    done = subprocess.run([sys.executable, BENCHMARKS / "quality.py", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("14.0 of 28 computed") == 4


CALL = {"height": 64, "width": 64, "max_sequence_length": 16}


def test_the_short_mode_names_a_missed_margin(demo, monkeypatch):
    pipe, table = demo
    monkeypatch.setattr(quality_benchmark, "MARGINS", {"no calibration": ("fewer steps", 60.0)})
    subject = quality_benchmark.Subject(pipe, CALL, [(prompt, 1) for prompt in demo_model.PROMPTS[:2]])
    (missed,) = quality_benchmark.short(subject, table)
    assert missed.startswith("no calibration is ")
    assert missed.endswith("above fewer steps, which should be 60.0 or more.")


def test_rows_count_what_ran_and_measure_memory(demo, tmp_path):
    pipe, table = demo
    subject = quality_benchmark.Subject(pipe, CALL, [(prompt, 1) for prompt in demo_model.PROMPTS[:2]])
    reference = quality_benchmark.references(subject, 28)
    plain = subject.peak_bytes(quality_benchmark.nullcontext, 28)
    rows = [row for row in quality_benchmark.own_rows(subject, table, 28, [7]) if "released" not in row.family]
    results = list(quality_benchmark.measure(subject, rows, reference, plain, 28))
    assert [round(one["computed"]) for one in results] == [7] * 9
    by_family = {one["family"]: one for one in results}
    assert by_family["no calibration"]["psnr"] > by_family["paper's rule"]["psnr"]
    assert by_family["paper's rule"]["psnr"] > by_family["paper's rule, off"]["psnr"]
    assert by_family["planned, linear, off"]["bytes"] >= 2 * 64 * 160 * 4 and by_family["no calibration"]["bytes"] > 0
    text = quality_benchmark.table_text(results, 28)
    assert "MS-SSIM" not in text and "±" in text
    quality_benchmark.draw({28: results}, tmp_path / "figure.png")


@pytest.mark.parametrize("scheduler", ["unipc", "dpm"])
def test_a_sampler_has_the_noise_levels_of_the_models_own(demo, scheduler):
    pipe, _ = demo
    own = pipe.scheduler
    try:
        subject = quality_benchmark.Subject(
            pipe, {**CALL, "negative_prompt": "", "true_cfg_scale": 3.0}, [(demo_model.PROMPTS[0], 1)] * 2, scheduler
        )
        quality_benchmark.references(subject, 6)
        assert subject.branches == 2
        levels = pipe.scheduler.sigmas.tolist()
        assert levels[:6] == pytest.approx(flow_sigmas(6, 3.0), abs=2e-3)
    finally:
        pipe.scheduler = own


def test_experiments_run(demo, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "JOBS", experiments.JOBS[:2])
    monkeypatch.setattr(experiments, "load_demo", lambda: demo)
    monkeypatch.setattr(sys, "argv", ["experiments.py", "--steps", "12"])
    experiments.main()
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[2:11]}
    assert len(rows) == 9 and rows["as it is"] != rows["newest output held"] != rows["line followed to its end"]
    assert rows["as it is"] not in (rows["corrector off"], rows["corrected through two outputs"])


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
        "planned, linear, output",
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
