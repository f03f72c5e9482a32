"""The real page of a FramePack checkout with tiny random weights: jobs through its own `process` and `worker`, and a
browser.

    MAGCACHE_FRAMEPACK=/path/to/FramePack python -m pytest tests/page/test_framepack_page.py

Needs gradio 5 as the checkout pins it; the browser also playwright and Chromium ($MAGCACHE_CHROMIUM, else the one on
the PATH). $MAGCACHE_SCREENSHOT: file that a picture of the page goes to.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
from packages import installed
from readme_commands import changed, of_script, readme

from common.scripts.install import install
from common.tables import read

FRAMEPACK, TESTS = os.environ.get("MAGCACHE_FRAMEPACK"), Path(__file__).resolve().parents[1] / "hosts"
pytestmark = pytest.mark.skipif(not FRAMEPACK, reason="MAGCACHE_FRAMEPACK names no FramePack checkout")
PINS = (
    "gradio==5.23.0",
    "diffusers==0.33.1",
    "transformers==4.46.2",
    "huggingface_hub<1",
    "pydantic<2.11",
    "einops",
    "sentencepiece",
)
OFF, CALIBRATE = (False, False, 0.1, 3, 0.2, "off"), (False, True, 0.1, 3, 0.2, "off")
ON, TWICE = (True, False, 0.1, 3, 0.2, "off"), (True, False, 0.1, 3, 0.2, "2x")
JOB = {"steps": 12, "seconds": 2.4}  # two sections


@pytest.fixture(scope="module")
def framepack_checkout(tmp_path_factory):
    """A copy of the checkout's code with the drop-in installed."""
    folder = tmp_path_factory.mktemp("checkouts") / "FramePack"
    folder.mkdir()
    for name in ("demo_gradio.py", "demo_gradio_f1.py", "requirements.txt"):
        shutil.copy(Path(FRAMEPACK) / name, folder / name)
    shutil.copytree(Path(FRAMEPACK) / "diffusers_helper", folder / "diffusers_helper")
    install("MagCache4FramePack", folder)
    return folder


def demo_environment(folder, **changes):
    return {
        **os.environ,
        "PYTHONPATH": str(installed("framepack-demo", *PINS)),
        "MAGCACHE_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        **changes,
    }


def jobs_in_a_process(checkout, script, jobs, *flags, **changes):
    """What came of each job in one process of the demo."""
    (checkout / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, TESTS / "framepack_cpu.py", "--jobs", "jobs.json", script, *flags],
        cwd=checkout,
        env=demo_environment(checkout, **changes),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("JOBS "))[5:])


@pytest.mark.parametrize("page, free_gb", [("demo_gradio", "80"), ("demo_gradio", "20"), ("demo_gradio_f1", "80")])
def test_framepack_jobs(framepack_checkout, page, free_gb):
    plain, teacache, guided = jobs_in_a_process(
        framepack_checkout, f"{page}.py", [JOB, {**JOB, "teacache": True}, {**JOB, "cfg": 2.0}], FREE_GB=free_gb
    )
    jobs = {
        "off": {"ours": OFF},
        "TeaCache": {"ours": OFF, "teacache": True},
        "K 0": {"ours": (True, False, 0.1, 0, 0.2, "off")},
        "on": {"ours": ON},
        "on, TeaCache too": {"ours": ON, "teacache": True},
        "guided": {"ours": ON, "cfg": 2.0},
        "guided, off": {"ours": OFF, "cfg": 2.0},
        "ended": {"ours": ON, "steps": 25, "seconds": 3.6, "cfg": 2.0, "end_at": [1, 9]},
        "on again": {"ours": ON},
        "calibrated": {"ours": CALIBRATE},
        "twice": {"ours": TWICE},
    }
    done = dict(
        zip(
            jobs,
            jobs_in_a_process(
                framepack_checkout, f"magcache_{page}.py", [{**JOB, **job} for job in jobs.values()], FREE_GB=free_gb
            ),
        )
    )
    sections = {name: job["sections"] for name, job in done.items()}
    assert len(plain["sections"]) == 2 and len(set(plain["sections"])) == 2
    assert sections["off"] == sections["K 0"] == sections["calibrated"] == plain["sections"]
    assert sections["TeaCache"] == teacache["sections"] != plain["sections"]
    assert sections["on"] == sections["on, TeaCache too"] == sections["on again"]
    assert not set(sections["on"]) & {*plain["sections"], *teacache["sections"]}
    assert sections["guided, off"] == guided["sections"] and not set(sections["guided"]) & set(guided["sections"])
    assert len(sections["ended"]) == 1 and len(sections["twice"]) == 2
    assert "Measured in 2 sections" in done["calibrated"]["text"] and "reused nothing" in done["K 0"]["text"]
    report = json.loads((framepack_checkout / done["on"]["video"]).with_suffix(".magcache.json").read_text())
    assert [section["complete"] for section in report["sections"]] == [True, True]
    (saved,) = (framepack_checkout / "home").glob("*.json")
    assert read(saved).rule == {"max_deviation": 0.06} and read(saved).statistics["runs"] == 2
    saved.unlink()


def test_a_job_started_before_the_last_one_has_ended(framepack_checkout):
    """The host's worker tells the newest stream of its end; without our waiting, this ends the next job at once."""
    jobs = [{**JOB, "ours": ON}, {**JOB, "ours": ON, "end_at": [0, 5], "seconds_to_end": 2}, {**JOB, "ours": ON}]
    alone, ended, after = jobs_in_a_process(framepack_checkout, "magcache_demo_gradio.py", jobs)
    assert not ended["sections"] and after["sections"] == alone["sections"] and after["video"]


LAY_WEIGHTS = """
import sys
from pathlib import Path

import transformers

sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
hub = Path("hf_download/hub/models--hunyuanvideo-community--HunyuanVideo")
transformers.LlamaModel(transformers.LlamaConfig(**sizes)).save_pretrained(hub / "snapshots/abc/text_encoder")
(hub / "refs").mkdir()
(hub / "refs/main").write_text("abc")
"""
RUN_UNTIL_IT_FAILS = """
import runpy, sys, traceback

import framepack_cpu, torch

framepack_cpu.stand_in("cv2")
framepack_cpu.torchvision_stand_in()
torch.cuda.current_device = lambda: 0
import diffusers_helper.memory as memory

memory.gpu, memory.get_cuda_free_memory_gb = torch.device("cpu"), lambda device=None: 80.0
sys.argv = [sys.argv[1]]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except Exception:
    traceback.print_exc(file=sys.stdout)
"""


def test_weights_that_the_user_has_are_found(framepack_checkout, tmp_path):
    """demo_gradio.py keeps them in hf_download, beside it, by setting HF_HOME before it imports what reads that. Here
    lies the first of the models that it loads, and no other."""
    folder = tmp_path / "FramePack"
    shutil.copytree(framepack_checkout, folder, ignore=shutil.ignore_patterns("outputs", "home"))
    pins = installed("framepack-demo", *PINS)
    changes = demo_environment(tmp_path, PYTHONPATH=f"{pins}:{TESTS}:{folder}")

    def python(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, cwd=folder, env=changes, capture_output=True, text=True, timeout=300)

    laid = python(LAY_WEIGHTS)
    assert laid.returncode == 0, laid.stderr
    for script in ("demo_gradio.py", "magcache_demo_gradio.py"):
        said = python(RUN_UNTIL_IT_FAILS, script).stdout
        assert "text_encoder_2 = CLIPTextModel" in said, said[-2000:]  # the model after it


def test_the_windows_version(tmp_path):
    """It has no F1 demo and no MP4 compression."""
    windows = os.environ.get("MAGCACHE_FRAMEPACK_WINDOWS")
    if not windows:
        pytest.skip("MAGCACHE_FRAMEPACK_WINDOWS names no checkout of the branch windows")
    folder = tmp_path / "webui"
    shutil.copytree(windows, folder, ignore=shutil.ignore_patterns(".git"))
    assert install("MagCache4FramePack", folder) == "python magcache_demo_gradio.py --server 127.0.0.1 --inbrowser"
    assert not (folder / "magcache_demo_gradio_f1.py").exists()
    (cached,) = jobs_in_a_process(folder, "magcache_demo_gradio.py", [{**JOB, "ours": ON}])
    assert len(cached["sections"]) == 2 and "5 reused" in cached["text"]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"use_teacache = gr": "teacache = gr", "use_teacache, mp4_crf]": "teacache, mp4_crf]"}, "no use_teacache"),
        ({"click(fn=process": "click(fn=lambda *values: process(*values)"}, "its button starts something else"),
        ({"gradio==5.23.0": "gradio==4.44.1"}, "pins gradio 4.44.1"),
    ],
)
def test_a_changed_framepack_page_gets_one_sentence(framepack_checkout, tmp_path, changes, sentence):
    changed = tmp_path / "FramePack"
    shutil.copytree(framepack_checkout, changed, ignore=shutil.ignore_patterns("outputs", "home"))
    for path in (changed / "demo_gradio.py", changed / "requirements.txt"):
        text = path.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, TESTS / "framepack_cpu.py", "magcache_demo_gradio.py"],
        cwd=changed,
        env=demo_environment(changed),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]


# --- in a browser ---


@pytest.fixture
def framepack_address(framepack_checkout, tmp_path):
    """The page, served by the README's command at a free port."""
    ((_, argv),) = of_script(readme("MagCache4FramePack"), "magcache_demo_gradio.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path / "log", "w")
    server = subprocess.Popen(
        [
            sys.executable,
            TESTS / "framepack_cpu.py",
            "magcache_demo_gradio.py",
            *changed(argv, port=port),
        ],
        cwd=framepack_checkout,
        env=demo_environment(tmp_path, BROWSER="true"),  # of --inbrowser: the command that does nothing
        stdout=log,
        stderr=log,
    )
    try:
        for _ in range(400):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def draw_hills(path):
    """A sun over hills, 256 x 256."""
    y, x = np.mgrid[:256, :256]
    sky = np.stack([90 + y / 3, 140 + y / 4, 235 - y / 5], axis=-1)
    sky[(x - 180) ** 2 + (y - 70) ** 2 < 1100] = 250, 210, 80
    sky[y > 190 + 22 * np.sin(x / 34)] = 60, 120, 70
    imageio.imwrite(path, sky.astype(np.uint8))
    return path


def test_framepack_in_a_browser(framepack_address, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("MAGCACHE_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as run:
        browser = run.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1000})
        try:
            click_through_framepack(page, framepack_address, tmp_path, playwright.expect)
        finally:
            page.screenshot(path=tmp_path / "last.png", full_page=True)
            browser.close()


def click_through_framepack(page, address, tmp_path, expect):
    page.goto(address)
    boxes = {name: page.get_by_label(name, exact=True) for name in ("Use TeaCache", "Use MagCache", "Calibrate")}

    def ticked(*names):
        for name, box in boxes.items():
            expect(box).to_be_checked(checked=name in names, timeout=20_000)

    def shows(text, seconds=30):
        expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * seconds)

    def number(label, value):
        field = page.get_by_label(f"number input for {label}")
        field.fill(str(value))
        field.press("Tab")

    ticked("Use MagCache")
    folded = page.get_by_role("button", name=re.compile("MagCache: "))
    expect(folded).to_have_text(re.compile("12 of 25 steps compute, at most 2.08x faster"), timeout=30_000)
    # The page's own first controls stay in sight.
    assert page.get_by_label("Seed", exact=True).bounding_box()["y"] - boxes["Use TeaCache"].bounding_box()["y"] < 250
    folded.click()
    shows("4 sections: 48 of 100 steps")
    expect(page.get_by_label("#####..#.#..#..#..#...#.#")).to_be_visible()

    number("MagCache threshold", 0.15)
    number("MagCache K", 4)
    shows("11 of 25 steps compute")
    number("MagCache K", 0)
    shows("magcache_K is 0, which turns MagCache off")
    number("MagCache K", 3)
    number("MagCache threshold", 0.1)
    number("Total Video Length (Seconds)", 2.4)
    shows("2 sections: 24 of 50 steps")
    page.get_by_label("2x", exact=True).check()
    shows("2x: 13 of 25 steps compute, at most 1.92x faster, the nearest possible")
    expect(page.get_by_label("number input for MagCache K")).to_be_disabled(timeout=20_000)
    page.get_by_label("off", exact=True).check()
    shows("12 of 25 steps compute")

    boxes["Use TeaCache"].check()
    ticked("Use TeaCache")
    shows("off, TeaCache decides")
    boxes["Use MagCache"].check()
    ticked("Use MagCache")

    # A start that fails leaves the controls free.
    start, end = page.get_by_role("button", name="Start Generation"), page.get_by_role("button", name="End Generation")
    number("MagCache K", 3)
    start.click()
    expect(page.get_by_text("No input image!").or_(page.get_by_text("Error")).first).to_be_visible(timeout=30_000)
    boxes["Calibrate"].check(timeout=5_000)
    ticked("Calibrate")
    boxes["Use MagCache"].check(timeout=5_000)
    ticked("Use MagCache")

    page.locator("input[type=file]").first.set_input_files(draw_hills(tmp_path / "picture.png"))
    page.get_by_label("Prompt", exact=True).fill("The sun sets behind the hills.")
    start.click()
    shows("Section 2: MagCache: 12 of 25 model calls computed", 120)
    expect(start).to_be_enabled(timeout=60_000)
    expect(page.locator("video")).to_have_attribute("src", re.compile("mp4"), timeout=30_000)
    page.wait_for_function("document.querySelector('video').videoWidth > 0", timeout=30_000)
    if os.environ.get("MAGCACHE_SCREENSHOT"):
        page.wait_for_timeout(1500)
        bottom = page.get_by_label("number input for Steps").bounding_box()["y"] + 60
        page.screenshot(
            path=os.environ["MAGCACHE_SCREENSHOT"],
            full_page=True,
            clip={"x": 120, "y": 0, "width": 1000, "height": bottom},
        )

    number("Steps", 100)
    shows("2 sections: ")
    start.click()
    expect(end).to_be_enabled(timeout=20_000)
    shows("Sampling ", 60)
    end.click()
    expect(start).to_be_enabled(timeout=60_000)

    number("Steps", 12)
    boxes["Calibrate"].check()
    ticked("Calibrate")
    start.click()
    shows("Measured in 2 sections", 120)
    ticked("Use MagCache")
    shows("(measured)")
    (saved,) = (tmp_path / "home").glob("framepack-*.json")
    assert read(saved).steps == 12
    number("Steps", 12)
    shown = page.get_by_label(re.compile("^[#.]{12}$")).get_attribute("aria-label")

    page.reload()  # what a page shows when it is opened is of the table that is in use now
    ticked("Use MagCache")
    page.get_by_role("button", name=re.compile("MagCache: ")).click()
    number("Steps", 12)
    expect(page.get_by_label(shown)).to_be_visible(timeout=30_000)
    shows("(measured)")
