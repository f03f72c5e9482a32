"""The training clips of the demo video model: an emoji that moves on a plain background, and what is said about it."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
OBJECTS = {
    "red balloon": "🎈",
    "fox": "🦊",
    "red car": "🚗",
    "apple": "🍎",
    "soccer ball": "⚽",
    "rocket": "🚀",
    "yellow fish": "🐠",
    "frog": "🐸",
    "panda": "🐼",
    "star": "⭐",
    "heart": "❤",
    "pumpkin": "🎃",
    "banana": "🍌",
    "strawberry": "🍓",
    "watermelon": "🍉",
    "pizza": "🍕",
    "donut": "🍩",
    "mushroom": "🍄",
    "sunflower": "🌻",
    "cactus": "🌵",
    "tree": "🌲",
    "moon": "🌙",
    "snowman": "⛄",
    "penguin": "🐧",
    "cat": "🐱",
    "dog": "🐶",
    "pig": "🐷",
    "chick": "🐤",
    "bee": "🐝",
    "butterfly": "🦋",
    "ladybug": "🐞",
    "octopus": "🐙",
    "whale": "🐳",
    "turtle": "🐢",
    "basketball": "🏀",
    "robot": "🤖",
}
# Seen from the side, and looking to the left: mirrored where they go to the right.
LOOKS_LEFT = ("red car", "yellow fish", "penguin", "chick", "bee", "whale", "turtle")
MOTIONS = (
    "rises",
    "falls",
    "moves to the left",
    "moves to the right",
    "grows",
    "shrinks",
    "bounces",
    "swings",
)
BACKGROUNDS = {
    "white": (250, 250, 250),
    "dark blue": (32, 42, 96),
    "sky blue": (150, 205, 245),
    "green": (120, 190, 120),
}
TEMPLATES = ("{object} {motion} on a {background} background", "{background} background, {object} {motion}")
FRAMES, SIZE = 17, 64
SPRITE = 96  # pixels of a glyph before it is drawn


def caption(name: str, motion: str, background: str, template: str = TEMPLATES[0]) -> str:
    article = "an" if name[0] in "aeiou" else "a"
    return template.format(object=f"{article} {name}", motion=motion, background=background)


def render_sprites(font_file: str = FONT) -> dict[str, torch.Tensor]:
    """Every object as [4, SPRITE, SPRITE] in 0..1: colours times opacity, opacity."""
    from PIL import Image, ImageDraw, ImageFont

    font, sprites = ImageFont.truetype(font_file, 109), {}
    for name, glyph in OBJECTS.items():
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
        ink = canvas.crop(canvas.getbbox())
        ink.thumbnail((SPRITE - 4, SPRITE - 4), Image.LANCZOS)
        square = Image.new("RGBA", (SPRITE, SPRITE))
        square.paste(ink, ((SPRITE - ink.width) // 2, (SPRITE - ink.height) // 2))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        sprites[name] = torch.cat([pixels[:3] * pixels[3:], pixels[3:]])
    return sprites


def path(motion: str, rng: random.Random) -> dict[str, np.ndarray]:
    """Where the object is in each of FRAMES frames: centre x, y and size in pixels, angle in degrees (clockwise)."""
    t = np.linspace(0, 1, FRAMES)
    still = np.ones(FRAMES)
    x, y = (SIZE / 2 + rng.uniform(-7, 7)) * still, (SIZE / 2 + rng.uniform(-7, 7)) * still
    size, angle = rng.uniform(31, 36) * still, 0 * still
    far = rng.uniform(14.5, 16.5)  # how far from the middle a crossing begins and ends
    if motion == "rises":
        y = SIZE / 2 + far * (1 - 2 * t)
    elif motion == "falls":
        y = SIZE / 2 - far * (1 - 2 * t)
    elif motion == "moves to the left":
        x = SIZE / 2 + far * (1 - 2 * t)
    elif motion == "moves to the right":
        x = SIZE / 2 - far * (1 - 2 * t)
    elif motion in ("grows", "shrinks"):
        small, large = rng.uniform(14, 18), rng.uniform(42, 48)
        size = small + (large - small) * (t if motion == "grows" else 1 - t)
        x, y = (SIZE / 2 + rng.uniform(-4, 4)) * still, (SIZE / 2 + rng.uniform(-4, 4)) * still
    elif motion == "bounces":
        height = rng.uniform(22, 26)  # two jumps
        y = SIZE / 2 + 14 - height * np.abs(np.sin(2 * math.pi * t))
    elif motion == "swings":
        angle = rng.choice((-1, 1)) * rng.uniform(28, 36) * np.sin(2 * math.pi * t)
    return {"x": x, "y": y, "size": size, "angle": angle}


def rendered_clips(
    rows: list[tuple[str, str, str]], sprites: dict[str, torch.Tensor], rng: random.Random
) -> torch.Tensor:
    """A clip of each (object, motion, background), at a random place, size and pace: [clips, 3, FRAMES, SIZE, SIZE] in
    -1..1, on the device of the sprites; drawn at twice the size and halved."""
    paths = [path(motion, rng) for _, motion, _ in rows]
    where = {key: torch.tensor(np.stack([one[key] for one in paths]), dtype=torch.float32) for key in paths[0]}
    angle, zoom = torch.deg2rad(where["angle"]), SIZE / where["size"] * (SPRITE - 4) / SPRITE
    x, y = (where[axis] * 2 / SIZE - 1 for axis in "xy")
    mirrored = [name in LOOKS_LEFT and motion == "moves to the right" for name, motion, _ in rows]
    flip = 1 - 2 * torch.tensor(mirrored, dtype=torch.float32)[:, None]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = [flip * cos, flip * sin, -flip * (cos * x + sin * y), -sin, cos, sin * x - cos * y]
    pictures = torch.stack([sprites[name] for name, _, _ in rows]).repeat_interleave(FRAMES, dim=0)
    theta = torch.stack(theta, dim=2).view(-1, 2, 3).to(pictures.device)
    grid = F.affine_grid(theta, (len(theta), 4, 2 * SIZE, 2 * SIZE), align_corners=False)
    objects = F.avg_pool2d(F.grid_sample(pictures, grid, padding_mode="zeros", align_corners=False), 2)
    grounds = torch.tensor([BACKGROUNDS[colour] for _, _, colour in rows], device=pictures.device) / 255
    grounds = grounds.repeat_interleave(FRAMES, dim=0)[:, :, None, None]
    frames = objects[:, :3] + (1 - objects[:, 3:]) * grounds
    return frames.unflatten(0, (-1, FRAMES)).transpose(1, 2) * 2 - 1


def sheet(clips: list[torch.Tensor], frames: tuple[int, ...] = (0, 4, 8, 12, 16), columns: int = 1, zoom: int = 1):
    """A contact sheet: some frames of every clip side by side, `columns` clips a row."""
    from PIL import Image

    rows = [torch.cat([one[:, frame] for frame in frames], dim=2) for one in clips]
    while len(rows) % columns:
        rows.append(torch.ones_like(rows[0]))
    lines = [torch.cat(rows[begin : begin + columns], dim=2) for begin in range(0, len(rows), columns)]
    pixels = ((torch.cat(lines, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST)
