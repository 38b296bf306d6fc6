"""Tests of the tensorflow-io decoder with a fake child process that crashes, hangs or sends wrong answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.decoding import tfio_child
from pipeline.decoding.images import UndecodableImage
from pipeline.decoding.tfio_decoder import NoTfio, TfioDecoder
from tests.pipeline.decoding import fake_tfio


def file(*words: str) -> bytes:
    return b"\0" * 128 + b"DICM" + " ".join(words).encode()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[TfioDecoder, Path]]:
    python, log = fake_tfio.install(tmp_path)
    with TfioDecoder(python, max_pixels=100, limit_s=1.5) as decoder:
        yield decoder, log


def decoded(decoder: TfioDecoder, *words: str) -> list[int | str]:
    """Return the brightness of each picture, or the message of each that failed."""
    found = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file(*words))
    return [str(one) if isinstance(one, UndecodableImage) else int(one[0, 0, 0]) for one in found]


def starts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_one_process_decodes_file_after_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert starts(log) == 0  # starts on first use
    assert [decoded(decoder, "1"), decoded(decoder), decoded(decoder, "2", "3")] == [[1], [], [2, 3]]
    assert starts(log) == 1
    (pixels,) = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file("7"))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8
    pages = decoder.pictures("x.tif", tfio_child.TIFF, 3, file("pages"))
    assert [int(page[0, 0, 0]) for page in pages if isinstance(page, np.ndarray)] == [0, 1, 2]


def test_refused_picture_affects_no_other_picture_of_its_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert decoded(decoder, "1", "refuse", "2") == [1, "no good", 2]
    assert starts(log) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [("crash", "crashed (exit status -11)"), ("hang", "took more than 1.5 s"), ("huge", "unexpected answer")],
)
def test_failed_process_affects_only_the_current_file(
    started: tuple[TfioDecoder, Path], word: str, message: str
) -> None:
    decoder, log = started
    first, failure = decoded(decoder, "1", word, "2")
    assert first == 1
    assert message in str(failure)
    assert decoded(decoder, "3") == [3]
    assert starts(log) == 2


def test_time_limit_applies_to_a_complete_file_and_restarts_with_each_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert decoded(decoder, "slow", "1", "slow", "2")[-1] == "tensorflow-io took more than 1.5 s"
    decoder._limit_s = 30
    assert decoded(decoder, "slow", "1", "slow", "2") == [1, 2]
    assert starts(log) == 2


def test_time_of_the_consumer_does_not_count_towards_the_limit(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    found = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file("1", "2"))
    next(found)
    time.sleep(2)
    assert isinstance(next(found), np.ndarray)
    assert starts(log) == 1


def test_unread_pictures_are_not_returned_for_the_next_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, _ = started
    found = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file("1", "2"))
    next(found)
    found.close()
    assert decoded(decoder, "3") == [3]


def test_no_process_is_left_behind(tmp_path: Path) -> None:
    python, _ = fake_tfio.install(tmp_path)
    with TfioDecoder(python, max_pixels=100) as decoder:
        decoded(decoder, "1")
        process = decoder._process
        assert process is not None and process.is_running()
    assert not process.is_running()


def test_message_without_an_environment() -> None:
    """The message names the file, its format and what to install."""
    with pytest.raises(NoTfio, match=r"^x\.dcm: is a DICOM file.*constraints-tfio\.txt.*--tfio-python"):
        decoded(TfioDecoder(None, max_pixels=100), "1")


@pytest.mark.parametrize("python", ["/bin/true", "/bin/cat", sys.executable])
def test_message_for_a_program_that_is_not_such_a_python(python: str) -> None:
    message = rf"^--tfio-python: {python}: is not a Python with tensorflow-io: .*constraints-tfio\.txt"
    with pytest.raises(NoTfio, match=message):
        decoded(TfioDecoder(python, max_pixels=100), "1")
