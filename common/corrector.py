"""Correct skipped steps as soon as the next step is computed. No call of the model is added.

A skipped step uses a prediction, whose error would stay in the latent for good. Once step m is computed, its output
tells what the outputs of the steps skipped since the computed step j should have been: extrapolation becomes
interpolation between j, m and the computed step before j. `Replay` runs the sampler's own scheduler over those steps
again; `Folded` does the same for a plain Euler loop, inside the model's output.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from .interpolation import gram_of_data
from .samplers import EULER, drawn_again, generator_states, integrates_data, sigmas_of, why_uncorrected
from .trajectory import Trajectory


class Skipped(NamedTuple):
    """One skipped step: what the pipeline gave to `scheduler.step`, the sample `after` that it returned, and the states
    of the generators before it (`samplers.generator_states`)."""

    step: int
    output: torch.Tensor
    timestep: Any
    sample: torch.Tensor
    after: torch.Tensor
    args: tuple
    kwargs: dict
    noise: list[tuple[torch.Generator, torch.Tensor]]


class Replay:
    """Follows `scheduler.step` in one run, and corrects the sample before each computed step.

    The scheduler, with its history, is put back to where it was after the last computed step and runs over the skipped
    steps with corrected outputs. The change is added to the samples that the pipeline passed in, so that masks, blends
    and callbacks between steps keep their effect. The outputs it sees are guided ones.

    It predicts and corrects what the scheduler integrates: the model's output, or x0 = sample - sigma * output under
    solvers of data prediction (`integrates_data`). Such a solver would take a held output for a change, because it
    turns into another x0 at each step.
    """

    def __init__(
        self, scheduler: Any, levels: Sequence[float], predicts: bool = False, gram: np.ndarray | None = None
    ) -> None:
        """levels: noise levels of the run's steps; predicts: whether skipped outputs are also moved along the line;
        gram: Gram matrix of the model's outputs (`Trajectory`)."""
        self.scheduler, self.predicts = scheduler, predicts
        self.of_data, sigmas = integrates_data(scheduler), sigmas_of(scheduler, levels)
        self.trajectory = Trajectory(sigmas, gram_of_data(gram, sigmas) if gram is not None and self.of_data else gram)
        self.step: int | None = None  # of the model's calls since the sampler's last step
        self.reused = False  # whether one of these was
        self.keys: set[Hashable] = set()  # of these
        self.original = scheduler.step
        self.clear()

        @functools.wraps(getattr(self.original, "__func__", self.original))
        def step(this, model_output, timestep, sample, *args, **kwargs):
            if this is not scheduler:  # a copy of it, as for the sound of a video
                return type(this).step(this, model_output, timestep, sample, *args, **kwargs)
            return self.advance(model_output, timestep, sample, *args, **kwargs)

        self.wrapper = types.MethodType(step, scheduler)
        scheduler.step = self.wrapper

    def clear(self) -> None:
        """Forget what was kept, because another expert takes over."""
        self.trajectory.clear()
        self.gap: list[Skipped] = []  # the steps skipped since the last computed one
        self.state: dict = {}  # of the scheduler after that one
        self.kept_keys: set[Hashable] = set()  # of the calls whose guided outputs are kept

    def restart(self, step: int) -> None:
        """Forget what was kept before this step, because the conditioning changed."""
        self.clear()

    def detach(self) -> None:
        """Put the scheduler's own `step` back."""
        if self.scheduler.__dict__.get("step") is self.wrapper:
            del self.scheduler.step
            if self.scheduler.step != self.original:
                self.scheduler.step = self.original
        self.clear()

    @property
    def bytes(self) -> int:
        """Bytes kept besides the payload's."""
        return bytes_of(
            [*self.trajectory.tensors, *(one for made in self.gap for one in (made.output, made.sample, made.after))]
        )

    def follow(self, call: Any, output: Any) -> Any:
        """After each call of the model (`run.ModelCall`): note its step. Returns the output unchanged."""
        step = call.parts[0].call.step
        self.trajectory.guided |= is_guided(call)
        self.reused = call.reused or (self.reused and step == self.step)
        keys = {part.key for part in call.parts}
        self.keys, self.step = keys | self.keys if step == self.step else keys, step
        return output

    def advance(self, model_output, timestep, sample, *args, **kwargs):
        """One step of the sampler, in the place of the scheduler's own."""
        step, self.step = self.step, None
        if step is None:  # no call of the model that is followed came before
            self.clear()
            return self.original(model_output, timestep, sample, *args, **kwargs)
        if self.keys != self.kept_keys:  # guidance begins or ends here: what was guided otherwise tells nothing
            self.clear()
        if not self.trajectory.anchors and not model_output.any():  # a sample held at first, as CFG-Zero* does
            return self.original(model_output, timestep, sample, *args, **kwargs)
        if self.reused:
            if self.predicts and self.trajectory.anchors:
                held = self.trajectory.anchors[0][1] if self.of_data else model_output
                model_output = self.output(step, sample, self.trajectory.predicted(step, held))
            noise = generator_states(sample, args, kwargs)
            result = self.original(model_output, timestep, sample, *args, **kwargs)
            if not self.trajectory.anchors:
                return result
            # Cloned, because pipelines may write into what they are given.
            self.gap.append(Skipped(step, model_output, timestep, sample, result[0].clone(), args, kwargs, noise))
            return result
        integrated = self.integrated(step, sample, model_output)  # with the sample that the model was given
        if self.gap:
            sample = self.replayed(step, integrated, sample)
        result = self.original(model_output, timestep, sample, *args, **kwargs)
        self.trajectory.computed(step, integrated)
        self.kept_keys = self.keys
        self.state = {
            name: list(value) if isinstance(value, list) else value
            for name, value in self.scheduler.__dict__.items()
            if name != "step"
        }
        return result

    def integrated(self, step: int, sample: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What the scheduler integrates: x0 (float32), or the model's output."""
        sample, output = sample.detach(), output.detach()
        return sample.float() - self.trajectory.levels[step] * output.float() if self.of_data else output

    def output(self, step: int, sample: torch.Tensor, integrated: torch.Tensor) -> torch.Tensor:
        """The inverse: the model's output for which that is integrated at this sample."""
        if not self.of_data:
            return integrated
        return ((sample.float() - integrated) / self.trajectory.levels[step]).to(sample.dtype)

    def replayed(self, step: int, fresh: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample of a computed step as it would be had the skipped steps used corrected outputs. fresh: what the
        scheduler integrates at this step (`integrated`)."""
        gap, self.gap = self.gap, []
        self.scheduler.__dict__.update(self.state)
        corrected = gap[0].sample
        used = [(one.step, self.integrated(one.step, one.sample, one.output)) for one in gap]
        between = self.trajectory.corrected(used, step, fresh)
        for one, integrated, given in zip(gap, between, [*(later.sample for later in gap[1:]), sample]):
            output = self.output(one.step, corrected, integrated)
            with drawn_again(one.noise):
                after = self.original(output, one.timestep, corrected, *one.args, **one.kwargs)[0]
            corrected = (given.float() + (after.float() - one.after.float())).to(given.dtype)
        return corrected


class Folded:
    """The same for a plain Euler loop, inside the model's outputs: that of a computed step also makes up for the
    skipped steps before it. Added is (sum over these of dsigma * (corrected - predicted)) / dsigma of the computed
    step.

    Each branch is corrected by itself, which gives the same as correcting guided outputs as long as guidance is linear
    and of constant strength. It can also predict without correcting.
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
        """levels: noise levels of the run's steps; last_level: where the last step ends; predicts, corrects: which of
        the two is done; gram: as in `Trajectory`; places: its `levels` (None: those here)."""
        self.levels, self.predicts, self.corrects = [*levels, last_level], predicts, corrects
        self.gram, self.places, self.guided = gram, places or self.levels[:-1], False
        self.branches: dict[Hashable, tuple[Trajectory, list]] = {}

    def clear(self) -> None:
        """Forget what was kept, because another expert takes over."""
        self.branches.clear()

    def restart(self, step: int) -> None:
        """Forget what was kept before this step, of all branches, because the conditioning of one changed: guidance
        would multiply what a corrected branch and another differ in."""
        kept = {key: trajectory.anchors[:1] for key, (trajectory, _) in self.branches.items()}
        self.branches.clear()
        for key, anchors in kept.items():
            if anchors and anchors[0][0] == step:
                self.branch(key)[0].computed(*anchors[0])

    def detach(self) -> None:
        """The run is over."""
        self.clear()

    @property
    def bytes(self) -> int:
        """Bytes kept besides the payload's."""
        branches = self.branches.values()
        return bytes_of([one for kept, gap in branches for one in (*kept.tensors, *(made for _, made in gap))])

    def follow(self, call: Any, output: Any) -> Any:
        """After each call of the model (`run.ModelCall`): its output, moved along the line or corrected."""
        self.guided |= is_guided(call)
        leaves, form = pytree.tree_flatten(output)
        step, act = call.parts[0].call.step, self.skipped if call.reused else self.computed
        keys = tuple(part.key for part in call.parts)
        leaves = [
            act((keys, index, leaf.shape), step, leaf) if is_followed(leaf) else leaf
            for index, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(leaves, form)

    def branch(self, key: Hashable) -> tuple[Trajectory, list]:
        """(the branch's trajectory, its skipped steps since its last computed one as (step, output))"""
        if key not in self.branches:
            self.branches[key] = Trajectory(self.places, self.gram), []
        self.branches[key][0].guided = self.guided
        return self.branches[key]

    def skipped(self, key: Hashable, step: int, held: torch.Tensor) -> torch.Tensor:
        """The output of a skipped step of the branch `key`. held: what the payload makes of what it keeps."""
        if key not in self.branches:
            return held
        trajectory, gap = self.branch(key)
        output = trajectory.predicted(step, held) if self.predicts else held
        if self.corrects:
            gap.append((step, output.clone()))
        return output

    def computed(self, key: Hashable, step: int, output: torch.Tensor) -> torch.Tensor:
        """The output of a computed step, which also corrects the steps skipped before it."""
        trajectory, gap = self.branch(key)
        # Nothing is corrected if the branch was left out in between (guidance that ends and begins again).
        whole = bool(gap) and [at for at, _ in gap] == list(range(trajectory.anchors[0][0] + 1, step))
        fresh = output.detach().clone()
        if whole:
            missed = sum(
                (self.levels[at + 1] - self.levels[at]) * (corrected.float() - made.float())
                for (at, made), corrected in zip(gap, trajectory.corrected(gap, step, fresh))
            )
            output = (output.float() + missed / (self.levels[step + 1] - self.levels[step])).to(output.dtype)
        gap.clear()
        trajectory.computed(step, fresh)
        return output


def is_followed(leaf: Any) -> bool:
    """Whether a part of an output lies on a trajectory for each sample of a batch."""
    return torch.is_tensor(leaf) and leaf.is_floating_point() and leaf.ndim > 1


def is_guided(call: Any) -> bool:
    """Whether a call of the model (`run.ModelCall`) shows that there is guidance: it is of a second branch, or of
    all."""
    return any(part.call.branch or part.guided for part in call.parts)


def bytes_of(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes that tensors take."""
    return sum(one.numel() * one.element_size() for one in tensors)


def follower_of(
    scheduler: Any, levels: Sequence[float], predicts: bool, wanted: bool = True, gram: np.ndarray | None = None
) -> tuple[Replay | Folded | None, str]:
    """(what follows the run's outputs or None, why it corrects nothing or ""). scheduler: an object with the `step` of
    diffusers, EULER, or None if it is not known; wanted: whether to correct; the others are as in `Replay`."""
    if len({float(level) for level in levels}) < len(levels):
        return None, "two steps have one noise level"
    why = why_uncorrected(scheduler) if wanted else "it was turned off"
    if why:
        return (Folded(levels, True, corrects=False, gram=gram) if predicts else None), why
    if scheduler == EULER:
        return Folded(levels, predicts, gram=gram), ""
    return Replay(scheduler, levels, predicts, gram), ""
