"""Reads the pairs of webdataset tars: an image and its caption each, with what the pool's json says of them.

docs/pools.md says which names and layouts are read. Members are not extracted to disk. Tars are untrusted input.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

from pipeline.sources.grouping import MAY_LACK_FILES, Fault, Reading, group_members
from pipeline.sources.json_fields import UnusableJson, parse_fields
from pipeline.sources.members import IMAGE_EXTENSIONS, Members
from pipeline.sources.parquet_fields import ParquetFields
from pipeline.sources.tars import BrokenTar, tar_members
from transforms.core import catalogue
from transforms.core.recipe import PoolSettings
from transforms.core.records import (
    UID_REPLACED,
    Annotation,
    DeadLetter,
    Sample,
    Shard,
    caption_uid,
    dead_letter,
    pool_uid,
    substitute_uid,
)
from transforms.single_modality.image_shape import SIZE_FIELDS
from transforms.storage.steady_reader import SteadyReader

_MAX_KEPT_CHARACTERS = 10_000  # of one field


def read_members(path: str, pool: PoolSettings, reading: Reading | None = None) -> Iterator[Members]:
    """Yield the files of the tar at `path` by sample, including incomplete samples.

    Fills in `reading`. Raises files.ReadFailed, and BrokenTar after the samples before the damage.
    """
    reading = reading or Reading()
    with SteadyReader(path) as file:
        try:
            yield from group_members(path, tar_members(file, pool), pool, reading)
        finally:
            reading.size_bytes += file.tell()


def read_samples(
    shard: Shard, pool: PoolSettings, stage: str, reading: Reading | None = None
) -> Iterator[Sample | DeadLetter]:
    """Yield the samples of a shard in tar order, with undecoded images, and a dead letter for each invalid sample.

    If the tar is damaged, one dead letter with the offset stands for everything after the damage. A filesystem error
    raises files.ReadFailed instead: it may be temporary, and a finished table without the samples would hide it
    permanently. Fills in `reading` as `read_members` does.
    """
    try:
        for _, samples in read_pairs(shard, pool, stage, reading):
            yield from samples
    except BrokenTar as error:
        yield DeadLetter(shard.name, "", "", stage, error.reason, str(error)[:500])


def read_pairs(
    shard: Shard, pool: PoolSettings, stage: str, reading: Reading | None = None
) -> Iterator[tuple[Members, list[Sample | DeadLetter]]]:
    """Yield each key's files and its samples: one, or one for each of several captions. Raises as `read_members`."""
    reading, seen = reading or Reading(), set[str]()
    form = _SampleFormer(shard, pool, stage)
    for members in read_members(shard.path, pool, reading):
        samples = form.samples(members)
        if len(samples) > 1:
            reading.keys[-1:] = map(key_of, samples)
        for index, key in enumerate(map(key_of, samples)):
            if key in seen:  # k#1 beside two captions of k
                samples[index] = form.repeated(key)
            seen.add(key)
        yield members, samples


def key_of(sample: Sample | DeadLetter) -> str:
    """Return the key of a sample or of its dead letter."""
    return sample.annotation.key if isinstance(sample, Sample) else sample.key


class _SampleFormer:
    """Forms samples from the files of each key of a shard."""

    def __init__(self, shard: Shard, pool: PoolSettings, stage: str) -> None:
        self._shard, self._pool, self._stage = shard, pool, stage
        self._wanted = {
            *SIZE_FIELDS, *catalogue.metadata_fields(), *pool.uid_fields, *pool.caption_fields, *pool.keep_columns
        }  # fmt: skip
        self._kept_fields, self._caption_fields = frozenset(pool.keep_columns), frozenset(pool.caption_fields)
        self._parquet = ParquetFields(shard.path, self._wanted, pool)

    def samples(self, members: Members) -> list[Sample | DeadLetter]:
        """Return the samples of a key, or its dead letter."""
        if members.is_repeated:
            return [self.repeated(members.key)]
        metadata, fault = self._metadata(members)
        captions, fault = self._captions(members, metadata, members.fault or fault)
        given = next((metadata[field] for field in self._pool.uid_fields if field in metadata), None)
        uid = pool_uid(given)
        if fault:
            return [self._dead(members, uid, fault)]
        columns = {}
        if given is not None and uid is None:
            columns["pool_notes"] = UID_REPLACED
        if self._pool.keep_columns:
            kept = {name: _as_text(metadata[name]) for name in self._pool.keep_columns if name in metadata}
            columns["kept_fields"] = json.dumps(kept)
        if len(captions) == 1:
            return [self._sample(members, uid, captions[0], metadata, columns)]
        return [
            self._sample(members, uid, caption, metadata, columns, index) for index, caption in enumerate(captions)
        ]

    def _sample(
        self,
        members: Members,
        uid: str | None,
        caption: str,
        metadata: dict[str, Any],
        columns: dict[str, str],
        index: int | None = None,
    ) -> Sample | DeadLetter:
        """Return one pair: caption number `index` of several, or the only one."""
        assert members.image is not None
        key, image = members.key, members.image.content
        if uid is None or index is not None or members.caption is None:
            content = caption.encode("utf-8", "surrogatepass")
            uid = uid or substitute_uid(self._shard.name, key, image, content)
            if index is not None:
                key, uid = f"{key}#{index}", caption_uid(uid, content)
            fault = self._caption_fault(caption, content)
            if fault:
                return dead_letter(Annotation(uid, self._shard.name, key, ""), self._stage, *fault)
        return Sample(Annotation(uid, self._shard.name, key, caption, **columns), metadata, image)

    def _dead(self, members: Members, uid: str | None, fault: Fault) -> DeadLetter:
        image = members.image.content if members.image else b""
        caption = members.caption.content if members.caption else b""
        uid = uid or substitute_uid(self._shard.name, members.key, image, caption)
        return dead_letter(Annotation(uid, self._shard.name, members.key, ""), self._stage, *fault)

    def repeated(self, key: str) -> DeadLetter:
        """Return the dead letter of a sample whose key an earlier one of the tar has; that one keeps its uid."""
        message = "an earlier sample of this tar has the same key"
        return DeadLetter(self._shard.name, key, "", self._stage, "duplicate_key", message)

    def _metadata(self, members: Members) -> tuple[dict[str, Any], Fault | None]:
        """Return the needed fields of the json, and its fault. Those that it lacks come from the parquet beside the
        tar."""
        found: dict[str, Any] = {}
        if members.metadata is not None:
            try:
                found = parse_fields(members.metadata.content, self._wanted, self._pool)
            except UnusableJson as error:
                return {}, (error.reason, str(error))
        has_caption = members.caption is not None or not found.keys().isdisjoint(self._caption_fields)
        if members.metadata is None or not has_caption or not found.keys() >= self._kept_fields:
            found = {**self._parquet.of(members.key), **found}
        return found, None

    def _captions(
        self, members: Members, metadata: dict[str, Any], fault: Fault | None
    ) -> tuple[list[str], Fault | None]:
        """Return the captions of an image, each once; none and the fault of a sample that cannot be judged."""
        if fault:
            return [], fault
        if members.image is None:
            return [], self._missing(members, "image", "")
        if members.caption is not None:
            try:
                return [members.caption.content.decode("utf-8")], None
            except UnicodeDecodeError as error:
                return [], ("undecodable_caption", str(error))
        for field in self._pool.caption_fields:
            given = metadata.get(field)
            texts = [text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str)]
            captions = list(dict.fromkeys(texts))
            if len(captions) > self._pool.max_captions:
                message = f"{len(captions)} captions in {field}; the recipe allows {self._pool.max_captions}"
                return [], ("too_many_captions", message)
            if captions:
                return captions[:1] if self._pool.several_captions == "first" else captions, None
        fields = f" and no such field of its json ({', '.join(self._pool.caption_fields)})"
        return [], self._missing(members, "caption", fields)

    def _missing(self, members: Members, kind: Literal["image", "caption"], fields: str) -> Fault:
        has = f"the key has {members.listing}"
        if members.may_lack_files:
            return "broken_tar", f"{MAY_LACK_FILES}; {has}"
        listed = self._pool.image_members if kind == "image" else self._pool.caption_members
        suffixes = ",".join(",".join(IMAGE_EXTENSIONS) if suffix == "*" else suffix for suffix in listed)
        return f"missing_{kind}", f"no member {members.key}.{{{suffixes}}}{fields}; {has}"

    def _caption_fault(self, caption: str, content: bytes) -> Fault | None:
        """Return the fault of a caption that came from a field. One that came from a member has none any more."""
        if len(content) > self._pool.max_caption_bytes:
            return "caption_too_large", f"{len(content)} bytes; the recipe allows {self._pool.max_caption_bytes}"
        try:
            caption.encode("utf-8")
        except UnicodeEncodeError as error:
            return "undecodable_caption", str(error)
        return None


def _as_text(value: Any) -> str:
    """Return a text as it is and any other value as JSON; a lone surrogate is escaped, and the length is bounded."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:_MAX_KEPT_CHARACTERS].encode("utf-8", "backslashreplace").decode("utf-8")
