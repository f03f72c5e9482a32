"""What a MagCache node plans for a run: by the thresholds of the paper's rule, or for a speed-up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from .circumstances import Circumstances
from .common.blocks import Host
from .common.corrector import Folded
from .common.errors import MagCacheError
from .common.hosts import HOSTS, class_name
from .common.planner import Target
from .common.report import plan_text
from .common.residuals import Residuals
from .common.schedule import Schedule, Settings, compute_all, magcache_schedule, rule_of
from .common.tables import RatioTable, load
from .fingerprints import own_table
from .models import NOT_POSSIBLE, published_table, require_class
from .page import picture
from .passes import BoundedRun, Pass
from .wrappers import NodePatch

SPEEDUP = 2.0  # of a model for which no settings were published
LIMIT = 4.0  # GiB of residuals in one run: those of Wan 14B at 720p, both branches and two steps, are 3.0
UNPUBLISHED = {"magcache_thresh": 0.06, "magcache_K": 2, "retention_ratio": 0.2}  # what thresholds are filled up with


class NodeCache(NodePatch):
    """Caching with the settings of one node."""

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
    ):
        """thresholds: {name: value} of the settings that were given; the others are the recommended ones.
        start_step, end_step: first and last step that may be reused, counted from the end where negative.
        speedup: plan for it (`planner.Target`; 0: what is recommended), within magcache_K and retention_ratio where
        given.
        device: where residuals are kept (None: the model's).
        mag_ratios: preset or file (empty: found for the model).
        corrector: put skipped steps of Euler's method right when the next one is computed.
        limit: GiB that a run may keep; what would exceed them is computed."""
        super().__init__(say)
        self.limit = int(limit * 2**30)
        self.corrector = corrector
        self.model_type, self.thresholds, self.window = model_type, dict(thresholds or {}), (start_step, end_step)
        self.speedup, self.device, self.table = speedup, device, named_table(mag_ratios) if mag_ratios else None
        Settings(**{**UNPUBLISHED, **self.thresholds})  # bad ones are refused here, before anything is rendered
        if speedup:
            Target(magcache_speedup=speedup)
            if self.window != (0, -1):
                raise MagCacheError(
                    "start_step and end_step go with the thresholds: leave them at 0 and -1 with speedup."
                )

    def begin(self, about: Circumstances) -> Pass:
        schedule, table, notes = self.plan(about)
        payload = schedule.settings.payload if schedule.reuse.any() else "output"
        follower = euler_follower(about, schedule, self.corrector) if schedule.reuse.any() else None

        def fall_back(run, told):
            """The facts of the class are wrong on this model: go on with its output."""
            made.payload = "output"
            run.schedule = run.report.schedule = self.planned(about)
            run.follower = euler_follower(about, run.schedule, self.corrector)
            self.show(about, run.schedule, None, [told])

        run = BoundedRun(about, schedule, Residuals(self.device), follower, self.limit, fall_back)
        made = Pass(about, run, payload)
        self.show(about, schedule, table, notes)
        return made

    def show(self, about, schedule, table, notes):
        text = plan_text(schedule, about.levels, table)
        self.say("\n".join([text, *(f"  {note}" for note in notes)]), picture(schedule, about.levels), begin=True)

    def end(self, made):
        if made.run.report.calls:
            self.say(made.run.report.line())

    def plan(self, about: Circumstances) -> tuple[Schedule, RatioTable | None, list[str]]:
        """(the schedule of a run, the table that it was made from, what to say of the choice). Raises MagCacheError
        where nothing can be cached."""
        name = type(about.model).__name__
        if name in NOT_POSSIBLE:
            raise MagCacheError(f"{name} {NOT_POSSIBLE[name]}.")
        if about.rises:
            raise MagCacheError("its noise levels rise (unsampling), and skipping is planned for falling ones.")
        model_type, note = about.recognised if self.model_type == "auto" else (self.model_type, "")
        if model_type:
            require_class(model_type, about.model)
        published = published_table(model_type, len(about.levels))
        own, said = (None, "") if self.table else own_table(about.patcher, about.model, about.levels)
        table = self.table or own or published
        notes = [text for text in (note if table is published else "", said) if text]
        host = HOSTS.get(class_name(about.model))
        if self.speedup:
            return self.planned(about), None, notes
        if not (host and host.blocks) or not (published or (table and self.thresholds)):
            asked = self.thresholds.get("magcache_thresh", 0) > 0 or self.table or own
            return self.planned(about), None, [*notes, *([why_no_rule(name, host, table)] if asked else [])]
        return self.by_the_rule(about, table, published), table, notes

    def planned(self, about) -> Schedule:
        """For a speed-up, by the model's outputs alone."""
        caps = {name: self.thresholds.get(name) for name in ("magcache_K", "retention_ratio")}
        target, why = Target(magcache_speedup=self.speedup or SPEEDUP, **caps), ""
        if self.window != (0, -1):
            why = "start_step and end_step go with ratios, and none are used for this model"
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
        return magcache_schedule(table.at(about.levels), settings, self.windowed(rule, steps))

    def windowed(self, rule, steps):
        """The rule, with the steps outside of start_step .. end_step computed."""
        first, last = (step if step >= 0 else steps + step for step in self.window)
        outside = tuple((step, steps) for step in range(steps) if not first <= step <= last)
        return replace(rule, never_reuse=(*rule.never_reuse, *outside))


def why_no_rule(name: str, host: Host | None, table: RatioTable | None) -> str:
    """Why a speed-up was planned where thresholds or ratios were given."""
    if host is None or not host.blocks:
        why = f", because {host.why_output}" if host else ""
        return f"Of {name} only the output is predicted{why}: magcache_thresh and ratios have no effect, set speedup."
    if table:
        return f"The ratios of {table.name} are used once magcache_thresh is set."
    return "The paper's rule has no ratios for this model: calibrate it, or set speedup."


def euler_follower(about: Circumstances, schedule: Schedule, corrector: bool) -> Folded | None:
    """What predicts along the line where that was planned, and corrects Euler's steps."""
    if len(set(about.sigmas)) < len(about.sigmas):  # two steps at one noise level
        return None
    predicts = schedule.predictor == "line"
    corrects, (*sigmas, last) = corrector and about.euler, about.sigmas
    return Folded(sigmas, predicts, corrects, last) if predicts or corrects else None


def named_table(name: str) -> RatioTable:
    if name.endswith(".json") and not Path(name).is_file():
        raise MagCacheError(
            f"mag_ratios: there is no calibration file {name}; the node MagCache Calibration makes one."
        )
    return load(name)
