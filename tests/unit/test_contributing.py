"""The worked examples of CONTRIBUTING.md, run one after another as they stand there."""

import re
from pathlib import Path

from common import gram
from common.tables import read

PAGE = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(gram.PREDICTORS, "mean", None)  # so that what the page adds is taken out again
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 4
    names = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    assert read("painter.json").steps == 20
    line, strip = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"MagCache: \d+ of 20 model calls computed, [1-9]\d* reused", line)
    assert strip.split()[0].count("#") == 8 and float(strip.split()[1]) > 0


def test_the_variables_of_checkouts_are_those_that_tests_read():
    tests = [path for path in Path(__file__).resolve().parents[1].rglob("test_*.py") if path != Path(__file__)]
    code = "\n".join(path.read_text() for path in tests)
    named = set(re.findall(r"`(MAGCACHE_[A-Z0-9_]+)`", PAGE))
    skips = set(re.findall(r"(MAGCACHE_[A-Z0-9_]+) names no (?:\w+ )?checkout", code))
    assert skips <= named and all(name in code for name in named)
