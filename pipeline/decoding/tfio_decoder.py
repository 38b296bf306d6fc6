"""Decodes formats that Pillow cannot read, with tensorflow-io in a child process.

tensorflow-io needs TensorFlow 2.16, whose protobuf version conflicts with Beam's. It therefore runs in a separate
environment (constraints-tfio.txt, `make tfio`). The separate process also means that a damaged file that crashes
tensorflow-io affects no other file.
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from pipeline.decoding import tfio_child
from pipeline.decoding.child_process import CannotStart, ChildProcess, TimeLimit
from pipeline.decoding.images import UndecodableImage
from pipeline.decoding.tfio_child import ANSWER, END, FAULT, PICTURE, READY, REQUEST

_START_LIMIT_S = 120.0  # importing TensorFlow takes 6 s with warm disk caches
_MAX_TEXT_BYTES = 2000

HOW_TO_INSTALL = (
    "install tensorflow-io (`make tfio`, or `pip install -r constraints-tfio.txt` in a virtual environment) and give "
    "the Python of that environment: --tfio-python .tfio/bin/python"
)


class NoTfio(RuntimeError):
    """The tensorflow-io environment is missing or does not work. The message says what to install."""


class TfioDecoder:
    """Decodes DICOM, multi-page TIFF, EXR and JPEG 2000 in a child process of the interpreter `python`.

    If `python` is None, `pictures` raises NoTfio. The process starts with the first file, and again after it has
    crashed or been killed. It has 8 GiB of memory and `limit_s` seconds per file, not counting the time that the
    consumer spends between pictures. Leaving the context ends it.
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
        """Yield the pictures of a file, RGB uint8 (height, width, 3), or an error for each that cannot be decoded.

        `kind` is a format constant of `tfio_child`; `pages` is the number of pages of a TIFF. Raises NoTfio.
        """
        process = self._started(name, kind)
        limit = TimeLimit(process, self._limit_s)
        complete = False
        try:
            with limit:
                process.write(REQUEST.pack(kind, pages, self._max_pixels, len(content)) + content)
            while True:
                with limit:
                    answer = self._received(process)
                if answer is None:
                    complete = not limit.exceeded
                    return
                yield answer
        except (OSError, EOFError) as error:
            failure = f"took more than {self._limit_s:g} s" if limit.exceeded else f"crashed ({error})"
            yield UndecodableImage("undecodable_image", f"tensorflow-io {failure}")
        finally:
            if not complete:
                self._stop()

    def _received(self, process: ChildProcess) -> np.ndarray | UndecodableImage | None:
        """Return the next picture or error; None after the last one."""
        tag, first, second = ANSWER.unpack(process.read(ANSWER.size))
        if tag == PICTURE and first * second <= self._max_pixels:
            return np.frombuffer(process.read(first * second * 3), np.uint8).reshape(first, second, 3)
        if tag == FAULT and first <= _MAX_TEXT_BYTES:
            return UndecodableImage("undecodable_image", process.read(first).decode("utf-8", "replace"))
        if tag == END:
            return None
        raise EOFError(f"unexpected answer {tag!r}")

    def _started(self, name: str, kind: bytes) -> ChildProcess:
        if self._process is not None and self._process.is_running():
            return self._process
        self._stop()
        if self._python is None:
            raise NoTfio(f"{name}: is {_NAMES[kind]}, which Pillow cannot read; {HOW_TO_INSTALL}")
        command = [self._python, "-I", tfio_child.__file__]  # -I: ignores this process's PYTHONPATH
        try:
            self._process = ChildProcess.started(command, ANSWER.pack(READY, 0, 0), _START_LIMIT_S)
        except CannotStart as error:
            raise NoTfio(
                f"--tfio-python: {self._python}: is not a Python with tensorflow-io: it {error}; {HOW_TO_INSTALL}"
            ) from error
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None


_NAMES = {
    tfio_child.DICOM: "a DICOM file",
    tfio_child.TIFF: "a multi-page TIFF",
    tfio_child.EXR: "an EXR file",
    tfio_child.JPEG_2000: "a JPEG 2000 file",
}
