"""A host's own Gradio page with MagCache's controls.

The host's script runs unchanged, except that its page is launched only after the controls were added. The page's button
starts the same function as before; the pipeline that this function calls asks `Jobs` whether to use MagCache.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import MagCacheError
from ..tables import load
from .controls import Choice, Controls, PagePlan, in_lines, page_plan
from .flags import DTYPES, add_magcache_flags, check_calibration, check_family, check_flags, flags_and_rest
from .outputs import REPORT, beside, report_at
from .session import Session

UNWATCHED = ("image", "video", "gallery", "file", "audio")  # components on which no plan depends


class Launch(NamedTuple):
    """A page that a script wanted to launch, and the arguments of `launch`."""

    block: Any
    args: tuple
    options: dict


class WhenImported:
    """An entry of sys.meta_path that calls `then(module)` once the module `name` was imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec of the module, whose execution ends with `then`; None for other modules."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec: Any = find_spec(name)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module
        return spec


@contextmanager
def when_imported(name: str, then: Callable[[Any], None]) -> Iterator[None]:
    """A context that calls `then(module)` as soon as the module is imported, or at once if it is already. A page's
    script can then set environment variables before it imports the modules that read them."""
    finder = WhenImported(name, then)
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)


@contextmanager
def launch_held_back(package: str = "gradio") -> Iterator[list[Launch]]:
    """A context in which gradio launches no page. Gives the list of launches that were held back."""
    launches: list[Launch] = []
    plain: list[tuple[Any, Any]] = []

    def launch(self, *args, **options):
        launches.append(Launch(self, args, options))

    def hold_back(gradio):
        plain.append((gradio.Blocks, gradio.Blocks.launch))
        gradio.Blocks.launch = launch

    try:
        with when_imported(package, hold_back):
            yield launches
    finally:
        for blocks, of_gradio in plain:
            blocks.launch = of_gradio


class PageSession(Session):
    """A `Session` whose messages suit a page.

    lines: gets the messages that the page shows; planning: only a plan is made, so nothing goes to the console.
    """

    measure = "Calibrate"

    def __init__(self, *args: Any, lines: list[str], planning: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lines, self.planning = lines, planning

    def no_table(self) -> str:
        return (
            f"The magnitude ratios of this checkpoint are not known for {self.task}: choose a target speed-up under "
            "MagCache, which needs none, or tick Calibrate there and run one job."
        )

    def say(self, text: str) -> None:
        self.lines.append(text)
        if not self.planning:
            super().say(text)

    def say_once(self, text: str) -> None:
        """Of the plan and its ratios, which the page shows with its controls and not with a job."""
        if self.planning:
            self.lines.append(text)
        else:
            Session.say(self, text)


@dataclass
class Job:
    """One press of the page's button, or the search for its plan. session: renders it; None: without MagCache."""

    choice: Choice
    planning: bool = False
    lines: list[str] = field(default_factory=list)
    session: PageSession | None = None


class Planned(BaseException):
    """Raised with the plan to end the page's own function before it renders. Not an Exception, which that might
    catch."""

    def __init__(self, plan: PagePlan) -> None:
        self.plan = plan


class Jobs:
    """The jobs of a page.

    args: of `flags_of_page`; plain: the function that the page's button starts, set by `add_controls`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.plain: Any = None
        # The job of this thread: plans are made while another thread renders.
        self.now: ContextVar[Job | None] = ContextVar("job", default=None)
        self.measured = False  # since the page last asked

    def session(
        self, make: Callable[..., PageSession], checkpoint: str, levels: Callable[[], np.ndarray]
    ) -> PageSession | None:
        """The session with which a pipeline must render now; None: without MagCache.

        make: (args=..., lines=..., planning=...) -> the PageSession; checkpoint: fingerprint of the weights; levels:
        returns the noise levels of the rendering. Raises Planned if only the plan is wanted, and MagCacheError for
        settings that cannot work.
        """
        job = self.now.get()
        if job is None or not (job.choice.use_magcache or job.choice.calibrate):
            return None
        session = make(args=self.args_of(job.choice), lines=job.lines, planning=job.planning)
        if job.planning:
            raise Planned(plan_of(session, checkpoint, levels()))
        check_calibration(session.args, session.steps)
        job.session = session
        return session

    @property
    def planning(self) -> bool:
        """Whether the page's function runs only to find the plan, so that slow work can be left out."""
        job = self.now.get()
        return job is not None and job.planning

    def args_of(self, choice: Choice) -> argparse.Namespace:
        """MagCache's flags with the values of the controls."""
        settings = choice.settings
        asked = vars(settings) if choice.speedup == "off" else {"magcache_speedup": settings.magcache_speedup}
        measuring = "" if choice.calibrate else None
        return argparse.Namespace(**{**vars(self.args), **asked, "magcache_calibration": measuring})

    def plan(self, inputs: Sequence, choice: Choice) -> PagePlan:
        """The plan of a job. inputs: of the page's function. Raises MagCacheError for settings that cannot work."""
        if choice.calibrate:
            return PagePlan("the next job computes every step and measures this checkpoint")
        if not choice.use_magcache:
            return PagePlan("off, every step computes")
        before = self.now.set(Job(choice, planning=True))
        try:
            self.plain(*inputs)
        except Planned as planned:
            return planned.plan
        except MagCacheError:
            raise
        except Exception:  # the page's own, for bad settings or a model that is not loaded yet
            pass
        finally:
            self.now.reset(before)
        return PagePlan("the plan comes with the model", lines=("The page has not loaded a model for these settings.",))

    def run(self, inputs: Sequence, choice: Choice) -> tuple[Any, list[str]]:
        """Run a job: (result of the page's function, lines to show). Raises what that function raises."""
        job = Job(choice)
        before = self.now.set(job)
        try:
            result = self.plain(*inputs)
        finally:
            self.now.reset(before)
        self.measured = self.measured or bool(job.session and job.session.calibrating and job.session.table)
        for path in files_in(result)[:1]:
            if job.session and job.session.report:
                job.session.saved(path)
            else:
                drop_report(path)
        return result, job.lines

    def newly_measured(self) -> bool:
        """Whether ratios were measured since this was last asked."""
        measured, self.measured = self.measured, False
        return measured


def plan_of(session: PageSession, checkpoint: str, levels: np.ndarray) -> PagePlan:
    """The plan of a rendering. checkpoint: fingerprint of the weights. Raises MagCacheError if there is none."""
    session.table = session.find_table(checkpoint)
    settings: Any = session.settings()
    schedule = settings.plan(session.table, levels)
    plan = page_plan(schedule, levels, session.table)
    if session.table and not session.args.mag_ratios:
        session.say_whose_ratios()
        session.say_what_differs()
    return PagePlan(plan.summary, plan.strip, (*plan.lines, *session.lines))


def files_in(result: Any) -> list[Path]:
    """The existing files that a page's function returned: one path, or several, of which the first is the newest."""
    paths = [Path(one) for one in (result if isinstance(result, (list, tuple)) else [result]) if isinstance(one, str)]
    return [path for path in paths if path.is_file()]


def drop_report(path: Path) -> None:
    """Remove the report of an earlier video of this name: some pages give all videos one name."""
    report = beside(path, REPORT)
    if report_at(report):
        report.unlink()


# Building the page


def flags_of_page(argv: list[str], family: str) -> tuple[argparse.Namespace, list[str]]:
    """(MagCache's flags, the rest of argv). Flags that the controls of the page replace have their defaults.

    family: the beginning of the names of presets that fit the page's model. Raises MagCacheError for flags that cannot
    work, or if gradio is missing.
    """
    args, rest = flags_and_rest(add_flags, argv)
    defaults, _ = flags_and_rest(add_magcache_flags, [])
    args = argparse.Namespace(**{**vars(defaults), **vars(args)})
    check_flags(args)
    if args.mag_ratios:
        load(args.mag_ratios)
        check_family(args.mag_ratios, family)
    try:
        version("gradio")
    except PackageNotFoundError:
        raise MagCacheError(
            "This needs the package gradio, which the page itself needs: install the checkout's requirements.txt."
        ) from None
    return args, rest


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a page."""
    group = parser.add_argument_group("MagCache")
    group.add_argument(
        "--mag_ratios", metavar="PRESET|FILE", help="ratios to use instead of those found for the checkpoint"
    )
    group.add_argument("--magcache_cache_device", metavar="DEVICE", help="keep residuals there (cpu saves GPU memory)")
    group.add_argument("--magcache_cache_dtype", choices=DTYPES, help="keep residuals in this type")


def run_page(script: Path, jobs: Jobs, settings: Callable[[], tuple[float, int, float]]) -> None:
    """Run the host's script, add MagCache's controls to its page, and launch it.

    settings: called after the script has run; returns (magcache_thresh, magcache_K, retention_ratio), the first values
    of the controls. Raises MagCacheError if the controls do not fit into the page.
    """
    sys.path[0] = str(script.parent)  # as Python does for a script
    with launch_held_back() as launches:
        runpy.run_path(str(script), run_name="__main__")
    starts = [event for event in launches[-1].block.fns.values() if takes_steps(event)] if launches else []
    if len(starts) != 1:
        raise MagCacheError(
            f"The page of this {script.name} has changed so that MagCache's controls do not fit "
            f"({len(starts)} of its buttons take a number of steps); run {script.name} itself, or take a newer "
            "MagCache."
        )
    block, args, options = launches[-1]
    add_controls(sys.modules["gradio"], block, starts[0], jobs, settings())
    block.launch(*args, **options)


def takes_steps(event: Any) -> bool:
    """Whether an event of gradio has an input for the number of steps, which marks the button that renders."""
    labels = [str(getattr(component, "label", "")) for component in event.inputs]
    return any(label.lower().replace("_", " ").endswith("steps") for label in labels)


def add_controls(gradio: Any, block: Any, event: Any, jobs: Jobs, settings: tuple[float, int, float]) -> None:
    """Put the controls above the button and the lines of a job below it, and pass the controls' values to its event.

    gradio: the module; block: the page; event: of the button that renders; settings: see `run_page`.
    """
    jobs.plain, own, count = event.fn, list(event.inputs), len(event.outputs)
    watched = [component for component in own if is_watched(component)]
    places = [next(index for index, component in enumerate(own) if component is one) for one in watched]
    before = [getattr(component, "value", None) for component in own]

    def inputs_of(values):
        inputs = list(before)
        for place, value in zip(places, values):
            inputs[place] = value
        return inputs

    def plan(*values):
        return jobs.plan(inputs_of(values[:-1]), values[-1])

    def starts_cached():
        try:
            plan(*(before[place] for place in places), Choice(True, False, *settings, "off"))
        except MagCacheError:
            return False
        return True

    row = place_of(block.blocks[event.targets[0][0]], gradio)
    with block, row.parent as group:
        at = len(group.children)
        controls = Controls(gradio, Choice(starts_cached(), False, *settings, "off"))
        above = group.children[at:]
        lines = controls.lines()
        here = next(index for index, child in enumerate(group.children) if child is row)
        group.children[here:] = [*above, row, lines, *group.children[here + 1 : at]]
    with block:
        controls.connect(block, plan, watched, starts_cached)
        controls.follow_measurement(lines, jobs.newly_measured)

    def start(*values):
        try:
            result, text = jobs.run(values[: len(own)], Choice(*values[len(own) :]))
        except MagCacheError as error:
            raise gradio.Error(str(error)) from None
        return *([result] if count == 1 else result), in_lines(text)

    for other in block.fns.values():  # an event that sets a watched component, such as loading a model
        if other is not event and any(one is component for one in other.outputs for component in watched):
            controls.plan_after(other, plan, watched)
    event.fn, event.inputs, event.outputs = start, [*own, *controls.inputs], [*event.outputs, lines]


def is_watched(component: Any) -> bool:
    """Whether a plan may depend on a component: not on images or prose."""
    if component.get_block_name() == "textbox":
        return str(component.value).isdigit()
    return component.get_block_name() not in UNWATCHED


def place_of(button: Any, gradio: Any) -> Any:
    """The component above which the controls go: the button, or the whole row that it is in."""
    place = button
    while isinstance(place.parent, gradio.Row) or (len(place.parent.children) == 1 and place.parent.parent is not None):
        place = place.parent
    return place
