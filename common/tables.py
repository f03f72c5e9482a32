"""Ratio tables, presets and calibrations: read, written, found, and interpolated to the noise levels of a run."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import MagCacheError
from .files import plain, write_json
from .peer_tables import fields_of, is_peer_table
from .ratios import Levels, flow_sigmas, nearest_interp, resample

PRESETS = Path(__file__).parent / "presets"
SETTING_NAMES = ("magcache_thresh", "magcache_K", "retention_ratio")  # the three settings of the paper's rule
FORMAT = 1  # of the files; a file without a format number has this one
REACHES_ZERO = 4  # a table ends where samplers end if its last level is at most so many of its last steps above 0
STEPS_AN_INTERVAL = (
    4  # most steps of a run between two calibrated levels; with more, residuals between them are a guess
)


def calibrations_folder() -> Path:
    """Where `magcache_calibration` keeps what it measured: $MAGCACHE_HOME, else ~/.magcache."""
    return Path(os.environ.get("MAGCACHE_HOME") or Path.home() / ".magcache")  # "": not set, rather than this folder


@dataclass(frozen=True)
class RatioTable:
    """The magnitude ratios of one checkpoint, and how they were measured.

    mag_ratios: for each branch ("cond", "uncond"), one ratio per step; the first is 1.
    sigmas: the noise level of each step, from high to low, in 0..1.
    origin: "measured" with this repository, "published" by `source`, or "borrowed" from another model's table.
    models: hub ids of the checkpoints that it is for.
    settings: documented `magcache_thresh`, `magcache_K`, `retention_ratio`.
    rule: how the release that published the settings interprets them (`schedule.Rule`); empty: as in the paper.
    sampler: what made `sigmas` (steps, shift, ...); `assumed: true` where the source does not say.
    statistics: what else a calibration measured (`calibration.Statistics.table`).
    provenance: fingerprint, versions, date. Raises MagCacheError for fields that contradict each other.
    """

    name: str
    mag_ratios: dict[str, Sequence[float]]
    sigmas: Sequence[float]
    origin: str
    source: str = ""
    notes: str = ""
    models: Sequence[str] = ()
    settings: dict = field(default_factory=dict)
    rule: dict = field(default_factory=dict)
    sampler: dict = field(default_factory=dict)
    statistics: dict = field(default_factory=dict)
    provenance: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("settings", "rule", "sampler", "statistics", "provenance"):
            if not isinstance(getattr(self, name), dict):
                raise MagCacheError(f"{self.name}: '{name}' must hold names and values; calibrate again.")
        numbers = {**self.settings, **{key: self.sampler[key] for key in ("shift", "boundary") if key in self.sampler}}
        if not all(isinstance(value, (int, float)) for value in numbers.values()):
            raise MagCacheError(f"{self.name}: settings, shift and boundary must be numbers; calibrate again.")
        if self.settings and self.settings.keys() != set(SETTING_NAMES):
            raise MagCacheError(f"{self.name}: 'settings' must be {', '.join(sorted(SETTING_NAMES))}, or none of them.")
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
    def steps(self) -> int:
        return len(self.sigmas)

    def covered(self, levels: Levels) -> np.ndarray:
        """Mask (steps,) of a run's noise levels that lie within the calibrated ones. For a table that reaches the end
        of sampling, every level down to 0 does."""
        levels, own = np.asarray(levels, dtype=float), np.asarray(self.sigmas, dtype=float)
        highest, lowest = own[0] + 2e-3, own[-1] - 2e-3
        if self.steps > 1:
            highest = own[0] + max(2e-3, (own[0] - own[1]) / 4)
            if own[-1] <= REACHES_ZERO * (own[-2] - own[-1]):
                lowest = 0.0
        return (levels <= highest) & (levels >= lowest)

    def covers(self, levels: Levels) -> bool:
        """Whether all noise levels of a run lie within the calibrated ones."""
        return bool(self.covered(levels).all())

    def fine_enough(self, levels: Levels) -> bool:
        """Whether the calibrated levels are close enough together to interpolate inner products between them: the run
        has at most STEPS_AN_INTERVAL steps between two of them. Magnitude ratios can be interpolated in any case."""
        levels = np.asarray(levels, dtype=float)
        between = (np.asarray(self.sigmas, dtype=float)[:, None] > levels[self.covered(levels)]).sum(axis=0)
        return bool(np.bincount(between, minlength=1).max(initial=0) <= STEPS_AN_INTERVAL)

    def may_replace(self, other: RatioTable) -> bool:
        """Whether nothing is lost when this table replaces another: it covers as much and is as fine."""
        return self.steps >= other.steps and self.covers(other.sigmas)

    def at(self, sigmas: Levels, interpolation: str = "sigma") -> np.ndarray:
        """The ratios (branches, steps) of a run at other noise levels.

        interpolation: "sigma" keeps the change in magnitude between any two noise levels (`resample`); "nearest"
        repeats or drops entries by index, as the released scripts do.
        """
        sigmas = np.asarray(sigmas, dtype=float)
        if interpolation == "nearest":
            rows = [nearest_interp(ratios, len(sigmas)) for ratios in self.mag_ratios.values()]
        elif self.fits(sigmas):
            rows = [np.asarray(ratios, dtype=float) for ratios in self.mag_ratios.values()]
        else:
            rows = [resample(self.within_experts(ratios), self.sigmas, sigmas) for ratios in self.mag_ratios.values()]
        return np.stack(rows)

    def within_experts(self, ratios: Sequence[float]) -> np.ndarray:
        """The ratios with 1 at the step where the second of two experts takes over: that jump is no function of the
        noise level."""
        smooth, boundary = np.array(ratios, dtype=float), self.sampler.get("boundary")
        if boundary:
            smooth[np.flatnonzero(np.asarray(self.sigmas) < boundary)[:1]] = 1
        return smooth

    def fits(self, sigmas: Levels) -> bool:
        """Whether these are the calibrated noise levels, so that nothing is interpolated."""
        return len(sigmas) == self.steps and bool(np.allclose(sigmas, self.sigmas, rtol=0, atol=2e-3))

    def switch_step(self, levels: Levels) -> int | None:
        """The step at which a second expert takes over in a run at these noise levels (None: one model)."""
        boundary = self.sampler.get("boundary")
        return int((np.asarray(levels) >= boundary).sum()) if boundary else None

    def levels(self, steps: int, shift: float | None = None) -> np.ndarray:
        """The noise levels of a run of the calibrated sampler with another number of steps or another shift."""
        shift = shift if shift is not None else self.sampler.get("shift", 1.0)
        if steps == self.steps and shift == self.sampler.get("shift", 1.0):
            return np.asarray(self.sigmas, dtype=float)
        return flow_sigmas(steps, shift)


def read(path: str | Path) -> RatioTable:
    """Load a calibration or preset file, or another program's table that says how it was measured (`peer_tables`).
    Raises MagCacheError if it is missing, malformed, inconsistent or of a newer format."""
    path = Path(path)
    content = json_content(path)
    known = RatioTable.__dataclass_fields__
    missing = [key for key in ("mag_ratios", "sigmas", "origin") if not isinstance(content, dict) or key not in content]
    if {"sigmas", "origin"} <= set(missing) and is_peer_table(content):
        content = fields_of(content, path.name)
    elif missing:
        raise MagCacheError(f"{path} is not a calibration file: it lacks {', '.join(missing)}.")
    if not isinstance(content["mag_ratios"], dict):
        raise MagCacheError(f"{path}: 'mag_ratios' must name its branches, as in {{\"cond\": [1.0, ...]}}.")
    if content.get("format", FORMAT) != FORMAT:
        raise MagCacheError(
            f"{path} has format {content['format']}, written by MagCache {content.get('magcache_version', '(newer)')}; "
            f"this is {__version__}, which reads format {FORMAT}: update it, or calibrate again."
        )
    try:
        return RatioTable(**{"name": path.stem, **{key: value for key, value in content.items() if key in known}})
    except (TypeError, ValueError) as error:
        raise MagCacheError(f"{path} is not a calibration file ({error}); calibrate again.") from None


def json_content(path: Path) -> Any:
    """The content of a JSON file. Raises MagCacheError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # Windows programs put a mark in front
    except FileNotFoundError:
        raise MagCacheError(f"There is no calibration file {path}; a calibration run makes one.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MagCacheError(f"{path} cannot be read as a calibration file ({error}); calibrate again.") from None


def import_table(path: str | Path, steps: int | None = None, shift: float | None = None, entry: str = "") -> RatioTable:
    """The table of another program (`peer_tables.fields_of`). Raises MagCacheError, which says what is missing."""
    path = Path(path)
    return RatioTable(**fields_of(json_content(path), path.name, steps, shift, entry))


def load(name_or_path: str | Path) -> RatioTable:
    """A preset by its name, or a calibration file by its path. Raises MagCacheError if there is none."""
    preset = PRESETS / f"{name_or_path}.json"
    if preset.is_file():
        return read(preset)
    if str(name_or_path).endswith(".json") or {"/", os.sep} & {*str(name_or_path)} or Path(name_or_path).is_file():
        return read(name_or_path)
    raise MagCacheError(
        f"There is no preset '{name_or_path}'; the presets are {', '.join(preset_names())}, "
        "and a calibration file is named by its path."
    )


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def write(path: str | Path, table: RatioTable) -> None:
    """Save as JSON, whole or not at all, in the place of whatever is there; `save_calibration` looks first."""
    content = {key: value for key, value in plain(asdict(table)).items() if value not in ("", [], {})}
    write_json(path, {**content, "format": FORMAT, "magcache_version": __version__})


def save_calibration(path: str | Path, table: RatioTable) -> Path:
    """Save what a run measured; returns the path. An existing table that covers more noise levels or is finer, and a
    file
    that is no table, are kept: the new one is saved beside it, under a name that says what it covers and that `find`
    also knows."""
    path = Path(path)
    beside = f"{path.stem}-{table.steps}-steps-from-{table.sigmas[0]:.3f}-to-{table.sigmas[-1]:.3f}"
    names = (f"{beside}{f'-{count}' * (count > 1)}{path.suffix}" for count in itertools.count(1))
    while path.exists() and not replaceable(path, table):
        path = path.with_name(next(names))
    write(path, table)
    return path


def replaceable(path: Path, table: RatioTable) -> bool:
    """Whether this table may be written over an existing file."""
    try:
        return table.may_replace(read(path))
    except MagCacheError:
        return False


def calibrations(pattern: str = "*.json", complain: Callable[[str], object] = print) -> dict[Path, RatioTable]:
    """The calibrations of this machine whose file name matches the pattern. `complain` is told of each that cannot be
    read."""
    found = {}
    for path in sorted(calibrations_folder().glob(pattern)):
        try:
            found[path] = read(path)
        except MagCacheError as error:
            complain(str(error))
    return found


def best(tables: Iterable[RatioTable], levels: Levels | None = None) -> RatioTable | None:
    """The table that suits a run best among several of one checkpoint: first by how many of the run's noise levels it
    covers, then whether it was measured at these very levels, then the finest, then the newest. levels: None where they
    are not known yet."""

    def merit(table: RatioTable) -> tuple:
        date = table.provenance.get("date", "")
        if levels is None:
            return table.sigmas[0] - table.sigmas[-1], table.steps, date
        return int(table.covered(levels).sum()), table.fits(levels), table.steps, date

    return max(tables, key=merit, default=None)


def find(model: str | Path, fingerprint: str | None = None, levels: Levels | None = None) -> RatioTable | None:
    """The table of a checkpoint: its own calibration, found by the fingerprint of its weights, or the preset of that
    name. None if there is neither: another model's table is never used silently.

    model: hub id or folder; levels: noise levels of the run, where they are known.
    """
    own = calibrations(f"*-{fingerprint}*.json").values() if fingerprint else ()
    return best(own, levels) or published(model, fingerprint)


def published(model: str | Path, fingerprint: str | None = None) -> RatioTable | None:
    """The preset of a checkpoint, by the fingerprint of its weights or by its name; None if there is none."""
    for name in preset_names():
        preset = read(PRESETS / f"{name}.json")
        if fingerprint and preset.provenance.get("fingerprint") == fingerprint:
            return preset
        if any(is_checkpoint(model, known) for known in preset.models):
            return preset
    return None


def is_checkpoint(model: str | Path, hub_id: str) -> bool:
    """Whether a hub id, a local folder or a snapshot in the hub's cache is the checkpoint `owner/name`."""
    path = Path(str(model))
    return (
        str(model) == hub_id
        or f"models--{hub_id.replace('/', '--')}" in path.parts
        or (path.is_dir() and path.name == hub_id.split("/")[-1])
    )
