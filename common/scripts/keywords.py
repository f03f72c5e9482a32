"""Keywords of a pipeline's call from a command line: --name value."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import MagCacheError
from .quality import PICTURES, VIDEO_SUFFIXES

SET_HERE = ("self", "generator", "output_type", "return_dict")  # what a script sets by itself


def keywords(pipe: Any, words: Sequence[str], ours: Sequence[str] = ()) -> dict[str, Any]:
    """{keyword: value} for a pipeline's call. Several values make a list; a flag without one means True.

    words: the command line without the script's own flags; ours: the names of those, for suggestions. Raises
    MagCacheError for an unknown keyword, one that the script sets, or a value that does not suit.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    known = {name: parameter for name, parameter in parameters.items() if name not in SET_HERE}
    found = words_by_keyword(words, known, ours, type(pipe).__name__)
    read = {name: [value_of(name, word) for word in given] or [True] for name, given in found.items()}
    for name, values in read.items():
        if takes_a_number(known[name]) and {type(value) for value in values} & {str, bool}:
            raise MagCacheError(f"--{name} takes a number, not '{' '.join(found[name])}'.")
    call: dict[str, Any] = {name: values[0] if len(values) == 1 else values for name, values in read.items()}
    if isinstance(call.get("num_inference_steps"), int) and call["num_inference_steps"] < 1:
        raise MagCacheError(f"--num_inference_steps must be at least 1, not {call['num_inference_steps']}.")
    return call


def words_by_keyword(
    words: Sequence[str], known: Collection[str], ours: Sequence[str], pipeline: str
) -> dict[str, list[str]]:
    """{keyword: its words}. known: keywords of the call; pipeline: the name of its class. Raises MagCacheError."""
    found: dict[str, list[str]] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in SET_HERE:
                raise MagCacheError(f"--{name} is set by this script, which saves what comes out; leave it out.")
            if name not in known:
                raise MagCacheError(f"{pipeline} has no keyword {name}{nearest_flag(name, [*known, *ours])}")
            found[name] = [value] if value else []
        elif name is None:
            raise MagCacheError(f"'{word}' belongs to no flag.")
        else:
            found[name].append(word)
    return found


def nearest_flag(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown flag: the known one most like it, if any."""
    near = get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else "."


def takes_a_number(parameter: inspect.Parameter) -> bool:
    """Whether the annotation of a keyword allows numbers, and neither words nor True."""
    kinds = set(re.findall(r"\w+", str(parameter.annotation)))
    return bool(kinds & {"int", "float"}) and not kinds & {"str", "bool"}


def value_of(name: str, word: str) -> Any:
    """The value of a word: a number, list, True, False or None; the image or video of that file, except in a prompt;
    otherwise the word itself. Raises MagCacheError for a file that cannot be read."""
    suffix = Path(word).suffix.lower()
    if suffix in (*PICTURES, *VIDEO_SUFFIXES) and "prompt" not in name:
        from diffusers.utils import load_image, load_video

        try:
            return load_image(word) if suffix in PICTURES else load_video(word)
        except Exception as error:  # whatever decoders and the network raise
            raise MagCacheError(f"--{name} {word} cannot be read ({error}).") from None
    try:
        return ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
