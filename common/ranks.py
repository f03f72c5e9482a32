"""Several processes: which one writes, and what all of them must know."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch


def is_writer() -> bool:
    """Whether this is the process that writes: rank 0 of torchrun, or the only one."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def in_a_group() -> bool:
    """Whether this process is one of several in a process group."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shared_by_processes(models: Sequence[torch.nn.Module]) -> bool:
    """Whether the processes of the group make each call of these models together, because each holds a part of the
    weights (FSDP, tensor parallelism) or of the tokens (diffusers' context parallelism). Otherwise each may draw
    something else."""
    return in_a_group() and any(
        getattr(model, "_parallel_config", None) is not None
        or "_fsdp_wrapped_module" in model._modules
        or any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
        for model in models
    )


def broadcast_from_writer(find: Callable[[], Any]) -> Any:
    """What `find()` returns on the process that writes, for all processes: ranks may see different folders, and must
    not plan differently."""
    found, distributed = [find() if is_writer() else None], torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        # Not every host makes a rank's GPU the current one.
        device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if distributed.get_backend() == "nccl" else None
        )
        distributed.broadcast_object_list(found, src=0, device=device)
    return found[0]


def summed_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum over all processes of the default group, or the tensor itself if there is one process. device: this
    rank's, because not every host makes it the current one."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return tensor
    shared = tensor.to(device if distributed.get_backend() == "nccl" else "cpu", copy=True)
    distributed.all_reduce(shared)
    return shared.to(tensor.device)
