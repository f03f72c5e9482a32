"""MagCache for a diffusers pipeline in one call:

    with magcache.enable(pipe, speedup=2.5) as cache:
        image = pipe("a photo of a black bicycle").images[0]
    print(cache.report)

Each call of the pipeline gets its own plan, from its scheduler. For a speed-up the model's output is predicted, which
works for any class. The paper's rule (thresh, K, retention_ratio) reuses the residual of the blocks, which takes facts
about the class: `hosts/` has them, or `discover.py` finds them. If a calibration is needed, the first run makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from .calibration import fingerprint
from .denoisers import Denoisers, checkpoint_of, denoisers, refuse_other_caches
from .discover import PatchAfterDiscovery
from .errors import MagCacheError
from .expert import patches_of
from .handle import Patch
from .loop import LoopEnd
from .pipeline_patches import caching_patch, calibration_patch
from .planner import Target
from .report import RunReport
from .schedule import Settings
from .tables import SETTING_NAMES, find, published

DEFAULT_SPEEDUP = 2.0


def enable(
    pipe: Any,
    speedup: float | None = None,
    steps: int | None = None,
    max_error: float | None = None,
    thresh: float | None = None,
    K: int | None = None,
    retention_ratio: float | None = None,
    calibrate: bool | None = None,
    announce: Callable[[str], None] | None = tqdm.write,
    measure: tuple[float, float] | None = None,
) -> PipelineCache:
    """Let a diffusers pipeline skip model calls, until `disable(pipe)` or the end of a `with` block.

    Give one of: speedup (default 2.0); steps, the number of computed steps; max_error, the largest expected relative
    error of a predicted step (needs a calibration); or settings of the paper's rule, thresh, K and retention_ratio
    (needs magnitude ratios, published or calibrated; settings left out are those published for this checkpoint).

    calibrate: None: if ratios or a calibration are needed and missing, the first complete run measures them. That run
        computes every step, so its result is un-cached, and the calibration is saved for later runs in any process.
        False: raise MagCacheError instead. True: only measure; each complete run is saved.
    announce: gets the plan as text at the start of each run (None: no output).
    measure: in which the computed steps of a speed-up are spread (`planner.Target`).
    Raises MagCacheError, in one sentence, for settings or pipelines that cannot work.
    """
    pipe = getattr(pipe, "decoder_pipe", pipe)  # of a combined pipeline, the one that draws
    groups = denoisers(pipe)
    for model in (model for group in groups for model in group.models):
        refuse_other_caches(model)
    asked = (speedup, steps, max_error, thresh, K, retention_ratio)
    if calibrate and any(value is not None for value in asked):
        raise MagCacheError(
            "calibrate=True computes everything: ask for a speed-up or the rule in the `enable` after it."
        )
    if calibrate:
        return PipelineCache(pipe, [calibration_patch(pipe, group, announce) for group in groups])
    target, rule = target_and_rule(*asked)
    handles: list[Patch | PatchAfterDiscovery] = []
    try:
        for group in groups:
            weights = fingerprint(group.models[0])
            settings: Target | Settings = (
                Target(**target, **rule, payload="output", measure=measure)
                if target
                else paper_rule(rule, pipe, group, weights)
            )
            handles.append(caching_patch(pipe, group, weights, settings, announce, calibrate is None))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return PipelineCache(pipe, handles)


def target_and_rule(
    speedup: float | None,
    steps: int | None,
    max_error: float | None,
    thresh: float | None,
    K: int | None,
    retention_ratio: float | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(keywords of `Target`, keywords of `Settings`) of the arguments that are not None; without the first, the paper's
    rule is meant. Raises MagCacheError if both a target and a threshold are given."""
    target = {"magcache_speedup": speedup, "magcache_steps": steps, "magcache_max_error": max_error}
    rule = dict(zip(SETTING_NAMES, (thresh, K, retention_ratio)))
    target = {name: value for name, value in target.items() if value is not None}
    rule = {name: value for name, value in rule.items() if value is not None}
    if target and "magcache_thresh" in rule:
        raise MagCacheError(
            "Ask for speedup, steps or max_error, or for the paper's rule by thresh, K, retention_ratio."
        )
    return target if target or rule else {"magcache_speedup": DEFAULT_SPEEDUP}, rule


def disable(pipe: Any) -> None:
    """Undo `enable`. Raises MagCacheError if MagCache is not enabled on the pipeline."""
    pipe = getattr(pipe, "decoder_pipe", pipe)
    every = (patch for group in denoisers(pipe) for model in group.models for patch in patches_of(model))
    own = {id(patch): patch for patch in every if patch.owner in (None, pipe)}
    if not own:
        raise MagCacheError(f"MagCache is not enabled on this {type(pipe).__name__}.")
    for patch in own.values():
        patch.remove()
    if isinstance(vars(pipe).get("progress_bar"), LoopEnd):
        pipe.progress_bar.take_off()


class PipelineCache:
    """MagCache on a pipeline, as `enable` returns it. handles: of its denoisers."""

    def __init__(self, pipe: Any, handles: list[Patch | PatchAfterDiscovery]) -> None:
        self.pipe, self.handles = pipe, handles
        self.loop = LoopEnd(pipe, handles)

    def __enter__(self) -> PipelineCache:
        for handle in self.handles:
            handle.__enter__()
        self.loop.take_off()
        self.loop = LoopEnd(self.pipe, self.handles)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.loop.take_off()
        for handle in self.handles:
            handle.__exit__(kind, error, trace)

    def disable(self) -> None:
        """Undo `enable`."""
        self.loop.take_off()
        for handle in self.handles:
            handle.remove()

    @property
    def reports(self) -> list[RunReport]:
        """The report of each run, denoiser by denoiser, the newest last."""
        return [report for handle in self.handles for report in handle.reports]

    @property
    def report(self) -> str:
        """The newest run in one line for each denoiser."""
        for handle in self.handles:
            handle.settle()
        return "\n".join(handle.reports[-1].line() for handle in self.handles if handle.reports) or "No run yet."


def paper_rule(given: dict[str, Any], pipe: Any, group: Denoisers, weights: str) -> Settings:
    """The paper's rule with the given settings, and otherwise the published ones. weights: fingerprint of the model.
    Raises MagCacheError if a setting is neither given nor published."""
    checkpoint = checkpoint_of(pipe, group)
    tables = (find(checkpoint, weights), published(checkpoint, weights))
    chosen = {**next((table.settings for table in tables if table and table.settings), {}), **given}
    missing = [name for name in SETTING_NAMES if name not in chosen]
    if missing:
        name = type(group.models[0]).__name__
        raise MagCacheError(f"This {name} has no published settings; give {', '.join(missing)} too.")
    return Settings(**chosen)
