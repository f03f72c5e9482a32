"""Seconds of work on a GPU or CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Stopwatch:
    """Seconds of GPU or CPU work, without waiting for the GPU: events are read when the report is."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.begin = self.mark()

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Callable[[], float]:
        """Read it when the report is."""
        begin, end = self.begin, self.mark()
        if not self.cuda:
            return lambda: end - begin

        def seconds() -> float:
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        return seconds
