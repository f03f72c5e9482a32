"""The real Gradio pages of a Wan2.1 checkout with tiny random weights: jobs through the pages' own functions, and a
browser.

    MAGCACHE_WAN21=/path/to/Wan2.1 python -m pytest tests/page/test_wan_pages.py

Needs gradio, which is installed once into the tests' cache; the browser also playwright and Chromium
($MAGCACHE_CHROMIUM, else the one on the PATH). $MAGCACHE_SCREENSHOT: file that a picture of the page goes to.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from packages import installed
from PIL import Image
from readme_commands import of_script, readme
from served import Served, in_chromium
from wan_runs import WanRuns

from common.tables import read

WAN = os.environ.get("MAGCACHE_WAN21")
pytestmark = pytest.mark.skipif(not WAN, reason="MAGCACHE_WAN21 names no Wan2.1 checkout")
OFF, CALIBRATE = (False, False, 0.12, 4, 0.2, "off"), (False, True, 0.12, 4, 0.2, "off")
ON, TWICE = (True, False, 0.9, 4, 0.2, "off"), (True, False, 0.12, 4, 0.2, "2x")
T2V = {
    "Prompt": "a cat",
    "Negative Prompt": "",
    "Resolution(Width*Height)": "480*832",
    "Diffusion steps": 12,
    "Seed": 3,
}
VACE = {
    "sample_steps": 12,
    "resolutions_height": "480",
    "resolutions_width": "832",
    "num_frames": "5",
    "None": "a cat",  # its prompts have no label
}


@pytest.fixture(scope="module")
def wan_checkout(tmp_path_factory):
    """A copy of the checkout's pages with the drop-in installed, and tiny checkpoints."""
    folder = tmp_path_factory.mktemp("checkouts") / "Wan2.1"
    runs = WanRuns(folder, Path(WAN) / "wan", Path(WAN) / "generate.py", "MagCache4Wan2.1")
    for kind in ("t2v", "i2v", "flf2v", "vace"):
        runs.checkpoint(kind)
    runs.close()
    shutil.copytree(Path(WAN) / "gradio", folder / "gradio")
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(folder / "cat.png")
    return folder


@pytest.fixture
def served_wan(wan_checkout, tmp_path):
    return Served(wan_checkout, tmp_path, installed("gradio-6.31.0", "gradio==6.31.0"))


def page_jobs(inputs, **jobs):
    return [{"inputs": inputs, **job} for job in jobs.values()]


JOBS = {
    "off": {"ours": OFF},
    "unknown": {"ours": ON},
    "twice": {"ours": TWICE},
    "calibrated": {"ours": CALIBRATE},
    "K 0": {"ours": (True, False, 0.9, 0, 0.2, "off")},
    "on": {"ours": ON},
    "broken off": {"ours": ON, "fail_at": 13},
    "on again": {"ours": ON},
    "off again": {"ours": OFF},
}


@pytest.mark.parametrize(
    "page, flags, inputs",
    [
        ("t2v_1.3B_singleGPU.py", ("--ckpt_dir", "checkpoints/t2v"), T2V),
        ("t2i_14B_singleGPU.py", ("--ckpt_dir", "checkpoints/t2v"), T2V),
        ("vace.py", ("--ckpt_dir", "checkpoints/vace", "--model_name", "vace-1.3B"), VACE),
    ],
)
def test_wan_jobs(served_wan, page, flags, inputs, tmp_path):
    (plain,) = served_wan.jobs([{"inputs": inputs}], f"gradio/{page}", *flags)
    jobs = [{"inputs": inputs, **job} for job in JOBS.values()]
    plan = {"press": "plan", "inputs": inputs, "ours": ON}
    *done, planned = served_wan.jobs([*jobs, plan], "magcache_gradio.py", f"gradio/{page}", *flags)
    done = dict(zip(JOBS, done))
    latents = {name: job["latents"] for name, job in done.items()}
    assert len(plain["latents"]) == 1 and not plain["error"]
    for same in ("off", "calibrated", "K 0", "off again"):
        assert latents[same] == plain["latents"], same
    assert latents["on"] == latents["on again"] and latents["twice"] != latents["on"] != plain["latents"]
    assert not latents["broken off"] and "out of memory" in done["broken off"]["error"]
    assert not latents["unknown"] and "choose a target speed-up" in done["unknown"]["error"]
    assert "--" not in done["unknown"]["error"]
    assert "12 of 24 model calls computed" in done["twice"]["outputs"][-1]
    assert "Measured in an un-cached run" in done["calibrated"]["outputs"][-1]
    assert done["off"]["outputs"][1:] == [""]
    (measured,) = (tmp_path / "home").glob("*.json")
    table = read(measured)
    assert table.steps == 12 and table.sampler["task"] in ("t2v-1.3B", "t2v-14B", "t2i-14B", "vace-1.3B")
    # The plan before the job is what the job did.
    strip = re.search("[#.]{12}", planned["outputs"][1])[0]
    assert (
        f"{2 * strip.count('#')} of 24 model calls computed, {2 * strip.count('.')} reused" in done["on"]["outputs"][-1]
    )
    assert "." in strip and "(measured)" in planned["outputs"][1]


def test_a_report_lies_beside_the_video_that_it_is_of(served_wan, wan_checkout):
    """This page has one name for all of its videos."""
    command = ("magcache_gradio.py", "t2v_1.3B_singleGPU.py", "--ckpt_dir", "checkpoints/t2v")
    served_wan.jobs([{"inputs": T2V, "ours": TWICE}], *command)
    report = json.loads((wan_checkout / "example.magcache.json").read_text())
    assert report["computed"] == 12 and report["prompt"] == "a cat" and report["complete"]
    served_wan.jobs([{"inputs": T2V, "ours": OFF}], *command)
    assert (wan_checkout / "example.mp4").is_file() and not (wan_checkout / "example.magcache.json").exists()


@pytest.mark.parametrize(
    "page, kind, size",
    [("i2v_14B_singleGPU.py", "i2v", "480P"), ("fl2v_14B_singleGPU.py", "flf2v", "720P")],
)
def test_a_page_that_loads_its_model_when_a_size_is_chosen(served_wan, wan_checkout, page, kind, size):
    labels = ("Upload Input Image", "Upload First Frame", "Upload Last Frame")
    inputs = {"Prompt": "a cat", "Negative Prompt": "", "Diffusion steps": 12, "Seed": 3, "Resolution": size}
    flags = ["--ckpt_dir_720p", f"checkpoints/{kind}", *(["--ckpt_dir_480p", f"checkpoints/{kind}"] * (kind == "i2v"))]
    inputs |= dict.fromkeys(labels, "cat.png")
    load = {"press": "Resolution", "inputs": {"Resolution": size}}
    _, plain = served_wan.jobs([load, {"inputs": inputs}], f"gradio/{page}", *flags)
    plan = {"press": "plan", "inputs": {"Resolution": size, "Diffusion steps": 12}, "ours": TWICE}
    before, loaded, after, off, twice, other, again = served_wan.jobs(
        [
            plan,
            {**load, "ours": TWICE},
            plan,
            {"inputs": inputs, "ours": OFF},
            {"inputs": inputs, "ours": TWICE},
            {"press": "Resolution", "inputs": {"Resolution": "720P"}, "ours": TWICE},
            {"inputs": {**inputs, "Resolution": "720P"}, "ours": TWICE},
        ],
        "magcache_gradio.py",
        f"gradio/{page}",
        *flags,
    )
    assert "the plan comes with the model" in before["outputs"][0] and before["models"] == 0
    assert loaded["outputs"][0] == size and "2x" in loaded["outputs"][1]
    assert "6 of 12 steps compute" in after["outputs"][0]
    assert off["latents"] == plain["latents"] != twice["latents"] and len(twice["latents"]) == 1
    for job in (twice, again):
        assert "12 of 24 model calls computed" in job["outputs"][-1]
    assert {job["models"] for job in (loaded, off, twice, other, again)} == {1}  # the other size's model is let go


FOLDERS = {"T2V-1.3B": "t2v", "T2V-14B": "t2v", "I2V-14B-480P": "i2v", "I2V-14B-720P": "i2v"}
FOLDERS |= {"FLF2V-14B-720P": "flf2v", "VACE-1.3B": "vace"}
LINES = [argv for _, argv in of_script(readme("MagCache4Wan2.1"), "magcache_gradio.py")]


@pytest.mark.parametrize("argv", LINES, ids=lambda argv: argv[0])
def test_a_line_of_the_readme_opens_its_page(served_wan, wan_checkout, argv):
    """Word for word; the folders hold tiny weights."""
    for name, kind in FOLDERS.items():
        link = wan_checkout / f"Wan2.1-{name}"
        link.exists() or link.symlink_to(wan_checkout / "checkpoints" / kind)
    plan = {"press": "plan", "inputs": {"Diffusion steps": 12, "sample_steps": 12}, "ours": TWICE}
    (planned,) = served_wan.jobs([plan], "magcache_gradio.py", *argv)
    loads_later = "--ckpt_dir_720p" in argv
    assert ("the plan comes with the model" if loads_later else "6 of 12 steps compute") in planned["outputs"][0]


def test_the_other_buttons_do_what_they_did(served_wan):
    enhance = {"press": "Target language of prompt enhance", "inputs": {"Prompt": "a cat"}}
    for page in (["gradio/t2v_14B_singleGPU.py"], ["magcache_gradio.py", "gradio/t2v_14B_singleGPU.py"]):
        (done,) = served_wan.jobs([enhance], *page, "--ckpt_dir", "checkpoints/t2v")
        assert done["outputs"] == ["a cat, in the evening sun"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ((), "Name one of the pages first"),
        (("gradio/flf2v.py",), "fl2v_14B_singleGPU.py, i2v_14B_singleGPU.py"),
        (("gradio/vace.py", "--mp", "--ckpt_dir", "checkpoints/vace"), "the processes that --mp starts"),
        (("vace.py", "--mag_ratios", "flux-dev"), "holds the ratios of another model"),
        (("vace.py", "--magcache_speedup", "2"), "There is no flag --magcache_speedup"),
    ],
)
def test_a_mistake_on_wans_pages_gets_one_sentence(served_wan, arguments, sentence):
    code, said = served_wan.run("magcache_gradio.py", *arguments)
    assert code == 1 and sentence in said and "Traceback" not in said, said


def test_a_changed_wan_page_gets_one_sentence(served_wan, wan_checkout):
    page = (wan_checkout / "gradio" / "t2v_14B_singleGPU.py").read_text()
    (wan_checkout / "gradio" / "changed.py").write_text(page.replace("Diffusion steps", "Quality"))
    code, said = served_wan.run("magcache_gradio.py", "gradio/changed.py", "--ckpt_dir", "checkpoints/t2v")
    assert code == 1 and "0 of its buttons take a number of steps" in said and "Traceback" not in said, said


def test_wan_in_a_browser(served_wan, tmp_path):
    command = ("magcache_gradio.py", "gradio/t2v_1.3B_singleGPU.py", "--ckpt_dir", "checkpoints/t2v")
    with served_wan.address(*command, "--mag_ratios", "wan2.1-t2v-1.3b") as address:
        in_chromium(click_through_wan, address, tmp_path)
    with served_wan.address(*command) as address:
        in_chromium(measure_in_browser, address, tmp_path)


def shows(page, expect, text, seconds=60):
    expect(page.get_by_text(text).first).to_be_visible(timeout=1000 * seconds)


def number(page, label, value):
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Tab")


def click_through_wan(page, expect):
    use = page.get_by_label("Use MagCache", exact=True)
    expect(use).to_be_checked(timeout=30_000)
    folded = page.get_by_role("button", name=re.compile("MagCache: "))
    expect(folded).to_have_text(re.compile("21 of 50 steps compute, at most 2.38x faster"), timeout=30_000)
    folded.click()
    shows(page, expect, "Ratios: wan2.1-t2v-1.3b (published)")
    expect(page.get_by_label(re.compile("^[#.]{50}$"))).to_be_visible()
    number(page, "MagCache K", 0)
    shows(page, expect, "magcache_K is 0, which turns MagCache off")
    number(page, "MagCache K", 4)
    number(page, "Diffusion steps", 12)
    shows(page, expect, "of 12 steps compute")
    page.get_by_label("2x", exact=True).check()
    shows(page, expect, "2x: 6 of 12 steps compute, at most 2.00x faster")
    expect(page.get_by_label("number input for MagCache K")).to_be_disabled(timeout=20_000)
    strip = page.get_by_label(re.compile("^[#.]{12}$")).get_attribute("aria-label")
    number(page, "Shift scale", 1)  # spreads the computed steps otherwise
    expect(page.get_by_label(strip, exact=True)).to_have_count(0, timeout=20_000)

    page.get_by_label("Prompt", exact=True).fill("A cat walks on the grass")
    page.get_by_role("button", name="Prompt Enhance").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(
        "A cat walks on the grass, in the evening sun", timeout=20_000
    )
    number(page, "Shift scale", 8)
    number(page, "Diffusion steps", 50)
    page.get_by_label("off", exact=True).check()
    shows(page, expect, "21 of 50 steps compute")
    page.get_by_role("button", name="Generate Video").click()
    shows(page, expect, "MagCache: 42 of 100 model calls computed", 120)
    page.wait_for_function("document.querySelector('video')?.videoWidth > 0", timeout=30_000)
    if os.environ.get("MAGCACHE_SCREENSHOT"):
        page.wait_for_timeout(1500)
        bottom = page.get_by_text("Saved example.mp4").bounding_box()["y"] + page.evaluate("scrollY") + 40
        clip = {"x": 130, "y": 100, "width": 980, "height": bottom - 100}
        page.screenshot(path=os.environ["MAGCACHE_SCREENSHOT"], full_page=True, clip=clip)
    use.uncheck()
    shows(page, expect, "off, every step computes")


def measure_in_browser(page, expect):
    """A checkpoint whose ratios are not known."""
    use, calibrate = (page.get_by_label(name, exact=True) for name in ("Use MagCache", "Calibrate"))
    expect(use).not_to_be_checked(timeout=30_000)
    page.get_by_role("button", name=re.compile("MagCache: ")).click()
    use.check()
    shows(page, expect, "The magnitude ratios of this checkpoint are not known")
    page.get_by_role("button", name="Generate Video").click()
    expect(page.get_by_text("Error").first).to_be_visible(timeout=30_000)
    calibrate.check(timeout=5_000)  # a start that fails leaves the controls free
    expect(use).not_to_be_checked(timeout=20_000)
    page.get_by_role("button", name="Generate Video").click()
    shows(page, expect, "Measured in an un-cached run", 120)
    expect(use).to_be_checked(timeout=20_000)
    expect(calibrate).not_to_be_checked()
    shows(page, expect, "(measured)")
    page.reload()
    expect(use).to_be_checked(timeout=30_000)
