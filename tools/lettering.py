"""Words and numbers drawn as images, for planted cases and for training models that read text."""

from __future__ import annotations

import functools
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONTS = Path("/usr/share/fonts/truetype/dejavu")
DIGIT_FREE = "abcdefghkmnprstuvwxyzABCDEFGHKLMNPRTUVWXYZ"  # letters that do not look like digits

Colour = tuple[int, int, int]


@functools.cache
def fonts(folder: Path) -> list[str]:
    """All TrueType text fonts under `folder`, without mathematical symbol fonts. Exits where there is none."""
    found = sorted(str(p) for p in folder.rglob("*.ttf") if "Math" not in p.name)
    if not found:
        raise SystemExit(f"no .ttf files under {folder}: give a folder of fonts with --fonts")
    return found


@functools.lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def colours(rng: random.Random) -> tuple[Colour, Colour]:
    """A background and a text colour that differ clearly in brightness."""

    def draw() -> Colour:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    while True:
        ground = (255, 255, 255) if rng.random() < 0.4 else draw()
        ink = (0, 0, 0) if rng.random() < 0.4 else draw()
        if abs(sum(ground) - sum(ink)) > 300:
            return ground, ink


def _wrap(words: list[str], columns: int) -> str:
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def _fit(text: str, width: float, height: float, font: str) -> tuple[str, int]:
    """The line breaks and the font size with which the text fills the box best."""
    words, best = text.split(), ("", 0)
    probe = ImageDraw.Draw(Image.new("L", (1, 1)))
    for columns in {max(map(len, words)), *(max(len(text) * k // 12, 1) for k in (4, 5, 7, 12))}:
        wrapped = _wrap(words, columns)
        box = probe.multiline_textbbox((0, 0), wrapped, font=_font(font, 40), spacing=4)
        size = int(40 * min(width / max(box[2], 1), height / max(box[3], 1)))
        if size > best[1]:
            best = wrapped, size
    return best


def plate(text: str, size: tuple[int, int], rng: random.Random, folder: Path) -> Image.Image:
    """An image with a plain background and only the text, as large as possible."""
    ground, ink = colours(rng)
    image = Image.new("RGB", size, ground)
    margin = rng.uniform(0.75, 0.95)
    face = rng.choice(fonts(folder))
    wrapped, points = _fit(text, size[0] * margin, size[1] * margin, face)
    _write(image, wrapped, (size[0] / 2, size[1] / 2), _font(face, max(points, 6)), ink)
    return image


def stamp(image: Image.Image, text: str, rng: random.Random, folder: Path, share: float) -> Image.Image:
    """The image with the text on a plate at a random place; the plate has about `share` of the image height."""
    image = image.copy()
    width, height = image.size
    ground, ink = colours(rng)
    face = rng.choice(fonts(folder))
    wrapped, points = _fit(text, width * 0.9, height * share, face)
    font = _font(face, max(points, 6))
    draw = ImageDraw.Draw(image)
    box = draw.multiline_textbbox((0, 0), wrapped, font=font, spacing=4, anchor=None)
    wide, high = (box[2] * 1.06) / 2, (box[3] * 1.1) / 2
    x = rng.uniform(min(wide, width / 2), max(width - wide, width / 2))
    y = rng.uniform(min(high, height / 2), max(height - high, height / 2))
    if rng.random() < 0.7:
        draw.rectangle((x - wide, y - high, x + wide, y + high), fill=ground)
    else:
        outline = (255, 255, 255) if sum(ink) < 380 else (0, 0, 0)
        draw.multiline_text((x, y), wrapped, fill=ink, font=font, anchor="mm", align="center",
                            spacing=4, stroke_width=max(points // 12, 2),
                            stroke_fill=outline)  # fmt: skip
        return image
    _write(image, wrapped, (x, y), font, ink)
    return image


def _write(
    image: Image.Image,
    text: str,
    centre: tuple[float, float],
    font: ImageFont.FreeTypeFont,
    ink: Colour,
) -> None:
    ImageDraw.Draw(image).multiline_text(centre, text, fill=ink, font=font, anchor="mm", align="center", spacing=4)


def number(rng: random.Random) -> str:
    """A random number of one to four digits, sometimes as a time or a price."""
    digits = str(rng.randrange(10 ** rng.randint(1, 4)))
    time = f"{rng.randrange(24)}:{rng.randrange(60):02d}"
    return rng.choice([digits] * 8 + [time, f"${digits}"])
