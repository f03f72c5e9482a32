"""Copy a drop-in script and `common/` into an upstream checkout, without overwriting anybody else's file.

The `install.json` of a drop-in folder holds: `files` to copy; `recognised_by`, files that the checkout must have;
`into`, the folder of the checkout to copy to (by default its root); `upstream`, its name; and `run`, the command to
print. For several checkouts it holds a list of these, of which the first that fits is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..errors import MagCacheError
from ..files import write_json

COMMON = Path(__file__).resolve().parents[1]
# In a clone the drop-in folders are beside `common`, in an installed package in its folder `bundled`.
REPOSITORY = COMMON / "bundled" if (COMMON / "bundled").is_dir() else COMMON.parent
MANIFEST = ".magcache_installed.json"


def folders() -> list[str]:
    """The drop-in folders of this repository."""
    return sorted(path.parent.name for path in REPOSITORY.glob("*/install.json"))


def common_files() -> dict[str, Path]:
    """{name in the checkout: path here} of the files of `common`."""
    paths = [path for kind in ("*.py", "hosts/*.py", "scripts/*.py", "presets/*.json") for path in COMMON.glob(kind)]
    return {f"common/{path.relative_to(COMMON).as_posix()}": path for path in sorted(paths)}


def install(folder: str, path: str | Path) -> str:
    """Copy a drop-in folder into the checkout at `path` and return the command to run there. Raises MagCacheError
    before copying anything if that is another checkout or has a file of the same name that was not installed by this
    function, and if a file cannot be written."""
    source, checkout = REPOSITORY / Path(folder).name, Path(path)
    if not (source / "install.json").is_file():
        raise MagCacheError(f"There is nothing to install in '{folder}'; the folders are {', '.join(folders())}.")
    if not checkout.is_dir():
        raise MagCacheError(f"There is no folder {checkout}.")
    facts = recognised(json.loads((source / "install.json").read_text(encoding="utf-8")), checkout)

    files = {**common_files(), **{name: source / name for name in facts["files"]}}
    target = checkout / facts.get("into", "")
    manifest_path = target / MANIFEST
    try:
        written = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.is_file() else {}
    except (OSError, ValueError):
        raise MagCacheError(f"{manifest_path} cannot be read; remove it and what was installed with it.") from None
    foreign = [
        name
        for name in files
        if (target / name).exists()
        and not ((target / name).is_file() and digest(target / name) in (written.get(name), digest(files[name])))
    ]
    if foreign:
        raise MagCacheError(
            f"{target / foreign[0]} is in the way and was not written by this command, or was edited since; "
            "move it away first."
        )
    for name, file in files.items():
        try:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(file.read_bytes())
        except OSError as error:
            raise MagCacheError(
                f"{target / name} cannot be written ({error.strerror}); make the folder writable."
            ) from None
    write_json(manifest_path, written | {name: digest(file) for name, file in files.items()})
    return facts["run"]


def recognised(known: dict | list[dict], target: Path) -> dict:
    """The first entry of an `install.json` that fits the folder. Raises MagCacheError if none does."""
    known = known if isinstance(known, list) else [known]
    missing = [[name for name in facts["recognised_by"] if not (target / name).exists()] for facts in known]
    found = next((facts for facts, absent in zip(known, missing) if not absent), None)
    if found is None:
        fewest: list[str] = min(missing, key=len)
        names = list(dict.fromkeys(facts["upstream"] for facts in known))
        raise MagCacheError(f"{target} is not a checkout of {' or '.join(names)}: it has no {', '.join(fewest)}.")
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
