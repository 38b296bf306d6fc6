"""The parquet beside a tar, as img2dataset writes it: fields of samples whose json lacks them."""

from __future__ import annotations

import io
import logging
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transforms.core.recipe import PoolSettings
from transforms.storage import files
from transforms.storage.steady_reader import SteadyReader

_KEY = "key"


class ParquetFields:
    """The needed fields of `<shard>.parquet` by its column `key`. It is opened when the first sample asks."""

    def __init__(self, tar: str, wanted: set[str], pool: PoolSettings) -> None:
        self._path, self._wanted, self._pool = f"{tar.removesuffix('.tar')}.parquet", wanted, pool
        self._table: pa.Table | None = None
        self._rows: dict[str, int] | None = None

    def of(self, key: str) -> dict[str, Any]:
        """Return the fields of a sample, other than null; none where there is no file, or no such row."""
        if self._rows is None:
            self._table = self._read()
            keys = self._table.column(_KEY).to_pylist() if self._table is not None else []
            self._rows = {str(name): row for row, name in reversed(list(enumerate(keys)))}
        row = self._rows.get(key, self._rows.get(key.rpartition("/")[2]))
        if row is None or self._table is None:
            return {}
        fields = {name: self._table.column(name)[row].as_py() for name in self._table.column_names if name != _KEY}
        return {name: value for name, value in fields.items() if value is not None}

    def _read(self) -> pa.Table | None:
        if not files.exists(self._path):
            return None
        with SteadyReader(self._path) as file:
            content = file.read(self._pool.max_parquet_bytes + 1)
        try:
            return self._parsed(content)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            logging.warning("%s: its fields are not used: %s", self._path, reason)
            return None

    def _parsed(self, content: bytes) -> pa.Table | None:
        """Return the needed columns. Raises ValueError where they take more memory than the recipe allows."""
        limit_bytes = self._pool.max_parquet_bytes
        if len(content) > limit_bytes:
            raise ValueError(f"more than {limit_bytes} bytes; the recipe allows no more (pool.max_parquet_bytes)")
        file = pq.ParquetFile(io.BytesIO(content))
        names = [name for name in file.schema_arrow.names if name in self._wanted]
        if _KEY not in file.schema_arrow.names or not names:
            return None
        batches, size_bytes = [], 0
        for batch in file.iter_batches(batch_size=1024, columns=[_KEY, *(name for name in names if name != _KEY)]):
            size_bytes += batch.nbytes
            if size_bytes > limit_bytes:
                raise ValueError(f"its columns take more than {limit_bytes} bytes of memory (pool.max_parquet_bytes)")
            batches.append(batch)
        return pa.Table.from_batches(batches) if batches else None
