"""The drop-in in a checkout of HunyuanVideo-1.5, with its own generate.py, pipeline and transformer, on a CPU with tiny
random weights:

    MAGCACHE_HUNYUANVIDEO_15=/path/to/HunyuanVideo-1.5 python -m pytest tests/hosts/test_hunyuan15.py

Structure, not quality. Encoders, VAE, super-resolution and the attention kernel are replaced (hunyuan15_cpu.py). Needs
einops, imageio, diffusers and transformers of the checkout's requirements."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from readme_commands import of_script, readme
from wan_runs import WanRuns

from common.scripts.install import install
from common.tables import load, read

CHECKOUT = os.environ.get("MAGCACHE_HUNYUANVIDEO_15")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MAGCACHE_HUNYUANVIDEO_15 names no checkout of HunyuanVideo-1.5")
VERSIONS = "480p_t2v", "480p_i2v", "720p_t2v", "480p_t2v_distilled", "480p_i2v_step_distilled"
# Latents of 2 frames of 7x13: gloo gathers equal shares only.
SMALL = (
    "--resolution 480p --video_length 5 --num_inference_steps 20 --seed 5 --dtype fp32 --offloading false --sr false"
).split()
BLOCKS = "MMDoubleStreamBlock"


class HunyuanRuns(WanRuns):
    """A copy of the checkout's code with the drop-in, tiny weights, and a server that runs scripts there."""

    def __init__(self, folder):
        (folder / "hyvideo").symlink_to(Path(CHECKOUT) / "hyvideo")
        shutil.copy(Path(CHECKOUT) / "generate.py", folder)
        self.command = install("MagCache4HunyuanVideo-1.5", folder)
        self.start(folder, "hunyuan15_cpu.py")
        written = self.run("--checkpoint", folder / "ckpts", *VERSIONS, cwd=folder)
        assert written.code == 0, written.output

    def generate(self, *flags, cwd, count=1, script="magcache_generate.py", fails=False):
        """list of Finished, one a rank; flags come after SMALL and win over it."""
        (cwd / "ckpts").exists() or (cwd / "ckpts").symlink_to(self.folder / "ckpts")
        flags = "--prompt", "a cat", *SMALL, "--model_path", "./ckpts", "--output_path", "out/cat.mp4", *flags
        done = self.ranks(self.folder / script, *flags, cwd=cwd, count=count)
        assert all((one.code != 0) is fails for one in done), done[0].output
        return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = HunyuanRuns(tmp_path_factory.mktemp("hunyuan15"))
    yield started
    started.close()


@pytest.fixture
def generate15(runs, tmp_path):
    Image.radial_gradient("L").convert("RGB").resize((96, 64)).save(tmp_path / "cat.png")

    def run(*flags, **options):
        return runs.generate(*flags, cwd=tmp_path, **options)

    return run


def report(folder, name="cat"):
    return json.loads((folder / "out" / f"{name}.magcache.json").read_text())


def apart(one, other):
    return float((one.latents[0] - other.latents[0]).abs().mean())


def test_hunyuan15_reuses_what_an_independent_recomputation_gives(runs, tmp_path):
    (done,) = runs.ranks(Path(__file__).with_name("hunyuan_subjects.py"), "1.5", cwd=tmp_path, count=1)
    assert done.code == 0 and done.output.splitlines()[-1] == "passed", done.output


@pytest.mark.parametrize("flags", [(), ("--image_path", "cat.png")], ids=["t2v", "i2v"])
def test_off_renders_what_generate_renders(generate15, tmp_path, flags):
    (plain,) = generate15(*flags, script="generate.py")
    for off in (("--no-magcache",), ("--magcache_thresh", 0, "--mag_ratios", "hunyuanvideo-1.5-t2v-40steps")):
        (done,) = generate15(*flags, *off)
        assert torch.equal(done.latents[0], plain.latents[0])
    assert report(tmp_path)["reused"] == 0 and report(tmp_path)["version"].endswith(("t2v", "i2v")[bool(flags)])


@pytest.mark.parametrize("steps, preset", [(20, "hunyuanvideo-1.5-t2v-20steps"), (50, "hunyuanvideo-1.5-t2v-40steps")])
def test_the_published_table_of_the_nearest_step_count(generate15, tmp_path, steps, preset):
    (done,) = generate15("--num_inference_steps", steps)
    one = report(tmp_path)
    assert one["mag_ratios_of"] == preset and one["calls"] == steps and not one["unplanned"] and one["complete"]
    assert 0 < one["reused"] and done.entered[BLOCKS] == 3 * one["computed"]
    assert f"  {one['strip']}   # computes" in done.output
    assert one["settings"]["magcache_thresh"] == load(preset).settings["magcache_thresh"]
    assert one["size"] == "848x480" and (tmp_path / "out" / "cat_config.json").is_file()


def test_super_resolution_comparison_and_the_video_before_it(generate15, tmp_path):
    (done,) = generate15("--sr", "true", "--save_pre_sr_video", "--compare", "--num_inference_steps", 10)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("cat.mp4", "cat.magcache.json", "cat_compare.mp4", "cat_before_sr.mp4", "cat_config.json")
    }
    assert list(report(tmp_path)["quality"])[0] == "un-cached, 10 steps" and "MS-SSIM" in done.output


def test_offloading_changes_nothing(generate15, tmp_path):
    (plain,) = generate15()
    flags = "--offloading true --group_offloading true --overlap_group_offloading false".split()
    (offloaded,) = generate15(*flags)
    assert torch.equal(plain.latents[0], offloaded.latents[0])
    assert plain.entered[BLOCKS] == offloaded.entered[BLOCKS] == 3 * report(tmp_path)["computed"]


def test_two_ranks_render_what_one_renders(generate15, tmp_path):
    one, other = (generate15(count=count)[0] for count in (1, 2))
    assert not report(tmp_path)["unplanned"]
    (plain,) = generate15("--no-magcache")
    assert apart(one, plain) > 0 and apart(one, other) < apart(one, plain) / 20


def test_a_calibration_is_found_by_its_checkpoint_and_version(generate15, tmp_path):
    """One for image-to-video, for which nothing is published, on one rank and on two."""
    i2v = "--image_path", "cat.png"
    (refused,) = generate15(*i2v, fails=True)
    assert "No magnitude ratios are known for hunyuanvideo-1.5-480p_i2v" in refused.output
    (plain,) = generate15(*i2v, script="generate.py")
    (measured,) = generate15(*i2v, "--magcache_calibration")
    assert torch.equal(measured.latents[0], plain.latents[0])
    (path,) = (tmp_path / "home").glob("hunyuanvideo-1.5-480p_i2v-*.json")
    generate15(*i2v, "--magcache_calibration", "two.json", count=2)
    table = read(path)
    assert table.mag_ratios["cond"] == pytest.approx(read(tmp_path / "two.json").mag_ratios["cond"], abs=1e-3)
    generate15(*i2v, "--magcache_steps", 8, "--magcache_predictor", "linear")
    assert report(tmp_path)["computed"] == 8 and report(tmp_path)["mag_ratios_of"] == table.name
    (refused,) = generate15("--cfg_distilled", fails=True)
    assert "for hunyuanvideo-1.5-480p_t2v_distilled" in refused.output


def test_the_step_distilled_model_runs_as_it_is_until_asked(generate15, tmp_path):
    flags = "--image_path", "cat.png", "--enable_step_distill", "--num_inference_steps", 12
    (done,) = generate15(*flags)
    assert "MagCache is off: the step-distilled model" in done.output and done.entered[BLOCKS] == 36
    assert not (tmp_path / "out" / "cat.magcache.json").exists()
    generate15(*flags, "--magcache_calibration")
    (done,) = generate15(*flags, "--magcache_steps", 9, "--magcache_predictor", "linear")
    assert done.entered[BLOCKS] == 27


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--enable_cache", "--cache_type", "teacache"), "--enable_cache (teacache) and MagCache both skip blocks"),
        (("--compare", "--rewrite"), "add --rewrite false"),
        (("--image_path", "dog.png"), "--image_path dog.png cannot be read as an image"),
        (("--aspect_ratio", "wide"), "--aspect_ratio wide is not like 16:9"),
        (("--output_path", "cat.txt"), "no ending that can be written"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_loaded(generate15, flags, words):
    (done,) = generate15(*flags, fails=True)
    assert words in done.output and "Traceback" not in done.output and "HunyuanVideo Generation Task" not in done.output


def test_the_commands_of_hunyuan15s_readme(runs, generate15, tmp_path):
    """In their order, word for word but for the picture and two processes for eight; shorter, in float32, and without
    the streams of a GPU."""
    found = of_script(readme("MagCache4HunyuanVideo-1.5"), "magcache_generate.py")
    assert len(found) == 5
    assert shlex.split(runs.command)[2:] == list(found[0][1])
    less = "--video_length 5 --num_inference_steps 20 --dtype fp32 --overlap_group_offloading false".split()
    (tmp_path / "ckpts").symlink_to(runs.folder / "ckpts")
    for torchrun, argv in found:
        argv = ["cat.png" if word == "/path/to/image.png" else word for word in argv]
        (done, *_) = runs.ranks(
            runs.folder / "magcache_generate.py", *argv, *less, cwd=tmp_path, count=2 if torchrun else 1
        )
        assert done.code == 0, done.output
    written = json.loads((tmp_path / "outputs" / "cat.magcache.json").read_text())
    assert written["reused"] > 0 and len(list((tmp_path / "home").iterdir())) == 1
