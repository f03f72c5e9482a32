"""The command lines of a README, as a reader copies them."""

import re
import shlex
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def readme(folder):
    """The text of a folder's README."""
    return (REPOSITORY / folder / "README.md").read_text()


def commands(text):
    """Each command of the blocks ```bash as a list of words: continued lines joined, `a && b` apart, comments and `cd`
    left out."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line.replace("\\", "\\\\"), comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            if command and command[0] != "cd":
                found.append(command)
    return found


def of_script(text, script):
    """[(arguments of torchrun or (), arguments of the script)] of the commands that start this script."""
    found = []
    for words in commands(text):
        if script in words and words[0] != "cp":
            at = words.index(script)
            found.append((tuple(words[1:at]), tuple(words[at + 1 :])))
    return found


def changed(arguments, **flags):
    """The arguments with other values of some flags; "number_of_gpus" is --number_of_gpus or --number-of-gpus.

    Raises ValueError where one is not among them."""
    words = list(arguments)
    for name, value in flags.items():
        words[[word.replace("-", "_") for word in words].index(f"__{name}") + 1] = str(value)
    return words
