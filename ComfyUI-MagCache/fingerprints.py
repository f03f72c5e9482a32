"""Which weights a model has, including its LoRAs, and the calibrations measured of them."""

from __future__ import annotations

import time
from pathlib import Path
from weakref import WeakKeyDictionary

import comfyui_version
import numpy as np
import torch

from .circumstances import Circumstances
from .common import tables
from .common.calibration import Statistics, fingerprint_of
from .common.errors import MagCacheError
from .common.tables import RatioTable, calibrations_folder
from .models import published_table

PLAIN = WeakKeyDictionary()  # model: fingerprint of the weights as they were loaded, read once


def own_table(patcher, model: torch.nn.Module, levels: np.ndarray) -> tuple[RatioTable | None, str]:
    """(this machine's calibration of a model that suits a run at these noise levels best: one with its LoRAs, otherwise
    one without them, otherwise None; what to tell the user of it)."""
    if not any(calibrations_folder().glob("*.json")):
        return None, ""
    try:
        plain, patched = fingerprints(patcher, model)
    except MagCacheError as error:
        return None, f"MagCache looks for no calibration: {error}"
    table = tables.find("", patched, levels)
    if table is None and plain != patched:
        table = tables.find("", plain, levels)
        if table is not None:
            return table, f"MagCache: {table.name} was measured without the LoRAs of this model."
    return table, ""


def save_measured(about: Circumstances, statistics: Statistics) -> tuple[RatioTable, Path]:
    """(the table of a measured run, the file that it was saved to, which `own_table` finds)."""
    model_type, _ = about.recognised
    _, patched = fingerprints(about.patcher, about.model)
    name = f"{model_type or type(about.model).__name__.lower()}-{patched}"
    published = published_table(model_type, len(about.levels))
    table = statistics.table(
        name,
        settings=published.settings if published else {},
        sampler={"guidance_scale": about.cfg},
        provenance={
            "fingerprint": patched,
            "host": f"ComfyUI {comfyui_version.__version__}",
            "model": about.signs.file_name,
            "latent": list(about.latent),
            "weight_patches": len(about.patcher.patches),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    return table, tables.save_calibration(calibrations_folder() / f"{name}.json", table)


def fingerprints(patcher, model: torch.nn.Module) -> tuple[str, str]:
    """Fingerprints of the weights as loaded from the file: without and with the LoRAs on them. Raises MagCacheError if
    an adapter's tensors cannot be read."""
    if model not in PLAIN:
        PLAIN[model] = fingerprint_of(loaded_weights(patcher, model))
    added = [*weight_patches(patcher), *injected(patcher)]
    return PLAIN[model], fingerprint_of([(PLAIN[model], torch.zeros(1)), *added]) if added else PLAIN[model]


def loaded_weights(patcher, model):
    """(name, tensor) of every weight, before a LoRA was added to it in place."""
    backup = getattr(patcher, "backup", {})
    for name, weight in model.named_parameters():
        kept = backup.get(f"diffusion_model.{name}")
        yield name, weight if kept is None else kept.weight


def weight_patches(patcher):
    """(name, tensor) of the tensors that weights are patched with."""
    for name, patches in patcher.patches.items():
        for index, (strength, patch, *_) in enumerate(patches):
            for number, tensor in enumerate(tensors_in(patch)):
                yield f"{name}[{index}] * {strength}.{number}", tensor


def injected(patcher):
    """(name, tensor) of adapters that are run beside the weights (Load LoRA (Bypass))."""
    for key, injections in getattr(patcher, "injections", {}).items():
        for injection in injections:
            adapters = next(
                (
                    cell.cell_contents.adapters
                    for cell in getattr(injection.inject, "__closure__", None) or ()
                    if hasattr(cell.cell_contents, "adapters")
                ),
                None,
            )
            if adapters is None:
                raise MagCacheError(f"what {key} adds to this model cannot be read.")
            for name, (adapter, strength) in adapters.items():
                for number, tensor in enumerate(tensors_in(adapter)):
                    yield f"{key}.{name} * {strength}.{number}", tensor


def tensors_in(patch):
    """The tensors of one weight patch, whatever the kind of adapter."""
    if torch.is_tensor(patch):
        return [patch]
    parts = getattr(patch, "weights", patch)
    return [tensor for part in parts for tensor in tensors_in(part)] if isinstance(parts, (tuple, list)) else []
