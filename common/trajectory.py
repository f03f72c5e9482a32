"""Predict skipped outputs of a run from the computed ones before them, and correct them once the next one is there.

Neither a calibration nor facts of the model are needed: a skipped output is predicted along the line through the two
newest computed ones (`Trajectory.predicted`) and later interpolated (`Trajectory.corrected`). A calibration without
guidance improves the interpolation, and the prediction of a last step that does not compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .interpolation import gram_weights, interpolation_weights, line_share

PRIOR = 4  # a run without guidance begins as if it had seen so many computed steps follow the line


class Trajectory:
    """The two newest computed outputs of one sampler or one branch: what they predict, and how a third corrects that.

    The line through them is followed only as far as it would have predicted the computed steps so far. That is `share`,
    a number per sample of the batch by least squares, between 0 (the newest output is held) and 1. It is small with
    strong guidance and long gaps, large on smooth trajectories. Outputs may have any shape with the batch first.

    guided: whether there is classifier-free guidance. Then the line is not followed before it has proved itself, and a
    calibration, which is of single branches, is not used.
    """

    def __init__(self, levels: Sequence[float], gram: np.ndarray | None = None) -> None:
        """levels: noise levels of the run's steps, or other coordinates in which outputs lie on lines, all different.
        gram: Gram matrix (steps, steps) of the outputs of a calibrated run, nan where it is not known."""
        self.levels, self.gram, self.guided = levels, gram, False
        self.clear()

    def clear(self) -> None:
        """Forget everything, because another model or another run follows."""
        # (step, output), newest first; three where a calibration has weights for them, otherwise two.
        self.anchors: list[tuple[int, torch.Tensor]] = []
        # Sums over `learned` computed steps, per sample: how far outputs went along the line; the squared length of it.
        self.seen: torch.Tensor | None = None
        self.length: torch.Tensor | None = None
        self.learned = 0

    def line(self, step: int) -> torch.Tensor | None:
        """What the line through the two newest outputs adds to the newest one at `step`. None: there is no line yet;
        the first output of a run, made of noise alone, lies off it."""
        if len(self.anchors) < 2 or self.anchors[1][0] == 0:
            return None
        (newest, output), (before, older) = self.anchors[:2]
        return line_share(self.levels, step, newest, before) * (output.float() - older.float())

    def predicted(self, step: int, held: torch.Tensor) -> torch.Tensor:
        """The output of a skipped step. held: what it is if the newest output is held."""
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
        """How far the line is followed, for each sample (None: not at all)."""
        if self.seen is None or self.length is None:
            return None if self.guided else 1.0
        known = 0.0 if self.guided else PRIOR * self.length / self.learned
        return ((self.seen + known) / (self.length + known)).nan_to_num(0.0).clamp(0, 1)

    def corrected(self, gap: Sequence[tuple[int, torch.Tensor]], step: int, output: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of skipped steps, interpolated between the kept outputs and that of the computed `step`. gap:
        (skipped step, the output that was used for it)."""
        known, trust = [(step, output), *self.anchors[:2]], self.trust(output)
        outputs = []
        for skipped, used in gap:
            weights = self.weights(skipped, [at for at, _ in known])
            between = weighted_sum(weights, known)
            outputs.append((used.float() + trust * (between - used.float())).to(output.dtype))
        return outputs

    def weights(self, step: int, anchors: Sequence[int]) -> list[float]:
        """The weights of the outputs at the steps `anchors` that give the one at `step`."""
        calibrated = self.calibrated_weights(step, anchors)
        return interpolation_weights(self.levels, step, anchors) if calibrated is None else calibrated

    def calibrated_weights(self, step: int, anchors: Sequence[int]) -> list[float] | None:
        """The same from the calibration, or None. At the beginning, with two anchors or with the first output among
        them, samples differ too much for it."""
        if self.gram is None or self.guided or len(anchors) < 3 or anchors[-1] == 0:
            return None
        if not np.isfinite(self.gram[step, [step, *anchors]]).all():
            return None
        return gram_weights(self.gram, step, anchors)

    def trust(self, output: torch.Tensor) -> torch.Tensor | float:
        """How much of the correction is made, for each sample: min(1, 1 + cosine of the two newest moves), so all of it
        unless the outputs turn back, and nothing where they go straight back. With strong guidance and long gaps
        outputs swing to and fro, and a full correction would add to that."""
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
        """The outputs kept."""
        return [output for _, output in self.anchors]


def weighted_sum(weights: Sequence[float], outputs: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """The weighted sum of the outputs in `outputs`, (step, output), in float32."""
    return torch.stack([weight * output.float() for weight, (_, output) in zip(weights, outputs)]).sum(0)
