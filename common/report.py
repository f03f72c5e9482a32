"""What will be skipped, and what was: one line, JSON, a picture."""

from __future__ import annotations

from collections import Counter
from math import isfinite
from statistics import median

import numpy as np

from .files import write_json
from .planner import Target, error_by_gram, has_gram, nearest_by_the_rule, reused_share, speedup
from .schedule import Settings, rule_of


def memory_text(count):
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def settings_text(settings):
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in vars(settings).items()
        if value is not None
    )


def plan_text(schedule, levels, mag_ratios, bytes_a_branch=None):
    """The plan of a run, known before its first step."""
    lines = [
        f"MagCache plan: {schedule.steps} steps, ratios of {mag_ratios.name} ({mag_ratios.origin}), "
        f"{settings_text(schedule.settings)}",
        f"  {schedule.strip}   # computes, . reuses",
    ]
    if not mag_ratios.fits(levels):
        lines.append(f"  ratios of {mag_ratios.steps} steps carried over to the noise levels of this run")
    if mag_ratios.origin == "borrowed":
        lines.append(f"  {mag_ratios.notes}")
    if schedule.why_none:
        lines.append(f"  nothing will be reused: {schedule.why_none}")
    elif isinstance(schedule.settings, Settings):
        ceiling = schedule.fewest_computed
        lines.append(
            f"  computes {schedule.computed} of {schedule.steps}: at most {schedule.bound:.2f}x faster. No threshold "
            f"goes below {ceiling} ({schedule.steps / ceiling:.2f}x) with this magcache_K and retention_ratio"
        )
        if has_gram(mag_ratios):
            other = Target(schedule.computed).plan(mag_ratios, levels, mag_ratios.switch_step(levels))
            lines += [
                "  expected relative error of a reused residual "
                + error_text(error_by_gram(schedule, levels, mag_ratios)),
                f"    a planned run with --magcache_steps {schedule.computed}: {error_text(other.error[other.reuse])}",
            ]
    else:
        lines += target_text(schedule, levels, mag_ratios)
    if bytes_a_branch is not None and not schedule.why_none:
        lines.append(f"  extra memory: {memory_text(bytes_a_branch)} a branch")
    return "\n".join(lines)


def target_text(schedule, levels, mag_ratios):
    """What a planned run is expected to gain and to lose."""
    asked, share = schedule.settings, reused_share(mag_ratios, schedule.settings.payload)
    expected = speedup(schedule.steps, schedule.computed, share)
    lines = [f"  computes {schedule.computed} of {schedule.steps}: at most {schedule.bound:.2f}x faster"]
    if share:
        lines[0] += (
            f", {expected:.2f}x by the calibration's step times (a reused step takes {share:.1%} of a computed one)"
        )
    elif asked.payload == "residual":
        lines[0] += " (the table has no step times)"
    if asked.magcache_speedup and expected < 0.9 * asked.magcache_speedup:
        lines.append(
            f"  {asked.magcache_speedup:g}x is out of reach: magcache_K, retention_ratio and the time of a reused step "
            "allow this"
        )
    if not has_gram(mag_ratios):
        return [
            *lines,
            "  planned from magnitude ratios alone, the weaker kind: they do not show how the direction changes; "
            "--magcache_calibration measures it",
        ]
    rule = nearest_by_the_rule(
        mag_ratios, levels, rule_of(mag_ratios), schedule.computed, mag_ratios.switch_step(levels)
    )
    return [
        *lines,
        f"  expected relative error of a predicted {asked.payload} {error_text(schedule.error[schedule.reuse])}",
        f"    the paper's rule with {rule.computed} computed steps, of a residual: "
        f"{error_text(rule.error[rule.reuse])}",
    ]


def error_text(errors):
    return f"{np.mean(errors):.4f} (at most {np.max(errors):.4f})" if len(errors) else "none"


class RunReport:
    """What one run did. Seconds are those of the transformer's forward alone."""

    def __init__(self, schedule, levels):
        self.schedule, self.levels, self.calls = schedule, levels, []
        self.peak_bytes, self.complete = 0, False

    def add(self, call, kind, seconds, why=""):
        """kind: "computed" or "reused"; seconds: a function, read late; why: reason of a compute that was not
        planned."""
        self.calls.append((call.step, call.branch, kind, seconds, why))

    @property
    def computed(self):
        return sum(kind == "computed" for _, _, kind, _, _ in self.calls)

    @property
    def reused(self):
        return len(self.calls) - self.computed

    @property
    def unplanned(self):
        """{reason: calls} that should have reused a residual and computed instead."""
        return dict(Counter(why for *_, why in self.calls if why))

    def seconds(self):
        """(spent, saved): the saving is what the reused calls would have cost at the median computed call.

        The first computed call is left out of the median: it warms up and compiles.
        """
        computed, reused = self.times("computed"), self.times("reused")
        return sum(computed) + sum(reused), len(reused) * self.typical_seconds - sum(reused)

    def times(self, kind):
        return [seconds() for _, _, this, seconds, _ in self.calls if this == kind]

    @property
    def typical_seconds(self):
        """Of a computed call."""
        computed = self.times("computed")
        return median(computed[1:] or computed or [0.0])

    @property
    def speedup(self):
        """Transformer time without reuse over transformer time with it."""
        spent, saved = self.seconds()
        return (spent + saved) / spent if spent else 1.0

    def line(self):
        spent, saved = self.seconds()
        if not self.reused:
            why = self.schedule.why_none or "; ".join(self.unplanned) or "the run broke off"
            return f"MagCache reused nothing in {len(self.calls)} calls: {why}."
        text = (
            f"MagCache: {self.computed} of {len(self.calls)} model calls computed, {self.reused} reused; transformer "
            f"{spent:.2f} s, {saved:.2f} s saved ({self.speedup:.2f}x); extra memory {memory_text(self.peak_bytes)}"
        )
        for why, calls in self.unplanned.items():
            text += f"; {calls} computed unplanned ({why})"
        return text

    def to_dict(self):
        spent, saved = self.seconds()
        settings = self.schedule.settings
        return {
            "settings": vars(settings) if settings else None,
            "strip": self.schedule.strip,
            "steps": self.schedule.steps,
            "planned_computed": self.schedule.computed,
            "bound": round(self.schedule.bound, 4),
            "why_none": self.schedule.why_none,
            "complete": self.complete,
            "calls": len(self.calls),
            "computed": self.computed,
            "reused": self.reused,
            "unplanned": self.unplanned,
            "seconds": round(spent, 4),
            "seconds_saved": round(saved, 4),
            "transformer_speedup": round(self.speedup, 4),
            "extra_bytes": self.peak_bytes,
            "sigmas": [round(level, 6) for level in self.levels],
            "accumulated_error": [round(value, 6) for value in self.schedule.error.tolist()],
            "mag_ratios": None if self.schedule.ratios is None else self.schedule.ratios.round(6).tolist(),
            "by_call": [
                {"step": step, "branch": branch, "kind": kind, "seconds": round(seconds(), 5), "why": why}
                for step, branch, kind, seconds, why in self.calls
            ],
        }


def write_report(path, report, **about):
    """Save one run's report as JSON; about: further entries (prompt, seed, model, quality, ...)."""
    write_json(path, finite({**about, **report.to_dict()}))


def finite(content):
    """JSON has no infinity: the PSNR of equal pictures becomes null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not isfinite(content) else content
