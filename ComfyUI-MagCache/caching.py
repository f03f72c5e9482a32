"""What a MagCache node plans for a run: by the thresholds of the paper's rule, or for a speed-up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from .circumstances import Circumstances
from .common.blocks import Host
from .common.corrector import Folded
from .common.errors import MagCacheError
from .common.hosts import HOSTS, class_name, host_of
from .common.plan_text import plan_text
from .common.planner import Target
from .common.residuals import Residuals
from .common.schedule import Rule, Schedule, Settings, compute_all, rule_of
from .common.tables import RatioTable, load
from .fingerprints import own_table, save_measured
from .models import NOT_POSSIBLE, published_table, require_class
from .page import picture
from .passes import BoundedRun, FirstRun, Pass
from .wrappers import NodePatch

SPEEDUP = 2.0  # of a model for which no settings were published
LIMIT = 4.0  # GiB of residuals in one run: those of Wan 14B at 720p, both branches and two steps, are 3.0
UNPUBLISHED = {"magcache_thresh": 0.06, "magcache_K": 2, "retention_ratio": 0.2}  # what thresholds are filled up with
MEASURING = "measuring; next queue is faster"


class FoundTable(NamedTuple):
    """The ratios for a run. table: those to use, or None; published: those of the model type, or None; notes: what to
    tell the user of the choice."""

    table: RatioTable | None
    published: RatioTable | None
    notes: list[str]


class NodeCache(NodePatch):
    """The wrappers of a MagCache node: they cache with its settings."""

    def __init__(
        self,
        say,
        model_type: str = "auto",
        thresholds: dict | None = None,
        start_step: int = 0,
        end_step: int = -1,
        speedup: float = 0.0,
        device: torch.device | None = None,
        mag_ratios: str = "",
        corrector: bool = True,
        limit: float = LIMIT,
        measure: str = "auto",
    ):
        """Raises MagCacheError for settings that cannot be, before anything is rendered.

        thresholds: {name: value} of the settings that were given; the others are the recommended ones.
        start_step, end_step: first and last step that may be reused; negative ones count from the end.
        speedup: plan for it, within magcache_K and retention_ratio if given (0: what is recommended).
        device: where residuals are kept (None: the model's).
        mag_ratios: preset or file (empty: those found for the model).
        corrector: correct skipped steps of Euler's method when the next one is computed.
        limit: GiB that a run may keep; a step whose residual would exceed it computes.
        measure: whether the first run of a model without ratios is measured: "on", "off", or "auto", which means if
            settings of the paper's rule are given.
        """
        super().__init__(say)
        self.measure, self.unmeasured = measure, ""  # why the model cannot be measured
        self.limit = int(limit * 2**30)
        self.corrector = corrector
        self.model_type, self.thresholds, self.window = model_type, dict(thresholds or {}), (start_step, end_step)
        self.speedup, self.device, self.table = speedup, device, named_table(mag_ratios) if mag_ratios else None
        Settings(**{**UNPUBLISHED, **self.thresholds})  # bad ones are refused here, before anything is rendered
        if speedup:
            Target(magcache_speedup=speedup)
            if self.window != (0, -1):
                raise MagCacheError(
                    "start_step and end_step belong to the thresholds: leave them at 0 and -1 with speedup."
                )

    def begin(self, about: Circumstances) -> Pass:
        name = type(about.model).__name__
        if name in NOT_POSSIBLE:
            raise MagCacheError(f"{name} {NOT_POSSIBLE[name]}.")
        if about.rises:
            raise MagCacheError("its noise levels rise (unsampling), and skipping is planned for falling ones.")
        found = self.found(about)
        if self.to_be_measured(about, found):
            try:
                return self.first_run(about, found)
            except MagCacheError as error:
                self.unmeasured = str(error)
        schedule, table, notes = self.plan(about, found)
        payload = schedule.settings.payload if schedule.reuse.any() else "output"
        follower = euler_follower(about, schedule, self.corrector) if schedule.reuse.any() else None
        made = Pass(about, BoundedRun(about, schedule, Residuals(self.device), follower, self.limit), payload)
        made.run.fall_back = lambda run, told: self.fall_back(made, told)
        self.show(about, schedule, table, notes)
        return made

    def first_run(self, about: Circumstances, found: FoundTable) -> Pass:
        """A run that computes everything and is measured, as with a MagCache Calibration node."""
        schedule = compute_all(len(about.levels), MEASURING)
        run = FirstRun(about, schedule, Residuals(self.device), host_of(about.model).noise_tokens, self.limit)
        made = Pass(about, run, "residual")
        run.fall_back = lambda run, told: self.fall_back(made, told)
        why = f"those of {found.table.name} cover only part of this run" if found.table else "this model has none"
        notes = [f"{schedule.strip}   # computes", f"The paper's rule needs magnitude ratios; {why}.", *found.notes]
        self.tell(f"MagCache: {MEASURING}.", notes, picture(schedule, about.levels))
        return made

    def fall_back(self, made: Pass, told: str):
        """Continue with the model's output, because the facts of its class do not hold."""
        about, run = made.about, made.run
        made.payload = "output"
        run.schedule = run.report.schedule = self.planned(about)
        run.follower = euler_follower(about, run.schedule, self.corrector)
        self.show(about, run.schedule, None, [told])

    def show(self, about, schedule, table, notes):
        self.tell(plan_text(schedule, about.levels, table), notes, picture(schedule, about.levels))

    def tell(self, text: str, notes: list[str], shown: str):
        self.say("\n".join([text, *(f"  {note}" for note in notes)]), shown, begin=True)

    def complete(self, made):
        try:
            super().complete(made)
            if isinstance(made.run, FirstRun) and made.run.measured:
                _, path = save_measured(made.about, made.run.measured.statistics)
                self.say(f"MagCache: {path} written; this node takes it from the next queue on.")
        except MagCacheError as error:
            self.unmeasured = str(error)
            self.say(f"MagCache measured nothing: {error} The next queue uses a speed-up of {SPEEDUP:g}.")

    def end(self, made):
        report = made.run.report
        if report.calls:
            self.say(report.line())
        if report.schedule.why_none == MEASURING and not report.complete:
            self.say("MagCache: the run was interrupted, nothing was measured; the next queue measures again.")

    def found(self, about: Circumstances) -> FoundTable:
        """The ratios for a run."""
        model_type, note = about.recognised if self.model_type == "auto" else (self.model_type, "")
        if model_type:
            require_class(model_type, about.model)
        published = published_table(model_type, len(about.levels))
        own, said = (None, "") if self.table else own_table(about.patcher, about.model, about.levels)
        table = self.table or own or published
        return FoundTable(table, published, [text for text in (note if table is published else "", said) if text])

    def to_be_measured(self, about: Circumstances, found: FoundTable) -> bool:
        """Whether this run needs ratios of its model that nobody has measured."""
        host = HOSTS.get(class_name(about.model))
        if self.measure == "off" or self.unmeasured or self.speedup or found.published or not (host and host.blocks):
            return False
        if self.off or len(about.levels) < Rule().min_steps:
            return False
        return self.rule_asked and not (found.table and (self.table or found.table.covers(about.levels)))

    @property
    def off(self) -> bool:
        return self.thresholds.get("magcache_thresh") == 0 or self.thresholds.get("magcache_K") == 0

    @property
    def rule_asked(self) -> bool:
        """Whether settings were given that only the paper's rule knows."""
        return bool(self.thresholds) or self.window != (0, -1) or self.measure == "on"

    def plan(self, about: Circumstances, found: FoundTable) -> tuple[Schedule, RatioTable | None, list[str]]:
        """(the schedule of a run, the table that it was made from, what to tell the user of the choice)."""
        table, published, notes = found
        name, host = type(about.model).__name__, HOSTS.get(class_name(about.model))
        if self.speedup:
            return self.planned(about), None, notes
        if not (host and host.blocks) or not (published or (table and self.rule_asked)):
            if self.unmeasured:
                notes = [*notes, f"Nothing could be measured: {self.unmeasured}"]
            elif (self.rule_asked or table) and not self.off:
                notes = [*notes, why_no_rule(name, host, table)]
            return self.planned(about), None, notes
        return self.by_the_rule(about, table, published), table, notes

    def planned(self, about) -> Schedule:
        """The schedule for a speed-up, which needs nothing but the model's outputs."""
        caps = {name: self.thresholds.get(name) for name in ("magcache_K", "retention_ratio")}
        target, why = Target(magcache_speedup=self.speedup or SPEEDUP, **caps), ""
        if self.window != (0, -1):
            why = "start_step and end_step need ratios, and none are used for this model"
        if self.thresholds.get("magcache_thresh") == 0:
            why = "magcache_thresh is 0, which turns MagCache off"
        return replace(compute_all(len(about.levels), why), settings=target) if why else target.plan(None, about.levels)

    def by_the_rule(self, about, table, published):
        recommended = table.settings or (published.settings if published else UNPUBLISHED)
        settings, rule = Settings(**{**recommended, **self.thresholds}), rule_of(table)
        steps = len(about.levels)
        if rule.experts == "last" and about.sigmas[-1] > 0:
            why = "the high-noise expert of this model is not cached"
            return replace(compute_all(steps, why), settings=settings)
        return settings.plan(table, about.levels, rule=self.windowed(rule, steps))

    def windowed(self, rule, steps):
        """The rule, with every step outside start_step .. end_step computed."""
        first, last = (step if step >= 0 else steps + step for step in self.window)
        outside = tuple((step, steps) for step in range(steps) if not first <= step <= last)
        return replace(rule, never_reuse=(*rule.never_reuse, *outside))


def why_no_rule(name: str, host: Host | None, table: RatioTable | None) -> str:
    """Why a speed-up was planned where thresholds or ratios were given."""
    if host is None or not host.blocks:
        why = f", because {host.why_output}" if host else ""
        return f"For {name} only the output is predicted{why}: magcache_thresh and ratios have no effect, set speedup."
    if table:
        return f"The ratios of {table.name} are used once magcache_thresh is set."
    return "The paper's rule has no ratios for this model: set measure_first_run to auto, or set speedup."


def euler_follower(about: Circumstances, schedule: Schedule, corrector: bool) -> Folded | None:
    """What predicts along the line, if that was planned, and corrects steps of Euler's method; None for neither."""
    if len(set(about.sigmas)) < len(about.sigmas):  # two steps at one noise level
        return None
    predicts = schedule.predictor == "line"
    corrects, (*sigmas, last) = corrector and about.euler, about.sigmas
    # Outputs lie on lines and parabolas in the noise level, which is in 0..1 even where sigma is not.
    return Folded(sigmas, predicts, corrects, last, places=list(about.levels)) if predicts or corrects else None


def named_table(name: str) -> RatioTable:
    if name.endswith(".json") and not Path(name).is_file():
        raise MagCacheError(
            f"mag_ratios: there is no calibration file {name}; the node MagCache Calibration makes one."
        )
    return load(name)
