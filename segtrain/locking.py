"""One process a run folder. The lock belongs to the process: whatever ends it ends the lock."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from segtrain.errors import BusyError, ResourceError

_NAME = ".lock"
_held: set[int] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder`, which must exist, for this process alone.

    Raises:
        BusyError: another process holds it.
        ResourceError: the folder cannot be written.
    """
    path = folder / _NAME
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}; check the permissions or choose another folder"
        ) from error
    _held.add(lock)
    try:
        if not _take(lock, patience=0.3):
            raise _busy(folder)
        os.ftruncate(lock, 0)
        os.write(lock, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        _held.discard(lock)
        os.close(lock)


def refuse_if_busy(folder: Path) -> None:
    """Raises BusyError if another process holds `folder`, and takes no time to find out."""
    if is_busy(folder):
        raise _busy(folder)


def is_busy(folder: Path) -> bool:
    """Whether a process holds `folder`."""
    try:
        lock = os.open(folder / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _take(lock)
    finally:
        os.close(lock)


def _take(lock: int, patience: float = 0.0) -> bool:
    """Try to; for `patience` seconds, since whoever asks `is_busy` holds it for a moment."""
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:
            return True  # a file system without locks: go without


def _busy(folder: Path) -> BusyError:
    try:
        holder = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        by_whom = f" by process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        by_whom = ""
    return BusyError(f"{folder} is in use{by_whom}; wait for it or stop it first")


def _let_go() -> None:
    # A loader process that outlives its killed parent for a moment must not keep the lock.
    for lock in _held:
        with suppress(OSError):
            os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
