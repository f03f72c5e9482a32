"""What a MagCache Calibration node measures and writes."""

from __future__ import annotations

from pathlib import Path

from .caching import UNPUBLISHED
from .circumstances import Circumstances
from .common.calibration import Statistics
from .common.errors import MagCacheError
from .common.hosts import host_of
from .common.schedule import Rule, Schedule, Settings, magcache_schedule
from .common.tables import RatioTable
from .fingerprints import save_measured
from .passes import MeasuringRun, Pass
from .wrappers import NodePatch


class NodeCalibration(NodePatch):
    """Measures a model in an ordinary un-cached run. `table` and `path` are those of the last complete run; `failure`
    says why there are none."""

    def __init__(self, say):
        super().__init__(say)
        self.table: RatioTable | None = None
        self.path: Path | None = None
        self.failure: str | None = None

    def begin(self, about: Circumstances) -> Pass:
        self.table = self.path = None
        self.failure = "no complete run has been measured yet"
        try:
            if about.rises:
                raise MagCacheError("its noise levels rise (unsampling): calibrate with an ordinary sampler.")
            return Pass(about, MeasuringRun(about.levels, Statistics(), host_of(about.model).noise_tokens), "residual")
        except MagCacheError as error:
            self.failure = str(error)
            raise

    def complete(self, made):
        try:
            super().complete(made)
            self.write(made)
        except MagCacheError as error:
            self.failure = str(error)
            self.say(f"MagCache Calibration: {error}", begin=True)

    def end(self, made):
        if not made.run.report.complete:
            self.failure = "the run was interrupted"
            self.say("MagCache Calibration: the run was interrupted, nothing was written.", begin=True)

    def write(self, made: Pass):
        table, path = save_measured(made.about, made.run.statistics)
        self.table, self.path, self.failure = table, path, None
        self.say(
            f"MagCache Calibration: {path} written; MagCache nodes take it from now on.\n{ratios_text(table)}",
            begin=True,
        )


def ratios_text(table: RatioTable) -> str:
    return "\n".join(
        f"{branch}: {', '.join(f'{ratio:.5f}' for ratio in ratios)}" for branch, ratios in table.mag_ratios.items()
    )


def schedule_of(table: RatioTable) -> Schedule:
    """What the paper's rule would make of a calibration at its own steps, for the plot."""
    return magcache_schedule(table.at(table.sigmas), Settings(**(table.settings or UNPUBLISHED)), Rule())
