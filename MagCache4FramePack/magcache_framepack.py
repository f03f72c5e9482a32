"""What FramePack's two demos share: the facts of FramePack's transformer, and the jobs of a demo page with MagCache."""

from __future__ import annotations

import functools
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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
from common.tables import best, calibrations, calibrations_folder, load
from common.tables import published as published_table


class FramePackJob:
    """One press of "Start Generation": what is to be done, and the lines that the page shows below its controls.

    settings, table: of a run with MagCache, else None; calibrate: measure instead; handle: of the patch, while and
    after it is on.
    """

    def __init__(self, choice):
        self.settings = choice.settings if choice.use_magcache and not choice.calibrate else None
        self.calibrate, self.table, self.handle, self.lines = choice.calibrate, None, None, []
        self.announced = False

    def announce(self, plan):
        """The plan on the console, once a job: its sections have the same."""
        if not self.announced:
            tqdm.write(plan)
        self.announced = True


class FramePackJobs:
    """The jobs of a demo. Its `process`, `worker` and `sample_hunyuan` go through here; its transformer is patched
    while a job with MagCache or a calibration runs, and only then.

    demo: the demo's module; args: its flags and ours; settings: (magcache_thresh, magcache_K, retention_ratio) of the
    script;
    published: name of the table that was published for the demo's checkpoint.
    """

    def __init__(self, demo, args, settings, published):
        self.demo, self.args, self.published = demo, args, published
        self.settings = named_settings(settings)
        self.model_name = demo.transformer.config.get("_name_or_path", "")
        self.checkpoint = fingerprint(demo.transformer)
        self.named = load(args.mag_ratios) if args.mag_ratios else None
        self.own = [*calibrations(f"*-{self.checkpoint}*.json").values()]
        self.of_model = published_table(self.model_name, self.checkpoint)
        self.calibration_file = named_calibration(args) or calibrations_folder() / f"{published}-{self.checkpoint}.json"
        self.measured = False  # since a page last asked
        self.teacache_index, self.steps_index = demo.ips.index(demo.use_teacache), demo.ips.index(demo.steps)
        self.host_process, self.host_worker, self.host_sample = demo.process, demo.worker, demo.sample_hunyuan
        self.sampler = sys.modules[demo.sample_hunyuan.__module__]
        if not hasattr(self.sampler, "sample_unipc"):
            raise MagCacheError(
                "The sampler of this FramePack has no sample_unipc, so MagCache does not know it; run "
                f"{demo.__name__}.py itself."
            )
        demo.sample_hunyuan = self.sample
        self.job, self.idle = None, threading.Event()
        self.idle.set()

    def starts_cached(self):
        """Whether Use MagCache is ticked in a page that is opened now."""
        known = self.named or self.own or self.of_model
        return bool(known) and self.args.magcache_calibration is None

    def plan(self, steps, seconds, window, teacache, choice):
        """The PagePlan of a job."""
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

    def table_for(self, settings, steps):
        """The ratios of a job, or None where it needs none."""
        return self.known_table(steps) if settings.needs_table else None

    def known_table(self, steps):
        """The ratios of a job: those named, else the checkpoint's own that are fine enough for its steps, else the
        published ones. Raises MagCacheError where there are none."""
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

    def newly_measured(self):
        measured, self.measured = self.measured, False
        return measured

    def process(self, *values):
        """The demo's `process`, given the values of the controls after its own inputs. Yields (its outputs or None, the
        lines of the job so far). Raises MagCacheError before it starts."""
        inputs, job = list(values[: len(self.demo.ips)]), FramePackJob(Choice(*values[len(self.demo.ips) :]))
        if job.calibrate:
            check_writable("The calibration", self.calibration_file)
        elif job.settings:
            job.table = self.table_for(job.settings, int(inputs[self.steps_index]))
        if job.calibrate or job.settings:
            inputs[self.teacache_index] = False
        outputs = self.host_process(*inputs)
        yield next(outputs), [] if self.idle.is_set() else ["The job before this one is still ending ..."]
        # A host's worker that was cancelled tells the newest stream that it has ended: wait until it did.
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

    def work(self, job, *inputs):
        """The demo's `worker`, in its own thread."""
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

    def patched(self, job, timesteps):
        """The transformer with MagCache on it, or measured; None where the job wants neither."""
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

    def calibrated(self, job):
        """Use the ratios of the job's complete sections from now on."""
        if job.handle.failure or job.handle.table is None:
            why = job.handle.failure or "The calibration was interrupted in its first section."
            job.lines.append(f"{why} Nothing was saved.")
            return
        self.own.append(job.handle.table)
        self.measured = True
        count = counted(job.handle.table.statistics["runs"])
        job.lines.append(f"Measured in {count}, saved as {job.handle.path}; jobs of this page use it from now on.")

    def sample(self, *args, **kwargs):
        """The demo's `sample_hunyuan`: one section. Its residuals are gone before the VAE decodes it, also after a
        cancel."""
        job = self.job
        if job is None or job.handle is None:
            return self.host_sample(*args, **kwargs)
        try:
            latents = self.host_sample(*args, **kwargs)
        except MagCacheError as error:  # the host's worker prints it where nobody looks
            job.lines.append(str(error))
            raise
        finally:
            job.handle.end_run()
        report = job.handle.reports[-1]
        line = f"measured in {report.seconds()[0]:.2f} s" if job.calibrate else report.line()
        job.lines.append(f"Section {len(job.handle.reports)}: {line}")
        return latents

    def write_report(self, video, job):
        """JSON beside a video: what was computed and saved in each section. The job goes on without it."""
        reports = [report.to_dict() for report in job.handle.reports]
        try:
            write_json(
                report_place(video), finite({"mag_ratios_of": job.table and job.table.name, "sections": reports})
            )
        except (MagCacheError, OSError) as error:
            job.lines.append(f"The report could not be written ({error}).")


def sections(seconds, window):
    """How many sections a job has, as the demo's worker counts them: 30 frames a second, 4 frames a latent."""
    return max(round(seconds * 30 / (window * 4)), 1)


def counted(count):
    return f"{count} section{'s' * (count != 1)}"


@contextmanager
def section_timesteps(sampler):
    """A function that returns the timesteps of the section that the module `sampler` is at, one tensor a section."""
    noted, plain = [None], sampler.sample_unipc

    def sample_unipc(model, noise, sigmas, *args, **kwargs):
        noted[0] = sigmas[:-1] * TRAIN_TIMESTEPS
        return plain(model, noise, sigmas, *args, **kwargs)

    sampler.sample_unipc = sample_unipc
    try:
        yield lambda: noted[0]
    finally:
        sampler.sample_unipc = plain
