"""`common.scripts.page` with the gradio of the package index and a page of the kind that hosts have: what holds for
every page, without a checkout."""

import re
import shutil

import pytest
from packages import installed
from served import HARNESS, Served

from common.tables import read

OFF, CALIBRATE = (False, False, 1.0, 2, 0.2, "off"), (False, True, 1.0, 2, 0.2, "off")
ON, TWICE = (True, False, 1.0, 2, 0.2, "off"), (True, False, 1.0, 2, 0.2, "2x")
INPUTS = {"Prompt": "a cat", "Diffusion steps": 12}


@pytest.fixture
def served_toy(tmp_path):
    folder = tmp_path / "host"
    shutil.copytree(HARNESS.parent / "toy_page", folder)
    tests = HARNESS.parents[1]
    return Served(
        folder, tmp_path, installed("gradio-6.31.0", "gradio==6.31.0"), (tests.parent, tests, tests / "hosts")
    )


def test_toy_jobs(served_toy, tmp_path):
    off, enhanced, before = {"inputs": INPUTS}, {"press": "Prompt", "inputs": INPUTS}, {"press": "plan"}
    host = served_toy.jobs([off, enhanced], "page.py")
    names = ("off", "unknown", "planned 2x", "twice", "planned", "enhanced", "calibrated", "on", "off again")
    jobs = [
        {**off, "ours": OFF},
        {**off, "ours": ON},
        {**before, "inputs": INPUTS, "ours": TWICE},
        {**off, "ours": TWICE},
        {**before, "inputs": INPUTS, "ours": ON},
        enhanced,
        {**off, "ours": CALIBRATE},
        {**off, "ours": ON},
        {**off, "ours": OFF},
    ]
    done = dict(zip(names, served_toy.jobs(jobs, "magcache_page.py", "page.py")))
    drawn = {name: job["outputs"][1] for name, job in done.items() if len(job["outputs"]) == 3}
    assert drawn["off"] == drawn["calibrated"] == drawn["off again"] == host[0]["outputs"][1]
    assert len({drawn["off"], drawn["twice"], drawn["on"]}) == 3
    assert done["enhanced"] == host[1] and done["enhanced"]["outputs"] == ["a cat!"]
    assert "choose a target speed-up" in done["unknown"]["error"] and "--" not in done["unknown"]["error"]
    assert "are not known for toy" in done["planned"]["outputs"][1]
    strip = re.search("[#.]{12}", done["planned 2x"]["outputs"][1])[0]
    assert strip.count("#") == 6 and "12 of 24 model calls computed" in done["twice"]["outputs"][-1]
    assert "Measured in an un-cached run" in done["calibrated"]["outputs"][-1]
    assert re.search(r"1\d of 24 model calls computed, 1\d reused", done["on"]["outputs"][-1])
    (measured,) = (tmp_path / "home").glob("*.json")
    assert read(measured).steps == 12 and read(measured).sampler["task"] == "toy"
    # The last job had MagCache off: no report of an earlier one lies beside its file.
    assert not (tmp_path / "host" / "example.magcache.json").exists()


def test_a_changed_toy_page_gets_one_sentence(served_toy):
    page = served_toy.checkout / "page.py"
    page.write_text(page.read_text().replace("Diffusion steps", "Quality"))
    code, said = served_toy.run("magcache_page.py", "page.py")
    assert code == 1 and "0 of its buttons take a number of steps" in said and "Traceback" not in said, said
