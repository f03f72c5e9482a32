"""Ratio tables: presets and calibrations, read, written, found, and taken to the noise levels of a run."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .errors import MagCacheError
from .files import write_json
from .ratios import flow_sigmas, nearest_interp, resample

PRESETS = Path(__file__).parent / "presets"
SETTINGS = {"magcache_thresh", "magcache_K", "retention_ratio"}


def calibrations_folder():
    """Where `magcache_calibration` keeps what it measured: $MAGCACHE_HOME, else ~/.magcache."""
    return Path(os.environ.get("MAGCACHE_HOME", Path.home() / ".magcache"))


@dataclass(frozen=True)
class RatioTable:
    """The magnitude ratios of one checkpoint and the circumstances in which they were taken.

    mag_ratios: for each branch ("cond", "uncond"), one ratio a step; the first is 1.
    sigmas: the noise level of each step, from high to low, in 0..1.
    origin: "measured" with this repository, "published" by `source`, or "borrowed": really another model's table.
    settings: documented `magcache_thresh`, `magcache_K`, `retention_ratio`.
    rule: how the release that published the settings reads them (`schedule.Rule`); empty: as in the paper.
    sampler: what made `sigmas` (steps, shift, ...); `assumed: true` where the source does not state it.
    """

    name: str
    mag_ratios: dict
    sigmas: tuple
    origin: str
    source: str = ""
    notes: str = ""
    models: tuple = ()
    settings: dict = field(default_factory=dict)
    rule: dict = field(default_factory=dict)
    sampler: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def __post_init__(self):
        for name in ("settings", "rule", "sampler", "statistics", "provenance"):
            if not isinstance(getattr(self, name), dict):
                raise MagCacheError(f"{self.name}: '{name}' must hold names and values; calibrate again.")
        numbers = {**self.settings, **{key: self.sampler[key] for key in ("shift", "boundary") if key in self.sampler}}
        if not all(isinstance(value, (int, float)) for value in numbers.values()):
            raise MagCacheError(f"{self.name}: settings, shift and boundary must be numbers; calibrate again.")
        if self.settings and self.settings.keys() != SETTINGS:
            raise MagCacheError(f"{self.name}: 'settings' must be {', '.join(sorted(SETTINGS))}, or none of them.")
        steps = len(self.sigmas)
        levels = np.asarray(self.sigmas, dtype=float)
        if not steps or not (levels.min() >= 0 and levels.max() <= 1):
            raise MagCacheError(f"{self.name}: 'sigmas' must be noise levels between 0 and 1, one a step.")
        if not self.mag_ratios:
            raise MagCacheError(f"{self.name}: 'mag_ratios' has no branch; calibrate again.")
        for branch, ratios in self.mag_ratios.items():
            values = np.asarray(ratios, dtype=float)
            if len(values) != steps:
                raise MagCacheError(
                    f"{self.name}: branch '{branch}' has {len(values)} ratios for {steps} noise levels; "
                    "each step needs one of each."
                )
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise MagCacheError(f"{self.name}: branch '{branch}' has ratios that are not positive numbers.")
        if not (np.diff(levels) <= 0).all():
            raise MagCacheError(f"{self.name}: 'sigmas' must go from high to low noise.")

    @property
    def steps(self):
        return len(self.sigmas)

    def at(self, sigmas, interpolation="sigma"):
        """The ratios of a run at other noise levels: array (branches, len(sigmas)).

        interpolation: "sigma" keeps the magnitude's change between any two noise levels (`resample`);
        "nearest" repeats or drops entries by index, as the released scripts do.
        """
        sigmas = np.asarray(sigmas, dtype=float)
        if interpolation == "nearest":
            rows = [nearest_interp(ratios, len(sigmas)) for ratios in self.mag_ratios.values()]
        elif self.fits(sigmas):
            rows = [np.asarray(ratios, dtype=float) for ratios in self.mag_ratios.values()]
        else:
            rows = [resample(self.within_experts(ratios), self.sigmas, sigmas) for ratios in self.mag_ratios.values()]
        return np.stack(rows)

    def within_experts(self, ratios):
        """The ratios with 1 at the step where the second of two experts takes over: that jump belongs to no noise
        level."""
        ratios, boundary = np.array(ratios, dtype=float), self.sampler.get("boundary")
        if boundary:
            ratios[np.flatnonzero(np.asarray(self.sigmas) < boundary)[:1]] = 1
        return ratios

    def fits(self, sigmas):
        """Whether a run at these noise levels is the one that was calibrated, so that no interpolation is needed."""
        return len(sigmas) == self.steps and bool(np.allclose(sigmas, self.sigmas, rtol=0, atol=2e-3))

    def switch_step(self, levels):
        """The step at which a second expert takes over in a run at these noise levels; None: one model."""
        boundary = self.sampler.get("boundary")
        return int((np.asarray(levels) >= boundary).sum()) if boundary else None

    def levels(self, steps, shift=None):
        """The noise levels of a run with other steps or shift by the sampler of the calibration."""
        shift = shift if shift is not None else self.sampler.get("shift", 1.0)
        if steps == self.steps and shift == self.sampler.get("shift", 1.0):
            return np.asarray(self.sigmas, dtype=float)
        return flow_sigmas(steps, shift)


def read(path):
    """Load a calibration or preset file. Raises MagCacheError when it is missing, malformed or inconsistent."""
    path = Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise MagCacheError(f"There is no calibration file {path}; a calibration run makes one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MagCacheError(f"{path} cannot be read as a calibration file ({error}); calibrate again.") from None
    known = RatioTable.__dataclass_fields__
    missing = [key for key in ("mag_ratios", "sigmas", "origin") if not isinstance(content, dict) or key not in content]
    if missing:
        raise MagCacheError(f"{path} is not a calibration file: it lacks {', '.join(missing)}.")
    if not isinstance(content["mag_ratios"], dict):
        raise MagCacheError(f"{path}: 'mag_ratios' must name its branches, as in {{\"cond\": [1.0, ...]}}.")
    try:
        return RatioTable(**{"name": path.stem, **{key: value for key, value in content.items() if key in known}})
    except (TypeError, ValueError) as error:
        raise MagCacheError(f"{path} is not a calibration file ({error}); calibrate again.") from None


def load(name_or_path):
    """A preset by its name (`python -m common presets` lists them) or a calibration file by its path."""
    preset = PRESETS / f"{name_or_path}.json"
    if preset.is_file():
        return read(preset)
    if str(name_or_path).endswith(".json") or os.sep in str(name_or_path):
        return read(name_or_path)
    raise MagCacheError(
        f"There is no preset '{name_or_path}'; the presets are {', '.join(preset_names())}, "
        "and a calibration file is named by its path."
    )


def preset_names():
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def write(path, ratios):
    """Save as JSON: written beside the target and renamed, so that an interruption leaves the old file."""
    write_json(path, {key: value for key, value in asdict(ratios).items() if value not in ("", (), {}, [])})


def find(model, fingerprint=None):
    """The table of a checkpoint: its own calibration, found by the fingerprint of its weights, else the preset of that
    name.

    model: hub id or folder. Returns None when there is neither: no other model's table is ever lent silently.
    """
    own = sorted(calibrations_folder().glob(f"*-{fingerprint}.json")) if fingerprint else []
    if own:
        return read(own[-1])
    for name in preset_names():
        preset = read(PRESETS / f"{name}.json")
        if fingerprint and preset.provenance.get("fingerprint") == fingerprint:
            return preset
        if any(is_checkpoint(model, known) for known in preset.models):
            return preset
    return None


def is_checkpoint(model, hub_id):
    """Whether a hub id or local folder is the checkpoint `owner/name`, also as a snapshot in the hub's cache."""
    path = Path(str(model))
    return (
        str(model) == hub_id
        or f"models--{hub_id.replace('/', '--')}" in path.parts
        or (path.is_dir() and path.name == hub_id.split("/")[-1])
    )
