"""Which published table and settings a command line of the Wan drop-ins gets: by task and by the checkpoint's own
config.json, never by the name of its folder."""

import argparse
import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import MagCacheError
from common.hosts.checkouts import WAN
from common.scripts.flags import add_opt_in_flags, flags_and_rest
from common.scripts.quality import VIDEO_SUFFIXES
from common.scripts.wan import checkpoint_config, wan_host, wan_session
from common.tables import calibrations_folder, load

pytestmark = pytest.mark.usefixtures("home")

REPOSITORY = Path(__file__).resolve().parents[2]
T2V_1, T2V_14, I2V_14 = ("t2v", 1536), ("t2v", 5120), ("i2v", 5120)
CASES = [
    # folder, task, size, frames, image, model_type and dim of config.json, preset
    ("MagCache4Wan2.1", "t2v-1.3B", "832*480", 81, None, T2V_1, "wan2.1-t2v-1.3b"),
    ("MagCache4Wan2.1", "t2v-14B", "1280*720", 81, None, T2V_14, "wan2.1-t2v-14b"),
    ("MagCache4Wan2.1", "t2v-14B", "480*832", 81, None, T2V_1, "wan2.1-t2v-1.3b"),  # the wrong checkpoint for the task
    ("MagCache4Wan2.1", "t2i-14B", "1024*1024", 1, None, T2V_14, None),
    ("MagCache4Wan2.1", "i2v-14B", "832*480", 81, "cat.png", I2V_14, "wan2.1-i2v-14b-480p"),
    ("MagCache4Wan2.1", "i2v-14B", "480*832", 81, "cat.png", I2V_14, "wan2.1-i2v-14b-480p"),
    ("MagCache4Wan2.1", "i2v-14B", "1280*720", 81, "cat.png", I2V_14, "wan2.1-i2v-14b-720p"),
    ("MagCache4Wan2.1", "flf2v-14B", "1280*720", 81, None, ("flf2v", 5120), None),
    ("MagCache4Wan2.1", "vace-1.3B", "832*480", 81, None, ("vace", 1536), "wan2.1-vace-1.3b"),
    ("MagCache4Wan2.1", "vace-14B", "1280*720", 81, None, ("vace", 5120), None),
    ("MagCache4Wan2.2", "t2v-A14B", "1280*720", 81, None, T2V_14, "wan2.2-t2v-a14b"),
    ("MagCache4Wan2.2", "i2v-A14B", "1280*720", 81, "cat.png", I2V_14, "wan2.2-i2v-a14b"),
    ("MagCache4Wan2.2", "ti2v-5B", "1280*704", 121, None, ("ti2v", 3072), "wan2.2-ti2v-5b-t2v"),
    ("MagCache4Wan2.2", "ti2v-5B", "1280*704", 121, "cat.png", ("ti2v", 3072), "wan2.2-ti2v-5b-i2v"),
    ("MagCache4Wan2.2", "t2v-A14B", "1280*720", 81, None, ("t2v", 4096), None),  # nobody's
]


def table_session(tmp_path, folder, task, size, frames, image, config):
    checkpoint = tmp_path / "Wan-T2V-14B-720P-VACE"  # says nothing
    place = checkpoint / "high_noise_model" if "A14B" in task else checkpoint
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(dict(zip(("model_type", "dim"), config))))
    host = {
        "task": task,
        "size": size,
        "frame_num": frames,
        "sample_steps": 40,
        "image": image,
        "ckpt_dir": str(checkpoint),
        "prompt": "a cat",
        "base_seed": 1,
        "sample_solver": "unipc",
        "sample_shift": 5.0,
        "sample_guide_scale": 5.0,
    }
    script = runpy.run_path(str(REPOSITORY / folder / "magcache_generate.py"))
    args, _ = flags_and_rest(add_opt_in_flags, ["--use_magcache"])
    return wan_session(args, argparse.Namespace(**host), script["SETTINGS"], script["TABLES"])


@pytest.mark.parametrize("folder, task, size, frames, image, config, preset", CASES)
def test_table_and_settings(tmp_path, folder, task, size, frames, image, config, preset):
    made = table_session(tmp_path, folder, task, size, frames, image, config)
    assert made.preset == preset
    if preset:
        made.check("output")
        assert made.find_table("0" * 12).name == preset
    else:
        with pytest.raises(MagCacheError, match=f"No magnitude ratios are known for {made.task} with this checkpoint"):
            made.check("output")


@pytest.mark.parametrize(
    "folder, task, size, frames, image, config, preset",
    [case for case in CASES if case[-1] and (case[1], case[5]) != ("t2v-14B", T2V_1)],
)
def test_the_scripts_lines_are_what_was_published(tmp_path, folder, task, size, frames, image, config, preset):
    assert table_session(tmp_path, folder, task, size, frames, image, config).script_settings == load(preset).settings


def test_an_own_calibration_wins_and_the_nearest_size_of_several(tmp_path):
    table = load("wan2.1-t2v-1.3b")
    for size, frames, fingerprint in (("832x480", 81, "a"), ("832x480", 5, "a"), ("480x832", 81, "other")):
        path = calibrations_folder() / f"t2v-1.3B-{size}x{frames}-{fingerprint}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps(
                {
                    "name": path.stem,
                    "origin": "measured",
                    "sigmas": list(table.sigmas),
                    "mag_ratios": table.mag_ratios,
                    "sampler": {**table.sampler, "task": "t2v-1.3B", "size": size, "frames": frames},
                    "provenance": {"fingerprint": fingerprint},
                }
            )
        )
    made = table_session(tmp_path, "MagCache4Wan2.1", "t2v-1.3B", "832*480", 61, None, T2V_1)
    assert made.find_table("a").name == "t2v-1.3B-832x480x81-a"
    assert made.find_table("b").name == "wan2.1-t2v-1.3b"
    small = table_session(tmp_path / "small", "MagCache4Wan2.1", "t2v-1.3B", "832*480", 9, None, T2V_1)
    assert small.find_table("a").name == "t2v-1.3B-832x480x5-a"


def test_a_task_that_is_not_known(tmp_path):
    with pytest.raises(MagCacheError, match=r"MagCache knows the tasks .*, not x2v-14B; leave out --use_magcache\."):
        table_session(tmp_path, "MagCache4Wan2.2", "x2v-14B", "1024*704", 80, None, ("x2v", 5120))


def test_a_mistyped_checkpoint_is_told_as_such(tmp_path, capsys):
    with pytest.raises(MagCacheError, match="There is no folder .*nowhere: --ckpt_dir names the folder of the checkpo"):
        checkpoint_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    assert checkpoint_config(tmp_path) == {}
    assert "Ignored: " in capsys.readouterr().out


def test_one_frame_may_be_a_video_and_a_picture_may_not(tmp_path):
    """generate.py writes an mp4 of one frame, and stills of its own task."""
    one = table_session(tmp_path, "MagCache4Wan2.1", "t2v-1.3B", "832*480", 1, None, T2V_1)
    one.args.magcache_speedup = 2.0
    one.check("x.mp4", VIDEO_SUFFIXES)
    with pytest.raises(MagCacheError, match="has no ending that can be written: use .mp4"):
        one.check("x.png", VIDEO_SUFFIXES)


@pytest.mark.parametrize(
    "ranks, shares", [(2, [23, 22]), (4, [12, 12, 12, 9]), (8, [6, 6, 6, 6, 6, 6, 6, 3]), (1, None)]
)
def test_padding_is_no_token_of_any_rank(monkeypatch, ranks, shares):
    """45 tokens, made up to a multiple of the ranks; statistics are taken of those that are none."""
    forward = {"x": [torch.empty(16, 3, 6, 10)], "seq_len": -(-45 // ranks) * ranks}
    hosts = []
    for rank in range(ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        hosts.append(wan_host(SimpleNamespace(sp_size=ranks), SimpleNamespace(patch_size=(1, 2, 2), dim=48)))
    if shares is None:
        assert hosts == [WAN]
    else:
        assert [host.noise_tokens(forward) for host in hosts] == shares
        assert {host.residual_shape(SimpleNamespace(dim=48), forward) for host in hosts} == {
            (1, forward["seq_len"] // ranks, 48)
        }
