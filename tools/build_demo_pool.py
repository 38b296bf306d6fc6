"""Build the demo pool: about 1,200 real, noisy image-text pairs with planted cases of known truth.

    python -m tools.build_demo_pool [--openclipart DIR] [--wordnet DIR] [--fonts DIR] [--output DIR]

Writes `pool/{00000..}.tar` in img2dataset's layout and `labels.csv`, which lists for every sample what was planted and
which rule should drop it. The same packages give the same bytes on every run: nothing depends on time or on unseeded
randomness.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from cv2.data import haarcascades
from PIL import Image, ImageEnhance, ImageOps

from tools import lettering
from tools.openclipart import (
    Captioner,
    Picture,
    WordNet,
    load_pictures,
    load_rgb,
    perceptual_hash,
    unit,
)

SEED = "pairsift demo pool 1"
SAMPLES = 1200
TARS = 4
MIN_SIDE = 200
APART = 5  # hashes of unrelated samples differ in more bits than this; the threshold of the rule is 3

LANGUAGE = """\
Ein alter Bauernhof am Rand des Dorfes mit Blick auf die Berge
Der Hund schläft in der Sonne vor dem Haus
Kinder spielen nach der Schule auf dem Spielplatz
Frisches Brot vom Bäcker um die Ecke
Zwei Segelboote liegen am Abend im Hafen
Wie man einen Fahrradreifen in wenigen Minuten flickt
Le chat de la voisine dort sur le toit
Une tasse de café posée sur la table du jardin
Les enfants jouent au ballon devant l'école
Recette facile de la tarte aux pommes de ma grand-mère
Un bateau quitte le port au lever du soleil
Comment choisir un vélo pour aller au travail
Il gatto nero dorme sulla sedia della cucina
Una barca a vela nel porto al tramonto
La ricetta della nonna per preparare il pane in casa
Gli alberi del parco in una giornata d'autunno
Due bambini giocano con il cane nel giardino
El perro corre por la playa detrás de la pelota
Una casa blanca con ventanas azules junto al mar
Los niños van a la escuela en autobús todos los días
Cómo preparar una paella para toda la familia
Un mercado de frutas y verduras en el centro del pueblo
O gato está dormindo em cima do telhado da casa
Uma xícara de café com leite e um pão de queijo
As crianças brincam na praia durante as férias de verão
De hond ligt te slapen voor de open haard
Een oude fiets staat tegen de muur van het huis
Kinderen spelen buiten in de sneeuw na het eten
Собака бежит по снегу рядом с домом
Старый деревянный дом на берегу реки
Рецепт вкусного яблочного пирога к чаю
一只小猫在沙发上睡觉
夏天的海边有很多五颜六色的帆船
如何在家里制作新鲜的面包
公園のベンチで本を読んでいる女の人
庭に咲いている赤いバラの花
Stary młyn nad rzeką w pobliżu lasu
En gammal röd stuga vid sjön mitt i skogen
Bahçede oynayan çocuklar ve küçük bir köpek
나무 아래에서 책을 읽고 있는 소녀
""".splitlines()

FREQUENT = (
    "free clip art picture to download for your web page",
    "click here to see a larger image of this drawing",
    "a picture from our collection of public drawings",
)
FREQUENT_EACH = 14

NAMES_NUMBERS = """\
John Smith 2004
Michael Johnson and Mary Williams
New York 1998
James Brown 07/12/2003
London England 1999 - 2001
Peter Jackson 555 1234
George Washington 1776
Chicago 2005 #14
Robert Taylor, Boston 1987
William Shakespeare 1564 - 1616
Elizabeth Taylor 1963
Thomas Edison 1879
Los Angeles 1984
David Miller & Susan Miller
Texas 2002 / 2003
Henry Ford 1908
Jack Wilson 12345
Washington D.C. 2001
Sarah Jones 10/31/2004
Abraham Lincoln 1861 - 1865
Charles Dickens 1843
Margaret Thatcher 1979
Kevin Murphy 2010
Mark Twain 1884
""".splitlines()

SHORT = """\
sun
cat
red car
a tree
blue bird
two fish
my house
clip art
flower
a hat
old clock
big dog
green apple
the moon
x y z
a b
door
star
book
nice
""".splitlines()

FACE_CAPTIONS = """\
close portrait of a smiling woman in an orange space suit
the face of an astronaut looking into the camera
a smiling woman photographed from very near
official photograph of an astronaut, cropped to the face
portrait of a woman with short curly hair
a happy astronaut smiles at the photographer
passport photograph of a smiling woman
black and white portrait of an astronaut
a woman's face with a wide smile
head of an astronaut in front of a flag
old photograph of a smiling pilot
profile picture of a woman who flew into space
the friendly face of a space pilot
close view of a woman's eyes and smile
""".splitlines()

COUNTS = {
    "exact_copy": 30, "near_copy": 36, "language": len(LANGUAGE), "frequent_caption": 42,
    "names_numbers": len(NAMES_NUMBERS), "aspect": 16, "small": 20, "face": len(FACE_CAPTIONS),
    "short_caption": len(SHORT), "swapped": 36, "text_only": 36, "digit": 70,
    "truncated": 12, "undecodable": 12, "missing_caption": 12,
}  # fmt: skip
RULES = {
    "exact_copy": "near_duplicate", "near_copy": "near_duplicate", "language": "language",
    "frequent_caption": "caption_frequency", "names_numbers": "pos_pattern",
    "aspect": "aspect_ratio", "small": "min_side", "face": "face_area",
    "short_caption": "caption_length", "swapped": "flipped_clip|image_text_matching",
    "text_only": "flipped_clip|image_text_matching", "truncated": "undecodable_image",
    "undecodable": "undecodable_image", "missing_caption": "missing_caption",
}  # fmt: skip


@dataclass
class Sample:
    """One sample before it is assigned to a tar: the encoded image, its caption and its label."""

    name: str
    data: bytes
    suffix: str
    caption: str | None
    kind: str = ""
    source: str = ""
    of: Sample | None = None
    digit: bool = False
    extra: dict[str, object] = field(default_factory=dict)
    uid: str = ""

    def __post_init__(self) -> None:
        # Of two equal images the rule keeps the smaller uid, and the label says that the copy is dropped.
        for attempt in range(100_000):
            self.uid = hashlib.sha256(f"{SEED}/{self.name}/{attempt}".encode()).hexdigest()[:32]
            if self.of is None or self.uid > self.of.uid:
                return


def encode(image: Image.Image, suffix: str, quality: int = 62) -> bytes:
    out = io.BytesIO()
    if suffix == "png":
        image.quantize(64, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    elif suffix == "webp":
        image.save(out, "WEBP", quality=quality, method=4)
    else:
        image.save(out, "JPEG", quality=quality, optimize=True)
    return out.getvalue()


def usual_suffix(name: str) -> str:
    share = unit(f"suffix/{name}")
    return "png" if share < 0.07 else "webp" if share < 0.15 else "jpg"


def scaled(image: Image.Image, shorter: int) -> Image.Image:
    """The image, resized to the given shorter side."""
    factor = shorter / min(image.size)
    size = max(round(image.width * factor), shorter), max(round(image.height * factor), shorter)
    return image.resize(size, Image.Resampling.LANCZOS)


def symmetric(image: Image.Image) -> bool:
    """Whether many low DCT frequencies are about equal, as in symmetric or almost empty images.

    Noise then decides which of them are above the median, and a DCT hash cannot recognise a copy. No near copies of
    such images are planted.
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), np.float32)
    low = cv2.dct(grey)[:8, :8].ravel()
    return int((np.abs(low - np.median(low)) < 3).sum()) > 2


class Builder:
    """Takes the images of the demo split one after another and turns them into samples."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.root: Path = args.openclipart
        self.fonts: Path = args.fonts
        self.wordnet = WordNet(args.wordnet)
        pictures, _ = load_pictures(self.root, 64)
        self.captioner = Captioner(pictures)
        self.samples: list[Sample] = []
        self._hashes: list[int] = []
        self._captions: Counter[str] = Counter()
        demo = [p for p in pictures if p.split == "demo"]
        self._queue = sorted(demo, key=lambda p: unit(f"{SEED}/order/{p.path}"))

    def distinct(self, image: Image.Image) -> bool:
        """Whether the image differs from all earlier ones. If so, it is remembered."""
        value = perceptual_hash(image)
        near = np.bitwise_count(np.array(self._hashes, np.uint64) ^ np.uint64(value)) <= APART
        if near.any():
            return False
        self._hashes.append(value)
        return True

    def pictures(self, clean: bool = True) -> Iterator[tuple[Picture, Image.Image, str]]:
        """Unused images with their captions; with `clean`, only English captions with a noun."""
        for picture in list(self._queue):
            caption = self.captioner.caption(picture)
            if clean and not self.wordnet.english_with_noun(caption):
                continue
            if self._captions[caption.lower()] >= 3:
                continue
            image = load_rgb(self.root, picture)
            if image is None or max(image.size) / min(image.size) > 2.6:
                continue
            if not self.distinct(image):
                continue
            self._queue.remove(picture)
            self._captions[caption.lower()] += 1
            shorter = MIN_SIDE + 2 + int(unit(f"side/{picture.path}") * 16)
            yield picture, scaled(image, shorter), caption

    def add(self, kind: str, image: Image.Image, caption: str | None, source: str,
            **more: object) -> Sample:  # fmt: skip
        name = f"{kind}/{len(self.samples)}/{source}"
        suffix = usual_suffix(name)
        self.samples.append(
            Sample(name, encode(image, suffix), suffix, caption, kind, source, **more)  # type: ignore[arg-type]
        )
        return self.samples[-1]

    def build(self) -> list[Sample]:
        self.digits()
        self.text_only()
        self.swapped()
        self.faces()
        self.copies()
        self.captions()
        self.shapes()
        self.broken()
        for clean in (True, False):  # clean captions first, then noisy ones for the remaining samples
            for (picture, image, caption), index in zip(
                self.pictures(clean), range(SAMPLES - len(self.samples)), strict=False
            ):
                careless = not clean and index % 3 == 0
                text = self.captioner.raw(picture) if careless else caption
                self.add("", image, text, picture.path)
        often = Counter(s.caption for s in self.samples if not s.kind)
        for sample in self.samples:
            if not sample.kind and often[sample.caption] > 10:  # not planted, but frequent all the same
                sample.kind = "frequent_caption"
        return self.samples

    def digits(self) -> None:
        """Images with a number written on them, and a caption that names the number."""
        for _, (picture, image, caption) in zip(range(COUNTS["digit"]), self.pictures(), strict=False):
            rng = random.Random(f"{SEED}/digit/{picture.path}")
            text = lettering.number(rng)
            image = lettering.stamp(image, text, rng, self.fonts, rng.uniform(0.25, 0.45))
            self.add("digit", image, f"{caption} with the number {text}", picture.path, digit=True)

    def text_only(self) -> None:
        """Plain images that show only the words of their caption."""
        written: set[str] = set()
        for picture in list(self._queue):
            if len(written) == COUNTS["text_only"]:
                return
            caption = self.captioner.caption(picture)
            text = self.captioner.words(picture)
            if not self.wordnet.english_with_noun(caption) or re.search(r"\d", caption):
                continue
            if len(text) > 30 or text.lower() in written:
                continue
            rng = random.Random(f"{SEED}/text/{picture.path}")
            shorter = MIN_SIDE + 8 + rng.randrange(20)
            size = round(shorter * rng.uniform(1, 1.6)), shorter
            image = lettering.plate(text, size, rng, self.fonts)
            if self.distinct(image):
                self._queue.remove(picture)
                written.add(text.lower())
                self.add("text_only", image, caption, "lettering")

    def swapped(self) -> None:
        """Images with the caption of an image from another folder."""
        drawn = [found for _, found in zip(range(COUNTS["swapped"]), self.pictures(), strict=False)]
        drawn.sort(key=lambda found: found[0].path)
        half = len(drawn) // 2
        for i, (picture, image, _) in enumerate(drawn):
            other, _, caption = drawn[(i + half) % len(drawn)]
            if other.path.split("/")[0] == picture.path.split("/")[0]:
                other, _, caption = drawn[(i + half // 2) % len(drawn)]
            self.add("swapped", image, caption, picture.path)

    def faces(self) -> None:
        """Crops of NASA's public-domain portrait of an astronaut, in which the face covers over 0.4 of the area."""
        from skimage.data import astronaut  # only this tool needs scikit-image

        portrait = Image.fromarray(astronaut())
        finder = cv2.CascadeClassifier(haarcascades + "haarcascade_frontalface_default.xml")
        grey = cv2.cvtColor(np.asarray(portrait), cv2.COLOR_RGB2GRAY)
        x, y, side, _ = (int(v) for v in finder.detectMultiScale(grey, 1.1, 5, minSize=(60, 60))[0])
        for i, caption in enumerate(FACE_CAPTIONS):
            in_json = i % 2 == 0
            for attempt in range(400):
                rng = random.Random(f"{SEED}/face/{i}/{attempt}")
                frame = side * rng.uniform(1.26, 1.44)
                left = x - rng.uniform(0.05, 0.95) * (frame - side)
                top = y - rng.uniform(0.05, 0.95) * (frame - side)
                image = portrait.rotate(rng.uniform(-7, 7), Image.Resampling.BICUBIC,
                                        center=(x + side / 2, y + side / 2))  # fmt: skip
                image = image.resize(
                    (224 + 4 * i, 224 + 4 * i),
                    Image.Resampling.LANCZOS,
                    box=(left, top, left + frame, top + frame),
                )
                box = [(x - left) / frame, (y - top) / frame,
                       (x + side - left) / frame, (y + side - top) / frame]  # fmt: skip
                if rng.random() < 0.5:
                    image = ImageOps.mirror(image)
                    box[0], box[2] = 1 - box[2], 1 - box[0]
                if i % 3 == 1:
                    image = ImageOps.grayscale(image).convert("RGB")
                image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.85, 1.15))
                grey = np.asarray(image.convert("L"))
                found = finder.detectMultiScale(grey, 1.1, 5, minSize=(40, 40))
                share = max((int(w) * int(h) for _, _, w, h in found), default=0) / grey.size
                if (in_json or share > 0.45) and self.distinct(image):
                    break
            else:
                raise SystemExit(f"no usable crop for face {i}")
            extra = {"face_bboxes": [[round(v, 4) for v in box]]} if in_json else {}
            self.add("face", image, caption, "skimage.data.astronaut", extra=extra)

    def copies(self) -> None:
        """Copies of samples that pass the other rules; a copy never ranks above its original."""
        for _, (picture, image, caption) in zip(range(COUNTS["exact_copy"]), self.pictures(), strict=False):
            original = self.add("", image, caption, picture.path)
            other = self.captioner.forms(picture)[2]
            self.samples.append(
                Sample(
                    f"copy of {original.name}",
                    original.data,
                    original.suffix,
                    other,
                    "exact_copy",
                    picture.path,
                    original,
                )
            )
        robust = (found for found in self.pictures() if not symmetric(found[1]))
        for _, (picture, image, caption) in zip(range(COUNTS["near_copy"]), robust, strict=False):
            rng = random.Random(f"{SEED}/near/{picture.path}")
            image = load_rgb(self.root, picture) or image
            smaller, larger = MIN_SIDE + 6 + rng.randrange(20), rng.uniform(1 / 0.8, 1.04)
            original = self.add("", scaled(image, round(smaller * larger)), caption, picture.path)
            trim = [rng.uniform(0.001, 0.004) * n for n in (*image.size, *image.size)]
            right, bottom = image.width - round(trim[2]), image.height - round(trim[3])
            copy = scaled(image.crop((round(trim[0]), round(trim[1]), right, bottom)), smaller)
            quality = rng.randrange(50, 85)
            suffix = rng.choice(("jpg", "jpg", "webp"))
            self.samples.append(
                Sample(
                    f"near copy of {original.name}",
                    encode(copy, suffix, quality),
                    suffix,
                    self.captioner.forms(picture)[2],
                    "near_copy",
                    picture.path,
                    original,
                )
            )

    def captions(self) -> None:
        """Good images with captions that a caption rule drops."""
        planted = [
            *(("language", text) for text in LANGUAGE),
            *(("frequent_caption", text) for text in FREQUENT for _ in range(FREQUENT_EACH)),
            *(("names_numbers", text) for text in NAMES_NUMBERS),
            *(("short_caption", text) for text in SHORT),
        ]
        for (kind, text), (picture, image, _) in zip(planted, self.pictures(clean=False), strict=False):
            self.add(kind, image, text, picture.path)

    def shapes(self) -> None:
        """Images with an aspect ratio above 3:1 (with a sufficient shorter side), and tiny images."""
        for index in range(COUNTS["aspect"]):
            drawn = [found for _, found in zip(range(2), self.pictures(clean=False), strict=False)]
            side = MIN_SIDE + 4 + index % 5 * 4
            strip = Image.new("RGB", (round(side * 3.2) + 20 * index, side), "white")
            for slot in range(4):
                tile = ImageOps.contain(drawn[slot % 2][1], (strip.width // 4 - 4, side))
                strip.paste(tile, (slot * strip.width // 4, (side - tile.height) // 2))
            if index % 2:
                strip = strip.transpose(Image.Transpose.ROTATE_90)
            names = " and ".join(self.captioner.subject(p) for p, _, _ in drawn)
            self.add(
                "aspect",
                strip,
                f"a long banner that shows the drawings of {names} in a row",
                drawn[0][0].path,
            )
        for _, (picture, image, caption) in zip(range(COUNTS["small"]), self.pictures(clean=False), strict=False):
            shorter = 48 + int(unit(f"small/{picture.path}") * 140)
            self.add("small", scaled(image, shorter), caption, picture.path)

    def broken(self) -> None:
        """Truncated files, files that are not images, and samples without a caption."""
        for _, (picture, image, caption) in zip(range(COUNTS["truncated"]), self.pictures(clean=False), strict=False):
            data = encode(image, "jpg")
            data = data[: int(len(data) * (0.3 + 0.3 * unit(f"cut/{picture.path}")))]
            name = f"truncated/{picture.path}"
            self.samples.append(Sample(name, data, "jpg", caption, "truncated", picture.path))
        for i in range(COUNTS["undecodable"]):
            name = f"undecodable/{i}"
            data = b"<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>\n"
            if i % 3:
                data = random.Random(f"{SEED}/{name}").randbytes(2000)
            caption = f"a drawing that the server no longer has, number {i}"
            suffix = ("jpg", "png", "webp")[i % 3]
            self.samples.append(Sample(name, data, suffix, caption, "undecodable", "made"))
        for _, (picture, image, _) in zip(range(COUNTS["missing_caption"]), self.pictures(clean=False), strict=False):
            self.add("missing_caption", image, None, picture.path)


def size_of(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    except OSError:
        return 256, 256  # the size that the crawler recorded


def write(samples: list[Sample], wordnet: WordNet, output: Path) -> None:
    """Write the tars and the labels, with samples in an order that depends only on their uids."""
    pool = output / "pool"
    pool.mkdir(parents=True, exist_ok=True)
    placed = sorted(samples, key=lambda s: unit(f"{SEED}/place/{s.uid}"))
    per_tar = -(-len(placed) // TARS)
    rows = []
    for number in range(TARS):
        shard = f"{number:05d}.tar"
        with tarfile.open(pool / shard, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index, sample in enumerate(placed[number * per_tar : (number + 1) * per_tar]):
                key = f"{number:05d}{index:04d}"
                members = [(sample.suffix, sample.data)]
                if sample.caption is not None:
                    members.append(("txt", sample.caption.encode()))
                members.append(("json", json.dumps(_metadata(sample, key)).encode()))
                for suffix, data in members:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
                unplanted = sample.caption and wordnet.english_with_noun(sample.caption)
                rows.append({
                    "shard": shard, "key": key, "uid": sample.uid, "kind": sample.kind,
                    "rule": RULES.get(sample.kind, ""), "digit": int(sample.digit),
                    "english_noun": int(bool(unplanted)), "source": sample.source,
                    "of": sample.of.uid if sample.of else "",
                })  # fmt: skip
    with (output / "labels.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _metadata(sample: Sample, key: str) -> dict[str, object]:
    width, height = size_of(sample.data)
    path = re.sub(r"[^a-z0-9/]+", "-", sample.source.lower())
    return {
        "uid": sample.uid,
        "url": f"https://pictures.example.org/{path}-{sample.uid[:6]}.{sample.suffix}",
        "key": key,
        "status": "success",
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "sha256": hashlib.sha256(sample.data).hexdigest(),
        **sample.extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--openclipart", type=Path, default=Path("/usr/share/openclipart"))
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--fonts", type=Path, default=lettering.FONTS)
    parser.add_argument("--output", type=Path, default=Path("pipeline/demo"))
    args = parser.parse_args()
    builder = Builder(args)
    write(builder.build(), builder.wordnet, args.output)
    counts = Counter(sample.kind or "unplanted" for sample in builder.samples)
    print(f"{len(builder.samples)} samples:", dict(counts.most_common()))


if __name__ == "__main__":
    main()
