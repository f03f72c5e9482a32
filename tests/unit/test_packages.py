"""The downloads of the other tests: whole or not at all, and a skip with one sentence where there is none."""

import subprocess
import tarfile
import zipfile

import packages
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MAGCACHE_TEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def archive(path):
    """A wheel with two folders, or an sdist with one."""
    source = path.parent / "source.py"
    source.write_text("x = 1\n")
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as files:
            files.write(source, "package/module.py")
            files.write(source, "package-1.0.dist-info/METADATA")
    else:
        with tarfile.open(path, "w:gz") as files:
            files.add(source, "package-1.0/package/module.py")
    return path


@pytest.mark.parametrize("name", ["package-1.0-py3-none-any.whl", "package-1.0.tar.gz"])
def test_wheel_and_sdist(name, tmp_path, monkeypatch):
    downloads = []

    def download(requirement, sha256, folder):
        downloads.append(requirement)
        return archive(folder / name)

    monkeypatch.setattr(packages, "download", download)
    for _ in range(2):
        folder = packages.unpacked_package("package", "1.0", "0" * 64)
        assert (folder / "package" / "module.py").read_text() == "x = 1\n"
    assert downloads == ["package==1.0"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["package-1.0-000000000000"]


def test_the_hash_is_compared(tmp_path, monkeypatch):
    """pip itself, with a local file for an index."""
    archive(tmp_path / "package-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"^package 1\.0 cannot be downloaded: ") as skipped:
        packages.unpacked_package("package", "1.0", "0" * 64)
    assert "\n" not in str(skipped.value) and not list((tmp_path / "cache").iterdir())


def test_what_cannot_be_had_skips():
    with pytest.raises(pytest.skip.Exception, match=r"^nonesuch 1\.0 cannot be downloaded: ERROR: .*"):
        packages.unpacked_package("nonesuch", "1.0", "0" * 64)


def test_a_download_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    def download(requirement, sha256, folder):
        (folder / "half").write_text("half")
        raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: slow\nERROR: no network")

    monkeypatch.setattr(packages, "download", download)
    with pytest.raises(pytest.skip.Exception, match="ERROR: no network"):
        packages.unpacked_package("package", "1.0", "0" * 64)
    assert not list((tmp_path / "cache").iterdir())


def test_an_installation_is_made_once(tmp_path, monkeypatch):
    wheel = archive(tmp_path / "package-1.0-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("package/module.py", "x = 1\n")
        files.writestr("package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: package\nVersion: 1.0\n")
        files.writestr("package-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        files.writestr("package-1.0.dist-info/RECORD", "")
    folder = packages.installed("mine", "--no-deps", wheel)
    assert folder == tmp_path / "cache" / "mine" and (folder / "package" / "module.py").is_file()
    wheel.unlink()
    assert packages.installed("mine", "--no-deps", wheel) == folder


def test_of_two_that_make_one_the_first_stays(tmp_path):
    def make(scratch):
        (scratch / "made").mkdir()
        (scratch / "made" / "second").touch()
        (tmp_path / "cache" / "mine").mkdir()
        (tmp_path / "cache" / "mine" / "first").touch()

    folder = packages.made_once("mine", make, "it failed")
    assert [path.name for path in folder.iterdir()] == ["first"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["mine"]
