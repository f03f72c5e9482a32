"""MagCache4Open-Sora in toy checkouts, whose scripts do what the real ones do; everything is compared bit for bit with
runs that no patch touched."""

import json
import random
import runpy
import shutil
import sys
import types
from pathlib import Path

import open_sora_toys
import pytest
import torch

from common.tables import read

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 12  # in the toys' configurations


class ToyCheckout:
    """A toy checkout with the drop-in beside it. `run` and `plain` return what its decoder was given."""

    def __init__(self, name, folder, monkeypatch, capsys):
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.script = "scripts/diffusion/inference.py" if name == "open_sora_2" else "scripts/inference.py"
        shutil.copytree(REPOSITORY / "tests" / "hosts" / name, folder, ignore=shutil.ignore_patterns("__pycache__"))
        for script in ("magcache_inference.py", "magcache_opensora.py"):
            shutil.copy(REPOSITORY / "MagCache4Open-Sora" / script, folder)
        monkeypatch.setenv("MAGCACHE_HOME", str(folder / "home"))
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(folder))

    def plain(self, *argv):
        return self.start(self.script, argv)

    def run(self, *argv):
        return self.start("magcache_inference.py", argv)

    def start(self, script, argv):
        self.monkeypatch.setattr(sys, "argv", [str(self.folder / script), *argv])
        for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
            del sys.modules[name]
        open_sora_toys.decoded.clear()
        states, gradients = (random.getstate(), torch.get_rng_state()), torch.is_grad_enabled()
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            random.setstate(states[0])
            torch.set_rng_state(states[1])
            torch.set_grad_enabled(gradients)
            self.said = "".join(self.capsys.readouterr())
        return list(open_sora_toys.decoded)

    def mistake(self, *argv):
        with pytest.raises(SystemExit) as end:
            self.run(*argv)
        return str(end.value)

    def report(self, name):
        return json.loads((self.folder / "samples" / f"{name}.magcache.json").read_text())


@pytest.fixture
def toy2(tmp_path, monkeypatch, capsys):
    return ToyCheckout("open_sora_2", tmp_path / "Open-Sora", monkeypatch, capsys)


@pytest.fixture
def toy1(tmp_path, monkeypatch, capsys):
    return ToyCheckout("open_sora_1", tmp_path / "Open-Sora", monkeypatch, capsys)


CONFIG_2, CONFIG_1 = "configs/256px.py", "configs/sample.py"


def test_2_measures_in_the_first_video_and_skips_from_the_second_on(toy2):
    plain = toy2.plain(CONFIG_2, "--prompt", "cat|dog walks")
    result = toy2.run(CONFIG_2, "--prompt", "cat|dog walks", "--use_magcache", "--magcache_thresh", "0.3")
    assert torch.equal(result[0], plain[0]) and not torch.equal(result[1], plain[1])
    assert "every step to measure them" in toy2.said and "saved as" in toy2.said
    first, second = toy2.report("video/prompt_0000"), toy2.report("video/prompt_0001")
    assert first["computed"] == STEPS and Path(first["measured"]).is_file() and first["task"] == "open-sora-2.0-t2v"
    assert second["reused"] > 0 and "measured" not in second and second["prompt"] == ["dog walks"]
    assert read(first["measured"]).settings == {"magcache_thresh": 0.12, "magcache_K": 3, "retention_ratio": 0.2}

    later = toy2.run(CONFIG_2, "--prompt", "cat|dog walks", "--use_magcache", "--magcache_thresh", "0.3")
    assert toy2.report("video/prompt_0000")["reused"] > 0 and "measure them" not in toy2.said
    assert torch.equal(later[1], result[1])
    # Other weights: nothing of these is lent to them.
    toy2.run(CONFIG_2, "--prompt", "cat", "--weights", "5", "--use_magcache")
    assert "measured" in toy2.report("video/prompt_0000")


def test_2_leaves_the_picture_model_alone(toy2):
    flags = (CONFIG_2, "--prompt", "cat|dog walks", "--use_t2i2v", "True")
    plain = toy2.plain(*flags)
    result = toy2.run(*flags, "--use_magcache", "--magcache_thresh", "0.3")
    pictures, videos = (slice(0, None, 2), slice(1, None, 2))
    assert all(map(torch.equal, plain[pictures], result[pictures])) and torch.equal(plain[1], result[1])
    assert not torch.equal(plain[videos][1], result[videos][1])
    written = sorted(path.name for path in (toy2.folder / "samples/video").iterdir())
    assert written == [
        f"prompt_000{i}{end}" for i in range(2) for end in (".png", "_video.magcache.json", "_video.mp4")
    ]
    assert toy2.report("video/prompt_0001_video")["task"] == "open-sora-2.0-i2v_head"


def test_2_with_a_lora(toy2):
    flags = (CONFIG_2, "--prompt", "cat|dog walks", "--use_magcache", "--magcache_thresh", "0.3")
    toy2.run(*flags)
    plain, result = toy2.plain(*flags[:3], "--lora", "True"), toy2.run(*flags, "--lora", "True")
    assert torch.equal(result[0], plain[0]) and not torch.equal(result[1], plain[1])
    assert "measured" in toy2.report("video/prompt_0000") and toy2.report("video/prompt_0001")["reused"] > 0
    assert len(list((toy2.folder / "home").iterdir())) == 2  # a table of its own


def test_2_tables_are_of_a_kind_of_condition(toy2):
    toy2.run(CONFIG_2, "--prompt", "cat", "--use_magcache")
    toy2.run(CONFIG_2, "--prompt", "cat", "--cond_type", "i2v_head", "--ref", "a.png", "--use_magcache")
    toy2.run(
        CONFIG_2, "--prompt", "cat", "--cond_type", "i2v_head", "--use_magcache"
    )  # without ref the host makes it t2v
    assert (
        toy2.report("video/prompt_0000")["task"] == "open-sora-2.0-t2v" and toy2.report("video/prompt_0000")["reused"]
    )
    tables = [read(path).sampler["task"] for path in (toy2.folder / "home").iterdir()]
    assert sorted(tables) == ["open-sora-2.0-i2v_head", "open-sora-2.0-t2v"]


def test_2_compares_the_video_in_which_it_measured(toy2):
    plain = toy2.plain(CONFIG_2, "--prompt", "cat|dog walks")
    compared = toy2.run(CONFIG_2, "--prompt", "cat|dog walks", "--magcache_thresh", "0.3", "--compare")
    report = toy2.report("video/prompt_0000")
    assert " failed (" not in toy2.said, toy2.said
    assert report["quality"].keys() == {
        f"un-cached, {STEPS} steps",
        f"MagCache, {report['computed']} of {STEPS}",
        f"plain sampler, {report['computed']} steps",
    }
    assert "earlier_clips" not in report and (toy2.folder / "samples/video/prompt_0000_compare.mp4").is_file()
    # measured, MagCache, un-cached, plain sampler; then the second: each from the same noise, the second's its own
    assert (
        torch.equal(compared[0], plain[0])
        and torch.equal(compared[2], plain[0])
        and not torch.equal(compared[1], plain[0])
    )
    assert torch.equal(compared[5], plain[1])


def test_2_a_speedup_needs_no_calibration_and_is_corrected(toy2):
    """Folded into the outputs of its Euler loop."""
    (plain,) = toy2.plain(CONFIG_2, "--prompt", "cat")
    missed = {}
    for corrector in ("on", "off"):
        flags = ("--magcache_speedup", "2", "--magcache_corrector", corrector)
        (video,) = toy2.run(CONFIG_2, "--prompt", "cat", *flags)
        missed[corrector] = float((video - plain).norm())
        assert toy2.report("video/prompt_0000")["strip"].endswith("#")
    assert missed["on"] < missed["off"]


def test_2_calibration_is_the_mean_of_all_videos(toy2):
    plain = toy2.plain(CONFIG_2, "--prompt", "cat|dog walks")
    result = toy2.run(CONFIG_2, "--prompt", "cat|dog walks", "--magcache_calibration", "both.json")
    assert all(map(torch.equal, plain, result)) and read("both.json").statistics["runs"] == 2
    assert not list((toy2.folder / "samples").rglob("*.json"))
    toy2.run(
        CONFIG_2,
        "--prompt",
        "cat",
        "--mag_ratios",
        "both.json",
        "--magcache_steps",
        "5",
        "--magcache_predictor",
        "linear",
    )
    assert toy2.report("video/prompt_0000")["computed"] == 5


def test_2_without_our_flags_is_the_hosts_script(toy2):
    plain = toy2.plain(CONFIG_2, "--prompt", "cat")
    for flags in ((), ("--no-magcache",), ("--use_magcache", "--no-magcache")):
        assert torch.equal(toy2.run(*flags, CONFIG_2, "--prompt", "cat")[0], plain[0])
    assert not list(toy2.folder.rglob("*.json"))


@pytest.mark.parametrize(
    "flag",
    [
        "--magcache_tresh",
        "--magcahe_thresh",
        "--magcache-thresh",
        "--use-magcache",
        "--magcache",
        "--mag_ratio",
        "--retention-ratio",
        "--magcache_K3",
    ],
)
def test_mistyped_flags_are_mistakes(toy2, flag):
    """The host would take them for names of its configuration."""
    assert f"There is no flag {flag}" in toy2.mistake(CONFIG_2, "--prompt", "cat", flag, "0.1")
    assert not (toy2.folder / "samples").exists()


def test_a_configuration_is_not_taken_for_the_calibration_file(toy2):
    assert "is not a calibration file" in toy2.mistake("--magcache_calibration", CONFIG_2, CONFIG_2, "--prompt", "cat")
    assert "sampling_option" in (toy2.folder / CONFIG_2).read_text()


def test_help_lists_both_kinds_of_flags(toy2):
    with pytest.raises(SystemExit):
        toy2.run("--help")
    assert (
        "--magcache_thresh" in toy2.said
        and "--retention_ratio" in toy2.said
        and "usage: magcache_inference.py" in toy2.said
    )


def test_a_broken_save_leaves_the_old_video(toy2):
    toy2.run(CONFIG_2, "--prompt", "cat", "--use_magcache")
    before = (toy2.folder / "samples/video/prompt_0000.mp4").read_bytes()
    text = (toy2.folder / "opensora/utils/inference.py").read_text()
    (toy2.folder / "opensora/utils/inference.py").write_text(
        text.replace("macro_block_size=None)", "macro_block_size=None)\n        raise OSError('disk full')")
    )
    with pytest.raises(OSError, match="disk full"):
        toy2.run(CONFIG_2, "--prompt", "cat", "--use_magcache")
    assert (toy2.folder / "samples/video/prompt_0000.mp4").read_bytes() == before
    assert not list(toy2.folder.rglob("*.part*"))


def test_1_2_runs_by_the_published_table(toy1):
    plain = toy1.plain(CONFIG_1, "--prompt", "cat", "dog walks")
    result = toy1.run(CONFIG_1, "--prompt", "cat", "dog walks", "--use_magcache")
    report = toy1.report("sample_0000")
    assert (report["computed"], report["calls"], report["mag_ratios_of"]) == (12, 30, "open-sora-1.2")
    assert report["unplanned"] == {} and "These ratios were measured at" not in toy1.said
    assert toy1.said.count("MagCache plan") == 1 and toy1.report("sample_0001")["computed"] == 12
    assert not any(map(torch.equal, plain, result))
    off = toy1.run(CONFIG_1, "--prompt", "cat", "dog walks", "--use_magcache", "--magcache_K", "0")
    assert all(map(torch.equal, plain, off))
    toy1.run(CONFIG_1, "--prompt", "cat", "--magcache_thresh", "0.24", "--magcache_K", "5")
    assert toy1.report("sample_0000")["computed"] == 10


def test_1_2_clips_of_one_video(toy1):
    flags = (CONFIG_1, "--prompt", "cat", "dog", "--loop", "3")
    plain, result = toy1.plain(*flags), toy1.run(*flags, "--use_magcache")
    assert not any(map(torch.equal, plain, result))
    for name in ("sample_0000", "sample_0001"):
        report = toy1.report(name)
        assert [clip["computed"] for clip in (report, *report["earlier_clips"])] == [12, 12, 12]
    assert len(list((toy1.folder / "samples").iterdir())) == 4


def test_1_2_noise_is_the_hosts_whatever_is_compared(toy1):
    """The sampler draws from torch's global generator, and what follows must not depend on what --compare rendered."""
    flags = (CONFIG_1, "--prompt", "cat", "dog", "--loop", "2", "--num-frames", "17")
    plain = toy1.plain(*flags)
    result = toy1.run(*flags, "--magcache_K", "0", "--compare")
    whole = [*result[6:8], *result[14:16]]  # behind three decodings a clip for the comparison
    assert len(result) == 16 and all(map(torch.equal, plain, whole))
    assert (toy1.folder / "samples/sample_0001_compare.mp4").is_file()


def test_1_3_and_pictures_have_no_published_table(toy1):
    toy1.run("configs/newer.py", "--prompt", "cat", "dog walks", "--use_magcache")
    assert toy1.report("sample_0000")["task"] == "open-sora-1.3-t2v" and "measured" in toy1.report("sample_0000")
    assert toy1.report("sample_0001")["reused"] > 0
    toy1.run(CONFIG_1, "--prompt", "cat", "--num-frames", "1", "--use_magcache")
    assert toy1.report("sample_0000")["task"] == "open-sora-1.2-t2i" and "measured" in toy1.report("sample_0000")


def test_a_configuration_that_it_does_not_know(toy1):
    assert "this one has STDiT2-XL/2" in toy1.mistake("configs/older.py", "--prompt", "cat", "--use_magcache")


def test_a_folder_that_is_no_checkout(toy2):
    shutil.rmtree(toy2.folder / "scripts")
    assert "is not a checkout of Open-Sora" in toy2.mistake(CONFIG_2, "--prompt", "cat", "--use_magcache")


def test_a_checkout_that_changed(toy2):
    text = (toy2.folder / toy2.script).read_text()
    (toy2.folder / toy2.script).write_text(text.replace("prepare_models", "make_models"))
    text = (toy2.folder / "opensora/utils/sampling.py").read_text()
    (toy2.folder / "opensora/utils/sampling.py").write_text(text.replace("prepare_models", "make_models"))
    assert "has no prepare_models where MagCache looks for it" in toy2.mistake(
        CONFIG_2, "--prompt", "cat", "--use_magcache"
    )


def test_the_schedulers_module_has_its_own_enumerate_back_and_may_use_it_as_it_likes():
    """Its sampler's loop tells the timesteps while it runs; nothing else there is to notice."""
    from magcache_opensora import OpenSora1

    module = types.ModuleType("rflow_of_a_checkout")
    exec(
        "class Scheduler:\n"
        "    def loop(self, values, **start):\n"
        "        return list(enumerate(values, **start))\n"
        "    def breaks(self):\n"
        "        raise KeyboardInterrupt\n",
        vars(module),
    )
    sys.modules[module.__name__] = module
    scheduler, noting = module.Scheduler(), types.SimpleNamespace(timesteps=None)
    steps = [torch.tensor([1000.0, 1000.0]), torch.tensor([500.0, 0.0])]
    try:
        with pytest.raises(KeyboardInterrupt), OpenSora1.loop_noted(noting, scheduler):
            assert scheduler.loop("ab", start=1) == [(1, "a"), (2, "b")]
            assert scheduler.loop(iter("ab")) == [(0, "a"), (1, "b")] and scheduler.loop([]) == []
            assert scheduler.loop(steps, start=1)[0][0] == 1 and noting.timesteps is None
            assert [index for index, _ in scheduler.loop(iter(steps))] == [0, 1]
            assert noting.timesteps == [1000.0, 500.0]
            scheduler.breaks()
        assert "enumerate" not in vars(module) and scheduler.loop("a") == [(0, "a")]
    finally:
        del sys.modules[module.__name__]
