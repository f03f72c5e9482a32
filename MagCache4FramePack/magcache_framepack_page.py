"""FramePack's Gradio page with MagCache: the demo's own module, its page with more controls, its flags with ours."""

from __future__ import annotations

import html
import sys
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from magcache_framepack import SPEEDUPS, Jobs

from common.errors import MagCacheError, needs
from common.scripts.checkout import checkouts_script, one_sentence
from common.scripts.flags import flags_taken
from common.scripts.session import check_calibration_file
from common.tables import load

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
)


@one_sentence
def main(*, page: str, settings: tuple, published: str, folder: Path):
    """Run the checkout's demo with MagCache.

    page: name of its script; settings: (magcache_thresh, magcache_K, retention_ratio) that the sliders start at;
    published: table of its checkpoint; folder: where the script and the demo lie.
    """
    args = flags_taken(add_flags)
    check_flags(args)
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
    add_controls(demo, click, Jobs(demo, args, settings, published), sys.modules["gradio"])
    launch_args, options = launches[0]
    demo.block.launch(*launch_args, **options)


def add_flags(parser):
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


def check_flags(args):
    """Find what cannot work before any weights are loaded."""
    if args.mag_ratios:
        load(args.mag_ratios)
    check_calibration_file(args)
    torchvision = needs("torchvision", "torchvision")
    if not hasattr(torchvision.io, "write_video"):
        raise MagCacheError(
            "FramePack saves its videos with torchvision.io.write_video, which torchvision "
            f"{torchvision.__version__} no longer has; install an older one with the torch that goes with it."
        )


def check_gradio(requirements):
    """The page is written for the gradio that the checkout pins; another major version fails after the weights are
    loaded. It is not imported here: it reads HF_HOME, which the demo sets first."""
    try:
        installed = version("gradio")
    except PackageNotFoundError:
        raise MagCacheError(f"This needs the package gradio: pip install -r {requirements}") from None
    pins = (
        [
            line.partition("==")[2].strip()
            for line in requirements.read_text().splitlines()
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


class WhenImported:
    """A finder that calls `then(module)` after the module `name` was imported."""

    def __init__(self, name, then):
        self.name, self.then = name, then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


@contextmanager
def launch_held_back(package="gradio"):
    """For its duration gradio launches no page; a list of the (args, kwargs) with which it would have. gradio is left
    for the demo to import, which sets HF_HOME before."""
    launches, plain = [], []

    def launch(self, *args, **kwargs):
        launches.append((args, kwargs))

    def hold_back(gradio):
        plain.append((gradio.Blocks, gradio.Blocks.launch))
        gradio.Blocks.launch = launch

    finder = WhenImported(package, hold_back)
    if package in sys.modules:
        hold_back(sys.modules[package])
    else:
        sys.meta_path.insert(0, finder)
    try:
        yield launches
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for blocks, of_gradio in plain:
            blocks.launch = of_gradio


def click_of(demo):
    """The event of gradio that starts a job, or None where the page is not as it was."""
    if all(hasattr(demo, name) for name in NEEDED):
        return next((event for event in demo.block.fns.values() if event.fn is demo.process), None)


def add_controls(demo, click, jobs, gr):
    """Put MagCache's controls below "Use TeaCache", and its values and lines into the click that starts a job."""
    starts_calibrating = jobs.args.magcache_calibration is not None
    starts_cached = jobs.table is not None and not starts_calibrating

    def updates(count, **what):
        return [gr.update(**what) for _ in range(count)]  # gradio takes each apart, so they must not be one

    silent = {"queue": False, "show_progress": "hidden", "api_name": False}
    demo.use_teacache.value = demo.use_teacache.value and not (starts_cached or starts_calibrating)
    with demo.block:
        with demo.use_teacache.parent as group:
            before = len(group.children)
            use = gr.Checkbox(
                label="Use MagCache", value=starts_cached, info="Skips the steps that the plan below shows."
            )
            calibrate = gr.Checkbox(
                label="Calibrate",
                value=starts_calibrating,
                info="Runs un-cached, measures the magnitude "
                "ratios of this checkpoint over all sections and uses them from then on.",
            )
            thresh = gr.Slider(
                label="MagCache_thresh",
                minimum=0,
                maximum=1,
                step=0.005,
                value=jobs.settings["magcache_thresh"],
                info="Bound on the accumulated error. Larger is faster and less exact; 0 turns it off.",
            )
            most = gr.Slider(
                label="MagCache_K",
                minimum=0,
                maximum=5,
                step=1,
                value=jobs.settings["magcache_K"],
                info="Most reuses in a row; 0 turns it off.",
            )
            retention = gr.Slider(
                label="MagCache retention ratio",
                minimum=0,
                maximum=1,
                step=0.01,
                value=jobs.settings["retention_ratio"],
                info="Share of the steps, from the first, that computes.",
            )
            speedup = gr.Radio(
                label="MagCache target speed-up",
                choices=list(SPEEDUPS),
                value="off",
                info="Instead of the three settings above; best after a calibration.",
            )
            controls = [use, calibrate, thresh, most, retention, speedup]
            inputs = [demo.steps, demo.total_second_length, demo.latent_window_size, *controls]
            plan = gr.HTML(planned(jobs, *(component.value for component in inputs)), container=True)
            lines = gr.HTML(container=True, visible=False)
        ours = group.children[before:]
        place = group.children.index(demo.use_teacache) + 1
        group.children[place:] = [*ours, *group.children[place:before]]

        boxes = [use, calibrate, demo.use_teacache]
        for box in boxes:  # at most one is ticked; .input: by the user, not by this
            others = [other for other in boxes if other is not box]
            box.input(lambda ticked: updates(2, value=False) if ticked else updates(2), box, others, **silent)
        speedup.change(
            lambda asked: updates(3, interactive=asked == "off"), speedup, [thresh, most, retention], **silent
        )
        gr.on([component.change for component in inputs], partial(planned, jobs), inputs, plan, **silent)

    own = len(click.outputs)

    def process(*values):
        try:
            for outputs, text, measured in jobs.process(*values):
                ticks = [gr.update(value=True), gr.update(value=False)] if measured else updates(2)
                yield (*(outputs or updates(own)), gr.update(value=in_lines(text), visible=bool(text)), *ticks)
        except MagCacheError as error:
            raise gr.Error(str(error)) from None

    click.fn, click.inputs, click.outputs = process, [*click.inputs, *controls], [*click.outputs, lines, use, calibrate]


def planned(jobs, *values):
    """The plan of the controls' values as HTML, the strip of steps drawn; or what is wrong with them."""
    try:
        lines = jobs.plan(*values)
    except MagCacheError as error:
        lines = [str(error)]
    if len(lines) == 1:
        return in_lines(lines)
    title, strip, *rest = lines
    return in_lines([title]) + drawn(strip.split()[0]) + in_lines(rest)


def in_lines(lines):
    return "".join(f"<div>{html.escape(line.strip())}</div>" for line in lines)


def drawn(strip):
    """A `Schedule.strip` as a row of fields, one a step."""
    kinds = {"#": ("computes", "--color-accent"), ".": ("reuses", "--border-color-primary")}
    fields = "".join(
        f'<span title="step {step}: {kinds[letter][0]}" style="flex: 1; height: 1.2em; border-radius: 2px; '
        f'background: var({kinds[letter][1]})"></span>'
        for step, letter in enumerate(strip)
    )
    return f'<div style="display: flex; gap: 2px; margin: 6px 0" aria-label="{strip}">{fields}</div>'
