"""One pass of a sampler: what is decided before each call of the model, and what is kept after it.

Whoever runs the model (`handle.py` through the forward of an instance, another front end in its own way) tells which
step and which conditioning each part of a call's batch is (`steps.Part`), and makes the call in between:

    call = run.begin(parts, payload, arguments)
    try:
        output = forward() if call.output is None else call.output
        output = call.finish(output)
    except BaseException:
        call.cancel()
        raise
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .calibration import Statistics
from .conditioning import CHANGED
from .corrector import Folded, Replay, follower_of
from .errors import MagCacheError
from .guard import Guard
from .payloads import ModelOutput, Payload, Residual, leading_tokens
from .ratios import Levels
from .report import RunReport
from .residuals import Residuals
from .schedule import Schedule, compute_all
from .steps import Part
from .timing import Stopwatch, time_reuse


class ModelCall:
    """One call of the model, from `Run.begin` to `finish` or `cancel`. It owns its run and the stand-ins on the model.

    reused: whether a prediction takes the place of the blocks; why: the reason if it computes unplanned, otherwise "".
    output: the model's output, where that is predicted and no forward is needed; otherwise None.
    """

    def __init__(self, run: Run, parts: Sequence[Part], payload: Payload, arguments: dict | None, compute: str) -> None:
        self.run, self.parts, self.payload, self.arguments = run, parts, payload, arguments
        payload.key = tuple(part.key for part in parts)
        self.stopwatch = Stopwatch(parts[0].latent.device)
        predicted, self.why = run.predict(parts, compute)
        self.reused, self.output = predicted is not None, None
        if predicted is None:
            run.before_computing(parts)
            payload.record(arguments)
        else:
            self.output = payload.replace(predicted)

    def finish(self, output: Any, rehearse: Callable[[], Any] | None = None) -> Any:
        """After the call; returns the output that the sampler is to get. rehearse: makes the call again, to prove the
        facts and to time it without its blocks (None: it cannot be)."""
        run, seconds = self.run, self.stopwatch.stop()
        if self.reused:
            self.payload.restore()
        else:
            try:
                made = self.payload.finish(output)
            except MagCacheError as error:
                made, self.why = None, run.nothing_recorded(error)
            if made is not None:
                if rehearse is not None and isinstance(self.payload, Residual):
                    made, output, told = self.payload.prove(made, output, rehearse)
                    run.report.verified = self.payload.kind == "residual"
                    if told:
                        run.facts_are_wrong(told)
                run.computed(self, made, output, rehearse)
        run.report.add(self.parts[0].call, "reused" if self.reused else "computed", seconds, self.why)
        for observe in run.observers:
            observe(self, output)
        return run.followed(self, output)

    def cancel(self) -> None:
        """After an exception: leave nothing on the model."""
        self.payload.restore()


class Run:
    """One pass of a sampler that computes everything and keeps nothing; `CachedRun` and `MeasuredRun` override that.

    levels: noise levels of its steps, high to low, in 0..1; report: what was done; observers: functions of (ModelCall,
    the model's output), called after each call; measures: whether residuals are measured and none reused.
    """

    measures = False

    def __init__(self, schedule: Schedule, levels: Levels) -> None:
        self.schedule, self.levels = schedule, [float(level) for level in levels]
        self.report = RunReport(schedule, self.levels)
        self.observers: list[Callable[[ModelCall, Any], None]] = []

    def begin(
        self, parts: Sequence[Part], payload: Payload, arguments: dict | None = None, compute: str = ""
    ) -> ModelCall:
        """Before a call of the model. parts: of its batch, in order and all of one step; arguments: of the forward, by
        name; compute: why the call must compute whatever is planned, or ""."""
        try:
            return ModelCall(self, parts, payload, arguments, compute)
        except BaseException:
            payload.restore()
            raise

    def predict(self, parts: Sequence[Part], compute: str = "") -> tuple[torch.Tensor | None, str]:
        """(prediction for the whole batch, ""), or (None, why a planned reuse must compute, or "" if none is
        planned)."""
        return None, ""

    def before_computing(self, parts: Sequence[Part]) -> None:
        """Before a computed call: drop what is not needed after it."""

    def computed(self, call: ModelCall, made: torch.Tensor, output: Any, rehearse: Callable[[], Any] | None) -> None:
        """After a computed call. made: what the payload recorded, (batch, tokens, width)."""

    def facts_are_wrong(self, told: str) -> None:
        """The facts of the class do not hold, so the payload went over to the output. told: a sentence that says
        why."""
        self.report.notes.append(told)

    def nothing_recorded(self, error: MagCacheError) -> str:
        """A computed call passed through no block. Returns the reason with which it is counted, or raises."""
        raise error

    def followed(self, call: ModelCall, output: Any) -> Any:
        """After a call: the output that the sampler is to get."""
        return output

    def expert_changed(self) -> None:
        """The calls go to another expert from here on, whose residuals have nothing to do with those kept so far."""

    def complete(self) -> None:
        """The sampler made every step."""
        self.report.complete = True

    def end(self) -> None:
        """Forget what is kept, whether the run is complete or not."""


class CachedRun(Run):
    """Computes or reuses as its schedule says; reuses only what this run kept under the same key, shape and device.

    guard: stops the skipping, and `stopped` says why. fall_back: called with this run and a sentence if the facts of
        the class prove wrong; plans for the output. scheduler, corrector: the sampler's scheduler
        (`corrector.follower_of`), and whether skipped steps are corrected; `why_uncorrected` says why they are not.
    """

    def __init__(
        self,
        schedule: Schedule,
        levels: Levels,
        residuals: Residuals,
        guard: Guard | None = None,
        fall_back: Callable[[CachedRun, str], None] | None = None,
        scheduler: Any = None,
        corrector: bool = True,
    ) -> None:
        super().__init__(schedule, levels)
        self.residuals, self.guard, self.fall_back, self.stopped = residuals, guard, fall_back, ""
        self.scheduler, self.corrector = scheduler, corrector
        self.follower: Replay | Folded | None = None
        self.why_uncorrected = ""
        self.plan(schedule)

    def plan(self, schedule: Schedule) -> None:
        """Follow this schedule from here on."""
        self.schedule = self.report.schedule = schedule
        if self.follower:
            self.follower.detach()
            self.follower = None
        if schedule.reuse.any():  # otherwise the sampler is left alone
            self.follower, self.why_uncorrected = follower_of(
                self.scheduler, self.levels, schedule.follows_line, self.corrector, schedule.gram
            )

    def facts_are_wrong(self, told: str) -> None:
        super().facts_are_wrong(told)
        self.residuals.clear()  # outputs are kept from here on
        if self.fall_back:
            self.fall_back(self, told)

    def predict(self, parts: Sequence[Part], compute: str = "") -> tuple[torch.Tensor | None, str]:
        if self.follower and compute.startswith(CHANGED):  # earlier outputs tell nothing of those from here on
            self.follower.restart(parts[0].call.step)
        if not self.schedule.reuse[parts[0].call.step]:
            return None, ""
        why = compute or self.stopped
        return (None, why) if why else self.predicted(parts)

    def predicted(self, parts: Sequence[Part]) -> tuple[torch.Tensor | None, str]:
        """What the kept residuals predict for the whole batch, or (None, why they cannot)."""
        predictions = []
        for part in parts:
            prediction, why = self.residuals.predict(part, self.schedule)
            if prediction is None:
                return None, why
            predictions.append(prediction)
        return predictions[0] if len(predictions) == 1 else torch.cat(predictions), ""

    def before_computing(self, parts: Sequence[Part]) -> None:
        if not self.guard:
            self.drop_unneeded(parts)

    def drop_unneeded(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self.residuals.drop_unneeded(part, self.schedule)

    def computed(self, call: ModelCall, made: torch.Tensor, output: Any, rehearse: Callable[[], Any] | None) -> None:
        if self.guard and not self.stopped:
            self.watch(call.parts, made)
        if self.stopped:
            return
        for part, residual in zip(call.parts, made.chunk(len(call.parts))):
            if self.residuals.needed_by(self.schedule, part.call.step):
                self.residuals.keep(part, residual)
        self.report.peak_bytes = max(self.report.peak_bytes, self.residuals.peak_bytes)

    def watch(self, parts: Sequence[Part], made: torch.Tensor) -> None:
        """Let the guard judge a computed step, and skip nothing more in this run if it says so."""
        predicted, missing = self.predicted(parts)
        error, step = self.schedule.expected_error, parts[0].call.step
        if predicted is not None and not missing and self.guard and error is not None:
            self.stopped = self.guard.judge(step, made, predicted, error[step])
        self.drop_unneeded(parts)

    def followed(self, call: ModelCall, output: Any) -> Any:
        if self.follower:
            output = self.follower.follow(call, output)
            self.report.peak_bytes = max(self.report.peak_bytes, self.residuals.bytes + self.follower.bytes)
        return output

    def expert_changed(self) -> None:
        self.residuals.clear()
        if self.follower:
            self.follower.clear()

    def complete(self) -> None:
        super().complete()
        self.residuals.clear()

    def end(self) -> None:
        self.residuals.clear()
        if self.follower:
            self.follower.detach()


class MeasuredRun(Run):
    """Computes everything and measures the residuals of each branch's first conditioning.

    statistics: collects them; noise_tokens: `Host.noise_tokens`. Raises MagCacheError for a run of one step.
    """

    measures = True

    def __init__(
        self, levels: Levels, statistics: Statistics, noise_tokens: Callable[[dict], int] | None = None
    ) -> None:
        if len(levels) < 2:
            raise MagCacheError("Calibration compares neighbouring steps: run at least 2.")
        super().__init__(compute_all(len(levels), "the ratios were measured in this run"), levels)
        self.statistics, self.noise_tokens = statistics, noise_tokens
        self.first_keys: dict[int, Any] = {}
        self.reused_seconds: float | None = None
        statistics.begin(self.levels)

    def computed(self, call: ModelCall, made: torch.Tensor, output: Any, rehearse: Callable[[], Any] | None) -> None:
        tokens = self.noise_tokens(call.arguments or {}) if self.noise_tokens else None
        outputs = self.outputs(call, output, tokens, made.shape[1])
        for part, residual, one in zip(call.parts, made.chunk(len(call.parts)), outputs):
            if self.first_keys.setdefault(part.call.branch, part.key) == part.key:
                self.statistics.add(part.call, residual[:, :tokens], one)
        if call.parts[0].call.step == self.schedule.steps - 1 and rehearse and self.reused_seconds is None:
            self.reused_seconds = time_reuse(call.payload, made, rehearse)

    def facts_are_wrong(self, told: str) -> None:
        raise MagCacheError(
            f"{told.partition(': its output')[0]}, so its residuals cannot be measured: ask for a speed-up, which "
            "needs no calibration, and let its output be predicted."
        )

    def outputs(self, call: ModelCall, output: Any, noise_tokens: int | None, tokens: int) -> list[torch.Tensor]:
        """The model's output for the tokens being denoised, (1, elements, 1) for each part of the batch. noise_tokens:
        how many of the `tokens` they are (None: all)."""
        return [ModelOutput().finish(leading_tokens(output, noise_tokens, tokens))]

    def expert_changed(self) -> None:
        self.statistics.expert_changed()

    def complete(self) -> None:
        super().complete()
        self.statistics.finish((self.report.typical_seconds, self.reused_seconds))

    def end(self) -> None:
        self.statistics.begin(())
