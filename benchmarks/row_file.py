"""Measured values of a benchmark in a file, so that an interrupted run can be continued."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from demo_model import REPOSITORY  # noqa: F401  (which makes `common` importable)

from common.errors import MagCacheError
from common.files import write_text


class RowFile:
    """Measured values by key. run: describes images, settings and machine, which all values of a file share.

    Raises MagCacheError if the file holds values of another run, or is not such a file.
    """

    def __init__(self, path: Path, run: dict[str, Any]):
        self.path, self.run = path, json.loads(json.dumps(run))
        self.known = self.read()

    def read(self) -> dict[str, Any]:
        """The values in the file."""
        if not self.path.exists():
            return {}
        try:
            held = json.loads(self.path.read_text(encoding="utf-8"))
            theirs, known = held["run"], held["known"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MagCacheError(f"{self.path} holds no measured rows ({error}); name another --rows.") from None
        differing = [name for name in self.run if theirs.get(name) != self.run[name]]
        if differing:
            raise MagCacheError(
                f"The rows in {self.path} are of another run: {', '.join(differing)} differ. Name another --rows, or "
                "move the file away to measure all rows again."
            )
        return known

    def recall(self, key: str, measure: Callable[[], Any]) -> Any:
        """The value of this key. An unknown one is measured and written at once."""
        if key not in self.known:
            value = measure()
            self.known |= self.read() | {key: value}  # another process may have measured meanwhile
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"run": self.run, "known": self.known}, indent=1))
        return self.known[key]


def digest_of_code(files: Iterable[Path]) -> str:
    """Eight hexadecimal digits that change with the code of these Python files, not with comments and layout."""
    code = [ast.dump(ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(files)]
    return hashlib.sha256("".join(code).encode()).hexdigest()[:8]
