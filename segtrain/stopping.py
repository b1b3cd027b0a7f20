"""Being asked to stop, by Ctrl-C, SIGTERM or SIGUSR1, without being torn apart.

An exception raised by a signal handler comes out of whatever the process is doing: in the middle of
a save, or of C code that calls back into Python and aborts the process. So a signal only leaves a
note here, and long jobs look for it between two pieces of work, as every progress bar does.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is what schedulers send some time before they take the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_received: list[signal.Signals] = []
_raise_at_once = False


class Stopped(Exception):  # noqa: N818, it is no error
    """The job was asked to stop and does so, with everything whole that it has written."""

    def __init__(
        self, received: signal.Signals, what_stays: str = "what was saved before stays"
    ) -> None:
        super().__init__(f"stopped by {received.name}; {what_stays}")
        self.received = received
        self.exit_code = _exit_code(received)


@contextmanager
def listening() -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGUSR1 are noted for `check`; the third ends it all at once."""
    _received.clear()
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check() -> None:
    """Call it where stopping is safe. Raises Stopped if a signal has come."""
    if _received:
        raise Stopped(_received[0])


def requested() -> bool:
    """Whether a signal has come."""
    return bool(_received)


def signal_received() -> signal.Signals:
    """The first one; SIGTERM where it came to another process of the job."""
    return _received[0] if _received else signal.SIGTERM


@contextmanager
def at_once() -> Iterator[None]:
    """Within, a signal raises Stopped wherever the code is: for pure Python that waits for long."""
    global _raise_at_once
    check()
    _raise_at_once = True
    try:
        yield
    finally:
        _raise_at_once = False


def _note(number: int, frame: FrameType | None) -> None:
    received = signal.Signals(number)
    _received.append(received)
    if _raise_at_once:
        raise Stopped(received)
    if len(_received) == 1:
        _tell(f"{received.name}: stopping as soon as it is safe; the third one ends at once")
    elif len(_received) > 2:
        os._exit(_exit_code(received))


def _tell(line: str) -> None:
    # Not by print: the handler may have interrupted one, and they must not be nested.
    os.write(2, f"\n{line}\n".encode())


def _exit_code(received: signal.Signals) -> int:
    # Whoever is asked by SIGUSR1 has been pre-empted as by SIGTERM.
    return 128 + (signal.SIGTERM if received == signal.SIGUSR1 else received)
