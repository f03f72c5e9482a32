"""The training pictures of the demo image model: an emoji on a plain background, and the captions for it."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
GLYPHS = (
    "😀😍😎😭😴🤖👻💀👽🤡🎃"
    "🐶🐱🐭🐰🦊🐻🐼🐯🦁🐮🐷🐸🐵🐔🐧🦉🦄🐝🦋🐢🐙🦀🐠🐳🐘"
    "🌹🌻🌵🌴🍀🍄"
    "🍎🍏🍊🍋🍌🍉🍇🍓🍒🍍🥑🥕🍔🍕🍟🍩🎂🍦🍺☕"
    "⚽🏀🎸🎺🎨🎲🏆🚗🚌🚲🚂🚁🚀🛸⛵⛄🏠🏰"
    "🌞🌈🌍⚡🔥⭐🌙🎈🎁🔔💎🔑💡⏰📷⚓☂👑🎩💛💙"
)
NAMES = {
    "😀": "grinning face",
    "😍": "face with heart eyes",
    "😎": "face with sunglasses",
    "😭": "crying face",
    "👽": "alien",
    "🎃": "pumpkin",
    "🍊": "orange",
    "🎂": "birthday cake",
    "🍦": "ice cream",
    "🍺": "beer mug",
    "☕": "coffee cup",
    "🍀": "four leaf clover",
    "⚽": "soccer ball",
    "🏀": "basketball",
    "🎲": "dice",
    "🚗": "red car",
    "🚂": "steam train",
    "⛵": "sailboat",
    "⛄": "snowman",
    "🏠": "house",
    "🏰": "castle",
    "🌞": "sun",
    "🌍": "globe",
    "⚡": "lightning",
    "⭐": "star",
    "🌙": "moon",
    "🎁": "gift",
    "💎": "diamond",
    "💡": "light bulb",
    "☂": "umbrella",
    "🎩": "top hat",
    "🍕": "pizza",
    "🐝": "bee",
    "🐳": "whale",
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 24),
    "sky blue": (150, 205, 245),
    "pink": (250, 190, 210),
    "green": (120, 190, 120),
    "yellow": (250, 225, 120),
    "purple": (150, 115, 190),
    "orange": (245, 165, 95),
}
TEMPLATES = (
    "{name} on a {background} background",
    "a {name} on a {background} background",
    "an emoji of a {name}, {background} background",
    "{background} background, {name}",
)
SIZE = 64


def caption_of(glyph: str) -> str:
    return NAMES.get(glyph) or unicodedata.name(glyph).lower().removesuffix(" face")


def render_glyphs() -> dict[str, Image.Image]:
    """{caption: RGBA picture, cropped to its ink} of every glyph."""
    font, pictures = ImageFont.truetype(FONT, 109), {}
    for glyph in GLYPHS:
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
        pictures[caption_of(glyph)] = canvas.crop(canvas.getbbox())
    return pictures


def compose(picture: Image.Image, color: tuple[int, int, int], rng: random.Random) -> Image.Image:
    """A training picture: the glyph on a plain background, at a random size and place, mirrored half of the time."""
    side = rng.randint(50, 58)
    scaled = picture.resize(
        (
            max(1, round(side * picture.width / max(picture.size))),
            max(1, round(side * picture.height / max(picture.size))),
        ),
        Image.LANCZOS,
    )
    if rng.random() < 0.5:
        scaled = scaled.transpose(Image.FLIP_LEFT_RIGHT)
    image = Image.new("RGB", (SIZE, SIZE), color)
    image.paste(scaled, tuple((SIZE - extent) // 2 + rng.randint(-2, 2) for extent in scaled.size), scaled)
    return image


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """[images, 3, SIZE, SIZE] in -1..1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1
