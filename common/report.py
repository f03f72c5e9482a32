"""What will be skipped, and what was: one line, JSON, a picture."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import __version__
from .files import write_json
from .gram import error_by_gram, has_gram
from .planner import Target, nearest_by_the_rule, reused_share, speedup
from .ratios import Levels
from .schedule import Schedule, Settings, rule_of
from .steps import Call
from .tables import RatioTable
from .timing import Lap, saved_seconds, typical_seconds

FORMAT = 1  # of the JSON
COMPARED_STEPS = 60  # the other way to plan is worked out only where that takes no time worth noticing


def memory_text(count: float) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def settings_text(settings: Settings | Target) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in vars(settings).items()
        if value is not None
    )


class PlanLine(NamedTuple):
    """One line of a plan. kind: what it tells, by which a front end chooses; text: the line.

    kinds: "asked" (steps, table, settings), "strip" (a letter a step), "resampled" (ratios converted),
    "uncovered" (steps beyond the table), "notes" (of a borrowed table; why not planned as asked), "nothing" (why
    nothing will be reused), "gain" (computed steps and speed-up), "out of reach" (the speed-up asked for), "error"
    (expected), "other error" (of the other way to plan as many computed steps), "corrector" (whether skipped steps
    are corrected), "memory".
    """

    kind: str
    text: str


def plan_text(
    schedule: Schedule,
    levels: np.ndarray,
    table: RatioTable | None,
    bytes_a_branch: int | None = None,
    why_uncorrected: str | None = None,
) -> str:
    """The plan of a run as text, known before its first step."""
    return "\n".join(line.text for line in plan_lines(schedule, levels, table, bytes_a_branch, why_uncorrected))


def plan_lines(
    schedule: Schedule,
    levels: np.ndarray,
    table: RatioTable | None,
    bytes_a_branch: int | None = None,
    why_uncorrected: str | None = None,
) -> list[PlanLine]:
    """The plan of a run. levels: its noise levels; table: the `RatioTable` that it was made from (None: from none);
    bytes_a_branch: what one residual of a branch takes (None: not known); why_uncorrected: why skipped steps are not
    corrected ("": they are; None: not known)."""
    of_table = "no calibration needed" if table is None else f"ratios of {table.name} ({table.origin})"
    lines = [
        PlanLine(
            "asked",
            f"MagCache plan: {schedule.steps} steps, {of_table}, {settings_text(schedule.settings)}",
        ),
        PlanLine("strip", f"  {schedule.strip}   # computes, . reuses"),
    ]
    if table is not None and not table.fits(levels):
        lines.append(
            PlanLine("resampled", f"  ratios of {table.steps} steps converted to the noise levels of this run")
        )
    if schedule.predictor != "line" and table is not None and not table.covers(levels):
        count = int((~table.covered(levels)).sum())
        lines.append(
            PlanLine(
                "uncovered",
                f"  {count} of the steps compute because they lie beyond the noise levels of this table "
                f"({table.sigmas[0]:.3f} to {table.sigmas[-1]:.3f})",
            )
        )
    if table is not None and table.origin == "borrowed":
        lines.append(PlanLine("notes", f"  {table.notes}"))
    if schedule.why_changed:
        lines.append(PlanLine("notes", f"  {schedule.why_changed}"))
    if schedule.why_none:
        lines.append(PlanLine("nothing", f"  nothing will be reused: {schedule.why_none}"))
    elif schedule.accumulated_error is not None:
        lines += rule_lines(schedule, levels, table)
    elif schedule.expected_error is not None and table is not None:
        lines += target_lines(schedule, schedule.expected_error, levels, table)
    else:
        lines.append(gain_line(schedule))
    if why_uncorrected is not None and not schedule.why_none:
        by = " with the calibration's weights" if schedule.gram is not None else ""
        on = f"on: skipped steps are corrected{by} when the next one is computed"
        lines.append(
            PlanLine("corrector", f"  corrector {f'off, because {why_uncorrected}' if why_uncorrected else on}")
        )
    if bytes_a_branch is not None and not schedule.why_none:
        lines.append(PlanLine("memory", f"  extra memory: {memory_text(bytes_a_branch)} per branch"))
    return lines


def rule_lines(schedule: Schedule, levels: np.ndarray, table: RatioTable | None) -> list[PlanLine]:
    """What the paper's rule is expected to gain and to lose."""
    ceiling = schedule.fewest_computed
    lines = [
        PlanLine(
            "gain",
            f"  computes {schedule.computed} of {schedule.steps}: at most {schedule.bound:.2f}x faster. No threshold "
            f"goes below {ceiling} ({schedule.steps / ceiling:.2f}x) with this magcache_K and retention_ratio",
        )
    ]
    if table is not None and has_gram(table) and table.fine_enough(levels):
        errors = error_by_gram(schedule, levels, table)
        lines.append(PlanLine("error", f"  expected relative error of a reused residual {error_text(errors)}"))
        if schedule.steps <= COMPARED_STEPS:
            target = Target(schedule.computed, predictor="linear", payload="residual")
            other = target.plan(table, levels, table.switch_step(levels))
            if other.expected_error is not None:
                text = f"    a planned run with magcache_steps {schedule.computed}: "
                lines.append(PlanLine("other error", text + error_text(other.expected_error[other.reuse])))
    return lines


def gain_line(schedule: Schedule, more: str = "") -> PlanLine:
    """How many steps compute, and what that allows."""
    text = f"  computes {schedule.computed} of {schedule.steps}: at most {schedule.bound:.2f}x faster{more}"
    return PlanLine("gain", text)


def target_lines(
    schedule: Schedule, expected_error: np.ndarray, levels: np.ndarray, table: RatioTable
) -> list[PlanLine]:
    """What a planned run is expected to gain and to lose."""
    asked = schedule.settings
    share = reused_share(table, asked.payload)
    expected = speedup(schedule.steps, schedule.computed, share)
    more = ""
    if share:
        more = f", {expected:.2f}x by the calibration's step times (a reused step takes {share:.1%} of a computed one)"
    elif asked.payload == "residual":
        more = " (the table has no step times)"
    lines = [gain_line(schedule, more)]
    if asked.magcache_speedup and expected < 0.9 * asked.magcache_speedup:
        lines.append(
            PlanLine(
                "out of reach",
                f"  {asked.magcache_speedup:g}x is out of reach: magcache_K, retention_ratio and the time of a reused "
                "step allow no more",
            )
        )
    error = error_text(expected_error[schedule.reuse])
    lines.append(PlanLine("error", f"  expected relative error of a predicted {asked.payload} {error}"))
    if schedule.steps <= COMPARED_STEPS:
        rule = nearest_by_the_rule(table, levels, rule_of(table), schedule.computed, table.switch_step(levels))
        lines.append(
            PlanLine(
                "other error",
                f"    the paper's rule with {rule.computed} computed steps, for a residual: "
                f"{error_text(np.asarray(rule.expected_error)[rule.reuse])}",
            )
        )
    return lines


def error_text(errors: np.ndarray) -> str:
    return f"{np.mean(errors):.4f} (at most {np.max(errors):.4f})" if len(errors) else "none"


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
