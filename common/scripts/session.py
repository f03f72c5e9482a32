"""One command of a drop-in beside an upstream checkout: cached, calibrated or compared, its output saved whole."""

from __future__ import annotations

import functools
import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..calibration import Statistics
from ..errors import MagCacheError
from ..patch import magcache_calibration, magcache_forward
from ..ranks import is_writer, told_by_writer
from ..report import write_report
from ..tables import calibrations_folder, load, read
from .flags import cache_options, check_writable, settings_of
from .plots import plot_schedule
from .quality import VIDEO_SUFFIXES, quality, quality_table, side_by_side

SETTING_FLAGS = (
    "magcache_thresh",
    "magcache_K",
    "retention_ratio",
    "magcache_speedup",
    "magcache_steps",
    "magcache_max_error",
    "mag_ratios",
)


class Session:
    """One command of a drop-in: what its models' forward is replaced by, and what came of it.

    args: the parsed flags, the host's and ours; lines: the script's (magcache_thresh, magcache_K, retention_ratio) for
    this task; task: what ratios hold for besides the checkpoint ("t2v-14B"); size: "832x480"; frames: their number;
    preset: name of the published table, or None; about: further entries of reports and calibration files;
    videos: what the host's pipeline returns -> its videos, tensors (3, frames, height, width) in -1..1; measures: where
    no ratios are known, the first rendering is computed in full and measured, and the next ones use what was found.
    """

    def __init__(self, args, lines, task, size, frames, preset, about, videos=lambda result: [result], measures=False):
        self.args, self.lines, self.task, self.size, self.frames, self.preset = args, lines, task, size, frames, preset
        self.about, self.videos, self.measures = about, videos, measures
        self.calibrating = args.magcache_calibration is not None
        self.statistics = Statistics()
        self.mag_ratios = self.comparison = None
        self.reports, self.frames_rendered, self.files_saved, self.said = [], {}, 0, set()

    def check(self, output):
        """Find what cannot work before anything is loaded. output: the file that the user named, or None."""
        check_writable("The output", Path(output or "output"))
        fitting_ends = (".png", ".jpg", ".jpeg", ".webp") if self.frames == 1 else VIDEO_SUFFIXES
        if output and Path(output).suffix.lower() not in fitting_ends:
            raise MagCacheError(f"The output {output} has no ending that can be written: use {fitting_ends[0]}.")
        if self.calibrating and self.args.compare:
            raise MagCacheError(
                "--compare renders with MagCache, --magcache_calibration measures without: one at a time."
            )
        if self.calibrating:
            if Path(self.args.magcache_calibration or ".json").suffix not in ("", ".json"):
                raise MagCacheError(
                    f"--magcache_calibration {self.args.magcache_calibration} is no calibration file: end it in "
                    ".json, or leave it out and put the flag last."
                )
            return
        named, own = self.args.mag_ratios or self.preset, [] if self.args.mag_ratios else own_tables(self.task)
        if not named and not own and not self.measures:
            raise MagCacheError(self.no_table())
        settings = settings_of(self.args, self.lines, None, True)
        if named and not own:  # else only the weights tell which
            table = load(named)
            settings.plan(table, np.asarray(table.sigmas))

    def no_table(self):
        return (
            f"No magnitude ratios are known for {self.task} with this checkpoint: measure them once by the same "
            f"command with "
            "--magcache_calibration, name a table with --mag_ratios PRESET|FILE, or run with --no-magcache."
        )

    def table(self, checkpoint):
        """The ratios to use: those named, else this checkpoint's own for this task, else the published ones; None where
        there are none and they are to be measured."""
        if self.args.mag_ratios:
            return load(self.args.mag_ratios)
        own = [table for table in own_tables(self.task) if table.provenance.get("fingerprint") == checkpoint]
        if own:
            return min(
                own, key=lambda table: abs(volume(table.sampler) - volume({"size": self.size, "frames": self.frames}))
            )
        if not self.preset and not self.measures:
            raise MagCacheError(self.no_table())
        return load(self.preset) if self.preset else None

    def patch(self, models, host, timesteps, checkpoint, boundary=None):
        """Put MagCache, or the calibration, on the pipeline's transformer or its experts: beneath whatever takes hold
        of their forward afterwards. checkpoint: fingerprint of the weights."""
        self.mag_ratios = None if self.calibrating else told_by_writer(lambda: self.table(checkpoint))
        self.measuring = self.mag_ratios is None
        if self.measuring:
            if not self.calibrating:
                self.say(
                    f"No magnitude ratios are known for {self.task} with this checkpoint: this rendering is computed "
                    f"in "
                    "full to measure them."
                )
            self.handle = self.calibration(models, host, timesteps, checkpoint, boundary)
            return
        self.handle = magcache_forward(
            models,
            host,
            self.mag_ratios,
            settings_of(self.args, self.lines, self.mag_ratios, True),
            timesteps,
            announce=self.say_once,
            boundary=boundary,
            **cache_options(self.args),
        )

    def calibration(self, models, host, timesteps, checkpoint, boundary):
        """A patch that renders un-cached and saves the magnitude ratios, from the writing rank alone."""
        name = f"{self.task}-{self.size}x{self.frames}"
        self.path = Path(self.args.magcache_calibration or calibrations_folder() / f"{name}-{checkpoint}.json")
        check_writable("The calibration file", self.path)
        sampler = {
            "task": self.task,
            "size": self.size,
            "frames": self.frames,
            **({"boundary": boundary} if boundary else {}),
        }
        description = {
            "sampler": sampler,
            "settings": self.lines,
            "rule": load(self.preset).rule if self.preset else {},
            "provenance": {
                "fingerprint": checkpoint,
                **self.about,
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
        }
        return magcache_calibration(models, host, timesteps, name, self.path, description, self.statistics)

    def render(self, draw, steps):
        """Render as asked for, with the patch on. draw: steps -> what the host's pipeline returns. Returns that for the
        host to save."""
        if self.files_saved:  # of an earlier rendering
            self.reports, self.comparison, self.frames_rendered, self.files_saved = [], None, {}, 0
        if not self.measuring:
            self.say_what_differs()
        with self.handle:
            result, self.seconds = timed(draw, steps)
        if self.measuring:
            self.path = self.handle.path  # beside the one asked for, where that covers more
            hint = (
                f"use it with --mag_ratios {self.path}."
                if self.args.magcache_calibration
                else f"runs of {self.task} with this checkpoint use it from now on."
            )
            self.say(f"Measured in an un-cached run, saved as {self.path}; {hint}")
            self.mag_ratios = self.handle.table
            if not self.calibrating:
                self.reports.append(self.handle.reports[-1])
            return result
        self.reports.append(self.handle.reports[-1])
        self.say(self.report.line())
        if self.args.compare:
            try:
                self.compare(draw, steps, result)
            except (KeyboardInterrupt, RuntimeError) as error:  # hours may lie in what is rendered already
                self.say(f"The comparison broke off ({type(error).__name__} {error}); what MagCache rendered is kept.")
        return result

    @property
    def report(self):
        """Of the last rendering; None where there is nothing to report."""
        return self.reports[-1] if self.reports else None

    def compare(self, draw, steps, result):
        """Render un-cached and by the plain sampler with as many steps as were computed, at the same seed."""
        computed = self.report.schedule.computed
        rows = {
            f"un-cached, {steps} steps": timed(draw, steps),
            f"MagCache, {computed} of {steps}": (result, self.seconds),
            f"plain sampler, {computed} steps": timed(draw, computed),
        }
        if not is_writer():
            return
        self.frames_rendered = {
            title: [as_frames(video) for video in self.videos(rendered)] for title, (rendered, _) in rows.items()
        }
        (first, reference), *others = self.frames_rendered.items()
        self.comparison = {first: {"steps": steps}} | {
            title: {"steps": computed} | quality(np.concatenate(reference), np.concatenate(videos))
            for title, videos in others
        }
        for title, (_, seconds) in rows.items():
            self.comparison[title]["seconds"] = seconds
        self.say(quality_table(self.comparison))
        self.say(
            "PSNR, SSIM and MS-SSIM are against the un-cached rendering at the same seed; seconds are the whole "
            "pipeline's."
        )

    def saving(self, write, rename=None):
        """The host's `write(tensor=..., save_file=..., ...)`, made whole: under a temporary name, renamed, with a
        report."""

        @functools.wraps(write)
        def save(tensor, save_file, **kwargs):
            target = Path(save_file)
            if rename and self.report:
                target = target.with_name(rename(target.name))
            target = fitting(target)
            part = target.with_name(f".{os.getpid()}.part{target.suffix}")
            try:
                write(tensor=tensor, save_file=str(part), **kwargs)
                if not part.is_file():
                    raise MagCacheError(f"{target} could not be written; the host's message above says why.")
                part.replace(target)
            finally:
                with suppress(OSError):
                    part.unlink()
            self.saved(target, kwargs.get("fps"))
            return str(target)

        return save

    def saved(self, target, fps):
        """What lies beside the output: a report, on request a plot and a comparison."""
        self.say(f"Saved {target}")
        if not self.report:
            return
        if self.args.magcache_plot and not self.measuring:
            plot_schedule(
                target.with_suffix(".schedule.png"), self.report.schedule, self.report.levels, self.mag_ratios.name
            )
        if self.frames_rendered:
            sheet = target.with_name(f"{target.stem}_compare{target.suffix}")
            side_by_side(sheet, [videos[self.files_saved] for videos in self.frames_rendered.values()], fps)
            self.say(f"Side by side ({' | '.join(self.frames_rendered)}): {sheet}")
        write_report(
            target.with_suffix(".json"),
            self.report,
            task=self.task,
            size=self.size,
            frames=self.frames,
            **self.about,
            mag_ratios_of=self.mag_ratios.name,
            seconds_whole_pipeline=round(self.seconds, 4),
            quality=self.comparison,
            **({"measured": str(self.path)} if self.measuring else {}),
            **({"earlier_clips": [report.to_dict() for report in self.reports[:-1]]} if self.reports[1:] else {}),
        )
        self.files_saved += 1

    def say_what_differs(self):
        sampler = self.mag_ratios.sampler
        if "size" in sampler and (sampler["size"], sampler.get("frames", self.frames)) != (self.size, self.frames):
            frames = f", {sampler['frames']} frames" if "frames" in sampler else ""
            self.say_once(
                f"These ratios were measured at {sampler['size']}{frames}; this run is {self.size}, {self.frames} "
                "frames. --magcache_calibration measures anew."
            )

    def say_once(self, text):
        """What would be the same for every video of a session."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def say(self, text):
        if is_writer():
            tqdm.write(text)


def own_tables(task):
    """The calibrations of this machine that are for this task."""
    tables = (read(path) for path in sorted(calibrations_folder().glob(f"{task}-*.json")))
    return [table for table in tables if table.sampler.get("task") == task]


def volume(sampler):
    """Pixels of all frames: how alike two sizes are."""
    width, height = map(int, sampler["size"].split("x"))
    return width * height * sampler["frames"]


def timed(draw, steps):
    begin = time.perf_counter()
    return draw(steps), time.perf_counter() - begin


def as_frames(video):
    """A tensor (3, frames, height, width) in -1..1 as uint8 array (frames, height, width, 3)."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def fitting(path):
    """The path, its name cut where it leaves no room for the longer names beside it: a file system takes 255 bytes, and
    hosts put the prompt there."""
    return path.with_name(path.stem.encode()[:200].decode(errors="ignore") + path.suffix)
