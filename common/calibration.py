"""The statistics of un-cached runs and the ratio table made of them; the fingerprint of a checkpoint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import MagCacheError
from .gram import GRAMS, packed
from .ranks import summed_over_ranks
from .ratios import fitted_shift
from .steps import Call
from .tables import RatioTable

BRANCHES = ("cond", "uncond")
TOKENS_AT_ONCE = 4096
NO_CHANGE = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)  # `comparison_sums` of one token with ratio 1
HIGHEST = 1.01  # a sampler that computes its levels in bfloat16 may begin a little above 1
SAMPLE_BYTES = 2**28  # per branch, all steps together


def branch_name(branch: int) -> str:
    """The name of a branch in tables, by its number (`steps.Call`)."""
    return BRANCHES[branch] if branch < len(BRANCHES) else f"branch{branch}"


def compare_residuals(residual: torch.Tensor, previous: torch.Tensor) -> tuple[float, float, float]:
    """(mean and standard deviation of |r_t| / |r_{t-1}| over the tokens, mean of 1 - cos(r_t, r_{t-1})).

    residual, previous: (batch, tokens, width) of any dtype. Norms are taken in float32, a few thousand tokens at a time
    to save memory; a release that runs in bfloat16 takes them in bfloat16. Paper, section 3.2.
    """
    return moments(comparison_sums(residual, previous))


def comparison_sums(residual: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """float64 tensor (4,): the sums over the tokens of |r_t| / |r_{t-1}|, of its square and of 1 - cos, and the number
    of tokens. Ranks that each hold a part of the tokens can add these up."""
    sums = torch.zeros(3, dtype=torch.float64)
    for new, old in zip(residual.split(TOKENS_AT_ONCE, dim=1), previous.split(TOKENS_AT_ONCE, dim=1)):
        new, old = new.float(), old.float().to(new.device)
        ratio = new.norm(dim=-1) / old.norm(dim=-1)
        distance = 1 - torch.cosine_similarity(new, old, dim=-1)
        sums += torch.stack([part.double().sum() for part in (ratio, ratio.double().square(), distance)]).cpu()
    return torch.cat([sums, sums.new_tensor([residual.shape[0] * residual.shape[1]])])


def moments(sums: torch.Tensor) -> tuple[float, float, float]:
    """`compare_residuals` from its `comparison_sums`."""
    *values, count = sums.tolist()
    mean, square, distance = (value / count for value in values)
    variance = max(0.0, square - mean**2) * count / max(1, count - 1)
    return mean, math.sqrt(variance), distance


class Sample:
    """A fixed random subset of one branch's tokens at every step, for the Gram matrix of a run in bounded memory."""

    def __init__(self, residual: torch.Tensor, steps: int) -> None:
        batch, tokens, width = residual.shape
        count = min(tokens, max(1, SAMPLE_BYTES // (4 * steps * batch * width)))
        self.tokens = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count].sort().values
        self.rows: dict[int, torch.Tensor] = {}  # by step

    def add(self, step: int, residual: torch.Tensor) -> None:
        self.rows[step] = residual[:, self.tokens.to(residual.device)].float().flatten().cpu()

    def gram(self) -> torch.Tensor:
        """Inner products (steps, steps) in float64, some columns at a time."""
        rows = torch.stack([self.rows[step] for step in sorted(self.rows)])
        return sum(part.double() @ part.double().T for part in rows.split(2**16, dim=1))


class Statistics:
    """Collects the statistics of runs at the same noise levels, and averages them.

    Ranks of one process group run the same steps; what each saw of the tokens is added up at the end of a run, so that
    all have the same table.

    runs: of each counted run, {branch: [`moments` of each step but the first]}; grams: {(payload, branch): Gram
    matrix};
    seconds: (of a computed call, of a reused one, number of ranks); levels: their noise levels.
    """

    def __init__(self) -> None:
        self.runs: list[dict[str, list]] = []
        self.grams: list[dict[tuple[str, str], torch.Tensor]] = []
        self.seconds: list[torch.Tensor] = []
        self.levels: list[float] = []
        self.begin(())

    def begin(self, levels: Sequence[float]) -> None:
        """Begin a run, of which nothing counts before `finish`. levels: noise levels of its steps."""
        self.current: dict[str, dict[int, torch.Tensor]] = {}  # {branch: {step: `comparison_sums`}}
        self.previous: dict[int, torch.Tensor | None] = {}  # newest residual of each branch; None: of another expert
        self.samples: dict[tuple[str, str], Sample] = {}  # by payload and branch
        self.current_levels = list(map(float, levels))

    def add(self, call: Call, residual: torch.Tensor, output: torch.Tensor) -> None:
        """Count a computed call. residual: (batch, tokens, width); output: (1, elements, 1)."""
        self.device = residual.device
        branch = branch_name(call.branch)
        rows = self.current.setdefault(branch, {})
        if call.step and call.branch in self.previous and call.step not in rows:
            previous = self.previous[call.branch]
            rows[call.step] = NO_CHANGE if previous is None else comparison_sums(residual, previous)
        self.previous[call.branch] = residual
        for payload, tensor in (("residual", residual), ("output", output)):
            if (payload, branch) not in self.samples:
                self.samples[payload, branch] = Sample(tensor, len(self.current_levels))
            self.samples[payload, branch].add(call.step, tensor)

    def expert_changed(self) -> None:
        """Another expert's residuals follow, between which and the last ones there is no ratio."""
        self.previous = dict.fromkeys(self.previous)

    def finish(self, seconds: tuple[float, float | None]) -> None:
        """Count this run. Branches that were not called at every step (guidance for a part of the run) are left out.

        seconds: of a computed and of a reused call. Raises MagCacheError for a run of another kind than those before.
        """
        steps = len(self.current_levels)
        # By number: a host may call the unconditional branch first.
        by_number = [branch_name(branch) for branch in sorted(self.previous)]
        complete = {
            name: [self.current[name][step] for step in range(1, steps)]
            for name in by_number
            if len(self.current[name]) == steps - 1
        }
        self.previous = {}
        if (
            not complete
            or (self.runs and complete.keys() != self.runs[0].keys())
            or (self.runs and self.levels != self.current_levels)
        ):
            raise MagCacheError(
                "Calibration needs runs of one kind: the same steps, size and guidance, each to its end."
            )
        self.levels = self.current_levels
        self.runs.append(
            {
                branch: [moments(sums) for sums in summed_over_ranks(torch.stack(rows), self.device)]
                for branch, rows in complete.items()
            }
        )
        self.grams.append(
            {
                key: summed_over_ranks(sample.gram(), self.device)
                for key, sample in self.samples.items()
                if key[1] in complete
            }
        )
        self.seconds.append(summed_over_ranks(torch.tensor([*seconds, 1.0], dtype=torch.float64), self.device))
        self.samples = {}

    def table(self, name: str, sampler: dict[str, Any] | None = None, **description: Any) -> RatioTable:
        """The RatioTable of the counted runs, rounded to six decimals. sampler, description: further fields of it."""
        runs = {
            branch: torch.tensor([run[branch] for run in self.runs], dtype=torch.float64).reshape(len(self.runs), -1, 3)
            for branch in self.runs[0]
        }
        means, spread = {}, {}
        for branch, rows in runs.items():
            means[branch], spread[branch] = rows.mean(0), rows.std(0, unbiased=False)
        column: dict[str, Any] = {
            key: by_branch(table, index, first)
            for key, table, index, first in (
                ("mag_ratios", means, 0, 1.0),
                ("mag_std", means, 1, 0.0),
                ("cos_dis", means, 2, 0.0),
                ("spread", spread, 0, 0.0),
            )
        }
        for payload, key in GRAMS.items():
            column[key] = {
                branch: packed(sum(run[payload, branch] for run in self.grams) / len(self.grams)) for branch in runs
            }
        total: Any = sum(self.seconds)
        computed, reused, count = total.tolist()
        seconds = {"computed": round(computed / count, 6), "reused": round(reused / count, 6)}
        return RatioTable(
            name=name,
            mag_ratios=column.pop("mag_ratios"),
            sigmas=[round(min(level, 1.0) if level < HIGHEST else level, 6) for level in self.levels],
            origin="measured",
            statistics={**column, "seconds": seconds, "runs": len(self.runs)},
            sampler={"steps": len(self.levels), "shift": round(fitted_shift(self.levels), 4), **(sampler or {})},
            **description,
        )


def by_branch(tables: dict[str, torch.Tensor], index: int, first: float) -> dict[str, list[float]]:
    """One column of each branch's table, rounded, with the value `first` for the first step."""
    return {
        branch: [first, *(round(value, 6) for value in table[:, index].tolist())] for branch, table in tables.items()
    }


def fingerprint(model: torch.nn.Module) -> str:
    """Twelve hex digits that tell one checkpoint from another, made of names, shapes and four rounded weights per
    matrix.

    They are the same in float32 and bfloat16, and change when a LoRA is loaded. Take them before weights are moved or
    quantised.
    """
    return fingerprint_of(model.named_parameters())


def fingerprint_of(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`fingerprint` of (name, tensor) pairs."""
    parameters = dict(sorted(named_parameters))
    digest = hashlib.sha256()
    for name, parameter in parameters.items():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    for parameter in parameters.values():
        if parameter.ndim > 1:  # what a fine-tune changes; biases and norms often stay
            digest.update(few_values(parameter))
    return digest.hexdigest()[:12]


def few_values(tensor: torch.Tensor) -> bytes:
    """Four evenly spread, rounded values of a tensor, or of the storage of a quantised one, which is not unpacked.
    Empty where there are none (meta tensors, unknown storage): a fingerprint never stops a run, and names and shapes
    still count."""
    try:
        if hasattr(tensor, "full_tensor"):  # each process holds a part, and all come here
            tensor = tensor.full_tensor()
    except RuntimeError:
        return b""
    while hasattr(tensor, "__tensor_flatten__"):  # torchao's and other subclasses
        tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    places = range(0, tensor.numel(), max(1, tensor.numel() // 4))[:4]
    try:
        indices = zip(*(axis.tolist() for axis in np.unravel_index(list(places), tuple(tensor.shape))))
        # One by one: torch 2.4 does not gather float8.
        values = [tensor.detach()[index].to(torch.bfloat16) for index in indices]
        return torch.stack(values).float().cpu().numpy().tobytes()
    except (RuntimeError, ValueError, IndexError, TypeError):  # NotImplementedError is a RuntimeError
        return b""
