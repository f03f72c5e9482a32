"""One command of a drop-in: render with MagCache, calibrate or compare, and save the output whole."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..calibration import Statistics
from ..errors import MagCacheError
from ..files import part_of
from ..patch import Calibration, MagCache, magcache_calibration, magcache_forward
from ..planner import Target
from ..ranks import broadcast_from_writer, is_writer
from ..report import RunReport, write_report
from ..schedule import Rule, Settings, rule_of
from ..spread import refined_measure
from ..tables import RatioTable, best, calibrations, calibrations_folder, is_checkpoint, load
from .flags import (
    cache_options,
    check_calibration,
    check_family,
    check_writable,
    named_calibration,
    settings_of,
    target_of,
)
from .outputs import NAME_BYTES, beside, bookkeeping, files_of, fitting, own_place, put_in_place, report_place
from .plots import plot_schedule
from .quality import quality, quality_table, side_by_side

LEAST_STEPS = 5  # that a host measures unasked; shorter runs have nothing to skip


class Session:
    """One command of a drop-in: the patch on its models, and what came of each rendering.

    args: the flags of MagCache, parsed.
    script_settings: the script's magcache_thresh, magcache_K and retention_ratio for this task, by name.
    task: its name in files and sentences ("t2v-14B"). Ratios hold for one checkpoint and one task.
    size: "832x480"; frames: how many; steps: of the sampler.
    preset: name of the published table, or None; about: further entries of reports and calibration files.
    videos: (what the host's pipeline returns) -> its videos: tensors (3, frames, height, width) in -1..1, or uint8
        arrays (frames, height, width, 3).
    measures: whether, without known ratios, the first rendering is computed in full and measured for the next ones.
    one_task: whether the checkpoint serves only one task, so that any calibration of it fits.
    published_settings: whether the settings of the table, if it has some, win over the script's.
    sampler, models: of `RatioTable`, for a calibration.
    family: what the names of this model's presets begin with.
    weights: the checkpoint as the user named it, "" if unnamed.
    """

    measure = "--magcache_calibration"  # what a sentence calls the way to measure

    def __init__(
        self,
        args: argparse.Namespace,
        script_settings: dict,
        task: str,
        size: str,
        frames: int,
        steps: int,
        preset: str | None,
        about: dict,
        videos: Callable = lambda result: [result],
        measures: bool = False,
        one_task: bool = False,
        published_settings: bool = False,
        sampler: dict | None = None,
        models: tuple = (),
        family: str | tuple = "",
        weights: str = "",
    ):
        self.args, self.script_settings, self.task = args, script_settings, task
        self.size, self.frames, self.steps = size, frames, steps
        self.preset, self.about, self.videos = preset, about, videos
        self.measures, self.one_task, self.published_settings = measures, one_task, published_settings
        self.sampler, self.models = sampler or {}, models
        self.family, self.weights = family, weights
        self.calibrating = args.magcache_calibration is not None
        self.measuring = False
        self.statistics = Statistics()
        self.table: RatioTable | None = None
        self.handle: MagCache | Calibration | None = None
        self.calibration_path: Path | None = None
        self.reports: list[RunReport] = []  # of this output, newest last
        self.said: set[str] = set()
        self.seconds = 0.0  # of the last rendering, the whole pipeline's
        self.comparison: dict | None = None
        self.frames_rendered: dict[str, list] = {}
        self.files_saved = 0
        self.files: list[str] = []  # beside the outputs, written by the script itself

    # Before anything is loaded

    def check(self, output: str | Path, endings: tuple = ()) -> None:
        """Raises MagCacheError for what cannot work. output: the file to write, or any file in the folder to which the
        host writes; endings: those that the host can write (empty if it names its files itself)."""
        if not is_writer():
            return
        output = Path(output)
        check_writable("The output", output)
        if endings and output.suffix.lower() not in endings:
            raise MagCacheError(f"The output {output} has no ending that can be written: use {endings[0]}.")
        if len(output.name.encode()) > NAME_BYTES:
            raise MagCacheError(f"The name of the output is longer than {NAME_BYTES} bytes: {output.name}.")
        if self.calibrating:
            check_calibration(self.args, self.steps)
            return
        settings, target = settings_of(self.args, self.script_settings), target_of(self.args)
        if target and not target.needs_table and not self.args.mag_ratios:
            target.plan(None, np.linspace(1, 0, self.steps, endpoint=False))
            return
        own = [] if self.args.mag_ratios else self.own_tables()
        if not self.args.mag_ratios and not self.preset and not own and not self.measures:
            raise MagCacheError(self.no_table())
        table = self.named_table() or (load(self.preset) if self.preset else None)
        if table and not own:  # else only the weights tell which
            settings.plan(table, table.levels(self.steps))

    def no_table(self) -> str:
        return (
            f"No magnitude ratios are known for {self.task} with this checkpoint, and the paper's rule needs them. "
            "Ask for a speed-up, which needs none (--magcache_speedup 2), or measure them once (the same command with "
            "--magcache_calibration), or name a table (--mag_ratios PRESET|FILE), or run with --no-magcache."
        )

    # Which ratios, and the patch

    def own_tables(self, checkpoint: str | None = None) -> list[RatioTable]:
        """The calibrations of this machine for this task, and for this checkpoint (a fingerprint) if it is given."""
        found = calibrations(f"*-{checkpoint}*.json" if checkpoint else "*.json", self.say_once).values()
        return [
            table
            for table in found
            if checkpoint in (None, table.provenance.get("fingerprint"))
            and (self.one_task or table.sampler.get("task") == self.task)
        ]

    def named_table(self) -> RatioTable | None:
        """The table of --mag_ratios, or None. Raises MagCacheError for a preset of another family of models, and for a
        measurement too coarse to predict from."""
        name = self.args.mag_ratios
        if not name:
            return None
        table = load(name)
        check_family(name, self.family)
        target = target_of(self.args)
        if target and target.needs_table and not table.fine_enough(table.levels(self.steps)):
            raise MagCacheError(
                f"{name} was measured at {table.steps} steps, too few to predict a run of {self.steps}: "
                f"measure again with {self.measure}."
            )
        return table

    def find_table(self, checkpoint: str) -> RatioTable | None:
        """The table to use: the one named by a flag; otherwise this checkpoint's own for this task and the nearest
        size; otherwise the published one. None if there is none and this run is to measure it. A run that needs no
        table gets its own refined one (`spread.refined_measure`), or None. Raises MagCacheError if a table is
        missing."""
        if self.args.mag_ratios:
            return self.named_table()
        own = self.own_tables(checkpoint)
        if not self.settings().needs_table:
            return best(table for table in own if refined_measure(table))
        fine = [table for table in own if table.fine_enough(table.levels(self.steps))]
        for table in own:
            if table not in fine:
                self.say_once(f"Ignored: {table.name} has {table.steps} steps, too few for a run of {self.steps}.")
        if fine:
            away = [abs(volume(table.sampler) - volume(vars(self))) for table in fine]
            return best(table for table, distance in zip(fine, away) if distance == min(away))
        if not self.preset and not self.measures:
            raise MagCacheError(self.no_table())
        return load(self.preset) if self.preset else None

    def patch(
        self,
        models,
        host,
        timesteps,
        checkpoint: str,
        boundary: float | None = None,
        min_steps: int | None = None,
        scheduler=None,
    ):
        """Put MagCache, or a calibration, on the pipeline's transformer or experts, in the place of an earlier patch.
        Call it before anything else takes hold of their forward.

        checkpoint: fingerprint of the weights; min_steps: shorter runs compute every step (None: as the table says);
        models, host, timesteps, boundary, scheduler: as in `magcache_forward`.
        """
        self.unpatch()
        self.table = None if self.calibrating else broadcast_from_writer(lambda: self.find_table(checkpoint))
        self.measuring = self.table is None and (self.calibrating or self.settings().needs_table)
        if not self.measuring:
            if self.table:
                self.say_whose_ratios()
            rule = rule_of(self.table) if self.table else Rule()
            self.handle = magcache_forward(
                models,
                host,
                self.table,
                self.settings(),
                timesteps,
                rule if min_steps is None else replace(rule, min_steps=min_steps),
                announce=self.say_once,
                boundary=boundary,
                scheduler=scheduler,
                corrector=self.args.magcache_corrector == "on",
                **cache_options(self.args),
            )
        elif self.calibrating or self.steps >= LEAST_STEPS:
            if not self.calibrating:
                self.say(
                    f"No magnitude ratios are known for {self.task} with this checkpoint: this rendering computes "
                    "every step to measure them."
                )
            self.handle = self.calibration(models, host, timesteps, checkpoint, boundary)
        else:
            self.measuring = False
            self.say_once(f"A run of {self.steps} steps has nothing to skip; it is computed in full.")

    def unpatch(self) -> None:
        """Leave the models as they were."""
        if self.handle:
            self.handle.remove()
        self.handle = None

    @property
    def table_name(self):
        return self.table.name if self.table else "no ratios"

    def settings(self) -> Settings | Target:
        """What a run with `self.table` is planned for."""
        published = self.table.settings if self.table and self.published_settings else {}
        return settings_of(self.args, {**self.script_settings, **published})

    def calibration(self, models, host, timesteps, checkpoint, boundary):
        """A patch that renders un-cached and measures the magnitude ratios; only the writing rank saves them."""
        size = f"{self.size}x{self.frames}" if self.frames > 1 else self.size
        name = f"{self.task}-{size}"
        self.calibration_path = named_calibration(self.args) or calibrations_folder() / f"{name}-{checkpoint}.json"
        if is_writer():
            check_writable("The calibration file", self.calibration_path)
        sampler = {**self.sampler, "size": self.size, "frames": self.frames}
        if not self.one_task:
            sampler["task"] = self.task
        if boundary:
            sampler["boundary"] = boundary
        published = load(self.preset) if self.preset else None
        description = {
            "sampler": sampler,
            "models": self.models,
            "settings": published.settings if published and self.published_settings else self.script_settings,
            "rule": published.rule if published else {},
            "provenance": {
                "fingerprint": checkpoint,
                **self.about,
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
            },
        }
        return magcache_calibration(models, host, timesteps, name, self.calibration_path, description, self.statistics)

    # Rendering

    def render(self, draw: Callable, steps: int) -> Any:
        """Render as asked for; returns what the host's pipeline returns, for the host to save. draw: (steps) -> that,
        in one run of the sampler, or in several if a video is made in segments."""
        if self.files_saved:  # of an earlier rendering
            self.reports, self.comparison, self.frames_rendered, self.files_saved = [], None, {}, 0
        if self.handle is None:
            return draw(steps)
        if not self.measuring and self.table:
            self.say_what_differs()
        first = len(self.handle.reports)
        try:
            result, self.seconds = timed(draw, steps)
        except BaseException:
            self.handle.end_run()
            raise
        with self.bookkeeping("The measurement" if self.measuring else "The report"):
            self.handle.settle()
            self.handle.require_reached()
            if self.measuring:
                self.tell_measured()
            else:
                self.reports += self.handle.reports[first:]
                for number, report in enumerate(self.handle.reports[first:], start=1):
                    part = f"Segment {number}: " if len(self.handle.reports) - first > 1 else ""
                    self.say(part + report.line())
        if self.args.compare and self.report and not self.measuring:
            with self.bookkeeping("The comparison"), self.handle.paused():
                self.compare(draw, steps, result)
        return result

    def tell_measured(self):
        if self.handle.failure:
            raise self.handle.failure
        self.table, self.calibration_path = self.handle.table, self.handle.path
        hint = (
            f"use it with --mag_ratios {self.calibration_path}."
            if self.args.magcache_calibration
            else f"runs of {self.task} with this checkpoint use it from now on."
        )
        count = self.table.statistics["runs"]
        runs = "an un-cached run" if count == 1 else f"{count} un-cached runs"
        self.say(f"Measured in {runs}, saved as {self.calibration_path}; {hint}")
        if not self.calibrating:
            self.reports.append(self.handle.reports[-1])

    @property
    def report(self) -> RunReport | None:
        """That of the last rendering; None if there is nothing to report."""
        return self.reports[-1] if self.reports else None

    def compare(self, draw, steps, result):
        """Render un-cached, and by the plain sampler with as many steps as were computed, at the same seed."""
        computed = self.report.schedule.computed
        rows = {
            f"un-cached, {steps} steps": timed(draw, steps),
            f"MagCache, {computed} of {steps}": (result, self.seconds),
            f"plain sampler, {computed} steps": timed(draw, computed),
        }
        if not is_writer():
            return
        frames = {title: [as_frames(video) for video in self.videos(rendered)] for title, (rendered, _) in rows.items()}
        (first, reference), *others = frames.items()
        self.comparison = {first: {"steps": steps}} | {
            title: {"steps": computed} | quality(np.concatenate(reference), np.concatenate(videos))
            for title, videos in others
        }
        for title, (_, seconds) in rows.items():
            self.comparison[title]["seconds"] = seconds
        self.frames_rendered = frames
        self.say(quality_table(self.comparison))
        self.say(
            "PSNR, SSIM and MS-SSIM are against the un-cached rendering at the same seed; seconds are the whole "
            "pipeline's."
        )

    # Saving

    def saving(self, write: Callable, rename: Callable[[str], str] | None = None) -> Callable:
        """The host's `write(tensor=..., save_file=..., ...)`, but writing whole files or nothing, with a report beside
        them. rename: (the host's file name) -> the name to give the file."""

        @functools.wraps(write)
        def save(tensor, save_file, **kwargs):
            target = Path(save_file)
            if rename and self.report:
                target = target.with_name(rename(target.name))
            target = target.with_name(fitting(target.stem, target.suffix))
            part = part_of(target)
            try:
                write(tensor=tensor, save_file=str(part), **kwargs)
                if not part.is_file():
                    raise MagCacheError(f"{target} could not be written; the host's message above says why.")
                target = put_in_place(part, target)
            finally:
                with suppress(OSError):
                    part.unlink()
            self.saved(target, kwargs.get("fps"))
            return str(target)

        return save

    def saved(self, target: Path, fps: float | None = None, sheet: bool = True) -> None:
        """Write what goes beside the output: the report, and on request a plot and the comparison side by side. sheet:
        whether that is written here."""
        self.say(f"Saved {target}")
        number, self.files_saved = self.files_saved, self.files_saved + 1
        if not self.report:
            return
        files = [*files_of(target), *self.files]
        if self.args.magcache_plot and not self.measuring:
            with self.bookkeeping("The plot"):
                path = own_place(beside(target, ".schedule.png"), files)
                plot_schedule(path, self.report.schedule, self.report.levels, self.table_name)
                files.append(path.name)
        if self.frames_rendered and sheet:
            with self.bookkeeping("The side-by-side video" if fps else "The side-by-side image"):
                path = own_place(beside(target, f"_compare{target.suffix}"), files)
                side_by_side(path, [videos[number] for videos in self.frames_rendered.values()], fps)
                files.append(path.name)
                self.say(f"Side by side ({' | '.join(self.frames_rendered)}): {path}")
        with self.bookkeeping("The report"):
            write_report(
                report_place(target),
                self.report,
                task=self.task,
                size=self.size,
                frames=self.frames,
                **self.about,
                mag_ratios_of=self.table_name,
                seconds_whole_pipeline=round(self.seconds, 4),
                quality=self.comparison,
                files=sorted(set(files)),
                **({"measured": str(self.calibration_path)} if self.measuring else {}),
                **({"earlier_clips": [report.to_dict() for report in self.reports[:-1]]} if self.reports[1:] else {}),
            )

    def bookkeeping(self, what: str):
        """`outputs.bookkeeping`, told as this session tells things."""
        return bookkeeping(what, self.say)

    # Speaking

    def say_whose_ratios(self):
        published = self.table.origin == "published" and not self.args.mag_ratios
        if published and self.weights and not any(is_checkpoint(self.weights, known) for known in self.table.models):
            base = self.table.models[0] if self.table.models else "the base model"
            self.say_once(
                f"The ratios of {self.table.name} were published for {base}. If {self.weights} was trained further, "
                f"{self.measure} measures its own."
            )

    def say_what_differs(self):
        sampler = self.table.sampler
        if "size" in sampler and (sampler["size"], sampler.get("frames", self.frames)) != (self.size, self.frames):
            frames = f", {sampler['frames']} frames" if "frames" in sampler else ""
            self.say_once(
                f"These ratios were measured at {sampler['size']}{frames}; this run is {self.size}, {self.frames} "
                f"frames. {self.measure} measures again."
            )

    def say_once(self, text: str) -> None:
        """Say something only the first time, because it would be the same for each video of a session."""
        if text not in self.said:
            self.said.add(text)
            self.say(text)

    def say(self, text: str) -> None:
        if is_writer():
            tqdm.write(text)


def volume(sampler: dict[str, Any]) -> int:
    """Pixels of all frames, by which sizes are compared; 0 if there is no size. sampler: with "size" and "frames"."""
    if not sampler.get("size"):
        return 0
    width, height = map(int, sampler["size"].split("x"))
    return width * height * sampler.get("frames", 1)


def timed(draw, steps):
    begin = time.perf_counter()
    return draw(steps), time.perf_counter() - begin


def as_frames(video):
    """A tensor (3, frames, height, width) in -1..1 as uint8 array (frames, height, width, 3). An array is returned as
    it is."""
    if isinstance(video, np.ndarray):
        return video
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
