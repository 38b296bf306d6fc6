"""Formats that Pillow cannot read, decoded by tensorflow-io in a process of its own.

tensorflow-io needs TensorFlow 2.16, whose protobuf is not Beam's, so it has an environment of its own
(constraints-tfio.txt, `make tfio`). It also brings the process down on some damaged files, so whatever happens there
costs the file at hand and no other.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from pipeline.decoding import tfio_child
from pipeline.decoding.child_process import CannotStart, ChildProcess, Limit
from pipeline.decoding.images import UndecodableImage
from pipeline.decoding.tfio_child import ANSWER, END, FAULT, PICTURE, READY, REQUEST

_START_LIMIT_S = 120.0  # TensorFlow's import takes 6 s from a warm disk
_MAX_TEXT_BYTES = 2000

HOW_TO_INSTALL = (
    "build the environment that can (`make tfio`, or a virtual environment with `pip install -r constraints-tfio.txt`) "
    "and name its python: --tfio-python .tfio/bin/python"
)


class NoTfio(RuntimeError):
    """There is no environment to decode a file in, or it does not work. The message says what to install."""


class TfioDecoder:
    """Decodes DICOM, multi-page TIFF, EXR and JPEG 2000 in a process of the interpreter `python` (None: there is none).

    The process starts with the first such file, and again after it was lost. It has `limit_s` seconds a file, not
    counting the time in which its pictures are looked at, and 8 GiB. Leaving the context ends it.
    """

    def __init__(self, python: str | None, max_pixels: int, limit_s: float = 60.0) -> None:
        self._python, self._max_pixels, self._limit_s = python, max_pixels, limit_s
        self._process: ChildProcess | None = None

    def __enter__(self) -> TfioDecoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def pictures(
        self, name: str, kind: bytes, pages: int, content: bytes
    ) -> Generator[np.ndarray | UndecodableImage, None, None]:
        """The pictures of a file, RGB uint8 (height, width, 3), and what is wrong with those that have none.

        `kind` is one of `tfio_child`'s; `pages` is how many pages a TIFF has. Raises NoTfio.
        """
        process = self._started(name, kind)
        limit = Limit(process, self._limit_s)
        whole = False
        try:
            with limit:
                process.write(REQUEST.pack(kind, pages, self._max_pixels, len(content)) + content)
            while True:
                with limit:
                    answer = self._received(process)
                if answer is None:
                    whole = not limit.passed
                    return
                yield answer
        except (OSError, EOFError) as error:
            said = f"took more than {self._limit_s:g} s" if limit.passed else f"broke off ({error})"
            yield UndecodableImage("undecodable_image", f"tensorflow-io {said}")
        finally:
            if not whole:
                self._stop()

    def _received(self, process: ChildProcess) -> np.ndarray | UndecodableImage | None:
        """The next answer; None after the last."""
        tag, first, second = ANSWER.unpack(process.read(ANSWER.size))
        if tag == PICTURE and first * second <= self._max_pixels:
            return np.frombuffer(process.read(first * second * 3), np.uint8).reshape(first, second, 3)
        if tag == FAULT and first <= _MAX_TEXT_BYTES:
            return UndecodableImage("undecodable_image", process.read(first).decode("utf-8", "replace"))
        if tag == END:
            return None
        raise EOFError(f"unknown answer {tag!r}")

    def _started(self, name: str, kind: bytes) -> ChildProcess:
        if self._process is not None and self._process.is_there():
            return self._process
        self._stop()
        if self._python is None:
            raise NoTfio(f"{name}: is {_NAMES[kind]}, which Pillow cannot read: {HOW_TO_INSTALL}")
        command = [self._python, "-I", tfio_child.__file__]  # -I: what this process imports from is not its business
        try:
            self._process = ChildProcess.started(command, ANSWER.pack(READY, 0, 0), _START_LIMIT_S)
        except CannotStart as error:
            raise NoTfio(
                f"--tfio-python: {self._python}: is no Python with tensorflow-io: it {error}; {HOW_TO_INSTALL}"
            ) from error
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


_NAMES = {
    tfio_child.DICOM: "a DICOM file",
    tfio_child.TIFF: "a TIFF of several pages",
    tfio_child.EXR: "an EXR file",
    tfio_child.JPEG_2000: "a JPEG 2000 file",
}
