"""The page docs/robustness.md: what was tried, and what happens, by the tests that try it.

    python benchmarks/robustness_page.py            # runs these tests and writes the page
    python benchmarks/robustness_page.py --check    # runs nothing: is the page what the tests say of themselves?

A test says it with a mark: `@pytest.mark.robustness(section, tried, happens)`. Of several tests of one row, only the
first says what happens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from outcomes import Outcomes

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "robustness.md"
FOLDERS = ("unit", "hosts", "page")  # in which the rows of a section follow each other
HEAD = """# Edge cases: what was tried, and what happens

One rule holds for all rows: a step is reused only from a residual of the same run, conditioning, trajectory, shape and
device. When in doubt the step computes, and the report counts it with the reason.

Each row is a test of the suite; those on models run real diffusers code with small random weights, on a CPU.
`python benchmarks/robustness_page.py` runs these tests and writes this page; a row whose test fails or is skipped says
so.
"""
SECTIONS = {  # title: (what stands before its table, and after it)
    "Threads, copies and shared models": (
        "",
        "Apply the patch before the threads start: it does not affect a call that is already running.",
    ),
    "Which residual a call may reuse": (
        "",
        "Two tiles of one size with one prompt are told apart by their order, which must stay the same from step to "
        "step.",
    ),
    "When nothing would be cached": ("", ""),
    "Memory and time": (
        "",
        "Above 100 steps a planned run with the linear predictor spreads its computed steps evenly, because comparing "
        "all schedules\ntakes time and memory that grow with the cube of the number of steps.\n\nWhole pipelines were "
        "also tested with offloading, LoRA, compiled blocks, float8 storage, FSDP and context parallelism,\nstopped at "
        "each step, saved and loaded: see the first table of [pipelines.md](pipelines.md).",
    ),
    "Files": ("", ""),
    "In ComfyUI": (
        "In ComfyUI's own classes with small random weights, in 0.16.3 and 0.30.0 (`tests/hosts/test_comfyui.py`).",
        "",
    ),
}


class Row:
    """A row of a table. section, tried, happens: of the mark; tests: {name: outcomes of its cases}."""

    def __init__(self, section: str, tried: str, happens: str) -> None:
        self.section, self.tried, self.happens = section, tried, happens
        self.tests: dict[str, list[str]] = {}

    def __str__(self) -> str:
        bad = {
            outcome: [name for name, outcomes in self.tests.items() if outcome in outcomes]
            for outcome in ("failed", "skipped")
        }
        happens = "; ".join(f"**{how}: {', '.join(names)}**" for how, names in bad.items() if names) or self.happens
        return f"| {self.tried} | {happens} | {', '.join(f'`{name}`' for name in self.tests)} |"


def rows(items, tests: dict[str, str]) -> list[Row]:
    """The rows of these tests, in the order of the page. tests: {node id: outcome}, "passed" where missing. Raises
    SystemExit if a mark names no section, or no test of a row says what happens."""
    found: dict[tuple, Row] = {}
    for item in sorted(items, key=lambda item: FOLDERS.index(item.path.parent.name)):  # otherwise as collected
        for mark in item.iter_markers("robustness"):
            section, tried, *happens = mark.args
            if section not in SECTIONS:
                raise SystemExit(f"{item.nodeid}: there is no section {section!r} in {Path(__file__).name}.")
            if (section, tried) not in found:
                if not happens:
                    raise SystemExit(f"{item.nodeid}: no test before it says what happens: {tried!r}.")
                found[section, tried] = Row(section, tried, *happens)
            row = found[section, tried]
            if happens and [row.happens] != happens:
                raise SystemExit(f"{item.nodeid}: two tests say differently what happens: {tried!r}.")
            outcome = tests.get(item.nodeid, "passed")
            row.tests.setdefault(mark.kwargs.get("name", item.originalname), []).append(outcome)
    return sorted(found.values(), key=lambda row: [*SECTIONS].index(row.section))


def robustness_text(items, tests: dict[str, str]) -> str:
    text, every = HEAD, rows(items, tests)
    for section, (before, after) in SECTIONS.items():
        table = ["| tried | what happens | test |", "|---|---|---|"]
        table += [str(row) for row in every if row.section == section]
        text += "\n" + "\n\n".join(filter(None, (f"## {section}", before, "\n".join(table), after))) + "\n"
    return text


def marked_tests(*options: str) -> Outcomes:
    """Collect the tests with a mark, and run them unless the options say otherwise."""
    outcomes, folder = Outcomes(), REPOSITORY / "tests"
    files = [
        str(path)
        for path in sorted(folder.rglob("test_*.py"))
        if "mark.robustness(" in path.read_text(encoding="utf-8")
    ]
    status = pytest.main(["-n", "0", "-m", "robustness", *options, *files], plugins=[outcomes])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!r}; no page was written.")
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is what the tests say")
    if parser.parse_args().check:
        if robustness_text(marked_tests("--collect-only", "-qq").items, {}) != PAGE.read_text(encoding="utf-8"):
            raise SystemExit(f"{PAGE} is not what the tests say: run `python benchmarks/robustness_page.py`.")
        return
    outcomes = marked_tests()
    PAGE.write_text(robustness_text(outcomes.items, outcomes.tests), encoding="utf-8")
    wrong = [test for test, outcome in outcomes.tests.items() if outcome != "passed"]
    print(f"{PAGE}: {len(rows(outcomes.items, {}))} rows of {len(outcomes.tests)} tests")
    sys.exit(f"Not passed: {', '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
