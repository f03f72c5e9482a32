"""magcache_sample_video.py, on a checkout of a few lines."""

import argparse
import re
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hunyuan_helpers import (
    REPOSITORY,
    STRIPS,
    Flow,
    HunyuanSubject,
    parallelize,
    reports,
    shaped,
    videos,
)

from common.errors import MagCacheError
from common.scripts.quality import read_frames
from common.tables import read

SCRIPT = runpy.run_path(str(REPOSITORY / "MagCache4HunyuanVideo" / "magcache_sample_video.py"))


def host_flags():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="HYVideo-T/2-cfgdistill")
    parser.add_argument("--video-size", type=int, nargs="+", default=(720, 1280))
    numbers = {
        "video-length": 129,
        "infer-steps": 50,
        "num-videos": 1,
        "ulysses-degree": 1,
        "ring-degree": 1,
        "flow-shift": 7.0,
        "cfg-scale": 1.0,
        "embedded-cfg-scale": 6.0,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    for name in ("flow-reverse", "use-fp8", "use-cpu-offload"):
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--seed", type=int)
    for name, default in (("prompt", None), ("save-path", "./results"), ("save-path-suffix", "")):
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args()


class PixelSampler:
    """Renders 16x24 pixels and five frames; what surrounds the transformer is as in the checkout."""

    def __init__(self, args):
        self.args = args
        self.pipeline = self.load_diffusion_pipeline(args=args, model=shaped().model)
        parallelize(self.pipeline.transformer)

    def load_diffusion_pipeline(self, args, model):
        return types.SimpleNamespace(transformer=model, scheduler=None)

    def predict(self, prompt, seed, infer_steps, num_videos, cfg_scale):
        self.pipeline.scheduler = sampler = Flow(HunyuanSubject(self.pipeline.transformer))
        latents = sampler.run(steps=infer_steps, seed=seed, videos=num_videos, size=(5, 16, 24), cfg=cfg_scale > 1)
        brightness = torch.linspace(0.3, 0.7, num_videos)[:, None, None, None, None]
        return {
            "samples": (latents[:, :3] / 12 + brightness).clamp(0, 1),
            "prompts": [prompt],
            "seeds": [seed + index for index in range(num_videos)],
        }


def save_videos_grid(videos, path, rescale=False, n_rows=1, fps=24):
    import imageio

    frames = (videos[0].permute(1, 2, 3, 0) * 255).byte().numpy()
    imageio.mimsave(path, list(frames), fps=fps, macro_block_size=2)


@pytest.fixture
def sample_video(monkeypatch, tmp_path):
    """Runs magcache_sample_video.py with flags; returns what was printed."""
    sample_video = types.ModuleType("sample_video")

    def main():
        args = sample_video.parse_args()
        sampler = sample_video.HunyuanVideoSampler(args)
        outputs = sampler.predict(
            prompt=args.prompt,
            seed=args.seed,
            infer_steps=args.infer_steps,
            num_videos=args.num_videos,
            cfg_scale=args.cfg_scale,
        )
        folder = args.save_path if args.save_path_suffix == "" else f"{args.save_path}_{args.save_path_suffix}"
        Path(folder).mkdir(exist_ok=True)
        for index, sample in enumerate(outputs["samples"]):
            name = f"{folder}/seed{outputs['seeds'][index]}_{outputs['prompts'][index][:100]}.mp4"
            sample_video.save_videos_grid(sample.unsqueeze(0), name, fps=24)

    sample_video.main = main
    monkeypatch.setitem(sys.modules, "sample_video", sample_video)
    monkeypatch.setenv("MAGCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        sample_video.parse_args = host_flags
        sample_video.HunyuanVideoSampler, sample_video.save_videos_grid = PixelSampler, save_videos_grid
        monkeypatch.setattr(
            sys, "argv", ["magcache_sample_video.py", "--prompt", "A cat", "--seed", "3", *map(str, flags)]
        )
        SCRIPT["main"]()

    return run


@pytest.mark.parametrize(
    "size, table",
    [
        ((544, 960), "544p"),
        ((720, 1280), "720p"),
        ((1280, 720), "720p"),
        ((960, 544), "544p"),
        ((624, 832), "544p"),
        ((1104, 832), "720p"),
        ((720, 720), "544p"),
        ((960, 960), "720p"),
        ((544,), "544p"),
    ],
    ids=str,
)
def test_the_table_of_the_nearest_size(sample_video, capsys, size, table):
    sample_video("--flow-reverse", "--video-size", *size)
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert f"ratios of hunyuanvideo-t2v-{table} (published)" in said and f"  {STRIPS[table]}   # computes" in said
    height, width = size if len(size) == 2 else size * 2
    exact = (width, height) in ((960, 544), (1280, 720))
    assert ("These ratios were measured at" in said) is not exact
    assert exact or f"this run is {width}x{height}, 129 frames" in said
    assert reports()[0]["strip"] == STRIPS[table] and reports()[0]["mag_ratios_of"] == f"hunyuanvideo-t2v-{table}"


def test_off_saves_what_the_host_saves(sample_video):
    flags = "--flow-reverse", "--num-videos", 2, "--infer-steps", 12, "--save-path"
    sample_video(*flags, "cached")
    sample_video(*flags, "plain", "--no-magcache")
    assert list(videos("plain")) == list(videos("cached")) == ["seed3_A cat.mp4", "seed4_A cat.mp4"]
    assert not any(map(np.array_equal, videos("cached").values(), videos("plain").values()))
    for off in ("--magcache_thresh", "--magcache_K"):
        sample_video(*flags, "off", off, 0)
        assert all(map(np.array_equal, videos("off").values(), videos("plain").values()))


def test_several_videos_with_comparison(sample_video, capsys):
    sample_video("--flow-reverse", "--num-videos", 2, "--compare", "--infer-steps", 12, "--cfg-scale", 3)
    assert len(videos()) == 2 and len(reports()) == 2
    columns = {}
    for name in videos():
        sheet, _ = read_frames(Path("results") / name.replace(".mp4", "_compare.mp4"))
        assert sheet.shape == (5, 16, 84, 3)
        columns[name] = sheet[:, :, 28:52].astype(int)  # the second of three, 24 pixels wide with 4 between
    (one, its_column), (other, _) = columns.items()
    assert np.abs(its_column - videos()[one]).mean() < np.abs(its_column - videos()[other]).mean() / 2
    assert np.abs(columns[other] - videos()[other]).mean() < np.abs(columns[other] - videos()[one]).mean() / 2
    figures = reports()[0]["quality"]
    computed = reports()[0]["computed"]
    assert reports()[0]["calls"] == 12 and list(figures) == [
        "un-cached, 12 steps",
        f"MagCache, {computed} of 12",
        f"plain sampler, {computed} steps",
    ]
    assert all(figures[name]["psnr"] > 10 for name in list(figures)[1:])
    assert not list(Path("results").glob(".*"))


def test_a_long_prompt_does_not_lose_the_video(sample_video, monkeypatch):
    sample_video("--flow-reverse", "--infer-steps", 8, "--prompt", "雨" * 100, "--magcache_plot")
    (name,) = videos()
    assert name.startswith("seed3_雨雨") and len(name.encode()) <= 255
    assert {path.suffix for path in Path("results").iterdir()} == {".mp4", ".json", ".png"}


def test_calibration_is_used_from_then_on(sample_video, capsys):
    flags = ["--flow-reverse", "--infer-steps", 20, "--video-size", 544, 960]
    sample_video(*flags, "--no-magcache", "--save-path", "plain")
    sample_video(*flags, "--magcache_calibration", "--save-path", "calibrated")
    (path,) = Path("home").glob("hunyuanvideo-t2v-960x544x129-*.json")
    assert np.array_equal(*[frames for folder in ("plain", "calibrated") for frames in videos(folder).values()])
    assert read(path).steps == 20 and read(path).settings == {
        "magcache_thresh": 0.24,
        "magcache_K": 6,
        "retention_ratio": 0.2,
    }
    capsys.readouterr()
    for payload in ("residual", "output"):
        sample_video(*flags, "--magcache_steps", 10, "--magcache_payload", payload)
        assert reports()[0]["computed"] == 10 and not reports()[0]["unplanned"]
    sample_video(*flags, "--magcache_calibration", "mine.json")
    assert read("mine.json").mag_ratios == read(path).mag_ratios


def test_the_lines_at_the_top_and_the_flags(sample_video, monkeypatch):
    monkeypatch.setitem(SCRIPT["nearest_published"].__globals__, "MAGCACHE_K", 2)
    sample_video("--flow-reverse", "--magcache_thresh", 0.12)
    assert reports()[0]["settings"] == {"magcache_thresh": 0.12, "magcache_K": 2, "retention_ratio": 0.2}
    assert reports()[0]["strip"].count(".") == 25


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "--flow-reverse"),
        (["--flow-reverse", "--model", "HYVideo-T/2"], "No magnitude ratios are known"),
        (["--flow-reverse", "--video-length", 1], "cannot save one"),
        (["--flow-reverse", "--save-path", "/proc/nowhere"], "cannot be written"),
        (["--flow-reverse", "--compare", "--no-magcache"], "leave out --no-magcache"),
        (["--flow-reverse", "--compare", "--magcache_calibration"], "one at a time"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_loading(sample_video, monkeypatch, flags, sentence):
    monkeypatch.setattr(PixelSampler, "__init__", lambda self, args: pytest.fail("loaded"))
    with pytest.raises(SystemExit, match=re.escape(sentence)):
        sample_video(*flags)


@pytest.mark.parametrize(
    "flag, package",
    [
        ("--compare", "torchmetrics"),
        ("--compare", "tabulate"),
        ("--compare", "imageio"),
        ("--magcache_plot", "matplotlib"),
    ],
)
def test_a_missing_package_is_found_before_loading(sample_video, monkeypatch, flag, package):
    monkeypatch.setattr(PixelSampler, "__init__", lambda self, args: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit, match=f"pip install {package}"):
        sample_video("--flow-reverse", flag)


def test_ranks_need_a_seed():
    host_args = argparse.Namespace(flow_reverse=True, video_length=129, seed=None, ulysses_degree=8, ring_degree=1)
    with pytest.raises(MagCacheError, match="give --seed"):
        SCRIPT["session_of_text"](argparse.Namespace(), host_args)


def test_a_package_that_the_checkout_lacks(monkeypatch, tmp_path):
    (tmp_path / "sample_video.py").write_text("import a_package_of_theirs\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sample_video", raising=False)
    with pytest.raises(SystemExit, match="No module named 'a_package_of_theirs': install it, or run this in"):
        SCRIPT["main"]()


def test_without_a_checkout(monkeypatch):
    monkeypatch.setitem(sys.modules, "sample_video", None)
    with pytest.raises(SystemExit, match="python -m common install MagCache4HunyuanVideo"):
        SCRIPT["main"]()
