"""What needs a calibration gets it in the first run, on real pipelines: its result is the un-cached one, and the next
run is cached."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from ranks import two_ranks
from tiny_pipelines import FAMILIES, Stopped, context_parallel, denoiser, embeds, run_pipeline

from common.calibration import Statistics
from common.errors import MagCacheError
from common.hosts import HOSTS, class_name
from common.pipeline import enable
from common.tables import read

STEPS = 8
RULE, ERROR = {"thresh": 5.0, "K": 1, "retention_ratio": 0.2}, {"max_error": 0.15}
pytestmark = pytest.mark.usefixtures("home")  # the folder of calibrations
SAID = "MagCache measuring: this run computes every step; the next one is faster"


def files(home):
    return sorted(home.glob("*")) if home.is_dir() else []


MEASURABLE = [name for name in FAMILIES if name not in ("sdxl", "ltx2")]


@pytest.mark.parametrize(
    "family, wish",
    [*((name, RULE) for name in MEASURABLE), *((name, ERROR) for name in ("flux", "wan22", "sd3", "lumina2"))],
)
def test_the_first_run_is_measured_and_the_next_is_cached(family, wish, home):
    pipe, arguments = FAMILIES[family]()
    plain, other = run_pipeline(pipe, arguments(1), STEPS), run_pipeline(pipe, arguments(2), STEPS)
    with pytest.raises(MagCacheError, match="measure them with enable.pipe, calibrate=True. around one run, or ask"):
        enable(pipe, **wish, calibrate=False)
    said = []
    with enable(pipe, **wish, announce=said.append) as cache:
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
        assert [text for text in said if "plan" in text] == [] and said[0] == f"{SAID}."
        (path,) = files(home)
        assert cache.report == f"{SAID} (saved to {path})." and cache.reports[0].complete
        assert cache.reports[0].to_dict()["measuring"].startswith("this run computes every step")
        cached = run_pipeline(pipe, arguments(2), STEPS)
        assert "reused" in cache.report and said[1].startswith("MagCache plan: 8 steps, ratios of ")
    first, second = cache.reports
    assert first.verified and first.reused == 0 and len(first.calls) == len(second.calls)
    assert second.reused and not second.unplanned and 0 < (cached - other).norm() / other.norm() < 0.1
    measured = read(path)
    assert measured.statistics["runs"] == 1 and measured.steps == STEPS
    assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
    with enable(pipe, **wish, calibrate=False, announce=None) as later:  # by the file
        assert torch.equal(run_pipeline(pipe, arguments(2), STEPS), cached)
    assert later.reports[0].schedule.strip == second.schedule.strip
    path.unlink()
    with enable(pipe, calibrate=True, announce=None):
        run_pipeline(pipe, arguments(1), STEPS)
    asked = read(path)
    assert asked.mag_ratios == measured.mag_ratios and asked.sigmas == measured.sigmas
    assert asked.sampler == measured.sampler and asked.provenance == measured.provenance


LATER = """
import sys
sys.path[:0] = sys.argv[1:]
import torch
from tiny_pipelines import FAMILIES, run_pipeline
from common.pipeline import enable
pipe, arguments = FAMILIES["flux"]()
with enable(pipe, thresh=5.0, K=1, retention_ratio=0.2, announce=None) as cache:
    torch.save(run_pipeline(pipe, arguments(2), 8), "later.pt")
print(cache.report)
"""


def test_a_new_process_finds_what_was_measured():
    pipe, arguments = FAMILIES["flux"]()
    with enable(pipe, **RULE, announce=None):
        run_pipeline(pipe, arguments(1), STEPS)
        cached = run_pipeline(pipe, arguments(2), STEPS)
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", LATER, str(here), str(here.parents[1])], capture_output=True, text=True, timeout=120
    )
    assert "4 of 8 model calls computed, 4 reused" in done.stdout, done.stderr
    assert torch.allclose(torch.load("later.pt"), cached, rtol=1e-5, atol=1e-5)


@pytest.mark.robustness(
    "When nothing would be cached",
    "a first run that calibrates is interrupted, at any step",
    "nothing is saved; the next run calibrates again",
)
@pytest.mark.parametrize("way", ["exception", "interrupt"])
@pytest.mark.parametrize("family", ["flux", "wan22"])
def test_a_run_that_breaks_off_saves_nothing(family, way, home):
    """At each step; after the last one there is a whole run."""
    pipe, arguments = FAMILIES[family]()
    plain, said = run_pipeline(pipe, arguments(1), STEPS), []
    for at in range(STEPS):

        def stop(pipe, step, timestep, tensors, at=at):
            if step == at and way == "exception":
                raise Stopped
            pipe._interrupt |= step == at
            return {}

        with enable(pipe, **RULE, announce=said.append) as cache:
            try:
                run_pipeline(pipe, arguments(2), STEPS, callback_on_step_end=stop)
            except Stopped:
                assert way == "exception"
            if at == STEPS - 1:
                assert len(files(home)) == 1 and cache.report.startswith(SAID)
                break
            assert files(home) == [] and said[-1] == cache.report
            assert cache.report.endswith("interrupted, so nothing is saved and the next one measures again.")
            if at == 3:
                assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain) and len(files(home)) == 1
                run_pipeline(pipe, arguments(1), STEPS)
                assert cache.reports[-1].reused
                files(home)[0].unlink()


def image_to_image_pipeline(pipe, arguments, strength):
    names = ("scheduler", "vae", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipe = diffusers.FluxImg2ImgPipeline(**{name: getattr(pipe, name) for name in names})
    return pipe, {**arguments(1), "image": embeds(3, 1, 3, 16, 16).clamp(0, 1), "strength": strength}


@pytest.mark.robustness(
    "When nothing would be cached",
    "a first run of few steps, or one that begins late (image to image)",
    "not measured under five steps; else its noise levels are, and a run that has many others is measured too",
)
def test_a_first_run_that_begins_late(home):
    """What a table of few noise levels is good for: a run of which it covers more than half is planned by it, and
    computes beyond it; for another the ratios are measured again, and kept beside it or in its place."""
    pipe, arguments = FAMILIES["flux"]()
    late, call = image_to_image_pipeline(pipe, arguments, 0.7)
    plain, said = run_pipeline(late, call, 10), []
    with enable(late, **RULE, announce=said.append) as cache:
        assert torch.equal(run_pipeline(late, call, 10), plain)
        run_pipeline(late, call, 10)
    assert [bool(report.reused) for report in cache.reports] == [False, True] and len(files(home)) == 1
    with enable(pipe, **RULE, announce=said.append) as cache:
        run_pipeline(pipe, arguments(1), 10)
    report = cache.reports[0]
    assert report.reused and "3 of the steps compute because they lie beyond" in said[-1]
    assert report.schedule.strip.startswith("####") and len(files(home)) == 1
    files(home)[0].unlink()
    late, call = image_to_image_pipeline(pipe, arguments, 0.5)
    with enable(late, **RULE, announce=None):
        run_pipeline(late, {**call, "strength": 0.5}, 14)
    with enable(pipe, **RULE, announce=None) as cache:
        run_pipeline(pipe, arguments(1), 28)
        run_pipeline(pipe, arguments(1), 28)
    assert [report.reused > 0 for report in cache.reports] == [True, True]  # shift 3: 0.75 is the middle of a run
    files(home)[0].unlink()
    late, call = image_to_image_pipeline(pipe, arguments, 0.3)
    with enable(late, **RULE, announce=None):
        run_pipeline(late, call, 20)
    assert len(files(home)) == 1 and read(files(home)[0]).steps == 6
    with enable(pipe, **RULE, announce=None) as cache:
        run_pipeline(pipe, arguments(1), STEPS)
        run_pipeline(pipe, arguments(1), STEPS)
    assert [report.reused > 0 for report in cache.reports] == [False, True] and len(files(home)) in (1, 2)


@pytest.mark.robustness(
    "When nothing would be cached",
    "a first run of few steps, or one that begins late (image to image)",
)
@pytest.mark.parametrize(
    "wish, steps, why",
    [
        (RULE, 4, "a run of 4 steps has nothing to gain"),
        (ERROR, 4, "a run of 4 steps has nothing to gain"),
        (RULE, 1, "a run of 1 steps has nothing to gain"),
        ({**RULE, "thresh": 0.0}, STEPS, "magcache_thresh is 0, which turns MagCache off"),
        ({**RULE, "K": 0}, STEPS, "magcache_K is 0, which turns MagCache off"),
        ({"max_error": 0.0}, STEPS, "magcache_max_error is 0, which turns MagCache off"),
    ],
)
def test_what_could_skip_nothing_is_not_measured(wish, steps, why, home):
    pipe, arguments = FAMILIES["flux"]()
    plain = run_pipeline(pipe, arguments(1), steps)
    with enable(pipe, **wish, announce=None) as cache:
        assert torch.equal(run_pipeline(pipe, arguments(1), steps), plain)
    assert why in cache.report and files(home) == []


@pytest.mark.robustness(
    "When nothing would be cached",
    "a first run's calibration fails, or cannot be saved",
    "the image is kept; the next run calibrates again, or uses the calibration in this process",
)
def test_what_goes_wrong_loses_nothing(home, monkeypatch):
    pipe, arguments = FAMILIES["flux"]()
    plain, said, finish = run_pipeline(pipe, arguments(1), STEPS), [], Statistics.finish

    def fail(statistics, seconds):
        raise MagCacheError("It did not work.")

    with enable(pipe, **RULE, announce=said.append) as cache:
        monkeypatch.setattr(Statistics, "finish", fail)
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
        assert cache.report == "MagCache measuring: it failed (It did not work), so the next run measures again."
        monkeypatch.setattr(Statistics, "finish", finish)
        home.write_text("in the way")
        assert torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)
        assert said[-1] == cache.report and f"{SAID}, in this process only (" in cache.report
        run_pipeline(pipe, arguments(1), STEPS)
    assert cache.reports[-1].reused and home.read_text() == "in the way"


def test_a_lora_put_on_since_is_not_saved_under_the_name_of_the_weights(home):
    pipe, arguments = FAMILIES["flux"]()
    said, lora = [], peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    with pytest.raises(MagCacheError, match="A LoRA was loaded, scaled or taken off since"):
        with enable(pipe, calibrate=True, announce=None):
            pipe.transformer.add_adapter(lora, "mine")
            run_pipeline(pipe, arguments(1), STEPS)
    with enable(pipe, **RULE, announce=said.append) as cache:
        pipe.transformer.set_adapters(["mine"], [0.5])
        run_pipeline(pipe, arguments(1), STEPS)
        assert f"{SAID}, in this process only (A LoRA was loaded, scaled" in cache.report and files(home) == []
        run_pipeline(pipe, arguments(1), STEPS)
    assert cache.reports[-1].reused
    with enable(pipe, **RULE, announce=None):
        run_pipeline(pipe, arguments(1), STEPS)
    (with_lora,) = files(home)
    pipe.transformer.delete_adapters("mine")
    with enable(pipe, **RULE, announce=None) as cache:
        run_pipeline(pipe, arguments(1), STEPS)
    assert not cache.reports[0].reused and len(files(home)) == 2 and with_lora in files(home)


@pytest.mark.parametrize("family, why", [("sdxl", "a U-Net has no stack"), ("ltx2", "it denoises image and sound")])
def test_a_model_without_one_stack_has_nothing_to_measure(family, why):
    pipe, _ = FAMILIES[family]()
    model = denoiser(pipe)
    for wish in (RULE, ERROR, {**RULE, "calibrate": False}):
        with pytest.raises(MagCacheError, match=f"For {type(model).__name__} only the output .* because {why}"):
            enable(pipe, **wish)
        assert "forward" not in model.__dict__ and "progress_bar" not in vars(pipe)


@pytest.mark.parametrize("wish", [RULE, ERROR], ids=["rule", "max_error"])
def test_a_class_nobody_described_is_measured(wish, monkeypatch):
    pipe, arguments = FAMILIES["sd3"]()
    plain = run_pipeline(pipe, arguments(1), STEPS)
    monkeypatch.delitem(HOSTS, class_name(pipe.transformer))
    cache = enable(pipe, **wish, announce=None)
    for _ in range(2):  # the second time by what the first left
        with cache:
            first, _ = run_pipeline(pipe, arguments(1), STEPS), run_pipeline(pipe, arguments(1), STEPS)
        assert torch.equal(first, plain) == (len(cache.reports) == 2)
        assert cache.reports[-1].reused and "forward" not in pipe.transformer.__dict__
    assert [bool(report.reused) for report in cache.reports] == [False, True, True, True]


def test_facts_that_do_not_hold_are_not_measured(home, monkeypatch):
    pipe, arguments = FAMILIES["flux"]()
    plain, name = run_pipeline(pipe, arguments(1), STEPS), class_name(pipe.transformer)
    monkeypatch.setitem(HOSTS, name, replace(HOSTS[name], final_layer="x_embedder"))
    with pytest.raises(MagCacheError, match="so its residuals cannot be measured: ask for a speed-up"):
        with enable(pipe, **RULE, announce=None):
            run_pipeline(pipe, arguments(1), STEPS)
    assert files(home) == [] and torch.equal(run_pipeline(pipe, arguments(1), STEPS), plain)


def test_published_ratios_need_no_measurement_and_an_error_does(home):
    pipe, arguments = FAMILIES["flux"]()
    pipe.register_to_config(_name_or_path="black-forest-labs/FLUX.1-dev")
    with enable(pipe, thresh=0.24, announce=None) as cache:
        run_pipeline(pipe, arguments(1), 28)
    assert cache.reports[0].schedule.computed == 9 and files(home) == []
    with enable(pipe, **ERROR, announce=None) as cache:
        run_pipeline(pipe, arguments(1), STEPS)
        run_pipeline(pipe, arguments(1), STEPS)
    assert [bool(report.reused) for report in cache.reports] == [False, True]
    assert [path.name.partition("-")[0] for path in files(home)] == ["FLUX.1"]
    with enable(pipe, thresh=0.24, announce=None) as cache:  # by its own ratios; the other settings as published
        run_pipeline(pipe, arguments(1), STEPS)
    settings = cache.reports[0].schedule.settings
    assert (settings.magcache_K, settings.retention_ratio) == (5, 0.1)


def test_two_pipelines_that_share_a_model_in_two_threads(home):
    """Both enabled: each measures its own first run, and is cached after it."""
    pipe, arguments = FAMILIES["flux"]()
    other = diffusers.FluxPipeline.from_pipe(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    plain, both = [run_pipeline(pipe, arguments(seed), STEPS) for seed in (1, 2)], threading.Barrier(2, timeout=60)

    def twice(pipe, seed):
        def meet(*_):
            both.wait()
            return {}

        return [run_pipeline(pipe, arguments(seed), STEPS, callback_on_step_end=meet) for _ in range(2)]

    with enable(pipe, **RULE, announce=None) as first, enable(other, **ERROR, announce=None) as second:
        with ThreadPoolExecutor(2) as pool:
            drawn = [future.result() for future in (pool.submit(twice, pipe, 1), pool.submit(twice, other, 2))]
    for cache, (measured, cached), expected in zip((first, second), drawn, plain):
        assert [bool(report.reused) for report in cache.reports] == [False, True]
        assert torch.equal(measured, expected) and 0 < (cached - expected).norm() / expected.norm() < 0.1
    assert len(files(home)) == 1 and "forward" not in pipe.transformer.__dict__


def measured_by_ranks(rank, divided, folder):
    pipe, arguments = FAMILIES["flux"]()
    if not divided:
        try:
            enable(pipe, **RULE)
        except MagCacheError as error:
            (folder / f"{rank}.txt").write_text(str(error))
        return
    context_parallel(pipe.transformer)
    with enable(pipe, **RULE, announce=None) as cache:
        runs = [run_pipeline(pipe, arguments(1), STEPS) for _ in range(2)]
    torch.save((runs, [report.reused for report in cache.reports], cache.reports[0].line()), folder / f"{rank}.pt")


def test_two_ranks_that_draw_together_measure_together(home, tmp_path):
    two_ranks(measured_by_ranks, True, tmp_path)
    pipe, arguments = FAMILIES["flux"]()
    plain = run_pipeline(pipe, arguments(1), STEPS)
    (first, counts, said), (second, counted, heard) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert counts == counted == [0, 4] and all(torch.equal(one, other) for one, other in zip(first, second))
    assert torch.allclose(first[0], plain, rtol=1e-4, atol=1e-4)
    (path,) = files(home)
    assert said == f"{SAID} (saved to {path})." and heard == f"{SAID}."
    with enable(pipe, **RULE, calibrate=False, announce=None):
        assert torch.allclose(run_pipeline(pipe, arguments(1), STEPS), first[1], rtol=1e-4, atol=1e-4)


def test_ranks_that_draw_each_its_own_are_not_measured_unasked(home, tmp_path):
    """They would have to add up what they saw, and may draw different numbers of pictures."""
    two_ranks(measured_by_ranks, False, tmp_path)
    said = {(tmp_path / f"{rank}.txt").read_text() for rank in range(2)}
    assert len(said) == 1 and "measure them with enable(pipe, calibrate=True)" in said.pop()
