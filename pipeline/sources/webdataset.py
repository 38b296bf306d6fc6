"""Reads webdataset tars as img2dataset and DataComp write them: `key.{jpg,jpeg,png,webp}`, `key.txt`, `key.json`.

Members are streamed, not extracted to disk. Tars are untrusted input.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.sources.pool import shortened
from pipeline.sources.tars import BrokenTar, TarMember, tar_members
from transforms.core.recipe import PoolSettings
from transforms.core.records import Annotation, DeadLetter, Sample, Shard, dead_letter, uid_of
from transforms.storage.steady_reader import SteadyReader

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_OTHER_PICTURES = ("avif", "bmp", "gif", "heic", "jxl", "tif", "tiff")

_JSON_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)
_FIELDS = {"txt": "caption", "json": "metadata"} | dict.fromkeys(IMAGE_EXTENSIONS, "image")


@dataclasses.dataclass
class Members:
    """The files of a tar with one key, as bytes, and the first fault found in them (reason, message).

    `offsets` maps each lower-case extension to the byte of the tar at which the file's content begins.
    """

    key: str
    image: bytes | None = None
    caption: bytes | None = None
    metadata: bytes | None = None
    fault: tuple[str, str] | None = None
    offsets: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        """Whether all files of the sample have been read without a fault."""
        return self.fault is None and None not in (self.image, self.caption, self.metadata)


@dataclasses.dataclass
class Reading:
    """A record of one pass over a tar.

    `keys` is the key of each sample, derived from member names independently of the parsed samples. `size_bytes` is the
    number of bytes read, set at the end of the pass.
    """

    keys: list[str] = dataclasses.field(default_factory=list)
    size_bytes: int = 0


def read_members(path: str, bounds: PoolSettings, reading: Reading | None = None) -> Iterator[Members]:
    """Yield the files of the tar at `path`, grouped by consecutive key in tar order, including incomplete samples.

    Fills in `reading`. Raises files.ReadFailed, and BrokenTar after the last complete sample.
    """
    reading = reading or Reading()
    with SteadyReader(path) as file:
        try:
            yield from _grouped(_noting_keys(tar_members(file, bounds), reading.keys, bounds), bounds)
        finally:
            reading.size_bytes += file.tell()


def _noting_keys(members: Iterable[TarMember], keys: list[str], bounds: PoolSettings) -> Iterator[TarMember]:
    for member in members:
        name, extension = _split(member.name)
        key = shortened(name, bounds.max_key_characters)
        if (extension in _FIELDS or _belongs_to_a_sample(extension)) and [key] != keys[-1:]:
            keys.append(key)
        yield member


def read_samples(
    shard: Shard, bounds: PoolSettings, stage: str, reading: Reading | None = None
) -> Iterator[Sample | DeadLetter]:
    """Yield the samples of a shard in tar order, with undecoded images, and a dead letter for each invalid sample.

    If the tar is damaged, one dead letter with the offset stands for everything after the damage. A filesystem error
    raises files.ReadFailed instead: it may be temporary, and a finished table without the samples would hide it
    permanently. Fills in `reading` as `read_members` does.
    """
    seen: set[str] = set()
    try:
        for members in read_members(shard.path, bounds, reading):
            if members.key in seen:
                # A uid derived from the key would be that of the earlier sample.
                message = "an earlier sample of this tar has the same key"
                yield DeadLetter(shard.name, members.key, "", stage, "duplicate_key", message)
                continue
            seen.add(members.key)
            yield _sample(shard, members, bounds, stage)
    except BrokenTar as error:
        yield DeadLetter(shard.name, "", "", stage, error.reason, str(error)[:500])


def _sample(shard: Shard, members: Members, bounds: PoolSettings, stage: str) -> Sample | DeadLetter:
    metadata, fault = _metadata(members, bounds)
    named = Annotation(uid_of(shard.name, members.key, metadata), shard.name, members.key, "")
    fault = members.fault or fault
    if fault:
        return dead_letter(named, stage, *fault)
    if members.image is None:
        return dead_letter(named, stage, "missing_image", f"no member {members.key}.{{{','.join(IMAGE_EXTENSIONS)}}}")
    if members.caption is None:
        return dead_letter(named, stage, "missing_caption", f"no member {members.key}.txt")
    try:
        caption = members.caption.decode("utf-8")
    except UnicodeDecodeError as error:
        return dead_letter(named, stage, "undecodable_caption", str(error))
    return Sample(named.with_columns(caption=caption), metadata, members.image)


def _metadata(members: Members, bounds: PoolSettings) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Return the JSON object of a sample and its fault (reason, message), or None if it has no fault."""
    if members.metadata is None:
        return {}, None
    try:
        text = members.metadata.decode(json.detect_encoding(members.metadata), "surrogatepass")
        # Checked before parsing, because the parser's own depth limit depends on the depth of the call stack.
        if _nests_deeper(text, bounds.max_json_depth):
            message = f"lists and objects are nested too deeply; the recipe allows {bounds.max_json_depth} levels"
            return {}, ("json_too_deep", message)
        metadata = json.loads(text)
    except ValueError as error:
        return {}, ("undecodable_json", str(error))
    if not isinstance(metadata, dict):
        return {}, ("undecodable_json", f"expected a JSON object, got {type(metadata).__name__}")
    return metadata, None


def _nests_deeper(text: str, max_depth: int) -> bool:
    """Return whether lists and objects of a JSON text are nested deeper than `max_depth`."""
    if text.count("[") + text.count("{") <= max_depth:
        return False
    depth = 0
    for found in _JSON_STRING_OR_BRACKET.finditer(text):
        depth += (found[1] is not None) - (found[2] is not None)
        if depth > max_depth:
            return True
    return False


def _grouped(members: Iterable[TarMember], bounds: PoolSettings) -> Iterator[Members]:
    """Group consecutive members with the same key. On a damaged tar, yields the last complete group, then raises."""
    group: Members | None = None
    try:
        for member in members:
            name, extension = _split(member.name)
            if not (extension in _FIELDS or _belongs_to_a_sample(extension)):
                continue
            key = shortened(name, bounds.max_key_characters)
            if group is not None and group.key != key:
                yield group
                group = None
            group = group or Members(key)
            if key != name:
                message = f"the key has {len(name)} characters; the recipe allows {bounds.max_key_characters}"
                group.fault = group.fault or ("key_too_long", message)
            if extension in _FIELDS:
                _take(member, extension, group, bounds)
    except BrokenTar:
        # A sample that may have lost a member is covered by the tar's dead letter and gets none of its own.
        if group is not None and group.is_complete:
            yield group
        raise
    if group is not None:
        yield group


def _split(name: str) -> tuple[str, str]:
    """Return the key and the lower-case extension of a member. As in webdataset, a hidden file has no extension."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


def _belongs_to_a_sample(extension: str) -> bool:
    """Return whether a member that is not read still indicates a sample, so that the sample gets a dead letter.

    This is the case for an image in another format (k.gif), and for a key with a dot (k.v2.jpg), because webdataset
    ends the key at the first dot.
    """
    return extension.rpartition(".")[2] in (*_FIELDS, *_OTHER_PICTURES)


def _take(member: TarMember, extension: str, group: Members, bounds: PoolSettings) -> None:
    """Read one member into its group, or record its fault."""
    field = _FIELDS[extension]
    limit_bytes = {
        "image": bounds.max_image_bytes, "caption": bounds.max_caption_bytes, "metadata": bounds.max_json_bytes
    }[field]  # fmt: skip
    if not member.is_file:
        group.fault = group.fault or ("unsupported_member", f"{member.name} is a link, a device or a sparse file")
    elif getattr(group, field) is not None:
        group.fault = group.fault or ("duplicate_member", f"a second {field}: {member.name}")
    elif member.size_bytes > limit_bytes:
        message = f"{member.name} has {member.size_bytes} bytes; the recipe allows {limit_bytes}"
        group.fault = group.fault or (f"{field}_too_large", message)
    else:
        setattr(group, field, member.read(-1))
        group.offsets[extension] = member.offset
