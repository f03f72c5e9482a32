"""Open-Sora 1.2 and 1.3 tell their users Python 3.9, and `install` runs in whatever Python a user has: with the
standard library alone. Run by those that are installed here, on the PATH or by pyenv.

MAGCACHE_OTHER_PYTHON=/path/to/python runs the unit tests in an environment with an older torch. Tried were Python 3.9
with torch 2.2.2 (Open-Sora 1.3's), 3.10 with 2.4.1 (Open-Sora 2.0's, HunyuanVideo's) and 3.10 with 2.5.1."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHONS = ("3.9", "3.10", "3.12")
# Every module is imported and every class and function defined, on classes that stand in for what is not installed.
IMPORT_ALL = """
import importlib, importlib.machinery, sys, types

class Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {"__init__": lambda self, *args, **kwargs: None})

class StandIn(types.ModuleType):
    def __getattr__(self, name):
        return getattr(Anything("anything", (), {}), name)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numpy", "torch", "tqdm"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return StandIn(spec.name)

    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def pythons(version):
    """Those of this version: on the PATH, where pyenv's are only names of what may be missing, and pyenv's own."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return [shutil.which(f"python{version}"), *sorted(root.glob(f"versions/{version}.*/bin/python"))]


@pytest.fixture(params=PYTHONS)
def python(request):
    """A Python of this version, without the packages of this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def starting(found):
        def run(*arguments):
            command = [found, "-S", *map(str, arguments)]
            return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

        return run

    found = [starting(path) for path in pythons(request.param) if path]
    works = [run for run in found if f"Python {request.param}." in run("--version").stdout]
    if not works:
        pytest.skip(f"python{request.param} is not installed")
    return works[0]


def modules(folder, prefix=""):
    return [prefix + path.stem for path in sorted((REPOSITORY / folder).glob("*.py")) if path.stem != "__main__"]


def test_every_module_can_be_imported(python):
    folders = ("common", "common/hosts", "common/scripts")
    names = [name for folder in folders for name in modules(folder, folder.replace("/", ".") + ".")]
    done = python("-c", IMPORT_ALL, *names)
    assert done.returncode == 0 and "common.scripts.session" in names, done.stderr[-2000:]
    for folder in ("MagCache4Open-Sora", "MagCache4FramePack"):
        code = f"import sys; sys.path.insert(0, {folder!r})\n{IMPORT_ALL}"
        done = python("-c", code, *(name for name in modules(folder) if "opensora" in name or "framepack" in name))
        assert done.returncode == 0, done.stderr[-2000:]


def test_install_takes_the_standard_library_alone(python, tmp_path):
    for folder in sorted(path.parent.name for path in REPOSITORY.glob("MagCache4*/install.json")):
        known = json.loads((REPOSITORY / folder / "install.json").read_text())
        for number, facts in enumerate(known if isinstance(known, list) else [known]):
            target = tmp_path / folder / str(number)
            target.mkdir(parents=True)
            for name in facts["recognised_by"]:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).touch()
            done = python("-m", "common", "install", folder, target)
            assert done.returncode == 0 and facts["run"] in done.stdout, done.stderr[-2000:]
            assert all((target / facts.get("into", "") / name).is_file() for name in facts["files"])


@pytest.mark.parametrize(
    "script", sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob("MagCache4*/magcache_*.py")), ids=str
)
def test_a_drop_in_started_in_the_clone_says_what_is_missing(script):
    """Not a traceback; those of diffusers need no checkout and run there."""
    if script.parent.name.startswith(("MagCache4FLUX", "MagCache4Diffusers")) or script.stem in (
        "magcache_framepack",
        "magcache_opensora",
    ):
        pytest.skip("runs in the clone, or is no script")
    if not (REPOSITORY / script).read_text().count('if __name__ == "__main__"'):
        pytest.skip("is no script")
    done = subprocess.run([sys.executable, REPOSITORY / script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith(script.name)]
    assert "python -m common install" in sentence or "needs the package" in sentence


def test_the_unit_tests_in_another_environment():
    """But those of the repository's own tools, and of packages that are not there."""
    other = os.environ.get("MAGCACHE_OTHER_PYTHON")
    if not other:
        pytest.skip("MAGCACHE_OTHER_PYTHON names no Python of another environment")
    left_out = ("other_pythons", "package", "packages", "readme", "readme_commands", "benchmarks", "contributing")
    ignored = [f"--ignore=tests/unit/test_{name}.py" for name in left_out]
    done = subprocess.run(
        [other, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "tests/unit", *ignored],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
