"""MagCache for a diffusers pipeline in one call:

    with magcache.enable(pipe, speedup=2.5) as cache:
        image = pipe("a photo of a black bicycle").images[0]
    print(cache.report)

Which steps compute is planned anew for each call of the pipeline, from its own scheduler. What is predicted is the
output of the model, which needs no facts of its class; under the paper's rule (thresh, K, retention_ratio) the residual
of its blocks, whose facts `hosts/` has or `discover.py` finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from .blocks import Host
from .calibration import fingerprint
from .clock import Clock
from .discover import Undescribed
from .errors import MagCacheError
from .expert import argument_names, inner_module, patch_of
from .handle import Patch
from .hosts import HOSTS, class_name, output_host
from .loop import LoopEnd
from .patch import magcache_calibration, magcache_forward
from .planner import Target
from .report import RunReport
from .schedule import Settings
from .tables import RatioTable, calibrations_folder, find

DEFAULT_SPEEDUP = 2.0
DENOISERS = ("transformer", "unet", "decoder", "prior")  # where a pipeline keeps its denoiser, the first that is there


def enable(
    pipe,
    speedup: float | None = None,
    steps: int | None = None,
    max_error: float | None = None,
    thresh: float | None = None,
    K: int | None = None,
    retention_ratio: float | None = None,
    calibrate: bool = False,
    announce: Callable[[str], None] | None = tqdm.write,
    measure: tuple[float, float] | None = None,
) -> PipelineCache:
    """Let a diffusers pipeline skip model calls from now on, until `disable(pipe)` or the end of a `with` block.

    Ask for one thing: speedup (2.0 where nothing is asked for); steps, how many are computed; max_error, the largest
    expected relative error of a predicted step (needs a calibration); or the paper's rule by thresh, K and
    retention_ratio, those left out as published for this checkpoint (needs magnitude ratios, published or calibrated).
    calibrate: measure instead. Everything computes, results are the un-cached ones, each complete run is saved, and any
        `enable` after it finds the file. Only max_error, and the paper's rule where no ratios are published, need it;
        nothing is measured unasked.
    announce: gets the plan as text at the start of each run; None: nobody.
    measure: in which the computed steps of a speed-up are spread (`planner.Target`).
    Raises MagCacheError for what cannot work, in one sentence.
    """
    pipe = getattr(pipe, "decoder_pipe", pipe)  # of two pipelines in one, the one that draws
    groups = denoisers(pipe)
    for model in (model for group in groups for model in group.models):
        refuse_other_caches(model)
    asked = (speedup, steps, max_error, thresh, K, retention_ratio)
    if calibrate and any(one is not None for one in asked):
        raise MagCacheError(
            "calibrate=True computes everything: ask for a speed-up or the rule in the `enable` after it."
        )
    if calibrate:
        return PipelineCache(pipe, [calibration_patch(pipe, group, announce) for group in groups])
    rule: dict[str, Any] = {"magcache_thresh": thresh, "magcache_K": K, "retention_ratio": retention_ratio}
    targets: dict[str, Any] = {"magcache_speedup": speedup, "magcache_steps": steps, "magcache_max_error": max_error}
    targets = {name: value for name, value in targets.items() if value is not None}
    rule = {name: value for name, value in rule.items() if value is not None}
    if targets and "magcache_thresh" in rule:
        raise MagCacheError(
            "Ask for speedup, steps or max_error, or for the paper's rule by thresh, K, retention_ratio."
        )
    handles: list[Patch | Undescribed] = []
    try:
        for group in groups:
            table = find(checkpoint_of(pipe, group), fingerprint(group.models[0]))
            if targets or not rule:
                settings: Target | Settings = Target(
                    **targets or {"magcache_speedup": DEFAULT_SPEEDUP}, **rule, payload="output", measure=measure
                )
            else:
                settings = paper_rule(rule, table, type(group.models[0]).__name__)
            handles.append(caching_patch(pipe, group, table, settings, announce))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return PipelineCache(pipe, handles)


def disable(pipe) -> None:
    """Let the pipeline run as it did before `enable`."""
    pipe = getattr(pipe, "decoder_pipe", pipe)
    patches = {id(patch): patch for group in denoisers(pipe) for model in group.models if (patch := patch_of(model))}
    if not patches:
        raise MagCacheError(f"MagCache is not enabled on this {type(pipe).__name__}.")
    for patch in patches.values():
        patch.remove()
    if isinstance(vars(pipe).get("progress_bar"), LoopEnd):
        pipe.progress_bar.take_off()


class PipelineCache:
    """MagCache on a pipeline. reports: one `RunReport` for each run of each denoiser, the newest last."""

    def __init__(self, pipe, handles: list[Patch | Undescribed]) -> None:
        self.pipe, self.handles = pipe, handles
        self.loop = LoopEnd(pipe, handles)

    def __enter__(self) -> PipelineCache:
        for handle in self.handles:
            handle.__enter__()
        self.loop = LoopEnd(self.pipe, self.handles)
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.loop.take_off()
        for handle in self.handles:
            handle.__exit__(kind, error, trace)

    def disable(self) -> None:
        """Let the pipeline run as it did before."""
        self.loop.take_off()
        for handle in self.handles:
            handle.remove()

    @property
    def reports(self) -> list[RunReport]:
        return [report for handle in self.handles for report in handle.reports]

    @property
    def report(self) -> str:
        """What the newest run did, a line for each denoiser."""
        for handle in self.handles:
            handle.settle()
        return "\n".join(handle.reports[-1].line() for handle in self.handles if handle.reports) or "No run yet."


@dataclass(frozen=True)
class Denoisers:
    """The models among which a sampler divides its steps, most often one. attribute: of the pipeline; boundary: noise
    level below which the second works."""

    attribute: str
    models: list[torch.nn.Module]
    boundary: float | None = None
    leads: bool = True  # of two groups, the one with which the scheduler's steps are made again


def denoisers(pipe) -> list[Denoisers]:
    """What MagCache patches in a pipeline. Two groups where each step calls two models (one without the prompt).
    Raises MagCacheError for a pipeline that has none, or no scheduler."""
    attribute = next((name for name in DENOISERS if isinstance(getattr(pipe, name, None), torch.nn.Module)), None)
    if attribute is None or not hasattr(getattr(pipe, "scheduler", None), "timesteps"):
        raise MagCacheError(f"{type(pipe).__name__} has no transformer or U-Net with a scheduler that could be cached.")
    model, second = getattr(pipe, attribute), getattr(pipe, "transformer_2", None)
    boundary = pipe.config.get("boundary_ratio")
    if second is not None and boundary is not None:
        return [Denoisers(attribute, [model, second], boundary)]
    other = getattr(pipe, "unconditional_transformer", None)  # Ideogram 4
    others = [] if other is None else [Denoisers("unconditional_transformer", [other], leads=False)]
    return [Denoisers(attribute, [model]), *others]


def checkpoint_of(pipe, group: Denoisers) -> str:
    """Hub id or folder."""
    return str(pipe.config.get("_name_or_path") or getattr(group.models[0].config, "_name_or_path", ""))


def paper_rule(given: dict, table: RatioTable | None, name: str) -> Settings:
    """The paper's rule, the settings that were left out as published."""
    if table is None:
        raise MagCacheError(
            f"The paper's rule needs magnitude ratios, and none are known of this {name}: measure them with "
            "enable(pipe, calibrate=True) around one run, or ask for a speedup, which needs none."
        )
    chosen = {**table.settings, **given}
    missing = [name for name in ("magcache_thresh", "magcache_K", "retention_ratio") if name not in chosen]
    if missing:
        raise MagCacheError(f"{table.name} has no published settings; give {', '.join(missing)} too.")
    return Settings(**chosen)


def refuse_other_caches(model: torch.nn.Module) -> None:
    """Raises MagCacheError if another step cache works on this model."""
    name = type(model).__name__
    if getattr(model, "is_cache_enabled", False):
        raise MagCacheError(f"This {name} has a cache of diffusers enabled: call its disable_cache() first.")
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    hooks = [hook for registry in registries if registry is not None for hook in registry.hooks.values()]
    if any(type(hook).__module__.endswith("_cache") for hook in hooks):
        raise MagCacheError(f"This {name} has hooks of another cache on its blocks: remove them first.")


def caching_patch(pipe, group: Denoisers, table, settings: Settings | Target, announce) -> Patch | Undescribed:
    """`magcache_forward` on the denoiser of a pipeline."""
    clock = Clock(pipe, group.models)

    def patch(host):
        handle = magcache_forward(
            group.models,
            clock.host(host),
            table,
            settings,
            clock.timesteps,
            announce=announce,
            boundary=group.boundary,
            scheduler=clock.scheduler if group.leads else None,
        )
        handle.guidance = clock.guidance
        return handle

    return described(group, settings.payload or "residual", patch)


def calibration_patch(pipe, group: Denoisers, announce) -> Patch | Undescribed:
    """`magcache_calibration` on the denoiser of a pipeline."""
    clock, checkpoint, known = Clock(pipe, group.models), checkpoint_of(pipe, group), fingerprint(group.models[0])
    name = checkpoint.rstrip("/").rpartition("/")[2] or type(group.models[0]).__name__
    path = calibrations_folder() / f"{name}-{known}.json"
    description: dict[str, Any] = {
        "provenance": {"checkpoint": checkpoint, "fingerprint": known, "pipeline": type(pipe).__name__}
    }
    if group.boundary is not None:
        description["sampler"] = {"boundary": group.boundary}
    if announce:
        announce(f"MagCache: calibrating; complete runs are saved to {path}")

    def patch(host):
        if not host.blocks:
            raise MagCacheError(
                f"Of {type(group.models[0]).__name__} only the output can be predicted, because {host.why_output}: "
                "there is nothing to calibrate, and a speedup needs no calibration."
            )
        return magcache_calibration(group.models, clock.host(host), clock.timesteps, name, path, description)

    return described(group, "residual", patch)


def described(group: Denoisers, payload: str, patch: Callable[[Host], Patch]) -> Patch | Undescribed:
    """A patch with the facts of the denoiser's class. Those of a class that nobody described are looked for at its
    first call, where the blocks matter."""
    model = inner_module(group.models[0])
    host = HOSTS.get(class_name(model))
    if payload == "output":
        return patch(host or output_host(type(model).__name__, argument_names(model)))
    return Undescribed(model, patch) if host is None else patch(host)
