"""What FramePack's two demos share: the facts of FramePack's transformer, and the jobs of a demo page with MagCache."""

from __future__ import annotations

import functools
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from common.calibration import fingerprint
from common.errors import MagCacheError
from common.files import write_json
from common.hosts import ALL_TOKENS, FRAMEPACK
from common.patch import magcache_calibration, magcache_forward
from common.planner import Target
from common.report import finite, plan_text
from common.schedule import Settings
from common.scripts.flags import check_writable
from common.scripts.session import named_calibration
from common.steps import TRAIN_TIMESTEPS
from common.tables import calibrations_folder, find, load

SPEEDUPS = {"off": None, "1.5x": 1.5, "2x": 2.0, "2.5x": 2.5, "3x": 3.0}


@dataclass(frozen=True)
class Choice:
    """What the page's controls say, in their order there. speedup: a key of SPEEDUPS."""

    use_magcache: bool
    calibrate: bool
    magcache_thresh: float
    magcache_K: int
    retention_ratio: float
    speedup: str

    @property
    def settings(self):
        """What a run with MagCache is to do: a Target where a speed-up is asked for, which the three settings have no
        part in."""
        if SPEEDUPS[self.speedup]:
            return Target(magcache_speedup=SPEEDUPS[self.speedup])
        return Settings(self.magcache_thresh, int(self.magcache_K), self.retention_ratio)


class Job:
    """One press of "Start Generation": what is to be done, and the lines that the page shows below its controls.

    settings: of a run with MagCache, else None; calibrate: measure instead; handle: of the patch, while and after it is
    on.
    """

    def __init__(self, choice):
        self.settings = choice.settings if choice.use_magcache and not choice.calibrate else None
        self.calibrate, self.handle, self.lines, self.announced = choice.calibrate, None, [], False

    def announce(self, plan):
        """The plan on the console, once a job: its sections have the same."""
        if not self.announced:
            tqdm.write(plan)
        self.announced = True


class Jobs:
    """The jobs of a demo. Its `process`, `worker` and `sample_hunyuan` go through here; its transformer is patched
    while a job with MagCache or a calibration runs, and only then.

    demo: the demo's module; args: its flags and ours; settings: (magcache_thresh, magcache_K, retention_ratio) of the
    script;
    published: name of the table that was published for the demo's checkpoint.
    """

    def __init__(self, demo, args, settings, published):
        self.demo, self.args, self.published = demo, args, published
        self.settings = dict(zip(("magcache_thresh", "magcache_K", "retention_ratio"), settings))
        self.model_name = demo.transformer.config.get("_name_or_path", "")
        self.checkpoint = fingerprint(demo.transformer)
        self.table = load(args.mag_ratios) if args.mag_ratios else find(self.model_name, self.checkpoint)
        self.calibration_file = named_calibration(args) or calibrations_folder() / f"{published}-{self.checkpoint}.json"
        self.teacache_index = demo.ips.index(demo.use_teacache)
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

    def plan(self, steps, seconds, window, *values):
        """What the controls' values skip: lines of text; the second is the strip of steps where there is one."""
        choice = Choice(*values)
        count = sections(seconds, window)
        if choice.calibrate:
            return [
                f"Calibration: every step computes; the mean ratios of {counted(count)} go to {self.calibration_file}."
            ]
        if not choice.use_magcache:
            return ["MagCache is off: every step computes."]
        table = self.known_table()
        levels = table.levels(int(steps))
        schedule = choice.settings.plan(table, levels)
        return [
            *plan_text(schedule, levels, table).splitlines(),
            f"{counted(count)}: {count * schedule.computed} of {count * schedule.steps} steps of the job compute",
        ]

    def known_table(self):
        if self.table is None:
            raise MagCacheError(
                f"No magnitude ratios are known for {self.model_name or 'this checkpoint'}: tick Calibrate and "
                "run one job, or start with --mag_ratios PRESET|FILE."
            )
        return self.table

    def process(self, *values):
        """The demo's `process`, given the values of the controls after its own inputs. Yields (its outputs, the lines
        of the job so far, False); after a calibration also (None, lines, whether it was saved). Raises MagCacheError
        before it starts."""
        inputs, job = list(values[: len(self.demo.ips)]), Job(Choice(*values[len(self.demo.ips) :]))
        if job.calibrate:
            check_writable("The calibration", self.calibration_file)
        elif job.settings:
            self.known_table()
        if job.calibrate or job.settings:
            inputs[self.teacache_index] = False
        outputs = self.host_process(*inputs)
        yield next(outputs), [] if self.idle.is_set() else ["The job before this one is still ending ..."], False
        # A host's worker that was cancelled tells the newest stream that it has ended: wait until it did.
        self.idle.wait()
        self.idle.clear()
        self.demo.worker = functools.partial(self.work, job)
        for shown in outputs:
            if isinstance(shown[0], str) and job.settings:
                self.write_report(shown[0], job)
            yield shown, job.lines, False
        if job.calibrate:
            self.idle.wait()
            yield None, job.lines, job.handle.table is not None

    def work(self, job, *inputs):
        """The demo's `worker`, in its own thread."""
        try:
            with timesteps_noted(self.sampler) as timesteps:
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
                self.demo.transformer, FRAMEPACK, self.table, job.settings, timesteps, announce=job.announce
            )

    def calibrated(self, job):
        """Use the ratios of the job's complete sections from now on."""
        if job.handle.table is None:
            job.lines.append("The calibration broke off in its first section; nothing was saved.")
            return
        self.table = job.handle.table
        count = self.table.statistics["runs"]
        job.lines.append(
            f"Measured in {counted(count)}, saved as {self.calibration_file}; jobs of this page use it from now on."
        )

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
        """JSON beside a video: what was computed and saved in each section."""
        write_json(
            Path(video).with_suffix(".json"),
            finite(
                {
                    "mag_ratios_of": job.handle.table.name,
                    "sections": [report.to_dict() for report in job.handle.reports],
                }
            ),
        )


def sections(seconds, window):
    """How many sections a job has, as the demo's worker counts them: 30 frames a second, 4 frames a latent."""
    return max(round(seconds * 30 / (window * 4)), 1)


def counted(count):
    return f"{count} section{'s' * (count != 1)}"


@contextmanager
def timesteps_noted(sampler):
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
