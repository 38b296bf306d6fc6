"""A program that runs pairsift with a decoder that crashes or hangs on images with a certain content:

python -m tests.hostile.crashing RECIPE POOL OUTPUT    runs stage 1
python -m tests.hostile.crashing                       the child process in which it decodes
"""

from __future__ import annotations

import os
import signal
import sys
import time

from pipeline.decoding import decoder_child, guarded_decoder, images

CRASH, SPIN, SLEEP, SWELL = b"please crash", b"please spin", b"please sleep", b"please swell"
KILLED = b"please be killed"
COMMAND = (sys.executable, "-m", "tests.hostile.crashing")


def decode(content, *arguments, **options):
    if CRASH in content:
        os.kill(os.getpid(), signal.SIGSEGV)
    if KILLED in content:
        os.kill(os.getpid(), signal.SIGKILL)
    while SPIN in content:
        pass
    if SLEEP in content:
        time.sleep(1_000)
    if SWELL in content:
        raise MemoryError
    return images.decode(content, *arguments, **options)


def main() -> None:
    decoder_child.decode = decode  # type: ignore[attr-defined]
    guarded_decoder.COMMAND = COMMAND
    match sys.argv[1:]:
        case []:
            decoder_child.main()
        case [recipe, pool, output]:
            from pipeline.cli import app

            app(["run", recipe, "--input", pool, "--output", output, "--stages", "single_modality"])


if __name__ == "__main__":
    main()
