"""Seconds of work on a GPU or CPU. Importing this needs no torch, because reports and plans do not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .payloads import Payload

REHEARSALS = 3  # how often a calibration times a reused step


@dataclass(frozen=True)
class Lap:
    """The time of one call of the model. read: returns its seconds; compiled: whether torch.compile made a graph in
    it."""

    read: Callable[[], float]
    compiled: bool = False

    def __call__(self) -> float:
        return self.read()


class Stopwatch:
    """Times GPU or CPU work without waiting for the GPU: its events are read when a report is."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.graphs = device.type == "cuda", graphs_compiled()
        self.begin = self.mark()

    def mark(self) -> Any:
        """This moment: a CUDA event, or seconds."""
        if not self.cuda:
            return time.perf_counter()
        import torch  # here, for reports are read without it

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Lap:
        """The time since the stopwatch was made, to be read later."""
        begin, end = self.begin, self.mark()

        def seconds() -> float:
            if not self.cuda:
                return end - begin
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        return Lap(seconds, graphs_compiled() != self.graphs)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters.get("stats", {}).get("unique_graphs", 0) if dynamo else 0


def typical_seconds(laps: Sequence[Lap]) -> float | None:
    """Median seconds, without the first call, which warms up, and those that compiled; None if all of them compiled."""
    steady = [lap for lap in laps[1:] if not lap.compiled] or [lap for lap in laps if not lap.compiled]
    return median(lap() for lap in steady) if steady else None


def saved_seconds(computed: Sequence[Lap], reused: Sequence[Lap]) -> tuple[float, str]:
    """(seconds saved by the reused calls, why nothing was saved or ""). Saved is the time of as many typical computed
    calls, less that of the reused ones, where one that warmed up or compiled counts as a typical one: later runs have
    none of these."""
    usual, usual_reused = typical_seconds(computed), typical_seconds(reused)
    if not reused:
        return 0.0, ""
    if usual is None or usual_reused is None:
        return 0.0, "torch.compile was at work in this run, and the next one tells what it gains"
    saved = sum(usual - (lap() if index and not lap.compiled else usual_reused) for index, lap in enumerate(reused))
    return saved, "" if saved > 0 else "a reused call took as long as a computed one"


def time_reuse(payload: Payload, residual: torch.Tensor, rehearse: Callable[[], Any]) -> float:
    """Seconds of an uncompiled forward without its blocks: the least of REHEARSALS. rehearse: makes the last call
    again."""
    seconds = []
    for _ in range(REHEARSALS):
        try:
            payload.replace(residual)
            stopwatch = Stopwatch(residual.device)
            rehearse()
            seconds.append(stopwatch.stop())
        finally:
            payload.restore()
    return min(read() for read in seconds)
