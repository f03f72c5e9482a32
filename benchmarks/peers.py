"""Rows of other projects' caches for benchmarks/quality.py: diffusers' hooks and cache-dit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from subject import Row, Subject
from tqdm import tqdm

from common.planner import nearest_by_the_rule
from common.schedule import Rule
from common.tables import RatioTable

LEAST, MOST, HALVINGS = 1e-3, 4.0, 8  # of thresholds; the last ones tried are 3 % apart


def diffusers_rows(
    subject: Subject, table: RatioTable, steps: int, counts: list[int], recall: Callable, wanted: Callable[[str], bool]
) -> Iterator[Row]:
    """Rows of diffusers' own hooks. recall(key, search): the threshold of an earlier search, or a new one;
    wanted(family): whether these rows are asked for."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    transformer = subject.pipe.transformer

    def hooks(config):
        @contextmanager
        def on():
            transformer.enable_cache(config)
            try:
                yield
            finally:
                transformer.disable_cache()

        return on

    ratios = torch.tensor(table.mag_ratios["cond"])

    def by_the_rule(number):
        found = nearest_by_the_rule(table, np.asarray(table.sigmas), Rule(), number).settings
        return found, hooks(
            MagCacheConfig(found.magcache_thresh, found.magcache_K, found.retention_ratio, steps, ratios)
        )

    for count in counts if wanted("diffusers MagCache") else ():
        # The hook computes as many steps as the rule at the same settings, or one more.
        number = recall(
            f"number of steps of diffusers MagCache for {count}",
            lambda count=count: nearest(subject, steps, count, (count, count - 1), lambda one: by_the_rule(one)[1]),
        )
        settings, cache = by_the_rule(number)
        yield Row("diffusers MagCache", thresholds_text(settings), cache, steps, 1)

    def rows(family, config_of):
        for count in counts if wanted(family) else ():
            threshold = recall(
                f"threshold of {family} for {count}",
                lambda count=count: searched(subject, steps, count, lambda number: hooks(config_of(number, count))),
            )
            config = config_of(threshold, count)
            yield Row(family, f"threshold {threshold:.3g}", hooks(config), steps, 1)

    yield from rows("diffusers FirstBlockCache", lambda threshold, _: FirstBlockCacheConfig(threshold))
    if "Wan" in type(transformer).__name__:
        from diffusers import SeaCacheConfig

        for order in (0, 1):

            def config_of(threshold, count, order=order):
                # At most two skipped steps in a row are its default; a quarter of the steps needs more.
                in_a_row = 2 if 3 * count > steps else 4
                return SeaCacheConfig(threshold=threshold, residual_order=order, max_consecutive_cached=in_a_row)

            yield from rows("diffusers SeaCache" + ", first order" * order, config_of)
    # Its own patterns of names hook nothing in Wan; elsewhere they are kept.
    parts = [r"blocks\.\d+\.(attn1|attn2|ffn)"] if "Wan" in type(transformer).__name__ else None
    for interval in (2, 3, 5):
        config = TaylorSeerCacheConfig(interval, disable_cache_before_step=3, max_order=1, cache_identifiers=parts)
        yield Row("diffusers TaylorSeer", f"interval {interval}", hooks(config), steps, 1)


def cache_dit_rows(
    subject: Subject, table: RatioTable, steps: int, counts: list[int], recall: Callable, wanted: Callable[[str], bool]
) -> Iterator[Row]:
    """Rows of cache-dit. Measure them last, because cache-dit changes the pipeline for good."""
    try:
        source = f"cache-dit {version('cache-dit')}"
        import cache_dit
    except (ImportError, PackageNotFoundError):
        print("cache-dit is not installed (pip install cache-dit==1.5.3): its rows are left out.", file=sys.stderr)
        return

    def cached(threshold, options):
        @contextmanager
        def on():
            cache_dit.enable_cache(
                subject.pipe,
                cache_config=cache_dit.DBCacheConfig(
                    Fn_compute_blocks=1,
                    Bn_compute_blocks=0,
                    max_warmup_steps=max(1, steps // 10),
                    residual_diff_threshold=threshold,
                    num_inference_steps=steps,
                    enable_separate_cfg=subject.branches > 1,
                ),
                **options,
            )
            try:
                yield
            finally:
                cache_dit.disable_cache(subject.pipe)

        return on

    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)
    for family, options in (
        ("cache-dit DBCache", {}),
        ("cache-dit DBCache, TaylorSeer", {"calibrator_config": taylor}),
    ):
        for count in counts if wanted(family) else ():
            threshold = recall(
                f"threshold of {family} for {count}, {source}",
                lambda count=count, options=options: searched(
                    subject, steps, count, lambda number: cached(number, options)
                ),
            )
            yield Row(family, f"threshold {threshold:.3g}", cached(threshold, options), steps, 1, source)


def searched(subject: Subject, steps: int, count: int, cached: Callable) -> float:
    """The threshold whose number of computed steps on the trial jobs is nearest to `count`, by bisection of its
    logarithm."""
    known, low, high = {}, LEAST, MOST
    for _ in tqdm(range(HALVINGS), desc=f"searching a threshold for {count} steps", leave=False):
        middle = (low * high) ** 0.5
        known[middle] = computed_a_picture(subject, steps, cached(middle))
        low, high = (middle, high) if known[middle] > count else (low, middle)
    return min(known, key=lambda threshold: abs(known[threshold] - count))


def nearest(subject: Subject, steps: int, count: int, candidates: Iterable, cached: Callable):
    """The candidate whose number of computed steps on the trial jobs is nearest to `count`."""
    return min(candidates, key=lambda one: abs(computed_a_picture(subject, steps, cached(one)) - count))


def computed_a_picture(subject: Subject, steps: int, cache: Callable) -> float:
    """Computed steps per image of the trial jobs."""
    with cache():
        return subject.calls(subject.trial_jobs, steps) / subject.branches


def thresholds_text(settings) -> str:
    return f"{settings.magcache_thresh:g} / {settings.magcache_K} / {settings.retention_ratio:g}"
