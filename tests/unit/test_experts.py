"""Two experts that divide the steps of one run, hint branches, and ranks that divide the tokens: on toy models whose
residuals differ so much that a mix-up cannot hide. Compared bit for bit with runs that no patch touched."""

import copy
import types

import numpy as np
import pytest
import torch
from ranks import two_ranks
from tiny_tables import residuals, table

from common.blocks import Host
from common.errors import MagCacheError
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.ratios import flow_sigmas
from common.schedule import Settings
from common.tables import RatioTable, read

TOY = Host(blocks=("blocks",), final_layer="head", image_tokens=0, latent="x", timestep="t")
HINTED = Host(blocks=("blocks",), final_layer="head", image_tokens=0, latent="x", timestep="t", hint_methods=("hints",))
STEPS, TOKENS, WIDTH = 12, 12, 8
REUSES_MUCH = Settings(9.0, 2, 0.1)


class Block(torch.nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.linear = scale, torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens, level, hint=0):
        return tokens + self.scale * torch.tanh(self.linear(tokens) + 2 * level) + hint


class ToyExpert(torch.nn.Module):
    """Tokens do not see each other, so that a part of them runs as in the whole. scale: size of the residual."""

    def __init__(self, scale, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks, self.head = torch.nn.ModuleList([Block(scale), Block(scale)]), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x, t, text):
        tokens, level = x + text, t / 1000
        for block in self.blocks:
            tokens = block(tokens, level)
        return self.head(tokens)


class HintedToy(ToyExpert):
    def hints(self, tokens):
        self.hinted += 1
        return [tokens.sin(), tokens.cos()]

    def forward(self, x, t, text):
        tokens, level = x + text, t / 1000
        hints = self.hints(tokens)
        for block, hint in zip(self.blocks, hints):
            tokens = block(tokens, level, hint)
        return self.head(tokens)


def experts(cls=ToyExpert):
    """High noise first. Residuals of the second are a hundred times those of the first."""
    return [cls(0.02, seed=1).requires_grad_(False), cls(2.0, seed=2).requires_grad_(False)]


class ExpertSampler:
    """Euler steps with guidance; the first model above the boundary, the second below."""

    def __init__(self, models, boundary):
        self.models, self.boundary, self.timesteps = models, boundary, None

    def run(self, seed=0, shift=5.0, steps=STEPS, tokens=slice(None), stop=None, guided=True):
        made = torch.Generator().manual_seed(seed)
        x = torch.randn(1, TOKENS, WIDTH, generator=made)[:, tokens]
        texts = torch.randn(2, 1, 1, WIDTH, generator=made)
        sigmas = [*flow_sigmas(steps, shift), 0.0]
        self.timesteps = torch.tensor(sigmas[:-1], dtype=torch.float64) * 1000
        for step, t in enumerate(self.timesteps):
            self.step = step
            if step == stop:
                raise KeyboardInterrupt
            model = self.models[0 if t.item() / 1000 >= self.boundary else 1]
            cond, *uncond = (model(x, t, text) for text in texts[: 2 if guided else 1])
            velocity = uncond[0] + 2 * (cond - uncond[0]) if guided else cond
            x = x + (sigmas[step + 1] - sigmas[step]) * velocity
        return x


def boundary_at(switch, steps=STEPS, shift=5.0):
    """A boundary from which on the second expert has all steps from `switch`."""
    levels = [1.1, *flow_sigmas(steps, shift), 0.0]
    return (levels[switch] + levels[switch + 1]) / 2


def flat_table(boundary=None):
    sampler = {"shift": 5.0, **({"boundary": boundary} if boundary else {})}
    return RatioTable(
        "flat",
        {"cond": [1.0] + [0.98] * (STEPS - 1), "uncond": [1.0] + [0.97] * (STEPS - 1)},
        tuple(flow_sigmas(STEPS, 5.0)),
        "measured",
        sampler=sampler,
    )


def cached_experts(sampler, boundary, host=TOY, ratios=None, settings=REUSES_MUCH):
    return magcache_forward(
        sampler.models,
        host,
        ratios or flat_table(),
        settings,
        lambda: sampler.timesteps,
        announce=None,
        boundary=boundary,
    )


def oracle(sampler, schedule, switch, **run):
    """The same video the expensive way: every block runs, and where the schedule reuses, the head gets the tokens that
    came in plus the newest residual of that expert and branch, or the two that the schedule weighs."""
    kept, calls, hooks = {}, {}, []

    def around(number, model):
        def head(module, args):
            branch = calls[sampler.step] = calls.get(sampler.step, -1) + 1
            mine = kept.setdefault((number, branch), [])
            if not schedule.reuse[sampler.step]:
                mine.insert(0, args[0] - tokens[0])
                return args
            residual = mine[0]
            if schedule.weights is not None and len(mine) > 1:
                a, b = schedule.weights[branch, sampler.step].tolist()
                residual = a * mine[0] + b * mine[1]
            return tokens[0] + residual

        def enter(module, args):
            tokens[:] = [args[0]]

        tokens = []
        hooks.extend([model.blocks[0].register_forward_pre_hook(enter), model.head.register_forward_pre_hook(head)])

    for number, model in enumerate(sampler.models):
        around(number, model)
    result = sampler.run(**run)
    for hook in hooks:
        hook.remove()
    return result


# Schedules


def planned_experts(rows, computed, switch, predictor=None, K=None):
    levels = flow_sigmas(len(rows), 5.0)
    return Target(computed, predictor=predictor, magcache_K=K).plan(table(levels, cond=rows), levels, switch)


@pytest.mark.parametrize("K", [None, 1, 2])
@pytest.mark.parametrize("predictor", ["linear", "reuse", None])
@pytest.mark.parametrize("switch", [0, 1, 3, 4, 7, 8])
def test_a_plan_keeps_the_experts_apart(switch, predictor, K):
    rows = residuals(8)  # one smooth curve: a residual from across the switch would serve well
    for computed in range(2, 8):
        parts = [part for part in (switch % 8, 8 - switch % 8) if part]
        least = sum(-(-part // (8 if K is None else K + 1)) for part in parts)
        if computed < least:
            with pytest.raises(MagCacheError, match="can be computed"):
                planned_experts(rows, computed, switch, predictor, K)
            continue
        schedule = planned_experts(rows, computed, switch, predictor, K)
        assert schedule.computed == computed and not schedule.reuse[[0, switch % 8]].any()
        assert K is None or max(map(len, schedule.strip.split("#"))) <= K


def test_no_switch_is_one_model():
    rows = residuals(9)
    for computed in (2, 5):
        assert (
            planned_experts(rows, computed, None).strip
            == planned_experts(rows, computed, 0).strip
            == planned_experts(rows, computed, 9).strip
        )
    assert planned_experts(rows, 2, 4).strip == "#...#...."


@pytest.mark.parametrize("switch", range(1, 12))
def test_no_weight_reaches_across_the_switch(switch):
    schedule = planned_experts(residuals(STEPS), 6, switch)
    assert not schedule.reuse[[0, switch]].any() and schedule.computed == 6
    for step in schedule.skipped_steps:
        newest, *before = schedule.anchors(step)
        assert (newest < switch) == (step < switch)
        assert all((one < switch) == (step < switch) or schedule.weights[0, step, 1] == 0 for one in before)


def test_too_few_steps_for_both_experts_get_a_sentence():
    with pytest.raises(MagCacheError, match=r"Of 9 steps, between 2 and 9 can be computed, not 1\."):
        planned_experts(residuals(9), 1, 4)


def test_the_jump_at_the_switch_is_carried_to_no_other_run():
    ratios = [1.0, 0.99, 0.99, 0.5, 0.98, 0.97]
    levels = flow_sigmas(6, 3.0)
    switching = RatioTable("two", {"cond": ratios}, tuple(levels), "measured", sampler={"boundary": levels[3] + 1e-3})
    one = RatioTable("one", {"cond": [1 if value == 0.5 else value for value in ratios]}, tuple(levels), "measured")
    for steps, shift in ((12, 3.0), (6, 8.0), (4, 3.0)):
        np.testing.assert_array_equal(switching.at(flow_sigmas(steps, shift)), one.at(flow_sigmas(steps, shift)))
    np.testing.assert_array_equal(switching.at(levels)[0], ratios)


# Runs


@pytest.mark.parametrize("switch", [0, 1, 5, 11, 12])
def test_residuals_stay_with_their_expert(switch):
    boundary = boundary_at(switch)
    plain, sampler = ExpertSampler(experts(), boundary), ExpertSampler(experts(), boundary)
    with cached_experts(sampler, boundary) as handle:
        result = sampler.run()
    (report,) = handle.reports
    assert report.schedule.reuse.sum() >= 5 and report.unplanned == {} and report.complete
    assert not report.schedule.reuse[0] and not report.schedule.reuse[switch : switch + 1].any()
    assert torch.equal(result, oracle(plain, report.schedule, switch))
    assert not torch.equal(result, plain.run())


@pytest.mark.parametrize("switch", [4, 6])
def test_planned_residuals_stay_with_their_expert(switch, tmp_path):
    boundary = boundary_at(switch)
    plain, sampler = ExpertSampler(experts(), boundary), ExpertSampler(experts(), boundary)
    with magcache_calibration(
        sampler.models,
        TOY,
        lambda: sampler.timesteps,
        "two",
        tmp_path / "two.json",
        {"sampler": {"boundary": boundary}},
    ):
        sampler.run(guided=False)
    with cached_experts(
        sampler,
        boundary,
        ratios=read(tmp_path / "two.json"),
        settings=Target(6, predictor="linear", payload="residual"),
    ) as handle:
        result = sampler.run(guided=False)
    (report,) = handle.reports
    assert report.computed == 6 and report.unplanned == {} and report.schedule.weights is not None
    torch.testing.assert_close(result, oracle(plain, report.schedule, switch, guided=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("switch", range(1, 12))
def test_a_schedule_that_forgot_the_switch_computes_there(switch):
    """Planned without a boundary, the first step of the second expert may be a reuse: it computes and is counted."""
    sampler = ExpertSampler(experts(), boundary_at(switch))
    with cached_experts(sampler, None) as handle:
        result = sampler.run()
    (report,) = handle.reports
    wrong = bool(report.schedule.reuse[switch])
    assert report.unplanned == ({"no residual of this branch yet": 2} if wrong else {})
    done = copy.deepcopy(report.schedule)
    done.reuse[switch] = False
    assert report.computed == 2 * done.computed
    assert torch.equal(result, oracle(ExpertSampler(experts(), boundary_at(switch)), done, switch))


def test_some_switch_falls_on_a_reuse():
    """Else the test above tests nothing."""
    sampler = ExpertSampler(experts(), 2.0)
    with cached_experts(sampler, None) as handle:
        sampler.run()
    assert handle.reports[0].schedule.reuse[1:].sum() >= 5


def test_a_run_of_experts_after_another_equals_the_run_alone():
    boundary = boundary_at(5)
    others = [{"seed": 1}, {"steps": 9}, {"shift": 2.0}, {"steps": 20, "shift": 8.0}]
    for other in others:
        alone, sampler = ExpertSampler(experts(), boundary), ExpertSampler(experts(), boundary)
        with cached_experts(alone, boundary):
            expected = alone.run(**other)
        with cached_experts(sampler, boundary) as handle:
            sampler.run()
            assert torch.equal(sampler.run(**other), expected)
        assert [report.complete for report in handle.reports] == [True, True] and handle.reports[-1].reused


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_break_leaves_nothing(stop):
    boundary = boundary_at(5)
    alone, sampler = ExpertSampler(experts(), boundary), ExpertSampler(experts(), boundary)
    before = [dict(vars(model)) for model in sampler.models]
    with cached_experts(alone, boundary):
        expected = alone.run()
    handle = cached_experts(sampler, boundary)
    with pytest.raises(KeyboardInterrupt):
        sampler.run(stop=stop)
    assert torch.equal(sampler.run(), expected)
    handle.remove()
    assert [dict(vars(model)) for model in sampler.models] == before and handle.residuals.bytes == 0


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("call", [1, 3, 5])  # 2 is the proof of the first residual
def test_an_exception_within_either_expert_leaves_nothing(number, call):
    boundary = boundary_at(5)
    alone, sampler = ExpertSampler(experts(), boundary), ExpertSampler(experts(), boundary)
    with cached_experts(alone, boundary):
        expected = alone.run()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == call:
            raise ValueError("out of memory")

    before = [(type(model), dict(vars(model))) for model in sampler.models]
    hook = sampler.models[number].head.register_forward_pre_hook(fail)
    with cached_experts(sampler, boundary) as handle:
        with pytest.raises(ValueError):
            sampler.run()
        assert handle.residuals.bytes == 0 and handle.run is None
        hook.remove()
        assert torch.equal(sampler.run(), expected)
    assert [(type(model), dict(vars(model))) for model in sampler.models] == before


def test_no_weights_of_the_idle_expert_are_touched():
    boundary, entered = boundary_at(5), []
    sampler = ExpertSampler(experts(), boundary)
    for number, model in enumerate(sampler.models):
        for block in model.blocks:
            block.register_forward_pre_hook(lambda module, args, number=number: entered.append((sampler.step, number)))
    with cached_experts(sampler, boundary) as handle:
        sampler.run()
    computed = np.flatnonzero(~handle.reports[0].schedule.reuse).tolist()
    assert entered == [(step, int(step >= 5)) for step in computed for _ in range(4)]  # two blocks, two branches


# Hints


@pytest.mark.parametrize("own", [False, True], ids=["of the class", "on the instance"])
def test_hints_are_made_on_computed_steps_only(own):
    """On the instance: sequence parallelism puts a method of its own there; it has to be back after a reused step."""
    model, plain = HintedToy(0.5), HintedToy(0.5)
    model.hinted = plain.hinted = 0
    bound = None
    if own:
        bound = model.hints = types.MethodType(HintedToy.hints, model)
    sampler, reference = ExpertSampler([model], -1), ExpertSampler([plain], -1)
    seen = []
    model.head.register_forward_pre_hook(
        lambda module, args: seen.append(None if len(model.blocks) else model.hints(None))
    )
    with cached_experts(sampler, None, host=HINTED) as handle:
        result = sampler.run()
        assert vars(model).get("hints") is bound
    (report,) = handle.reports
    assert model.hinted == report.computed and report.reused > 0
    del seen[1]  # the proof of the first residual
    assert [hints == [] for hints in seen] == [kind == "reused" for _, _, kind, *_ in report.calls]
    assert torch.equal(result, oracle(reference, report.schedule, 0))
    assert ("hints" in vars(model)) == own


def test_a_model_without_the_hint_method_is_refused():
    with pytest.raises(MagCacheError, match="ToyExpert has no hints: MagCache does not know this version"):
        cached_experts(ExpertSampler([ToyExpert(1.0)], -1), None, host=HINTED)


# Calibration


def measured_ratios(sampler, **run):
    """{branch: mean ratios}, from an unpatched run; 1 where another model computed the step before."""
    rows = {0: [], 1: []}

    def note(number, model):
        def enter(module, args):
            tokens[:] = [args[0]]

        def leave(module, args):
            branch = len([1 for step, *_ in rows[0] if step == sampler.step])
            rows[branch].append((sampler.step, number, args[0] - tokens[0]))

        tokens = []
        return [model.blocks[0].register_forward_pre_hook(enter), model.head.register_forward_pre_hook(leave)]

    hooks = [hook for number, model in enumerate(sampler.models) for hook in note(number, model)]
    sampler.run(**run)
    for hook in hooks:
        hook.remove()
    return {
        branch: [1.0]
        + [
            (new.norm(dim=-1) / old.norm(dim=-1)).mean().item() if before == after else 1.0
            for (_, before, old), (_, after, new) in zip(calls, calls[1:])
        ]
        for branch, calls in rows.items()
    }


@pytest.mark.parametrize("switch", [0, 1, 5, 11, 12])
def test_calibration_has_ratio_1_at_the_switch_and_each_experts_own_elsewhere(switch, tmp_path):
    boundary = boundary_at(switch)
    sampler = ExpertSampler(experts(), boundary)
    expected = measured_ratios(sampler)
    with magcache_calibration(
        sampler.models,
        TOY,
        lambda: sampler.timesteps,
        "two",
        tmp_path / "two.json",
        {"sampler": {"boundary": boundary}},
    ):
        assert torch.equal(sampler.run(), ExpertSampler(experts(), boundary).run())
    found = read(tmp_path / "two.json").mag_ratios
    for branch, name in enumerate(("cond", "uncond")):
        np.testing.assert_allclose(found[name], expected[branch], rtol=0, atol=2e-6)
        assert found[name].count(1.0) == (2 if 0 < switch < STEPS else 1)


def share_of_tokens(rank, folder):
    """One of two processes; the first holds five of the twelve tokens."""
    sampler = ExpertSampler(experts(), boundary_at(5))
    with magcache_calibration(sampler.models, TOY, lambda: sampler.timesteps, "two", f"{folder}/shared.json") as handle:
        sampler.run(tokens=slice(0, 5) if rank == 0 else slice(5, None))
    torch.save((handle.table.mag_ratios, handle.table.statistics), f"{folder}/{rank}.pt")


def test_two_processes_with_unequal_shares_measure_what_one_does(tmp_path):
    sampler = ExpertSampler(experts(), boundary_at(5))
    with magcache_calibration(sampler.models, TOY, lambda: sampler.timesteps, "two", tmp_path / "one.json"):
        sampler.run()
    two_ranks(share_of_tokens, tmp_path)
    one, shared = read(tmp_path / "one.json"), read(tmp_path / "shared.json")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second and first[0] == shared.mag_ratios
    for branch in ("cond", "uncond"):
        np.testing.assert_allclose(shared.mag_ratios[branch], one.mag_ratios[branch], rtol=0, atol=2e-6)
        for name in ("mag_std", "cos_dis"):
            np.testing.assert_allclose(shared.statistics[name][branch], one.statistics[name][branch], rtol=0, atol=2e-6)
        for row, other in zip(shared.statistics["gram"][branch], one.statistics["gram"][branch]):
            np.testing.assert_allclose(row, other, rtol=1e-5)
