"""Ratio tables in the forms in which other programs keep them:

* a list of numbers, one per step or with both branches in turn (the release, diffusers, ComfyUI, Kandinsky-5);
* a list for each branch (LightX2V);
* a dictionary that holds one of these beside its settings (diffusers' MagCacheConfig, LightX2V, TeleFuser,
Kandinsky-5); * several tables in one dictionary (FramePack-Studio), of which one entry is named.

Most do not say which sampler a table was measured with. Its steps and shift must then be given, and the noise levels
computed from them are marked as assumed.
"""

from __future__ import annotations

import re
from typing import Any

from .errors import MagCacheError
from .ratios import flow_sigmas

# Names that other programs have for the same thing.
RATIOS = ("mag_ratios", "magcache_ratios", "norm_ratio", "ratios")
BRANCHES = {"cond": "cond_mag_ratios", "uncond": "uncond_mag_ratios"}
STEPS = ("num_inference_steps", "infer_steps", "num_steps", "sample_steps", "steps", "calibrated_steps")
SHIFT = ("sigma_shift", "sample_shift", "flow_shift", "scheduler_scale", "shift")
SETTINGS = {
    "magcache_thresh": ("magcache_thresh", "threshold", "thresh"),
    "magcache_K": ("magcache_K", "max_skip_steps", "K"),
    "retention_ratio": ("magcache_retention_ratio", "retention_ratio"),
}


def is_peer_table(content: Any) -> bool:
    """Whether parsed JSON holds ratios in one of the forms above."""
    return is_list(content) or is_pair(content) or bool(inner_table(content) or entries(content))


def fields_of(
    content: Any, name: str, steps: int | None = None, shift: float | None = None, entry: str = ""
) -> dict[str, Any]:
    """The fields of a `RatioTable`.

    content: parsed JSON; name: of the file, for the table and for messages; steps, shift: of the sampler, where the
    file does not say; entry: which of several tables, as in "512/25". Raises MagCacheError, which says what is missing.
    """
    for key in entry.split("/") if entry else ():
        if not isinstance(content, dict) or key not in content:
            known = ", ".join(content) if isinstance(content, dict) else "none"
            raise MagCacheError(f"{name} has no entry {key}; there are {known}.")
        content = content[key]
    about = content if isinstance(content, dict) else {}
    if not (is_list(content) or is_pair(content) or inner_table(content)):
        names = entries(content)
        raise MagCacheError(
            f"{name} holds several tables: name one of {', '.join(names[:6])}{' ...' if names[6:] else ''}."
            if names
            else f"{name} holds no magnitude ratios in a form that is known here."
        )
    steps = steps if steps is not None else first_of(about, STEPS)
    shift = shift if shift is not None else first_of(about, SHIFT)
    branches = branches_of(inner_table(content) or content, steps, name)
    count = len(next(iter(branches.values())))
    if shift is None:
        raise MagCacheError(
            f"{name} has ratios of {count} steps, but not the shift of their sampler: give it, as in "
            f"`magcache import {name} --shift 3`."
        )
    settings = {ours: first_of(about, theirs) for ours, theirs in SETTINGS.items()}
    return {
        "name": name.rsplit(".", 1)[0] + (f"-{re.sub('[^-.0-9A-Za-z_]', '-', entry)}" if entry else ""),
        "mag_ratios": branches,
        "sigmas": flow_sigmas(count, float(shift)).round(6).tolist(),
        "origin": "published",
        "source": name,
        "settings": settings if usable(settings) else {},
        "sampler": {"steps": count, "shift": float(shift), "assumed": True},
    }


def is_json_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_list(content: Any) -> bool:
    return isinstance(content, list) and len(content) > 1 and all(map(is_json_number, content))


def is_pair(content: Any) -> bool:
    return isinstance(content, list) and len(content) in (1, 2) and all(map(is_list, content))


def inner_table(content: Any) -> Any:
    """The list, or the list for each branch, that a dictionary holds; None if it holds none."""
    if not isinstance(content, dict):
        return None
    if is_list(content.get(BRANCHES["cond"])):
        return [content[key] for key in BRANCHES.values() if is_list(content.get(key))]
    return next((content[key] for key in RATIOS if is_list(content.get(key)) or is_pair(content.get(key))), None)


def entries(content: Any, path: str = "") -> list[str]:
    """The names of all tables in a dictionary of dictionaries."""
    if not isinstance(content, dict):
        return []
    found = []
    for key, value in content.items():
        if is_list(value) or is_pair(value) or inner_table(value):
            found.append(f"{path}{key}")
        else:
            found += entries(value, f"{path}{key}/")
    return found


def first_of(about: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((about[name] for name in names if is_json_number(about.get(name))), None)


def usable(settings: dict[str, Any]) -> bool:
    """Whether all three settings are there and mean something: TeleFuser writes zeros, to be filled in."""
    return all(value is not None for value in settings.values()) and settings["magcache_K"] > 0


def branches_of(ratios: list, steps: int | None, name: str) -> dict[str, list[float]]:
    """{branch: one ratio per step, the first 1}. steps: None where the file does not say; the length of a branch's own
    list does."""
    if is_pair(ratios):
        rows = ratios
        steps = steps if steps is not None else len(rows[0]) + (rows[0][0] != 1)
    elif steps is None:
        raise MagCacheError(
            f"{name} is a list of {len(ratios)} ratios, of one branch or of two in turn: give the number of steps, as "
            f"in `magcache import {name} --steps {len(ratios)} --shift 3`."
        )
    elif len(ratios) in (2 * steps, 2 * steps - 2):
        rows = [ratios[0::2], ratios[1::2]]
    else:
        rows = [ratios]
    if len(rows) == 2 and len(rows[0]) != len(rows[1]):
        raise MagCacheError(
            f"{name} has {len(rows[0])} and {len(rows[1])} ratios for its branches; they must be equal."
        )
    if len(rows[0]) not in (steps, steps - 1):
        raise MagCacheError(f"{name} has {len(rows[0])} ratios a branch, which do not fit {steps} steps.")
    rows = [[1.0] * (steps - len(row)) + list(map(float, row)) for row in rows]
    # Kandinsky's models without guidance keep a 0 where a second branch would be.
    rows = [row for row in rows if any(row[1:])]
    return dict(zip(BRANCHES, rows))
