"""Tests of images that crash or hang the decoder: they become dead letters, and affect nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from pipeline.decoding import guarded_decoder
from pipeline.decoding.guarded_decoder import DecoderPool, GuardedDecoder, NoDecoder, shared_decoders
from pipeline.decoding.images import UndecodableImage, decode
from pipeline.decoding.memory import MemoryBudget
from tests.helpers import encode, jpeg, picture, settings, tar_bytes
from tests.hostile import crashing

PIXELS = 1_000_000


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> GuardedDecoder:
    monkeypatch.setattr(guarded_decoder, "COMMAND", crashing.COMMAND)
    return GuardedDecoder(limit_s=0.5)


def refused(decoder: GuardedDecoder, content: bytes) -> UndecodableImage:
    with pytest.raises(UndecodableImage) as caught:
        decoder.decode(content, PIXELS)
    return caught.value


@pytest.mark.parametrize("draft", [None, 100])
def test_child_process_decodes_to_the_same_pixels(draft: int | None) -> None:
    with GuardedDecoder(60.0) as decoder:
        for content in (jpeg(900, 700), encode(picture(), "PNG"), encode(picture(), "WEBP")):
            (here, size), (there, other_size) = decode(content, PIXELS, draft), decoder.decode(content, PIXELS, draft)
            assert np.array_equal(here, there) and here.dtype == there.dtype
            assert size == other_size
        for content in (b"", jpeg()[:900], encode(picture(), "ICO"), jpeg(1_001, 1_000)):
            with pytest.raises(UndecodableImage) as caught:
                decode(content, PIXELS, draft)
            error = refused(decoder, content)
            assert (error.reason, str(error)) == (caught.value.reason, str(caught.value))


def test_crash_or_hang_affects_only_its_own_image(guarded: GuardedDecoder) -> None:
    with guarded:
        for trigger, reason, message in (
            (crashing.CRASH, "crashed_decoder", "exit status -11"),
            (crashing.SPIN, "decoder_timeout", "more than 0.5 s of CPU time"),
            (crashing.SLEEP, "decoder_timeout", "waited for 0.5 s"),
            (crashing.SWELL, "crashed_decoder", "8 GiB"),
        ):
            error = refused(guarded, jpeg() + trigger)
            assert error.reason == reason
            assert message in str(error)
            assert guarded.decode(jpeg(), PIXELS)[1] == (96, 64)


def test_process_that_cannot_be_started_is_not_blamed_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    absent, silent = ("/no/such/python",), (sys.executable, "-c", "1")
    for command, message in ((absent, "cannot be started"), (silent, "does not start")):
        monkeypatch.setattr(guarded_decoder, "COMMAND", command)
        with GuardedDecoder(9.0) as decoder, pytest.raises(NoDecoder, match=message):
            decoder.decode(jpeg(), PIXELS)


def test_time_without_a_core_does_not_count(guarded: GuardedDecoder) -> None:
    """A decoder that is stopped, as one that waits for a core, is not at its limit however long that takes."""
    with guarded:
        guarded.decode(jpeg(), PIXELS)
        assert guarded._process
        pid = guarded._process._popen.pid
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (pid, signal.SIGCONT)).start()
        guarded._limit_s = 0.5
        assert guarded.decode(jpeg(), PIXELS)[1] == (96, 64)


def test_decoder_that_something_else_kills_is_not_blamed_on_the_image(guarded: GuardedDecoder) -> None:
    with guarded, pytest.raises(NoDecoder, match="was killed"):
        guarded.decode(jpeg() + crashing.KILLED, PIXELS)


def test_threads_share_the_decoders_of_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded_decoder, "DECODERS", 2)
    with DecoderPool(60.0) as pool, ThreadPoolExecutor(6) as threads:
        contents = [jpeg(seed=seed) for seed in range(12)]
        decoded = list(threads.map(lambda content: pool.decode(content, PIXELS)[0], contents))
        assert 1 <= len(pool._idle) <= 2
    for pixels, content in zip(decoded, contents, strict=True):
        assert np.array_equal(pixels, decode(content, PIXELS)[0])
    assert shared_decoders(60.0) is shared_decoders(60.0)


def test_large_images_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these images takes more than half of the budget, so they are decoded one after the other."""
    monkeypatch.setattr(guarded_decoder, "LARGE_IMAGES_BYTES", 60 * 2**20)
    content = encode(Image.new("L", (3000, 3000), 9), "PNG")
    held, most = [0], [0]
    plain = MemoryBudget.held

    @contextlib.contextmanager
    def counted(budget: MemoryBudget, size_bytes: int) -> Iterator[None]:
        with plain(budget, size_bytes):
            held[0] += size_bytes
            most[0] = max(most[0], held[0])
            yield
            held[0] -= size_bytes

    monkeypatch.setattr(MemoryBudget, "held", counted)
    with DecoderPool(60.0) as pool, ThreadPoolExecutor(2) as threads:
        decoded = list(threads.map(lambda content: pool.decode(content, 10**8, 320)[0], [content] * 4))
    assert [pixels.shape for pixels in decoded] == [(334, 334, 3)] * 4
    assert 32 * 2**20 < most[0] < 60 * 2**20


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    command = [*crashing.COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_every_image_that_ends_or_hangs_its_decoder_is_recorded_in_one_run(tmp_path: Path) -> None:
    """One such image in each of several shards, and several in one, cost only themselves."""
    paths = [tmp_path / name for name in ("recipe.yaml", "pool", "out")]
    paths[0].write_text(yaml.safe_dump(settings(pool={"max_decode_seconds": 0.5})))
    paths[1].mkdir()
    bad = {("a", 0): crashing.CRASH, ("b", 2): crashing.SPIN, ("b", 3): crashing.CRASH, ("c", 4): crashing.SLEEP}
    for shard in ("a", "b", "c", "d"):
        images = [jpeg(seed=n) + bad.get((shard, n), b"") for n in range(5)]
        members = [member for n in range(5) for member in ((f"k{n}.jpg", images[n]), (f"k{n}.txt", b"a dog"))]
        (paths[1] / f"{shard}.tar").write_bytes(tar_bytes(members))
    done = run(*paths)
    assert done.returncode == 0, done.stderr
    files = (tmp_path / "out" / "dead_letters").iterdir()
    letters = (json.loads(line) for file in files for line in file.read_text().splitlines())
    assert {(letter["shard"], letter["key"]): letter["reason"] for letter in letters} == {
        ("a", "k0"): "crashed_decoder", ("b", "k2"): "decoder_timeout", ("b", "k3"): "crashed_decoder",
        ("c", "k4"): "decoder_timeout",
    }  # fmt: skip
    tables = (tmp_path / "out" / "annotations" / "single_modality").iterdir()
    judged = {path.stem: pq.read_table(path)["key"].to_pylist() for path in tables}
    assert {shard: [int(key[1:]) for key in keys] for shard, keys in judged.items()} == {
        shard: [n for n in range(5) if (shard, n) not in bad] for shard in "abcd"
    }
