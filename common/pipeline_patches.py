"""The patches that `pipeline.enable` puts on the denoisers of a diffusers pipeline.

weights, here and below: the fingerprint of a denoiser's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .blocks import Host
from .calibration import fingerprint
from .clock import Clock
from .conditioning import adapters_of
from .denoisers import Denoisers, checkpoint_of
from .discover import PatchAfterDiscovery
from .errors import MagCacheError
from .expert import argument_names, inner_module
from .first_run import MeasuredFirst
from .gram import has_gram
from .handle import Patch
from .hosts import HOSTS, class_name, output_host
from .patch import magcache_calibration, magcache_forward
from .planner import Target
from .ranks import broadcast_from_writer, in_a_group, is_writer, shared_by_processes
from .ratios import Levels
from .schedule import Settings
from .tables import RatioTable, calibrations_folder, find


def caching_patch(
    pipe: Any,
    group: Denoisers,
    weights: str,
    settings: Settings | Target,
    announce: Callable[[str], None] | None,
    may_measure: bool,
) -> Patch | PatchAfterDiscovery:
    """`magcache_forward` on the denoiser of a pipeline; or `MeasuredFirst`, if a table is needed and may be
    measured."""
    clock, checkpoint = Clock(pipe, group.models), checkpoint_of(pipe, group)
    refuse_others = only_these_weights(group)

    def known(levels: Levels | None = None) -> RatioTable | None:
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

    return described(pipe, group, "residual" if measures else settings.payload, patch)


def unknown(name: str, rule: bool) -> str:
    """The sentence for a model without the table that is needed. rule: whether it is for the paper's rule."""
    needs = "The paper's rule needs magnitude ratios" if rule else "max_error needs a calibration"
    return (
        f"{needs}, and {'none are' if rule else 'none is'} known of this {name}: measure them with "
        "enable(pipe, calibrate=True) around one run, or ask for a speedup, which needs none."
    )


def calibration_patch(
    pipe: Any, group: Denoisers, announce: Callable[[str], None] | None
) -> Patch | PatchAfterDiscovery:
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
    """Raises MagCacheError if only the model's output can be predicted. host: None if its facts are yet to be found."""
    if host is not None and not host.blocks:
        raise MagCacheError(
            f"For {type(group.models[0]).__name__} only the output can be predicted, because {host.why_output}: "
            "there is nothing to calibrate, and a speedup needs no calibration."
        )


def only_these_weights(group: Denoisers) -> Callable[[], None]:
    """A function that raises MagCacheError if the adapters on the models are no longer those of now."""
    before = [adapters_of(model) for model in group.models]

    def refuse():
        if [adapters_of(model) for model in group.models] != before:
            raise MagCacheError(
                "A LoRA was loaded, scaled or taken off since MagCache was enabled, so what was measured is not of the "
                "weights that were there then; enable it again to calibrate these."
            )

    return refuse


def calibration_file(pipe: Any, group: Denoisers, weights: str) -> Path:
    """Where `find` looks for a calibration of these weights."""
    name = Path(checkpoint_of(pipe, group)).name or type(group.models[0]).__name__
    return calibrations_folder() / f"{name}-{weights}.json"


def calibration_of(pipe: Any, group: Denoisers, weights: str, host: Host) -> tuple[str, Path, dict[str, Any]]:
    """(name, path, description) of the table to be measured. Raises MagCacheError if there is nothing to measure."""
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


def described(pipe: Any, group: Denoisers, payload: str, patch: Callable[[Host], Patch]) -> Patch | PatchAfterDiscovery:
    """A patch with the facts of the denoiser's class. If the payload needs facts of a class that nobody described, they
    are looked for in its first call."""
    model = inner_module(group.models[0])
    host = HOSTS.get(class_name(model))
    if payload == "output":
        return patch(host or output_host(type(model).__name__, argument_names(model)))
    return PatchAfterDiscovery(model, patch, pipe) if host is None else patch(host)
