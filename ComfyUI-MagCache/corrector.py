"""Steps that were predicted, put right when the next one is computed: for Euler's method, whose steps only add up."""

from __future__ import annotations

import numpy as np


class Corrector:
    """Follows the directions (x - denoised) / sigma of each conditioning through one run of Euler's method.

    At a computed step m after the predicted steps j+1 .. m-1 the directions of these are known better, interpolated
    between those of the computed steps k, j and m. Euler's x is a sum of directions times steps of sigma, so what the
    predictions missed is added to the direction of step m.
    """

    def __init__(self, about, schedule):
        self.sigmas, self.trails = about.sigmas, {}
        self.schedule = schedule

    def corrected(self, call, output, sigma):
        """The denoised latent of a call, put right. call: `ModelCall`, finished; output: what came of it."""
        corrected = output
        for index, (part, made) in enumerate(zip(call.parts, output.chunk(len(call.parts)))):
            direction = (part.latent - made) / sigma
            missed = self.follow(part, direction, call.reused)
            if missed is not None:
                corrected = output.clone() if corrected is output else corrected
                step = part.call.step
                change = missed / float(self.sigmas[step + 1] - self.sigmas[step])
                rows = len(made)
                corrected[index * rows : (index + 1) * rows] -= sigma * change
        return corrected

    def follow(self, part, direction, reused):
        """What the predictions since the last computed step missed in x, known at a computed step, else None."""
        step, trail = part.call.step, self.trails.setdefault(part.key, Trail())
        if reused:
            trail.went(step, direction, self.sigmas)
            return None
        missed = trail.missed(step, direction, self.sigmas)
        trail.computed(step, direction)
        for key in [key for key, other in self.trails.items() if other.newest < min(self.schedule.anchors(step) or [0])]:
            del self.trails[key]  # of a context window that is past
        return missed


class Trail:
    """One conditioning's computed directions, the newest two, and the sum of its predicted steps since."""

    def __init__(self):
        self.anchors, self.steps, self.sum = [], [], None

    @property
    def newest(self):
        return self.anchors[0][0] if self.anchors else -1

    def went(self, step, direction, sigmas):
        part = direction * float(sigmas[step + 1] - sigmas[step])
        self.sum = part if self.sum is None else self.sum + part
        self.steps.append(step)

    def computed(self, step, direction):
        self.anchors, self.steps, self.sum = [(step, direction), *self.anchors][:2], [], None

    def missed(self, step, direction, sigmas):
        if not self.steps or self.steps != list(range(self.newest + 1, step)):
            return None
        nodes = [(step, direction), *self.anchors]
        weights = lagrange(sigmas[[node for node, _ in nodes]], sigmas[self.steps])
        ways = np.diff(sigmas)[self.steps] @ weights
        return sum(float(way) * made for way, (_, made) in zip(ways, nodes)) - self.sum


def lagrange(nodes, at):
    """(len(at), len(nodes)): the weights with which values at `nodes` are interpolated by a polynomial."""
    weights = np.ones((len(at), len(nodes)))
    for index, node in enumerate(nodes):
        for other in np.delete(nodes, index):
            weights[:, index] *= (at - other) / (node - other)
    return weights


