"""Follow samplers through the calls of a patched model: where a run begins, what each call is, where the run ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .blocks import Host
from .conditioning import Conditionings
from .errors import MagCacheError
from .expert import Expert, noise_level
from .payloads import Payload, Residual
from .report import RunReport
from .run import ModelCall, Run
from .sampling import Sampling
from .steps import TRAIN_TIMESTEPS, Call, StepTracker, close

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT_REPORTS = 128  # of one handle: a server's lives long, and FramePack makes a report for each section of a video


class Patch:
    """The replaced forward of a model instance, or of several. `remove()` or the end of a `with` block restores it, and
    another `with` replaces it again.

    Calls of several threads wait for each other, and each thread has its own run. `remove()`, `paused()` and
    `end_run()` take effect between calls, whichever thread they come from.

    active: whether calls are followed; reached: whether there was one; reports: of the newest KEPT_REPORTS runs; owner:
    the pipeline whose calls come here, where several share the model (None: all calls do).
    """

    def __init__(
        self, models: Any, host: Host, timesteps: Callable[[], Any], payload: Any = Residual, owner: Any = None
    ) -> None:
        self.host, self.timesteps, self.owner = host, timesteps, owner
        self.guidance: Callable[[], dict] = dict  # {name: value} of the sampler's own numbers, part of the conditioning
        self.active, self.reached, self.short_runs = True, False, 0
        self.reports: list[RunReport] = []
        self.samplings: dict[int, Sampling] = {}  # by thread
        self.turned_away: dict[int, object] = {}  # timesteps of the run that is not followed, by thread
        self.entered = 0
        self.lock = threading.RLock()
        models = models if isinstance(models, (list, tuple)) else [models]
        self.experts = [Expert(model, host, self, payload) for model in models]
        self.put_on()

    @property
    def sampling(self) -> Sampling | None:
        """This thread's."""
        return self.samplings.get(threading.get_ident())

    @property
    def run(self) -> Run | None:
        """This thread's run in progress."""
        return self.sampling.run if self.sampling else None

    def new_run(self, levels: np.ndarray, expert: Expert, arguments: dict, latent: torch.Tensor) -> Run:
        """The Run of a sampler that begins at the first of these noise levels. arguments: of the forward, by name."""
        raise NotImplementedError

    def complete_run(self, run: Run) -> None:
        """The sampler made every step of a run."""
        run.complete()

    def __enter__(self) -> Self:
        with self.lock:
            if not self.active:
                self.put_on()
            self.entered += 1
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.entered = max(0, self.entered - 1)
        if self.entered:
            return
        if kind is not None:
            self.end_run()  # it was interrupted, perhaps between the branches of its last step, so it is not complete
        self.remove()
        if kind is None:
            self.require_reached()

    def put_on(self) -> None:
        """Replace the forward of each model. Raises MagCacheError, and replaces none, if another patch is on one."""
        with self.lock:
            self.active, self.reached = True, False
            try:
                for expert in self.experts:
                    expert.put_on()
            except BaseException:
                self.active = False
                for expert in self.experts:
                    expert.take_off()
                raise

    def remove(self) -> None:
        """Restore the model."""
        with self.lock:
            self.settle()
            self.active = False
            self.end_run()
            for expert in self.experts:
                expert.take_off()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For its duration the model runs as it was."""
        with self.lock:
            was_active, self.active = self.active, False
            self.end_run()
        try:
            yield
        finally:
            self.active = was_active

    def require_reached(self) -> None:
        """Raises MagCacheError if no call came through the patch."""
        if not self.reached:
            name = type(self.experts[0].model).__name__
            raise MagCacheError(
                f"The patched forward of {name} was never called, so nothing was cached: patch the instance that "
                "the sampler runs, after its last wrapper was put on."
            )

    @torch.compiler.disable
    def begin_call(self, expert: Expert, args: tuple, kwargs: dict) -> ModelCall | None:
        """Find out which call of which run this is, and begin it. None: the forward is to run as it is."""
        self.reached = True
        arguments = {**dict(zip(expert.argument_names, args)), **kwargs}
        timesteps = self.timesteps()
        if (self.host.outside and self.host.outside(arguments)) or self.is_taken(timesteps):
            return None
        latents = arguments[self.host.latent]
        latent = latents if torch.is_tensor(latents) else latents[0]  # a list, or what a host makes of one
        sampling, call = self.locate(timesteps, expert, arguments, latent)
        if expert is not sampling.expert:
            sampling.expert = expert
            sampling.run.expert_changed()
        try:
            part, why = sampling.part(call, latent, latents, {**arguments, **self.guidance()})
            return sampling.run.begin([part], self.payload_of(expert), arguments, why)
        except BaseException:
            self.forget(sampling)
            raise

    def locate(self, timesteps: Any, expert: Expert, arguments: dict, latent: torch.Tensor) -> tuple[Sampling, Call]:
        """The run to which a call belongs, begun if it is a new one, and where in that run the call is."""
        level, tolerance = noise_level(self.host, arguments)
        sampling = self.sampling
        if sampling is not None:
            call = sampling.tracker.observe(level, latent, tolerance) if timesteps is sampling.timesteps else None
            if call is not None:
                return sampling, call
            self.expect_steps(sampling, timesteps, level)
        sampling = self.begin_run(timesteps, level, tolerance, expert, arguments, latent)
        first: Any = sampling.tracker.observe(level, latent, tolerance)
        return sampling, first

    def payload_of(self, expert: Expert) -> Payload:
        return expert.payload

    def compute_instead(self, call: ModelCall, why: str) -> ModelCall:
        """Begin a computed call in the place of a reused one for which nothing kept fits."""
        call.cancel()
        return call.run.begin(call.parts, call.payload, call.arguments, why)

    def is_taken(self, timesteps: Any) -> bool:
        """Whether this run began while another thread's was being measured; it then runs as if there were no patch."""
        thread, own = threading.get_ident(), self.sampling
        if self.turned_away.get(thread) is not timesteps and (own is None or own.timesteps is not timesteps):
            self.forget_threads_that_ended()
            others = [one.run for one in self.samplings.values() if one is not own and one.run.measures]
            self.turned_away[thread] = None if all(run.report.complete for run in others) else timesteps
        return self.turned_away.get(thread) is not None

    @torch.compiler.disable
    def finish_call(self, call: ModelCall, output: Any, rehearse: Callable[[], Any]) -> Any:
        """After a call; returns the output for the sampler. rehearse: makes the call again."""
        output = call.finish(output, rehearse)
        sampling = self.sampling
        if sampling is None:  # the call itself ended its run
            return output
        last = sampling.last_step
        if call.parts[0].call.step == last and sampling.calls_at(last) >= max(1, sampling.calls_at(last - 1)):
            self.complete(sampling)
        return output

    @torch.compiler.disable
    def cancel_call(self, call: ModelCall) -> None:
        """After an exception or a cancel: leave nothing behind."""
        call.cancel()
        if self.sampling is not None:
            self.forget(self.sampling)

    def expect_steps(self, sampling: Sampling, timesteps: Any, level: float) -> None:
        """A new run begins after that of `sampling`. Raises MagCacheError if three runs in a row ended at their first
        step, because then `timesteps` or the noise level is wrong."""
        before = sampling.tracker
        if timesteps is sampling.timesteps:
            stuck = before.step == 0 and not close(level, before.levels[0], 1e-6)
        else:
            stuck = len(sampling.run.report.calls) == 1 and level < before.level
        self.short_runs = self.short_runs + 1 if stuck else 0
        if self.short_runs < 3:
            return
        if timesteps is not sampling.timesteps:
            raise MagCacheError(
                "The function `timesteps` returns a new object at each call, which tells one run from the next: "
                "let it return the sampler's own timesteps."
            )
        if level > before.level:
            raise MagCacheError(
                f"The noise level of {type(sampling.expert.model).__name__}'s calls rises from step to step, so its "
                "timestep counts the other way: tell it with the host's `noise_level`."
            )
        raise MagCacheError(
            f"The model is called at noise levels such as {level:.4f} that are none of the timesteps that MagCache was "
            "given: let the function `timesteps` return those of the sampler that runs this model."
        )

    def settle(self) -> None:
        """Complete each run that reached its last step with fewer branches than before, because guidance had ended."""
        with self.lock:
            for sampling in self.samplings.values():
                self.settle_run(sampling)

    def settle_run(self, sampling: Sampling) -> None:
        if not sampling.run.report.complete and sampling.calls_at(sampling.last_step):
            self.complete(sampling)

    def ended(self, run: Run) -> None:
        """A run is over, complete or not: tell the user what matters."""

    def complete(self, sampling: Sampling) -> None:
        sampling.tracker.let_go()
        sampling.conditionings = Conditionings(sampling.expert.model, self.host)  # releases the prompt's tensors
        self.complete_run(sampling.run)
        self.ended(sampling.run)

    def begin_run(
        self, timesteps: Any, level: float, tolerance: float, expert: Expert, arguments: dict, latent: torch.Tensor
    ) -> Sampling:
        expert.refuse_other_caches()
        if self.sampling is not None:
            self.settle_run(self.sampling)
            self.forget(self.sampling)
        self.forget_threads_that_ended()
        if timesteps is None or len(timesteps) == 0:
            raise MagCacheError("The sampler has no timesteps yet: patch the model before the pipeline runs.")
        timesteps_listed = timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps
        tracker = StepTracker(np.asarray(timesteps_listed, dtype=float) / TRAIN_TIMESTEPS, level, tolerance)
        run = self.new_run(tracker.levels, expert, arguments, latent)
        self.reports.append(run.report)
        del self.reports[:-KEPT_REPORTS]
        sampling = Sampling(timesteps, tracker, run, Conditionings(expert.model, self.host))
        self.samplings[threading.get_ident()] = sampling
        return sampling

    def end_run(self) -> None:
        """Forget the runs in progress, one for each thread, complete or not."""
        with self.lock:
            for sampling in list(self.samplings.values()):
                self.forget(sampling)

    def forget(self, sampling: Sampling) -> None:
        sampling.run.end()
        if not sampling.run.report.complete:
            self.ended(sampling.run)
        self.samplings = {thread: one for thread, one in self.samplings.items() if one is not sampling}

    def forget_threads_that_ended(self) -> None:
        alive = {thread.ident for thread in threading.enumerate()}
        for thread, sampling in list(self.samplings.items()):
            if thread not in alive:
                self.forget(sampling)
