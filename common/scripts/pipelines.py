"""What command lines of diffusers pipelines share: the pipeline from a hub or folder, and prompts from a file."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ..errors import MagCacheError, needs


def load_pipeline(source: str | Path, dtype: torch.dtype, lora: str | None = None):
    """A pipeline, of the class that its own files name, with a LoRA. Raises MagCacheError if one of them cannot be
    loaded."""
    check_folder(source)
    diffusers, asked = needs("diffusers", "diffusers"), source
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch_dtype.*")  # the name that diffusers 0.35 knows
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, torch_dtype=dtype)
        if lora:
            asked = lora
            pipe.load_lora_weights(lora)
    except Exception as error:  # whatever the hub, the network or a malformed config brings
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MagCacheError(f"{asked} cannot be loaded ({reason}).") from None
    return pipe


def check_folder(source: str | Path) -> None:
    """Raises MagCacheError for a path, which no hub id looks like, where there is no folder."""
    if (Path(source).is_absolute() or str(source).startswith((".", "~"))) and not Path(source).is_dir():
        raise MagCacheError(f"{source} cannot be loaded: there is no such folder.")


def prompts_in(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises MagCacheError for a file that has none or cannot be read."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise MagCacheError(f"--prompt_file {path} cannot be read ({error}).") from None
    if not prompts:
        raise MagCacheError(f"--prompt_file {path} has no prompts.")
    return prompts
