"""Write whole files or none."""

from __future__ import annotations

import json
import re
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import MagCacheError


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, each list of numbers on one line. Raises MagCacheError if the file cannot be written."""
    text = json.dumps(plain(content), indent=1)
    write_text(
        path, re.sub(r"\[\n\s+([-+.\deE,\s]*?)\n\s*\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a whole file or nothing. Raises MagCacheError if it cannot be written."""
    path = Path(path)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MagCacheError(f"{path} cannot be written ({error.strerror}); choose another place.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its place: a name that no other process or container uses, and short,
    because the file's own name may fill all 255 bytes."""
    return path.parent / f".{uuid.uuid4().hex}.part{path.suffix}"


def plain(value: Any) -> Any:
    """The value with numpy's arrays and numbers replaced by lists and numbers, for JSON."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value
