"""What the computed outputs of a run tell of those between and after them: prediction and correction.

No calibration and no fact of the model is needed: a skipped output is predicted along the line through the two newest
computed ones (`Trajectory.predicted`), and interpolated when the next is there (`Trajectory.corrected`). A calibration
without guidance tells how to interpolate, and what a last step adds that is not computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .interpolation import gram_weights, interpolation_weights, line_share

PRIOR = 4  # computed steps that a run without guidance begins with, as if it had seen them go along the line


class Trajectory:
    """The two newest computed outputs of one sampler or one branch, what they predict, and what a third corrects.

    The line through them is followed as far as it would have predicted the computed steps so far: `share`, a number
    between 0 (the newest is held) and 1 for each sample of the batch, by least squares. Strong guidance and long gaps
    make it small, smooth trajectories large. Outputs are of any shape with the batch first.

    guided: whether classifier-free guidance is at work. Then nothing is followed before it is known, and a calibration
    of single branches says nothing.
    """

    def __init__(self, levels: Sequence[float], gram: np.ndarray | None = None) -> None:
        """levels: noise levels of the run's steps, all different, or where else outputs lie on lines; gram: the Gram
        matrix (steps, steps) of the outputs of a calibrated run, with nan where it has none."""
        self.levels, self.gram, self.guided = levels, gram, False
        self.clear()

    def clear(self) -> None:
        """Forget everything: another model or another run follows."""
        self.anchors: list[tuple[int, torch.Tensor]] = []  # newest first; a third where a calibration has weights of it
        # Sums over computed steps, a number a sample: how far their outputs went along the line, its length squared.
        self.seen: torch.Tensor | None = None
        self.length: torch.Tensor | None = None
        self.learned = 0  # how many they were

    def line(self, step: int) -> torch.Tensor | None:
        """What the straight line in the noise level through the two newest adds to the newest. None: there is none; the
        first output of a run, made of noise alone, lies off it."""
        if len(self.anchors) < 2 or self.anchors[1][0] == 0:
            return None
        (newest, output), (before, older) = self.anchors[:2]
        return line_share(self.levels, step, newest, before) * (output.float() - older.float())

    def predicted(self, step: int, held: torch.Tensor) -> torch.Tensor:
        """The output of a skipped step. held: what the newest computed outputs give if they are held."""
        if step == len(self.levels) - 1:  # no computed step will correct it
            weights = self.calibrated_weights(step, [at for at, _ in self.anchors])
            if weights is not None:
                return weighted_sum(weights, self.anchors).to(held.dtype)
        line, share = self.line(step), self.share()
        if line is None or share is None:
            return held
        if torch.is_tensor(share):
            share = share.view(-1, *[1] * (held.ndim - 1))
        return (held.float() + share * line).to(held.dtype)

    def share(self) -> torch.Tensor | float | None:
        """How far the line is followed, for each sample. None: not at all."""
        if self.seen is None or self.length is None:
            return None if self.guided else 1.0
        known = 0.0 if self.guided else PRIOR * self.length / self.learned
        return ((self.seen + known) / (self.length + known)).nan_to_num(0.0).clamp(0, 1)

    def corrected(self, gap: Sequence[tuple[int, torch.Tensor]], step: int, output: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the skipped steps of `gap`, (step, the output that was used), as the fresh output of `step`
        and the kept ones have them."""
        known, trust = [(step, output), *self.anchors[:2]], self.trust(output)
        outputs = []
        for skipped, used in gap:
            weights = self.weights(skipped, [at for at, _ in known])
            between = weighted_sum(weights, known)
            outputs.append((used.float() + trust * (between - used.float())).to(output.dtype))
        return outputs

    def weights(self, step: int, anchors: Sequence[int]) -> list[float]:
        """Of the outputs at the steps `anchors` in that at `step`."""
        calibrated = self.calibrated_weights(step, anchors)
        return interpolation_weights(self.levels, step, anchors) if calibrated is None else calibrated

    def calibrated_weights(self, step: int, anchors: Sequence[int]) -> list[float] | None:
        """The same from a calibration. None: it tells none. At the beginning, where there are two or one is made of
        noise alone, samples differ too much."""
        if self.gram is None or self.guided or len(anchors) < 3 or anchors[-1] == 0:
            return None
        if not np.isfinite(self.gram[step, [step, *anchors]]).all():
            return None
        return gram_weights(self.gram, step, anchors)

    def trust(self, output: torch.Tensor) -> torch.Tensor | float:
        """How much of a correction is made, for each sample: 1, less where the outputs turn back on their last move, 0
        where they go straight back: 1 + the cosine of the two newest moves. Strong guidance and long gaps make outputs
        swing to and fro, and a correction by what swings would add to it."""
        if len(self.anchors) < 2 or self.anchors[1][0] == 0:
            return 1.0
        (_, newest), (_, older) = self.anchors[:2]
        last, before = (output.float() - newest.float()).flatten(1), (newest.float() - older.float()).flatten(1)
        cosine = torch.nn.functional.cosine_similarity(last, before)
        return (1 + cosine).clamp(max=1).view(-1, *[1] * (output.ndim - 1))

    def computed(self, step: int, output: torch.Tensor) -> None:
        """Keep the output of a computed step, and learn how well the line would have predicted it."""
        line = self.line(step)
        if line is not None and line.shape == output.shape:
            newest, fresh = self.anchors[0][1].float(), output.float()
            size = fresh.square().flatten(1).sum(1)
            seen, length = ((fresh - newest) * line).flatten(1).sum(1) / size, line.square().flatten(1).sum(1) / size
            self.seen = seen if self.seen is None else self.seen + seen
            self.length = length if self.length is None else self.length + length
            self.learned += 1
        kept = 2 if self.gram is None or self.guided else 3
        self.anchors = [(step, output), *(one for one in self.anchors if one[0] != step)][:kept]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What is kept."""
        return [output for _, output in self.anchors]


def weighted_sum(weights: Sequence[float], outputs: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The sum of the outputs of `outputs`, (step, output), each times its weight, in float32."""
    return torch.stack([weight * output.float() for weight, (_, output) in zip(weights, outputs)]).sum(0)
