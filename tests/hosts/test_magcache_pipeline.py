"""MagCache4Diffusers/magcache_pipeline.py and `describe`, run as a user runs them on the demo model."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.__main__ import main as command

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "MagCache4Diffusers" / "magcache_pipeline.py"
SMALL = ("--height", "32", "--width", "32", "--num_inference_steps", "6")


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """The script, run in an empty folder: (what it ended with, what it printed)."""
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))

    def run(*arguments, **environment):
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
    ended, said = script("--magcache_steps", "4", "--compare", "--guidance_scale", "2.5", *SMALL)
    assert ended is None
    assert "computes 4 of 6" in said and "fewer steps" in said and "reused" in said
    report = json.loads((tmp_path / "magcache_demo.magcache.json").read_text())
    assert report["files"] == ["magcache_demo.png", "magcache_demo_compare.png"]
    assert all((tmp_path / name).stat().st_size for name in report["files"])
    assert report["strip"].count("#") == 4 and report["call"]["guidance_scale"] == 2.5
    assert report["quality"]["un-cached"]["psnr"] is None  # of equal pictures
    assert report["quality"]["MagCache"]["psnr"] > report["quality"]["fewer steps"]["psnr"]


def test_the_comparison_of_a_video_moves_and_is_written_over_only_by_itself(tmp_path, script):
    """The README's first command with fewer steps, twice; a file of somebody else stays."""
    (tmp_path / "magcache_demo-video_compare.mp4").write_text("not ours")
    for _ in range(2):
        ended, said = script(
            "--model", "demo-video", "--compare", "--magcache_steps", "4", "--num_inference_steps", "6"
        )
        assert ended is None and "Prompt 1 of 1: a red balloon rises" in said
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
    # The balloon, of which only red is bright, has risen.
    heights = [np.argwhere(frame[:, :192, 1] < 128)[:, 0].mean() for frame in (first, last)]
    assert heights[1] < heights[0] - 20


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
        (("--num_inference_step", "4"), "FluxPipeline has no keyword num_inference_step; num_inference_steps is"),
        (("--no-magcache", "--compare"), "--compare sets MagCache against the un-cached model"),
        (("--magcache_speedup", "2", "--magcache_steps", "3", *SMALL), "only one of magcache_steps"),
        (("--magcache_speedup", "2", "--magcache_thresh", "0.1", *SMALL), "or for the paper's rule"),
        (("--model", "nowhere/nothing"), "nowhere/nothing cannot be loaded"),
        (("--offload", "model"), "there is none here"),
        (("--prompt_file", "missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, script, arguments, sentence):
    ended, _ = script(*arguments)
    assert ended.startswith("magcache_pipeline.py: ") and sentence in ended and "\n" not in ended
    assert not list(tmp_path.glob("*.png"))


def test_describe_prints_the_facts_of_a_model(capsys):
    command(["describe", str(REPOSITORY / "demo" / "image" / "model")])
    said = capsys.readouterr().out
    facts = "\"diffusers.FluxTransformer2DModel\": Host(blocks=('transformer_blocks', 'single_transformer_blocks')"
    assert facts in said and "proved on this model, try 1" in said
