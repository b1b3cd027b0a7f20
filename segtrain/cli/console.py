"""Lines that the commands write to stderr without the log."""

import sys


def print_loading() -> None:
    """Announce the import of torch: it takes seconds, in which the command would seem to hang."""
    if sys.stderr.isatty():
        print_err("loading torch ...")


def print_err(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
