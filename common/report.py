"""The report of a run: which calls it computed and reused, as one line and as JSON."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .files import write_json
from .plan_text import memory_text
from .ratios import Levels
from .schedule import Schedule
from .steps import Call
from .timing import Lap, saved_seconds, typical_seconds

FORMAT = 1  # of the JSON


def rounded(values: np.ndarray | None) -> list | None:
    return None if values is None else np.round(values, 6).tolist()


class RunReport:
    """What one run did. Seconds are those of the transformer's forward alone."""

    def __init__(self, schedule: Schedule, levels: Levels) -> None:
        self.schedule, self.levels = schedule, levels
        self.calls: list[tuple[int, int, str, Lap, str]] = []
        self.peak_bytes, self.complete = 0, False
        self.verified = False  # residuals, put back on their own inputs, made the same output
        self.notes: list[str] = []  # what a user should know of this run beside the figures
        self.measuring = ""  # what to say of a run that was measured so that the next one can be cached

    def add(self, call: Call, kind: str, lap: Lap, why: str = "") -> None:
        """kind: "computed" or "reused"; lap: its seconds, read late; why: reason of a compute that was not planned."""
        self.calls.append((call.step, call.branch, kind, lap, why))

    @property
    def computed(self) -> int:
        return sum(kind == "computed" for _, _, kind, _, _ in self.calls)

    @property
    def reused(self) -> int:
        return len(self.calls) - self.computed

    @property
    def unplanned(self) -> dict[str, int]:
        """{reason: calls} that should have reused a residual and computed instead."""
        return dict(Counter(why for *_, why in self.calls if why))

    def seconds(self) -> tuple[float, float]:
        """(spent, saved): `timing.saved_seconds`."""
        computed, reused = self.laps("computed"), self.laps("reused")
        return sum(lap() for lap in computed + reused), saved_seconds(computed, reused)[0]

    def laps(self, kind: str) -> list[Lap]:
        return [lap for _, _, this, lap, _ in self.calls if this == kind]

    @property
    def typical_seconds(self) -> float:
        """Of a computed call."""
        usual = typical_seconds(computed := self.laps("computed"))
        return min((lap() for lap in computed), default=0.0) if usual is None else usual

    @property
    def speedup(self) -> float:
        """Transformer time without reuse over transformer time with it."""
        spent, saved = self.seconds()
        return (spent + saved) / spent if spent else 1.0

    def line(self) -> str:
        if self.measuring:
            return f"MagCache measuring: {self.measuring}."
        spent, saved = self.seconds()
        if not self.reused:
            why = self.schedule.why_none or "; ".join(self.unplanned) or "the run was interrupted"
            return f"MagCache reused nothing in {len(self.calls)} calls: {why}."
        text = (
            f"MagCache: {self.computed} of {len(self.calls)} model calls computed, {self.reused} reused; transformer "
            f"{spent:.2f} s, {max(saved, 0.0):.2f} s saved ({max(self.speedup, 1.0):.2f}x); extra memory "
            f"{memory_text(self.peak_bytes)}"
        )
        _, why_none = saved_seconds(self.laps("computed"), self.laps("reused"))
        if why_none:
            text += f"; no time was saved: {why_none}"
        if self.verified:
            text += "; facts verified on this model"
        for why, calls in self.unplanned.items():
            text += f"; {calls} computed unplanned ({why})"
        return text

    def to_dict(self) -> dict[str, Any]:
        spent, saved = self.seconds()
        return {
            "format": FORMAT,
            "magcache_version": __version__,
            "settings": vars(self.schedule.settings),
            "strip": self.schedule.strip,
            "steps": self.schedule.steps,
            "planned_computed": self.schedule.computed,
            "bound": round(self.schedule.bound, 4),
            "why_none": self.schedule.why_none,
            "measuring": self.measuring,
            "complete": self.complete,
            "facts_verified": self.verified,
            "notes": self.notes,
            "calls": len(self.calls),
            "computed": self.computed,
            "reused": self.reused,
            "unplanned": self.unplanned,
            "seconds": round(spent, 4),
            "seconds_saved": round(saved, 4),
            "transformer_speedup": round(self.speedup, 4),
            "extra_bytes": self.peak_bytes,
            "sigmas": [round(level, 6) for level in self.levels],
            "accumulated_error": rounded(self.schedule.accumulated_error),
            "expected_error": rounded(self.schedule.expected_error),
            "mag_ratios": rounded(self.schedule.ratios),
            "by_call": [
                {"step": step, "branch": branch, "kind": kind, "seconds": round(lap(), 5), "why": why}
                for step, branch, kind, lap, why in self.calls
            ],
        }


def write_report(path: str | Path, report: RunReport, **about: Any) -> None:
    """Save one run's report as JSON; about: further entries (prompt, seed, model, quality, ...)."""
    write_json(path, finite({**about, **report.to_dict()}))


def finite(content: Any) -> Any:
    """JSON has no infinity: the PSNR of equal pictures becomes null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not isfinite(content) else content
