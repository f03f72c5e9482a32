"""Names of the files beside an output, and which existing files are MagCache's own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import MagCacheError

REPORT = ".magcache.json"
REFUSED = re.compile(r'[<>:"|?*\x00-\x1f]')  # in a name, by Windows
NAME_BYTES = 255  # of a file's name, in every common file system


@contextmanager
def bookkeeping(what: str, say: Callable[[str], object]) -> Iterator[None]:
    """A context in which an error is reported in one sentence and does not end the program, because rendering may have
    taken hours. what: the subject of that sentence; say: gets it."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        why = str(error).strip() if isinstance(error, MagCacheError) else f"{type(error).__name__}: {error}"
        say(f"{what} failed ({why.rstrip('.: ')}); the rendering is kept.")


def beside(target: Path, ending: str) -> Path:
    """The path beside an output with another ending: "x.mp4", "_compare.mp4" -> "x_compare.mp4"."""
    return target.with_name(fitting(target.stem, ending))


def fitting(stem: str, ending: str) -> str:
    """stem + ending, of at most 255 bytes. A longer stem loses its middle: hosts put the prompt there, and at the end
    the time or number that distinguishes two outputs."""
    room = NAME_BYTES - len(ending.encode())
    if len(stem.encode()) <= room:
        return stem + ending
    head, tail = stem.encode()[: room - 41], stem.encode()[-40:]
    return f"{head.decode(errors='ignore')}_{tail.decode(errors='ignore')}{ending}"


def report_at(path: Path) -> dict | None:
    """The content of an earlier report; None: there is none, or the file is not MagCache's."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"strip", "sections"} & content.keys() else None


def report_place(target: Path) -> Path:
    """Where to write the report of an output: over an earlier report, never over another file."""
    path = beside(target, REPORT)
    return own_place(path, [path.name] if report_at(path) else [])


def files_of(target: Path) -> list[str]:
    """Names of the files that an earlier report of this output lists as written."""
    files = (report_at(beside(target, REPORT)) or {}).get("files")
    return [*files] if isinstance(files, list) else []


def put_in_place(part: Path, target: Path) -> Path:
    """Rename a finished file and return its path. Windows refuses to replace a file that is open in a player, so the
    new one gets a number, and some characters, as in HunyuanVideo's times, which become "-"."""
    try:
        return part.replace(target)
    except OSError:
        return part.replace(own_place(target.with_name(REFUSED.sub("-", target.name)), []))


def own_place(path: Path, ours: Container[str]) -> Path:
    """The path, with a number if another file has it. ours: names of files that may be overwritten."""
    number, free = 1, path
    stem, dot, ending = path.name.partition(".")
    while free.exists() and free.name not in ours:
        number += 1
        free = path.with_name(fitting(stem, f"_{number}{dot}{ending}"))
    return free
