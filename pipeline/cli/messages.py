"""What all commands print to stderr, and the exit status that an error becomes."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from pipeline.report.printable import PrintableFormatter, printable
from transforms.core.errors import Failure, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from transforms.core.recipe import Recipe
    from transforms.core.settings import SettingsError

_NOISE = (
    "Traceback (most recent call last)",
    "No semi_persistent_directory found",
    "/allowedLocations",  # an optional request of google-auth
)
_EXCEPTION_NAME = re.compile(r"^(\w+\.)+[A-Z]\w+: ")


@functools.cache
def errors_console() -> Console:
    """The console for progress and messages, on stderr."""
    from rich.console import Console

    return Console(stderr=True)


def read_recipe(path: str, as_json: bool) -> Recipe:
    """The recipe at `path`. Prints every fault of the recipe and exits with status 2 if it has any."""
    from transforms.core.recipe import load_recipe
    from transforms.core.settings import SettingsError

    try:
        return load_recipe(path)
    except SettingsError as error:
        _print_faults(error, as_json, {"recipe": path})
        raise typer.Exit(2) from error


def beam_options_in(context: typer.Context) -> list[str]:
    """The arguments after `--`. Raises UsageError if there are others, as of a pattern that the shell expanded: all but
    the first of its files would otherwise be left out."""
    if context.args and not context.args[0].startswith("-"):
        raise UsageError(
            f"got the extra argument {context.args[0]}; put patterns in quotes, repeat --input for several pools, and "
            "give Beam options after --"
        )
    return context.args


@contextlib.contextmanager
def exit_status(as_json: bool, verbose: bool) -> Iterator[None]:
    """Turn an error of the body into a message and an exit status: 2 for wrong use, 1 for a failure."""
    log = logging.StreamHandler()
    log.setFormatter(PrintableFormatter("%(levelname)s: %(message)s"))
    if verbose:
        logging.getLogger("pipeline").setLevel(logging.DEBUG)
    else:
        log.addFilter(_is_no_noise)
    logging.basicConfig(level=logging.WARNING, handlers=[log])
    hook, threading.excepthook = threading.excepthook, _log_thread
    try:
        yield
    except UsageError as error:
        fail(2, str(error), as_json)
    except Failure as error:
        fail(1, str(error), as_json)
    except typer.Exit:
        raise
    except Exception as error:
        from transforms.core.settings import SettingsError

        if isinstance(error, SettingsError):
            _print_faults(error, as_json, {"event": "error", "message": str(error)})
            raise typer.Exit(2) from error
        if verbose:
            raise
        fail(1, f"{_last_line(error)} (--verbose shows the full traceback)", as_json)
    finally:
        threading.excepthook = hook


def fail(status: int, message: str, as_json: bool) -> NoReturn:
    """Print an error message and exit."""
    if as_json:
        print(json.dumps({"event": "error", "message": message}))
    else:
        say(message)
    raise typer.Exit(status)


def say(message: str) -> None:
    """Print a message on stderr, with control characters escaped."""
    print(f"pairsift: {printable(message)}", file=sys.stderr, flush=True)


def _print_faults(error: SettingsError, as_json: bool, content: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps({**content, "faults": error.faults}))
    else:
        for fault in error.faults:
            say(f"{error.source}: {fault}")


def _is_no_noise(record: logging.LogRecord) -> bool:
    """Beam logs an error at each level that it passes through; pairsift's last line reports it once."""
    message = record.getMessage()
    return not record.exc_info and not any(noise in message for noise in _NOISE)


def _log_thread(failed: threading.ExceptHookArgs) -> None:
    """Log a failed thread as one record. Beam threads that talk to a worker fail with it; the runner reports why."""
    assert failed.exc_value is not None
    logging.error("thread %s failed", failed.thread and failed.thread.name, exc_info=failed.exc_value)


def _last_line(error: BaseException) -> str:
    # Not `splitlines`: with "\r", text of a pool that the message quotes could choose which part of it is shown.
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    # An error of a worker process arrives as the text of its traceback.
    return _EXCEPTION_NAME.sub("", lines[-1]) if lines else type(error).__name__
