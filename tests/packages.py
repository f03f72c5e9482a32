"""The hosts' own packages, for tests against their real code: downloaded by pip, pinned by version and sha256, unpacked
once into a cache folder ($MAGCACHE_TEST_CACHE, else ~/.cache/magcache-tests) and never installed."""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest


def cache_folder():
    return Path(os.environ.get("MAGCACHE_TEST_CACHE", Path.home() / ".cache" / "magcache-tests"))


def unpacked(name, version, sha256):
    """The folder with the files of one wheel or sdist (of an sdist the folder inside it). The tests that ask for it are
    skipped where it cannot be had. sha256: of that one file, which also says which of a release's files is meant."""
    folder = cache_folder() / f"{name}-{version}-{sha256[:12]}"
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                unpack(download(f"{name}=={version}", sha256, Path(scratch)), Path(scratch) / "unpacked")
                with suppress(OSError):  # another process was first
                    (Path(scratch) / "unpacked").rename(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            pytest.skip(f"{name} {version} cannot be downloaded: {' '.join(reason)}")
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def download(requirement, sha256, folder):
    """Download one file into a folder; pip compares the hash."""
    (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--require-hashes",
            "--ignore-requires-python",
            "--no-build-isolation",
            "--dest",
            folder / "file",
            "--requirement",
            folder / "requirements.txt",
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    return next((folder / "file").iterdir())


def unpack(archive, folder):
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder)
    else:
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
