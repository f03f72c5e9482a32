"""The benchmarks run, and the short one holds what was measured."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_the_short_mode_names_a_missed_margin(demo, monkeypatch):
    pipe, table = demo
    monkeypatch.setattr(quality_benchmark, "MARGINS", {"fewer steps": 60.0})
    jobs = [(prompt, 1) for prompt in demo_model.PROMPTS[:2]]
    subject = quality_benchmark.Subject(pipe, {"height": 64, "width": 64, "max_sequence_length": 16}, jobs)
    missed = quality_benchmark.short(subject, table)
    assert [line.split(" is ")[0] for line in missed] == ["planned, linear", "planned, linear, output"]
    assert all("above fewer steps, which should be 60.0 or more." in line for line in missed)


def test_rows_count_what_ran_and_measure_memory(demo, tmp_path):
    pipe, table = demo
    subject = quality_benchmark.Subject(
        pipe, {"height": 64, "width": 64, "max_sequence_length": 16}, [(prompt, 1) for prompt in demo_model.PROMPTS[:2]]
    )
    reference, seconds = quality_benchmark.references(subject, 28)
    plain = subject.peak_bytes(quality_benchmark.nullcontext, 28)
    rows = list(quality_benchmark.own_rows(subject, table, 28, [7]))
    results = list(quality_benchmark.measure(subject, rows, reference, plain, 28))
    assert [round(one["computed"]) for one in results] == [7] * 6
    by_family = {one["family"]: one for one in results}
    assert (
        by_family["planned, linear"]["psnr"]
        > by_family["planned, reuse"]["psnr"]
        > by_family["paper's rule"]["psnr"] - 3
    )
    assert by_family["planned, linear"]["bytes"] >= 2 * 64 * 160 * 4 > by_family["planned, linear, output"]["bytes"] > 0
    text = quality_benchmark.table_text(results, 28, seconds)
    assert "MS-SSIM" not in text and "±" in text
    quality_benchmark.draw({28: results}, tmp_path / "figure.png")


def test_experiments_run(demo, monkeypatch):
    """Every row is planned; those that bring a predictor of their own are drawn."""
    pipe, table = demo
    reference = {prompt: experiments.render(pipe, prompt, 28, 1)[0] for prompt in experiments.JOBS[:1]}
    rows = [trial for _, rows in experiments.trials(pipe, table, 28) for trial in rows]
    assert len(rows) > 30 and all(trial.schedule(14).computed == 14 for trial in rows)
    drawn = {
        trial.name: float(experiments.measure(pipe, table, trial, 28, 14, reference))
        for trial in rows
        if trial.residuals
    }
    assert len(drawn) == 3 and min(drawn.values()) > 40
    monkeypatch.setattr(experiments, "JOBS", experiments.JOBS[:1])
    name, free, *guarded = next(experiments.guard_rows(pipe, table, 28, 9))
    assert name == "weights off by 0%" and free.endswith("(9.0)") and guarded[0] == free


@pytest.mark.parametrize("name", speed.SMALL)
def test_speed_runs_every_structure(name):
    """Of six steps, one block a list: the facts in common/hosts.py are the real classes', and three steps are
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
    with pytest.raises(MagCacheError, match="add its facts to common/hosts.py"):
        host_of(torch.nn.Linear(1, 1))
