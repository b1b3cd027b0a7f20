"""The processes that load pictures: how they begin, what they survive, how their end is told."""

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

import cv2
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from segtrain.cores import usable_cores
from segtrain.data.sample import Sample, Source
from segtrain.errors import ResourceError
from segtrain.stopping import SIGNALS

# Batches that a worker has ready, or is making, at any time.
BATCHES_A_WORKER = 2
_SHARED_MEMORY = Path("/dev/shm")

# A picture that cannot be read travels as its message: an exception would end the worker.
Item = Sample | str


class Images(Protocol):
    """Pictures of a data set by index, or by (epoch, index)."""

    source: Source

    def __getitem__(self, key: Any, /) -> Item: ...


def resolve_workers(workers: int | Literal["auto"]) -> int:
    """auto: a process for every second core that this process may use, at most 8."""
    if workers == "auto":
        return min(8, max(1, usable_cores() // 2))
    return workers


def check_shared_memory(workers: int, num_batches: int, *, bytes_a_batch: int) -> None:
    """Make sure that the batches that worker processes have ready fit into shared memory.

    Args:
        num_batches: of an epoch.
        bytes_a_batch: of a full one, at least.

    Raises:
        ResourceError: they do not; in the midst of the training a batch would get lost, or the
            worker be killed.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    needed = min(workers * BATCHES_A_WORKER, num_batches) * bytes_a_batch
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise ResourceError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, the batches of {workers} loader "
            f"processes need {needed / 1e6:.0f}; use --workers 0, or docker run --shm-size=8g"
        )


class Watched(Dataset[Item]):
    """Pictures of which each worker process notes where it is, for when it dies there.

    at: a row a worker, its pid, the index (-1: between two pictures), and when it began with it in
        milliseconds.
    """

    def __init__(self, images: Images, workers: int) -> None:
        self.images = images
        self.at = [multiprocessing.RawArray("q", [0, -1, 0]) for _ in range(workers)]

    def __getitem__(self, key: Any) -> Item:
        worker = get_worker_info()
        if worker is None:
            return self.images[key]
        index = key[1] if isinstance(key, tuple) else key
        self.at[worker.id][:] = (os.getpid(), index, int(time.monotonic() * 1000))
        item = self.images[key]
        self.at[worker.id][1] = -1
        return item

    def suspect(self) -> Path | None:
        """The picture that a worker died at or hangs at; None where it was between two."""
        alive = {child.pid for child in multiprocessing.active_children()}
        rows = [tuple(row) for row in self.at if row[1] >= 0]
        dead = [row for row in rows if row[0] not in alive]
        if not rows:
            return None
        # Of several the one that has been at its picture for the longest hangs.
        _, index, _ = min(dead or rows, key=lambda row: row[2])
        return self.images.source.picture_path(index)

    def end_workers(self) -> None:
        """One that hangs does not look at its queue, and SIGTERM, which torch sends, is blocked."""
        for child in multiprocessing.active_children():
            if child.pid in {row[0] for row in self.at}:
                child.kill()


@contextmanager
def worker_errors(*watched: Watched) -> Iterator[None]:
    """Make a ResourceError of the death or silence of a worker process.

    torch tells of a dead worker by a signal, so wherever the main process is at that moment: put
    this around whatever is done with the batches, too.

    Args:
        watched: the pictures whose workers it may be; they know which was the last.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch says "Caught RuntimeError in DataLoader worker" of a bug in here.
        if str(error).startswith("Caught MemoryError in DataLoader worker"):
            raise ResourceError(
                "a loader process has no memory left; try fewer --workers or a smaller batch"
            ) from error
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise _lost_worker(*watched) from error


@contextmanager
def connection_errors(watched: Watched) -> Iterator[None]:
    """As `worker_errors`, where a batch was just being fetched from the worker that died."""
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if not watched.at or "in DataLoader worker" in str(error):
            raise
        raise _lost_worker(watched) from error


def _lost_worker(*watched: Watched) -> ResourceError:
    _hear_no_more()
    suspects = [path for images in watched if (path := images.suspect()) is not None]
    at = f" at {suspects[0]}" if suspects else ""
    for images in watched:
        images.end_workers()
    return ResourceError(
        f"a loader process died or hangs{at}, perhaps for lack of memory or /dev/shm; "
        "try --workers 0 or a smaller batch"
    )


def _hear_no_more() -> None:
    """Of workers that have died: each one's end would raise the same error again, wherever.

    torch begins to listen again with the next loader.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # torch does not listen there, either
    for _ in range(2):
        # A signal that is waiting is delivered first, and raises.
        with suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal_handling._SIGCHLD_handler_set = False


@contextmanager
def deaf_children() -> Iterator[None]:
    """Let processes that are made within never hear of what asks for an end.

    Ctrl-C and schedulers signal all processes of a job. A worker has to live on until its parent
    has saved and ends it by the queue; one without a parent ends by itself. It inherits this from
    its first moment: whatever it did by itself would come too late for a signal while it starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_workers() -> None:
    # One that hangs does not look at its queue, and SIGTERM, which Python would send, is blocked.
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_end_workers)


def begin_worker(worker: int) -> None:
    os.setpgid(0, 0)  # a terminal that is closed signals its group, too
    cv2.setNumThreads(0)
    sys.excepthook = _tell_of_other_than_lost_connections


def _tell_of_other_than_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """multiprocessing's thread in a worker tells of each batch that its parent no longer wants."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
