"""Emoji with their Unicode names and keywords, as additional training images beside the clip art.

Sources: Debian's fonts-noto-color-emoji, unicode-data and unicode-cldr-core, and npm's @lobehub/fluent-emoji-3d. Only
training uses them: the demo pool and the held-out images are clip art. The product imports nothing from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tools.openclipart import Picture

_STRIKE_PX = 109  # the only bitmap size of the colour font
# The clip-art topic of each Unicode subgroup; the first matching prefix counts.
_TOPICS = {
    "cat-face": "animals", "monkey-face": "animals", "animal": "animals", "plant": "plants", "food": "food",
    "drink": "food", "dishware": "food", "face": "people/smilies", "emotion": "signs_and_symbols",
    "heart": "signs_and_symbols", "hand": "people/bodypart", "body": "people/bodypart", "person-sport": "recreation",
    "person": "people", "family": "people", "place-map": "geography", "place-geo": "geography",
    "place-building": "buildings", "place-religious": "buildings", "place": "buildings",
    "transport-sign": "signs_and_symbols", "transport": "transportation", "hotel": "buildings", "time": "office",
    "sky": "science", "event": "special", "award": "recreation", "sport": "recreation/sports",
    "game": "recreation/games", "arts": "recreation/entertainment", "clothing": "people/clothing",
    "sound": "recreation/entertainment", "music": "recreation/music", "phone": "office/telephone",
    "computer": "computer/hardware", "light": "electronics", "book": "education/books", "money": "office/money",
    "mail": "office", "writing": "office", "office": "office", "lock": "tools", "tool": "tools", "science": "science",
    "medical": "science", "household": "buildings/furniture", "country": "signs_and_symbols/flags",
    "subdivision": "signs_and_symbols/flags", "flag": "signs_and_symbols/flags", "geometric": "shapes",
}  # fmt: skip


def load_emoji(font: Path, fluent: Path, unicode_data: Path, side: int) -> tuple[list[Picture], np.ndarray]:
    """All emoji without skin tones and compositions, drawn by Noto and by Fluent.

    Args:
        font: Noto Color Emoji, with bitmaps.
        fluent: the `assets` folder of @lobehub/fluent-emoji-3d, with one WebP for each emoji.
        unicode_data: the folder with `emoji/` and `cldr/`.
        side: width and height of the resized images, in pixels.

    Returns:
        The pictures, all in the split `train`, and their pixels uint8 (pictures, side, side, 3) on white.
    """
    keywords = _keywords(unicode_data / "cldr/common/annotations/en.xml")
    glyphs = ImageFont.truetype(str(font), _STRIKE_PX)
    pictures, pixels = [], []
    for text, name, subgroup in _listed(unicode_data / "emoji/emoji-test.txt"):
        topic = next((t for prefix, t in _TOPICS.items() if subgroup.startswith(prefix)), "signs_and_symbols")
        code = "-".join(f"{ord(c):x}" for c in text)
        for style, image in (("noto", _glyph(text, glyphs)), ("fluent", _asset(fluent / f"{code}.webp"))):
            if image is None or np.asarray(image, np.float32).std() < 12:
                continue
            pictures.append(Picture(
                path=f"{topic}/{style}_{code}", title=name, description="",
                keywords=tuple(keywords.get(text.removesuffix("\ufe0f"), ())),
                author=style, group=f"emoji/{code}", split="train",
            ))  # fmt: skip
            pixels.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    return pictures, np.stack(pixels)


def _listed(path: Path) -> Iterator[tuple[str, str, str]]:
    """(emoji, English name, subgroup) of each entry in Unicode's list."""
    subgroup = ""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        found = re.match(r"([0-9A-F ]+?) +; fully-qualified +# \S+ E[\d.]+ (.+)", line)
        if not found:
            continue
        codes = [int(code, 16) for code in found[1].split()]
        composed = 0x200D in codes or any(0x1F3FB <= code <= 0x1F3FF for code in codes)
        if not composed:
            yield "".join(map(chr, codes)), found[2].removeprefix("flag: "), subgroup


def _keywords(path: Path) -> dict[str, list[str]]:
    """The English CLDR keywords of each character."""
    rows = ElementTree.parse(path).iter("annotation")
    return {row.get("cp", ""): [k.strip() for k in (row.text or "").split("|")] for row in rows if not row.get("type")}


def _glyph(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGB", (round(right - left) + 12, round(bottom - top) + 12), "white")
    ImageDraw.Draw(image).text((6 - left, 6 - top), text, font=font, embedded_color=True)
    return image


def _asset(path: Path) -> Image.Image | None:
    if not path.exists():
        return None
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
