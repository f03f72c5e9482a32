"""Skipped steps are made again, better, when the next step is computed.

A skipped step uses a prediction, whose error would stay in the latent for good. When step m is computed, its fresh
output says what the outputs of the steps skipped since the computed step j should have been: what was an extrapolation
becomes an interpolation between j, m and the computed step before j. `Replay` runs the sampler's own scheduler over
those steps once more, `Folded` does the same for a plain Euler loop inside the model's output. No call of the model is
added.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .interpolation import gram_of_data
from .trajectory import Trajectory

STOCHASTIC = ("Ancestral", "SDE", "LCM", "TCD", "DDPM")  # in the names of schedulers that add noise at each step
EULER = "euler"  # the scheduler of a loop x += (sigma' - sigma) * output without an object


class Skipped(NamedTuple):
    """One skipped step as the pipeline made it: what `scheduler.step` was given, and the sample that it returned."""

    step: int
    output: torch.Tensor
    timestep: Any
    sample: torch.Tensor
    after: torch.Tensor
    args: tuple
    kwargs: dict


class Replay:
    """Follows `scheduler.step` of one run, and corrects the sample before a computed step.

    The scheduler, with its history, is set back to where it was after the last computed step and runs over the skipped
    steps with corrected outputs. What that changes is carried on as a difference to the samples that the pipeline
    passed in, so that masks, blends and callbacks between steps keep their effect. It sees guided outputs.

    What is predicted and corrected is what the scheduler integrates: the model's output, or under solvers of data
    prediction x0 = sample - sigma * output. There an output that is held while the sample leaves its line would turn
    into another x0 at each step, which such a solver takes for a change.
    """

    def __init__(
        self, scheduler: Any, levels: Sequence[float], predicts: bool = False, gram: np.ndarray | None = None
    ) -> None:
        """predicts: whether skipped outputs are moved along the line, too; else they are taken as they come. gram: of
        `Trajectory`, of the model's outputs."""
        self.scheduler, self.predicts = scheduler, predicts
        self.of_data, sigmas = integrates_data(scheduler), sigmas_of(scheduler, levels)
        self.trajectory = Trajectory(sigmas, gram_of_data(gram, sigmas) if gram is not None and self.of_data else gram)
        self.step: int | None = None  # of the model's calls since the last step of the sampler
        self.reused = False
        self.original = scheduler.step
        self.clear()

        @functools.wraps(getattr(self.original, "__func__", self.original))
        def step(this, model_output, timestep, sample, *args, **kwargs):
            if this is not scheduler:  # a copy, as for the audio of a video
                return type(this).step(this, model_output, timestep, sample, *args, **kwargs)
            return self.advance(model_output, timestep, sample, *args, **kwargs)

        self.wrapper = types.MethodType(step, scheduler)
        scheduler.step = self.wrapper

    def clear(self) -> None:
        """Forget what was kept: another expert takes over."""
        self.trajectory.clear()
        self.gap: list[Skipped] = []
        self.state: dict = {}

    def detach(self) -> None:
        """Put the scheduler's own `step` back."""
        if self.scheduler.__dict__.get("step") is self.wrapper:
            del self.scheduler.step
            if self.scheduler.step != self.original:
                self.scheduler.step = self.original
        self.clear()

    @property
    def bytes(self) -> int:
        """What is kept besides the model's residuals or outputs."""
        return bytes_of(
            [*self.trajectory.tensors, *(one for made in self.gap for one in (made.output, made.sample, made.after))]
        )

    def follow(self, call: Any, output: Any) -> Any:
        """After each call of the model (`run.ModelCall`): its output, as it came."""
        step = call.parts[0].call.step
        self.trajectory.guided |= is_guided(call)
        self.reused = call.reused or (self.reused and step == self.step)
        self.step = step
        return output

    def advance(self, model_output, timestep, sample, *args, **kwargs):
        """One step of the sampler, in place of the scheduler's own."""
        step, self.step = self.step, None
        if step is None:  # not after a call of the model that was followed
            self.clear()
            return self.original(model_output, timestep, sample, *args, **kwargs)
        if self.reused:
            if self.predicts and self.trajectory.anchors:
                held = self.trajectory.anchors[0][1] if self.of_data else model_output
                model_output = self.output(step, sample, self.trajectory.predicted(step, held))
            result = self.original(model_output, timestep, sample, *args, **kwargs)
            if not self.trajectory.anchors:
                return result
            # Copied: pipelines may write into what they are given.
            self.gap.append(Skipped(step, model_output, timestep, sample, result[0].clone(), args, kwargs))
            return result
        integrated = self.integrated(step, sample, model_output)  # of the sample that the model was given
        if self.gap:
            sample = self.replayed(step, integrated, sample)
        result = self.original(model_output, timestep, sample, *args, **kwargs)
        self.trajectory.computed(step, integrated)
        self.state = {
            name: list(value) if isinstance(value, list) else value
            for name, value in self.scheduler.__dict__.items()
            if name != "step"
        }
        return result

    def integrated(self, step: int, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the scheduler integrates of the model's output: x0 (float32), or the output."""
        return sample.float() - self.trajectory.levels[step] * output.float() if self.of_data else output

    def output(self, step: int, sample: torch.Tensor, integrated: torch.Tensor) -> torch.Tensor:
        """The other way round: the model's output that gives it at this sample."""
        if not self.of_data:
            return integrated
        return ((sample.float() - integrated) / self.trajectory.levels[step]).to(sample.dtype)

    def replayed(self, step, fresh, sample):
        """The sample of a computed step as it would be if the skipped steps had used corrected outputs. fresh: what is
        integrated of the new output."""
        gap, self.gap = self.gap, []
        self.scheduler.__dict__.update(self.state)
        corrected = gap[0].sample
        used = [(one.step, self.integrated(one.step, one.sample, one.output)) for one in gap]
        between = self.trajectory.corrected(used, step, fresh)
        for one, integrated, given in zip(gap, between, [*(later.sample for later in gap[1:]), sample]):
            output = self.output(one.step, corrected, integrated)
            after = self.original(output, one.timestep, corrected, *one.args, **one.kwargs)[0]
            corrected = (given.float() + (after.float() - one.after.float())).to(given.dtype)
        return corrected


class Folded:
    """The same inside the model's outputs, for plain Euler loops: the output of a computed step also carries what the
    skipped steps before it missed, (sum over them of dsigma * (corrected - predicted)) / dsigma of the computed step.

    Each branch by itself: linear guidance of constant strength commutes with it. Where nothing can be corrected it
    still predicts.
    """

    def __init__(
        self,
        levels: Sequence[float],
        predicts: bool = False,
        corrects: bool = True,
        last_level: float = 0.0,
        gram: np.ndarray | None = None,
        places: Sequence[float] | None = None,
    ) -> None:
        """levels: of the run's steps; predicts, corrects: what is done; last_level: where the last step ends; gram,
        places: of `Trajectory` (None: the levels)."""
        self.levels, self.predicts, self.corrects = [*levels, last_level], predicts, corrects
        self.gram, self.places, self.guided = gram, places or self.levels[:-1], False
        self.branches: dict[Hashable, tuple[Trajectory, list]] = {}

    def clear(self) -> None:
        """Forget what was kept: another expert takes over."""
        self.branches.clear()

    def detach(self) -> None:
        """The run is over."""
        self.clear()

    @property
    def bytes(self) -> int:
        """What is kept besides the model's residuals or outputs."""
        branches = self.branches.values()
        return bytes_of([one for kept, gap in branches for one in (*kept.tensors, *(made for _, made in gap))])

    def follow(self, call: Any, output: Any) -> Any:
        """After each call of the model (`run.ModelCall`): its output, predicted further or corrected."""
        self.guided |= is_guided(call)
        leaves, form = pytree.tree_flatten(output)
        step, act = call.parts[0].call.step, self.skipped if call.reused else self.computed
        keys = tuple(part.key for part in call.parts)
        leaves = [
            act((keys, index, leaf.shape), step, leaf) if torch.is_tensor(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(leaves, form)

    def branch(self, key: Hashable) -> tuple[Trajectory, list]:
        """(its trajectory, the skipped steps since its last computed one)"""
        if key not in self.branches:
            self.branches[key] = Trajectory(self.places, self.gram), []
        self.branches[key][0].guided = self.guided
        return self.branches[key]

    def skipped(self, key: Hashable, step: int, held: torch.Tensor) -> torch.Tensor:
        """The output of a skipped step of the branch `key`. held: what its kept outputs or residuals give."""
        if key not in self.branches:
            return held
        trajectory, gap = self.branch(key)
        output = trajectory.predicted(step, held) if self.predicts else held
        if self.corrects:
            gap.append((step, output.clone()))
        return output

    def computed(self, key: Hashable, step: int, output: torch.Tensor) -> torch.Tensor:
        """The output of a computed step, corrected for those skipped before it."""
        trajectory, gap = self.branch(key)
        # A branch that was left out in between (guidance that ends and begins again) is not made again.
        whole = bool(gap) and [at for at, _ in gap] == list(range(trajectory.anchors[0][0] + 1, step))
        fresh = output.clone()
        if whole:
            missed = sum(
                (self.levels[at + 1] - self.levels[at]) * (corrected.float() - made.float())
                for (at, made), corrected in zip(gap, trajectory.corrected(gap, step, fresh))
            )
            output = (output.float() + missed / (self.levels[step + 1] - self.levels[step])).to(output.dtype)
        gap.clear()
        trajectory.computed(step, fresh)
        return output


def is_guided(call: Any) -> bool:
    """Whether a call of the model (`run.ModelCall`) is of a second branch, or of all: there is guidance."""
    return any(part.call.branch or part.guided for part in call.parts)


def bytes_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes."""
    return sum(one.numel() * one.element_size() for one in tensors)


def sigmas_of(scheduler: Any, levels: Sequence[float]) -> list[float]:
    """The scheduler's own noise levels, which may be finer than its timesteps, where it has as many that agree with
    `levels`; else these."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) > len(levels):
        own = [float(one) for one in sigmas[-len(levels) - 1 : -1]]
        if np.allclose(own, levels, atol=2e-3) and len(set(own)) == len(own):
            return own
    return [float(level) for level in levels]


def integrates_data(scheduler: Any) -> bool:
    """Whether it turns the output of a flow model into x0 and integrates that (DPM-Solver++, UniPC)."""
    config = getattr(scheduler, "config", {})
    solver = config.get("predict_x0") or config.get("algorithm_type") == "dpmsolver++"
    return bool(solver) and config.get("prediction_type") == "flow_prediction"


def why_uncorrected(scheduler: Any) -> str:
    """Why skipped steps of this scheduler cannot be made again; "" where they can."""
    if scheduler is None:
        return "this sampler's steps cannot be followed"
    if scheduler == EULER:
        return ""
    name, step = type(scheduler).__name__, getattr(scheduler, "step", None)
    if not callable(step) or list(inspect.signature(step).parameters)[:3] != ["model_output", "timestep", "sample"]:
        return f"{name} has no step that could be made again"
    if getattr(scheduler, "order", 1) != 1:
        return f"{name} calls the model twice a step"
    config = getattr(scheduler, "config", {})
    told = (config.get("stochastic_sampling"), "sde" in str(config.get("algorithm_type", "")))
    if any(told) or any(part in name for part in STOCHASTIC):
        return f"{name} adds noise at each step"
    return ""


def follower_of(
    scheduler: Any, levels: Sequence[float], predicts: bool, wanted: bool = True, gram: np.ndarray | None = None
) -> tuple[Replay | Folded | None, str]:
    """(what follows a run's outputs, why it corrects nothing). scheduler: an object with diffusers' `step`, EULER, or
    None where none is known; levels: noise levels of the run's steps; predicts, gram: as `Replay` and `Folded` have
    them."""
    if len({float(level) for level in levels}) < len(levels):
        return None, "two steps have one noise level"
    why = why_uncorrected(scheduler) if wanted else "it was turned off"
    if why:
        return (Folded(levels, True, corrects=False, gram=gram) if predicts else None), why
    if scheduler == EULER:
        return Folded(levels, predicts, gram=gram), ""
    return Replay(scheduler, levels, predicts, gram), ""
