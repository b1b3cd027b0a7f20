"""Data loader workers: how many, how they start, and how their failures are reported."""

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

from segtrain.data.sample import Sample, SegmentationDataset
from segtrain.errors import ResourceError
from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.signals import SIGNALS

# Batches that a worker holds or prepares at any time.
BATCHES_PER_WORKER = 2
_SHARED_MEMORY = Path("/dev/shm")

SampleOrError = Sample | str
"""A sample, or the error message of an unreadable image: an exception would end the worker."""


class SampleLoader(Protocol):
    """Samples of a dataset by index or by (epoch, index)."""

    dataset: SegmentationDataset

    def __getitem__(self, key: Any, /) -> SampleOrError: ...


def resolve_workers(workers: int | Literal["auto"]) -> int:
    """Return the number of workers; "auto" is one per two cores of this process, at most 8."""
    if workers == "auto":
        return min(8, max(1, available_cpus() // 2))
    return workers


def check_shared_memory(workers: int, num_batches: int, *, bytes_per_batch: int) -> None:
    """Check that the batches that workers hold fit into shared memory.

    Args:
        num_batches: batches of an epoch.
        bytes_per_batch: lower bound for a full batch.

    Raises:
        ResourceError: they do not fit. During training, a batch would be lost or a worker killed.
    """
    if not workers or not _SHARED_MEMORY.is_dir():
        return
    needed = min(workers * BATCHES_PER_WORKER, num_batches) * bytes_per_batch
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free < needed:
        raise ResourceError(
            f"{_SHARED_MEMORY} has {free / 1e6:.0f} MB free, but the batches of {workers} loader "
            f"processes need {needed / 1e6:.0f} MB",
            "use --workers 0, or docker run --shm-size=8g",
        )


class WorkerTracker(Dataset[SampleOrError]):
    """Records which image each worker is loading, to name it if the worker dies or hangs.

    Attributes:
        progress: one row per worker: its pid, the index (-1 between two images), and the start
            time of the image in milliseconds.
    """

    def __init__(self, samples: SampleLoader, workers: int) -> None:
        self.samples = samples
        self.progress = [multiprocessing.RawArray("q", [0, -1, 0]) for _ in range(workers)]

    def __getitem__(self, key: Any) -> SampleOrError:
        worker = get_worker_info()
        if worker is None:
            return self.samples[key]
        index = key[1] if isinstance(key, tuple) else key
        self.progress[worker.id][:] = (os.getpid(), index, int(time.monotonic() * 1000))
        sample = self.samples[key]
        self.progress[worker.id][1] = -1
        return sample

    def suspect(self) -> Path | None:
        """Return the image at which a worker died or hangs; None if it was between two images."""
        alive = {child.pid for child in multiprocessing.active_children()}
        rows = [tuple(row) for row in self.progress if row[1] >= 0]
        dead = [row for row in rows if row[0] not in alive]
        if not rows:
            return None
        # If all are alive, the one with the oldest start time hangs.
        _, index, _ = min(dead or rows, key=lambda row: row[2])
        return self.samples.dataset.image_path(index)

    def kill_workers(self) -> None:
        """Kill the workers of this tracker.

        A worker that hangs does not read its queue, and it blocks SIGTERM, which torch sends.
        """
        for child in multiprocessing.active_children():
            if child.pid in {row[0] for row in self.progress}:
                child.kill()


@contextmanager
def worker_errors(*trackers: WorkerTracker) -> Iterator[None]:
    """Convert the death or timeout of a worker into a ResourceError.

    torch reports a dead worker by a signal, which can raise anywhere in the main process. So wrap
    the code that uses the batches, too.

    Args:
        trackers: the trackers of all loaders that may have workers; they name the last image.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if str(error).startswith("Caught MemoryError in DataLoader worker"):
            raise ResourceError(
                "a loader process ran out of memory", "try fewer --workers or a smaller batch"
            ) from error
        # A bug in this package starts with "Caught RuntimeError in DataLoader worker".
        if not str(error).startswith(("DataLoader worker (pid", "DataLoader timed out")):
            raise
        raise _lost_worker_error(*trackers) from error


@contextmanager
def connection_errors(tracker: WorkerTracker) -> Iterator[None]:
    """Like `worker_errors`, for a worker that dies while its batch is being fetched."""
    try:
        yield
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if not tracker.progress or "in DataLoader worker" in str(error):
            raise
        raise _lost_worker_error(tracker) from error


def _lost_worker_error(*trackers: WorkerTracker) -> ResourceError:
    _ignore_dead_workers()
    suspects = [path for tracker in trackers if (path := tracker.suspect()) is not None]
    at = f" at {suspects[0]}" if suspects else ""
    for tracker in trackers:
        tracker.kill_workers()
    return ResourceError(
        f"a loader process died or hangs{at}, perhaps because memory or /dev/shm is full",
        "try --workers 0 or a smaller batch",
    )


def _ignore_dead_workers() -> None:
    """Stop torch from reporting dead workers: each death would raise the same error again.

    torch installs its handler again with the next loader.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # torch installs no handler there, either
    for _ in range(2):
        # A pending signal is delivered first, and raises.
        with suppress(RuntimeError):
            signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal_handling._SIGCHLD_handler_set = False


@contextmanager
def block_signals() -> Iterator[None]:
    """Block SIGINT, SIGTERM and SIGUSR1 in processes that are started inside.

    Ctrl-C and schedulers signal all processes of a job. A worker has to survive until its parent
    has saved and ends it through the queue; a worker whose parent is gone ends by itself. Workers
    inherit the mask from their first moment: a handler that they install themselves would be too
    late for a signal during their start.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_children() -> None:
    # A worker that hangs does not read its queue, and it blocks SIGTERM, which Python would send.
    for child in multiprocessing.active_children():
        child.kill()


atexit.register(_kill_children)


def begin_worker(worker: int) -> None:
    """Initialize a worker process."""
    os.setpgid(0, 0)  # closing a terminal signals its whole process group
    cv2.setNumThreads(0)
    sys.excepthook = _ignore_lost_connections


def _ignore_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Report exceptions except lost connections.

    multiprocessing's thread in a worker raises one for each batch that the parent has discarded.
    """
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
