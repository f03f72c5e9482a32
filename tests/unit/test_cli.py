"""`python -m common`: presets, plan, compare, install; and the figures of `common.quality`."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from common.__main__ import main
from common.errors import MagCacheError
from common.scripts.install import MANIFEST, folders, install
from common.scripts.quality import contact_sheet, magnified_difference, quality, read_frames, save_frames, side_by_side
from common.tables import preset_names

REPOSITORY = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("home")


def say(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def cli_complaint(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    text = str(end.value)
    assert text.startswith("magcache: ") and "\n" not in text and text.endswith(".")
    return text


def noise_picture(seed=0, size=(64, 48), frames=1):
    return np.random.default_rng(seed).integers(0, 256, (frames, size[1], size[0], 3), dtype=np.uint8)


def test_plan_of_flux_dev(capsys, tmp_path):
    text = say(capsys, "plan", "flux-dev", "--steps", 28, "--plot", tmp_path / "plan.png")
    assert "computes 9 of 28: at most 3.11x faster" in text and "###..#...#.#.....#.....#..#." in text
    assert Image.open(tmp_path / "plan.png").size[0] > 600
    assert "nothing will be reused: a run of 4 steps has nothing to gain" in say(
        capsys, "plan", "flux-dev", "--steps", 4
    )
    assert "nothing will be reused: magcache_K is 0" in say(capsys, "plan", "flux-dev", "--magcache_K", 0)
    assert "converted to the noise levels" in say(capsys, "plan", "flux-dev", "--steps", 50, "--shift", 2)
    assert "these are the numbers of wan2.1-t2v-14b" in say(capsys, "plan", "wan2.1-vace-14b")


def test_plan_for_a_number_of_steps_or_a_speedup(capsys, tmp_path):
    text = say(capsys, "plan", "demo", "--steps", 20, "--magcache_steps", 8, "--plot", tmp_path / "plan.png")
    assert (
        "magcache_steps 8, predictor line, " in text
        and "computes 8 of 20" in text
        and (tmp_path / "plan.png").is_file()
    )
    assert "computes 11 of 28" in say(
        capsys, "plan", "demo", "--magcache_speedup", 2.5, "--magcache_predictor", "reuse"
    )
    assert "payload output" in say(capsys, "plan", "demo", "--magcache_max_error", 0.03, "--magcache_payload", "output")
    text = say(capsys, "plan", "flux-dev", "--magcache_speedup", 2)
    assert "computes 14 of 28" in text and "predictor line" in text
    assert "need the Gram matrix" in cli_complaint(
        "plan", "flux-dev", "--magcache_speedup", 2, "--magcache_predictor", "linear"
    )
    assert "are for planned runs" in cli_complaint("plan", "demo", "--magcache_predictor", "linear")


def test_plan_and_presets_need_no_torch(tmp_path):
    """The planner is for everybody, also where the model's packages are not installed."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch must not be imported here')")
    done = subprocess.run(
        [sys.executable, "-m", "common", "plan", "flux-dev"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
    )
    assert "9 of 28" in done.stdout, done.stderr


def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m common presets | head -1", shell=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.startswith("name") and done.stderr == ""


def test_presets_lists_every_table_with_its_bound(capsys):
    text = say(capsys, "presets")
    assert all(name in text for name in preset_names())
    row = next(line for line in text.splitlines() if line.startswith("flux-dev "))
    assert row.split() == ["flux-dev", "published", "28", "1", "0.24", "5", "0.1", "9/28", "3.11x"]
    assert "borrowed" in next(line for line in text.splitlines() if line.startswith("wan2.1-vace-14b"))


@pytest.mark.parametrize(
    "arguments, part",
    [
        (("plan", "nope"), "There is no preset 'nope'"),
        (("plan", "nope.json"), "There is no calibration file nope.json"),
        (("plan", "flux-dev", "--steps", 0), "must be at least 1"),
        (("plan", "flux-dev", "--shift", 0), "larger than 0"),
        (("plan", "flux-dev", "--shift", "inf"), "larger than 0"),
        (("plan", "demo", "--magcache_steps", 3, "--magcache_speedup", 2), "Ask for only one of"),
        (("plan", "demo", "--magcache_steps", 3, "--magcache_K", -1), "magcache_K must be 0"),
        (("plan", "demo", "--magcache_speedup", "inf"), "must be a number of 1 or more"),
        (("plan", "flux-dev", "--plot", "folder"), "is no image format"),
        (("plan", "flux-dev", "--magcache_thresh", -1), "must be 0 (off) or more"),
        (("plan", "flux-dev", "--plot", "no/folder/x.png"), "cannot be written"),
        (("compare", "a.png", "b.png"), "There is no file a.png"),
        (("describe", "/no/where"), "/no/where cannot be loaded: there is no such folder"),
        (("describe", "./no where"), "there is no such folder"),
        (("install", "MagCache4FLUX", "nowhere"), "There is no folder nowhere"),
        (("install", "MagCache4Nothing", "."), "the folders are"),
    ],
)
def test_a_mistake_gets_one_sentence(arguments, part):
    assert part in cli_complaint(*arguments)


def tensor(frames):
    return torch.from_numpy(frames).permute(0, 3, 1, 2) / 255


def test_quality_against_the_definition():
    reference, result = noise_picture(0), noise_picture(1)
    mean_square = np.mean((reference / 255.0 - result / 255.0) ** 2)
    assert quality(reference, result)["psnr"] == pytest.approx(-10 * np.log10(mean_square), abs=1e-3)
    assert quality(reference, reference) == {"psnr": np.inf, "ssim": pytest.approx(1), "ms_ssim": None}
    theirs = structural_similarity_index_measure(*(tensor(one).double() for one in (result, reference)), data_range=1.0)
    assert quality(reference, result)["ssim"] == pytest.approx(float(theirs), abs=1e-5)
    plain = np.full((2, 48, 64, 3), 250, np.uint8)
    plain[0, 10:20, 10:20], plain[1, 30:35, 20:50] = noise_picture(0)[0, :10, :10], (200, 30, 40)
    assert quality(plain, plain)["ssim"] == pytest.approx(1, abs=1e-6)  # rounding is near also where nothing varies
    large = noise_picture(0, (176, 176))
    assert quality(large, large)["ms_ssim"] == pytest.approx(1)
    assert quality(large, noise_picture(1, (176, 176)))["ms_ssim"] < 0.5
    with pytest.raises(MagCacheError, match="1 frame of 64x48 and 1 frame of 176x176"):
        quality(reference, large)


def test_compare_pictures(capsys, tmp_path):
    save_frames(tmp_path / "a.png", noise_picture(0))
    save_frames(tmp_path / "b.png", noise_picture(0) // 2)
    text = say(capsys, "compare", "a.png", "b.png")
    assert "PSNR" in text and "SSIM" in text and "MS-SSIM" not in text
    joined = np.asarray(Image.open("compare_b.png"))
    assert joined.shape == (48, 2 * 68, 3) and np.array_equal(joined[:, :64], noise_picture(0)[0])
    (tmp_path / "broken.png").write_text("no picture")
    assert "cannot be read as an image or video" in cli_complaint("compare", "a.png", "broken.png")


def test_compare_videos(capsys, tmp_path):
    # Smooth frames: noise would not survive the codec.
    ramp = np.linspace(0, 255, 64, dtype=np.uint8)
    frames = np.stack([np.broadcast_to(np.roll(ramp, 4 * index)[None, :, None], (48, 64, 3)) for index in range(6)])
    save_frames(tmp_path / "a.mp4", frames, fps=8)
    save_frames(tmp_path / "b.mp4", frames[:, ::-1, ::-1], fps=8)
    again, fps = read_frames(tmp_path / "a.mp4")
    assert again.shape == frames.shape and fps == 8 and quality(frames, again)["psnr"] > 30
    text = say(capsys, "compare", "a.mp4", "b.mp4", "--out", "side.mp4")
    assert "PSNR" in text
    assert read_frames("side.mp4")[0].shape == (6, 48, 136, 3)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_compare_reads_every_frame_of_an_animated_picture(capsys, ending):
    """Not the first alone, which the two have in common."""
    frames = [Image.fromarray(noise_picture(seed)[0]) for seed in range(4)]
    for name, others in (("a", frames[1:]), ("b", frames[:0:-1])):
        frames[0].save(f"{name}.{ending}", save_all=True, append_images=others, duration=125, lossless=True)
    read, fps = read_frames(f"a.{ending}")
    assert read.shape == (4, 48, 64, 3) and round(fps) == 8
    text = say(capsys, "compare", f"a.{ending}", f"b.{ending}")
    assert "PSNR inf" not in text and "compare_b.mp4" in text
    frames[0].save(f"one.{ending}")
    assert read_frames(f"one.{ending}")[1] is None


def test_frames_that_are_equal_do_not_make_a_video_equal():
    one, other = np.concatenate([noise_picture(0), noise_picture(1)]), np.concatenate([noise_picture(0)] * 2)
    assert quality(one, other)["psnr"] == pytest.approx(quality(one[1:], other[1:])["psnr"])


def test_grey_of_16_bits_is_not_cut_off():
    deep = (noise_picture(0)[0, :, :, 0].astype(np.uint16)) * 257
    Image.fromarray(deep).save("deep.png")
    assert np.array_equal(read_frames("deep.png")[0], np.repeat(noise_picture(0)[..., :1], 3, axis=3))


def test_compare_leaves_what_it_compares(tmp_path):
    save_frames(tmp_path / "a.png", noise_picture(0))
    save_frames(tmp_path / "tiny.png", noise_picture(0)[:, :5])
    assert "one of the two" in cli_complaint("compare", "a.png", "a.png", "--out", tmp_path / "a.png")
    assert "SSIM needs 6 pixels" in cli_complaint("compare", "tiny.png", "tiny.png")
    assert ". cannot be written" in cli_complaint("compare", "a.png", "a.png", "--out", ".")


def test_compare_leaves_a_file_of_its_default_name(capsys):
    """Which may be one of the two."""
    for seed, name in enumerate(("compare_b.png", "b.png")):
        save_frames(name, noise_picture(seed))
    before = Path("compare_b.png").read_bytes()
    assert "compare_b_2.png" in say(capsys, "compare", "compare_b.png", "b.png")
    assert Path("compare_b.png").read_bytes() == before and Path("compare_b_2.png").is_file()


@pytest.mark.parametrize("ending", ["mp4", "webm", "mkv", "mov", "gif", "webp"])
def test_videos_of_every_kind(tmp_path, ending):
    frames = np.repeat(np.stack([np.full((48, 64, 3), 40 * index, np.uint8) for index in range(5)]), 2, axis=0)
    frames[:, :4, 0] = np.arange(10)[:, None, None] * 20  # else Pillow joins equal frames
    save_frames(tmp_path / f"a.{ending}", frames, fps=8)
    again, fps = read_frames(tmp_path / f"a.{ending}")
    assert again.shape == frames.shape and round(fps) == 8 and quality(frames, again)["psnr"] > 30


def test_a_video_that_ffmpeg_could_not_finish_leaves_the_old_one(tmp_path, monkeypatch):
    """As on a full disk: ffmpeg fails behind imageio, which says nothing."""
    frames = np.repeat(noise_picture(0), 6, axis=0)
    save_frames(tmp_path / "a.mp4", frames, fps=8)
    before, write = (tmp_path / "a.mp4").read_bytes(), imageio.imwrite

    def cut(path, *args, **kwargs):
        write(path, *args, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)

    monkeypatch.setattr(imageio, "imwrite", cut)
    with pytest.raises(MagCacheError, match="0 of 6 frames; is the disk full"):
        save_frames(tmp_path / "a.mp4", frames, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == before and not list(tmp_path.glob(".*part*"))


def test_side_by_side_of_different_lengths_and_sizes(tmp_path):
    side_by_side(tmp_path / "x.png", [noise_picture(0), noise_picture(1, (32, 40), 3)])
    assert Image.open(tmp_path / "x.png").size == (64 + 4 + 32 + 4, 48)


def test_magnified_difference():
    one, other = noise_picture(0)[0], noise_picture(0)[0].copy()
    other[3, 5] = one[3, 5] ^ 1  # each channel off by one
    difference = magnified_difference(one, other)
    assert (difference[3, 5] == 245).all() and (np.delete(difference.reshape(-1, 3), 3 * 64 + 5, axis=0) == 255).all()
    assert (magnified_difference(np.zeros_like(one), np.full_like(one, 200)) == 0).all()


def test_contact_sheet(tmp_path):
    contact_sheet(tmp_path / "sheet.png", [[noise_picture(0)[0], noise_picture(1)[0]]], ["a", "b"], [["one", "two"]])
    assert Image.open(tmp_path / "sheet.png").size[0] > 400


def test_a_failing_write_leaves_the_old_picture(tmp_path, monkeypatch):
    save_frames(tmp_path / "a.png", noise_picture(0))
    before = (tmp_path / "a.png").read_bytes()

    def half(self, path):
        Path(path).write_bytes(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(MagCacheError, match="the disk is full"):
        save_frames(tmp_path / "a.png", noise_picture(1))
    assert (tmp_path / "a.png").read_bytes() == before and sorted(tmp_path.glob("*.png")) == [tmp_path / "a.png"]
    assert not list(tmp_path.glob(".*part*"))


def test_install_copies_and_never_overwrites_what_it_did_not_write(tmp_path):
    target = tmp_path / "checkout"
    target.mkdir()
    (target / "magcache_flux.py").write_text("mine")
    with pytest.raises(MagCacheError, match="magcache_flux.py is in the way"):
        install("MagCache4FLUX", target)
    assert (target / "magcache_flux.py").read_text() == "mine" and not (target / "common").exists()

    (target / "magcache_flux.py").unlink()
    assert install("MagCache4FLUX", target).startswith("python magcache_flux.py")
    assert (target / "common" / "presets" / "flux-dev.json").is_file() and (target / MANIFEST).is_file()
    install("MagCache4FLUX", target)  # again: its own files are renewed
    (target / "common" / "patch.py").write_text("edited")
    with pytest.raises(MagCacheError, match="was edited since"):
        install("MagCache4FLUX", target)
    assert (target / "common" / "patch.py").read_text() == "edited"


def test_install_into_a_broken_place(tmp_path):
    (tmp_path / "common").write_text("a file")
    with pytest.raises(MagCacheError, match="cannot be written"):
        install("MagCache4FLUX", tmp_path)
    (tmp_path / MANIFEST).write_text("no json")
    with pytest.raises(MagCacheError, match="cannot be read; remove it"):
        install("MagCache4FLUX", tmp_path)


def test_what_was_imported_is_found_under_its_name_whatever_it_ends_in(capsys, tmp_path):
    (tmp_path / "theirs.json").write_text("[1.0, 0.9, 0.8, 0.9, 0.9, 0.9]")
    assert "--mag_ratios mine." in say(capsys, "import", "theirs.json", "--steps", 6, "--shift", 3, "--out", "mine")
    settings = ("--magcache_thresh", 0.1, "--magcache_K", 2, "--retention_ratio", 0.2)
    assert "6 steps, ratios of theirs" in say(capsys, "plan", "mine", *settings)


def test_a_broken_calibration_does_not_hide_the_others(capsys, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "x.json").write_text("{}")
    text = say(capsys, "presets")
    assert "x.json is not a calibration file" in text and "flux-dev" in text


def test_install_refuses_the_wrong_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr("common.scripts.install.REPOSITORY", tmp_path)
    (tmp_path / "MagCache4Other").mkdir()
    (tmp_path / "MagCache4Other" / "install.json").write_text(
        '{"upstream": "Other", "recognised_by": ["generate.py"], "files": [], "run": "python x.py"}'
    )
    with pytest.raises(MagCacheError, match="is not a checkout of Other: it has no generate.py"):
        install("MagCache4Other", tmp_path)


def test_install_prints_what_to_run_in_the_version_that_it_recognised(tmp_path):
    for version, config in {
        "2": "diffusion/inference/256px.py",
        "1.3": "opensora-v1-3",
        "1.2": "opensora-v1-2",
    }.items():
        checkout = tmp_path / version
        for name in ("opensora/registry.py", "scripts/inference.py", f"configs/{config}"):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            (checkout / name).touch()
        assert f"magcache_inference.py configs/{config}" in install("MagCache4Open-Sora", checkout)
    (tmp_path / "other").mkdir()
    with pytest.raises(MagCacheError, match="is not a checkout of hpcaitech/Open-Sora: it has no opensora/registry.py"):
        install("MagCache4Open-Sora", tmp_path / "other")


def test_install_names_the_oldest_torch_that_the_package_allows(tmp_path, capsys):
    main(["install", "MagCache4FLUX", str(tmp_path)])
    oldest = re.search(r'"torch>=([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())[1]
    assert f"(torch {oldest} or newer)" in capsys.readouterr().out


def test_a_script_without_common_says_what_it_lacks(tmp_path):
    scripts = {path.parent for path in REPOSITORY.glob("MagCache4*/install.json")}
    for folder in sorted(scripts):
        shutil.copytree(folder, tmp_path / "scripts" / folder.name)
        for script in (tmp_path / "scripts" / folder.name).glob("magcache_*.py"):
            if "HERE.parent" in script.read_text():  # the others import one of these, or are imported
                done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
                assert done.returncode == 1 and done.stderr.startswith(f"{script.name} needs the folder common"), done


def test_every_dropin_folder_is_complete():
    assert set(folders()) >= {"MagCache4FLUX", "MagCache4FLUX_schnell"}
    for folder in folders():
        assert (REPOSITORY / folder / "README.md").is_file()
