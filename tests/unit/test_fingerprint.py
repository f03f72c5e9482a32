"""The fingerprint of a checkpoint: which weights it tells apart, and that no weights stop it."""

import hashlib

import pytest
import torch

from common.calibration import few_values, fingerprint


def layers(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(1, 2))


class Packed(torch.Tensor):
    """As torchao's: a bfloat16 tensor to the outside, int8 within, without the operations that nobody wrote for it."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.bfloat16)

    def __init__(self, data):
        self.data_int8 = data

    def __tensor_flatten__(self):
        return ["data_int8"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].data_int8)
        raise NotImplementedError(str(function))


def packed_model(seed):
    data = torch.randint(-128, 128, (16, 16), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    model = torch.nn.Linear(16, 16)
    model.weight = torch.nn.Parameter(Packed(data), requires_grad=False)
    return model


def test_it_is_that_of_every_calibration_so_far():
    """Names, shapes and every fourth part's first weight of each matrix: files on users' disks are named by it."""
    model, digest = layers(), hashlib.sha256()
    parameters = sorted(dict(model.named_parameters()).items())
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
    for _, parameter in parameters:
        if parameter.ndim > 1:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 4)][:4]
            digest.update(values.to(torch.bfloat16).float().numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()[:12] == fingerprint(layers().bfloat16())
    assert fingerprint(layers(1)) != fingerprint(model)


@pytest.mark.robustness(
    "Files",
    "weights that are quantised (torchao), scaled float8 or on meta",
    "their fingerprint uses a few packed values, or names and shapes; it never stops a run",
)
def test_quantised_weights_are_told_apart_by_their_storage():
    with pytest.raises(NotImplementedError):
        packed_model(0).weight.flatten()
    assert len(few_values(packed_model(0).weight)) == 16
    assert fingerprint(packed_model(0)) == fingerprint(packed_model(0)) != fingerprint(packed_model(1))


@pytest.mark.robustness("Files", "weights that are quantised (torchao), scaled float8 or on meta")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8, torch.int8])
def test_scaled_types_have_values(dtype):
    assert len(few_values(torch.arange(64).reshape(8, 8).to(dtype))) == 16


@pytest.mark.robustness("Files", "weights that are quantised (torchao), scaled float8 or on meta")
def test_weights_without_values_stop_nothing():
    with torch.device("meta"):
        model = layers()
    assert len(fingerprint(model)) == 12 and fingerprint(model) != fingerprint(layers())
    assert few_values(torch.zeros(0, 3)) == b""
    assert few_values(torch.eye(4).to_sparse()) == few_values(torch.eye(4))
