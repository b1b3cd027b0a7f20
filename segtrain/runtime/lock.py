"""Exclusive lock on a run folder.

The kernel ties the lock to the process: however the process ends, the lock is released.
"""

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
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock `folder`, which must exist, for this process.

    Raises:
        BusyError: another process holds the lock.
        ResourceError: the folder is not writable.
    """
    path = folder / _NAME
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ResourceError(
            f"cannot write {path}: {error.strerror}",
            "check the permissions or choose another folder",
        ) from error
    _held.add(fd)
    try:
        if not _try_lock(fd, timeout=0.3):
            raise _busy_error(folder)
        os.ftruncate(fd, 0)
        os.write(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        _held.discard(fd)
        os.close(fd)


def refuse_if_busy(folder: Path) -> None:
    """Raise BusyError if another process holds the lock of `folder`. Does not wait."""
    if is_busy(folder):
        raise _busy_error(folder)


def is_busy(folder: Path) -> bool:
    """Whether a process holds the lock of `folder`."""
    try:
        fd = os.open(folder / _NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _try_lock(fd)
    finally:
        os.close(fd)


def _try_lock(fd: int, timeout: float = 0.0) -> bool:
    """Retry for `timeout` seconds, because `is_busy` holds the lock for a moment."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        except OSError:
            return True  # the file system has no locks: continue without


def _busy_error(folder: Path) -> BusyError:
    try:
        holder = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        by_process = f" by process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        by_process = ""
    return BusyError(f"{folder} is in use{by_process}", "wait for it or stop it first")


def _close_in_child() -> None:
    # A loader process may outlive its killed parent for a moment and must not keep the lock.
    for fd in _held:
        with suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
