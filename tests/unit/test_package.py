"""What `pip install .` gives: the wheel is built, installed into an empty environment and used from there."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import common
from common.scripts.install import folders

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return next(folder.glob("magcache-*.whl"))


@pytest.fixture(scope="module")
def in_environment(wheel, tmp_path_factory):
    """A function that runs a command of an environment that holds the wheel; numpy and the rest, which would take
    minutes, come from this one. Returns what was printed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    paths = {name: sysconfig.get_path(name, "venv", {"base": folder}) for name in ("scripts", "purelib")}
    install = [sys.executable, "-m", "pip", "--python", folder, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (Path(paths["purelib"]) / "others.pth").write_text(sysconfig.get_path("purelib"))

    def run(name, *arguments, cwd=folder):
        command = [Path(paths["scripts"]) / name, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_command_plans_and_lists(in_environment):
    assert "computes 9 of 28" in in_environment("magcache", "plan", "flux-dev")
    assert "wan2.1-t2v-14b" in in_environment("magcache", "presets")
    assert in_environment("magcache", "--version").strip() == f"MagCache {common.__version__}"


def test_the_package_has_the_public_names(in_environment):
    code = (
        "import sys, magcache; assert 'numpy' not in sys.modules and 'site-packages' in magcache.__file__; "
        "print(magcache.load('flux-dev').steps, 'torch' in sys.modules); "
        "print(*(getattr(magcache, name) is not None for name in magcache.__all__))"
    )
    first, names = in_environment("python", "-c", code).splitlines()
    assert first == "28 False" and set(names.split()) == {"True"}


def test_install_from_the_wheel_gives_what_a_clone_gives(in_environment, tmp_path):
    (tmp_path / "wan").mkdir()
    for name in ("generate.py", "wan/first_last_frame2video.py"):
        (tmp_path / name).write_text("")
    assert "magcache_generate.py" in in_environment("magcache", "install", "MagCache4Wan2.1", tmp_path)
    assert (tmp_path / "magcache_generate.py").is_file()
    assert not (tmp_path / "common" / "bundled").exists()
    installed_files = {path.relative_to(tmp_path / "common") for path in (tmp_path / "common").rglob("*.*")}
    ours = [path for path in (REPOSITORY / "common").rglob("*") if path.suffix in (".py", ".json")]
    assert installed_files == {path.relative_to(REPOSITORY / "common") for path in ours}
    assert "9 of 28" in in_environment("python", "-m", "common", "plan", "flux-dev", cwd=tmp_path)


def test_every_drop_in_and_the_demo_are_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for folder in folders():
        assert f"magcache/bundled/{folder}/install.json" in names
    tracked = subprocess.run(["git", "ls-files", "demo"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert {f"magcache/bundled/{name}" for name in tracked.split()} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


def test_install_needs_the_standard_library_only(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('numpy is not to be imported here')")
    (tmp_path / "host").mkdir()
    command = [sys.executable, "-m", "common", "install", "MagCache4FLUX", tmp_path / "host"]
    done = subprocess.run(command, cwd=REPOSITORY, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "Installed" in done.stdout, done.stderr


TEN_LINES = """
import sys
sys.path.insert(0, sys.argv[1])
import magcache
from tiny_pipelines import FAMILIES
for name, make in FAMILIES.items():
    pipe, arguments = make()
    with magcache.enable(pipe, speedup=2.5, announce=None) as cache:
        pipe(**arguments(1), num_inference_steps=8)
    print(name, magcache.__file__, cache.report.replace(chr(10), " "))
"""


@pytest.mark.slow
def test_ten_lines_on_each_family_of_pipelines(in_environment, tmp_path):
    (tmp_path / "ten_lines.py").write_text(TEN_LINES)
    said = in_environment("python", tmp_path / "ten_lines.py", REPOSITORY / "tests" / "hosts").splitlines()
    assert len(said) == 12 and all("site-packages" in line and "reused" in line for line in said)
    assert all(int(re.search(r"(\d+) reused", line)[1]) > 0 for line in said)
