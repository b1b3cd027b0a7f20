"""One progress bar for everything that takes longer than two seconds."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from segtrain.stopping import check

_SECONDS_BETWEEN_LINES = 15.0


class _Lines:
    """Turns a bar's carriage returns into lines, so that a log file stays readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


class _Bar(tqdm):  # type: ignore[type-arg]
    """Every long job moves its bar between two pieces of work: there it can stop."""

    def update(self, n: float | None = 1) -> bool | None:
        check()
        return super().update(n)


_silent = False


@contextmanager
def silenced() -> Iterator[None]:
    """Within, nothing is shown: of several processes one talks."""
    global _silent
    _silent = True
    try:
        yield
    finally:
        _silent = False


def progress_bar(
    *, total: int | None, desc: str, unit: str = "image", initial: int = 0, listens: bool = True
) -> "tqdm[Any]":
    """A bar on stderr that goes away when done; where stderr is no terminal, a line now and then.

    Use it as a context manager and call `update(n)`.

    Args:
        initial: what of `total` was done before.
        listens: False leaves it to the caller to look for signals.

    Raises:
        Stopped: a signal has come; `update` raises it, too.
    """
    bar: type[tqdm[Any]] = _Bar if listens else tqdm
    if listens:
        check()
    if _silent:
        return bar(total=total, disable=True)
    if sys.stderr.isatty():
        return bar(
            total=total, desc=desc, unit=unit, initial=initial, leave=False, dynamic_ncols=True
        )
    return bar(
        total=total,
        initial=initial,
        desc=desc,
        unit=unit,
        leave=False,
        ncols=0,
        # A short job should leave no line behind, a long one a line every so often.
        delay=_SECONDS_BETWEEN_LINES,
        mininterval=_SECONDS_BETWEEN_LINES,
        maxinterval=_SECONDS_BETWEEN_LINES,
        miniters=1,
        file=_Lines(sys.stderr),
    )
