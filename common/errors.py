"""The error for a mistake that the user can fix, told in one sentence."""

from __future__ import annotations

import sys
from types import ModuleType


class MagCacheError(Exception):
    """A mistake that the user can fix; its text is one sentence that says how."""


def escape_unprintable() -> None:
    """From here on print characters that the console or log file lacks, as on Windows, as escapes. Otherwise a file
    name in another script would end the program with an error once the file is saved."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def needs(module: str, package: str) -> ModuleType:
    """Import a module of a package that only some commands use. Raises MagCacheError, which names the package, where it
    is not installed."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise MagCacheError(f"This needs the package {package}: pip install {package}") from None
