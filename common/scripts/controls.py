"""MagCache's controls in a Gradio page, and the plan that follows them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import MagCacheError
from ..plan_text import plan_lines
from ..planner import Target
from ..schedule import Schedule, Settings
from ..tables import RatioTable

SPEEDUPS = {"off": None, "1.5x": 1.5, "2x": 2.0, "2.5x": 2.5, "3x": 3.0}
SILENT = {"queue": False, "show_progress": "hidden", "api_name": False}
SHOWN = {"resampled", "uncovered", "notes", "nothing", "out of reach"}  # kinds of `PlanLine` that a page shows


@dataclass(frozen=True)
class Choice:
    """The values of the controls, in their order. speedup: a key of SPEEDUPS."""

    use_magcache: bool
    calibrate: bool
    magcache_thresh: float
    magcache_K: int
    retention_ratio: float
    speedup: str

    @property
    def settings(self) -> Settings | Target:
        """For a run with MagCache: a Target if a speed-up is chosen, otherwise the paper's rule with the three
        settings."""
        if SPEEDUPS[self.speedup]:
            return Target(magcache_speedup=SPEEDUPS[self.speedup])
        return Settings(self.magcache_thresh, int(self.magcache_K), self.retention_ratio)


@dataclass(frozen=True)
class PagePlan:
    """A plan as a page shows it.

    summary: one line, visible even while the details are folded; strip: `Schedule.strip`, or ""; lines: the details.
    """

    summary: str
    strip: str = ""
    lines: tuple[str, ...] = ()


def page_plan(schedule: Schedule, levels: np.ndarray, table: RatioTable | None) -> PagePlan:
    """The plan of a run for a page. levels: its noise levels; table: from which it was made (None: from none)."""
    gain = f"{schedule.computed} of {schedule.steps} steps compute, at most {schedule.bound:.2f}x faster"
    if schedule.settings.magcache_speedup:
        gain = f"{schedule.settings.magcache_speedup:g}x: {gain}, the nearest possible"
    if schedule.why_none:
        gain = "every step computes"
    lines = [f"Ratios: {table.name} ({table.origin})"] if table else []
    lines += [line.text for line in plan_lines(schedule, levels, table) if line.kind in SHOWN]
    return PagePlan(gain, schedule.strip, tuple(line.strip() for line in lines))


class Controls:
    """MagCache's controls, created in the gradio block that is open: a checkbox, and the others folded under a line
    that shows the plan.

    gr: the module gradio, as the page's script imported it; start: the first values. `inputs`: the components, in the
    order of `Choice`.
    """

    def __init__(self, gr: Any, start: Choice) -> None:
        self.gr = gr
        self.use = gr.Checkbox(
            label="Use MagCache", value=start.use_magcache, info="Skip the steps that the plan shows."
        )
        with gr.Accordion("MagCache", open=False) as self.details:
            self.plan = gr.HTML()
            self.speedup = gr.Radio(
                label="MagCache target speed-up",
                choices=list(SPEEDUPS),
                value=start.speedup,
                info="Replaces the three settings below; needs no calibration.",
            )
            self.thresh = gr.Slider(
                label="MagCache threshold",
                minimum=0,
                maximum=1,
                step=0.005,
                value=start.magcache_thresh,
                info="Bound on the accumulated error. Higher is faster and less exact; 0 is off.",
            )
            self.most = gr.Slider(
                label="MagCache K",
                minimum=0,
                maximum=6,
                step=1,
                value=start.magcache_K,
                info="Most skipped steps in a row; 0 is off.",
            )
            self.retention = gr.Slider(
                label="MagCache retention ratio",
                minimum=0,
                maximum=1,
                step=0.01,
                value=start.retention_ratio,
                info="Share of the steps, from the first, that always compute.",
            )
            self.calibrate = gr.Checkbox(
                label="Calibrate",
                value=start.calibrate,
                info="The next job computes every step and measures this checkpoint; later jobs use the result.",
            )
        self.inputs = [self.use, self.calibrate, self.thresh, self.most, self.retention, self.speedup]

    def lines(self) -> Any:
        """A component for the lines of a job, created in the block that is open."""
        return self.gr.HTML(elem_classes="no-generating-animation")

    def connect(
        self,
        block: Any,
        plan: Callable[..., PagePlan],
        watched: Sequence[Any],
        at_load: Callable[[], bool],
        others: Sequence[Any] = (),
    ) -> None:
        """Update the plan whenever a control or a watched component changes.

        plan: (*values of `watched`, Choice) -> PagePlan, may raise MagCacheError; at_load: returns whether Use MagCache
        is ticked in a newly opened page; others: checkboxes of the page that exclude Use MagCache and Calibrate.
        """
        gr, boxes = self.gr, [self.use, self.calibrate, *others]
        for box in boxes:  # at most one is ticked; .input ignores the changes made here
            rest = [other for other in boxes if other is not box]
            box.input(partial(self.only, len(rest)), box, rest, **SILENT)
        sliders = [self.thresh, self.most, self.retention]
        self.speedup.change(lambda asked: updates(gr, 3, interactive=asked == "off"), self.speedup, sliders, **SILENT)
        inputs, shown = [*watched, *self.inputs], [self.details, self.plan]
        follow = partial(self.planned, plan, len(watched))
        gr.on([component.change for component in inputs], follow, inputs, shown, **SILENT)

        def opened(*values):
            ticked, choice = at_load(), [*values[len(watched) :]]
            choice[0] = ticked
            boxes_now = [gr.update(value=ticked), *updates(gr, len(others), **({"value": False} if ticked else {}))]
            return *boxes_now, *follow(*values[: len(watched)], *choice)

        block.load(opened, inputs, [self.use, *others, *shown], **SILENT)

    def plan_after(self, event: Any, plan: Callable[..., PagePlan], watched: Sequence[Any]) -> None:
        """Update the plan after an event of the page too, such as loading a model. plan, watched: see `connect`."""
        own, count = event.fn, len(event.outputs)

        def following(*values):
            result, now = own(*values[: len(event.inputs) - len(added)]), values[-len(added) :]
            shown = self.planned(plan, len(watched), *now)
            return *([result] if count == 1 else result), *shown

        added = [*watched, *self.inputs]
        event.fn, event.inputs, event.outputs = (
            following,
            [*event.inputs, *added],
            [*event.outputs, self.details, self.plan],
        )

    def follow_measurement(self, lines: Any, newly_measured: Callable[[], bool]) -> None:
        """After a job that calibrated, tick Use MagCache instead of Calibrate. The job's own event cannot do this:
        gradio greys out its outputs while it runs and after an error.

        lines: the component of `lines`; newly_measured: returns whether the job calibrated.
        """
        gr = self.gr

        def ticks(calibrate):
            return [gr.update(value=on) for on in (True, False)] if calibrate and newly_measured() else updates(gr, 2)

        lines.change(ticks, self.calibrate, [self.use, self.calibrate], **SILENT)

    def only(self, count: int, ticked: bool) -> Any:
        """Updates that clear the other `count` checkboxes if one was ticked."""
        changes = {"value": False} if ticked else {}
        return updates(self.gr, count, **changes) if count > 1 else self.gr.update(**changes)

    def planned(self, plan: Callable[..., PagePlan], watched: int, *values: Any) -> tuple[Any, str]:
        """(update of the folded line, the details as HTML). watched: how many of the values are not the controls'."""
        try:
            one = plan(*values[:watched], Choice(*values[watched:]))
        except MagCacheError as error:
            one = PagePlan("no plan", lines=(str(error),))
        return self.gr.update(label=f"MagCache: {one.summary}"), plan_html(one)


def updates(gr: Any, count: int, **what: Any) -> list[Any]:
    """As many equal updates of gradio, each its own object, because gradio changes them."""
    return [gr.update(**what) for _ in range(count)]


def plan_html(plan: PagePlan) -> str:
    """A plan as HTML."""
    return in_lines([plan.summary]) + (drawn(plan.strip) if plan.strip else "") + in_lines(plan.lines)


def in_lines(lines: Iterable[str]) -> str:
    """Lines of text as HTML."""
    return "".join(f"<div>{html.escape(line.strip())}</div>" for line in lines)


def drawn(strip: str) -> str:
    """A `Schedule.strip` as HTML: a row of coloured boxes, one per step."""
    kinds = {"#": ("computes", "--color-accent"), ".": ("is skipped", "--border-color-primary")}
    fields = "".join(
        f'<span title="step {step}: {kinds[letter][0]}" style="flex: 1; height: 1.2em; border-radius: 2px; '
        f'background: var({kinds[letter][1]})"></span>'
        for step, letter in enumerate(strip)
    )
    return f'<div style="display: flex; gap: 2px; margin: 6px 0" aria-label="{strip}">{fields}</div>'
