"""The records that flow through the three graphs. All are immutable, and their fields carry units.

An `Annotation` starts with the pool's data of a sample, and each stage adds columns. A column that was never computed
is None. Tables on disk hold groups of its columns (`pipeline.output_folder.tables`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from apache_beam import coders

from transforms.core import catalogue

_UID = re.compile(r"[0-9a-f]{32}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,39}")

UID_REPLACED, SIZE_NOT_USED = "uid_replaced", "original_size_not_used"
"""Values of the column `pool_notes`: the uid that the pool gives cannot be one; the original size that it gives cannot
be that of the stored picture."""


class Shard(NamedTuple):
    """One tar of the pool.

    `name` is its escaped relative path, safe as a file name. `path` opens it. `fingerprint` (size and modification
    time, or generation) shows whether it has changed. `fault` is the reason code of a tar that is missing or cannot be
    read, and empty for all others.
    """

    name: str
    path: str
    fingerprint: str
    fault: str = ""


class DeadLetter(NamedTuple):
    """A sample or shard that could not be judged: its place, the stage, a reason code and a message.

    `key` and `uid` are empty if the shard itself is broken.
    """

    shard: str
    key: str
    uid: str
    stage: str
    reason: str
    message: str


class Annotation:
    """The slim row of one sample: its uid, shard, key and caption, and the columns computed so far.

    A column is read as an attribute. A column that was never computed is None; a name that is not in the catalogue
    raises AttributeError. Immutable.
    """

    __slots__ = ("_columns", "caption", "key", "shard", "uid")

    uid: str
    shard: str
    key: str
    caption: str

    def __init__(self, uid: str, shard: str, key: str, caption: str, **columns: Any) -> None:
        unknown = columns.keys() - catalogue.columns().keys()
        if unknown:
            raise TypeError(f"{min(unknown)} is not a column of an annotation")
        put = object.__setattr__
        put(self, "uid", uid)
        put(self, "shard", shard)
        put(self, "key", key)
        put(self, "caption", caption)
        put(self, "_columns", {name: value for name, value in columns.items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        if name in catalogue.columns():
            return self._columns.get(name)
        raise AttributeError(f"an annotation has no column {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: an annotation is immutable; see with_columns")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Annotation) and self.row == other.row

    def __hash__(self) -> int:
        return hash((self.uid, self.shard, self.key))

    def __repr__(self) -> str:
        return f"Annotation({', '.join(f'{name}={value!r}' for name, value in self.row.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _annotation, (self.row,)

    @property
    def row(self) -> dict[str, Any]:
        """Return the identity and the columns that are not None, by name."""
        return {"uid": self.uid, "shard": self.shard, "key": self.key, "caption": self.caption, **self._columns}

    def with_columns(self, **columns: Any) -> Annotation:
        """Return a copy with added or replaced columns."""
        return Annotation(**{**self.row, **columns})


def _annotation(row: dict[str, Any]) -> Annotation:
    return Annotation(**row)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A sample within one fused stage; it never crosses a shuffle.

    `metadata` contains the fields of the pool's JSON (untrusted) that the recipe and the installed scores name.
    `pixels` is RGB uint8 (height, width, 3). `inputs` replaces the pixels in stage 2: the input of each model by rule,
    or the error that its preparation raised.
    """

    annotation: Annotation
    metadata: Mapping[str, Any]
    image_bytes: bytes
    pixels: np.ndarray | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def annotated(self, **columns: Any) -> Sample:
        """Return a copy with more columns in its annotation."""
        return dataclasses.replace(self, annotation=self.annotation.with_columns(**columns)) if columns else self

    def without_input(self, rule: str) -> Sample:
        """Return a copy without the input of `rule`'s model, to free its memory."""
        if rule not in self.inputs:
            return self
        return dataclasses.replace(self, inputs={name: value for name, value in self.inputs.items() if name != rule})


@dataclasses.dataclass(slots=True)
class Attempt:
    """One attempt to process a shard, shared by all its batches.

    `halvings` counts how often each rule's batch shape was halved.

    The only record that is not frozen: when a model runs out of GPU memory, its rule's name is stored here. A fused
    stage passes elements by reference, so the reader sees the name after the batch and starts the shard again.
    """

    halvings: Mapping[str, int] = dataclasses.field(default_factory=dict)
    out_of_memory: str | None = None

    def smaller(self) -> Attempt:
        """Return the next attempt, with the batch shape of the rule that ran out of memory halved."""
        assert self.out_of_memory is not None
        return Attempt({**self.halvings, self.out_of_memory: self.halvings.get(self.out_of_memory, 0) + 1})


@dataclasses.dataclass(frozen=True, slots=True)
class SampleBatch:
    """Consecutive samples of one shard, in tar order: the element of the per-shard stages.

    `index` counts the batches of a shard from 0, and `last` marks the final one, so that the writer at the end of the
    fused stage can verify that it received the complete shard. Samples that failed on the way are dead letters of the
    batch. In the last batch, `due` lists the keys that the reader found or was to find, in tar order: each needs a row
    or a dead letter.
    """

    shard: Shard
    index: int
    last: bool
    samples: tuple[Sample, ...]
    dead_letters: tuple[DeadLetter, ...] = ()
    attempt: Attempt = dataclasses.field(default_factory=Attempt)
    due: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def nbytes(self) -> int:
        """Return the size in bytes of the image files, pixels and model inputs in the batch."""
        return sum(map(_nbytes, self))

    def replace(self, samples: tuple[Sample, ...], dead_letters: tuple[DeadLetter, ...] = ()) -> SampleBatch:
        """Return the batch with other samples and with additional dead letters."""
        return dataclasses.replace(self, samples=samples, dead_letters=self.dead_letters + dead_letters)


def _nbytes(sample: Sample) -> int:
    inputs = (part for given in sample.inputs.values() for part in (given if isinstance(given, tuple) else (given,)))
    arrays = (part for part in (sample.pixels, *inputs) if isinstance(part, np.ndarray))
    return len(sample.image_bytes) + sum(array.nbytes for array in arrays)


class SampleBatchCoder(coders.Coder):
    """Estimates the size of a batch without encoding it. Beam asks for the size of the first batch of each step, and of
    some later ones.

    Its other methods are not used between read and write, because that is one fused stage.
    """

    def encode(self, batch: SampleBatch) -> bytes:
        return _PICKLE.encode(batch)

    def decode(self, encoded: bytes) -> SampleBatch:
        return _PICKLE.decode(encoded)

    def estimate_size(self, batch: SampleBatch) -> int:
        """Return `SampleBatch.nbytes`."""
        return batch.nbytes


_PICKLE = coders.PickleCoder()
coders.registry.register_coder(SampleBatch, SampleBatchCoder)


def pool_uid(given: Any) -> str | None:
    """Return the uid that the pool gives a sample, as 32 hex digits; None where it cannot be one.

    32 hex digits are taken in lower case, a UUID without its dashes. A whole number n, also as text or as a float
    below 2^53, becomes the hex digits of n modulo 2^128; -2^63 <= n < 2^128 are allowed (our choice: no two ids that a
    table of integers can hold become one).
    """
    if isinstance(given, str):
        text = given.strip().lower()
        if _UID.fullmatch(text):
            return text
        if _UUID.fullmatch(text):
            return text.replace("-", "")
        given = int(text) if _WHOLE_NUMBER.fullmatch(text) else None
    if isinstance(given, float) and given.is_integer() and abs(given) < 2**53:
        given = int(given)
    if type(given) is not int or not -(2**63) <= given < 2**128:
        return None
    return f"{given % 2**128:032x}"


def substitute_uid(shard: str, key: str, image: bytes, caption: bytes) -> str:
    """Return the uid of a sample whose pool gives it none: a hash of image, caption, shard and key, as 32 hex digits.

    Our choice. Because of the content, two different pairs never share it, though they are of two pools that name
    shards and keys alike. Because of the place, a pair that is twice in a pool is two samples, which `near_duplicate`
    judges.
    """
    place = f"{shard}/{key}".encode("utf-8", "surrogatepass")
    parts = (hashlib.sha256(part).digest() for part in (image, caption, place))
    return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def caption_uid(uid: str, caption: bytes) -> str:
    """Return the uid of one of several pairs of the picture `uid`, each with a caption of its own."""
    return hashlib.sha256(uid.encode() + b"/" + caption).hexdigest()[:32]


def dead_letter(annotation: Annotation, stage: str, reason: str, message: str) -> DeadLetter:
    """Return a dead letter for one sample."""
    return DeadLetter(annotation.shard, annotation.key, annotation.uid, stage, reason, message[:500])
