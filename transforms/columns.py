"""Columns of many samples as numpy arrays. They cross a shuffle in a fraction of the bytes that single samples need."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import apache_beam as beam
import numpy as np
from apache_beam.transforms.window import GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

_BUFFERED_ROWS = 20_000
_BUCKET_SHARDS = 16  # of 10,000 samples each, as img2dataset writes them
_MAX_BUCKETS = 2**16
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Columns:
    """Base class of dataclasses whose fields are arrays of equal length. Element i of each belongs to sample i."""

    def columns(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each array with its name."""
        return ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(next(self.columns())[1])

    def __reduce__(self) -> tuple[Any, ...]:
        # Plain bytes take a fifth of the space of a small pickled numpy array.
        return _restored, (type(self), *(_plain(column) for _, column in self.columns()))

    def take(self, rows: Any) -> Self:
        """Return the samples at `rows`: a slice, a mask or indices."""
        return type(self)(**{name: column[rows] for name, column in self.columns()})

    def without(self, *names: str) -> Self:
        """Return a copy with zeros in the named columns, which then take almost no space in a shuffle."""
        return dataclasses.replace(self, **{name: np.zeros_like(getattr(self, name)) for name in names})  # type: ignore[type-var]

    def groups(self, keys: np.ndarray) -> Iterator[tuple[Any, Self]]:
        """Yield each key with its samples. Keys ascend; samples of one key keep their order."""
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        for rows in np.split(order, starts) if len(order) else ():
            yield keys[rows[0]], self.take(rows)

    @classmethod
    def joined(cls, parts: Iterable[Self]) -> Self:
        """Concatenate `parts`, of which there must be at least one."""
        columns = zip(*(part.columns() for part in parts), strict=True)
        return cls(**{column[0][0]: np.concatenate([array for _, array in column]) for column in columns})


def _plain(column: np.ndarray) -> tuple[str, tuple[int, ...], tuple[int, ...], Any]:
    """Return dtype, shape, shape of the sent rows, and their content. If all rows are equal, only one is sent."""
    if column.dtype == object:
        return column.dtype.str, column.shape, column.shape, column.tolist()
    is_one_value = column.dtype.kind != "f" and (column == column[:1]).all()  # because 0.0 equals -0.0
    sent = column[:1] if is_one_value else column
    return column.dtype.str, column.shape, sent.shape, sent.tobytes()


def _restored(kind: type[Columns], *plain: tuple[str, tuple[int, ...], tuple[int, ...], Any]) -> Columns:
    return kind(*(_array(*one) for one in plain))


def _array(dtype: str, shape: tuple[int, ...], sent_shape: tuple[int, ...], sent: Any) -> np.ndarray:
    values = np.array(sent, object) if dtype == "|O" else np.frombuffer(sent, dtype).reshape(sent_shape)
    return np.broadcast_to(values, shape)


def bucket_count(shards: int) -> int:
    """Return the number of buckets for a pool of `shards` shards.

    A bucket holds some hundred thousand samples (our choice). The results do not depend on the number.
    """
    return min(_MAX_BUCKETS, 1 << (shards // _BUCKET_SHARDS).bit_length())


def buckets_of(column: np.ndarray, count: int) -> np.ndarray:
    """Return the bucket of each value, int64 (n,) below `count`. `column` is uint64, or bytes of a multiple of 8."""
    mixed = np.zeros(len(column), np.uint64)
    for word in np.ascontiguousarray(column).view(np.uint64).reshape(len(column), column.itemsize // 8).T:
        mixed ^= word
        for _ in range(2):  # so that every bit of the value affects every bit of the mix
            mixed = (mixed ^ mixed >> np.uint64(32)) * _MIX
    return ((mixed ^ mixed >> np.uint64(32)) % np.uint64(count)).astype(np.int64)


class Part(beam.DoFn):
    """Columns -> (key, Columns): splits rows by the keys that `keys_of` returns for them (integers, or text as bytes).

    The elements of a bundle are joined first, because many small parts cost more than a few large ones.
    """

    def __init__(self, keys_of: Callable[[Any], np.ndarray]) -> None:
        self._keys_of = keys_of

    def start_bundle(self) -> None:
        self._held: list[Columns] = []

    def process(self, rows: Columns) -> Iterator[tuple[int | str, Columns]]:
        self._held.append(rows)
        if sum(map(len, self._held)) >= _BUFFERED_ROWS:
            yield from self._parts()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        return (GlobalWindows.windowed_value(part) for part in self._parts())

    def _parts(self) -> Iterator[tuple[int | str, Columns]]:
        held, self._held = self._held, []
        if held:
            rows = type(held[0]).joined(held)
            for key, part in rows.groups(self._keys_of(rows)):
                yield key.decode() if isinstance(key, bytes) else int(key), part
