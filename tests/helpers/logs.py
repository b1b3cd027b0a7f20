"""Capture log lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Collect the lines that segtrain logs inside the block."""
    lines: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("segtrain"), Collector()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
