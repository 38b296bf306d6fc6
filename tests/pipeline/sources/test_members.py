"""Which sample a member belongs to, and what it is, by its name."""

from __future__ import annotations

import pytest

from pipeline.sources.members import NameReader
from transforms.core.recipe import PoolSettings

DEFAULT = NameReader(PoolSettings())


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("k.jpg", "k", "image"), ("k.JPEG", "k", "image"), ("a/k.webp", "a/k", "image"), ("k.image.png", "k", "image"),
        ("k.img.jpg", "k", "image"), ("k.txt", "k", "caption"), ("k.caption", "k", "caption"),
        ("k.cap", "k", "caption"), ("k.Caption.TXT", "k", "caption"), ("k.json", "k", "metadata"),
        ("k.meta.json", "k", "metadata"), ("22.05.jpg", "22.05", "image"), ("0.5x.txt", "0.5x", "caption"),
        ("v1.2/k.jpg", "v1.2/k", "image"), ("k.seg.png", "k.seg", "image"), ("22.05.image.jpg", "22.05", "image"),
        ("k.gif", "k", "image"), ("k.heic", "k", None), ("k.v2.jxl", "k.v2", None),
    ],
)  # fmt: skip
def test_names_by_default(name: str, key: str, kind: str | None) -> None:
    found = DEFAULT.read(name)
    assert found is not None
    assert (found.key, found.kind) == (key, kind)


@pytest.mark.parametrize("name", ["README", "README.md", "k.npy", ".hidden.txt", "._k.jpg", "sub/.jpg", "k.", "", "j"])
def test_files_of_no_sample(name: str) -> None:
    assert DEFAULT.read(name) is None


def test_the_recipe_names_the_members() -> None:
    names = NameReader(PoolSettings(image_members=["512.*"], caption_members=["alt", "de.txt"], json_members=[]))
    found = {name: names.read(name) for name in ("k.512.png", "k.jpg", "k.alt", "k.de.txt", "k.txt", "k.json")}
    assert {name: one and (one.key, one.kind, one.rank) for name, one in found.items()} == {
        "k.512.png": ("k", "image", 0), "k.jpg": ("k", None, 0), "k.alt": ("k", "caption", 0),
        "k.de.txt": ("k", "caption", 1), "k.txt": ("k", None, 0), "k.json": ("k", None, 0),
    }  # fmt: skip
