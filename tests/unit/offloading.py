"""Ways of offloading, on the CPU."""

import accelerate
import torch

CPU = torch.device("cpu")


def sequential(model):
    """As `enable_sequential_cpu_offload`: each layer's weights are fetched for the length of its call."""
    accelerate.cpu_offload(model, execution_device=CPU)


def whole_model(model):
    """As `enable_model_cpu_offload`."""
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)
