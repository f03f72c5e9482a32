"""Seconds of work on a GPU or CPU."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Seconds of GPU or CPU work, without waiting for the GPU: events are read when the report is."""

    def __init__(self, device):
        self.cuda = device.type == "cuda"
        self.begin = self.mark()

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self):
        begin, end = self.begin, self.mark()
        if not self.cuda:
            return lambda: end - begin

        def seconds():
            end.synchronize()
            return begin.elapsed_time(end) / 1000

        return seconds
