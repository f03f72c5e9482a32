"""Stand-ins for packages that a host imports and a test does not need."""

import importlib.abc
import importlib.machinery
import sys
import types


class StandIn(types.ModuleType):
    """A module in which any name is a class that does nothing."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds these packages, and all modules in them, in `sys.meta_path`."""

    def __init__(self, names):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names and name not in sys.modules:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass


def stand_in(name, **content):
    """Put one into sys.modules, with what is called of it."""
    module = sys.modules[name] = StandIn(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(content)
    return module
