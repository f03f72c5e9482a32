"""Ratio tables of a few numbers, and the refusal of a wrong one."""

import re

import numpy as np
import pytest

from common.errors import MagCacheError
from common.gram import packed
from common.ratios import flow_sigmas
from common.tables import RatioTable

GOOD = {
    "mag_ratios": {"cond": [1.0, 0.9, 0.8], "uncond": [1.0, 0.95, 0.85]},
    "sigmas": [1.0, 0.6, 0.2],
    "origin": "measured",
}


def ratios_of(name="mine", **fields):
    return RatioTable(name=name, **{**GOOD, **fields})


def refusal(function, *arguments):
    """The text of a MagCacheError: one sentence."""
    with pytest.raises(MagCacheError) as caught:
        function(*arguments)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and not re.search(r"\.\s+[A-Z]", text), text
    return text


def residuals(steps, shift=3.0, width=200, seed=0):
    """Smooth curves over the noise level: (steps, width)."""
    random = np.random.default_rng(seed)
    sigma, phase, speed = flow_sigmas(steps, shift)[:, None], random.random(width) * 6, 1 + 2 * random.random(width)
    return np.sin(speed * 2 * sigma + phase) + 0.3 * sigma**2 * np.cos(6 * sigma + 2 * phase)


def gram_of(rows):
    return rows @ rows.T


def table(sigmas, statistics=None, settings=None, **branches):
    """A calibration with these residuals a branch, which are its outputs, too; without branches one of ratios alone,
    near 1."""
    ratios = {name: [1.0] * len(sigmas) for name in branches or {"cond": None}}
    by_branch = {name: packed(gram_of(rows)) for name, rows in branches.items()}
    grams = {"gram": by_branch, "gram_of_outputs": by_branch} if branches else {}
    return RatioTable(
        "synthetic",
        ratios,
        tuple(sigmas),
        "measured",
        settings=settings or {},
        statistics={**grams, **(statistics or {})},
    )
