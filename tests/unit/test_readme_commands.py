"""Each command of the drop-ins' READMEs, as far as it can be followed without the host's checkout: what it copies, and
what our part of its arguments comes to. They are run in the hosts by test_wan_readmes.py, test_hunyuan_upstream.py,
test_hunyuan_i2v.py, test_hunyuan15.py and others of tests/hosts and tests/page."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from magcache_framepack_page import add_framepack_flags
from readme_commands import REPOSITORY, commands, readme

from common.__main__ import main
from common.scripts import page
from common.scripts.flags import add_magcache_flags, add_opt_in_flags, add_refine_flag, flags_and_rest

FOLDERS = sorted(path.parent.name for path in REPOSITORY.glob("MagCache4*/README.md"))


# Which flags of ours each script of a checkout takes.
SCRIPTS = {
    "magcache_generate.py": add_opt_in_flags,
    "magcache_inference.py": add_opt_in_flags,
    "magcache_sample_video.py": add_magcache_flags,
    "magcache_sample_image2video.py": add_magcache_flags,
    "magcache_gradio.py": page.add_flags,
    "magcache_gradio_server.py": page.add_flags,
    "magcache_demo_gradio.py": add_framepack_flags,
}
COMMANDS = [(folder, words) for folder in FOLDERS for words in commands(readme(folder))]
# Those in the text: `cp -r ...`
COMMANDS += [(folder, line.split()) for folder in FOLDERS for line in re.findall(r"`(cp -r [^`]+)`", readme(folder))]
RUNS = [(folder, words) for folder, words in COMMANDS if SCRIPTS.keys() & set(words)]


def checkouts(folder):
    """What each checkout that a drop-in knows is recognised by, and what is to be run there."""
    known = json.loads((REPOSITORY / folder / "install.json").read_text())
    return known if isinstance(known, list) else [known]


def lay(facts, target):
    for name in facts["recognised_by"]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).touch()
    return target


def test_every_command_is_of_a_kind_that_is_tested():
    """A new one has to be added to these tests."""
    ours = {*SCRIPTS, "MagCache4Diffusers/magcache_pipeline.py"}
    ours |= {"MagCache4FLUX/magcache_flux.py", "MagCache4FLUX_schnell/magcache_flux_schnell.py"}
    for folder, words in COMMANDS:
        copies = words[:4] == ["python", "-m", "common", "install"] or words[:2] == ["cp", "-r"]
        sets = len(words) == 1 and words[0].startswith("DIT_CKPT_PATH=")
        assert copies or sets or len(ours & set(words)) == 1, (folder, words)


@pytest.mark.parametrize(
    "folder, words", [case for case in COMMANDS if "install" in case[1]], ids=lambda value: str(value)[-40:]
)
def test_install_follows_the_readme(folder, words, tmp_path, monkeypatch, capsys):
    """In a folder of that name: C:\\path\\to\\... is one, too."""
    monkeypatch.chdir(tmp_path)
    assert words[:5] == ["python", "-m", "common", "install", folder]
    for facts in checkouts(folder):
        target = Path(words[5].lstrip("/"))
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        main(["install", folder, str(lay(facts, target))])
        assert facts["run"] in capsys.readouterr().out
        assert all((target / facts.get("into", "") / name).is_file() for name in facts["files"])
        script = next(word for word in shlex.split(facts["run"]) if word.endswith(".py"))
        assert any(Path(word).name == script for _, words in COMMANDS for word in words)


@pytest.mark.parametrize(
    "folder, words", [case for case in COMMANDS if case[1][0] == "cp"], ids=lambda value: str(value)[:40]
)
def test_copied_by_hand_is_what_install_copies(folder, words, tmp_path):
    by_hand, installed = tmp_path / "by_hand", tmp_path / "installed"
    for target in (by_hand, installed):
        target.mkdir()
    line = " ".join([*words[:-1], str(by_hand)])
    assert words[-1].startswith("/path/to/")
    subprocess.run(["bash", "-c", line], cwd=REPOSITORY, check=True)
    main(["install", folder, str(lay(checkouts(folder)[0], installed))])
    theirs = {path for path in installed.rglob("*") if path.is_file()}
    laid = {installed / name for name in checkouts(folder)[0]["recognised_by"]}
    for path in theirs - laid - {installed / ".magcache_installed.json"}:
        assert (by_hand / path.relative_to(installed)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("folder, words", RUNS, ids=lambda value: str(value)[-60:])
def test_our_flags_of_a_command(folder, words):
    """They are ours, with the values that the line gives, and what is left to the host has none of them."""
    (script,) = SCRIPTS.keys() & set(words)
    assert (REPOSITORY / folder / script).is_file()
    argv = words[words.index(script) + 1 :]
    # HunyuanVideo-1.5 is on unless told otherwise; the other generate.py are off.
    add = add_magcache_flags if folder == "MagCache4HunyuanVideo-1.5" else SCRIPTS[script]
    args, rest = flags_and_rest(add, argv)
    named = [word for word in argv if word.startswith("--")]
    ours = [word for word in named if word not in rest]
    assert {word.lstrip("-").replace("-", "_") for word in ours} == args.given
    assert rest == [word for word in argv if word in rest] and not [word for word in rest if word.startswith("--mag")]
    if "--magcache_speedup" in ours:
        assert args.magcache_speedup == float(argv[argv.index("--magcache_speedup") + 1])
    assert all(word in readme(folder) for word in named)


@pytest.mark.parametrize("folder", [folder for folder in FOLDERS if (REPOSITORY / folder / "install.json").is_file()])
def test_the_command_that_install_prints_takes_flags_that_exist(folder):
    for facts in checkouts(folder):
        words = shlex.split(facts["run"])
        script = next(word for word in words if word.endswith(".py"))
        if script in SCRIPTS:
            flags_and_rest(SCRIPTS[script], words[words.index(script) + 1 :])


@pytest.mark.parametrize("page_of", sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("MagCache4*/*.md")]), ids=str)
def test_every_flag_of_magcache_that_a_page_names_exists(page_of):
    parser = argparse.ArgumentParser(add_help=False)
    add_opt_in_flags(parser)
    add_refine_flag(parser)
    known = {name for action in parser._actions for name in action.option_strings} | {"--magcache_all_tokens"}
    named = set(re.findall(r"--(?:no-)?mag(?:cache)?_?\w+(?!\.\.\.|\w)", page_of.read_text()))  # not --magcache...
    assert named <= known, named - known
