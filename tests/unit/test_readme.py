"""What the READMEs say is what a reader gets."""

import re
import shlex
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import common
from common.__main__ import main
from common.schedule import Settings
from common.tables import load

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("[!.]*/*.md")])
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"^[A-Z_]{4,}$", page.read_text(), re.MULTILINE)


def test_the_plan_in_the_readme_is_the_plan(capsys):
    shown = re.search(r"```\n\$ python -m common plan flux-dev --steps 28\n(.*?)```", README, re.DOTALL)[1]
    main(["plan", "flux-dev", "--steps", "28"])
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_tables_of_computed_steps_are_what_the_rule_gives(page):
    row = r"^\| `([\w.-]+)` \| ([\d.]+) / (\d+) / ([\d.]+) \| (\d+) of (\d+) \| ([\d.]+)x \|$"
    for name, thresh, K, retention, computed, steps, bound in re.findall(row, page.read_text(), re.MULTILINE):
        table = load(name)
        settings = Settings(float(thresh), int(K), float(retention))
        schedule = settings.plan(table, table.levels(table.steps), table.switch_step(table.sigmas))
        assert (schedule.computed, schedule.steps, f"{schedule.bound:.2f}") == (int(computed), int(steps), bound), name


def plans_of(page):
    """The commands of a page that print a plan."""
    return re.findall(r"python -m common (plan [^`\n#:]+)", page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if plans_of(page)], ids=lambda page: str(page.parent.name))
def test_every_plan_can_be_printed(page, tmp_path, monkeypatch, capsys):
    """With a file of the reader's own where one is named."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "mine.json").write_text((REPOSITORY / "common" / "presets" / "demo.json").read_text())
    for command in plans_of(page):
        main(shlex.split(command))
        assert "MagCache plan: " in capsys.readouterr().out


def cells_of_line(line):
    return [cell.strip().strip("*") for cell in line.strip("| ").split("|")]


def test_the_summary_of_video_is_of_its_table():
    """docs/video.md against what benchmarks/quality.py wrote: mean (worst) of each row, with guidance and without."""
    measured, guidance = {}, None
    for line in (REPOSITORY / "docs" / "video_table.md").read_text().splitlines():
        guidance = line if line.startswith("Guidance ") else guidance
        if line.startswith("| ") and "PSNR" not in line:
            family, _, _, psnr, worst, *_ = cells_of_line(line)
            measured.setdefault((family, guidance), []).append(f"{psnr.split()[0]} ({worst})")
    page = (REPOSITORY / "docs" / "video.md").read_text()
    rows = [cells_of_line(line) for line in page.split("![")[0].splitlines() if re.search(r"\d \(\d", line)]
    for label, *shown in rows:
        shown = [cell.strip("*") for cell in shown]
        family = label.partition(":")[0]
        with_guidance, without = (measured.get((family, f"Guidance {guidance}:"), []) for guidance in (5, 1))
        assert [cell for cell in shown if cell] == with_guidance + without != [], label
    assert len(rows) >= 13


def rows_by_family(page, guidance):
    """{family: its mean PSNR, a row each} of a table of benchmarks/quality.py."""
    part = re.split(r"^Guidance ", (REPOSITORY / "docs" / page).read_text(), flags=re.MULTILINE)
    rows = {}
    for line in next(text for text in part if text.startswith(f"{guidance}:")).splitlines():
        if line.startswith("| ") and "PSNR" not in line:
            family, _, _, psnr, *_ = cells_of_line(line)
            rows.setdefault(family, []).append(psnr.split()[0])
    return rows


def test_the_other_cases_of_video_are_of_their_tables():
    """Their order in a row: plain sampler, rule, no calibration, calibrated, and the best of the other projects."""
    families = ("fewer steps", "paper's rule", "no calibration", "planned, linear")
    page = (REPOSITORY / "docs" / "video.md").read_text()
    cases = re.findall(r"^\| [^|]*?, (guidance 5|no guidance) \(\[table\]\((\w+\.md)\)\) \|(.*)\|$", page, re.MULTILINE)
    assert len(cases) == len(set(cases)) == 12
    for guidance, table, cells in cases:
        rows = rows_by_family(table, 5 if "5" in guidance else 1)
        *own, best = (re.findall(r"\d+\.\d", cell) for cell in cells.split("|"))
        assert own == [rows[family] for family in families], table
        others = [numbers for family, numbers in rows.items() if family.startswith(("diffusers ", "cache-dit "))]
        assert best == [max(column, key=float) for column in zip(*others)], table
        shown = [max(map(float, column)) for column in zip(*own, best or own[0])]
        assert re.findall(r"\*\*(\d+\.\d)\*\*", cells) and {f"{one:.1f}" for one in shown} == {
            *re.findall(r"\*\*(\d+\.\d)\*\*", cells)
        }, table


@pytest.mark.parametrize("table", sorted(path.name for path in (REPOSITORY / "docs").glob("video*_table.md")))
def test_a_calibration_is_closer_than_none_in_every_column_without_guidance(table):
    """With guidance it is planned as none is."""
    without, with_guidance = (rows_by_family(table, guidance) for guidance in (1, 5))
    pairs = list(zip(map(float, without["no calibration"]), map(float, without["planned, linear"])))
    assert len(pairs) == 3 and all(free < calibrated for free, calibrated in pairs)
    assert with_guidance["no calibration"] == with_guidance["planned, linear"]


def test_the_python_that_the_first_command_needs():
    """The oldest that every package of requirements.txt takes: what pip would refuse is no good beginning."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    names = [re.match(r"[\w-]+", line)[0] for line in lines if "==" in line]
    needed = [re.match(r">=3\.(\d+)", metadata(name)["Requires-Python"])[1] for name in names]
    assert f"You need Python 3.{max(map(int, needed))} or later" in README and len(names) > 15


def test_ci_runs_the_first_commands():
    commands = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)
    install, picture, tests = commands[:3]
    ci = (REPOSITORY / ".ci" / "run").read_text()
    assert tests in ci.splitlines() and "pip install -r requirements.txt" in install
    assert install.split(" && ")[-1] in ci.splitlines() and picture in ci.splitlines()


def test_the_snippet_runs(monkeypatch):
    """With the demo model, and `common` under the name that an installation gives it."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]

    class Small(FluxPipeline):
        def __call__(self, prompt):
            return super().__call__(prompt, height=64, width=64, num_inference_steps=28, max_sequence_length=16)

    monkeypatch.setitem(sys.modules, "magcache", common)
    names = {"pipe": Small.from_pretrained(REPOSITORY / "demo" / "image" / "model").to(torch.float32)}
    exec(code, names)
    assert "11 of 28 model calls computed, 17 reused" in names["cache"].report and names["image"].size == (64, 64)


def test_the_design_page_has_a_line_for_every_file():
    page = (REPOSITORY / "docs" / "design.md").read_text()
    files = (REPOSITORY / "common").rglob("*.py")
    names = {str(path.relative_to(REPOSITORY / "common")) for path in files if path.name != "__init__.py"}
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE)) >= names
