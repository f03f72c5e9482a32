"""The jobs of FramePack's two demo pages, with MagCache."""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.calibration import fingerprint
from common.errors import MagCacheError
from common.files import write_json
from common.hosts.diffusers import ALL_TOKENS, FRAMEPACK
from common.patch import magcache_calibration, magcache_forward
from common.report import finite
from common.scripts.controls import Choice, PagePlan, page_plan
from common.scripts.flags import check_writable, named_calibration, named_settings
from common.scripts.outputs import report_place
from common.steps import TRAIN_TIMESTEPS
from common.tables import RatioTable, best, calibrations, calibrations_folder, load
from common.tables import published as published_table


class FramePackJob:
    """One press of "Start Generation".

    settings, table: for MagCache, otherwise None; calibrate: whether to calibrate instead; handle: of the patch, None
    before it is on; lines: what the page shows of the job.
    """

    def __init__(self, choice: Choice) -> None:
        self.settings = choice.settings if choice.use_magcache and not choice.calibrate else None
        self.calibrate = choice.calibrate
        self.table: RatioTable | None = None
        self.handle: Any = None
        self.lines: list[str] = []
        self.announced = False

    def announce(self, plan: str) -> None:
        """Print the plan once per job, since all sections have the same."""
        if not self.announced:
            tqdm.write(plan)
        self.announced = True


class FramePackJobs:
    """The jobs of a demo, which wrap its `process`, `worker` and `sample_hunyuan`. The transformer is patched only
    while a job with MagCache or a calibration runs.

    demo: the demo's module; args: MagCache's flags; settings: (magcache_thresh, magcache_K, retention_ratio) of the
    script; published: preset for the demo's checkpoint.
    """

    def __init__(self, demo: Any, args: argparse.Namespace, settings: tuple[float, int, float], published: str) -> None:
        self.demo, self.args, self.published = demo, args, published
        self.settings = named_settings(settings)
        self.model_name = demo.transformer.config.get("_name_or_path", "")
        self.checkpoint = fingerprint(demo.transformer)
        self.named = load(args.mag_ratios) if args.mag_ratios else None
        self.own = [*calibrations(f"*-{self.checkpoint}*.json").values()]
        self.of_model = published_table(self.model_name, self.checkpoint)
        self.calibration_file = named_calibration(args) or calibrations_folder() / f"{published}-{self.checkpoint}.json"
        self.measured = False  # since the page last asked
        self.teacache_index, self.steps_index = demo.ips.index(demo.use_teacache), demo.ips.index(demo.steps)
        self.host_process, self.host_worker, self.host_sample = demo.process, demo.worker, demo.sample_hunyuan
        self.sampler = sys.modules[demo.sample_hunyuan.__module__]
        if not hasattr(self.sampler, "sample_unipc"):
            raise MagCacheError(
                "The sampler of this FramePack has no sample_unipc, so MagCache does not know it; run "
                f"{demo.__name__}.py itself."
            )
        demo.sample_hunyuan = self.sample
        self.job: FramePackJob | None = None
        self.idle = threading.Event()  # set while no worker runs
        self.idle.set()

    def starts_cached(self) -> bool:
        """Whether Use MagCache is ticked in a newly opened page."""
        known = self.named or self.own or self.of_model
        return bool(known) and self.args.magcache_calibration is None

    def plan(self, steps: int, seconds: float, window: float, teacache: bool, choice: Choice) -> PagePlan:
        """The plan of a job. seconds: length of the video; window: latent frames of a section; teacache: whether Use
        TeaCache is ticked. Raises MagCacheError if ratios are missing."""
        job = counted(sections(seconds, window))
        if choice.calibrate:
            return PagePlan(f"the next job measures {job}", lines=(f"The mean ratios go to {self.calibration_file}.",))
        if not choice.use_magcache:
            return PagePlan("off, TeaCache decides" if teacache else "off, every step computes")
        settings = choice.settings
        table = self.table_for(settings, int(steps))
        levels = (table or load(self.published)).levels(int(steps))
        schedule = settings.plan(table, levels)
        plan, count = page_plan(schedule, levels, table), sections(seconds, window)
        whole = f"{job}: {count * schedule.computed} of {count * schedule.steps} steps of the job compute"
        return replace(plan, lines=(whole, *plan.lines))

    def table_for(self, settings: Any, steps: int) -> RatioTable | None:
        """The ratios for a job; None: it needs none. Raises MagCacheError if they are missing."""
        return self.known_table(steps) if settings.needs_table else None

    def known_table(self, steps: int) -> RatioTable:
        """The ratios for a job: those of --mag_ratios, else a calibration of the checkpoint that is fine enough for so
        many steps, else the published ones. Raises MagCacheError if there are none."""
        if self.named:
            return self.named
        fine = [table for table in self.own if table.fine_enough(table.levels(steps))]
        table = best(fine, fine[0].levels(steps)) if fine else self.of_model
        if table is None:
            known = "were measured at too few steps for this job" if self.own else "are not known"
            raise MagCacheError(
                f"The magnitude ratios of {self.model_name or 'this checkpoint'} {known}: tick Calibrate under "
                "MagCache and run one job."
            )
        return table

    def newly_measured(self) -> bool:
        """Whether ratios were measured since this was last asked."""
        measured, self.measured = self.measured, False
        return measured

    def process(self, *values: Any) -> Iterator[tuple[Any, list[str]]]:
        """The demo's `process`. values: its inputs, then those of the controls. Yields (its outputs or None, the lines
        of the job so far). Raises MagCacheError before it starts, for settings that cannot work."""
        inputs, job = list(values[: len(self.demo.ips)]), FramePackJob(Choice(*values[len(self.demo.ips) :]))
        if job.calibrate:
            check_writable("The calibration", self.calibration_file)
        elif job.settings:
            job.table = self.table_for(job.settings, int(inputs[self.steps_index]))
        if job.calibrate or job.settings:
            inputs[self.teacache_index] = False
        outputs = self.host_process(*inputs)
        yield next(outputs), [] if self.idle.is_set() else ["The job before this one is still ending ..."]
        # A cancelled worker reports its end to the newest stream: wait, so that this job does not get it.
        self.idle.wait()
        self.idle.clear()
        self.demo.worker = functools.partial(self.work, job)
        for shown in outputs:
            if isinstance(shown[0], str) and job.settings:
                self.write_report(Path(shown[0]), job)
            yield shown, job.lines
        if job.calibrate:
            self.idle.wait()
            yield None, job.lines

    def work(self, job: FramePackJob, *inputs: Any) -> None:
        """The demo's `worker`, in a thread of its own."""
        try:
            with section_timesteps(self.sampler) as timesteps:
                self.job, job.handle = job, self.patched(job, timesteps)
                try:
                    self.host_worker(*inputs)
                finally:
                    self.job = None
                    if job.handle:
                        job.handle.remove()
            if job.calibrate:
                self.calibrated(job)
        finally:
            self.idle.set()

    def patched(self, job: FramePackJob, timesteps: Callable[[], Any]) -> Any:
        """Patch the transformer for MagCache or a calibration, and return the handle; None: the job is un-cached."""
        if job.calibrate:
            return magcache_calibration(
                self.demo.transformer,
                ALL_TOKENS if self.args.magcache_all_tokens else FRAMEPACK,
                timesteps,
                f"{self.published}-{self.checkpoint}",
                self.calibration_file,
                {
                    "settings": self.settings,
                    "rule": load(self.published).rule,
                    "sampler": {"scheduler": "unipc"},
                    "notes": "Statistic of all tokens."
                    if self.args.magcache_all_tokens
                    else "Statistic of the tokens of the section.",
                    "provenance": {
                        "fingerprint": self.checkpoint,
                        "model": self.model_name,
                        "torch": torch.__version__,
                        "date": time.strftime("%Y-%m-%d"),
                    },
                },
            )
        if job.settings:
            return magcache_forward(
                self.demo.transformer, FRAMEPACK, job.table, job.settings, timesteps, announce=job.announce
            )

    def calibrated(self, job: FramePackJob) -> None:
        """Use the ratios measured in the job's complete sections from now on."""
        if job.handle.failure or job.handle.table is None:
            why = job.handle.failure or "The calibration was interrupted in its first section."
            job.lines.append(f"{why} Nothing was saved.")
            return
        self.own.append(job.handle.table)
        self.measured = True
        count = counted(job.handle.table.statistics["runs"])
        job.lines.append(f"Measured in {count}, saved as {job.handle.path}; jobs of this page use it from now on.")

    def sample(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The demo's `sample_hunyuan`: the latents of one section. Its residuals are freed before the VAE decodes it,
        even if it was cancelled."""
        job = self.job
        if job is None or job.handle is None:
            return self.host_sample(*args, **kwargs)
        try:
            latents = self.host_sample(*args, **kwargs)
        except MagCacheError as error:  # the demo prints it only on the console
            job.lines.append(str(error))
            raise
        finally:
            job.handle.end_run()
        report = job.handle.reports[-1]
        line = f"measured in {report.seconds()[0]:.2f} s" if job.calibrate else report.line()
        job.lines.append(f"Section {len(job.handle.reports)}: {line}")
        return latents

    def write_report(self, video: Path, job: FramePackJob) -> None:
        """Write the reports of the sections beside the video. If that fails, the job shows a line and goes on."""
        reports = [report.to_dict() for report in job.handle.reports]
        try:
            write_json(
                report_place(video), finite({"mag_ratios_of": job.table and job.table.name, "sections": reports})
            )
        except (MagCacheError, OSError) as error:
            job.lines.append(f"The report could not be written ({error}).")


def sections(seconds: float, window: float) -> int:
    """Number of sections of a video, as the demo's worker computes it: 30 frames per second, 4 frames per latent frame.

    window: latent frames of a section.
    """
    return max(round(seconds * 30 / (window * 4)), 1)


def counted(count: int) -> str:
    """ "1 section", "2 sections"."""
    return f"{count} section{'s' * (count != 1)}"


@contextmanager
def section_timesteps(sampler: Any) -> Iterator[Callable[[], Any]]:
    """A context that notes the timesteps of sections. sampler: the demo's module of its sampler. Gives a function that
    returns the timesteps of the current section, a new tensor for each."""
    noted: list[Any] = [None]
    plain = sampler.sample_unipc

    def sample_unipc(model, noise, sigmas, *args, **kwargs):
        noted[0] = sigmas[:-1] * TRAIN_TIMESTEPS
        return plain(model, noise, sigmas, *args, **kwargs)

    sampler.sample_unipc = sample_unipc
    try:
        yield lambda: noted[0]
    finally:
        sampler.sample_unipc = plain
