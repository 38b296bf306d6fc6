"""The files of a tar that make up a sample: which sample a member belongs to, and what it is, by its name alone."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from pipeline.sources.pool import shortened
from transforms.core.recipe import PoolSettings

Kind = Literal["image", "caption", "metadata"]

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
_OTHER_EXTENSIONS = ("heic", "heif", "jp2", "jxl", "txt", "json")
MAX_NAMES = 12  # of one sample, for messages


class MemberName(NamedTuple):
    """What a name says of a member.

    `key` names the sample, `kind` is None for a file that is not read but is a sign of a sample (k.heic). `rank` orders
    files of one kind: the smallest is used. `max_bytes` is the recipe's limit. `full_length` is that of the key before
    it was shortened.
    """

    key: str
    kind: Kind | None
    rank: int
    max_bytes: int
    full_length: int


class NameReader:
    """Reads member names as the recipe says. A name has the form [folder/]key.suffix.

    The suffix is the longest one that the recipe lists, so `k.image.jpg` is the image of k, and `22.05.jpg` that of
    22.05. A hidden file belongs to no sample, as in webdataset.
    """

    def __init__(self, pool: PoolSettings) -> None:
        listed: dict[Kind, tuple[list[str], int]] = {
            "image": (pool.image_members, pool.max_image_bytes),
            "caption": (pool.caption_members, pool.max_caption_bytes),
            "metadata": (pool.json_members, pool.max_json_bytes),
        }
        self._known: dict[str, tuple[Kind, int, int]] = {}
        for kind, (suffixes, max_bytes) in listed.items():
            for rank, suffix in enumerate(suffixes):
                for name in _expanded(suffix):
                    self._known.setdefault(name, (kind, rank, max_bytes))
        self._signs = {*IMAGE_EXTENSIONS, *_OTHER_EXTENSIONS, *(name.rpartition(".")[2] for name in self._known)}
        self._max_key = pool.max_key_characters

    def read(self, name: str) -> MemberName | None:
        """Return what a member's name says, or None for a file that belongs to no sample."""
        start = name.rfind("/") + 1
        dot = name.find(".", start)
        if dot <= start:  # without an extension, or hidden
            return None
        while dot >= 0:
            known = self._known.get(name[dot + 1 :].lower())
            if known:
                return MemberName(self._key(name, dot), *known, dot)
            last, dot = dot, name.find(".", dot + 1)
        if name[last + 1 :].lower() in self._signs:
            return MemberName(self._key(name, last), None, 0, 0, last)
        return None

    def _key(self, name: str, length: int) -> str:
        return name[:length] if length <= self._max_key else shortened(name[:length], self._max_key)


def _expanded(suffix: str) -> list[str]:
    if not suffix.endswith("*"):
        return [suffix]
    return [suffix[:-1] + extension for extension in IMAGE_EXTENSIONS]


class File(NamedTuple):
    """A file of a sample: its content, its lower-case extension, and the byte of the tar at which it begins."""

    content: bytes
    extension: str
    offset: int


@dataclasses.dataclass(slots=True)
class Members:
    """The files of a tar with one key, and the first fault found in them (reason, message).

    `names` are the names of the first of them. `is_repeated`: an earlier sample of the tar has the key.
    `may_lack_files`: the tar breaks off, and more files of the sample may be behind that place.
    """

    key: str
    image: File | None = None
    caption: File | None = None
    metadata: File | None = None
    fault: tuple[str, str] | None = None
    names: tuple[str, ...] = ()
    is_repeated: bool = False
    may_lack_files: bool = False

    @property
    def listing(self) -> str:
        """The names for a message."""
        return ", ".join(self.names) + (", …" if len(self.names) == MAX_NAMES else "")
