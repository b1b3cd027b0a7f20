"""Log lines on the console and in the log.txt of a run.

Modules log with `logging.getLogger(__name__)`. Without a handler, as in a program that imports
segtrain, information is dropped and warnings go to stderr, the default of Python's logging.
"""

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

_LOGGER = logging.getLogger("segtrain")


@contextmanager
def console_log() -> Iterator[None]:
    """Show log lines on the console inside the block."""
    handler = _ConsoleHandler()
    handler.setFormatter(_PlainFormatter())
    with _add_handler(handler), _set_level(logging.INFO):
        yield


@contextmanager
def run_log() -> Iterator["RunLog"]:
    """Collect the log lines of a run inside the block; `RunLog.write_to` sets their file."""
    handler = RunLog()
    with _add_handler(handler):
        try:
            yield handler
        finally:
            handler.close()


@contextmanager
def no_log() -> Iterator[None]:
    """Log nothing inside the block: for all processes of a job but the main one."""
    with _set_level(logging.CRITICAL + 1):
        yield


class RunLog(logging.handlers.MemoryHandler):
    """Buffers log lines until their file is known, and counts the warnings."""

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize)
        self.num_warnings = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.num_warnings += record.levelno >= logging.WARNING
        super().emit(record)

    def write_to(self, path: Path) -> None:
        """Append the buffered lines and all later ones to `path`."""
        file = _FileHandler(path, encoding="utf-8")
        file.setFormatter(_PlainFormatter())
        self.setTarget(file)
        self.capacity = 1  # the next line flushes the buffer, and so does each later one

    def close(self) -> None:
        file = self.target
        super().close()  # flushes
        if file is not None:
            file.close()


class _PlainFormatter(logging.Formatter):
    """The message alone, with the prefix `warning: ` for warnings."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        return prefix + super().format(record)


class _ConsoleHandler(logging.Handler):
    """Prints to stderr, except for the lines of training: they are its output and go to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        is_output = record.name.startswith("segtrain.training") and record.levelno < logging.WARNING
        stream = sys.stdout if is_output else sys.stderr
        # tqdm clears a visible bar and redraws it below the line.
        with tqdm.external_write_mode(file=stream):
            print(self.format(record), file=stream, flush=True)


class _FileHandler(logging.FileHandler):
    """Raises if a line cannot be written, e.g. on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        raise


@contextmanager
def _add_handler(handler: logging.Handler) -> Iterator[None]:
    _LOGGER.addHandler(handler)
    try:
        yield
    finally:
        _LOGGER.removeHandler(handler)


@contextmanager
def _set_level(level: int) -> Iterator[None]:
    previous = _LOGGER.level
    _LOGGER.setLevel(level)
    try:
        yield
    finally:
        _LOGGER.setLevel(previous)
