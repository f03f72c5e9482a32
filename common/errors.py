"""The mistakes that a user can mend, each told in one sentence."""

from __future__ import annotations

import sys
from types import ModuleType


class MagCacheError(Exception):
    """A mistake that the user can mend; its text is one sentence that says how."""


def escape_unprintable() -> None:
    """From here on whatever a program prints can be printed: a console or a log file that lacks a character, as on
    Windows, shows its number. Without it, a name in another script ends the program once its file is saved."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def needs(module: str, package: str) -> ModuleType:
    """Import a module of a package that only some commands use; a sentence names the package when it is missing."""
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise MagCacheError(f"This needs the package {package}: pip install {package}") from None
