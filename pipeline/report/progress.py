"""Progress of a run: a live line on a terminal, plain lines elsewhere, or JSON lines."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.output_folder.layout import DONE, TABLE_OF, Layout

if TYPE_CHECKING:
    from rich.console import Console

    from transforms.core import metrics as work
    from transforms.core.records import Shard

_LIVE_SECONDS = 0.5
_PLAIN_SECONDS = 10.0


class Counts(NamedTuple):
    """Work of a stage since it started: finished shards, all samples, and samples in finished shards."""

    shards: int
    samples: int
    finished_samples: int


class Progress:
    """Follows a stage through the tables and counts that its workers write, so it sees every local worker process."""

    def __init__(self, console: Console, as_json: bool = False) -> None:
        self._console, self._as_json = console, as_json

    @contextlib.contextmanager
    def stage(self, name: str, layout: Layout, shards: Sequence[Shard]) -> Iterator[None]:
        """Show the progress of a stage while the body runs it."""
        before = frozenset(self._with_table(name, layout, shards))
        started = time.monotonic()

        def line() -> str:
            counts, at_rest = self._counts(name, layout, shards, before)
            return describe(name, counts, len(shards) - at_rest, time.monotonic() - started)

        if before:
            self._emit("progress", name, f"{name}: {len(before)} of {len(shards)} shards have a table already")
        with self.following(name, line):
            yield

    def counted(self, name: str, counts: work.Counts) -> None:
        """Show the counts of a per-shard stage."""
        if name in TABLE_OF:
            text = described(counts) if counts else "the runner reports no counts"
            self._emit("stage_counts", name, f"{name}: {text}")

    @contextlib.contextmanager
    def following(self, name: str, line: Callable[[], str]) -> Iterator[None]:
        """Show `line()` repeatedly while the body runs, and once at its end."""
        from rich.live import Live
        from rich.text import Text

        done = threading.Event()

        def follow() -> None:
            if self._console.is_terminal and not self._as_json:
                with Live(Text(line()), console=self._console, auto_refresh=False, transient=True) as live:
                    while not done.wait(_LIVE_SECONDS):
                        live.update(Text(line()), refresh=True)
            else:
                while not done.wait(_PLAIN_SECONDS):
                    self._emit("progress", name, line())

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()
        self._emit("stage_done", name, line())

    def _emit(self, event: str, stage: str, text: str) -> None:
        if self._as_json:
            print(json.dumps({"event": event, "stage": stage, "message": text}), flush=True)
        else:
            self._console.print(text, highlight=False, markup=False)

    @staticmethod
    def _with_table(name: str, layout: Layout, shards: Sequence[Shard]) -> list[str]:
        if name not in TABLE_OF:
            return []
        there = layout.shards_with(TABLE_OF[name])
        return [shard.name for shard in shards if shard.name in there]

    def _counts(self, name: str, layout: Layout, shards: Sequence[Shard], before: frozenset[str]) -> tuple[Counts, int]:
        """The counts, and how many shards in `before` (those with an earlier table) have no work done on them yet."""
        if name not in TABLE_OF:
            return Counts(0, 0, 0), 0
        finished = set(self._with_table(name, layout, shards)) - before
        samples, finished_samples, at_rest = 0, 0, 0
        begun = layout.shards_with(lambda layout, shard: layout.progress(name, shard))
        for shard in shards:
            count_text = ""
            if shard.name in begun:
                with contextlib.suppress(OSError):  # deleted since the listing
                    count_text = Path(layout.progress(name, shard.name)).read_text()
            if shard.name in before:
                at_rest += not count_text
                if count_text.endswith(DONE):
                    finished.add(shard.name)
            with contextlib.suppress(ValueError):  # being written
                count = int(count_text.removesuffix(DONE))
                samples += count
                finished_samples += count * (shard.name in finished)
        return Counts(len(finished), samples, finished_samples), at_rest


def described(counts: work.Counts) -> str:
    """The counts of a stage as one line."""
    from transforms.core import metrics as work

    back = counts[work.SAMPLES_BACK]
    return (
        f"{counts[work.SHARDS_FINISHED_BEFORE]} shards were finished before, {counts[work.SHARDS_DONE]} done now; "
        f"{counts[work.SAMPLES_DONE]:,} samples{f' ({back:,} of shards done before)' if back else ''}, "
        f"{counts[work.TARS_OPENED]} tars opened, {counts[work.MODELS_LOADED]} models loaded"
    )


def describe(stage: str, counts: Counts, shards: int, seconds: float) -> str:
    """One line: shards and samples done, samples per second, and the estimated time left, once a shard is finished."""
    if stage not in TABLE_OF:
        return f"{stage}: {seconds:.0f} s"
    rate = counts.samples / max(seconds, 1e-9)
    text = f"{stage}: {counts.shards}/{shards} shards, {counts.samples:,} samples, {rate:,.0f}/s, {seconds:.0f} s"
    if 0 < counts.shards < shards and rate:
        expected = counts.finished_samples / counts.shards * shards
        text += f", about {max(0.0, (expected - counts.samples) / rate):.0f} s left"
    return text
