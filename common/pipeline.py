"""MagCache for a diffusers pipeline in one call:

    with magcache.enable(pipe, speedup=2.5) as cache:
        image = pipe("a photo of a black bicycle").images[0]
    print(cache.report)

Which steps compute is planned anew for each call of the pipeline, from its own scheduler. What is predicted is the
output of the model, which needs no facts of its class; under the paper's rule (thresh, K, retention_ratio) the residual
of its blocks, whose facts `hosts/` has or `discover.py` finds. What needs a calibration gets it in the first run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .blocks import Host
from .calibration import fingerprint
from .clock import Clock
from .conditioning import adapters_of
from .denoisers import Denoisers, checkpoint_of, denoisers, refuse_other_caches
from .discover import PatchAfterDiscovery
from .errors import MagCacheError
from .expert import argument_names, inner_module, patches_of
from .first_run import MeasuredFirst
from .gram import has_gram
from .handle import Patch
from .hosts import HOSTS, class_name, output_host
from .loop import LoopEnd
from .patch import magcache_calibration, magcache_forward
from .planner import Target
from .ranks import broadcast_from_writer, in_a_group, is_writer, shared_by_processes
from .report import RunReport
from .schedule import Settings
from .tables import SETTING_NAMES, calibrations_folder, find, published

DEFAULT_SPEEDUP = 2.0


def enable(
    pipe,
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
    """Let a diffusers pipeline skip model calls from now on, until `disable(pipe)` or the end of a `with` block.

    Ask for one thing: speedup (2.0 where nothing is asked for); steps, how many are computed; max_error, the largest
    expected relative error of a predicted step (needs a calibration); or the paper's rule by thresh, K and
    retention_ratio, those left out as published for this checkpoint (needs magnitude ratios, published or calibrated).
    calibrate: None: where something is needed that nobody measured, the first complete run does. It computes
        everything, its result is the un-cached one, and what it measured is saved for the runs after it, in any
        process. False: refuse instead. True: measure, and cache nothing; each complete run is saved.
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
    handles: list[Patch | PatchAfterDiscovery] = []
    try:
        for group in groups:
            weights = fingerprint(group.models[0])
            if targets or not rule:
                targets = targets or {"magcache_speedup": DEFAULT_SPEEDUP}
                settings: Target | Settings = Target(**targets, **rule, payload="output", measure=measure)
            else:
                settings = paper_rule(rule, pipe, group, weights)
            handles.append(caching_patch(pipe, group, weights, settings, announce, calibrate is None))
    except BaseException:
        for handle in handles:
            handle.remove()
        raise
    return PipelineCache(pipe, handles)


def disable(pipe) -> None:
    """Let the pipeline run as it did before `enable`."""
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
    """MagCache on a pipeline. reports: one `RunReport` for each run of each denoiser, the newest last."""

    def __init__(self, pipe, handles: list[Patch | PatchAfterDiscovery]) -> None:
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


def paper_rule(given: dict, pipe, group: Denoisers, weights: str) -> Settings:
    """The paper's rule, the settings that were left out as published."""
    checkpoint = checkpoint_of(pipe, group)
    tables = (find(checkpoint, weights), published(checkpoint, weights))
    chosen = {**next((table.settings for table in tables if table and table.settings), {}), **given}
    missing = [name for name in SETTING_NAMES if name not in chosen]
    if missing:
        name = type(group.models[0]).__name__
        raise MagCacheError(f"This {name} has no published settings; give {', '.join(missing)} too.")
    return Settings(**chosen)


def caching_patch(
    pipe, group: Denoisers, weights: str, settings: Settings | Target, announce, may_measure: bool
) -> Patch | PatchAfterDiscovery:
    """`magcache_forward` on the denoiser of a pipeline, or `MeasuredFirst` where a table is needed and may be measured.
    weights: their fingerprint."""
    clock, checkpoint = Clock(pipe, group.models), checkpoint_of(pipe, group)
    refuse_others = only_these_weights(group)

    def known(levels=None):
        table = find(checkpoint, weights, levels)
        return table if not settings.needs_gram or (table and has_gram(table)) else None

    needed = settings.needs_table
    together = needed and shared_by_processes(group.models)
    table = broadcast_from_writer(known) if together else known()
    measures = needed and may_measure and (together or not in_a_group())
    if needed and not measures and table is None:
        refuse_if_unmeasurable(group, HOSTS.get(class_name(inner_module(group.models[0]))))
        raise MagCacheError(unknown(type(group.models[0]).__name__, not settings.needs_gram))

    def patch(host):
        options: dict[str, Any] = {
            "announce": announce,
            "boundary": group.boundary,
            "scheduler": clock.scheduler if group.leads else None,
            "owner": pipe,
        }
        facts, timesteps = clock.host(host), clock.timesteps
        if measures and (table is None or host.blocks):
            name, path, description = calibration_of(pipe, group, weights, host)
            handle: Any = MeasuredFirst(
                group.models,
                facts,
                timesteps,
                (lambda levels: table) if together else known,
                settings,
                name,
                None if together and not is_writer() else path,
                description,
                **options,
            )
            handle.refuse_other_weights = refuse_others
        else:
            handle = magcache_forward(group.models, facts, table, settings, timesteps, **options)
        handle.guidance = clock.guidance
        return handle

    return described(pipe, group, "residual" if measures else settings.payload or "residual", patch)


def unknown(name: str, rule: bool) -> str:
    """A sentence for a model without the table that is needed."""
    needs = "The paper's rule needs magnitude ratios" if rule else "max_error needs a calibration"
    return (
        f"{needs}, and {'none are' if rule else 'none is'} known of this {name}: measure them with "
        "enable(pipe, calibrate=True) around one run, or ask for a speedup, which needs none."
    )


def calibration_patch(pipe, group: Denoisers, announce) -> Patch | PatchAfterDiscovery:
    """`magcache_calibration` on the denoiser of a pipeline."""
    clock, weights = Clock(pipe, group.models), fingerprint(group.models[0])
    refuse_others = only_these_weights(group)
    if announce:
        announce(f"MagCache: calibrating; complete runs are saved to {calibration_file(pipe, group, weights)}")

    def patch(host):
        name, path, description = calibration_of(pipe, group, weights, host)
        facts = clock.host(host)
        handle = magcache_calibration(group.models, facts, clock.timesteps, name, path, description, owner=pipe)
        handle.refuse_other_weights = refuse_others
        return handle

    return described(pipe, group, "residual", patch)


def refuse_if_unmeasurable(group: Denoisers, host: Host | None) -> None:
    """host: None where the facts are yet to be found."""
    if host is not None and not host.blocks:
        raise MagCacheError(
            f"Of {type(group.models[0]).__name__} only the output can be predicted, because {host.why_output}: "
            "there is nothing to calibrate, and a speedup needs no calibration."
        )


def only_these_weights(group: Denoisers) -> Callable[[], None]:
    """A function that raises MagCacheError once the adapters on the models are others than now."""
    before = [adapters_of(model) for model in group.models]

    def refuse():
        if [adapters_of(model) for model in group.models] != before:
            raise MagCacheError(
                "A LoRA was loaded, scaled or taken off since MagCache was enabled, so what was measured is not of the "
                "weights that were there then; enable it again to calibrate these."
            )

    return refuse


def calibration_file(pipe, group: Denoisers, weights: str) -> Path:
    """Where `find` looks for a calibration of these weights."""
    name = Path(checkpoint_of(pipe, group)).name or type(group.models[0]).__name__
    return calibrations_folder() / f"{name}-{weights}.json"


def calibration_of(pipe, group: Denoisers, weights: str, host: Host) -> tuple[str, Path, dict[str, Any]]:
    """(name, path, description) of what is to be measured. Raises MagCacheError where there is nothing to measure."""
    refuse_if_unmeasurable(group, host)
    path = calibration_file(pipe, group, weights)
    description: dict[str, Any] = {
        "provenance": {
            "checkpoint": checkpoint_of(pipe, group),
            "fingerprint": weights,
            "pipeline": type(pipe).__name__,
        }
    }
    if group.boundary is not None:
        description["sampler"] = {"boundary": group.boundary}
    return path.stem.removesuffix(f"-{weights}"), path, description


def described(pipe, group: Denoisers, payload: str, patch: Callable[[Host], Patch]) -> Patch | PatchAfterDiscovery:
    """A patch with the facts of the denoiser's class. Those of a class that nobody described are looked for at its
    first call, where the blocks matter."""
    model = inner_module(group.models[0])
    host = HOSTS.get(class_name(model))
    if payload == "output":
        return patch(host or output_host(type(model).__name__, argument_names(model)))
    return PatchAfterDiscovery(model, patch, pipe) if host is None else patch(host)
