"""What a call of the model is conditioned on: by this, not by the order of calls, a residual is known.

Samplers call a model more than once a step (guidance, edits, tiles, windows), in an order that may change, and a
callback may change the prompt in the middle of a run. The prompt's tensors, pooled and image embeddings, scales of
adapters and whatever else a forward is given stay the same from step to step, or tell that something changed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .blocks import Host
from .steps import Call, same

# Made anew for each step by what runs beside the model: whether they are there counts, not their values.
MADE_EACH_STEP = ("controlnet", "block_samples", "down_block_additional", "mid_block_additional")
# Others at each step by their nature; a mask comes with its prompt, or follows the noise level (frames held in
# Open-Sora).
NO_CONDITIONING = ("mask", "timestep", "sigma")
# What a step does not change of its own accord, however often it changes.
CONDITIONING = ("encoder_hidden", "prompt", "pooled", "text", "context", "image_emb", "scale")
CHANGED = "the conditioning changed"


@dataclass(frozen=True)
class VersionedTensor:
    """A tensor and how often it had been written into."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> VersionedTensor:
        return cls(tensor, 0 if tensor.is_inference() else tensor._version)

    def alike(self, other: VersionedTensor) -> bool:
        one, two = self.tensor, other.tensor
        if one is two or (one.shape == two.shape and one.device == two.device and one.data_ptr() == two.data_ptr()):
            return self.version == other.version
        return one.device == two.device and same(one, two)


@dataclass
class Conditioning:
    """A conditioning that this run has met. number: in the order in which they came; inputs: {name: value}."""

    number: int
    inputs: dict[str, Any] = field(repr=False)


class Conditionings:
    """Those of one run.

    varying: names of inputs that are others at each step, so that they tell no conditioning from another.
    """

    def __init__(self, model: torch.nn.Module, host: Host) -> None:
        self.model, self.host = model, host
        self.adapters = adapters_of(model)
        self.known: list[Conditioning] = []
        self.varying: set[str] = set()
        self.step, self.latents, self.trajectories = 0, 0, 1
        self.now: list[Conditioning] = []  # of this step's calls, in order
        self.before: list[Conditioning] = []  # of those of the step before
        self.changed: dict[int, set[str]] = {}  # what was new at this step, by place in its order
        self.changed_before: dict[int, set[str]] = {}
        self.counts: dict[Hashable, int] = {}

    def key_of(self, call: Call, first_level: bool, arguments: dict) -> tuple[Hashable, str]:
        """(what tells this call's residuals from those of others, why it must compute or ""). first_level: whether the
        call is at the noise level at which the run began, where each latent is a trajectory of its own."""
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
        return (known.number, trajectory, self.counts[evaluation]), why

    def find(self, inputs: dict[str, Any]) -> tuple[Conditioning, str]:
        """(the conditioning with these inputs, why the call must compute or "")."""
        place = len(self.now)
        likely = self.before[place : place + 1]  # the one at the same place in the step before
        for known in likely + [one for one in self.known if one not in likely]:
            if not self.changes(known, inputs):
                known.inputs = inputs
                return known, ""
        changes = self.changes(likely[0], inputs) if likely else []
        named = dict.fromkeys(name.partition("[")[0] for name in changes)
        why = f"{CHANGED} ({', '.join(named)})" if changes else ""
        self.changed[place] = set(changes)
        # At two steps in a row, or from the very first to the next.
        again = self.changed[place] if self.step == 1 else self.changed_before.get(place, set()) & self.changed[place]
        self.varying |= {name for name in again if not any(part in name for part in CONDITIONING)}
        if changes and not self.changes(likely[0], inputs):  # each step has others, as is seen now
            likely[0].inputs = inputs
            numbers = all(is_number(inputs.get(name)) for name in changes)  # a guidance scale that follows the steps
            return likely[0], "" if numbers and self.step == 1 else why
        self.known.append(Conditioning(len(self.known), inputs))
        return self.known[-1], why

    def changes(self, known: Conditioning, inputs: dict[str, Any]) -> list[str]:
        """Names of the inputs that differ."""
        names = [*known.inputs, *(name for name in inputs if name not in known.inputs)]
        return [
            name for name in names if name not in self.varying and not alike(known.inputs.get(name), inputs.get(name))
        ]


def inputs_of(arguments: dict, host: Host) -> Iterator[tuple[str, Any]]:
    """(name, value) of the tensors, numbers and words that forward is given beside the latent and the timestep, inside
    lists and dictionaries too."""
    for name, value in arguments.items():
        stream = name.endswith(host.latent) and "encoder" not in name  # the latent of another: audio_hidden_states
        if name != host.timestep and not stream and not any(part in name for part in NO_CONDITIONING):
            for path, leaf in leaves(name, value):
                if not torch.is_tensor(leaf):
                    if isinstance(leaf, (bool, int, float, str)):
                        yield path, leaf
                elif any(part in path for part in MADE_EACH_STEP):
                    yield path, (tuple(leaf.shape), bool(leaf.flatten()[:64].any()))  # zeros: its time is over
                else:
                    yield path, VersionedTensor.of(leaf)


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from leaves(f"{name}[{key!r}]", part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from leaves(f"{name}[{index}]", part)
    else:
        yield name, value


def is_number(value: Any) -> bool:
    """A number, or one for each row of the batch."""
    return value.tensor.ndim < 2 if isinstance(value, VersionedTensor) else isinstance(value, (int, float))


def alike(one: Any, other: Any) -> bool:
    """Whether two inputs are the same: the same memory, or the same numbers."""
    if isinstance(one, VersionedTensor) and isinstance(other, VersionedTensor):
        return one.alike(other)
    return not isinstance(one, VersionedTensor) and not isinstance(other, VersionedTensor) and one == other


def adapters_of(model: torch.nn.Module) -> list:
    """The adapters on a model and their scales: LoRAs (peft's layers), attention processors of an image adapter. A
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
