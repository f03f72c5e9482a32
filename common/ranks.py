"""Several processes: who writes, and what all of them know."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch


def is_writer() -> bool:
    """One process writes: rank 0 of torchrun, or the only one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def told_by_writer(find: Callable[[], Any]) -> Any:
    """What `find()` returns on the process that writes, on all of them: ranks may see different folders, and must not
    plan differently."""
    found, distributed = [find() if is_writer() else None], torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        # Not every host makes the GPU of a rank the current one.
        device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if distributed.get_backend() == "nccl" else None
        )
        distributed.broadcast_object_list(found, src=0, device=device)
    return found[0]


def summed_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all processes of the default group; the tensor itself where there is one process. device: this
    rank's, since not every host makes it the current one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    shared = tensor.to(device if distributed.get_backend() == "nccl" else "cpu", copy=True)
    distributed.all_reduce(shared)
    return shared.to(tensor.device)
