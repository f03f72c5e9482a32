"""The hosts' own packages, for tests against their real code: downloaded by pip, pinned by version and sha256, unpacked
once into a cache folder ($MAGCACHE_TEST_CACHE, else ~/.cache/magcache-tests) and never installed among the others. Two
processes may ask for one at a time: the first that is done puts it in place."""

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


def unpacked_package(name, version, sha256):
    """The folder with the files of one wheel or sdist (of an sdist the folder inside it). The tests that ask for it are
    skipped where it cannot be had. sha256: of that one file, which also says which of a release's files is meant."""

    def make(scratch):
        unpack(download(f"{name}=={version}", sha256, scratch), scratch / "made")

    folder = made_once(f"{name}-{version}-{sha256[:12]}", make, f"{name} {version} cannot be downloaded")
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def installed(name, *arguments):
    """A folder of the cache, named so, with what `pip install` puts there when it is given these arguments: to be had
    by PYTHONPATH. The tests that ask for it are skipped where it cannot be had."""

    def make(scratch):
        pip("install", "--target", scratch / "made", *arguments)

    return made_once(name, make, f"{name} cannot be installed here")


def made_once(name, make, failure):
    """The folder of the cache, made if need be: `make(scratch)` makes scratch/"made"."""
    folder = cache_folder() / name
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                make(Path(scratch))
                with suppress(OSError):  # another process was first
                    (Path(scratch) / "made").rename(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
            pytest.skip(f"{failure}: {' '.join(reason)}")
    return folder


def pip(command, *arguments):
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
    )


def download(requirement, sha256, folder):
    """Download one file into a folder; pip compares the hash."""
    (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip(
        "download",
        "--no-deps",
        "--require-hashes",
        "--ignore-requires-python",
        "--no-build-isolation",
        "--dest",
        folder / "file",
        "--requirement",
        folder / "requirements.txt",
    )
    return next((folder / "file").iterdir())


def unpack(archive, folder):
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as files:
            files.extractall(folder)
    else:
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
