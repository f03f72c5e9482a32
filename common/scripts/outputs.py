"""Names of the files beside an output, and which of those that lie there are ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MagCacheError

REPORT = ".magcache.json"
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]')  # in a name, by Windows
NAME_BYTES = 255  # of a file's name, in every common file system


@contextmanager
def bookkeeping(what: str, say: Callable[[str], object]) -> Iterator[None]:
    """For its duration, errors are told in one sentence and do not end the program: what is already rendered may have
    taken hours."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        why = str(error).strip() if isinstance(error, MagCacheError) else f"{type(error).__name__}: {error}"
        say(f"{what} failed ({why.rstrip('.: ')}); the rendering is kept.")


def beside(target: Path, ending: str) -> Path:
    """A file beside an output: "x.mp4", "_compare.mp4" -> "x_compare.mp4"."""
    return target.with_name(fitting(target.stem, ending))


def fitting(stem: str, ending: str) -> str:
    """A name of at most 255 bytes. What is too long loses its middle: hosts put the prompt there, and the time or the
    number that tells two outputs apart at the end."""
    room = NAME_BYTES - len(ending.encode())
    if len(stem.encode()) <= room:
        return stem + ending
    head, tail = stem.encode()[: room - 41], stem.encode()[-40:]
    return f"{head.decode(errors='ignore')}_{tail.decode(errors='ignore')}{ending}"


def report_at(path: Path) -> dict | None:
    """The content of an earlier report; None where there is none, or a file of somebody else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"strip", "sections"} & content.keys() else None


def report_place(target: Path) -> Path:
    """Where the report of an output goes: over an earlier one, and never over a file of somebody else."""
    path = beside(target, REPORT)
    return own_place(path, [path.name] if report_at(path) else [])


def files_of(target: Path) -> list:
    """Names of the files that an earlier report of this output says it wrote."""
    files = (report_at(beside(target, REPORT)) or {}).get("files")
    return [*files] if isinstance(files, list) else []


def put_in_place(part: Path, target: Path) -> Path:
    """Give a finished file its name and return it. Windows refuses to replace a file that a player shows: the new one
    gets a number. It refuses some characters, as in the time that HunyuanVideo puts there: they become "-"."""
    try:
        return part.replace(target)
    except OSError:
        return part.replace(own_place(target.with_name(REFUSED.sub("-", target.name)), []))


def own_place(path: Path, ours) -> Path:
    """The path, or one with a number where a file lies there that is not among `ours` by its name."""
    number, free = 1, path
    stem, dot, ending = path.name.partition(".")
    while free.exists() and free.name not in ours:
        number += 1
        free = path.with_name(fitting(stem, f"_{number}{dot}{ending}"))
    return free
