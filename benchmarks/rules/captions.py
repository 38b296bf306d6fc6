"""Labelled captions: the committed tables, and those of folders that are not part of the project."""

from __future__ import annotations

import csv
import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.rules.figures import SETS


def table(name: str, folder: Path = SETS) -> list[dict[str, str]]:
    """The rows of a tab-separated table with a header."""
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def held_out(captions: Iterable[str]) -> list[str]:
    """The half of the different captions, by sha256, on which no setting was chosen; in order."""
    return [caption for caption in dict.fromkeys(captions) if hashlib.sha256(caption.encode()).digest()[3] & 1]


def cut(captions: Iterable[str], words: int) -> list[str]:
    """The first words of each caption that has more, each text once."""
    parts = (caption.split() for caption in captions)
    return list(dict.fromkeys(" ".join(part[:words]) for part in parts if len(part) > words))


def by_hash(captions: Iterable[str], name: str, column: str) -> dict[str, str]:
    """The captions that a committed table labels, with their labels. It names them by 64 bits of their sha256, because
    their texts are not part of the project."""
    labels = {row["caption_sha256"]: row[column] for row in table(name)}
    found = ((caption, labels.get(sha256(caption)[:16])) for caption in captions)
    return {caption: label for caption, label in found if label is not None}


def sha256(caption: str) -> str:
    """The hash of a caption, in hex."""
    return hashlib.sha256(caption.encode()).hexdigest()


def flickr8k(data: Path, splits: Iterable[str]) -> list[str]:
    """The true captions of Flickr8k, if the folder has them."""
    rows = table("flickr8k_rows.tsv", data / "proof")
    chosen = set(splits)
    return list(dict.fromkeys(row["caption"] for row in rows if row["verdict"] == "match" and row["split"] in chosen))


def pool(folder: Path) -> Iterator[str]:
    """The captions of a webdataset."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                    yield " ".join(file.read().decode("utf-8", "replace").split())
