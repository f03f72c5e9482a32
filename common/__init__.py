"""The module that every MagCache script shares (arXiv 2506.09045); `pip install .` gives it the name `magcache`.

Importing it takes numpy at most: a public name brings in its module, and torch where that needs it, when it is used.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.2.0"

PUBLIC = {
    "Host": ".blocks",
    "MagCacheError": ".errors",
    "Settings": ".schedule",
    "Target": ".planner",
    "disable": ".pipeline",
    "enable": ".pipeline",
    "load": ".tables",
    "magcache_calibration": ".patch",
    "magcache_forward": ".patch",
}
__all__ = ["__version__", *PUBLIC]


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(PUBLIC[name], __name__), name)


def __dir__():
    return sorted({*globals(), *PUBLIC})
