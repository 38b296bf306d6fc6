"""The records that flow through the three graphs. All are immutable, and their fields carry units.

An `Annotation` starts with the pool's data of a sample and gains columns from stage to stage. A column that was never
computed is None. Tables on disk hold groups of its columns (`pipeline.output_folder.tables`).
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


class Shard(NamedTuple):
    """One tar of the pool. `name` is its escaped relative path, safe as a file name; `path` opens it;
    `fingerprint` (size and modification time, or generation) tells whether it changed. `fault` is the reason code of a
    tar that is missing or cannot be read; it is empty for all others."""

    name: str
    path: str
    fingerprint: str
    fault: str = ""


class DeadLetter(NamedTuple):
    """A sample or shard that could not be judged: where, in which stage, a reason code, and the message.

    `key` and `uid` are empty where the shard itself is what broke.
    """

    shard: str
    key: str
    uid: str
    stage: str
    reason: str
    message: str


class Annotation:
    """The slim row of one sample: its uid, shard, key and caption, and the columns computed so far.

    A column is read as an attribute. One that was never computed is None; a name that is no column of the catalogue
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
            raise TypeError(f"{min(unknown)} is no column of an annotation")
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
        """The identity and the columns that are not None, by name."""
        return {"uid": self.uid, "shard": self.shard, "key": self.key, "caption": self.caption, **self._columns}

    def with_columns(self, **columns: Any) -> Annotation:
        """A copy with further columns, or with other values of some."""
        return Annotation(**{**self.row, **columns})


def _annotation(row: dict[str, Any]) -> Annotation:
    return Annotation(**row)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A sample on its way through one fused stage; it never crosses a shuffle.

    `metadata` is the pool's json (untrusted); `pixels` are RGB uint8 of shape (height, width, 3). `inputs` is what the
    models of stage 2 look at, by rule, or the error with which making it failed; it stands in place of the pixels.
    """

    annotation: Annotation
    metadata: Mapping[str, Any]
    image_bytes: bytes
    pixels: np.ndarray | None = None
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def annotated(self, **columns: Any) -> Sample:
        """A copy whose annotation knows more."""
        return dataclasses.replace(self, annotation=self.annotation.with_columns(**columns)) if columns else self

    def without_input(self, rule: str) -> Sample:
        """A copy that has let go of what `rule`'s model has looked at."""
        if rule not in self.inputs:
            return self
        return dataclasses.replace(self, inputs={name: value for name, value in self.inputs.items() if name != rule})


@dataclasses.dataclass(slots=True)
class Attempt:
    """One try at a shard, shared by all its batches. `halvings` says how often each rule's batch shape was halved.

    The one record that is not frozen: a model that runs out of GPU memory names itself here, and because a fused stage
    passes its elements by reference, the reader sees it when the batch is through, and starts the shard again.
    """

    halvings: Mapping[str, int] = dataclasses.field(default_factory=dict)
    out_of_memory: str | None = None

    def smaller(self) -> Attempt:
        """The next try, with the batch shape of the rule that ran out of memory halved."""
        assert self.out_of_memory is not None
        return Attempt({**self.halvings, self.out_of_memory: self.halvings.get(self.out_of_memory, 0) + 1})


@dataclasses.dataclass(frozen=True, slots=True)
class SampleBatch:
    """Consecutive samples of one shard, in tar order: the element of the per-shard stages.

    `index` counts a shard's batches from 0 and `last` marks its final one, so that the writer at the end of the
    fused stage can prove that it saw the whole shard. What broke on the way travels along as dead letters. The last
    one says in `due` which keys the reader met, or was to find, in the order of the tar: each needs a row or a dead
    letter.
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
        """Bytes of the files, the pixels and the models' inputs that it holds."""
        return sum(map(_nbytes, self))

    def replace(self, samples: tuple[Sample, ...], dead_letters: tuple[DeadLetter, ...] = ()) -> SampleBatch:
        """The batch with other samples and further dead letters."""
        return dataclasses.replace(self, samples=samples, dead_letters=self.dead_letters + dead_letters)


def _nbytes(sample: Sample) -> int:
    inputs = (part for given in sample.inputs.values() for part in (given if isinstance(given, tuple) else (given,)))
    arrays = (part for part in (sample.pixels, *inputs) if isinstance(part, np.ndarray))
    return len(sample.image_bytes) + sum(array.nbytes for array in arrays)


class SampleBatchCoder(coders.Coder):
    """Tells how large a batch is without writing it: Beam asks that of the first of each step, and later of some.

    Nothing else of it is used on the way from read to write, which is one fused stage.
    """

    def encode(self, batch: SampleBatch) -> bytes:
        return _PICKLE.encode(batch)

    def decode(self, encoded: bytes) -> SampleBatch:
        return _PICKLE.decode(encoded)

    def estimate_size(self, batch: SampleBatch) -> int:
        """`SampleBatch.nbytes`."""
        return batch.nbytes


_PICKLE = coders.PickleCoder()
coders.registry.register_coder(SampleBatch, SampleBatchCoder)


def uid_of(shard_name: str, key: str, metadata: Mapping[str, Any]) -> str:
    """The sample's uid: the pool's own where it is 32 hex digits, else the first 32 hex digits of sha256 of
    `shard name + "/" + key` (our choice; DataComp's subset files need 128-bit uids)."""
    given = metadata.get("uid")
    if isinstance(given, str) and _UID.fullmatch(given.lower()):
        return given.lower()
    return hashlib.sha256(f"{shard_name}/{key}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def dead_letter(annotation: Annotation, stage: str, reason: str, message: str) -> DeadLetter:
    """A dead letter for one sample."""
    return DeadLetter(annotation.shard, annotation.key, annotation.uid, stage, reason, message[:500])
