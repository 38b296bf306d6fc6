"""The public-domain images of Debian's openclipart packages, with captions and a fixed split.

The tools that build the demo pool and train the demo models share this module, so that both use the same split. The
product imports nothing from here.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

SPLITS = ("demo", "held_out", "train")
MAX_PIXELS = 20_000_000  # larger images are skipped; some unpack to 170 million pixels
Image.MAX_IMAGE_PIXELS = None  # the packages are trusted, and MAX_PIXELS is checked instead
GROUP_HAMMING = 4  # more than the 3 of the rule, so that near copies are always in the same split

# Words about how a collection was filed, not about the content of an image.
_FILING = {
    "", "hash", "icons", "theme", "signs_and_symbols", "united_nations_member", "magick",
    "lemon_theme_icon", "special", "unsorted", "mapsym", "appicon", "mimeicon", "clip art",
    "clipart", "clip_art", "subnational", "etiquette", "networksym", "weathersym", "sign",
    "transport", "recreation", "public domain",
}  # fmt: skip
_SUITS = {"c": "clubs", "d": "diamonds", "h": "hearts", "s": "spades"}
_RANKS = {"a": "ace", "j": "jack", "q": "queen", "k": "king"}
_FUNCTION_WORDS = set(
    re.findall(
        r"\w+",
        "a an the of in on at by for from to with without and or not no is are be was this that "
        "these it its as into over under very you your his her their our my he she they we i has "
        "have can some other one two three up off out s",
    )
)


@dataclass(frozen=True)
class Picture:
    """One image with the metadata of its SVG; `path` is relative and has no suffix."""

    path: str
    title: str
    description: str
    keywords: tuple[str, ...]
    author: str
    group: str = ""
    split: str = ""


def unit(seed: str) -> float:
    """A pseudo-random number in [0, 1) that depends only on `seed`."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") / 2**64


def read_metadata(path: Path, name: str) -> Picture | None:
    """The metadata in the RDF block of one SVG; None unless it is marked as public domain."""
    text = path.read_bytes().decode("utf-8", "replace")
    found = re.search(r"<(?:rdf:)?RDF.*?</(?:rdf:)?RDF>", text, re.S)
    block = found.group(0) if found else ""
    if not re.search(r'license rdf:resource="[^"]*public_?domain/?"', block, re.I):
        return None
    creator = re.search(r"<dc:creator>(.*?)</dc:creator>", block, re.S)
    return Picture(
        path=name,
        title=_element(block, "title"),
        description=_element(block, "description"),
        keywords=tuple(_plain(k) for k in re.findall(r"<rdf:li[^>]*>(.*?)</rdf:li>", block, re.S)),
        author=_element(creator.group(1), "title") if creator else "",
    )


def _element(block: str, name: str) -> str:
    found = re.search(rf"<dc:{name}[^>]*>(.*?)</dc:{name}>", block, re.S)
    return _plain(found.group(1)) if found else ""


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text))).strip()


def no_digits(text: str) -> str:
    return re.sub(r"[\W\d_]+", " ", text).strip().lower()


def has_number(p: Picture) -> bool:
    """Whether the image certainly shows digits: playing cards from 2 to 10, and clock faces."""
    return bool(re.search(r"cards/\w+/\w+_[cdhs]_(\d+)$", p.path))


def load_rgb(root: Path, picture: Picture) -> Image.Image | None:
    """The PNG on a white background; None where it is broken, too large or almost empty."""
    try:
        with Image.open(root / "png" / f"{picture.path}.png") as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            rgba = image.convert("RGBA")
    except (OSError, Image.DecompressionBombError):
        return None
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def perceptual_hash(image: Image.Image) -> int:
    """The 64-bit DCT hash: whether each of the 8x8 lowest frequencies of a 32x32 grey image is above their median."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    low = cv2.dct(grey)[:8, :8].ravel()
    return int("".join("1" if bit else "0" for bit in low > np.median(low)), 2)


def near_pairs(hashes: Sequence[int], distance: int) -> Iterable[tuple[int, int]]:
    """All pairs i < j whose hashes differ in at most `distance` bits."""
    values = np.array(hashes, np.uint64)
    for i in range(len(values) - 1):
        for j in np.flatnonzero(np.bitwise_count(values[i + 1 :] ^ values[i]) <= distance):
            yield i, i + 1 + int(j)


def load_pictures(root: Path, side: int) -> tuple[list[Picture], np.ndarray]:
    """All usable images with their group and split, and their pixels resized to side x side.

    A group consists of images with nearly the same hash; all of them are in the same split. Different images of one
    series may be in different splits, as in any two parts of a web pool.
    """
    pictures, hashes, pixels = [], [], []
    for path in sorted((root / "svg").rglob("*.svg")):
        name = path.relative_to(root / "svg").with_suffix("").as_posix()
        if name.startswith("shapes/stars/"):
            continue  # 1,375 generated polygons with very thin lines, all titled "gramastar"
        picture = read_metadata(path, name)
        image = picture and load_rgb(root, picture)
        if not picture or not image:
            continue
        small = image.resize((side, side), Image.Resampling.BICUBIC)
        if np.asarray(small, np.float32).std() < 12:
            continue
        pictures.append(picture)
        hashes.append(perceptual_hash(image))
        pixels.append(np.asarray(small))

    parent = list(range(len(pictures)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, j in near_pairs(hashes, GROUP_HAMMING):
        parent[find(i)] = find(j)

    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(pictures)):
        members[find(i)].append(i)
    result = list(pictures)
    for indices in members.values():
        group = pictures[indices[0]].path
        share = unit(f"split/{group}")
        split = "demo" if share < 0.24 else "held_out" if share < 0.30 else "train"
        # A large group would fill a small split with one subject.
        if len(indices) > 40:
            split = "train"
        for i in indices:
            result[i] = replace(pictures[i], group=group, split=split)
    return result, np.stack(pixels)


class Captioner:
    """Composes captions in the style of web alt texts from title, description, keywords and file name."""

    def __init__(self, pictures: Sequence[Picture]) -> None:
        self._titles = Counter((no_digits(p.title), p.author) for p in pictures)
        self._descriptions = Counter(p.description for p in pictures)

    def subject(self, p: Picture) -> str:
        """The title, or the file name where the title is that of a collection."""
        title = p.title
        card = re.search(r"cards/\w+/\w+_([cdhs])_(\w+)$", p.path)
        if card:
            return f"{_RANKS.get(card[2], card[2])} of {_SUITS[card[1]]}"
        shared = self._titles[no_digits(title), p.author] > 5 and no_digits(title) != "stick man"
        if shared or not no_digits(title) or "@" in title or title.startswith("Clipart by"):
            title = self._file_name(p)
        title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title.replace("_", " "))
        return re.sub(r"[\s\-]*\b\d+$", "", title).strip(" -#") or p.path.split("/")[-2]

    @staticmethod
    def topic(p: Picture) -> str:
        """The folder in which the editors of the collection filed the image."""
        return p.path.split("/")[0].replace("_", " ")

    def words(self, p: Picture) -> str:
        """Plain alt texts: the subject with the topic."""
        return f"{self.subject(p)} {self.topic(p)}"

    @staticmethod
    def _file_name(p: Picture) -> str:
        words = re.split(r"[_\-+. ]+", p.path.rsplit("/", 1)[-1])
        author = no_digits(p.author).split()
        kept = []
        for i, word in enumerate(words):
            low = word.lower()
            if word.isdigit() or (i and any(a.startswith(low) for a in author)):
                continue
            if low in {"gnome", "mime", "fs", "aiga", "contour", "application", "symbol", "bwh"}:
                continue
            kept.append(re.sub(r"(?<=[a-z])\d+$", "", word))
        return " ".join(kept)

    def keywords(self, p: Picture) -> list[str]:
        """At most five words from the keywords and folders that are not in the title."""
        subject = self.subject(p).lower()
        seen: list[str] = []
        for word in (*p.keywords, *reversed(p.path.split("/")[1:-1])):
            word = word.lower().strip()
            if word.rstrip("s") == self.topic(p).rstrip("s"):
                continue
            if word in _FILING or word.startswith("hash(") or word in p.author.lower():
                continue
            word = word.replace("_", " ").replace("-", " ")
            if len(word) < 3 or re.match(r"\d|0x", word) or word in subject:
                continue
            if not any(word in other or other in word for other in seen):
                seen.append(word)
        return seen[:5]

    def description(self, p: Picture) -> str:
        """The description if it is usable: several words, no web address, not shared by a series; else empty."""
        text = p.description
        if "@" in text or "http" in text or len(text.split()) < 3:
            return ""
        if self._descriptions[text] > 5:
            return ""
        return " ".join(text.split()[:24]).rstrip(" ,;:")

    def raw(self, p: Picture) -> str:
        """A careless alt text: the title, or the plain file name."""
        return p.title if p.title else p.path.rsplit("/", 1)[-1]

    def forms(self, p: Picture) -> list[str]:
        """All informative captions of the image, the simplest first."""
        subject, keywords, topic = self.subject(p), self.keywords(p), self.topic(p)
        description = self.description(p)
        listed = ", ".join([*keywords, topic])
        forms = [
            f"clip art of {subject} with {listed}",
            f"{subject}, a picture of {' and '.join([*keywords[:2], topic])}",
            f"a drawing of {subject} in the {topic} collection",
            f"free {topic} clip art showing {subject}" + (f" ({', '.join(keywords)})" if keywords else ""),
        ]
        if description:
            if no_digits(subject) in no_digits(description):
                forms += [f"{description} ({topic} clip art)"] * 2
            else:
                forms += [f"{subject}: {description} ({topic})"] * 2
        return forms

    def caption(self, p: Picture) -> str:
        """The caption of the image in the demo pool and in the held-out set."""
        forms = self.forms(p)
        if self.description(p) and unit(f"described/{p.path}") < 0.7:
            return forms[-1]
        return forms[int(unit(f"form/{p.path}") * len(forms))]


class WordNet:
    """Checks whether words are English, with the database files of Debian's wordnet-base."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def _lemmas(self) -> dict[str, set[str]]:
        lemmas = {}
        for part in ("noun", "verb", "adj", "adv"):
            lines = (self._folder / f"index.{part}").read_text("latin-1").splitlines()
            words = {line.split(" ", 1)[0] for line in lines if line[:1] != " "}
            exceptions = (self._folder / f"{part}.exc").read_text("latin-1").splitlines()
            lemmas[part] = words | {line.split()[0] for line in exceptions if line.strip()}
        return lemmas

    def is_a(self, word: str, part: str) -> bool:
        words = self._lemmas[part]
        if word in words:
            return True
        endings = {"noun": ("s", "es", "ies"), "verb": ("s", "es", "ed", "ing", "ies"),
                   "adj": ("er", "est"), "adv": ()}[part]  # fmt: skip
        for ending in endings:
            stem = word.removesuffix(ending)
            if stem != word and any(f"{stem}{tail}" in words for tail in ("", "e", "y")):
                return True
            if len(stem) > 2 and stem != word and stem[-1] == stem[-2] and stem[:-1] in words:
                return True
        return False

    def english_with_noun(self, caption: str) -> bool:
        """Whether all words are English, one is a noun, and there are more than two words and five characters."""
        words = re.findall(r"[^\W\d_]+", caption.replace("'s ", " ").lower())
        if len(caption.split()) <= 2 or len(caption) <= 5 or not words:
            return False
        content = [w for w in words if w not in _FUNCTION_WORDS]
        known = all(any(self.is_a(w, p) for p in self._lemmas) for w in content)
        return known and any(self.is_a(w, "noun") for w in content if len(w) > 2)
