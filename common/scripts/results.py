"""Images, videos and sounds in the output of a diffusers pipeline, and the files they are written to."""

from __future__ import annotations

import subprocess
import sys
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MagCacheError, needs
from ..files import part_of
from .outputs import beside, files_of, own_place
from .quality import PICTURES, VIDEO_SUFFIXES, save_frames

FRAMES, SOUNDS = ("images", "frames", "video"), ("audios", "audio", "sound")  # entries of an output
RESULTS = (*FRAMES, "audios")  # of which an output must have one
KINDS = {".png": "an image", ".mp4": "a video", ".wav": "a sound"}
ENDINGS = {".png": PICTURES, ".mp4": (*VIDEO_SUFFIXES, ".webp"), ".wav": (".wav",)}  # that suit each kind


def entry_of(output: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of these entries that an output has, a sequence of images, videos or sounds; None: it has none."""
    return next((output[name] for name in names if output.get(name) is not None), None)


def frames_of(output: Mapping[str, Any], index: int = 0) -> np.ndarray | None:
    """An image or video of an output, uint8 (frames, height, width, 3); None: it has none."""
    entry = entry_of(output, FRAMES)
    if entry is None:
        return None
    one = entry[index]
    frames = np.asarray(one.float().cpu() if torch.is_tensor(one) else one)
    frames = frames[None] if frames.ndim == 3 else frames
    return frames if frames.dtype == np.uint8 else (frames.clip(0, 1) * 255).round().astype(np.uint8)


def sound_of(output: Mapping[str, Any], index: int = 0) -> np.ndarray | None:
    """A sound of an output, float (channels, samples), from -1 to 1; None: it has none."""
    entry = entry_of(output, SOUNDS)
    if entry is None:
        return None
    sound = np.asarray(torch.as_tensor(entry[index]).float().cpu())
    return sound.reshape(-1, sound.shape[-1])


def sampling_rate(pipe: Any) -> int:
    """Samples per second of the sounds that a pipeline makes, as configured in one of its models."""
    for part in ("vocoder", "audio_vae", "vae", "unet", "transformer"):
        config = getattr(getattr(pipe, part, None), "config", None)
        for name in ("output_sampling_rate", "sampling_rate", "sample_rate"):
            if getattr(config, name, None):
                return int(getattr(config, name))
    return int(getattr(pipe, "sample_rate", 44100))


def suffix_of(output: Mapping[str, Any]) -> str:
    """The usual ending of a file for this output: ".png", ".mp4" or ".wav". Raises MagCacheError if it holds nothing
    that can be saved."""
    if entry_of(output, RESULTS) is None:
        raise MagCacheError(
            f"Nothing is known of how to save a {type(output).__name__}; use magcache.enable in a script."
        )
    frames = frames_of(output)
    return ".wav" if frames is None else ".png" if len(frames) == 1 else ".mp4"


def with_suitable_ending(target: Path, suffix: str) -> Path:
    """The target, with the ending `suffix` where its own does not suit that kind of output."""
    if target.suffix.lower() in ENDINGS[suffix]:
        return target
    print(f"{target.name} is no name for {KINDS[suffix]}, so its ending becomes {suffix}.")
    return target.with_suffix(suffix)


def save_results(pipe: Any, output: Mapping[str, Any], target: Path, fps: float) -> list[Path]:
    """Write each image, video or sound of an output, and return the files. Several are numbered; only files that an
    earlier report of the first one lists are overwritten. fps: frames per second of a video."""
    count = len(entry_of(output, RESULTS))
    targets = [target] if count == 1 else [beside(target, f"_{one + 1}{target.suffix}") for one in range(count)]
    ours, paths = files_of(targets[0]), []
    for index, wanted in enumerate(targets):
        path = own_place(wanted, ours)
        frames, sound = frames_of(output, index), sound_of(output, index)
        if frames is not None:
            path = save_frames(path, frames, None if len(frames) == 1 else fps)
            if sound is not None:
                add_sound(path, sound, sampling_rate(pipe))
        elif sound is not None:
            save_sound(path, sound, sampling_rate(pipe))
        paths.append(path)
    return paths


def save_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """Write a 16-bit wave file. sound: float (channels, samples), from -1 to 1; rate: samples per second."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(sound))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound.T.clip(-1, 1) * 32767).astype("<i2").tobytes())


def add_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """Put a sound into a video file. If ffmpeg cannot, the sound stays in a wave file beside it. Raises MagCacheError
    if imageio's ffmpeg is not installed."""
    wave_file = own_place(beside(path, ".wav"), files_of(path))
    whole = part_of(path)
    save_sound(wave_file, sound, rate)
    ffmpeg = needs("imageio_ffmpeg", "imageio[ffmpeg]").get_ffmpeg_exe()
    inputs = ["-i", str(path), "-i", str(wave_file), "-c:v", "copy"]
    done = subprocess.run(
        [ffmpeg, "-y", "-loglevel", "error", *inputs, str(whole)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
    )
    if done.returncode:
        whole.unlink(missing_ok=True)
        print(f"The sound is in {wave_file} ({done.stderr.strip().splitlines()[-1]}).", file=sys.stderr)
        return
    whole.replace(path)
    wave_file.unlink()
