"""Tests of images that crash or hang the decoder: they end one process once and then become dead letters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.decoding import guarded_decoder, watched_decoder
from pipeline.decoding.guarded_decoder import GuardedDecoder, NoDecoder
from pipeline.decoding.images import UndecodableImage, decode
from pipeline.decoding.watched_decoder import WatchedDecoder, decoder_for
from tests.helpers import encode, jpeg, picture, settings, tar_bytes
from tests.hostile import crashing

PIXELS = 1_000_000


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> GuardedDecoder:
    monkeypatch.setattr(guarded_decoder, "COMMAND", crashing.COMMAND)
    return GuardedDecoder(limit_s=2.0)


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
        for content in (b"", jpeg()[:900], encode(picture(), "GIF"), jpeg(1_001, 1_000)):
            with pytest.raises(UndecodableImage) as caught:
                decode(content, PIXELS, draft)
            error = refused(decoder, content)
            assert (error.reason, str(error)) == (caught.value.reason, str(caught.value))


def test_crash_or_hang_affects_only_its_own_image(guarded: GuardedDecoder) -> None:
    with guarded:
        for trigger, reason, message in (
            (crashing.CRASH, "crashed_decoder", "exit status -11"),
            (crashing.HANG, "decoder_timeout", "more than 2 s"),
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


def test_watchdog_detects_a_hanging_call(monkeypatch: pytest.MonkeyPatch) -> None:
    gave_up, free = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        free.wait(20.0)

    with WatchedDecoder(0.5, lambda _: gave_up.set()) as decoder:
        for _ in range(3):
            decoder.decode(jpeg(), PIXELS)
        assert not gave_up.wait(1.5)  # the limit applies to each call, not to their sum
        monkeypatch.setattr(watched_decoder, "decode", hang)
        thread = threading.Thread(target=decoder.decode, args=(b"", PIXELS))
        thread.start()
        assert gave_up.wait(20.0)
        free.set()
        thread.join()


def test_marker_exists_while_a_shard_is_processed(tmp_path: Path) -> None:
    marker = tmp_path / "markers" / "a.marker"
    for error in (None, OSError("the disk is full")):  # an exception is not a crash
        try:
            with decoder_for(str(marker), 60.0) as decode:
                assert marker.exists()
                assert isinstance(decode.__self__, WatchedDecoder)  # type: ignore[attr-defined]
                if error:
                    raise error
        except OSError:
            pass
        assert not marker.exists()
    marker.touch()
    with decoder_for(str(marker), 60.0) as decode:
        assert isinstance(decode.__self__, GuardedDecoder)  # type: ignore[attr-defined]
        assert marker.exists()
    assert not marker.exists()


def run(*arguments: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])}
    command = [*crashing.COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_hanging_process_exits_and_the_next_one_decodes_in_a_child(tmp_path: Path) -> None:
    marker = tmp_path / "a.marker"
    hung = run(marker)
    assert hung.returncode == 1
    assert "run again" in hung.stderr
    assert marker.exists()
    again = run(marker)
    assert (again.returncode, again.stdout) == (0, "decoder_timeout\n"), again.stderr
    assert not marker.exists()


def test_run_killed_by_an_image_completes_without_it_on_rerun(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("recipe.yaml", "pool", "out")]
    paths[0].write_text(yaml.safe_dump(settings()))
    paths[1].mkdir()
    for shard in ("a", "b"):
        images = [jpeg(seed=n) + (crashing.CRASH if (shard, n) == ("b", 2) else b"") for n in range(5)]
        members = [member for n in range(5) for member in ((f"k{n}.jpg", images[n]), (f"k{n}.txt", b"a dog"))]
        (paths[1] / f"{shard}.tar").write_bytes(tar_bytes(members))
    assert run(*paths).returncode == -signal.SIGSEGV
    again = run(*paths)
    assert again.returncode == 0, again.stderr
    (file,) = (tmp_path / "out" / "dead_letters").iterdir()
    (letter,) = (json.loads(line) for line in file.read_text().splitlines())
    assert (letter["shard"], letter["key"], letter["reason"]) == ("b", "k2", "crashed_decoder")
    tables = (tmp_path / "out" / "annotations" / "single_modality").iterdir()
    judged = {path.stem: pq.read_table(path)["key"].to_pylist() for path in tables}
    assert judged == {"a": ["k0", "k1", "k2", "k3", "k4"], "b": ["k0", "k1", "k3", "k4"]}
    assert not (tmp_path / "out" / ".in_progress").exists()
