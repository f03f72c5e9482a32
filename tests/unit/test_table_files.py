"""Presets, table files that are read and written, and which table belongs to a checkpoint."""

import json
import os
import re
from pathlib import Path

import pytest
from tiny_tables import GOOD, ratios_of, refusal

from common import tables
from common.files import write_json
from common.ratios import flow_sigmas
from common.schedule import Settings, rule_of
from common.tables import RatioTable, find, is_checkpoint, load, preset_names, read, write

# --- presets ---


def test_there_is_a_preset_for_every_checkpoint_that_the_hosts_run():
    assert set(preset_names()) >= {
        "chroma",
        "flux-dev",
        "flux-kontext-dev",
        "flux-kontext-dev-comfyui",
        "flux-schnell",
        "framepack",
        "framepack-f1",
        "hunyuanvideo-1.5-t2v-20steps",
        "hunyuanvideo-1.5-t2v-40steps",
        "hunyuanvideo-t2v-544p",
        "hunyuanvideo-t2v-720p",
        "open-sora-1.2",
        "qwen-image",
        "qwen-image-comfyui",
        "qwen-image-edit",
        "wan2.1-i2v-14b-480p",
        "wan2.1-i2v-14b-720p",
        "wan2.1-t2v-1.3b",
        "wan2.1-t2v-14b",
        "wan2.1-vace-1.3b",
        "wan2.1-vace-14b",
        "wan2.2-i2v-a14b",
        "wan2.2-t2v-a14b",
        "wan2.2-ti2v-5b-i2v",
        "wan2.2-ti2v-5b-t2v",
    }


@pytest.mark.parametrize("name", preset_names())
def test_preset_is_whole(name):
    preset = load(name)
    assert preset.name == name
    assert set(preset.settings) == {"magcache_thresh", "magcache_K", "retention_ratio"} and Settings(**preset.settings)
    assert isinstance(preset.settings["magcache_K"], int)
    assert rule_of(preset).min_steps in (4, 5)
    assert set(preset.mag_ratios) in ({"cond"}, {"cond", "uncond"})
    assert all(len(ratios) == len(preset.sigmas) and ratios[0] == 1 for ratios in preset.mag_ratios.values())
    assert preset.sigmas[0] <= 1 and preset.sigmas[-1] > 0
    assert preset.origin == {"wan2.1-vace-14b": "borrowed", "demo": "measured", "demo-video": "measured"}.get(
        name, "published"
    )
    assert preset.sampler["steps"] == preset.steps and preset.sampler["shift"] > 0
    if preset.origin == "measured":
        assert len(preset.provenance["fingerprint"]) == 12
    else:
        assert re.search(r"@[0-9a-f]{40}", preset.source) and preset.sampler["assumed"] is True


def test_borrowed_table_says_whose_it_is():
    preset = load("wan2.1-vace-14b")
    assert preset.mag_ratios == load("wan2.1-t2v-14b").mag_ratios
    assert "wan2.1-t2v-14b" in preset.notes and "Calibrate your own" in preset.notes
    assert preset.models == () and find("Wan-AI/Wan2.1-VACE-14B") is None


def test_no_checkpoint_has_two_presets():
    models = [model for name in preset_names() for model in load(name).models]
    assert len(models) == len(set(models)) > 20


# --- files ---


def test_load_by_path(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    for given in (path, str(path)):
        loaded = load(given)
        assert loaded.name == "mine" and loaded.mag_ratios == GOOD["mag_ratios"] and loaded.steps == 3


def test_unknown_preset_names_the_presets():
    text = refusal(load, "flux-dve")
    assert "'flux-dve'" in text and all(name in text for name in preset_names())


@pytest.mark.parametrize("name", ["missing.json", "missing", "folder/missing.json"])
def test_missing_file_says_that_a_calibration_makes_it(tmp_path, name):
    path = str(tmp_path / name)
    assert f"no calibration file {path}; a calibration run makes one" in refusal(load, path)


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"mag_ratios": ', "cannot be read as a calibration file"),
        ("", "cannot be read as a calibration file"),
        ("[1.0]", "it lacks mag_ratios, sigmas, origin"),
        ("3", "it lacks mag_ratios, sigmas, origin"),
        ("null", "it lacks mag_ratios, sigmas, origin"),
        ("{}", "it lacks mag_ratios, sigmas, origin"),
    ],
)
def test_malformed_file(tmp_path, text, says):
    path = tmp_path / "mine.json"
    path.write_text(text)
    message = refusal(read, path)
    assert says in message and str(path) in message


def test_unreadable_files(tmp_path):
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as a calibration file" in refusal(read, tmp_path / "mine.json")
    assert "cannot be read as a calibration file" in refusal(read, tmp_path)


@pytest.mark.parametrize("key", ["mag_ratios", "sigmas", "origin"])
def test_missing_key_is_named(tmp_path, key):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({name: value for name, value in GOOD.items() if name != key}))
    assert refusal(read, path).endswith(f"it lacks {key}.")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"mag_ratios": {}}, "no branch"),
        ({"mag_ratios": [1.0, 0.9, 0.8]}, "must name its branches"),
        ({"mag_ratios": {"cond": [1.0, 0.9]}}, "branch 'cond' has 2 ratios for 3 noise levels"),
        (
            {"mag_ratios": {"cond": [1.0, 0.9, 0.8], "uncond": [1.0] * 4}},
            "branch 'uncond' has 4 ratios for 3 noise levels",
        ),
        ({"mag_ratios": {"cond": [1.0, 0.0, 0.8]}}, "branch 'cond' has ratios that are not positive numbers"),
        ({"mag_ratios": {"cond": [1.0, -0.9, 0.8]}}, "not positive numbers"),
        ({"mag_ratios": {"cond": [1.0, float("nan"), 0.8]}}, "not positive numbers"),
        ({"mag_ratios": {"cond": [1.0, float("inf"), 0.8]}}, "not positive numbers"),
        ({"mag_ratios": {"cond": [1.0, None, 0.8]}}, "not positive numbers"),
        ({"mag_ratios": {"cond": [1.0, "much", 0.8]}}, "is not a calibration file"),
        ({"mag_ratios": {"cond": 1.0}}, "is not a calibration file"),
        ({"sigmas": [0.2, 0.6, 1.0]}, "'sigmas' must go from high to low noise"),
        ({"sigmas": [1.0, 0.6, 0.7]}, "'sigmas' must go from high to low noise"),
        ({"sigmas": [1.0, float("nan"), 0.2]}, "'sigmas' must be noise levels between 0 and 1"),
        ({"sigmas": None}, "is not a calibration file"),
        ({"settings": {"magcache_thresh": 0.1}}, "'settings' must be magcache_K, magcache_thresh, retention_ratio"),
        ({"settings": {"magcache_thresh": "a", "magcache_K": 1, "retention_ratio": 0}}, "must be numbers"),
        ({"sampler": {"shift": "x"}}, "must be numbers"),
        ({"rule": [1]}, "'rule' must hold names and values"),
        ({"sigmas": ["a", "b", "c"]}, "is not a calibration file"),
        ({"mag_ratios": {"cond": []}, "sigmas": []}, "'sigmas' must be noise levels between 0 and 1"),
        ({"sigmas": [1000.0, 600.0, 200.0]}, "'sigmas' must be noise levels between 0 and 1"),
    ],
)
def test_inconsistent_table(tmp_path, fields, says):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**GOOD, **fields}))
    message = refusal(read, path)
    assert says in message and "mine" in message


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps(steps):
    assert refusal(flow_sigmas, steps) == f"The number of steps must be at least 1, not {steps}."
    assert refusal(load("flux-dev").levels, steps) == f"The number of steps must be at least 1, not {steps}."


def test_written_file_reads_back(tmp_path):
    table = ratios_of(
        settings={"magcache_thresh": 0.1, "magcache_K": 3, "retention_ratio": 0.2},
        models=["me/mine"],
        sampler={"steps": 3, "shift": 3.0},
        provenance={"fingerprint": "0123456789ab"},
        statistics={"mag_std": {"cond": [0.0, 0.1, 0.2]}, "runs": 2},
    )
    path = tmp_path / "new" / "folder" / "mine.json"
    write(path, table)
    assert read(path) == table
    assert [file.name for file in path.parent.iterdir()] == ["mine.json"]
    assert '"cond": [1.0, 0.9, 0.8]' in path.read_text()
    assert "notes" not in json.loads(path.read_text())
    write(path, ratios_of(notes="second"))
    assert read(path).notes == "second" and read(path).models == ()


def full_disk(self, *arguments, **options):
    with open(self, "w") as file:
        file.write("half")
    raise OSError(28, "No space left on device")


def refused(self, *arguments, **options):
    raise PermissionError(13, "Permission denied")


@pytest.mark.robustness("Files", "writing a file fails, or is interrupted", "the old file stays whole")
@pytest.mark.parametrize(
    "method, failure, says",
    [
        ("write_text", full_disk, "No space left on device"),
        ("write_text", refused, "Permission denied"),
        ("replace", refused, "Permission denied"),
        ("mkdir", refused, "Permission denied"),
    ],
)
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, method, failure, says):
    path = tmp_path / "mine.json"
    write(path, ratios_of(notes="old"))
    monkeypatch.setattr(Path, method, failure)
    text = refusal(write, path, ratios_of(notes="new"))
    monkeypatch.undo()
    assert text == f"{path} cannot be written ({says}); choose another place."
    assert read(path).notes == "old"
    assert os.listdir(tmp_path) == ["mine.json"]


@pytest.mark.robustness("Files", "writing a file fails, or is interrupted")
def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(self, text, **how):
        self.write_bytes(text[:10].encode())
        raise KeyboardInterrupt

    path = tmp_path / "mine.json"
    write(path, ratios_of(notes="old"))
    monkeypatch.setattr(Path, "write_text", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(path, ratios_of(notes="new"))
    monkeypatch.undo()
    with pytest.raises(TypeError):
        write_json(path, {"not": object()})
    assert read(path).notes == "old"


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "folder").mkdir()
    assert "cannot be written" in refusal(write, tmp_path / "folder", ratios_of())
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("place", ["file/mine.json", "file/folder/mine.json", "a" * 300])
def test_place_that_cannot_exist(tmp_path, place):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refusal(write, tmp_path / place, ratios_of())


# --- which table belongs to a checkpoint ---


def test_is_checkpoint(tmp_path):
    hub_id, snapshot = (
        "black-forest-labs/FLUX.1-dev",
        "/home/me/.cache/huggingface/hub/models--black-forest-labs--FLUX.1-dev",
    )
    folder = tmp_path / "FLUX.1-dev"
    folder.mkdir()
    for model in (hub_id, snapshot, f"{snapshot}/snapshots/0ef5fff7", folder, f"{folder}/"):
        assert is_checkpoint(model, hub_id), model
    for model in (
        "",
        None,
        "FLUX.1",
        "black-forest-labs/FLUX.1-schnell",
        "me/FLUX.1-dev-anime",
        tmp_path / "FLUX.1-dev-anime",
        folder / "flux1-dev.safetensors",
        "/hub/models--me--FLUX.1-dev/snapshots/0ef5fff7",
        "black-forest-labs",
    ):
        assert not is_checkpoint(model, hub_id), model


def test_another_owner_s_repository_is_not_the_checkpoint(home):
    assert not is_checkpoint("me/FLUX.1-dev", "black-forest-labs/FLUX.1-dev")
    assert find("me/FLUX.1-dev") is None


@pytest.mark.parametrize(
    "model, name",
    [
        ("black-forest-labs/FLUX.1-dev", "flux-dev"),
        ("black-forest-labs/FLUX.1-schnell", "flux-schnell"),
        ("black-forest-labs/FLUX.1-Kontext-dev", "flux-kontext-dev"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan2.1-t2v-1.3b"),
        ("/hub/models--Wan-AI--Wan2.1-T2V-14B/snapshots/abc", "wan2.1-t2v-14b"),
        ("Qwen/Qwen-Image", "qwen-image"),
        ("Qwen/Qwen-Image-Edit", "qwen-image-edit"),
        ("lllyasviel/FramePackI2V_HY", "framepack"),
    ],
)
def test_find_preset(home, model, name):
    assert find(model).name == name
    assert find(model, "0123456789ab").name == name


@pytest.mark.parametrize(
    "model",
    [
        "me/FLUX.1-dev-anime",
        "/models/FLUX.1-dev-lora",
        "Wan-AI/Wan2.1-FLF2V-14B-720P",
        "/hub/models--me--FLUX.1-dev/snapshots/abc",
        "Qwen/Qwen-Image-2512",
        "",
    ],
)
def test_a_checkpoint_without_a_table_gets_none(home, model):
    assert find(model) is None and find(model, "0123456789ab") is None


def test_own_calibration_is_found_by_its_fingerprint(home):
    write(home / "mine-0123456789ab.json", ratios_of("mine"))
    assert find("/anywhere/mine", "0123456789ab").name == "mine"
    assert find("black-forest-labs/FLUX.1-dev", "0123456789ab").name == "mine"
    assert find("black-forest-labs/FLUX.1-dev", "ba9876543210").name == "flux-dev"
    assert find("black-forest-labs/FLUX.1-dev").name == "flux-dev"
    assert find("/anywhere/mine") is None and find("/anywhere/mine", "ba9876543210") is None


def test_preset_is_found_by_its_fingerprint(home, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PRESETS", tmp_path)
    write(tmp_path / "demo.json", ratios_of("demo", provenance={"fingerprint": "0123456789ab"}))
    assert find("/anywhere/moved", "0123456789ab").name == "demo"
    assert find("/anywhere/moved", "ba9876543210") is None and find("/anywhere/moved") is None


def test_calibrations_lie_in_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv("MAGCACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    write(tmp_path / ".magcache" / "mine-0123456789ab.json", ratios_of("mine"))
    assert find("/anywhere/mine", "0123456789ab").name == "mine"
    monkeypatch.setenv("MAGCACHE_HOME", "")  # as if it were not set, and not the working folder
    assert find("/anywhere/mine", "0123456789ab").name == "mine"


def test_numbers_share_a_line_and_words_stay_as_they_are(tmp_path):
    prompts = ["a  [cat], {two}\tspaces, [ 1  2 ]", "b"]
    table = RatioTable("x", {"cond": [1.0, 0.9]}, [1.0, 0.5], "measured", provenance={"prompts": prompts})
    write(tmp_path / "x.json", table)
    assert '"cond": [1.0, 0.9]' in (tmp_path / "x.json").read_text()
    assert read(tmp_path / "x.json").provenance == table.provenance
