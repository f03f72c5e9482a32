"""Habits of the repository that no linter checks."""

import ast
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_INS = ("open_sora_1", "open_sora_2", "toy_page")  # checkouts of a few lines, with the names of the real ones
SHARED_ROLES = {
    "main": "what a program does",
    "subject": "the fixture that each user of hunyuan_checks.py defines for its tests",
}


def sources():
    """{path: its tree} of the repository's Python files, those of stand-ins excepted."""
    folders = ("common", "benchmarks", "demo", "tests", "MagCache4*", "ComfyUI-MagCache")
    paths = [path for folder in folders for path in REPOSITORY.glob(f"{folder}/**/*.py")]
    return {
        path.relative_to(REPOSITORY): ast.parse(path.read_text())
        for path in sorted(paths)
        if not {*STAND_INS} & {*path.parts}
    }


def test_no_two_files_have_a_class_or_function_of_one_name():
    places = defaultdict(list)
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                places[node.name].append(str(path))
    assert len(places) > 1000
    assert {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED_ROLES} == {}
    assert all(len(places[name]) > 1 for name in SHARED_ROLES)


def test_the_page_on_robustness_is_what_its_tests_say():
    page = [sys.executable, REPOSITORY / "benchmarks" / "robustness_page.py", "--check"]
    done = subprocess.run(page, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


def test_text_is_opened_with_its_encoding():
    """Else it is the system's, and Windows has another one than the rest."""
    openers = {"open", "read_text", "write_text", "fdopen"}
    silent = [
        f"{path}:{call.lineno}"
        for path, tree in sources().items()
        for call in ast.walk(tree)
        if path.parts[0] != "tests" and isinstance(call, ast.Call)
        if ast.unparse(call.func).rpartition(".")[2] in openers
        and ast.unparse(call.func) not in ("Image.open", "wave.open", "os.open", "write_text")
        and not any(word.arg == "encoding" for word in call.keywords)
        and not any(isinstance(argument, ast.Constant) and "b" in str(argument.value) for argument in call.args[:2])
    ]
    assert silent == []


def test_no_file_of_the_engine_is_long():
    lengths = {path.name: len(path.read_text().splitlines()) for path in REPOSITORY.glob("common/*.py")}
    assert len(lengths) > 20 and {name: lines for name, lines in lengths.items() if lines > 300} == {}


def test_nobody_asks_which_kind_of_wish_it_is():
    """`Settings` and `Target` answer alike: no type of theirs is tested for."""
    asked = [
        str(path)
        for path, tree in sources().items()
        for node in ast.walk(tree)
        if path.parts[0] != "tests" and isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if {"Settings", "Target"} & {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
    ]
    assert asked == []
