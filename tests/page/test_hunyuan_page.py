"""The real Gradio page of a HunyuanVideo checkout with tiny random weights: jobs through the page's own function, and a
browser.

    MAGCACHE_HUNYUANVIDEO=/path/to/HunyuanVideo python -m pytest tests/page/test_hunyuan_page.py

Needs what test_wan_pages.py needs. $MAGCACHE_SCREENSHOT: file that a picture of the page goes to.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packages import installed
from readme_commands import of_script, readme
from served import Served, in_chromium

from common.scripts.install import install
from common.tables import read

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO names no checkout of Tencent/HunyuanVideo")
HARNESS = Path(__file__).resolve().parents[1] / "hosts" / "hunyuan_cpu.py"
FLAGS = (
    "--flow-reverse --precision fp32 --text-encoder-precision fp32 --text-encoder-precision-2 fp32 --vae-precision fp32"
).split()
OURS = ("magcache_gradio_server.py", *FLAGS)
OFF, CALIBRATE = (False, False, 0.24, 6, 0.2, "off"), (False, True, 0.24, 6, 0.2, "off")
ON, TWICE = (True, False, 0.24, 6, 0.2, "off"), (True, False, 0.24, 6, 0.2, "2x")
INPUTS = {"Resolution": "960x544", "Number of Inference Steps": 12, "Seed (-1 for random)": 3, "Prompt": "a cat"}
JOBS = {
    "off": {"ours": OFF},
    "on": {"ours": ON},
    "twice": {"ours": TWICE},
    "broken off": {"ours": ON, "fail_at": 7},
    "on again": {"ours": ON},
    "calibrated": {"ours": CALIBRATE},
    "by its own ratios": {"ours": (True, False, 0.9, 6, 0.2, "off")},
    "K 0": {"ours": (True, False, 0.24, 0, 0.2, "off")},
}


@pytest.fixture(scope="module")
def hunyuan_checkout(tmp_path_factory):
    """A copy of the checkout's code with the drop-in installed, and tiny weights."""
    folder = tmp_path_factory.mktemp("hunyuan")
    shutil.copytree(Path(CHECKOUT) / "hyvideo", folder / "hyvideo")
    for name in ("sample_video.py", "gradio_server.py"):
        shutil.copy(Path(CHECKOUT) / name, folder)
    install("MagCache4HunyuanVideo", folder)
    subprocess.run([sys.executable, HARNESS, "--checkpoint"], cwd=folder, check=True)
    return folder


@pytest.fixture
def served_hunyuan(hunyuan_checkout, tmp_path):
    return Served(hunyuan_checkout, tmp_path, installed("gradio-6.31.0", "gradio==6.31.0"))


def test_hunyuan_jobs(served_hunyuan, hunyuan_checkout, tmp_path):
    (plain,) = served_hunyuan.jobs([{"inputs": INPUTS}], "gradio_server.py", *FLAGS)
    jobs = [{"inputs": INPUTS, **job} for job in JOBS.values()]
    plan = {"press": "plan", "inputs": INPUTS, "ours": ON}
    planned, *done = served_hunyuan.jobs([plan, *jobs], *OURS)
    done = dict(zip(JOBS, done))
    latents = {name: job["latents"] for name, job in done.items()}
    assert len(plain["latents"]) == 1 and not plain["error"]
    for same in ("off", "calibrated", "K 0"):
        assert latents[same] == plain["latents"], same
    assert latents["on"] == latents["on again"] and latents["twice"] != latents["on"] != plain["latents"]
    assert not latents["broken off"] and "out of memory" in done["broken off"]["error"]
    assert "6 of 12 model calls computed" in done["twice"]["outputs"][-1]
    assert "Measured in an un-cached run" in done["calibrated"]["outputs"][-1]
    strip = re.search("[#.]{12}", planned["outputs"][1])[0]
    assert f"{strip.count('#')} of 12 model calls computed" in done["on"]["outputs"][-1] and "." in strip
    assert "hunyuanvideo-t2v-544p (published)" in planned["outputs"][1]
    (measured,) = (tmp_path / "home").glob("*.json")
    assert read(measured).steps == 12 and read(measured).sampler["size"] == "960x544"
    video = Path(done["by its own ratios"]["outputs"][0])
    report = json.loads(video.with_suffix(".magcache.json").read_text())
    assert report["mag_ratios_of"] == read(measured).name and report["seed"] == 3 and report["complete"]


def test_the_line_of_the_readme_opens_the_page(served_hunyuan):
    """Word for word, in bfloat16."""
    ((_, argv),) = of_script(readme("MagCache4HunyuanVideo"), OURS[0])
    (done,) = served_hunyuan.jobs([{"inputs": INPUTS, "ours": TWICE}], OURS[0], *argv)
    assert "6 of 12 model calls computed" in done["outputs"][-1]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("magcache_gradio_server.py",), "Without --flow-reverse"),
        (("magcache_gradio_server.py", "--flow-reverse", "--mag_ratios", "flux-dev"), "the ratios of another model"),
    ],
)
def test_a_mistake_on_hunyuans_page_gets_one_sentence(served_hunyuan, arguments, sentence):
    code, said = served_hunyuan.run(*arguments)
    assert code == 1 and sentence in said and "Traceback" not in said, said


def test_hunyuan_in_a_browser(served_hunyuan, tmp_path):
    with served_hunyuan.address(*OURS, "--use-cpu-offload") as address:
        in_chromium(click_through_hunyuan, address, tmp_path)


def click_through_hunyuan(page, expect):
    def shows(text, seconds=60):
        expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * seconds)

    expect(page.get_by_label("Use MagCache", exact=True)).to_be_checked(timeout=30_000)
    folded = page.get_by_role("button", name=re.compile("MagCache: "))
    expect(folded).to_have_text(re.compile("19 of 50 steps compute, at most 2.63x faster"), timeout=30_000)
    folded.click()
    shows("Ratios: hunyuanvideo-t2v-720p (published)")
    page.get_by_label("Resolution").click()
    page.get_by_role("option", name="960x544 (16:9, 540p)").click()
    shows("Ratios: hunyuanvideo-t2v-544p (published)")
    shows("18 of 50 steps compute, at most 2.78x faster")
    page.get_by_role("button", name="Generate", exact=True).click()
    shows("MagCache: 18 of 50 model calls computed", 120)
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0", timeout=30_000)
    if os.environ.get("MAGCACHE_SCREENSHOT"):
        page.wait_for_timeout(1500)
        bottom = page.get_by_text(re.compile("^Saved ")).bounding_box()["y"] + page.evaluate("scrollY") - 4
        clip = {"x": 120, "y": 0, "width": 1000, "height": bottom}
        page.screenshot(path=os.environ["MAGCACHE_SCREENSHOT"], full_page=True, clip=clip)
