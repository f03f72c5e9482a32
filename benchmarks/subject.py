"""The subject of a measurement: a pipeline, the images or clips that it draws, and the number of computed steps."""

from __future__ import annotations

import gc
import math
from collections import namedtuple
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch
from demo_model import REPOSITORY  # noqa: F401  (which makes `common` importable)
from tqdm import tqdm

from common.hosts import host_of
from common.patch import magcache_calibration
from common.tables import RatioTable

SAMPLER_NAMES = {"euler": "Euler", "unipc": "UniPC of second order", "dpm": "DPM-Solver++ of second order"}
BATCH = 12  # pictures drawn at once
# cache: makes the context manager that puts the cache on. batch: pictures at once, since others decide for a whole one.
# source: whose code and which version of it skips; a row is measured again when it changes.
Row = namedtuple("Row", "family setting cache steps batch source", defaults=[BATCH, ""])


class Subject:
    """A pipeline and what it draws.

    call: keywords of every call; jobs: (prompt, seed) of each image; trial_jobs: those on which the thresholds of other
    projects are searched for (None: the first of `jobs`).
    """

    def __init__(self, pipe, call: dict, jobs: list, scheduler: str = "euler", trial_jobs: list | None = None):
        self.pipe, self.call, self.jobs, self.host = pipe, call, jobs, host_of(pipe.transformer)
        self.boundary = pipe.config.get("boundary_ratio")
        # Two experts of Wan2.2 divide the steps between them.
        self.models = [pipe.transformer] + ([pipe.transformer_2] if self.boundary else [])
        self.trial_jobs = trial_jobs or jobs[:1]
        pipe.set_progress_bar_config(disable=True)
        self.scheduler = scheduler
        self.shift = pipe.scheduler.config.get("shift") or pipe.scheduler.config.get("flow_shift")
        pipe.scheduler = self.new_scheduler(scheduler)
        self.executed = 0
        for model in self.models:
            blocks = list(getattr(model, self.host.blocks[-1]))
            query = [module for name, module in blocks[-1].named_modules() if name.endswith("to_q")][0]
            query.register_forward_hook(self.count)
        self.branches = self.counted_branches()

    def new_scheduler(self, name: str):
        """The scheduler of this name in SAMPLER_NAMES, with the noise levels of the model's own."""
        from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

        if name == "euler":
            return FlowMatchEulerDiscreteScheduler(shift=self.shift)
        flux = "Flux" in type(self.pipe).__name__  # which tells the scheduler its shift, as a logarithm
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": flux}
        kind = {"unipc": UniPCMultistepScheduler, "dpm": DPMSolverMultistepScheduler}[name]
        scheduler = kind(flow_shift=self.shift, solver_order=2, **options)
        scheduler.register_to_config(base_shift=math.log(self.shift), max_shift=math.log(self.shift))
        return scheduler

    @contextmanager
    def sampled_by(self, name: str):
        own, self.pipe.scheduler = self.pipe.scheduler, self.new_scheduler(name)
        try:
            yield
        finally:
            self.pipe.scheduler = own

    def guide(self, guidance: float) -> None:
        """Use this classifier-free guidance from now on; 1: none."""
        if "Flux" in type(self.pipe).__name__:  # its guidance_scale is an input of the model
            wanted = {"negative_prompt": "", "true_cfg_scale": guidance} if guidance != 1 else {}
        else:
            wanted = {"guidance_scale": guidance}
        kept = {name: value for name, value in self.call.items() if name not in ("negative_prompt", "true_cfg_scale")}
        self.call = kept | wanted
        self.branches = self.counted_branches()

    def count(self, *_):
        self.executed += 1

    def counted_branches(self) -> int:
        """Calls of the transformer per step, without a cache."""
        return round(self.calls(self.jobs[:1], 2) / 2)

    def render(self, jobs: list, steps: int, **more) -> np.ndarray:
        """uint8 frames (jobs, frames, height, width, 3) of these jobs, drawn as one batch."""
        output = self.pipe(
            [prompt for prompt, _ in jobs],
            num_inference_steps=steps,
            output_type="np",
            generator=[torch.Generator().manual_seed(seed) for _, seed in jobs],
            **self.call,
            **more,
        )
        frames = output.images[:, None] if hasattr(output, "images") else output.frames
        return (np.asarray(frames) * 255).round().astype(np.uint8)

    def drawn(self, steps: int, title: str, batch: int) -> tuple[list[np.ndarray], float]:
        """(all images, computed steps per image)."""
        self.executed, batches, pictures = 0, range(0, len(self.jobs), batch), []
        for first in tqdm(batches, desc=title, leave=False):
            pictures.extend(self.render(self.jobs[first : first + batch], steps))
        return pictures, self.executed / self.branches / len(batches)

    def calls(self, jobs: list, steps: int) -> float:
        """Calls of the transformer that ran its blocks, per image; each image is drawn alone."""
        self.executed = 0
        for job in jobs:
            self.render([job], steps)
        return self.executed / len(jobs)

    def peak_bytes(self, cache: Callable, steps: int) -> int:
        """Bytes of tensors that are alive between two steps of a run, measured three times."""
        seen = []

        def look(pipe, step, timestep, tensors):
            if step in (steps // 4, steps // 2, 3 * steps // 4):
                seen.append(live_bytes())
            return tensors

        with cache():
            self.render(self.jobs[:1], steps, callback_on_step_end=look)
        return max(seen)

    def calibrated(self, jobs: list, steps: int) -> RatioTable:
        with magcache_calibration(self.models, self.host, self.timesteps, "measured") as handle:
            for job in tqdm(jobs, desc=f"calibrating, {steps} steps"):
                self.render([job], steps)
        return handle.table

    def timesteps(self):
        return self.pipe.scheduler.timesteps


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for one in gc.get_objects():
        # isinstance would wake lazy objects; other types (torch.compile's stand-ins) hold no memory.
        if type(one) in (torch.Tensor, torch.nn.Parameter):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(storages.values())
