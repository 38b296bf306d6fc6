"""Runs, and what they leave, for use from Python."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from pipeline.output_folder import versions
from pipeline.output_folder.layout import Layout
from pipeline.output_folder.listing import read_listing
from transforms.core.catalogue import STAGES
from transforms.core.errors import UsageError
from transforms.core.recipe import Recipe, parse_recipe
from transforms.core.records import Sample
from transforms.storage import files

if TYPE_CHECKING:
    from pipeline.report.progress import Progress


class FinishedRun:
    """The results under an output folder, local or on `gs://`.

    Raises UsageError if the folder holds no results.
    """

    def __init__(self, output: str) -> None:
        output = output.rstrip("/") or output
        self._layout = versions.newest(output) if files.in_cloud_storage(output) else Layout(output)
        if not files.exists(self._layout.funnel):
            raise UsageError(f"{output}: has no results; run stage 3 (`pairsift run` or `pairsift select`) first")

    @property
    def recipe(self) -> Recipe:
        """The recipe of the results."""
        return parse_recipe(self.manifest["recipe"], self._layout.manifest)

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of manifest.json."""
        return json.loads(files.read_bytes(self._layout.manifest))

    @property
    def shards(self) -> list[str]:
        """The names of the shards, sorted."""
        folder, _, name = self._layout.decisions("*").rpartition("/")
        prefix, _, suffix = name.partition("*")
        found = (name for name in files.names_in(folder) if name.startswith(prefix) and name.endswith(suffix))
        return sorted(name.removeprefix(prefix).removesuffix(suffix) for name in found)

    def decisions(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row per judged sample, by shard and in tar order. `columns`: only these, else all."""
        return pa.concat_tables(self._decisions(shard, columns) for shard in self.shards)

    def funnel(self) -> pa.Table:
        """One row per rule: name, stage, and the numbers of samples in, dropped, and kept."""
        return pa.Table.from_pylist(json.loads(files.read_bytes(self._layout.funnel))["rules"])

    def subset(self) -> np.ndarray:
        """The training subset as in DataComp: dtype u8,u8, shape (copies,), sorted, one row per copy."""
        with files.open_binary(self._layout.subset) as file:
            return np.load(file, allow_pickle=False)

    def picture(self, uid: str) -> Image.Image:
        """The image of a sample, upright, in RGB, read from the pool. Raises KeyError if no sample has this uid."""
        from pipeline.sources.webdataset import read_samples

        bounds = self.recipe.pool
        for shard in read_listing(self._layout):
            rows = self._decisions(shard.name, ["uid", "key"]).to_pylist()
            key = next((row["key"] for row in rows if row["uid"] == uid), None)
            if key is None:
                continue
            for sample in read_samples(shard, bounds, STAGES[0]):
                if isinstance(sample, Sample) and sample.annotation.key == key:
                    image = Image.open(io.BytesIO(sample.image_bytes))
                    if image.width * image.height > bounds.max_image_pixels:
                        raise ValueError(f"{uid}: {image.width} x {image.height} px exceed pool.max_image_pixels")
                    return ImageOps.exif_transpose(image).convert("RGB")
        raise KeyError(f"{uid}: no sample of this run has this uid")

    def _decisions(self, shard: str, columns: Sequence[str] | None) -> pa.Table:
        with files.open_binary(self._layout.decisions(shard)) as file:
            return pq.ParquetFile(file).read(columns=list(columns) if columns is not None else None)


def open_run(output: str) -> FinishedRun:
    """The results of an earlier run. Raises UsageError if the folder holds none."""
    return FinishedRun(output)


def run(
    recipe: Recipe,
    pool: str | Sequence[str],
    output: str,
    *,
    stages: Sequence[str] = STAGES,
    beam_options: Sequence[str] = (),
    keep_versions: int = versions.KEPT,
) -> FinishedRun | None:
    """Run a recipe over a pool, or over several as one, like `pairsift run`; results that are still valid are reused.

    Returns None if `stages` ends before stage 3. Raises UsageError for wrong use, with nothing written.
    """
    from pipeline.runs.run import run as run_stages
    from pipeline.sources.pool_names import joined

    inputs = [pool] if isinstance(pool, str) else pool
    run_stages(recipe, joined(inputs), output, list(stages), list(beam_options), _quiet(), keep_versions)
    return FinishedRun(output) if STAGES[-1] in stages else None


def select(
    recipe: Recipe, output: str, *, beam_options: Sequence[str] = (), keep_versions: int = versions.KEPT
) -> FinishedRun:
    """Decide again from kept features and scores, like `pairsift select`: no images and no models.

    Raises UsageError for wrong use, or where the recipe needs scores that were never computed.
    """
    from pipeline.runs.select import select as run_select

    run_select(recipe, "RECIPE", output, list(beam_options), _quiet(), keep_versions)
    return FinishedRun(output)


def _quiet() -> Progress:
    from rich.console import Console

    from pipeline.report.progress import Progress

    return Progress(Console(stderr=True, quiet=True))
