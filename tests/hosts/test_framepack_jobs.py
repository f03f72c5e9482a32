"""Jobs of FramePack's page, through a demo of a few lines with the package's own sampler."""

import argparse
import copy
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import magcache_framepack_page as framepack_page
import pytest
import torch
from framepack_helpers import sample_section
from magcache_framepack import FramePackJobs, sections

from common.errors import MagCacheError
from common.scripts import controls
from common.scripts.controls import Choice
from common.scripts.install import install
from common.tables import read, write

REPOSITORY = Path(__file__).resolve().parents[2]

# --- jobs of a demo ---

OFF, CALIBRATE = (False, False, 0.1, 3, 0.2, "off"), (False, True, 0.1, 3, 0.2, "off")
ON, AT_TWICE = (True, False, 0.1, 3, 0.2, "off"), (True, False, 0.1, 3, 0.2, "2x")
JOB = {"steps": 12, "seconds": 0.5, "window": 2, "cfg": 1.0, "use_teacache": True}  # two sections


class Demo(types.ModuleType):
    """What a job passes through in FramePack's demo: `process`, which starts `worker` in a thread and follows the
    newest stream; `sample_hunyuan`, once a section; and End Generation. The sampler and the transformer are the
    package's."""

    def __init__(self, package, transformer, folder):
        super().__init__("demo_gradio")
        self.package, self.transformer, self.folder = package, transformer, folder
        self.ips = [*JOB]
        self.use_teacache, self.steps = "use_teacache", "steps"
        self.stream, self.plain_sampler = None, package.sampler.sample_hunyuan
        self.sample_hunyuan, self.latents, self.teacache, self.end_at = self.plain_sampler, [], [], None
        self.when_cancelled = lambda: None

    def worker(self, steps, seconds, window, cfg, use_teacache):
        self.teacache.append(use_teacache)
        try:
            for section in range(sections(seconds, window)):

                def callback(state, section=section):
                    if self.end_at == (section, state["i"]):
                        self.stream.put("end")
                        raise KeyboardInterrupt

                self.latents.append(
                    sample_section(
                        self.package,
                        self.transformer,
                        int(steps),
                        cfg,
                        sampler=self.sample_hunyuan,
                        history=self.latents[-1] if section else None,
                        callback=callback,
                    )
                )
                self.stream.put(str(self.folder / f"{section}.mp4"))
        except BaseException:
            self.when_cancelled()
        self.stream.put("end")

    def process(self, *inputs):
        yield None, "started"
        self.stream = queue.Queue()
        threading.Thread(target=self.worker, args=inputs).start()
        while (sent := self.stream.get(timeout=60)) != "end":
            yield sent, "file"
        yield None, "ended"


def job_flags(**given):
    parser = argparse.ArgumentParser()
    framepack_page.add_framepack_flags(parser)
    return argparse.Namespace(**{**vars(parser.parse_args([])), **given})


@pytest.fixture
def demo_package(package, transformer, tmp_path, monkeypatch):
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    return Demo(package, transformer, tmp_path)


def demo_jobs(demo, **given):
    return FramePackJobs(demo, job_flags(**given), (0.1, 3, 0.2), "framepack")


def job_plan(jobs, steps, seconds, window, values, teacache=False):
    return jobs.plan(steps, seconds, window, teacache, Choice(*values))


def run_job(jobs, values, **changed):
    """(latents of each section, the last lines, every yield) of one job."""
    before = len(jobs.demo.latents)
    shown = list(jobs.process(*{**JOB, **changed}.values(), *values))
    jobs.idle.wait(60)
    return jobs.demo.latents[before:], shown[-1][1], shown


def equal(latents, others):
    return len(latents) == len(others) and all(torch.equal(one, other) for one, other in zip(latents, others))


@pytest.fixture
def plain_latents(package, transformer, tmp_path):
    """The latents of the un-cached job, through a demo that MagCache never saw."""
    untouched = Demo(package, copy.deepcopy(transformer), tmp_path)
    list(untouched.process(*{**JOB, "use_teacache": False}.values()))
    return untouched.latents


def test_a_job_with_magcache(demo_package, plain_latents):
    jobs = demo_jobs(demo_package)
    latents, lines, shown = run_job(jobs, ON)
    assert len(latents) == 2 and not equal(latents, plain_latents) and demo_package.teacache == [False]
    assert [line.partition(":")[0] for line in lines] == ["Section 1", "Section 2"]
    assert all("7 of 12 model calls computed, 5 reused" in line and "s saved" in line for line in lines)
    assert [shown[0][0], shown[-1][0]] == [(None, "started"), (None, "ended")]
    report = json.loads((demo_package.folder / "1.magcache.json").read_text())
    assert [section["reused"] for section in report["sections"]] == [5, 5] and report["mag_ratios_of"] == "framepack"
    assert "forward" not in vars(demo_package.transformer)


def test_jobs_without_magcache_are_the_hosts(demo_package, plain_latents, package):
    jobs = demo_jobs(demo_package)
    assert equal(run_job(jobs, OFF, use_teacache=False)[0], plain_latents)
    assert equal(run_job(jobs, (True, False, 0.1, 0, 0.2, "off"))[0], plain_latents)  # magcache_K 0
    assert equal(run_job(jobs, CALIBRATE)[0], plain_latents)
    latents, lines, _ = run_job(jobs, OFF)
    assert lines == [] and demo_package.teacache == [False, False, False, True]
    teacache = Demo(package, demo_package.transformer, demo_package.folder)
    list(teacache.process(*JOB.values()))
    assert equal(latents, teacache.latents)


def test_the_job_after_an_ended_one_is_as_alone(demo_package):
    jobs = demo_jobs(demo_package)
    alone, *_ = run_job(jobs, ON)
    kept = []

    def end_slowly():  # the worker's last word comes while the next job starts
        kept.append(dict(jobs.job.handle.residuals.kept))
        time.sleep(1)

    demo_package.end_at, demo_package.when_cancelled = (1, 9), end_slowly
    ended = list(jobs.process(*{**JOB, "steps": 25, "seconds": 1.0, "cfg": 2.0}.values(), *ON))
    assert len(ended[-1][1]) == 1 and not jobs.idle.is_set()
    demo_package.end_at = None
    latents, lines, shown = run_job(jobs, ON)
    assert "still ending" in shown[0][1][0] and kept == [{}]
    assert equal(latents[-2:], alone) and len(lines) == 2 and [outputs[1] for outputs, *_ in shown].count("file") == 2


def test_calibration_in_the_page_is_used_from_then_on(demo_package, tmp_path):
    jobs = demo_jobs(demo_package)
    published = jobs.known_table(12)
    _, lines, shown = run_job(jobs, CALIBRATE)
    path = jobs.calibration_file
    assert path.parent == tmp_path / "home" and path.name == f"framepack-{jobs.checkpoint}.json"
    assert "Measured in 2 sections" in lines[-1] and shown[-1][0] is None
    assert jobs.newly_measured() and not jobs.newly_measured()
    assert published.origin == "published" and jobs.known_table(12).origin == "measured"
    table = read(path)
    assert (
        table.rule == {"max_deviation": 0.06}
        and table.statistics["runs"] == 2
        and table.mag_ratios == jobs.known_table(12).mag_ratios
    )
    assert job_plan(jobs, 12, 1, 2, AT_TWICE).summary.startswith("2x: ") and len(run_job(jobs, AT_TWICE)[0]) == 2
    again = demo_jobs(
        Demo(demo_package.package, demo_package.transformer, demo_package.folder)
    )  # the page of another day
    assert again.known_table(12).mag_ratios == table.mag_ratios and again.starts_cached()


def test_a_calibration_that_breaks_off_saves_what_is_complete(demo_package):
    jobs = demo_jobs(demo_package)
    demo_package.end_at = (0, 5)
    _, lines, shown = run_job(jobs, CALIBRATE)
    assert "Nothing was saved" in lines[-1] and not jobs.newly_measured() and not jobs.calibration_file.exists()
    assert jobs.known_table(12).origin == "published"
    demo_package.end_at = (1, 5)
    _, lines, shown = run_job(jobs, CALIBRATE)
    assert "Measured in 1 section," in lines[-1] and read(jobs.calibration_file).statistics["runs"] == 1


def test_flags_name_the_files(demo_package, tmp_path):
    target = tmp_path / "deep" / "mine.json"
    run_job(demo_jobs(demo_package, magcache_calibration=str(target), magcache_all_tokens=True), CALIBRATE)
    table = read(target)
    assert "all tokens" in table.notes and table.rule == {"max_deviation": 0.06}
    renamed = replace(table, name="renamed")
    write(tmp_path / "other.json", renamed)
    jobs = demo_jobs(
        Demo(demo_package.package, demo_package.transformer, demo_package.folder),
        mag_ratios=str(tmp_path / "other.json"),
    )
    assert jobs.known_table(25).name == "renamed" and "renamed" in " ".join(job_plan(jobs, 25, 5, 9, ON).lines)


def test_the_plan_follows_the_controls(demo_package):
    jobs = demo_jobs(demo_package)
    shown = job_plan(jobs, 25, 5, 9, ON)
    assert shown.strip == "#####..#.#..#..#..#...#.#"
    assert shown.summary == "12 of 25 steps compute, at most 2.08x faster"
    assert shown.lines[:2] == (
        "4 sections: 48 of 100 steps of the job compute",
        "Ratios: framepack (published)",
    )
    assert job_plan(jobs, 25, 5, 9, (True, False, 0.15, 4, 0.2, "off")).summary.startswith("11 of 25 steps")
    longer = job_plan(jobs, 50, 10, 9, ON)
    assert longer.strip != shown.strip and longer.lines[0].startswith("8 sections")
    off = job_plan(jobs, 25, 5, 9, (True, False, 0.1, 0, 0.2, "off"))
    assert off.summary == "every step computes" and any("magcache_K is 0" in line for line in off.lines)
    twice = job_plan(jobs, 25, 5, 9, AT_TWICE)
    assert twice.summary == "2x: 13 of 25 steps compute, at most 1.92x faster, the nearest possible"
    assert twice.lines == ("4 sections: 52 of 100 steps of the job compute",)
    assert twice.strip[0] == twice.strip[-1] == "#" and twice.strip.count("#") == 13
    assert job_plan(jobs, 25, 5, 9, OFF).summary == "off, every step computes"
    assert job_plan(jobs, 25, 5, 9, OFF, teacache=True).summary == "off, TeaCache decides"
    assert str(jobs.calibration_file) in job_plan(jobs, 25, 5, 9, CALIBRATE).lines[0]
    words = [shown, longer, off, twice, job_plan(jobs, 25, 5, 9, OFF), job_plan(jobs, 25, 5, 9, CALIBRATE)]
    assert not any("--" in line or "payload" in line for one in words for line in (one.summary, *one.lines))


def test_a_short_calibration_is_not_used_for_a_long_job(demo_package, tmp_path):
    """And a finer table stays where it is."""
    jobs = demo_jobs(demo_package)
    run_job(jobs, CALIBRATE, steps=2)
    assert jobs.known_table(8).steps == 2 and jobs.known_table(25).origin == "published"
    run_job(jobs, CALIBRATE, steps=12)
    run_job(jobs, CALIBRATE, steps=2)
    assert jobs.known_table(12).steps == jobs.known_table(25).steps == 12
    assert sorted(read(path).steps for path in (tmp_path / "home").iterdir()) == [2, 12]
    again = demo_jobs(Demo(demo_package.package, demo_package.transformer, demo_package.folder))
    assert again.known_table(12).steps == 12
    run_job(again, ON, steps=12)
    assert (
        json.loads((demo_package.folder / "1.magcache.json").read_text())["mag_ratios_of"] == again.known_table(12).name
    )
    again.of_model, again.own = None, [table for table in again.own if table.steps == 2]
    with pytest.raises(MagCacheError, match="were measured at too few steps for this job: tick Calibrate"):
        run_job(again, ON, steps=25)


def test_a_report_that_cannot_be_written_or_is_not_ours(demo_package):
    jobs = demo_jobs(demo_package)
    (demo_package.folder / "1.magcache.json").write_text('{"whose": "somebody\'s"}')
    (demo_package.folder / "0.magcache.json").mkdir()
    latents, lines, _ = run_job(jobs, ON)
    assert len(latents) == 2 and (demo_package.folder / "1.magcache.json").read_text() == '{"whose": "somebody\'s"}'
    assert len(json.loads((demo_package.folder / "1_2.magcache.json").read_text())["sections"]) == 2


@pytest.mark.parametrize("seconds, window, count", [(1, 9, 1), (5, 9, 4), (2.4, 9, 2), (120, 9, 100), (0.1, 33, 1)])
def test_sections_are_counted_as_the_host_counts_them(seconds, window, count):
    assert sections(seconds, window) == int(max(round((seconds * 30) / (window * 4)), 1)) == count


def test_a_checkpoint_without_a_table_is_told_how_to_get_one(demo_package):
    demo_package.transformer.register_to_config(_name_or_path="somebody/finetune")
    jobs = demo_jobs(demo_package)
    assert not jobs.starts_cached()
    for attempt in (lambda: job_plan(jobs, 25, 5, 9, ON), lambda: run_job(jobs, ON)):
        with pytest.raises(MagCacheError, match="somebody/finetune are not known: tick Calibrate"):
            attempt()
    assert not demo_package.latents and equal(run_job(jobs, OFF)[0], demo_package.latents)
    latents, lines, _ = run_job(jobs, AT_TWICE)  # needs none
    assert len(latents) == 2 and all("6 of 12 model calls computed, 6 reused" in line for line in lines)
    assert json.loads((demo_package.folder / "1.magcache.json").read_text())["mag_ratios_of"] is None
    run_job(jobs, CALIBRATE)
    assert len(run_job(jobs, ON)[0]) == 2 and jobs.starts_cached()


def test_wrong_values_are_refused_before_anything_runs(demo_package):
    jobs = demo_jobs(demo_package)
    with pytest.raises(MagCacheError, match="retention_ratio"):
        run_job(jobs, (True, False, 0.1, 3, 1.5, "off"))
    assert not demo_package.latents and len(run_job(jobs, ON)[0]) == 2


# --- around the page ---


def test_the_plan_is_drawn(demo_package):
    jobs = demo_jobs(demo_package)
    drawn = controls.plan_html(job_plan(jobs, 25, 5, 9, ON))
    assert drawn.count(": computes") == 12 and drawn.count(": is skipped") == 13 and 'aria-label="#####..#.' in drawn
    assert "4 sections: 48 of 100 steps" in drawn
    assert controls.plan_html(job_plan(jobs, 25, 5, 9, OFF)) == "<div>off, every step computes</div>"
    assert controls.in_lines(["a < b"]) == "<div>a &lt; b</div>"


def test_the_gradio_that_the_checkout_pins_is_asked_for(monkeypatch, tmp_path):
    pinned = tmp_path / "requirements.txt"
    pinned.write_text("accelerate==1.6.0\ngradio==5.23.0\n")
    monkeypatch.setattr(framepack_page, "version", lambda package: "6.31.0")
    with pytest.raises(MagCacheError, match="pip install gradio==5.23.0"):
        framepack_page.check_gradio(pinned)
    framepack_page.check_gradio(tmp_path / "absent.txt")
    for fine in ("5.23.0", "5.50.0"):
        monkeypatch.setattr(framepack_page, "version", lambda package, fine=fine: fine)
        framepack_page.check_gradio(pinned)
    monkeypatch.undo()
    with pytest.raises(MagCacheError, match="This needs the package gradio"):
        monkeypatch.setattr(framepack_page, "version", lambda package: version("a-package-that-nobody-has"))
        framepack_page.check_gradio(pinned)


TOY_DEMO = """
import os

os.environ["HF_HOME"] = "beside the demo"
import toy_gradio

port = __import__("sys").argv[1:]
block = toy_gradio.Blocks()
block.launch(7, share=False)
"""
TOY_GRADIO = """
import os

HF_HOME = os.environ.get("HF_HOME")


class Blocks:
    def launch(self, *args, **kwargs):
        raise AssertionError("launched")
"""


def test_the_page_is_held_back_by_a_gradio_that_the_demo_imports(monkeypatch, tmp_path):
    """Whatever reads HF_HOME finds what the demo set, since nobody imports it before the demo does."""
    (tmp_path / "toy_demo.py").write_text(TOY_DEMO)
    (tmp_path / "toy_gradio.py").write_text(TOY_GRADIO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HOME", "elsewhere")
    finders = [*sys.meta_path]
    with framepack_page.launch_held_back("toy_gradio") as launches:
        demo = importlib.import_module("toy_demo")
    assert [(launch.args, launch.options) for launch in launches] == [((7,), {"share": False})]
    assert demo.toy_gradio.HF_HOME == "beside the demo"
    assert sys.meta_path == finders
    with pytest.raises(AssertionError, match="launched"):
        demo.block.launch()


def test_importing_the_drop_in_reads_no_environment_of_the_hub():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, magcache_framepack_page; print(*sys.modules)"],
        cwd=REPOSITORY / "MagCache4FramePack",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"gradio", "huggingface_hub", "diffusers", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"mag_ratios": "nothing.json"}, "no calibration file nothing.json"),
        ({"magcache_calibration": "/proc/none/x.json"}, "calibration file /proc/none/x.json cannot be written"),
    ],
)
def test_flags_are_checked_before_weights_are_loaded(given, sentence):
    with pytest.raises(MagCacheError, match=sentence):
        framepack_page.check_page_flags(job_flags(**given))


def test_a_torchvision_that_writes_no_videos_is_named(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torchvision", types.SimpleNamespace(io=types.SimpleNamespace(), __version__="0.28.0")
    )
    with pytest.raises(MagCacheError, match="torchvision 0.28.0"):
        framepack_page.check_page_flags(job_flags())


def test_install_knows_the_checkout(tmp_path):
    with pytest.raises(MagCacheError, match="demo_gradio.py"):
        install("MagCache4FramePack", tmp_path)
    known, windows = json.loads((REPOSITORY / "MagCache4FramePack" / "install.json").read_text())
    for name in known["recognised_by"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert install("MagCache4FramePack", tmp_path) == "python magcache_demo_gradio.py"
    assert (tmp_path / "magcache_demo_gradio_f1.py").is_file() and (tmp_path / "magcache_framepack.py").is_file()
    (tmp_path / "demo_gradio_f1.py").unlink()
    assert install("MagCache4FramePack", tmp_path) == windows["run"] and "f1" not in str(windows["files"])
