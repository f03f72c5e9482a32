"""What Windows does differently, as far as another system can show it: its encodings, its paths, files in use, names
that it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from common import pipeline_patches, tables
from common.peer_tables import fields_of
from common.scripts.outputs import put_in_place
from common.scripts.quality import save_frames

REPOSITORY = Path(__file__).resolve().parents[2]
CAT = "\u732b"  # in no Western encoding
RESERVED = re.compile(r'[<>:"|?*\\]|[. ](/|$)|(^|/)(con|prn|aux|nul|com\d|lpt\d)(\.|/|$)', re.IGNORECASE)


def run_with(code, *arguments, cwd, **environment):
    """A program in a process that takes text for ASCII, unless the environment says otherwise."""
    return subprocess.run(
        [sys.executable, "-X", "utf8=0", *(("-c", code) if code else ()), *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", **environment},
        capture_output=True,
        text=True,
        encoding="cp1252",
    )


def test_a_console_that_lacks_a_character(tmp_path):
    (tmp_path / f"{CAT}.json").write_text(json.dumps({"mag_ratios": [1.0] * 10}))
    command = ["-m", "common", "import", f"{CAT}.json", "--steps", "10", "--shift", "3"]
    done = run_with("", *command, cwd=tmp_path, LC_ALL="C.UTF-8", PYTHONIOENCODING="cp1252")
    assert not done.returncode, done.stderr
    assert "Saved as \\u732b.magcache.json" in done.stdout and (tmp_path / f"{CAT}.magcache.json").is_file()


def test_a_drop_in_on_a_console_that_lacks_a_character(tmp_path):
    code = f"""
from common.scripts.checkout import one_sentence

@one_sentence
def main():
    print("Saved {CAT}.mp4")

main()
"""
    done = run_with(code, cwd=tmp_path, LC_ALL="C.UTF-8", PYTHONIOENCODING="cp1252")
    assert (done.stdout, done.stderr, done.returncode) == ("Saved \\u732b.mp4\n", "", 0)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_a_prompt_file(tmp_path, mark):
    (tmp_path / "prompts.txt").write_text(f"{mark}A cat, {CAT}\n", encoding="utf-8")
    code = """
import sys
from pathlib import Path
from common.scripts.pipelines import prompts_in

print(*map(ascii, prompts_in(Path("prompts.txt"))))
"""
    done = run_with(code, cwd=tmp_path)
    assert done.stdout == "'A cat, \\u732b'\n", done.stderr


def test_a_calibration_that_an_editor_marked(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("\ufeff" + (tables.PRESETS / "flux-dev.json").read_text(), encoding="utf-8")
    assert tables.read(path).mag_ratios.keys() == tables.load("flux-dev").mag_ratios.keys()


def test_a_calibration_goes_to_its_folder_wherever_the_model_lies(monkeypatch):
    home = PureWindowsPath("C:/Users/me/.magcache")
    monkeypatch.setattr(pipeline_patches, "Path", PureWindowsPath)
    monkeypatch.setattr(pipeline_patches, "calibrations_folder", lambda: home)
    group = SimpleNamespace(models=[SimpleNamespace(config=SimpleNamespace())])
    for folder in ("D:\\models\\tiny", "D:\\models\\tiny\\", "D:/models/tiny", "owner/tiny"):
        pipe = SimpleNamespace(config={"_name_or_path": folder})
        assert pipeline_patches.calibration_file(pipe, group, "12ab") == home / "tiny-12ab.json"


@pytest.mark.parametrize("name", ["folder/mine", "folder\\mine"])
def test_either_slash_makes_a_path(monkeypatch, name):
    monkeypatch.setattr(tables, "os", SimpleNamespace(sep="\\"))
    with pytest.raises(tables.MagCacheError, match="There is no calibration file"):
        tables.load(name)


def test_an_imported_table_has_a_name_for_every_system():
    content = {"4:3|turbo?": [1.0] * 10}
    assert fields_of(content, "theirs.json", 10, 3.0, "4:3|turbo?")["name"] == "theirs-4-3-turbo-"


def test_a_file_in_use_is_not_replaced_and_the_new_one_is_kept(tmp_path):
    """A folder of that name stands for a file that a player shows."""
    (tmp_path / "cat.png").mkdir()
    picture = np.zeros((1, 8, 8, 3), np.uint8)
    assert save_frames(tmp_path / "cat.png", picture) == tmp_path / "cat_2.png"
    assert Image.open(tmp_path / "cat_2.png").size == (8, 8)
    (tmp_path / "part").write_bytes(b"")
    assert put_in_place(tmp_path / "part", tmp_path / "cat.png") == tmp_path / "cat_3.png"
    assert {path.name for path in tmp_path.iterdir()} == {"cat.png", "cat_2.png", "cat_3.png"}


def test_a_name_that_the_system_refuses_does_not_cost_the_result(tmp_path, monkeypatch):
    """HunyuanVideo puts the time into its names, with colons."""
    replace = Path.replace

    def replace_on_windows(self, target):
        if RESERVED.search(Path(target).name):
            raise OSError(22, "The filename, directory name, or volume label syntax is incorrect")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_on_windows)
    (tmp_path / "part").write_bytes(b"a video")
    kept = put_in_place(tmp_path / "part", tmp_path / '2026-11-26-10:15:47_seed0_"What?".mp4')
    assert kept.name == "2026-11-26-10-15-47_seed0_-What--.mp4" and kept.read_bytes() == b"a video"


def test_files_have_names_for_every_system():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name]
    assert [name for name in names if RESERVED.search(name) or len(name) > 120] == []
    assert len({name.lower() for name in names}) == len(names) > 300
