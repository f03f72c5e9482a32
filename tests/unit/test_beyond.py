"""Payloads, the guard and the measured step times, on a tiny FLUX."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from ranks import two_ranks

from common.blocks import Host
from common.corrector import EULER
from common.errors import MagCacheError
from common.gram import unpacked
from common.guard import Guard
from common.patch import magcache_calibration, magcache_forward
from common.payloads import ModelOutput
from common.planner import Target
from common.ratios import flow_sigmas
from common.tables import read


@pytest.fixture
def planned_run(model, euler, calibrating, host):
    """`magcache_forward` with a target, calibrated on another prompt, with guidance or without."""

    def patch(sampler, target, announce=None, guided=False, **options):
        measured = euler(copy.deepcopy(model))
        with calibrating(measured) as handle:
            measured.run(cfg=guided, prompt=7)
        return magcache_forward(
            sampler.model, host, handle.table, target, lambda: sampler.timesteps, announce=announce, **options
        )

    return patch


class Outputs:
    """What the model returns, a call: the expensive oracle of the payload "output" replaces it as planned."""

    def __init__(self, sampler, schedule):
        self.sampler, self.schedule, self.made = sampler, schedule, {}
        sampler.model.register_forward_hook(self.changed)

    def changed(self, module, args, output):
        step, made = self.sampler.step, self.made.setdefault(self.sampler.branch, [])
        if not self.schedule.reuse[step]:
            made.insert(0, output[0].clone())
            return output
        if len(self.schedule.anchors(step)) == 1 or len(self.made) > 1:  # guidance, which the weights are not for
            return (made[0],)
        a, b = self.schedule.weights[0, step].tolist()
        return (made[0],) if (a, b) == (1, 0) else ((a * made[0]).add_(made[1], alpha=b),)


@pytest.mark.parametrize("run", [{}, {"cfg": True}, {"batch": 2, "cfg": True}], ids=["one branch", "cfg", "batch"])
def test_a_predicted_output_runs_nothing_of_the_model(model, euler, planned_run, executed, run):
    sampler, oracle = euler(copy.deepcopy(model)), euler(model)
    entered = []
    sampler.model.x_embedder.register_forward_hook(lambda *_: entered.append(None))
    with planned_run(sampler, Target(magcache_max_error=0.1, payload="output")) as handle:
        result = sampler.run(**run)
    report = handle.reports[0]
    branches, computed = 2 if run.get("cfg") else 1, report.schedule.computed
    assert len(entered) == report.computed == computed * branches and 3 < computed < 9 and not report.unplanned
    Outputs(oracle, report.schedule)
    assert torch.equal(result, oracle.run(**run))
    assert report.peak_bytes == 2 * branches * 64 * 16 * 4 * run.get("batch", 1) and handle.residuals.bytes == 0


def test_plan_states_the_memory_of_the_payload(model, euler, planned_run, host):
    plans = []
    for payload, width in (("residual", 2 * 32), ("output", 16)):
        sampler = euler(copy.deepcopy(model))
        with planned_run(sampler, Target(5, predictor="linear", payload=payload), plans.append):
            sampler.run()
        assert f"extra memory: {64 * width * 4 / 1024:.1f} KiB per branch" in plans[-1]


@pytest.mark.parametrize(
    "form",
    [
        lambda x: (x,),
        lambda x: [x, 2 * x],
        lambda x: {"x": x, "other": None},
        lambda x: x,
        lambda x: Transformer2DModelOutput(sample=x),
    ],
)
def test_outputs_of_any_form(form):
    x, payload = torch.arange(6.0).reshape(2, 3), ModelOutput()
    output = form(x)
    kept = payload.finish(output)
    x.zero_()  # a sampler that writes into what it is given
    again = payload.replace(kept + 1)
    assert type(again) is type(output)
    tensors = again if torch.is_tensor(again) else again["x"] if isinstance(again, dict) and "x" in again else again[0]
    assert torch.equal(tensors, torch.arange(6.0).reshape(2, 3) + 1)
    tensors.zero_()
    assert kept.abs().sum() > 0


@pytest.mark.parametrize("scheduler", [None, EULER])
def test_each_part_of_an_output_keeps_its_type(scheduler):
    """Pictures and sound in types of their own, a mask, indices, a loss of experts for each sample or for all."""

    class Parts(torch.nn.Module):
        def forward(self, x, timestep):
            y = torch.sin(x) * timestep / 1000
            return y.half(), y.double(), y > 0, torch.arange(3) + 2**40, y.mean((1, 2)), y.mean()

    model, timesteps = Parts(), 1000 * torch.tensor(flow_sigmas(12))
    host = Host(blocks=(), latent="x", why_output="of a test")
    options = {"scheduler": scheduler, "announce": None}
    with magcache_forward(model, host, None, Target(6), lambda: timesteps, **options) as handle, torch.no_grad():
        x = torch.randn(2, 3, 4)
        for timestep in timesteps:
            made = model(x, timestep.float())
            types = torch.float16, torch.float64, torch.bool, torch.int64, torch.float32, torch.float32
            assert tuple(part.dtype for part in made) == types and made[3].tolist() == [2**40, 2**40 + 1, 2**40 + 2]
            x = x - 0.08 * made[1].float()
    assert handle.reports[0].reused == 6


def test_an_output_without_tensors_gets_a_sentence():
    with pytest.raises(MagCacheError, match="finds no tensor in the model's output, a SimpleNamespace: run it without"):
        ModelOutput().finish(SimpleNamespace(sample=torch.ones(1)))


@pytest.mark.robustness(
    "Which residual a call may reuse",
    "guidance that calls the model with two rows, then with one (LTX-2, SD3's skip-layer guidance)",
    "each call uses its own output",
)
def test_outputs_of_calls_that_take_turns():
    """Guidance that calls the model with two rows and then with one, tiles that lie and stand."""
    payload, outputs = ModelOutput(), {"both": torch.randn(2, 3, 4), "tile": torch.randn(1, 4, 6)}
    outputs["one"], outputs["tile on end"] = outputs["both"][:1], outputs["tile"].transpose(1, 2)
    kept = {}
    for payload.key, output in outputs.items():
        kept[payload.key] = payload.finish((output,))
    for payload.key, output in outputs.items():
        assert torch.equal(payload.replace(kept[payload.key])[0], output)


def test_calibration_keeps_outputs_and_step_times(model, euler, calibrating, tmp_path):
    sampler, outputs = euler(model), []
    model.register_forward_hook(lambda module, args, output: outputs.append(output[0].flatten()))
    with calibrating(sampler, tmp_path / "tiny.json"):
        sampler.run()
        assert len(outputs) == 12  # timing a reused step is not seen from outside
        sampler.run(prompt=1)
    statistics = read(tmp_path / "tiny.json").statistics
    grams = [torch.stack(run).double() @ torch.stack(run).double().T for run in (outputs[:12], outputs[12:])]
    np.testing.assert_allclose(unpacked(statistics["gram_of_outputs"]["cond"]), sum(grams) / 2, rtol=1e-6)
    assert set(statistics["seconds"]) == {"computed", "reused"} and min(statistics["seconds"].values()) > 0
    assert len(statistics["spread"]["cond"]) == 12 and max(statistics["spread"]["cond"]) > 0


def test_outputs_of_reference_tokens_do_not_count(model, euler, host):
    """As FLUX.1-Kontext's reference picture: only the first 40 of 64 tokens are being denoised."""
    sampler, outputs = euler(model), []
    model.register_forward_hook(lambda module, args, output: outputs.append(output[0][:, :40].flatten()))
    kontext = replace(host, noise_tokens=lambda arguments: 40)
    with magcache_calibration(model, kontext, lambda: sampler.timesteps, "tiny") as handle:
        sampler.run()
    rows = torch.stack(outputs).double()
    np.testing.assert_allclose(unpacked(handle.table.statistics["gram_of_outputs"]["cond"]), rows @ rows.T, rtol=1e-6)


def test_the_timed_reuse_enters_no_block(model, euler, calibrating, executed):
    sampler, entered = euler(model), []
    model.transformer_blocks[0].register_forward_hook(lambda *_: entered.append("block"))
    model.norm_out.register_forward_hook(lambda *_: entered.append("head"))
    with calibrating(sampler):
        sampler.run()
    assert entered.count("block") == 12 and entered.count("head") == 1 + 12 + 3  # the proof, steps, rehearsals


# The guard


def test_a_guard_that_sees_what_was_calibrated_changes_nothing(model, euler, planned_run):
    plain, guarded = euler(copy.deepcopy(model)), euler(copy.deepcopy(model))
    with planned_run(plain, Target(6, predictor="linear", payload="residual")):
        result = plain.run(prompt=7)
    with planned_run(guarded, Target(6, magcache_guard=3)) as handle:
        assert torch.equal(guarded.run(prompt=7), result)
    assert handle.reports[0].reused == 6 and not handle.reports[0].unplanned


@pytest.mark.parametrize("payload", ["residual", "output"])
@pytest.mark.parametrize("cfg", [False, True])
def test_a_guard_stops_skipping_where_the_sample_leaves_the_calibration(model, euler, planned_run, cfg, payload):
    """From step 5 on the model is another one: the next computed step shows it, and everything after it computes."""
    sampler, weights, expected = euler(model), copy.deepcopy(model.state_dict()), euler(copy.deepcopy(model))

    def disturb(step, branch):
        if (step, branch) == (5, 0):
            for block in model.single_transformer_blocks:
                block.proj_out.weight.mul_(-5)
        return {}

    with planned_run(sampler, Target(7, magcache_guard=3, payload=payload), guided=cfg) as handle:
        result = sampler.run(cfg=cfg, extra=disturb)
        model.load_state_dict(weights)
        again = sampler.run(cfg=cfg)
    report = handle.reports[0]
    reuse, kinds = report.schedule.reuse, [call[2] for call in report.calls]
    seen = next(step for step in range(5, 12) if not reuse[step])
    branches = 2 if cfg else 1
    assert kinds[: (seen + 1) * branches] == [
        "reused" if one else "computed" for one in reuse[: seen + 1] for _ in range(branches)
    ]
    assert set(kinds[(seen + 1) * branches :]) == {"computed"} and torch.isfinite(result).all()
    ((why, calls),) = report.unplanned.items()
    assert (
        why.startswith(f"the guard saw step {seen} predicted ") and calls == branches * int(reuse[seen + 1 :].sum()) > 0
    )
    assert f"{calls} computed unplanned (the guard saw" in report.line()
    with planned_run(expected, Target(7, magcache_guard=3, payload=payload), guided=cfg):
        assert torch.equal(again, expected.run(cfg=cfg))  # the next run starts anew


def test_a_guard_needs_a_planned_run(model, euler, ratios, host):
    sampler = euler(model)
    with (
        pytest.raises(MagCacheError, match="need the Gram matrix"),
        magcache_forward(model, host, ratios, Target(5, magcache_guard=3), lambda: sampler.timesteps),
    ):
        sampler.run()


def judged(rank, folder):
    made, predicted = torch.ones(1, 8, 4), torch.ones(1, 8, 4)
    if rank == 1:
        predicted = predicted - 0.5  # half the tokens of the video, and only they go astray
    why = Guard(2.0).judge(5, made, predicted, expected=0.1)
    (folder / f"{rank}.json").write_text(json.dumps(why))


def test_ranks_decide_alike(tmp_path):
    two_ranks(judged, tmp_path)
    whys = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert whys == ["the guard saw step 5 predicted 3.5 times worse than calibrated"] * 2
