"""FramePack's Gradio page with MagCache: the demo's module, with more controls in its page and more flags."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from magcache_framepack import FramePackJobs

from common.errors import MagCacheError, needs
from common.scripts.checkout import checkouts_script, one_sentence
from common.scripts.controls import Choice, Controls, in_lines, updates
from common.scripts.flags import check_calibration_file, flags_taken
from common.scripts.page import launch_held_back
from common.tables import load, preset_names

NEEDED = (
    "block",
    "use_teacache",
    "steps",
    "total_second_length",
    "latent_window_size",
    "ips",
    "process",
    "worker",
    "sample_hunyuan",
    "transformer",
    "progress_bar",
)


@one_sentence
def main(*, page: str, settings: tuple[float, int, float], published: str, folder: Path) -> None:
    """Run the checkout's demo with MagCache.

    page: name of its script; settings: (magcache_thresh, magcache_K, retention_ratio), where the sliders start;
    published: preset for its checkpoint; folder: of the script and the demo.
    """
    args = flags_taken(add_framepack_flags)
    check_page_flags(args)
    check_gradio(folder / "requirements.txt")
    with launch_held_back() as launches:
        demo = checkouts_script(page, "FramePack", "MagCache4FramePack")
    click, missing = click_of(demo), [name for name in NEEDED if not hasattr(demo, name)]
    if not launches or click is None:
        why = (
            f"no {', '.join(missing)}"
            if missing
            else "no launch"
            if not launches
            else "its button starts something else"
        )
        raise MagCacheError(
            f"The page of this {page}.py has changed so that MagCache's controls do not fit ({why}); run {page}.py "
            "itself, or take a newer MagCache."
        )
    add_framepack_controls(demo, click, FramePackJobs(demo, args, settings, published), sys.modules["gradio"])
    demo.block.launch(*launches[0].args, **launches[0].options)


def add_framepack_flags(parser: argparse.ArgumentParser) -> None:
    """MagCache's flags of the demos."""
    group = parser.add_argument_group("MagCache")
    group.add_argument(
        "--magcache_calibration",
        nargs="?",
        const="",
        metavar="FILE",
        help="start with Calibrate ticked; the measured ratios go to FILE, by default where the page finds them again",
    )
    group.add_argument(
        "--magcache_all_tokens",
        action="store_true",
        help="calibrate on all tokens, the packed frames too, as the published tables were",
    )
    group.add_argument(
        "--mag_ratios", metavar="PRESET|FILE", help="ratios to use instead of those found for the checkpoint"
    )


def check_page_flags(args: argparse.Namespace) -> None:
    """Raises MagCacheError for what cannot work, before any weights are loaded."""
    if args.mag_ratios:
        load(args.mag_ratios)
        if args.mag_ratios in preset_names() and not args.mag_ratios.startswith("framepack"):
            raise MagCacheError(f"{args.mag_ratios} holds the ratios of another model; take framepack or framepack-f1.")
    check_calibration_file(args)
    torchvision = needs("torchvision", "torchvision")
    if not hasattr(torchvision.io, "write_video"):
        raise MagCacheError(
            "FramePack saves its videos with torchvision.io.write_video, which torchvision "
            f"{torchvision.__version__} no longer has; install an older one with the torch that goes with it."
        )


def check_gradio(requirements: Path) -> None:
    """Raises MagCacheError for another major version of gradio than requirements.txt pins, which would fail only after
    the weights are loaded. Does not import gradio: that reads HF_HOME, which the demo sets first."""
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        raise MagCacheError(f"This needs the package gradio: pip install -r {requirements}") from None
    pins = (
        [
            line.partition("==")[2].strip()
            for line in requirements.read_text(encoding="utf-8").splitlines()
            if line.replace(" ", "").startswith("gradio==")
        ]
        if requirements.is_file()
        else []
    )
    if pins and pins[0].split(".")[0] != installed.split(".")[0]:
        raise MagCacheError(
            f"This FramePack pins gradio {pins[0]} and its page does not run with gradio {installed}; "
            f"pip install gradio=={pins[0]} puts that right."
        )


def click_of(demo: Any) -> Any:
    """The gradio event that starts a job; None: the page has changed."""
    if not all(hasattr(demo, name) for name in NEEDED):
        return None
    return next((event for event in demo.block.fns.values() if event.fn is demo.process), None)


def add_framepack_controls(demo: Any, click: Any, jobs: FramePackJobs, gradio: Any) -> None:
    """Put MagCache's controls below "Use TeaCache", and the lines of a job below the progress bar. The values of the
    controls go to the event `click`, which starts a job."""
    calibrating = jobs.args.magcache_calibration is not None
    start = Choice(jobs.starts_cached(), calibrating, *jobs.settings.values(), "off")
    demo.use_teacache.value = demo.use_teacache.value and not (start.use_magcache or calibrating)
    with demo.block:
        with demo.use_teacache.parent as group:
            before = len(group.children)
            controls = Controls(gradio, start)
        ours = group.children[before:]
        place = group.children.index(demo.use_teacache) + 1
        group.children[place:] = [*ours, *group.children[place:before]]
        with demo.progress_bar.parent:
            lines = controls.lines()
        watched = [demo.steps, demo.total_second_length, demo.latent_window_size, demo.use_teacache]
        controls.connect(demo.block, jobs.plan, watched, jobs.starts_cached, [demo.use_teacache])
        controls.follow_measurement(lines, jobs.newly_measured)

    own = len(click.outputs)

    def process(*values):
        try:
            for outputs, text in jobs.process(*values):
                yield *(outputs or updates(gradio, own)), in_lines(text)
        except MagCacheError as error:
            raise gradio.Error(str(error)) from None

    click.fn, click.inputs, click.outputs = process, [*click.inputs, *controls.inputs], [*click.outputs, lines]
