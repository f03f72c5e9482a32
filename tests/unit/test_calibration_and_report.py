"""Calibration measures what it says and writes whole files; reports tell what ran."""

import copy
import itertools
import json

import numpy as np
import pytest
import torch
from ranks import two_ranks
from tiny_runs import BASE, RUNS, Tokens

from common import __version__
from common.blocks import Host
from common.calibration import Statistics
from common.errors import MagCacheError
from common.gram import Forecast
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.report import RunReport, write_report
from common.schedule import Settings, compute_all
from common.steps import Call
from common.tables import RatioTable, read
from common.timing import Lap

# Calibration


class Measured(Tokens):
    """The ratios of an unpatched run, written out from the paper: {branch: [(mean, deviation, 1 - cos), ...]}."""

    def __init__(self, sampler, tokens=None):
        super().__init__(sampler.model)
        self.sampler, self.tokens, self.residuals = sampler, tokens, {}

    def changed(self, args):
        residual = (self.after - self.before)[:, : self.tokens].float()
        self.residuals.setdefault(self.sampler.branch, []).append(residual)
        return args

    def rows(self, branch):
        rows = [(1.0, 0.0, 0.0)]
        for old, new in zip(self.residuals[branch], self.residuals[branch][1:]):
            ratio = (new.pow(2).sum(-1).sqrt() / old.pow(2).sum(-1).sqrt()).flatten()
            cosine = (new * old).sum(-1) / (new.pow(2).sum(-1) * old.pow(2).sum(-1)).sqrt()
            rows.append((ratio.mean().item(), ratio.std().item(), 1 - cosine.mean().item()))
        return np.array(rows).T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["base", "all"])
def test_ratios_equal_an_independent_measurement(model, euler, calibrating, tmp_path, dtype, name):
    model.to(dtype)
    run = {**RUNS[name], "batch": 2}
    sampler, reference = euler(copy.deepcopy(model)), euler(model)
    measured = Measured(reference)
    reference.run(**run)
    with calibrating(sampler, tmp_path / "tiny.json") as handle:
        sampler.run(**run)
    ours = read(tmp_path / "tiny.json")
    assert list(ours.mag_ratios) == (["cond", "uncond"] if run["cfg"] else ["cond"])
    for branch, key in enumerate(ours.mag_ratios):
        mean, spread, cos_dis = measured.rows(branch)
        np.testing.assert_allclose(ours.mag_ratios[key], mean, rtol=0, atol=3e-6)
        np.testing.assert_allclose(ours.statistics["mag_std"][key], spread, rtol=0, atol=1e-5)
        np.testing.assert_allclose(ours.statistics["cos_dis"][key], cos_dis, rtol=0, atol=3e-6)
    assert np.abs(np.array(ours.mag_ratios["cond"]) - 1).max() > 1e-3
    assert ours.sigmas == pytest.approx(sampler.timesteps.numpy() / 1000, abs=1e-6)
    assert (ours.origin, ours.sampler["steps"], ours.statistics["runs"]) == ("measured", run["steps"], 1)
    assert ours.sampler["shift"] == pytest.approx(run["shift"], abs=1e-3) and handle.table.name == "tiny"


def test_a_calibration_serves_the_next_run(model, euler, cached, calibrating, tmp_path):
    sampler = euler(model)
    with calibrating(sampler, tmp_path / "tiny.json", description={"notes": "kept"}):
        sampler.run(cfg=True)
    ours = read(tmp_path / "tiny.json")
    assert ours.notes == "kept" and ours.fits(sampler.timesteps.numpy() / 1000)
    with cached(sampler, ratios=ours, thresh=0.5) as handle:
        sampler.run(cfg=True)
    assert handle.reports[0].reused > 0
    np.testing.assert_array_equal(handle.reports[0].schedule.ratios, list(ours.mag_ratios.values()))


def test_noise_tokens_restrict_the_statistic(model, euler, host, calibrating):
    """FLUX Kontext appends the tokens of its reference picture."""
    kontext = Host(**{**vars(host), "noise_tokens": lambda arguments: arguments["hidden_states"].shape[1] // 2})
    sampler, reference = euler(copy.deepcopy(model)), euler(copy.deepcopy(model))
    measured = Measured(reference, tokens=32)
    reference.run()
    with calibrating(sampler, host=kontext) as handle:
        sampler.run()
    with calibrating(euler(model)) as everything:
        everything.timesteps = lambda: sampler.timesteps
        sampler.model = model
        sampler.run()
    mean, spread, _ = measured.rows(0)
    np.testing.assert_allclose(handle.table.mag_ratios["cond"], mean, rtol=0, atol=3e-6)
    np.testing.assert_allclose(handle.table.statistics["mag_std"]["cond"], spread, rtol=0, atol=1e-5)
    assert np.abs(np.array(everything.table.mag_ratios["cond"]) - mean).max() > 1e-4


def test_the_file_is_written_by_complete_runs_only(model, euler, calibrating, tmp_path):
    path, sampler = tmp_path / "deep" / "tiny.json", euler(model)
    with calibrating(sampler, path):
        for _ in sampler.iterate(steps=6):
            assert path.exists() == (sampler.step == 5)
    old, expected = path.read_bytes(), read(path).mag_ratios
    for step in range(6):
        with calibrating(sampler, path) as handle:
            if step < 5:
                *_, _ = itertools.islice(sampler.iterate(steps=6, prompt=1), step + 1)
            hook = model.norm_out.register_forward_pre_hook(
                lambda module, args, step=step: 1 / 0 if sampler.step == step else None
            )
            with pytest.raises(ZeroDivisionError):
                sampler.run(steps=6, prompt=1)
            hook.remove()
            assert path.read_bytes() == old and handle.table is None
            assert list(path.parent.iterdir()) == [path]
            sampler.run(steps=6)
            assert handle.table.mag_ratios == expected  # nothing of the broken run is in it
        path.write_bytes(old)


def test_timesteps_that_do_not_last_are_a_mistake(model, euler, host, ratios):
    """A copy at every call would make every call a run of its own, and nothing would ever be reused."""
    sampler = euler(model)
    with pytest.raises(MagCacheError, match="new object at each call"):
        with magcache_forward(
            model, host, ratios, Settings(0.1, 3, 0.2), lambda: sampler.timesteps.tolist(), announce=None
        ):
            sampler.run()


def test_guidance_that_ends_with_the_last_step(model, euler, cached, calibrating, tmp_path):
    """Whether another branch was to come is known when the next run begins or the patch goes."""
    sampler, path = euler(model), tmp_path / "cond.json"
    with calibrating(sampler, path):
        sampler.run(steps=6, cfg=lambda step: step < 5)
        assert not path.exists()
        sampler.run(steps=6, cfg=lambda step: step < 5)
        assert read(path).statistics["runs"] == 1
    assert read(path).statistics["runs"] == 2 and read(path).mag_ratios.keys() == {"cond"}
    with cached(sampler) as handle:
        sampler.run(**{**BASE, "cfg": lambda step: step < 11})
    assert handle.reports[0].complete and handle.residuals.bytes == 0


def test_a_cancel_between_the_last_two_calls_leaves_the_old_file(model, euler, calibrating, tmp_path):
    """The conditional call of the last step is through, its other branch never comes."""
    sampler, path = euler(model), tmp_path / "old.json"
    path.write_text("old")

    def cancel(step, branch):
        if (step, branch) == (5, 1):
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt), calibrating(sampler, path) as handle:
        sampler.run(steps=6, cfg=True, extra=cancel)
    assert path.read_text() == "old" and handle.table is None and len(handle.reports[0].calls) == 11


def test_two_runs_are_averaged(model, euler, calibrating, tmp_path):
    sampler, single = euler(model), []
    for prompt in (0, 1):
        with calibrating(sampler) as handle:
            sampler.run(prompt=prompt)
        single.append(handle.table)
    with calibrating(sampler, tmp_path / "both.json") as handle:
        sampler.run(prompt=0)
        assert read(tmp_path / "both.json").mag_ratios == single[0].mag_ratios
        sampler.run(prompt=1)
    both = read(tmp_path / "both.json")
    assert both.statistics["runs"] == 2 and single[0].mag_ratios != single[1].mag_ratios
    mean = np.mean([ratios.mag_ratios["cond"] for ratios in single], axis=0)
    np.testing.assert_allclose(both.mag_ratios["cond"], mean, rtol=0, atol=1.1e-6)


def test_runs_of_two_kinds_are_not_averaged(model, euler, calibrating, tmp_path):
    path, sampler = tmp_path / "tiny.json", euler(model)
    for other in ({"steps": 7}, {"cfg": True}, {"shift": 1.0}):
        with pytest.raises(MagCacheError, match="runs of one kind"), calibrating(sampler, path):
            sampler.run()
            old = path.read_bytes()
            sampler.run(**other)
        assert path.read_bytes() == old


def test_calibration_of_one_step_is_refused(model, euler, calibrating):
    with pytest.raises(MagCacheError, match="at least 2"), calibrating(euler(model)) as handle:
        handle.timesteps = lambda: torch.tensor([1000.0])
        euler(model).run(steps=1)


class TwoRankModel(torch.nn.Module):
    """Small enough for two processes."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = torch.nn.ModuleList([torch.nn.Linear(4, 4)]), torch.nn.Linear(4, 4)

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = hidden_states + block(hidden_states)
        return self.head(hidden_states)


def calibrate_toy(rank, folder):
    torch.manual_seed(0)
    model, timesteps, latents = (
        TwoRankModel().requires_grad_(False),
        torch.tensor([1000.0, 500.0]),
        torch.randn(1, 3, 4),
    )
    host = Host(blocks=("blocks",), final_layer="head", image_tokens=0)
    with magcache_calibration(model, host, lambda: timesteps, "toy", f"{folder}/rank{rank}.json") as handle:
        for timestep in timesteps:
            latents = latents - 0.5 * model(latents, timestep)
    assert handle.table.steps == 2


def test_one_process_writes(tmp_path):
    two_ranks(calibrate_toy, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("rank*.json")) == ["rank0.json"]
    assert read(tmp_path / "rank0.json").steps == 2


# Reports


def test_report_of_a_cached_run(model, euler, cached, tmp_path):
    sampler = euler(model)
    with cached(sampler) as handle:
        sampler.run(cfg=True)
    report = handle.reports[0]
    line, entries = report.line(), json.loads(json.dumps(report.to_dict()))
    assert line.startswith("MagCache: 10 of 24 model calls computed, 14 reused; transformer ") and "\n" not in line
    assert line.endswith("; extra memory 16.0 KiB; facts verified on this model") and report.speedup > 1
    assert (entries["strip"], entries["computed"], entries["reused"], entries["complete"]) == (
        "##..#..#..#.",
        10,
        14,
        True,
    )
    assert entries["extra_bytes"] == report.peak_bytes == 2 * 64 * 32 * 4 and entries["unplanned"] == {}
    assert entries["settings"] == {"magcache_thresh": 1.0, "magcache_K": 2, "retention_ratio": 0.2}
    assert [(call["step"], call["branch"]) for call in entries["by_call"]] == list(
        itertools.product(range(12), range(2))
    )
    assert {call["kind"] for call in entries["by_call"] if call["step"] in (2, 3, 5, 6, 8, 9, 11)} == {"reused"}
    assert sum(call["seconds"] for call in entries["by_call"]) == pytest.approx(entries["seconds"], abs=1e-3)
    assert entries["sigmas"] == pytest.approx(sampler.timesteps.numpy() / 1000, abs=1e-6)
    write_report(tmp_path / "report.json", report, prompt="a cat")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["prompt"] == "a cat" and written["by_call"] == entries["by_call"]
    assert written["format"] == 1 and written["magcache_version"] == __version__


@pytest.mark.parametrize(
    "options, run, why",
    [
        ({"thresh": 0.0}, {}, "magcache_thresh is 0"),
        ({"K": 0}, {}, "magcache_K is 0"),
        ({}, {"steps": 4}, "a run of 4 steps has nothing to gain"),
        ({"retention": 1.0}, {}, "retention_ratio keeps every step"),
        ({"thresh": 0.01}, {}, "the smallest error of reusing a step is 0.0"),
    ],
)
def test_a_run_without_reuse_explains_itself(model, euler, cached, options, run, why):
    sampler, plans = euler(model), []
    with cached(sampler, announce=plans.append, **options) as handle:
        sampler.run(**run)
    report = handle.reports[0]
    assert report.reused == 0 and report.complete
    assert "MagCache reused nothing" in report.line() and why in report.line()
    assert f"nothing will be reused: {report.schedule.why_none}" in plans[0] and "extra memory" not in plans[0]
    assert json.loads(json.dumps(report.to_dict()))["why_none"] == report.schedule.why_none
    assert report.peak_bytes == 0


def test_a_run_that_broke_off_explains_itself(model, euler, cached):
    sampler = euler(model)
    with cached(sampler) as handle:
        *_, _ = itertools.islice(sampler.iterate(), 2)
        hook = model.x_embedder.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sampler.run()
        hook.remove()
    stopped, broken = handle.reports
    assert stopped.line() == "MagCache reused nothing in 2 calls: the run was interrupted."
    assert broken.line() == "MagCache reused nothing in 0 calls: the run was interrupted."
    for report in (stopped, broken):
        entries = json.loads(json.dumps(report.to_dict()))
        assert not entries["complete"] and entries["reused"] == 0 and entries["transformer_speedup"] == 1.0


def test_what_the_first_calls_compile_is_no_loss():
    """The first computed and the first reused call compile; what was saved is told by the others."""
    report = RunReport(compute_all(6), [1.0, 0.8, 0.6, 0.5, 0.3, 0.1])
    for step, (kind, seconds) in enumerate(
        [("computed", 20.0), ("computed", 2.0), ("reused", 14.0), ("computed", 2.0), ("reused", 0.1), ("reused", 0.1)]
    ):
        report.add(Call(step, 0), kind, Lap(lambda seconds=seconds: seconds))
    spent, saved = report.seconds()
    assert np.isclose(spent, 38.2) and np.isclose(saved, 3 * (2.0 - 0.1))


@pytest.mark.parametrize(
    "laps, saved, why",
    [
        # (kind, seconds, whether torch.compile was at work)
        ([("computed", 9, 1), ("computed", 2, 0), ("computed", 8, 1), ("reused", 7, 1), ("reused", 0.5, 0)], 3.0, ""),
        ([("computed", 9, 1), ("computed", 2, 0), ("reused", 15, 1)], 0.0, "torch.compile was at work"),
        ([("computed", 9, 1), ("computed", 8, 1), ("reused", 1, 0)], 0.0, "torch.compile was at work"),
        ([("computed", 2, 0), ("computed", 2, 0), ("reused", 2.5, 0)], -0.5, "took as long as a computed one"),
    ],
)
def test_a_compiled_run_reports_no_negative_saving(laps, saved, why):
    report = RunReport(compute_all(6), [1.0, 0.8, 0.6, 0.5, 0.3, 0.1])
    for step, (kind, seconds, compiled) in enumerate(laps):
        report.add(Call(step, 0), kind, Lap(lambda seconds=seconds: seconds, bool(compiled)))
    assert np.isclose(report.seconds()[1], saved)
    line = report.line()
    assert f" {max(saved, 0.0):.2f} s saved (" in line and ("no time was saved: " in line) == bool(why), line
    assert why in line and "-" not in line, line


def test_the_report_of_a_calibration(model, euler, calibrating):
    sampler = euler(model)
    with calibrating(sampler) as handle:
        sampler.run()
    report = handle.reports[0]
    assert (
        report.computed == 12 and report.complete and report.line().endswith(": the ratios were measured in this run.")
    )
    assert json.loads(json.dumps(report.to_dict()))["strip"] == "#" * 12


def test_ratios_of_another_step_count_are_announced(model, euler, cached):
    sampler, plans = euler(model), []
    with cached(sampler, announce=plans.append):
        sampler.run()
        sampler.run(steps=28)
    assert "ratios of 28 steps converted" in plans[0] and "converted" not in plans[1]


def test_a_table_of_another_model_is_announced(model, euler, cached, ratios):
    sampler, plans = euler(model), []
    lent = RatioTable(**{**vars(ratios), "origin": "borrowed", "notes": "Really another model's."})
    with cached(sampler, ratios=lent, announce=plans.append):
        sampler.run()
    assert "Really another model's." in plans[0]


def test_branches_by_number_and_steps_evaluated_twice():
    """A host may call the unconditional branch first, and a solver evaluate a step twice, the first one too."""
    statistics, made = Statistics(), torch.Generator().manual_seed(0)
    residuals = {
        (step, branch, turn): torch.randn(1, 3, 4, generator=made)
        for step in range(4)
        for branch in (1, 0)
        for turn in (0, 1)
    }
    statistics.begin([1.0, 0.75, 0.5, 0.25])
    for (step, branch, _), residual in residuals.items():
        statistics.add(Call(step, branch), residual, residual.reshape(1, -1, 1))
    statistics.finish((1.0, 0.1))
    table = statistics.table("tiny")
    assert list(table.mag_ratios) == list(table.statistics["gram"]) == ["cond", "uncond"]
    norms = {key: residual.norm(dim=-1) for key, residual in residuals.items()}
    expected = [1.0] + [float((norms[step, 0, 0] / norms[step - 1, 0, 1]).mean()) for step in (1, 2, 3)]
    assert table.mag_ratios["cond"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["rule", "target"])
def test_a_report_labels_its_errors(model, euler, ratios, host, tmp_path, kind):
    """The rule's accumulated error and a planned run's expected relative error are two things."""
    sampler = euler(model)
    with magcache_calibration(model, host, lambda: sampler.timesteps, "tiny") as measured:
        sampler.run()
    settings = Settings(1.0, 2, 0.2) if kind == "rule" else Target(6, predictor="linear", payload="residual")
    with magcache_forward(model, host, measured.table, settings, lambda: sampler.timesteps, announce=None) as handle:
        sampler.run()
    report, path = handle.reports[0], tmp_path / "report.json"
    write_report(path, report)
    content, table, levels = json.loads(path.read_text()), measured.table, np.array(report.levels)
    if kind == "rule":
        steps = [step for step in range(12) if report.schedule.reuse[step]]
        ratio, sums = table.at(levels), {}
        for step in steps:  # by hand: from the computed step before it on
            start = max(other for other in range(step) if not report.schedule.reuse[other])
            products = np.cumprod(ratio[:, start + 1 : step + 1], axis=1)
            sums[step] = np.abs(1 - products).sum(axis=1).max()
        assert [content["accumulated_error"][step] for step in steps] == pytest.approx(list(sums.values()), abs=1e-6)
        assert content["expected_error"] is None and len(steps) == 7
    else:
        expected = Forecast.of_table(table, levels).error_of(report.schedule.reuse)
        assert content["expected_error"] == pytest.approx(expected.tolist(), abs=1e-6) and max(expected) > 0
        assert content["accumulated_error"] is None
