"""cache-dit itself beside MagCache on one pipeline, in either order: refused with a sentence, and neither leaves the
other's model broken."""

from __future__ import annotations

import logging
import multiprocessing
import sys

import pytest
import torch
from packages import unpacked_package
from tiny_pipelines import FAMILIES, run_pipeline

from common.errors import MagCacheError
from common.pipeline import enable

SHA256 = "f4564e68b5f6206d25712b06b4d9e0321ef96aadcd00e0ed4645be92d3fd9e75"


def in_a_process_of_its_own(work, *arguments):
    """cache-dit changes classes of diffusers, which other tests use. Forked: all else is imported already."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0


def both_orders(package, family, home):
    sys.path.insert(0, str(package))
    import cache_dit

    logging.disable(logging.WARNING)
    pipe, arguments = FAMILIES[family]()
    plain = run_pipeline(pipe, arguments(1))

    def enable_cache_dit():
        config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.5)
        cache_dit.enable_cache(pipe, cache_config=config)

    enable_cache_dit()
    theirs = run_pipeline(pipe, arguments(1))
    assert not torch.equal(theirs, plain)
    with pytest.raises(MagCacheError, match=r"cache-dit is on in .* call cache_dit.disable_cache\(pipe\) first"):
        enable(pipe, speedup=2, announce=None)
    assert torch.equal(run_pipeline(pipe, arguments(1)), theirs), "what was refused has changed nothing"
    cache_dit.disable_cache(pipe)

    with enable(pipe, speedup=2, announce=None) as cache:
        ours = run_pipeline(pipe, arguments(1))
        enable_cache_dit()
        with pytest.raises(MagCacheError, match=r"call cache_dit.disable_cache\(pipe\) first"):
            run_pipeline(pipe, arguments(1))
        cache_dit.disable_cache(pipe)
        assert torch.equal(run_pipeline(pipe, arguments(1)), ours) and cache.reports[-1].reused
    assert torch.equal(run_pipeline(pipe, arguments(1)), plain)

    cache = enable(pipe, speedup=2, announce=None)
    enable_cache_dit()
    cache.disable()
    assert torch.equal(run_pipeline(pipe, arguments(1)), theirs)
    cache_dit.disable_cache(pipe)
    assert torch.equal(run_pipeline(pipe, arguments(1)), plain)


@pytest.mark.robustness(
    "When nothing would be cached",
    "cache-dit on the same model, before or after",
    "refused: call `cache_dit.disable_cache(pipe)` first; then either works",
)
@pytest.mark.parametrize("family", ["flux", "qwen_image", "wan22"])
def test_cache_dit_beside_magcache(family, tmp_path, monkeypatch):
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path))
    package = unpacked_package("cache-dit", "1.5.3", SHA256)
    in_a_process_of_its_own(both_orders, package, family, tmp_path)
