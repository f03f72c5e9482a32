"""The facts of every transformer class, on the tiny models of diffusers' own tests."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(REPOSITORY / "benchmarks"))

from pipelines_table import pipelines, proof, tiny_models  # noqa: E402

from common.discover import discover  # noqa: E402
from common.hosts import HOSTS, class_name  # noqa: E402

CHECKOUT = os.environ.get("MAGCACHE_DIFFUSERS")
PACKED = {"Cosmos3OmniTransformer", "ErnieImageTransformer2DModel"}  # one sample, or its tokens in front of the batch


def test_the_page_has_every_pipeline():
    page = (REPOSITORY / "docs" / "pipelines.md").read_text()
    for pipeline, model_name in pipelines():
        assert f"| {pipeline} | {model_name} | " in page


@pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_DIFFUSERS names no checkout of diffusers")
def test_facts_hold_and_wrong_ones_are_caught():
    """On each class: as written; with one token for all; with the half of a stack in two lists; and as found."""
    tried = set()
    for model, inputs in tiny_models(Path(CHECKOUT)):
        name, host = type(model).__name__, HOSTS.get(class_name(model))
        if host is None or not host.blocks:
            continue
        tried.add(name)
        assert not proof(model, inputs, host), name
        if name not in PACKED:
            assert proof(model, inputs, replace(host, output_tokens=lambda model, forward: 1)), name
        if len(host.blocks) > 1 and name != "LatteTransformer3DModel":  # whose two lists run in pairs
            assert proof(model, inputs, replace(host, blocks=host.blocks[:1])), name
        with torch.no_grad():
            found = discover(model, (), inputs).host
        assert not found.blocks or not proof(model, inputs, found), name
    assert len(tried) >= 50
