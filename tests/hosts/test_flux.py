"""The two FLUX scripts, run as a user runs them: on the demo model, and on random weights at FLUX.1-dev's layer
structure."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from flux_scripts import DEMO, DEV, PROMPT, REPOSITORY, SCHNELL
from PIL import Image

from common.calibration import fingerprint
from common.hosts.diffusers import FLUX
from common.refine import MEASURES, best_measure
from common.schedule import Settings, magcache_schedule, rule_of
from common.scripts import flux
from common.scripts.quality import quality
from common.spread import spread_steps
from common.tables import load, read, write

pytestmark = pytest.mark.usefixtures("home")


def run_flux(capsys, script, *arguments):
    """Run a script in this process; returns what it printed."""
    argv, path = sys.argv, [*sys.path]
    sys.argv = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path
    return capsys.readouterr().out


def flux_complaint(capsys, script, *arguments):
    """The sentence with which a script ends after a mistake."""
    with pytest.raises(SystemExit) as end:
        run_flux(capsys, script, *arguments)
    text = str(end.value)
    assert text.startswith(script.name) and "\n" not in text and text.endswith(".")
    return text


def test_demo_runs_where_there_is_no_gpu_and_no_model(capsys):
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--magcache_corrector", "off")
    assert (
        "running the small bundled demo model" in text and "MagCache plan: 28 steps, ratios of demo (measured)" in text
    )
    assert Image.open("magcache_flux.png").size == (64, 64)
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    ran = ["#" if call["kind"] == "computed" else "." for call in report["by_call"]]
    assert "".join(ran) == report["strip"] and 0 < report["reused"] == 28 - report["computed"]
    assert report["complete"] and report["unplanned"] == {} and report["extra_bytes"] == 64 * 160 * 4


def test_threshold_zero_and_no_magcache_are_the_plain_pipeline(capsys):
    run_flux(capsys, DEV, "--prompt", PROMPT, "--magcache_thresh", 0, "--output", "zero.png")
    run_flux(capsys, DEV, "--prompt", PROMPT, "--no-magcache", "--output", "off.png")
    pipe = FluxPipeline.from_pretrained(DEMO).to(torch.float32)
    plain = pipe(
        PROMPT,
        height=64,
        width=64,
        num_inference_steps=28,
        guidance_scale=3.5,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(42),
    ).images[0]
    for name in ("zero.png", "off.png"):
        assert np.array_equal(np.asarray(Image.open(name)), np.asarray(plain))
    assert not Path("off.magcache.json").exists()


def test_compare_writes_pictures_figures_and_the_control(capsys):
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "a rocket on a black background", "--compare", "--magcache_plot")
    for name in (
        "magcache_flux_1.png",
        "magcache_flux_2.png",
        "magcache_flux_compare.png",
        "magcache_flux_1.schedule.png",
    ):
        assert Image.open(name).size[0] >= 64
    report = json.loads(Path("magcache_flux_1.magcache.json").read_text())
    computed = report["computed"]
    cached, fewer = f"MagCache, {computed} of 28", f"plain sampler, {computed} steps"
    assert text.count(fewer) == 3 and "Averaged over 2 prompts" in text and "Whole pipeline" in text
    assert "magcache_flux_compare.png" in report["files"] and "magcache_flux_1.schedule.png" in report["files"]
    run_flux(capsys, DEV, "--prompt", PROMPT, "--no-magcache", "--output", "off.png")
    pictures = [np.asarray(Image.open(name))[None] for name in ("off.png", "magcache_flux_1.png")]
    assert report["quality"][cached]["psnr"] == pytest.approx(quality(*pictures)["psnr"])
    assert set(report["quality"][fewer]) == {"psnr", "ssim", "ms_ssim", "seconds", "steps"}


def test_calibration_is_found_again_by_itself(capsys, tmp_path):
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 12, "--magcache_calibration")
    path = next((tmp_path / "home").glob("demo-*.json"))
    assert str(path) in text
    table = read(path)
    assert table.origin == "measured" and table.steps == 12 and table.provenance["prompts"] == [PROMPT]
    assert table.sampler["shift"] == pytest.approx(3.0, abs=0.01) and table.sampler["size"] == "64x64"
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 28)
    assert "ratios of 12 steps converted to the noise levels of this run" in text
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--mag_ratios", "flux-dev")
    assert "ratios of flux-dev (published)" in text


def test_bundled_calibration_was_measured_on_the_bundled_model(capsys):
    """The preset `demo` is what the script measures, up to the rounding of another machine."""
    bundled = read(REPOSITORY / "common/presets/demo.json")
    prompts = bundled.provenance["prompts"]
    run_flux(
        capsys, DEV, "--prompt", *prompts, "--seed", bundled.provenance["seed"], "--magcache_calibration", "again.json"
    )
    again = read("again.json")
    assert again.provenance["fingerprint"] == bundled.provenance["fingerprint"]
    assert np.allclose(again.mag_ratios["cond"], bundled.mag_ratios["cond"], atol=1e-3)


def test_true_guidance_has_two_branches_that_skip_together(capsys):
    run_flux(
        capsys,
        DEV,
        "--prompt",
        PROMPT,
        "--negative_prompt",
        "",
        "--true_cfg_scale",
        2,
        "--magcache_calibration",
        "two.json",
    )
    assert read("two.json").mag_ratios.keys() == {"cond", "uncond"}
    run_flux(
        capsys, DEV, "--prompt", PROMPT, "--negative_prompt", "", "--true_cfg_scale", 2, "--mag_ratios", "two.json"
    )
    calls = json.loads(Path("magcache_flux.magcache.json").read_text())["by_call"]
    by_step = {}
    for call in calls:
        by_step.setdefault(call["step"], []).append(call["kind"])
    assert len(by_step) == 28 and all(len(kinds) == 2 and kinds[0] == kinds[1] for kinds in by_step.values())
    assert any(kinds == ["reused", "reused"] for kinds in by_step.values())


def test_structure_of_flux_dev(capsys, dev_like):
    """57 blocks, embedded guidance, the published table and settings: 9 of 28 steps, as the release."""
    text = run_flux(capsys, DEV, "--model", dev_like, "--mag_ratios", "flux-dev", "--prompt", PROMPT)
    assert "ratios of flux-dev (published), magcache_thresh 0.24, magcache_K 5, retention_ratio 0.1" in text
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    # The demo's scheduler has shift 3, FLUX.1-dev's 3.16 at 1024 pixels: the ratios are carried over.
    assert report["computed"] + report["reused"] == 28 and report["reused"] >= 18
    text = run_flux(
        capsys, DEV, "--model", dev_like, "--mag_ratios", "flux-dev", "--magcache_interp", "nearest", "--prompt", PROMPT
    )
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    assert report["strip"] == "###..#...#.#.....#.....#..#." and report["computed"] == 9


@pytest.mark.parametrize(
    "name, steps, scheduler, computed",
    [
        ("flux-dev", 28, {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 9),
        ("flux-schnell", 4, {"shift": 1.0}, 3),
    ],
)
def test_published_schedule_at_the_noise_levels_of_diffusers(name, steps, scheduler, computed):
    """At 1024x1024 the pipelines walk the levels that the presets assume, so that the published ratios apply
    unchanged."""
    sampler = FlowMatchEulerDiscreteScheduler(**scheduler)
    mu = {"mu": 1.15} if "max_shift" in scheduler else {}  # calculate_shift at 4,096 tokens
    sampler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), **mu)
    table, levels = load(name), sampler.timesteps.double().numpy() / 1000
    assert table.fits(levels)
    schedule = magcache_schedule(table.at(levels), Settings(**table.settings), rule_of(table))
    assert schedule.computed == computed


def test_half_precision_walks_the_same_steps(capsys):
    """A bfloat16 timestep is off by up to 0.4 %, more than some steps are apart."""
    run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 50, "--dtype", "bfloat16")
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    assert [call["step"] for call in report["by_call"]] == list(range(50)) and report["complete"]
    assert "".join("#" if call["kind"] == "computed" else "." for call in report["by_call"]) == report["strip"]


def test_schnell_skips_the_third_of_four_steps(capsys, dev_like):
    run_flux(
        capsys,
        SCHNELL,
        "--model",
        dev_like,
        "--mag_ratios",
        "flux-schnell",
        "--magcache_interp",
        "nearest",
        "--prompt",
        PROMPT,
    )
    assert json.loads(Path("magcache_flux_schnell.magcache.json").read_text())["strip"] == "##.#"
    text = run_flux(
        capsys, SCHNELL, "--model", dev_like, "--mag_ratios", "flux-schnell", "--prompt", PROMPT, "--steps", 3
    )
    assert "a run of 3 steps has nothing to gain" in text


def test_planned_run_computes_as_many_steps_as_asked(capsys):
    """Only latents are kept, and the picture beats the plain sampler with as many steps."""
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--compare", "--magcache_plot", "--magcache_steps", 10)
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    assert report["strip"].count("#") == report["computed"] == 10 and report["unplanned"] == {}
    gap = max(map(len, report["strip"].split("#")))  # one held output, two anchors, three latents a skipped step
    assert report["extra_bytes"] == (1 + 2 + 3 * gap) * 64 * 64 * 4
    _, cached, fewer = report["quality"].values()
    assert cached["psnr"] > fewer["psnr"] + 3
    assert "corrector on" in text and "no calibration needed" in text
    planned = ("--magcache_predictor", "reuse", "--magcache_corrector", "off")
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--magcache_speedup", 2, "--steps", 20, *planned)
    assert "corrector off, because it was turned off" in text
    assert "computes 10 of 20" in text
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    assert report["computed"] == 10 and report["extra_bytes"] == 64 * 160 * 4


def test_a_calibrated_run_of_flux_with_guidance_plans_as_one_without(capsys):
    two = ("--prompt", PROMPT, "--negative_prompt", "", "--true_cfg_scale", 2)
    run_flux(capsys, DEV, *two, "--magcache_calibration", "two.json")
    assert read("two.json").statistics["gram"].keys() == {"cond", "uncond"}
    weighed = ("--magcache_steps", 12, "--magcache_predictor", "linear")
    text = run_flux(capsys, DEV, *two, "--mag_ratios", "two.json", *weighed, "--compare")
    assert "calibrated with guidance" in text
    planned = Image.open("magcache_flux.png")
    run_flux(capsys, DEV, *two, "--magcache_steps", 12, "--output", "free.png")
    assert np.array_equal(planned, Image.open("free.png"))
    report = json.loads(Path("magcache_flux.magcache.json").read_text())
    assert report["computed"] == 24 and report["unplanned"] == {}
    _, cached, fewer = report["quality"].values()
    assert cached["psnr"] > fewer["psnr"] + 3


def test_what_was_refined_serves_the_runs_after_it(capsys):
    """In any task that the checkpoint is found for, by its weights; --no-magcache and other wishes are refused."""
    flags = ("--prompt", PROMPT, "a robot", "--steps", 12, "--magcache_steps", 5)
    text = run_flux(capsys, DEV, *flags, "--magcache_refine")
    assert not list(Path().glob("*.png")) and text.count(" dB, worst") == len(MEASURES)
    (path,) = (Path("home")).glob("*.json")
    kept = read(path).statistics["refined"]
    assert (kept["steps"], kept["computed"], kept["prompts"]) == (12, 5, 2)
    share, power = kept["measure"]
    assert f"spread their computed steps in the measure {share:g}, {power:g} from now on" in text
    closeness = {(share, power): psnr for share, power, psnr in kept["psnr"]}
    assert set(closeness) == set(MEASURES) and best_measure(closeness) == (share, power)
    # One that is surely not the default, so that it shows.
    kept["measure"] = [1.0, 1.0]
    table = read(path)
    write(path, replace(table, statistics={**table.statistics, "refined": kept}))
    text = run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 12, "--magcache_steps", 5)
    strip = json.loads(Path("magcache_flux.magcache.json").read_text())["strip"]
    chosen = spread_steps(table.sigmas, 5, measure=(1.0, 1.0))
    assert [step for step, kind in enumerate(strip) if kind == "#"] == chosen and "measure (1.0, 1.0)" in text
    assert chosen != spread_steps(table.sigmas, 5)
    for more, part in (
        (["--compare"], "leave out --compare"),
        (["--no-magcache"], "leave out --no-magcache"),
        (["--magcache_calibration"], "leave out --magcache_calibration"),
    ):
        assert part in flux_complaint(capsys, DEV, *flags, "--magcache_refine", *more)
    assert "name it with --magcache_speedup" in flux_complaint(capsys, DEV, "--magcache_refine")


def test_prompt_file_seed_and_size(capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na robot\n")
    run_flux(capsys, DEV, "--prompt_file", "prompts.txt", "--height", 32, "--width", 48, "--steps", 6, "--seed", 7)
    assert Image.open("magcache_flux_2.png").size == (48, 32)
    assert json.loads(Path("magcache_flux_2.magcache.json").read_text())["seed"] == 7


def test_group_offload_gives_the_same_picture(capsys):
    run_flux(capsys, DEV, "--prompt", PROMPT, "--output", "plain.png")
    run_flux(capsys, DEV, "--prompt", PROMPT, "--offload", "group", "--output", "offloaded.png")
    assert Path("plain.png").read_bytes() == Path("offloaded.png").read_bytes()


def test_residuals_in_another_type(capsys):
    kept = ("--magcache_cache_dtype", "bfloat16", "--magcache_cache_device", "cpu", "--magcache_corrector", "off")
    run_flux(capsys, DEV, "--prompt", PROMPT, *kept)
    assert json.loads(Path("magcache_flux.magcache.json").read_text())["extra_bytes"] == 64 * 160 * 2


def test_fingerprint_tells_checkpoints_apart_and_not_their_types():
    transformer = FluxPipeline.from_pretrained(DEMO).transformer.float()
    known = fingerprint(transformer)
    assert fingerprint(transformer.bfloat16()) == known
    for name in ("transformer_blocks.1.attn.to_q.weight", "single_transformer_blocks.6.proj_out.weight"):
        weight = transformer.get_parameter(name)
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.01)
        assert fingerprint(transformer) != known
        with torch.no_grad():
            weight.copy_(before)
    assert fingerprint(transformer) == known


def test_lora_is_another_model(capsys, tmp_path):
    peft = pytest.importorskip("peft")
    pipe = FluxPipeline.from_pretrained(DEMO).to(torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    state = peft.get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=state)
    text = run_flux(
        capsys, DEV, "--model", "demo", "--lora", tmp_path / "lora", "--prompt", PROMPT, "--output", "lora.png"
    )
    assert "The LoRA changes the model" in text
    run_flux(capsys, DEV, "--prompt", PROMPT, "--output", "plain.png")
    assert Path("plain.png").read_bytes() != Path("lora.png").read_bytes()
    run_flux(capsys, DEV, "--model", "demo", "--lora", tmp_path / "lora", "--prompt", PROMPT, "--magcache_calibration")
    text = run_flux(capsys, DEV, "--model", "demo", "--lora", tmp_path / "lora", "--prompt", PROMPT)
    assert "The LoRA changes" not in text


def test_kontext_measures_the_tokens_of_the_picture_only(capsys, dev_like, tmp_path, monkeypatch):
    folder = tmp_path / "kontext"
    pipe = FluxPipeline.from_pretrained(dev_like)
    FluxKontextPipeline(
        **{
            name: pipe.components[name]
            for name in (
                "scheduler",
                "vae",
                "text_encoder",
                "tokenizer",
                "text_encoder_2",
                "tokenizer_2",
                "transformer",
            )
        }
    ).save_pretrained(folder)
    # The pipeline scales its reference picture to about a megapixel; a small one is enough here.
    monkeypatch.setattr(sys.modules[FluxKontextPipeline.__module__], "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
    Image.new("RGB", (64, 64), "red").save("reference.png")
    counted = []
    compare = FLUX.noise_tokens
    monkeypatch.setattr(
        flux,
        "FLUX",
        replace(
            FLUX,
            noise_tokens=lambda forward: (
                counted.append((compare(forward), forward["hidden_states"].shape[1])),
                compare(forward),
            )[1],
        ),
    )
    arguments = ("--model", folder, "--image", "reference.png", "--prompt", "a robot", "--steps", 8)
    run_flux(capsys, DEV, *arguments, "--magcache_calibration", "kontext.json")
    assert set(counted) == {(64, 128)}
    run_flux(capsys, DEV, *arguments, "--mag_ratios", "kontext.json", "--magcache_thresh", 9, "--output", "edit.png")
    report = json.loads(Path("edit.magcache.json").read_text())
    assert report["reused"] > 0 and Image.open("edit.png").size == (64, 64)


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--compare", "--no-magcache"], "leave out --no-magcache"),
        (["--magcache_thresh", "-1"], "magcache_thresh must be 0 (off) or more"),
        (["--magcache_K", "-1"], "magcache_K must be 0 (off) or more"),
        (["--retention_ratio", "2"], "retention_ratio is a share"),
        (["--mag_ratios", "nope"], "There is no preset 'nope'"),
        (
            ["--mag_ratios", "flux-dev", "--magcache_speedup", "2", "--magcache_predictor", "linear"],
            "need the Gram matrix",
        ),
        (["--magcache_guard", "2"], "are for planned runs"),
        (["--magcache_steps", "0"], "magcache_steps must be at least 1"),
        (["--magcache_speedup", "2", "--magcache_steps", "9"], "Ask for only one of"),
        (["--magcache_speedup", "2", "--magcache_thresh", "0"], "leave it out of a planned run"),
        (["--mag_ratios", "nope.json"], "There is no calibration file nope.json"),
        (["--model", "missing/folder"], "cannot be loaded"),
        (["--prompt_file", "missing.txt"], "cannot be read"),
        (["--image", "missing.png"], "--image needs FLUX.1-Kontext"),
        (["--output", "/proc/nowhere/x.png"], "cannot be written"),
        (["--output", "x.txt"], "is no image format"),
        (["--magcache_cache_device", "nonsense"], "is not a device of this machine"),
        (["--seed", "99999999999999999999999"], "--seed must be between"),
        (["--height", "0"], "must be multiples of 8"),
        (["--width", "-8"], "must be multiples of 8"),
        (["--height", "30"], "must be multiples of 8"),
        (["--lora", "missing.safetensors"], "cannot be loaded"),
        (["--offload", "model"], "leave it out"),
        (["--steps", "1", "--magcache_calibration", "one.json"], "run at least 2"),
    ],
)
def test_a_mistake_of_flux_gets_one_sentence(capsys, arguments, part):
    assert part in flux_complaint(capsys, DEV, "--prompt", PROMPT, *arguments)


@pytest.mark.parametrize(
    "arguments", [["--magcache_thresh", "-1"], ["--magcache_speedup", "2", "--magcache_steps", "9"]]
)
def test_settings_that_cannot_work_are_refused_before_the_model_is_loaded(capsys, arguments):
    text = flux_complaint(capsys, DEV, "--model", "missing/folder", "--prompt", PROMPT, *arguments)
    assert "cannot be loaded" not in text and "magcache_" in text


def test_a_picture_of_somebody_else_stays(capsys):
    Path("mine.png").write_text("not ours")
    for _ in range(2):
        run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 5, "--output", "mine.png")
        run_flux(capsys, DEV, "--prompt", PROMPT, "--steps", 5, "--output", "ours.png")
    assert Path("mine.png").read_text() == "not ours"
    assert sorted(path.name for path in Path().glob("*.png")) == ["mine.png", "mine_2.png", "mine_3.png", "ours.png"]


def test_a_checkpoint_without_a_table_names_the_calibration(capsys, dev_like):
    text = flux_complaint(capsys, DEV, "--model", dev_like, "--prompt", PROMPT)
    assert "--magcache_calibration" in text and "--no-magcache" in text


def test_interrupted_calibration_leaves_the_old_file(capsys, monkeypatch):
    shutil.copy(REPOSITORY / "common/presets/demo.json", "old.json")
    before = Path("old.json").read_text()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run_flux(capsys, DEV, "--prompt", PROMPT, "--magcache_calibration", "old.json")
    assert Path("old.json").read_text() == before


def test_copied_by_hand_and_by_install(tmp_path):
    """`cp` of the script and `common`, and `python -m common install`, both give a script that runs from there."""
    by_hand = tmp_path / "by_hand"
    shutil.copytree(REPOSITORY / "common", by_hand / "common", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(DEV, by_hand)
    installed = tmp_path / "installed"
    installed.mkdir()
    subprocess.run([sys.executable, "-m", "common", "install", "MagCache4FLUX", installed], cwd=REPOSITORY, check=True)
    for folder in (by_hand, installed):
        done = subprocess.run(
            [sys.executable, "magcache_flux.py", "--model", DEMO, "--mag_ratios", "demo", "--prompt", PROMPT],
            cwd=folder,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert (folder / "magcache_flux.png").is_file() and (folder / "magcache_flux.magcache.json").is_file()
