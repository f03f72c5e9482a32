"""MagCache4Diffusers/magcache_pipeline.py and `describe`, run as a user runs them on the demo model."""

from __future__ import annotations

import functools
import json
import os
import runpy
import subprocess
import sys
import wave
from pathlib import Path

import diffusers
import imageio_ffmpeg
import numpy as np
import peft
import pytest
import torch
from PIL import Image
from tiny_pipelines import TEXT, flux, ltx2, random_model

from common import discover, patch
from common.__main__ import main as command
from common.errors import MagCacheError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "MagCache4Diffusers" / "magcache_pipeline.py"
SMALL = ("--height", "32", "--width", "32", "--num_inference_steps", "6")


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """The script, run in an empty folder: (what it ended with, what it printed)."""
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))

    def run(*arguments, instead=None, **environment):
        for name, value in (instead or {}).items():
            monkeypatch.setitem(main.__wrapped__.__globals__, name, value)
        monkeypatch.setattr("sys.argv", [str(SCRIPT), *arguments])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        ended = None
        try:
            main()
        except SystemExit as error:
            ended = error.code
        return ended, capsys.readouterr().out

    return run


def test_a_picture_its_report_and_the_comparison(tmp_path, script):
    ended, said = script("--magcache_steps", "6", "--compare", "--guidance_scale", "2.5", "--num_inference_steps", "12")
    assert ended is None
    assert "computes 6 of 12" in said and "fewer steps" in said and "reused" in said
    report = json.loads((tmp_path / "magcache_demo.magcache.json").read_text())
    assert report["files"] == ["magcache_demo.png", "magcache_demo_compare.png"]
    assert all((tmp_path / name).stat().st_size for name in report["files"])
    assert report["strip"].count("#") == 6 and report["call"]["guidance_scale"] == 2.5
    assert report["quality"]["un-cached"]["psnr"] is None  # of equal pictures
    assert report["quality"]["MagCache"]["psnr"] > report["quality"]["fewer steps"]["psnr"]


def test_the_demo_draws_what_it_was_trained_for(tmp_path, script):
    """And not at the size of a large FLUX, which takes minutes and shows nothing."""
    ended, _ = script("--model", "demo", "--no-magcache", "--num_inference_steps", "1")
    with Image.open(tmp_path / "magcache_demo.png") as picture:
        assert ended is None and picture.size == (64, 64)


def test_the_comparison_of_a_video_moves_and_is_written_over_only_by_itself(tmp_path, script):
    """The README's first command with fewer steps, twice; a file of somebody else stays."""
    (tmp_path / "magcache_demo-video_compare.mp4").write_text("not ours")
    for _ in range(2):
        ended, said = script(
            "--model", "demo-video", "--compare", "--magcache_steps", "4", "--num_inference_steps", "6"
        )
        assert ended is None and "Prompt 1 of 1: a fox moves" in said
    report = json.loads((tmp_path / "magcache_demo-video.magcache.json").read_text())
    names = [f"magcache_demo-video{ending}" for ending in (".mp4", "_compare_2.mp4", "_compare.webp")]
    assert report["files"] == names
    assert {path.name for path in tmp_path.glob("*.*")} - {report["files"][0]} == {
        "magcache_demo-video.magcache.json",
        "magcache_demo-video_compare.mp4",
        *names[1:],
    }
    assert (tmp_path / "magcache_demo-video_compare.mp4").read_text() == "not ours"
    assert report["quality"]["un-cached"]["ssim"] == pytest.approx(1, abs=1e-6)
    with Image.open(tmp_path / names[2]) as moving:
        assert moving.n_frames == 17 and moving.size == (5 * 196 - 4, 40 + 192)
        first = np.asarray(moving.convert("RGB"))[40:]
        moving.seek(16)
        last = np.asarray(moving.convert("RGB"))[40:]
    assert np.abs(first[:, :192].astype(int) - first[:, 196 : 2 * 192 + 4]).mean() < 12  # un-cached, MagCache
    # The fox, which is bright in red on dark blue, has moved to the right.
    places = [np.argwhere(frame[:, :192, 0] > 128)[:, 1].mean() for frame in (first, last)]
    assert places[1] > places[0] + 20


def test_what_was_refined_is_found_by_the_next_run(tmp_path, script):
    video = ("--model", "demo-video", "--num_frames", "5", "--num_inference_steps", "8", "--magcache_steps", "4")
    ended, said = script(*video, "--magcache_refine")
    assert ended is None and not list(tmp_path.glob("*.mp4")) and "spread their computed steps in the measure" in said
    (path,) = (tmp_path / "home").glob("*.json")
    content = json.loads(path.read_text())
    content["statistics"]["refined"]["measure"] = [1.0, 1.0]
    path.write_text(json.dumps(content))
    ended, said = script(*video)
    assert ended is None and "measure (1.0, 1.0)" in said


def test_each_rank_draws_its_share_and_files_of_others_stay(tmp_path, script):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\na sun\n")
    (tmp_path / "mine_3.png").write_text("not ours")
    for rank in range(2):
        files = ("--prompt_file", "prompts.txt", "--output", "mine.png")
        ended, said = script(*files, *SMALL, RANK=str(rank), WORLD_SIZE="2")
        assert ended is None and "computes 3 of 6" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"mine_1.png", "mine_2.png", "mine_3.png", "mine_3_2.png"}
    assert (tmp_path / "mine_3.png").read_text() == "not ours"


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--num_inference_step", "4"), "no keyword num_inference_step; did you mean num_inference_steps?"),
        (("--no-magcache", "--compare"), "--compare compares MagCache with the un-cached model"),
        (("--magcache_speedup", "2", "--magcache_steps", "3", *SMALL), "only one of magcache_steps"),
        (("--magcache_speedup", "2", "--magcache_thresh", "0.1", *SMALL), "or for the paper's rule"),
        (("--model", "nowhere/nothing"), "nowhere/nothing cannot be loaded"),
        (("--offload", "model"), "there is none here"),
        (("--num_inference_steps", "0"), "must be at least 1, not 0"),
        (("--height", "tall"), "--height takes a number, not 'tall'"),
        (("--guidance_scale",), "--guidance_scale takes a number"),
        (("--sead", "3"), "has no keyword sead; did you mean seed?"),
        (("--output_type", "latent"), "is set by this script"),
        (("--max_sequence_length", "9999", *SMALL), "does not take this call"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, script, arguments, sentence):
    ended, _ = script(*arguments)
    assert ended.startswith("magcache_pipeline.py: ") and sentence in ended and "\n" not in ended
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (("--magcache_sped", "4"), "There is no flag --magcache_sped; did you mean magcache_speedup?"),
        (("--magcache_speedup", "2", "--magcache_steps", "3"), "only one of magcache_steps"),
        (("--magcache_speedup", "2", "--magcache_thresh", "0.1"), "or for the paper's rule"),
        (("--magcache_speedup", "nan"), "a number of 1 or more"),
        (("--magcache_thresh", "-1"), "must be 0 (off) or more"),
        (("--magcache_calibration", "--magcache_speedup", "2"), "leave out --magcache_speedup in this run"),
        (("--prompt_file", "missing.txt"), "missing.txt cannot be read"),
        (("--seed", "99999999999999999999"), "--seed must be between"),
        (("--fps", "-3"), "--fps must be larger than 0"),
        (("--output", "x.txt"), "has no ending that can be written"),
        (("--output", "."), "has no ending that can be written"),
    ],
)
def test_what_cannot_work_is_said_before_the_model_is_loaded(script, arguments, sentence):
    def load(_):
        raise AssertionError("the model was loaded")

    ended, _ = script(*arguments, instead={"load_model": load})
    assert ended.startswith("magcache_pipeline.py: ") and sentence in ended and "\n" not in ended


@pytest.mark.parametrize("asked, got", [("x.mp4", "x.png"), ("x.wav", "x.png")])
def test_a_name_that_does_not_suit_loses_nothing(tmp_path, script, asked, got):
    ended, said = script(*SMALL, "--output", asked)
    assert ended is None and f"{asked} is no name for an image" in said and (tmp_path / got).is_file()


def test_a_calibration_that_cannot_be_saved_loses_no_picture(tmp_path, script, monkeypatch):
    def full(*_):
        raise MagCacheError("The disk is full.")

    monkeypatch.setattr(patch, "save_calibration", full)
    ended, _ = script(*SMALL, "--magcache_calibration", "--output", "x.png")
    assert ended == "magcache_pipeline.py: The disk is full." and (tmp_path / "x.png").is_file()
    (tmp_path / "home").rmdir()
    (tmp_path / "home").write_text("in the way")
    ended, _ = script(*SMALL, "--magcache_calibration", "--output", "y.png")
    assert "cannot be written" in ended and not (tmp_path / "y.png").exists()  # it was said before the run


def test_a_report_that_cannot_be_written_stops_no_prompt(tmp_path, script):
    def full(*_, **__):
        raise MagCacheError("The disk is full.")

    ended, said = script(*SMALL, "--prompt", "a", "b", "--output", "x.png", instead={"write_report": full})
    assert ended is None and said.count("The report failed (The disk is full)") == 2
    assert (tmp_path / "x_1.png").is_file() and (tmp_path / "x_2.png").is_file()


def test_without_diffusers(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    ended, _ = script("--model", "nowhere/nothing")
    assert ended == "magcache_pipeline.py: This needs the package diffusers: pip install diffusers"


def test_heads_that_ranks_cannot_share(script):
    ended, _ = script("--context_parallel", *SMALL, WORLD_SIZE="2", RANK="0")
    assert "has 5 attention heads, which 2 processes cannot share evenly" in ended


def read_picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_a_lora_of_a_pipeline(tmp_path, script):
    pipe = diffusers.DiffusionPipeline.from_pretrained(REPOSITORY / "demo" / "image" / "model")
    torch.manual_seed(0)
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    type(pipe).save_lora_weights(tmp_path / "lora", peft.get_peft_model_state_dict(pipe.transformer))
    for name, flags in {"plain": (), "lora": ("--lora", "lora"), "other": ("--lora", "nowhere")}.items():
        ended, said = script("--output", f"{name}.png", "--no-magcache", *flags, *SMALL)
        assert (ended is None) == (name != "other")
    assert "nowhere cannot be loaded" in ended
    assert script("--output", "cached.png", "--lora", "lora", "--magcache_steps", "4", *SMALL)[0] is None
    lora, cached = read_picture("lora.png"), read_picture("cached.png")
    assert np.abs(lora - read_picture("plain.png")).mean() > 2 * np.abs(lora - cached).mean() > 0


def test_compiled_and_offloaded(tmp_path, script, monkeypatch):
    """By the compiler's tracing alone, which takes seconds; offloaded to the CPU from the CPU."""
    assert script("--output", "plain.png", *SMALL)[0] is None
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    ended, said = script("--output", "compiled.png", "--compile", *SMALL)
    assert ended is None and "computes 3 of 6" in said
    offloaded = {"accelerator": lambda: "cpu:0"}
    assert script("--output", "offloaded.png", "--offload", "model", *SMALL, instead=offloaded)[0] is None
    for name in ("compiled", "offloaded"):
        assert np.abs(read_picture("plain.png") - read_picture(f"{name}.png")).max() <= 1


def test_several_pictures_of_a_prompt_are_all_saved(tmp_path, script):
    for _ in range(2):  # the second time over the first
        ended, said = script("--num_images_per_prompt", "2", "--prompt", "a cat", "a dog", "--output", "x.png", *SMALL)
        assert ended is None
        names = {path.name for path in tmp_path.glob("*.png")}
        assert names == {"x_1_1.png", "x_1_2.png", "x_2_1.png", "x_2_2.png"} and "x_1_1.png, x_1_2.png" in said
    assert json.loads((tmp_path / "x_2_1.magcache.json").read_text())["files"] == ["x_2_1.png", "x_2_2.png"]


def test_a_sound(tmp_path, script):
    """DanceDiffusion takes no prompt; its rate is its own."""
    unet = random_model(
        "UNet1DModel", sample_size=512, sample_rate=16000, in_channels=2, out_channels=2, extra_in_channels=64,
        block_out_channels=(32, 32, 32), down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"), mid_block_type="UNetMidBlock1D",
        use_timestep_embedding=False, time_embedding_type="fourier",
    )  # fmt: skip
    diffusers.DanceDiffusionPipeline(unet, diffusers.IPNDMScheduler()).save_pretrained(tmp_path / "sounds")
    ended, said = script("--model", "sounds", "--num_inference_steps", "8", "--audio_length_in_s", "0.03")
    assert ended is None and "computes 4 of 8" in said and "reused" in said
    with wave.open("magcache_sounds.wav") as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (2, 16000, 480)


def test_a_video_with_sound(tmp_path, script):
    """LTX-2, whose prompt encoder is left out: the sound is in the video file."""
    pipe, arguments = ltx2()
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    call = arguments(1)
    pipe.encode_prompt = lambda *_, **__: tuple(call[name] for name in names)
    flags = ("--height", "32", "--width", "32", "--num_frames", "5", "--frame_rate", "8", "--fps", "8")
    more = ("--spatio_temporal_guidance_blocks", "[1]", "--num_inference_steps", "6", "--output", "x.mp4")
    ended, said = script("--prompt", "a sea", *flags, *more, instead={"load_model": lambda args: pipe})
    assert ended is None and "computes 3 of 6" in said
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    streams = subprocess.run([ffmpeg, "-i", "x.mp4"], capture_output=True, text=True).stderr
    assert "Video:" in streams and "Audio:" in streams and "16000 Hz" in streams
    assert {path.name for path in tmp_path.iterdir()} == {"x.mp4", "x.magcache.json"}


def a_model_without_ratios(args):
    """A tiny FLUX whose prompts are all alike."""
    pipe, arguments = flux()
    call = arguments(1)
    pipe.encode_prompt = lambda *_, **__: (call["prompt_embeds"], call["pooled_prompt_embeds"], torch.zeros(TEXT, 3))
    return pipe


TINY = ("--height", "16", "--width", "16", "--num_inference_steps", "8")
RULE = ("--magcache_thresh", "5", "--magcache_K", "1", "--retention_ratio", "0.2")
MEASURING = "MagCache measuring: this run computes every step; the next one is faster"


@pytest.mark.parametrize("wish", [RULE, ("--magcache_max_error", "0.15")], ids=["rule", "max_error"])
def test_the_first_of_several_prompts_is_measured(tmp_path, script, wish):
    tiny = {"instead": {"load_model": a_model_without_ratios}}
    assert script("--no-magcache", "--output", "plain.png", "--prompt", "a cat", *TINY, **tiny)[0] is None
    ended, said = script("--output", "x.png", "--prompt", "a cat", "a dog", *wish, *TINY, **tiny)
    assert ended is None and f"{MEASURING} (saved to " in said and "MagCache plan: 8 steps, ratios of Flux" in said
    assert said.index("Prompt 2 of 2: a dog") < said.index("MagCache plan") and "Run the same command" not in said
    first, second = (json.loads((tmp_path / f"x_{number}.magcache.json").read_text()) for number in (1, 2))
    assert first["measuring"].startswith("this run computes every step") and first["reused"] == 0 < second["reused"]
    assert np.array_equal(read_picture("x_1.png"), read_picture("plain.png"))
    ended, said = script("--output", "later.png", "--prompt", "a cat", *wish, *TINY, **tiny)
    assert ended is None and MEASURING not in said and "reused" in said
    assert np.array_equal(read_picture("later.png"), read_picture("x_2.png"))


def test_one_prompt_alone_is_measured_and_says_so(script):
    tiny = {"instead": {"load_model": a_model_without_ratios}}
    ended, said = script("--output", "x.png", "--prompt", "a cat", *RULE, *TINY, **tiny)
    assert ended is None and said.count(MEASURING) == 2  # at the start, and where it is saved
    assert "Run the same command again to use what was measured, or ask for --magcache_speedup" in said


def test_a_measured_run_is_what_the_next_is_compared_with(tmp_path, script):
    ended, said = script(
        "--output", "x.png", "--compare", "--prompt", "a cat", *RULE, *TINY,
        instead={"load_model": a_model_without_ratios},
    )  # fmt: skip
    assert ended is None and MEASURING in said and "4 of 8 model calls computed" in said
    assert "Run the same command" not in said
    report = json.loads((tmp_path / "x.magcache.json").read_text())
    assert report["reused"] == 4 and report["quality"]["un-cached"]["psnr"] is None
    assert report["quality"]["un-cached"]["steps"] == 8 and report["quality"]["MagCache"]["steps"] == 4


RANKS = """
import runpy, sys
script, tests, runs = sys.argv[1:]
sys.path[:0] = [tests, str(tests) + "/hosts"]
import torch
from tiny_pipelines import TEXT, flux
torch.accelerator.device_count = lambda: 1  # diffusers asks for the number of GPUs, and there is none

def load_model(args):
    pipe, arguments = flux()
    call = arguments(1)
    pipe.encode_prompt = lambda *_, **__: (call["prompt_embeds"], call["pooled_prompt_embeds"], torch.zeros(TEXT, 3))
    return pipe

for flags in runs.split(";"):
    sys.argv = [script, *flags.split()]
    main = runpy.run_path(script)["main"]
    main.__wrapped__.__globals__["load_model"] = load_model
    main()
"""


def test_torchrun_with_two_processes(tmp_path, script):
    """A prompt file of three, each rank its share; then one picture by both ranks."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na sun\n")
    (tmp_path / "ranks.py").write_text(RANKS)
    flags, small = "--prompt_file prompts.txt --output mine.png", "--height 16 --width 16 --num_inference_steps 6"
    runs = f"{flags} {small};--context_parallel --prompt cat --output shared.png {small}"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "ranks.py"]
    done = subprocess.run(
        [*torchrun, str(SCRIPT), str(REPOSITORY / "tests"), runs], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = {"mine_1.png", "mine_2.png", "mine_3.png", "shared.png"}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert done.stdout.count("computes 3 of 6") == 4, "three prompts, and one plan for the shared picture"
    assert np.abs(read_picture("shared.png") - read_picture("mine_1.png")).max() <= 1


@pytest.mark.parametrize(
    "start",
    [
        ("torchrun", "--standalone", "--nproc_per_node", "2"),
        ("accelerate", "launch", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
         "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
    ids=lambda start: start[0],
)  # fmt: skip
def test_two_processes_by_the_command_that_starts_them(start, tmp_path):
    """The script itself, each process with its share of a prompt file."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    command = [Path(sys.executable).with_name(start[0]), *start[1:], SCRIPT, "--prompt_file", "prompts.txt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MAGCACHE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*map(str, command), "--output", "mine.png", *SMALL],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in tmp_path.glob("*.png")} == {"mine_1.png", "mine_2.png"}
    assert done.stdout.count("computes 3 of 6") == 2


@pytest.mark.parametrize(
    "kind, facts",
    [
        ("image", "FluxTransformer2DModel\": Host(blocks=('transformer_blocks', 'single_transformer_blocks')"),
        ("video", "WanTransformer3DModel\": Host(blocks=('blocks',)"),
    ],
)
def test_describe_prints_the_facts_of_a_model(capsys, monkeypatch, kind, facts):
    """In one small call: a video of the pipeline's own size would take minutes."""
    sizes = []
    own = discover.first_call
    monkeypatch.setattr(discover, "first_call", lambda pipe, **call: sizes.append(call) or own(pipe, **call))
    command(["describe", str(REPOSITORY / "demo" / kind / "model")])
    said = capsys.readouterr().out
    assert f'"diffusers.{facts}' in said and "proved on this model, try 1" in said
    assert sizes[0]["width"] == 256 and sizes[0].get("num_frames") == {"image": None, "video": 9}[kind]
