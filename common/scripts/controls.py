"""MagCache in a Gradio page: its controls, the plan that follows them, and the words for both."""

from __future__ import annotations

import html
from dataclasses import dataclass
from functools import partial

from ..errors import MagCacheError
from ..plan_text import plan_lines
from ..planner import Target
from ..schedule import Settings

SPEEDUPS = {"off": None, "1.5x": 1.5, "2x": 2.0, "2.5x": 2.5, "3x": 3.0}
SILENT = {"queue": False, "show_progress": "hidden", "api_name": False}
TOLD = {"resampled", "uncovered", "notes", "nothing", "out of reach"}  # kinds of lines that a page shows as they are


@dataclass(frozen=True)
class Choice:
    """What the controls say, in their order. speedup: a key of SPEEDUPS."""

    use_magcache: bool
    calibrate: bool
    magcache_thresh: float
    magcache_K: int
    retention_ratio: float
    speedup: str

    @property
    def settings(self) -> Settings | Target:
        """What a run with MagCache is to do: a Target where a speed-up is asked for, which the three settings have no
        part in."""
        if SPEEDUPS[self.speedup]:
            return Target(magcache_speedup=SPEEDUPS[self.speedup])
        return Settings(self.magcache_thresh, int(self.magcache_K), self.retention_ratio)


@dataclass(frozen=True)
class PagePlan:
    """What a page shows before anything runs. summary: one line, also while the details are folded away; strip: a
    letter a step, or ""; lines: more of them."""

    summary: str
    strip: str = ""
    lines: tuple = ()


def page_plan(schedule, levels, table) -> PagePlan:
    """The plan of a run in the words of a page."""
    gain = f"{schedule.computed} of {schedule.steps} steps compute, at most {schedule.bound:.2f}x faster"
    if schedule.settings.magcache_speedup:
        gain = f"{schedule.settings.magcache_speedup:g}x: {gain}, the nearest possible"
    if schedule.why_none:
        gain = "every step computes"
    lines = [f"Ratios: {table.name} ({table.origin})"] if table else []
    lines += [line.text for line in plan_lines(schedule, levels, table) if line.kind in TOLD]
    return PagePlan(gain, schedule.strip, tuple(line.strip() for line in lines))


class Controls:
    """MagCache's controls, made in the block that is open: a tick, and the rest folded away under a line that says what
    is planned.

    gr: the module gradio, which a page's own script imports first. start: the values that the controls start with.
    `inputs`: the components, in the order of `Choice`.
    """

    def __init__(self, gr, start: Choice):
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

    def lines(self):
        """A place for the lines of a job, made in the block that is open."""
        return self.gr.HTML(elem_classes="no-generating-animation")

    def connect(self, block, plan, watched, at_load, others=()):
        """Let the plan follow the controls. plan(*values of `watched`, Choice) -> PagePlan, which may raise
        MagCacheError; at_load() -> whether Use MagCache is ticked in a page that is opened; others: boxes of the page
        that exclude Use MagCache and Calibrate."""
        gr, boxes = self.gr, [self.use, self.calibrate, *others]
        for box in boxes:  # at most one is ticked; .input: by the user, not by this
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

    def plan_after(self, event, plan, watched):
        """Let the plan follow an event of the page, too, which may load a model; it is no output of a job."""
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

    def follow_measurement(self, lines, newly_measured):
        """Tick Use MagCache, and Calibrate no more, after a job that measured. Not by the job: gradio covers what
        that writes to while it runs, and after an error. lines: where the lines of a job are shown; newly_measured:
        () -> whether that was such a job."""
        gr = self.gr

        def ticks(calibrate):
            return [gr.update(value=on) for on in (True, False)] if calibrate and newly_measured() else updates(gr, 2)

        lines.change(ticks, self.calibrate, [self.use, self.calibrate], **SILENT)

    def only(self, count, ticked):
        changes = {"value": False} if ticked else {}
        return updates(self.gr, count, **changes) if count > 1 else self.gr.update(**changes)

    def planned(self, plan, watched, *values):
        """(the folded line, the details)"""
        try:
            one = plan(*values[:watched], Choice(*values[watched:]))
        except MagCacheError as error:
            one = PagePlan("no plan", lines=(str(error),))
        return self.gr.update(label=f"MagCache: {one.summary}"), plan_html(one)


def updates(gr, count, **what):
    return [gr.update(**what) for _ in range(count)]  # gradio takes each apart, so they must not be one


def plan_html(plan: PagePlan) -> str:
    return in_lines([plan.summary]) + (drawn(plan.strip) if plan.strip else "") + in_lines(plan.lines)


def in_lines(lines) -> str:
    return "".join(f"<div>{html.escape(line.strip())}</div>" for line in lines)


def drawn(strip: str) -> str:
    """A `Schedule.strip` as a row of fields, one a step."""
    kinds = {"#": ("computes", "--color-accent"), ".": ("is skipped", "--border-color-primary")}
    fields = "".join(
        f'<span title="step {step}: {kinds[letter][0]}" style="flex: 1; height: 1.2em; border-radius: 2px; '
        f'background: var({kinds[letter][1]})"></span>'
        for step, letter in enumerate(strip)
    )
    return f'<div style="display: flex; gap: 2px; margin: 6px 0" aria-label="{strip}">{fields}</div>'
