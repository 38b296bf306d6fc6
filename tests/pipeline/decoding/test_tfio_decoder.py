"""A decoder that crashes, hangs or lies costs the file at hand, and no other."""

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
    """The brightness of each picture, and the message of each that is none."""
    found = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file(*words))
    return [str(one) if isinstance(one, UndecodableImage) else int(one[0, 0, 0]) for one in found]


def starts(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def test_one_process_decodes_file_after_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert starts(log) == 0  # not before it is needed
    assert [decoded(decoder, "1"), decoded(decoder), decoded(decoder, "2", "3")] == [[1], [], [2, 3]]
    assert starts(log) == 1
    (pixels,) = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file("7"))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (2, 3, 3) and pixels.dtype == np.uint8
    pages = decoder.pictures("x.tif", tfio_child.TIFF, 3, file("pages"))
    assert [int(page[0, 0, 0]) for page in pages if isinstance(page, np.ndarray)] == [0, 1, 2]


def test_a_picture_that_is_refused_costs_no_other_of_its_file(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert decoded(decoder, "1", "refuse", "2") == [1, "no good", 2]
    assert starts(log) == 1


@pytest.mark.parametrize(
    ("word", "message"),
    [("crash", "broke off (exit status -11)"), ("hang", "took more than 1.5 s"), ("huge", "unknown answer")],
)
def test_a_process_that_is_lost_costs_the_file_at_hand(
    started: tuple[TfioDecoder, Path], word: str, message: str
) -> None:
    decoder, log = started
    before, said = decoded(decoder, "1", word, "2")
    assert before == 1
    assert message in str(said)
    assert decoded(decoder, "3") == [3]
    assert starts(log) == 2


def test_the_limit_is_for_all_of_a_file_and_for_each_file_anew(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    assert decoded(decoder, "slow", "1", "slow", "2")[-1] == "tensorflow-io took more than 1.5 s"
    decoder._limit_s = 30
    assert decoded(decoder, "slow", "1", "slow", "2") == [1, 2]
    assert starts(log) == 2


def test_the_time_in_which_pictures_are_looked_at_is_not_the_decoders(started: tuple[TfioDecoder, Path]) -> None:
    decoder, log = started
    found = decoder.pictures("x.dcm", tfio_child.DICOM, 1, file("1", "2"))
    next(found)
    time.sleep(2)
    assert isinstance(next(found), np.ndarray)
    assert starts(log) == 1


def test_what_is_left_of_a_file_is_no_answer_to_the_next(started: tuple[TfioDecoder, Path]) -> None:
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
        assert process is not None and process.is_there()
    assert not process.is_there()


def test_without_an_environment_the_file_its_format_and_what_to_install_are_named() -> None:
    with pytest.raises(NoTfio, match=r"^x\.dcm: is a DICOM file.*constraints-tfio\.txt.*--tfio-python"):
        decoded(TfioDecoder(None, max_pixels=100), "1")


@pytest.mark.parametrize("python", ["/bin/true", "/bin/cat", sys.executable])
def test_an_environment_that_is_none_is_named(python: str) -> None:
    message = rf"^--tfio-python: {python}: is no Python with tensorflow-io: .*constraints-tfio\.txt"
    with pytest.raises(NoTfio, match=message):
        decoded(TfioDecoder(python, max_pixels=100), "1")
