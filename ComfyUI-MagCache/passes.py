"""One pass of a sampler, call by call: ComfyUI's arguments become the parts that `common.run` works with."""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

import torch

from .circumstances import Circumstances
from .common.blocks import TokensChanged
from .common.calibration import Statistics
from .common.conditioning import CHANGED
from .common.corrector import Folded, is_guided
from .common.errors import MagCacheError
from .common.expert import inner_module
from .common.hosts import host_of
from .common.payloads import Residual
from .common.run import CachedRun, MeasuredRun, Run
from .common.steps import Call, Part, same
from .controls import Hints, control_state


class Prediction:
    """The payload that needs no facts of a model: what the model makes of a latent x at noise level sigma. A reused
    step runs nothing of the model.

    direct: whether to keep the direction (x - denoised) / sigma in which samplers go. Otherwise the denoised latent is
    kept, for samplers that add noise at each step, of which no earlier direction could know.
    """

    def __init__(self, x, sigma: float, direct: bool = True):
        self.x, self.sigma, self.direct = x, sigma, direct

    def record(self, arguments=None):
        pass

    def finish(self, output=None):
        return (self.x - output) / self.sigma if self.direct else output.clone()

    def replace(self, kept):
        return self.x - self.sigma * kept if self.direct else kept

    def restore(self):
        pass


class Pass:
    """One run, as ComfyUI's wrappers call it. payload: "residual" or "output"."""

    def __init__(self, about: Circumstances, run: Run, payload: str):
        self.about, self.run, self.payload = about, run, payload
        self.host = host_of(about.model) if payload == "residual" else None
        self.residuals, self.controls = {}, {}
        self.seen = Counter()  # calls with each conditioning in this evaluation of the guider
        self.guider = None  # of this evaluation
        self.called, self.begins = {}, False  # step of the newest call of each conditioning; whether another begins
        self.given, self.states = {}, {}  # inputs of each conditioning; what acted when it was called last
        if self.host:
            self.residual_of(about.model)  # raises if this version of the class is not known

    def residual_of(self, model) -> Residual:
        """The payload of a model; with several GPUs each has its own model."""
        if id(model) not in self.residuals:
            name, why = type(model).__name__, self.host.why_output
            if not self.host.blocks:
                raise MagCacheError(
                    f"for {name} only the output is predicted, because {why}: set speedup, which needs no calibration."
                )
            try:
                self.residuals[id(model)] = Residual(model, self.host)
            except MagCacheError:
                raise MagCacheError(f"in this version of ComfyUI {name} is not built as MagCache knows it.") from None
        return self.residuals[id(model)]

    def call(self, executor, args, kwargs, options):
        """In the place of BaseModel.apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)."""
        x, control, sigma = args[0], args[4], float(options["sigmas"].flatten()[0])
        if sigma <= 0:
            return executor(*args, **kwargs)
        forward = {
            **kwargs,
            "c_concat": args[2],
            "c_crossattn": args[3],
            "x": x,
            "sigma": sigma,
            "patch_size": getattr(self.about.model, "patch_size", 1),
        }
        hooks = getattr(getattr(executor.class_obj, "current_patcher", None), "current_hooks", None)
        state = control_state(control.control, sigma) if isinstance(control, Hints) else (), strengths(hooks)
        parts, changed = self.parts(forward, state, options)
        payload = Prediction(x, sigma, self.about.deterministic)
        if self.payload == "residual":
            payload = self.residual_of(inner_module(executor.class_obj.diffusion_model))

        def model(*control):
            return executor(*args[:4], *control, *args[5:], **kwargs)

        while True:
            call = self.run.begin(parts, payload, forward, CHANGED if changed or self.begins else "")
            try:
                if not call.reused:
                    output = model(control.make() if isinstance(control, Hints) else control)
                else:
                    output = model(None) if call.output is None else call.output
                return call.finish(output, rehearse=lambda: model(None))
            except TokensChanged as tokens:
                call.cancel()
                self.run.forget(parts, str(tokens))
            except BaseException:
                call.cancel()
                raise

    @property
    def guides(self) -> bool:
        """Whether the guider guides now. A node may change its scale from step to step."""
        return getattr(self.guider, "cfg", 1.0) != 1.0

    def expect(self, model, conds: list, timestep: torch.Tensor, model_options: dict):
        """Before the calls with these conditionings, of all branches. If one was not called at the newest computed step
        (guidance begins, a prompt or a control net in its range, a hook's keyframe), all compute: guidance multiplies
        what a predicted branch and a computed one differ in."""
        window, step = window_of(model_options["transformer_options"]), self.about.step(float(timestep.flatten()[0]))
        newest = max(self.run.schedule.anchors(step), default=0)
        names = [
            (cond["uuid"], window, acting(model, cond, timestep, model_options))
            for branch in conds
            for cond in branch or ()
            if in_range(cond, timestep)
        ]
        if self.guides:  # whose branches may be in batches of their own
            names.append(("guidance", window, ()))
        self.begins = any(self.called.get(name, -1) < newest for name in names)
        self.called.update(dict.fromkeys(names, step))

    def parts(self, forward, acting, options) -> tuple[list[Part], bool]:
        """(a Part for each conditioning of a call's batch; whether one of them changed since it was called last).

        Residuals are told apart by the conditioning, how often the guider has called it in this evaluation (some guide
        by a third call at another latent, or go tile by tile), the context window, which blocks are replaced
        (skip-layer guidance), which control nets and hooks act and how strongly, and the prompt itself.
        """
        window = window_of(options)
        replaced = sorted(
            str((name, key)) for name, patches in options.get("patches_replace", {}).items() for key in patches
        )
        branches, step, parts, changed = options["cond_or_uncond"], self.about.step(forward["sigma"]), [], False
        given = zip(*(forward[name].chunk(len(branches)) for name in GIVEN if torch.is_tensor(forward.get(name))))
        for name, branch, latent, inputs in zip_longest(
            options.get("uuids") or branches, branches, forward["x"].chunk(len(branches)), given, fillvalue=()
        ):
            place = name, window, tuple(replaced)
            place = *place, self.count(place)
            state = *acting, self.version(name, inputs)
            changed |= self.states.get(place, state) != state
            self.states[place] = state
            parts.append(Part((*place, *state), Call(step, branch), latent, self.guides))
        return parts, changed

    def count(self, place) -> int:
        self.seen[place] += 1
        return self.seen[place]

    def version(self, name, inputs) -> int:
        """A number for a conditioning's tensors: the same whenever they are the same as before under this name, and a
        new one otherwise."""
        met = self.given.setdefault(name, [])
        for number, known in met:
            if all(one.device == other.device and same(one, other) for one, other in zip(known, inputs)):
                return number
        met.append((met[-1][0] + 1 if met else 0, [tensor.clone() for tensor in inputs]))
        del met[:-VERSIONS]
        return met[-1][0]


NOTHING_RECORDED = "another patch skipped or replaced the first block"
VERSIONS = 8  # of a conditioning that are remembered: where it changes at each step, none comes again
GIVEN = ("c_crossattn", "y", "guidance")  # prompt, pooled prompt and guidance among the arguments of apply_model


def window_of(options: dict) -> tuple | None:
    """The frames of the context window that is called, or None."""
    window = getattr(options.get("context_window"), "index_list", None)
    return None if window is None else tuple(window)


def in_range(cond: dict, timestep: torch.Tensor) -> bool:
    """Whether a conditioning is called at this noise level, compared as ComfyUI does."""
    late, early = timestep[0] > cond.get("timestep_start", float("inf")), timestep[0] < cond.get("timestep_end", 0.0)
    return not bool(late or early)


def acting(model, cond: dict, timestep: torch.Tensor, model_options: dict) -> tuple:
    """Which control nets and hooks will act on a conditioning at this noise level, and how strongly."""
    hooks = cond.get("hooks")
    if hooks is not None:  # as ComfyUI does before each call; once is enough
        model.current_patcher.prepare_hook_patches_current_keyframe(timestep, hooks, model_options)
    return control_state(cond.get("control"), float(timestep.flatten()[0])), strengths(hooks)


def strengths(hooks) -> tuple:
    """Hooks (scheduled LoRAs) of a group, or None, and how strongly they act."""
    return tuple((id(hook.hook_ref), hook.strength) for hook in hooks.hooks) if hooks else ()


class BoundedRun(CachedRun):
    """A cached run that keeps at most `limit` bytes, and nothing of context windows or control-net states that are
    past.

    follower: the `corrector.Folded` that predicts along a line and corrects skipped steps, or None.
    """

    def __init__(self, about, schedule, residuals, follower: Folded | None, limit: int):
        super().__init__(schedule, about.levels, residuals, corrector=False)
        self.about, self.follower, self.limit, self.refused = about, follower, limit, {}

    def predict(self, parts, compute=""):
        self.drop_stale(parts[0].call.step)
        residual, why = super().predict(parts, compute)
        return residual, why and next((self.refused[part.key] for part in parts if part.key in self.refused), why)

    def drop_stale(self, step):
        """Drop the residuals that were not renewed at the newest computed step of the plan: no later step uses them."""
        for newest in self.schedule.anchors(step)[:1]:
            kept = self.residuals.kept
            for key in [key for key, residuals in kept.items() if not residuals or residuals[0].step < newest]:
                del kept[key]

    def computed(self, call, made, output, rehearse):
        if isinstance(call.payload, Residual) and call.payload.kind == "output":  # the facts were found wrong just now
            x, sigma = call.arguments["x"], call.arguments["sigma"]
            made = Prediction(x, sigma, self.about.deterministic).finish(output)
        size = made[: len(made) // len(call.parts)].numel() * (self.residuals.dtype or made.dtype).itemsize
        for part in call.parts:
            if self.residuals.bytes + size * len(call.parts) > self.limit:
                self.refused[part.key] = f"more than cache_limit, {self.limit / 2**30:.2g} GiB, would be kept"
            else:
                self.refused.pop(part.key, None)
        if not any(part.key in self.refused for part in call.parts):
            super().computed(call, made, output, rehearse)

    def followed(self, call, output):
        """The denoised latent of a finished call, moved along the line or corrected."""
        if not self.follower:
            return output
        self.follower.guided |= is_guided(call)
        made, sigma = [], call.arguments["sigma"]
        for part, denoised in zip(call.parts, output.chunk(len(call.parts))):
            kept = Prediction(part.latent, sigma, self.about.deterministic)
            step, before = part.call.step, kept.finish(denoised)
            if call.reused:
                after = self.follower.skipped(part.key, step, before)
            else:
                self.forget_past(part.key, step)
                after = self.follower.computed(part.key, step, before)
            made.append(denoised if after is before else kept.replace(after))
        return made[0] if len(made) == 1 else torch.cat(made)

    def forget_past(self, key, step):
        """Before a computed step: forget an earlier evaluation at the same step, and windows that are past."""
        newest = min(self.schedule.anchors(step), default=0)
        for other, (trajectory, _) in list(self.follower.branches.items()):
            last = trajectory.anchors[0][0] if trajectory.anchors else -1
            if other == key and last == step:
                del trajectory.anchors[0]
            elif last < newest:
                del self.follower.branches[other]

    def end(self):
        self.residuals.clear()
        if self.follower:
            self.follower.clear()

    def nothing_recorded(self, error):
        return NOTHING_RECORDED

    def forget(self, parts, why):
        """Forget the residuals of these parts, which do not fit. why: the reason."""
        for part in parts:
            self.residuals.kept.pop(part.key, None)
            self.refused[part.key] = why


class MeasuringRun(MeasuredRun):
    """A measured run whose outputs are denoised latents, as ComfyUI's are. wrong: why there is nothing to measure; the
    run goes on all the same, and `complete` raises it."""

    wrong = ""

    def outputs(self, call, output, noise_tokens, tokens):
        x, sigma = call.arguments["x"], call.arguments["sigma"]
        return [part.reshape(1, -1, 1) for part in ((x - output) / sigma).chunk(len(call.parts))]

    def facts_are_wrong(self, told):
        self.wrong = f"{told.partition(': its output')[0]}: set speedup, which needs no calibration."

    def computed(self, call, made, output, rehearse):
        if not self.wrong:
            super().computed(call, made, output, rehearse)

    def complete(self):
        if self.wrong:
            self.report.complete = True
            raise MagCacheError(self.wrong)
        super().complete()

    def nothing_recorded(self, error):
        return NOTHING_RECORDED


class FirstRun(BoundedRun):
    """A node's first run, which computes every step and is measured for the runs after it. If the facts of the class do
    not hold for the model there is nothing to measure, and it goes on as a cached run with what `fall_back` plans."""

    def __init__(self, about, schedule, residuals, noise_tokens, limit: int):
        super().__init__(about, schedule, residuals, None, limit)
        self.measured: MeasuringRun | None = MeasuringRun(about.levels, Statistics(), noise_tokens)
        self.measured.report = self.report

    def computed(self, call, made, output, rehearse):
        (self.measured.computed if self.measured else super().computed)(call, made, output, rehearse)

    def facts_are_wrong(self, told):
        self.measured = None
        super().facts_are_wrong(told)

    def complete(self):
        super().complete()
        if self.measured:
            self.measured.complete()

    def end(self):
        super().end()
        if self.measured:
            self.measured.end()
