"""Write whole files or none."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

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
    part = path.with_name(f".{crc32(path.name.encode()):08x}.{os.getpid()}.part")  # the name may fill all 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise MagCacheError(f"{path} cannot be written ({error.strerror}); choose another place.") from None
    finally:
        with suppress(OSError):
            part.unlink()


def plain(value: Any) -> Any:
    """The value with numpy's arrays and numbers replaced by lists and numbers, for JSON."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value
