"""A program that runs pairsift with a decoder that crashes or hangs on images with a certain content:

python -m tests.hostile.crashing RECIPE POOL OUTPUT    runs stage 1
python -m tests.hostile.crashing MARKER                decodes an image that hangs, with this marker file
python -m tests.hostile.crashing                       the child process in which the other two decode after a crash
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pipeline.decoding import decoder_child, guarded_decoder, images, watched_decoder

CRASH, HANG, SWELL = b"please crash", b"please hang", b"please swell"
COMMAND = (sys.executable, "-m", "tests.hostile.crashing")


def decode(content, *arguments):
    if CRASH in content:
        os.kill(os.getpid(), signal.SIGSEGV)
    if HANG in content:
        time.sleep(1_000)
    if SWELL in content:
        raise MemoryError
    return images.decode(content, *arguments)


def main() -> None:
    decoder_child.decode = decode  # type: ignore[attr-defined]
    watched_decoder.decode, guarded_decoder.COMMAND = decode, COMMAND  # type: ignore[attr-defined]
    match sys.argv[1:]:
        case []:
            decoder_child.main()
        case [marker]:
            with watched_decoder.decoder_for(marker, 1.0) as decode_watched:
                try:
                    decode_watched(HANG, 1, None)
                except images.UndecodableImage as error:
                    print(error.reason)
        case [recipe, pool, output]:
            from pipeline.cli import app

            app(["run", recipe, "--input", pool, "--output", output, "--stages", "single_modality"])


if __name__ == "__main__":
    main()
