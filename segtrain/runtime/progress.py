"""Progress bars for everything that takes longer than two seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 15.0

_disabled = False


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Show no progress bars inside the block: for all processes of a job but the main one."""
    global _disabled
    _disabled = True
    try:
        yield
    finally:
        _disabled = False


def progress_bar(
    *, total: int | None, desc: str, unit: str = "image", initial: int = 0
) -> "tqdm[Any]":
    """A bar on stderr that disappears when done; without a terminal, a line every 15 seconds.

    Use it as a context manager and call `update(n)`.

    Args:
        initial: how much of `total` is already done.
    """
    if _disabled:
        return tqdm(total=total, disable=True)
    if sys.stderr.isatty():
        return tqdm(
            total=total, desc=desc, unit=unit, initial=initial, leave=False, dynamic_ncols=True
        )
    return tqdm(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        leave=False,
        ncols=0,
        # A job shorter than this prints nothing.
        delay=_SECONDS_BETWEEN_LINES,
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=_SECONDS_BETWEEN_LINES,
        miniters=1,
        file=_LineStream(sys.stderr),
    )


class _LineStream:
    """Turns the carriage returns of a bar into lines, so that a log file stays readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()
