"""Graceful stop on Ctrl-C, SIGTERM or SIGUSR1.

An exception raised by a signal handler can surface in any code: in the middle of a save, or in C
code that calls back into Python and aborts the process. So the handler only records the signal, and
long loops call `raise_if_stopped` where stopping is safe.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Schedulers send SIGUSR1 some time before they take the machine away.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

_received: list[signal.Signals] = []
_raise_immediately = False


class Stopped(Exception):  # noqa: N818, not an error
    """A signal stopped the job; all files that it has written are complete."""

    def __init__(
        self, received: signal.Signals, outcome: str = "everything saved so far is kept"
    ) -> None:
        super().__init__(f"stopped by {received.name}; {outcome}")
        self.received = received
        self.exit_code = _exit_code(received)


@contextmanager
def handle_signals() -> Iterator[None]:
    """Record SIGINT, SIGTERM and SIGUSR1 inside the block for `raise_if_stopped`.

    The third signal ends the process at once.
    """
    _received.clear()
    previous = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def raise_if_stopped() -> None:
    """Raise Stopped if a signal was received. Call it where stopping is safe."""
    if _received:
        raise Stopped(_received[0])


def stop_requested() -> bool:
    """Whether a signal was received."""
    return bool(_received)


def signal_received() -> signal.Signals:
    """The first signal; SIGTERM if another process of the job received it."""
    return _received[0] if _received else signal.SIGTERM


@contextmanager
def interrupt_immediately() -> Iterator[None]:
    """Raise Stopped from the signal handler itself inside the block: for long waits in Python."""
    global _raise_immediately
    raise_if_stopped()
    _raise_immediately = True
    try:
        yield
    finally:
        _raise_immediately = False


def _handle(number: int, frame: FrameType | None) -> None:
    received = signal.Signals(number)
    _received.append(received)
    if _raise_immediately:
        raise Stopped(received)
    if len(_received) == 1:
        _write_line(f"{received.name}: stopping as soon as it is safe; a third signal ends at once")
    elif len(_received) > 2:
        os._exit(_exit_code(received))


def _write_line(line: str) -> None:
    # print is not reentrant, and the handler may have interrupted one.
    os.write(2, f"\n{line}\n".encode())


def _exit_code(received: signal.Signals) -> int:
    # SIGUSR1 announces a preemption, as SIGTERM does.
    return 128 + (signal.SIGTERM if received == signal.SIGUSR1 else received)
