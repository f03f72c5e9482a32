"""Follow samplers through the calls of a patched model: where a run begins, which call is which, where it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import torch

from .conditioning import Conditionings
from .errors import MagCacheError
from .expert import Expert, noise_level
from .payloads import Residual
from .run import Run
from .steps import TRAIN_TIMESTEPS, Part, StepTracker, close

BETWEEN = "the noise level is none of the sampler's timesteps"
KEPT_REPORTS = 128  # a server's handle lives long; a video of FramePack has a report for each of its sections


class Sampling:
    """A sampler on its way through its noise levels: the run that it makes, and how far it is.

    timesteps: the sampler's, whose identity tells one run from the next; keys: of the calls at each step so far; call:
    the `run.ModelCall` under way.
    """

    def __init__(self, timesteps, tracker, run, conditionings):
        self.timesteps, self.tracker, self.run, self.conditionings = timesteps, tracker, run, conditionings
        self.keys: dict[int, set] = {}
        self.expert = self.call = None

    def part(self, call, latent, latents, arguments):
        """(the `steps.Part` that a call is, why it must compute or ""). latents: of the whole batch."""
        first_level = close(self.tracker.level, self.tracker.levels[0], 1e-6)
        key, why = self.conditionings.key_of(call, first_level, arguments)
        self.keys.setdefault(call.step, set()).add(key)
        if self.run.measures:  # a prompt that changes on the way is part of what is measured
            key = key[1:]
        part = Part(key, call, latent, self.tracker.in_one_call(latents))
        return part, why if self.tracker.listed else BETWEEN

    def calls_at(self, step):
        return len(self.keys.get(step, ()))

    @property
    def last_step(self):
        return self.run.schedule.steps - 1


class Patch:
    """The forward of a model instance (or of several), replaced. `remove()` or the end of a `with` block restores it,
    and another `with` puts it on again.

    Calls of several threads wait for each other, and each thread has a run of its own; `remove()`, `paused()` and
    `end_run()` take effect between calls, whichever thread they come from.
    active: whether calls are cached; reached: whether there was one; reports: of each run, the newest KEPT_REPORTS.
    owner: of several pipelines that share the model the one whose calls come here (None: all do).
    """

    def __init__(self, models, host, timesteps, payload=Residual, owner=None):
        self.host, self.timesteps, self.owner = host, timesteps, owner
        # () -> {name: value}, what a sampler does with the outputs: when it changes, so does the conditioning.
        self.guidance: Callable[[], dict] = dict
        self.active, self.reached, self.short_runs = True, False, 0
        self.reports: list = []
        self.samplings: dict[int, Sampling] = {}  # by thread
        self.turned_away: dict[int, object] = {}  # by thread, the timesteps of a run that is not followed
        self.entered = 0
        self.lock = threading.RLock()
        models = models if isinstance(models, (list, tuple)) else [models]
        self.experts = [Expert(model, host, self, payload) for model in models]
        self.put_on()

    @property
    def sampling(self) -> Sampling | None:
        """Of this thread."""
        return self.samplings.get(threading.get_ident())

    @property
    def run(self) -> Run | None:
        """This thread's run in progress."""
        return self.sampling.run if self.sampling else None

    def new_run(self, levels, expert, arguments, latent):
        """The `run.Run` of a sampler that begins at the first of these noise levels. arguments: of forward, by name."""
        raise NotImplementedError

    def complete_run(self, run):
        """The sampler made every step of a run."""
        run.complete()

    def __enter__(self):
        with self.lock:
            if not self.active:
                self.put_on()
            self.entered += 1
        return self

    def __exit__(self, kind, error, trace):
        self.entered = max(0, self.entered - 1)
        if self.entered:
            return
        if kind is not None:
            self.end_run()  # broken off, perhaps between the branches of its last step: not to be settled as complete
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
    def paused(self):
        """Let the model run as it was for a while."""
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
    def begin_call(self, expert, args, kwargs):
        """Which call of which run this is, begun: its `run.ModelCall`, or None where forward is to run as it is."""
        self.reached = True
        arguments = {**dict(zip(expert.argument_names, args)), **kwargs}
        timesteps, sampling, call = self.timesteps(), self.sampling, None
        if (self.host.outside and self.host.outside(arguments)) or self.is_taken(timesteps):
            return None
        latents = arguments[self.host.latent]
        latent = latents if torch.is_tensor(latents) else latents[0]  # a list, or what the host made of one
        level, tolerance = noise_level(self.host, arguments)
        if sampling is not None and timesteps is sampling.timesteps:
            call = sampling.tracker.observe(level, latent, tolerance)
        if sampling is not None and call is None:
            self.expect_steps(sampling, timesteps, level)
        if sampling is None or call is None:
            sampling = self.begin_run(timesteps, level, tolerance, expert, arguments, latent)
            call = sampling.tracker.observe(level, latent, tolerance)
        if expert is not sampling.expert:
            sampling.expert = expert
            sampling.run.expert_changed()
        try:
            part, why = sampling.part(call, latent, latents, {**arguments, **self.guidance()})
            sampling.call = sampling.run.begin([part], self.payload_of(expert), arguments, why)
        except BaseException:
            self.forget(sampling)
            raise
        return sampling.call

    def payload_of(self, expert):
        return expert.payload

    def compute_instead(self, call, why):
        """In place of a reused call that nothing kept fits. Returns the `run.ModelCall` that computes."""
        call.cancel()
        sampling = self.sampling
        sampling.call = sampling.run.begin(call.parts, call.payload, call.arguments, why)
        return sampling.call

    def is_taken(self, timesteps) -> bool:
        """Whether this run began while another thread's was measured: then it is as if there were no patch."""
        thread, own = threading.get_ident(), self.sampling
        if self.turned_away.get(thread) is not timesteps and (own is None or own.timesteps is not timesteps):
            self.forget_threads_that_ended()
            others = [one.run for one in self.samplings.values() if one is not own and one.run.measures]
            self.turned_away[thread] = None if all(run.report.complete for run in others) else timesteps
        return self.turned_away.get(thread) is not None

    @torch.compiler.disable
    def finish_call(self, call, output, rehearse):
        """After a call. rehearse: makes it again. Returns the output."""
        output = call.finish(output, rehearse)
        sampling = self.sampling
        if sampling is None:  # ended by the call itself
            return output
        sampling.call = None
        last = sampling.last_step
        if call.parts[0].call.step == last and sampling.calls_at(last) >= max(1, sampling.calls_at(last - 1)):
            self.complete(sampling)
        return output

    @torch.compiler.disable
    def cancel_call(self, call):
        """An exception or a cancel leaves nothing behind."""
        call.cancel()
        if self.sampling is not None:
            self.forget(self.sampling)

    def expect_steps(self, sampling, timesteps, level):
        """A new run begins. Raises MagCacheError if run after run comes to an end at its first step: then what is known
        of the sampler is wrong."""
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
        """Complete each run that reached its last step with fewer branches than before: guidance ended there."""
        with self.lock:
            for sampling in self.samplings.values():
                self.settle_run(sampling)

    def settle_run(self, sampling):
        if not sampling.run.report.complete and sampling.calls_at(sampling.last_step):
            self.complete(sampling)

    def ended(self, run):
        """A run is over, whole or not: what a user should hear of it."""

    def complete(self, sampling):
        sampling.tracker.let_go()
        sampling.conditionings = Conditionings(sampling.expert.model, self.host)  # lets go of the prompt's tensors
        self.complete_run(sampling.run)
        self.ended(sampling.run)

    def begin_run(self, timesteps, level, tolerance, expert, arguments, latent):
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
        self.samplings[threading.current_thread().ident] = sampling
        return sampling

    def end_run(self) -> None:
        """Forget the run in progress (of several threads: each), whole or not."""
        with self.lock:
            for sampling in list(self.samplings.values()):
                self.forget(sampling)

    def forget(self, sampling):
        sampling.run.end()
        if not sampling.run.report.complete:
            self.ended(sampling.run)
        self.samplings = {thread: one for thread, one in self.samplings.items() if one is not sampling}

    def forget_threads_that_ended(self):
        alive = {thread.ident for thread in threading.enumerate()}
        for thread, sampling in list(self.samplings.items()):
            if thread not in alive:
                self.forget(sampling)
