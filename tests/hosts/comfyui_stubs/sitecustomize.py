"""On the path of every Python process that runs ComfyUI in a test: stand-ins for torchvision and torchaudio, whose
registry builds need CUDA, and one thread, since tiny models lose more to threads than they gain."""

import importlib.machinery
import sys
import types

NAMES = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.transforms.v2",
    "torchvision.ops",
    "torchvision.models",
    "torchvision.models.optical_flow",
    "torchvision.io",
    "torchaudio",
    "torchaudio.functional",
    "torchaudio.transforms",
)


class Absent(types.ModuleType):
    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": self.refuse})

    def refuse(self, *args, **kwargs):
        raise RuntimeError(f"{self.__name__} is not there in these tests")


for name in NAMES:
    module = Absent(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__version__ = "0.0"
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
