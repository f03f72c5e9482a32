"""Skipped steps are corrected as they would be by hand, whatever the sampler, and nothing else changes."""

import copy
import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from schedulers import COMPUTED, SCHEDULERS, STEPS, scheduler_of

from common.corrector import EULER, Folded, Replay, follower_of, integrates_data, why_uncorrected
from common.ratios import flow_sigmas
from common.trajectory import Trajectory

diffusers = pytest.importorskip("diffusers")


def velocity(sample, level):
    """A model that bends the trajectory."""
    return torch.sin(2 * sample.float() + 3 * level) + 0.3 * sample.float()


def model_call(step, reused, branch=0):
    return SimpleNamespace(
        parts=[SimpleNamespace(call=SimpleNamespace(step=step, branch=branch), key=branch, guided=False)], reused=reused
    )


def sampled(scheduler, follower=None, computed=COMPUTED, edit=None, dtype=torch.float32, guidance=1.0):
    """The last sample of a loop as a pipeline has it, and what it passed to each step. A skipped step holds the newest
    output; edit: (step, sample) -> what the pipeline makes of a sample after a step."""
    sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    held, passed = None, []
    for step, timestep in enumerate(scheduler.timesteps):
        if step in computed:
            held = [velocity(sample, float(timestep) / 1000 + shift).to(dtype) for shift in (0.0, 0.4)]
        outputs = held
        if isinstance(follower, Folded):
            act = follower.computed if step in computed else follower.skipped
            outputs = [act(branch, step, output.clone()) for branch, output in enumerate(held)]
        elif follower:
            follower.follow(model_call(step, step not in computed), None)
        output = outputs[1] + guidance * (outputs[0] - outputs[1])
        passed.append((sample, output))
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        if edit:
            sample = edit(step, sample)
    return sample, passed


def by_hand(name, edit=None, guidance=1.0):
    """The same with a scheduler of its own for every gap, whose samples and outputs are written down step by step."""
    scheduler = scheduler_of(name)
    sigmas = scheduler.sigmas.tolist()[:STEPS]
    sample = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    known, gap, held = [], [], None  # known: (step, guided output, or x0 where the solver is one of data prediction)
    before_gap, data = None, name != "euler"
    for step, timestep in enumerate(scheduler.timesteps):
        if step not in COMPUTED:
            gap.append((step, sample))
            sample = scheduler.step(held, timestep, sample, return_dict=False)[0]
            gap[-1] += (sample,)
        else:
            branches = [velocity(sample, float(timestep) / 1000 + shift) for shift in (0.0, 0.4)]
            held = branches[1] + guidance * (branches[0] - branches[1])
            fresh = sample - sigmas[step] * held if data else held
            if gap:
                scheduler, moved = before_gap, torch.zeros_like(sample)
                anchors = [step, known[-1][0], *[known[-2][0]][: len(known) > 1]]
                outputs = [fresh, known[-1][1], *[known[-2][1]][: len(known) > 1]]
                if not known[1:]:
                    anchors, outputs = anchors[:2], outputs[:2]
                trust = 1.0
                if known[1:] and known[-2][0] > 0:
                    moves = [(new - old).flatten(1).numpy() for new, old in zip(outputs, outputs[1:])]
                    lengths = [np.linalg.norm(move, axis=1) for move in moves]
                    cosine = (moves[0] * moves[1]).sum(1) / (lengths[0] * lengths[1])
                    trust = torch.tensor(np.minimum(1, 1 + cosine)).float().view(-1, 1, 1)
                fit = np.polyfit  # the polynomial through as many points, by least squares
                for skipped, given, after in gap:
                    stacked = torch.stack(outputs).flatten(1).double().numpy()
                    polynomial = fit([sigmas[at] for at in anchors], stacked, len(anchors) - 1)
                    powers = sigmas[skipped] ** np.arange(len(anchors))[::-1]
                    output = torch.tensor(powers @ polynomial).float().reshape(sample.shape)
                    used = given - sigmas[skipped] * known[-1][2] if data else known[-1][2]  # the output was held
                    output = trust * output + (1 - trust) * used
                    if data:
                        output = (given + moved - output) / sigmas[skipped]
                    again = scheduler.step(output, scheduler.timesteps[skipped], given + moved, return_dict=False)[0]
                    moved = again - after
                sample, gap = sample + moved, []
            sample = scheduler.step(held, timestep, sample, return_dict=False)[0]
            known.append((step, fresh, held))
            before_gap = copy.deepcopy(scheduler)
        if edit:
            sample = edit(step, sample)
    return sample


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_replay_is_what_a_second_scheduler_makes_of_the_corrected_outputs(name, guidance):
    scheduler = scheduler_of(name)
    replay = Replay(scheduler, (scheduler.timesteps / 1000).tolist())
    corrected, _ = sampled(scheduler, replay, guidance=guidance)
    replay.detach()
    uncorrected, _ = sampled(scheduler_of(name), guidance=guidance)
    expected = by_hand(name, guidance=guidance)
    torch.testing.assert_close(corrected, expected, rtol=2e-4, atol=2e-4)
    assert (corrected - uncorrected).abs().max() > 20 * (corrected - expected).abs().max()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_comes_nearer_to_the_computed_trajectory(name):
    scheduler = scheduler_of(name)
    true, _ = sampled(scheduler_of(name), computed=range(STEPS))
    held, _ = sampled(scheduler_of(name))
    corrected, _ = sampled(scheduler, Replay(scheduler, (scheduler.timesteps / 1000).tolist()))
    assert (corrected - true).norm() < 0.5 * (held - true).norm()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_the_pipeline_does_between_steps_stays(name):
    """A mask that puts given values back after every step, and a callback that adds to the sample once."""
    given = torch.zeros(2, 3, 4)
    given[:, 0] = 7.0
    mask = (given == 0).float()

    def edit(step, sample):
        return mask * sample + (1 - mask) * given + (0.5 if step == 5 else 0.0) * mask

    scheduler = scheduler_of(name)
    corrected, _ = sampled(scheduler, Replay(scheduler, (scheduler.timesteps / 1000).tolist()), edit=edit)
    assert torch.equal(corrected[:, 0], given[:, 0])
    torch.testing.assert_close(corrected, by_hand(name, edit), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("guidance, predicts", [(1.0, False), (1.0, True), (5.0, False)])
def test_folded_equals_the_replay_of_euler(guidance, predicts, monkeypatch):
    if guidance != 1:  # each branch trusts its own moves, the replay those of the guided output; the rest is linear
        monkeypatch.setattr(Trajectory, "trust", lambda self, output: 1.0)
    scheduler = scheduler_of("euler")
    levels = scheduler.sigmas.tolist()[:STEPS]
    replayed, _ = sampled(scheduler, Replay(scheduler, levels, predicts), guidance=guidance)
    folded, _ = sampled(scheduler_of("euler"), Folded(levels, predicts), guidance=guidance)
    torch.testing.assert_close(folded, replayed, rtol=1e-4, atol=1e-4)


def test_a_calibration_comes_closer_where_only_the_last_step_is_skipped():
    """Through both ways in, for the sample that was calibrated on."""
    levels, computed, farness = scheduler_of("euler").sigmas.tolist()[:STEPS], range(STEPS - 1), {}
    plain, passed = sampled(scheduler_of("euler"), computed=range(STEPS))
    outputs = torch.stack([output[:1].flatten() for _, output in passed]).double().numpy()
    for gram in (outputs @ outputs.T, None):
        scheduler = scheduler_of("euler")
        replayed, _ = sampled(scheduler, Replay(scheduler, levels, True, gram), computed=computed)
        folded, _ = sampled(scheduler_of("euler"), Folded(levels, True, gram=gram), computed=computed)
        torch.testing.assert_close(folded, replayed, rtol=1e-4, atol=1e-4)
        farness[gram is not None] = (replayed - plain)[0].norm()
    assert farness[True] < 0.8 * farness[False]


def test_a_correction_is_made_as_far_as_the_outputs_go_on():
    """Of a batch: one that goes on as it went, one that turns at a right angle, one that comes back."""
    kept = Trajectory(flow_sigmas(8))
    for step, moved in ((1, [0.0, 0.0]), (3, [1.0, 0.0])):
        kept.computed(step, torch.tensor([moved] * 3))
    fresh = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert kept.trust(fresh).flatten().tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)
    used = torch.tensor([[1.0, 0.0]] * 3)
    corrected = kept.corrected([(4, used)], 5, fresh)[0]
    assert torch.equal(corrected[2], used[2]) and not torch.allclose(corrected[:2], used[:2])


def test_a_branch_that_was_left_out_is_not_made_again():
    folded, levels = Folded(flow_sigmas(6)), torch.ones(1, 2)
    for step in (0, 1):
        folded.computed("branch", step, levels)
    folded.skipped("branch", 2, levels)
    assert torch.equal(folded.computed("branch", 4, 3 * levels), 3 * levels)  # step 3 is missing
    folded.skipped("branch", 4, levels)
    assert not torch.equal(Folded(flow_sigmas(6)).computed("other", 0, levels), 2 * levels)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_where_nothing_is_skipped_nothing_changes(name):
    scheduler = scheduler_of(name)
    followed, _ = sampled(scheduler, Replay(scheduler, (scheduler.timesteps / 1000).tolist(), True), range(STEPS))
    assert torch.equal(followed, sampled(scheduler_of(name), computed=range(STEPS))[0])


def test_bfloat16_latents_stay_what_they_are():
    scheduler = scheduler_of("euler")
    replay = Replay(scheduler, scheduler.sigmas.tolist()[:STEPS])
    corrected, passed = sampled(scheduler, replay, dtype=torch.bfloat16)
    assert corrected.dtype == torch.bfloat16 and all(sample.dtype == torch.bfloat16 for sample, _ in passed)
    torch.testing.assert_close(corrected.float(), by_hand("euler"), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_the_solver_integrates_is_held(name):
    """A model whose x0 is the same at every sample and step: skipped steps cost nothing, whatever the order."""
    scheduler, target = scheduler_of(name), torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    assert integrates_data(scheduler) == (name != "euler")
    scheduler.register_to_config(prediction_type="epsilon")
    assert not integrates_data(scheduler)
    scheduler = scheduler_of(name)
    replay = Replay(scheduler, scheduler.sigmas.tolist()[:STEPS], predicts=True)
    sample, kept = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), None
    for step, timestep in enumerate(scheduler.timesteps):
        if step in COMPUTED:
            kept = (sample - target) / scheduler.sigmas[step]
        replay.follow(model_call(step, step not in COMPUTED), None)
        sample = scheduler.step(kept, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "make, part",
    [
        (lambda: None, "cannot be followed"),
        (lambda: diffusers.FlowMatchHeunDiscreteScheduler(), "calls the model twice a step"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), "adds noise"),
        (lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), "adds noise"),
        (lambda: diffusers.EulerAncestralDiscreteScheduler(), "adds noise"),
        (lambda: diffusers.SASolverScheduler(), "adds noise"),
        (lambda: diffusers.UnCLIPScheduler(), "adds noise"),
        (lambda: diffusers.SCMScheduler(), "adds noise"),
        (lambda: diffusers.CMStochasticIterativeScheduler(), "adds noise"),
        (lambda: diffusers.CogVideoXDPMScheduler(), "no step that can be repeated"),
        (lambda: SimpleNamespace(step=0), "no step that can be repeated"),
    ],
)
def test_off_with_a_reason(make, part):
    scheduler = make()
    assert part in why_uncorrected(scheduler)
    assert follower_of(scheduler, flow_sigmas(8), predicts=False) == (None, why_uncorrected(scheduler))
    follower, _ = follower_of(scheduler, flow_sigmas(8), predicts=True)
    assert isinstance(follower, Folded) and not follower.corrects


@pytest.mark.parametrize("given", [True, False])
def test_noise_that_a_step_is_asked_for_comes_once_more(given):
    """DDIM's, with eta: from a generator of the pipeline's own, or torch's."""
    ends = {}
    for name in ("un-cached", "held", "corrected"):
        scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
        scheduler.set_timesteps(STEPS)
        torch.manual_seed(5)
        drawn = {"eta": 1.0, "generator": torch.Generator().manual_seed(5) if given else None}
        replay = Replay(scheduler, (scheduler.timesteps / 1000).tolist()) if name == "corrected" else None
        sample, output = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), None
        for step, timestep in enumerate(scheduler.timesteps):
            computes = step in COMPUTED or name == "un-cached"
            if computes:
                output = torch.sin(0.5 * sample + 3 * float(timestep) / 1000)
            if replay:
                replay.follow(model_call(step, not computes), None)
            sample = scheduler.step(output, timestep, sample, return_dict=False, **drawn)[0]
        ends[name] = sample, (drawn["generator"] or torch.default_generator).get_state()
    assert torch.equal(ends["corrected"][1], ends["un-cached"][1])
    missed = {name: float((end - ends["un-cached"][0]).norm()) for name, (end, _) in ends.items()}
    assert missed["corrected"] < 0.7 * missed["held"]


def constant_branches(name, guided, computed=COMPUTED, held_still=0, follows=True, predicts=True):
    """The last sample of a loop whose branches of guidance make the same output at each step, so that a skipped step
    misses nothing. guided: (step) -> whether there are two; held_still: steps whose guided output is made zero."""
    scheduler = scheduler_of(name)
    replay = Replay(scheduler, (scheduler.timesteps / 1000).tolist(), predicts) if follows else None
    sample = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    for step, timestep in enumerate(scheduler.timesteps):
        for branch in range(1 + guided(step)):
            if replay:
                replay.follow(model_call(step, step not in computed, branch), None)
        output = torch.full_like(sample, 0.0 if step < held_still else 5.0 if guided(step) else 1.0)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
    return sample


@pytest.mark.parametrize("predicts", [True, False])
@pytest.mark.parametrize("change", range(4, 10))
@pytest.mark.parametrize("name, tolerance", [("euler", 1e-4), ("unipc", 0.1)])  # x0 of UniPC's second order moves on
def test_outputs_with_guidance_tell_nothing_of_those_without(name, tolerance, change, predicts):
    """It ends or begins in the middle of a run, between two computed steps or at one."""
    for guided in (lambda step: step < change, lambda step: step >= change):
        expected = constant_branches(name, guided, follows=False)
        got = constant_branches(name, guided, predicts=predicts)
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("held_still", [1, 2, 3])
@pytest.mark.parametrize("name", ["euler", "unipc"])
def test_a_sample_that_is_held_at_first_tells_nothing(name, held_still):
    """CFG-Zero* makes the first outputs zero."""
    for computed in (COMPUTED, (0, 2, 5, 9, 13), (0, 4, 8, 13)):
        options = {"guided": lambda step: True, "computed": computed, "held_still": held_still}
        expected = constant_branches(name, follows=False, **options)
        torch.testing.assert_close(constant_branches(name, **options), expected, rtol=0, atol=0.01)


def test_on_with_none():
    for name in SCHEDULERS:
        assert why_uncorrected(scheduler_of(name)) == ""
    assert why_uncorrected(EULER) == "" and follower_of(EULER, [1.0, 1.0, 0.5], False)[0] is None


def test_the_scheduler_is_left_as_it_was():
    scheduler = scheduler_of("unipc")
    replay = Replay(scheduler, (scheduler.timesteps / 1000).tolist())
    assert (
        list(inspect.signature(scheduler.step).parameters)
        == list(inspect.signature(type(scheduler).step).parameters)[1:]
    )
    twin = copy.deepcopy(scheduler)  # as a pipeline makes one for the audio of a video
    other, _ = sampled(twin, computed=range(STEPS))
    assert torch.equal(other, sampled(scheduler_of("unipc"), computed=range(STEPS))[0])
    assert not replay.trajectory.anchors
    replay.detach()
    assert "step" not in scheduler.__dict__ and scheduler.step.__func__ is type(scheduler).step
