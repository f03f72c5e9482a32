"""The plan of a run as lines of text: what is printed before its first step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .gram import error_by_gram, has_gram
from .planner import Target, nearest_by_the_rule, reused_share, speedup
from .schedule import Schedule, Settings, rule_of
from .tables import RatioTable

COMPARED_STEPS = 60  # up to so many, working out the other way to plan takes no time worth noticing


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
