"""What a call of the model is conditioned on. Residuals are recognised by this, not by the order of calls.

Samplers call a model more than once per step (guidance, edits, tiles, windows), in an order that may change, and a
callback may change the prompt in the middle of a run. The prompt's tensors, pooled and image embeddings, the scales of
adapters and whatever else a forward is given either stay the same from step to step, or show that something changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks import Host
from .steps import Call, same

# Parts of names of inputs that another model makes for each step: only whether they are there counts, not their values.
MADE_EACH_STEP = ("controlnet", "block_samples", "down_block_additional", "mid_block_additional")
# Of inputs that are not compared: a mask comes with its prompt, or follows the noise level (held frames in Open-Sora).
NO_CONDITIONING = ("mask", "timestep", "sigma")
# Of inputs that are conditioning even if they change at each step.
CONDITIONING = ("encoder_hidden", "prompt", "pooled", "text", "context", "image_emb", "scale")
CHANGED = "the conditioning changed"
GRADIENT = "a gradient is asked for"  # which goes through the model, not through a prediction


@dataclass(frozen=True)
class VersionedTensor:
    """A tensor, and how often it had been written into when it was seen."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> VersionedTensor:
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def alike(self, other: VersionedTensor) -> bool:
        """Whether both are the same memory, not written into since, or the same numbers."""
        one, two = self.tensor, other.tensor
        if one is two or (one.shape == two.shape and one.device == two.device and one.data_ptr() == two.data_ptr()):
            return self.version == other.version
        return one.device == two.device and same(one, two)


@dataclass
class Conditioning:
    """A conditioning that occurred in this run. number: in order of appearance; inputs: {name: value}."""

    number: int
    inputs: dict[str, Any] = field(repr=False)


class Conditionings:
    """The conditionings of one run.

    varying: names of inputs that change at each step, so that they do not tell one conditioning from another.
    """

    def __init__(self, model: torch.nn.Module, host: Host) -> None:
        self.model, self.host = model, host
        self.adapters = adapters_of(model)
        self.known: list[Conditioning] = []
        self.varying: set[str] = set()
        self.step, self.latents, self.trajectories = 0, 0, 1
        self.now: list[Conditioning] = []  # of this step's calls, in order
        self.before: list[Conditioning] = []  # of the calls of the step before
        self.changed: dict[int, set[str]] = {}  # inputs that changed at this step, by the call's place in it
        self.changed_before: dict[int, set[str]] = {}
        self.counts: dict[Hashable, int] = {}

    def key_of(self, call: Call, first_level: bool, arguments: dict) -> tuple[tuple, str]:
        """(the key of this call's residuals, why the call must compute or ""). first_level: whether the call is at the
        noise level at which the run began, where each latent starts a trajectory of its own."""
        if call.step != self.step:
            self.step, self.latents = call.step, 0
            self.adapters = adapters_of(self.model)
            self.now, self.before, self.counts = [], self.now, {}
            self.changed, self.changed_before = {}, self.changed
        elif call.branch == 0 and self.now:  # another latent at this step
            self.latents += 1
            if call.step == 0 and first_level:
                self.trajectories = max(self.trajectories, self.latents + 1)
        inputs = dict(inputs_of(arguments, self.host))
        inputs["adapters"] = self.adapters
        known, why = self.find(inputs)
        self.now.append(known)
        trajectory = self.latents % self.trajectories
        evaluation = (known.number, trajectory, self.latents)
        self.counts[evaluation] = self.counts.get(evaluation, -1) + 1
        if torch.is_grad_enabled() and self.asks_for_a_gradient(arguments):
            why = why or GRADIENT
        return (known.number, trajectory, self.counts[evaluation]), why

    def asks_for_a_gradient(self, arguments: dict) -> bool:
        """Whether a gradient of one of these is asked for. A loop that only forgot `torch.no_grad` asks for none: its
        latents depend on the weights."""
        given = [leaf for name, value in arguments.items() for _, leaf in leaves(name, value) if torch.is_tensor(leaf)]
        tracked = [leaf for leaf in given if leaf.requires_grad]
        if any(leaf.is_leaf for leaf in tracked):
            return True
        return bool(tracked) and not any(weight.requires_grad for weight in self.model.parameters())

    def find(self, inputs: dict[str, Any]) -> tuple[Conditioning, str]:
        """(the conditioning with these inputs, why the call must compute or "")."""
        place = len(self.now)
        likely = self.before[place : place + 1]  # that of the call at the same place in the step before
        for known in likely + [one for one in self.known if one not in likely]:
            if not self.changes(known, inputs):
                known.inputs = inputs
                return known, ""
        changes = self.changes(likely[0], inputs) if likely else []
        named = dict.fromkeys(name.partition("[")[0] for name in changes)
        why = f"{CHANGED} ({', '.join(named)})" if changes else ""
        self.changed[place] = set(changes)
        # What changed at two steps in a row, or from the very first step to the second, varies.
        again = self.changed[place] if self.step == 1 else self.changed_before.get(place, set()) & self.changed[place]
        self.varying |= {name for name in again if not any(part in name for part in CONDITIONING)}
        if changes and not self.changes(likely[0], inputs):  # all that changed varies, as is known now
            likely[0].inputs = inputs
            numbers = all(is_number(inputs.get(name)) for name in changes)  # a guidance scale that follows the steps
            return likely[0], "" if numbers and self.step == 1 else why
        self.known.append(Conditioning(len(self.known), inputs))
        return self.known[-1], why

    def changes(self, known: Conditioning, inputs: dict[str, Any]) -> list[str]:
        """Names of the inputs in which a conditioning differs from these."""
        names = [*known.inputs, *(name for name in inputs if name not in known.inputs)]
        return [
            name for name in names if name not in self.varying and not alike(known.inputs.get(name), inputs.get(name))
        ]


def inputs_of(arguments: dict, host: Host) -> Iterator[tuple[str, Any]]:
    """(name, value) of the tensors, numbers and strings that forward is given besides the latent and the timestep, also
    inside lists and dictionaries."""
    for name, value in arguments.items():
        stream = name.endswith(host.latent) and "encoder" not in name  # a second latent, such as audio_hidden_states
        if name != host.timestep and not stream and not any(part in name for part in NO_CONDITIONING):
            for path, leaf in leaves(name, value):
                if not torch.is_tensor(leaf):
                    if isinstance(leaf, (bool, int, float, str)):
                        yield path, leaf
                elif any(part in path for part in MADE_EACH_STEP):
                    yield path, (tuple(leaf.shape), bool(leaf.flatten()[:64].any()))  # zeros once it no longer acts
                else:
                    yield path, VersionedTensor.of(leaf)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(path, value) of everything inside nested dictionaries and lists."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(f"{name}[{key!r}]", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from leaves(f"{name}[{index}]", part)
    else:
        yield name, value


def is_number(value: Any) -> bool:
    """Whether an input is a number, or a tensor with one for each row of the batch."""
    return value.tensor.ndim < 2 if isinstance(value, VersionedTensor) else isinstance(value, (int, float))


def alike(one: Any, other: Any) -> bool:
    """Whether two inputs are the same."""
    if isinstance(one, VersionedTensor) and isinstance(other, VersionedTensor):
        return one.alike(other)
    return not isinstance(one, VersionedTensor) and not isinstance(other, VersionedTensor) and one == other


def adapters_of(model: torch.nn.Module) -> list:
    """The adapters on a model with their scales: LoRAs (layers of peft), attention processors of an image adapter. A
    callback may load, scale, fuse or unload one between two steps."""
    found: list = []
    module: Any
    for module in model.modules():
        own = module.__dict__
        if isinstance(own.get("scaling"), dict):
            found += [*own["scaling"].items(), *module.active_adapters, *module.merged_adapters]
            found.append(module.disable_adapters)
        for holder in (module, own.get("processor")):  # a processor with weights of its own is a module, too
            scale = getattr(holder, "__dict__", {}).get("scale")
            if isinstance(scale, (int, float, list)):
                found.append(list(scale) if isinstance(scale, list) else scale)
    return found
