"""What is kept between steps."""

from types import SimpleNamespace

import torch

from common.residuals import Residuals
from common.steps import Call, Part


def test_a_second_evaluation_at_a_step_takes_the_place_of_the_first():
    residuals, latent = Residuals(), torch.zeros(1, 2)
    for value, step in ((1.0, 0), (2.0, 1), (3.0, 1)):
        residuals.keep(Part(0, Call(step, 0), latent), torch.full((1, 2, 4), value))
    assert [(one.step, float(one.residual.mean())) for one in residuals.kept[0]] == [(1, 3.0), (0, 1.0)]
    schedule = SimpleNamespace(anchors=lambda step: [1, 0], weights=torch.tensor([[[0.0, 0.0]] * 2 + [[2.0, -1.0]]]))
    predicted, why = residuals.predict(Part(0, Call(2, 0), latent), schedule)
    assert not why and torch.equal(predicted, torch.full((1, 2, 4), 5.0))
