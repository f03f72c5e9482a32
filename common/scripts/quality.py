"""Images and videos: reading and writing them, comparing them by PSNR, SSIM and MS-SSIM, showing them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import MagCacheError, needs
from ..files import part_of
from .outputs import put_in_place

if TYPE_CHECKING:
    import torch

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".webm", ".mkv", ".avi", ".gif")
ANIMATED = (".gif", ".webp")  # suffixes of videos that Pillow writes
MOVING_PICTURES = ("GIF", "WEBP", "PNG", "AVIF")  # formats that Pillow reads frame by frame
MAGNIFIED = 10  # factor by which differences are shown
COLUMN = 192  # pixels, width of a column of an animation
SSIM_LEAST = 6  # pixels per side: half a window of 11, mirrored
MS_SSIM_LEAST = 161  # pixels per side: five scales of a window of 11


def read_frames(path: str | Path) -> tuple[np.ndarray, float | None]:
    """(uint8 frames (frames, height, width, 3), frames per second or None for a still image) of an image, animation or
    video file. Raises MagCacheError if it is missing or cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise MagCacheError(f"There is no file {path}.")
    imageio = needs("imageio.v3", "imageio[ffmpeg]")
    try:
        if path.suffix.lower() in VIDEO_SUFFIXES and path.suffix.lower() != ".gif":
            frames = imageio.imread(path, plugin="FFMPEG")
            return np.asarray(frames)[..., :3], imageio.immeta(path, plugin="FFMPEG").get("fps", 24)
        return frames_of_picture(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise MagCacheError(f"{path} cannot be read as an image or video ({reason}).") from None


def frames_of_picture(path: Path) -> tuple[np.ndarray, float | None]:
    """`read_frames` for the formats that Pillow reads."""
    from PIL import Image

    frames, seconds = [], 0.0
    with Image.open(path) as picture:
        moving = picture.format in MOVING_PICTURES and getattr(picture, "n_frames", 1) > 1
        for index in range(picture.n_frames if moving else 1):
            if moving:
                picture.seek(index)
            # Pillow would clip 16-bit grey values at 255.
            deep = picture.mode.startswith("I")
            grey = (np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8) if deep else None
            frames.append(np.asarray((picture if grey is None else Image.fromarray(grey)).convert("RGB")))
            seconds += picture.info.get("duration", 0) / 1000
    return np.stack(frames), (len(frames) / seconds if seconds else 24.0) if moving else None


def quality(reference: np.ndarray, result: np.ndarray) -> dict[str, float | None]:
    """{"psnr": dB, "ssim": .., "ms_ssim": ..} of two uint8 arrays (frames, height, width, 3), averaged over the frames.

    psnr averages only frames that differ, because an equal pair has inf; it is inf if no frame differs. ms_ssim is
    None below 161 pixels per side, where it is not defined. Raises MagCacheError for unequal or too small frames, or
    if torchmetrics is missing.
    """
    metrics = needs("torchmetrics.functional.image", "torchmetrics")
    import torch

    if reference.shape != result.shape:
        raise MagCacheError(
            f"Only equal sizes and lengths can be compared, not {frames_text(reference)} and {frames_text(result)}."
        )
    if min(reference.shape[1:3]) < SSIM_LEAST:
        raise MagCacheError(f"SSIM needs {SSIM_LEAST} pixels a side, and these are {frames_text(reference)}.")
    rows = []
    for one, other in zip(reference, result):
        one, other = (torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float() / 255 for frame in (one, other))
        rows.append(
            (
                float(metrics.peak_signal_noise_ratio(other, one, data_range=1.0)),
                float(ssim(one, other)),
                float(metrics.multiscale_structural_similarity_index_measure(other, one, data_range=1.0))
                if min(one.shape[-2:]) >= MS_SSIM_LEAST
                else np.nan,
            )
        )
    _, similarity, ms_ssim = (float(value) for value in np.mean(rows, axis=0))
    psnr = float(np.mean([row[0] for row in rows if np.isfinite(row[0])] or [np.inf]))
    return {"psnr": psnr, "ssim": similarity, "ms_ssim": None if np.isnan(ms_ssim) else ms_ssim}


def ssim(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """SSIM of two images (1, 3, height, width) in 0..1: Gaussian windows of 11 pixels, edges mirrored.

    Differs from torchmetrics in that negative variances, which rounding makes in plain areas, are not set to 0: that
    changes the fourth digit, even when an image is compared with itself.
    """
    import torch
    from torch.nn.functional import conv2d, pad

    window = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = torch.outer(window, window).expand(3, 1, 11, 11) / window.sum() ** 2
    one, other = (pad(picture, (5, 5, 5, 5), mode="reflect") for picture in (one, other))
    products = torch.cat([one, other, one * one, other * other, one * other])
    mean, other_mean, square, other_square, product = conv2d(products, window, groups=3)
    variances = square - mean**2 + other_square - other_mean**2
    covariance = product - mean * other_mean
    similar = (2 * mean * other_mean + 0.01**2) * (2 * covariance + 0.03**2)
    return (similar / ((mean**2 + other_mean**2 + 0.01**2) * (variances + 0.03**2))).mean()


def frames_text(frames: np.ndarray) -> str:
    """Number and size of frames (frames, height, width, 3), for a message."""
    return f"{len(frames)} frame{'s' * (len(frames) > 1)} of {frames.shape[2]}x{frames.shape[1]}"


def quality_text(figures: dict[str, Any]) -> str:
    """One line of `quality`'s figures."""
    ms_ssim = f", MS-SSIM {figures['ms_ssim']:.4f}" if figures["ms_ssim"] is not None else ""
    return f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}{ms_ssim}"


def quality_table(rows: dict[str, dict[str, Any]]) -> str:
    """A table as text. rows: {label: figures}, those of `quality`, "steps" and "seconds"; any may be missing."""
    tabulate = needs("tabulate", "tabulate").tabulate
    return tabulate(
        [
            [
                label,
                figures.get("steps"),
                figures.get("seconds"),
                figures.get("psnr"),
                figures.get("ssim"),
                figures.get("ms_ssim"),
            ]
            for label, figures in rows.items()
        ],
        headers=["", "computed steps", "seconds", "PSNR dB", "SSIM", "MS-SSIM"],
        missingval="",
        floatfmt=("", "d", ".2f", ".2f", ".4f", ".4f"),
    )


def side_by_side(path: str | Path, columns: Sequence[np.ndarray], fps: float | None = None) -> None:
    """Write images, or videos if fps is given, side by side. columns: uint8 (frames, height, width, 3) each; shorter
    videos hold their last frame."""
    tallest = max(frames.shape[1] for frames in columns)
    longest = max(len(frames) for frames in columns)
    joined = np.concatenate([padded(frames, tallest, longest) for frames in columns], axis=2)
    save_frames(path, joined, fps)


def padded(frames: np.ndarray, height: int, length: int) -> np.ndarray:
    """Frames filled up with white to a height, with 4 white columns, and with the last frame to a length."""
    wide = np.pad(
        frames, ((0, length - len(frames)), (0, height - frames.shape[1]), (0, 4), (0, 0)), constant_values=255
    )
    wide[len(frames) :, : frames.shape[1], : frames.shape[2]] = frames[-1]
    return wide


def save_frames(path: str | Path, frames: np.ndarray, fps: float | None = None) -> Path:
    """Write uint8 frames (frames, height, width, 3) under a temporary name, then rename the file; returns its path.

    fps: frames per second; None: write the first frame as an image. Raises MagCacheError if that fails.
    """
    path = Path(path)
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if fps is None:
            from PIL import Image

            Image.fromarray(frames[0]).save(part)
        elif path.suffix.lower() in ANIMATED:
            from PIL import Image

            first, *others = map(Image.fromarray, frames)
            first.save(part, save_all=True, append_images=others, duration=1000 / fps, loop=0)
        else:
            codec = {"codec": "libvpx-vp9"} if path.suffix.lower() == ".webm" else {}
            needs("imageio.v3", "imageio[ffmpeg]").imwrite(
                part, even(frames), plugin="FFMPEG", fps=fps, macro_block_size=2, **codec
            )
            check_length(part, len(frames))
        return put_in_place(part, path)
    except (OSError, ValueError) as error:
        raise MagCacheError(f"{path} cannot be written ({error}).") from None
    finally:
        with suppress(OSError):
            part.unlink()


def check_length(video: Path, frames: int) -> None:
    """Raises OSError if a video file has fewer frames: imageio does not report a failure of ffmpeg, as on a full
    disk."""
    from imageio_ffmpeg import count_frames_and_secs

    try:
        written = count_frames_and_secs(str(video))[0]
    except RuntimeError:
        written = 0
    if written < frames:
        raise OSError(f"ffmpeg wrote {written} of {frames} frames; is the disk full?")


def even(frames: np.ndarray) -> np.ndarray:
    """Frames without the last row or column of an odd size, which video codecs refuse."""
    return frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]


def magnified_difference(reference: np.ndarray, result: np.ndarray) -> np.ndarray:
    """White minus MAGNIFIED times the difference of two uint8 arrays of one shape; uint8 of that shape."""
    difference = np.abs(reference.astype(int) - result.astype(int))
    return (255 - np.minimum(255, MAGNIFIED * difference)).astype(np.uint8)


def contact_sheet(
    path: str | Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], labels: Sequence[Sequence[str]]
) -> None:
    """Write an image of rows of uint8 images (height, width, 3). titles: of the columns; labels[row][column]: below
    each image."""
    figure_class = needs("matplotlib.figure", "matplotlib").Figure
    from .plots import save_figure

    figure = figure_class(figsize=(2.6 * len(titles), 2.9 * len(rows) + 0.4), layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), len(titles), squeeze=False))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            panel = axes[row, column]
            panel.imshow(image, interpolation="nearest")
            panel.set_xticks([])
            panel.set_yticks([])
            panel.set_xlabel(fill(shorten(labels[row][column], 120), 42), fontsize=9)
            for spine in panel.spines.values():
                spine.set_visible(False)
            if row == 0:
                panel.set_title(titles[column], fontsize=11)
    save_figure(path, figure)


def animation(path: str | Path, columns: dict[str, np.ndarray], fps: float) -> None:
    """Write videos side by side as an animated image. columns: {heading: uint8 frames (frames, height, width, 3)}, all
    of one shape. Raises MagCacheError if the file cannot be written."""
    from PIL import Image, ImageDraw, ImageFont

    length, height, width = next(iter(columns.values())).shape[:3]
    width, height = COLUMN, round(height * COLUMN / width)
    font, head, moving = ImageFont.load_default(size=14), 40, []
    for frame in range(length):
        sheet = Image.new("RGB", (len(columns) * (width + 4) - 4, head + height), "white")
        for index, (title, frames) in enumerate(columns.items()):
            picture = Image.fromarray(frames[frame])
            # Keep the pixels of a small video sharp.
            way = Image.Resampling.NEAREST if picture.width < width else Image.Resampling.LANCZOS
            sheet.paste(picture.resize((width, height), way), (index * (width + 4), head))
            ImageDraw.Draw(sheet).text((index * (width + 4), 2), title, fill="black", font=font)
        moving.append(sheet)
    part = part_of(Path(path))
    try:
        moving[0].save(part, save_all=True, append_images=moving[1:], duration=1000 / fps, loop=0, quality=85)
        part.replace(path)
    except OSError as error:
        raise MagCacheError(f"{path} cannot be written ({error}).") from None
    finally:
        with suppress(OSError):
            part.unlink()
