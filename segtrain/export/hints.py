"""Keeping the exporters' own hints, which say nothing about the file, off the user's screen."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hints_hidden() -> Iterator[None]:
    """Within, warnings are not shown, and of what is logged only errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
