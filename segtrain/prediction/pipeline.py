"""Read, predict and write images concurrently, in bounded memory, with results in input order.

A thread pool reads ahead and writes results. The network runs in the thread that iterates over the
outcomes, and that thread makes all decisions: what is read next, what forms a batch, what is
yielded next. So no locks are needed, and deadlocks are impossible.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from segtrain.errors import DataError
from segtrain.imaging.images import DecodedImage
from segtrain.inference.backend import Backend
from segtrain.inference.probability import ProbsLike
from segtrain.prediction.jobs import Job
from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.signals import raise_if_stopped
from segtrain.types import Image

ImageStats = Mapping[str, Any]
PostprocessFn = Callable[[Job, Image, ProbsLike], ImageStats]

# Peak memory per pixel, from decoding to the encoded outputs.
_BYTES_PER_PIXEL = 24
# Memory that all images in flight share; an image that needs more is processed alone.
_MAX_BYTES = 10**9
_SIGNAL_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Outcome:
    """The outcome of one image.

    Attributes:
        job: the job of the image.
        stats: what postprocessing returned; None if the image failed.
        error: the reason of a failure.
        note: ignored parts of the file, such as other frames of an animation.
        size: height and width.
        seconds: of work, without waiting.
    """

    job: Job
    stats: ImageStats | None = None
    error: str | None = None
    note: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0


@dataclass
class _InFlight:
    """An image that is being processed.

    Attributes:
        num_bytes: estimated peak memory.
        image: the decoded image; released as soon as the network has run.
        result: the future of the outcome: postprocessing, or a failed read.
    """

    job: Job
    num_bytes: int
    image: Future[tuple[DecodedImage, float]] | None
    result: Future[Any] | None = None
    note: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0


class Pipeline:
    """Process jobs. Inside `with`, it reads ahead, even before the network is loaded.

    Leaving the block early, by any exception, waits for the reads and writes in progress and starts
    nothing new, so the outputs of an image are written completely or not at all.

    Args:
        jobs: images, no videos.
        count_pixels: returns the size of a job's image from its header; 0 if unknown.
        read: decodes the image of a job. A DataError fails only this image.
        postprocess: makes and writes the outputs of a job. A DataError fails only this image.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        count_pixels: Callable[[Job], int],
        read: Callable[[Job], DecodedImage],
        postprocess: PostprocessFn,
    ) -> None:
        self._queue = deque(jobs)
        self._count_pixels, self._read, self._postprocess = count_pixels, read, postprocess
        self._in_flight: deque[_InFlight] = deque()
        self._num_threads = available_cpus()
        self._pool = ThreadPoolExecutor(self._num_threads, "images")
        self._batch_size = 1
        self.num_done = 0

    def __enter__(self) -> Self:
        self._read_ahead()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.num_done += sum(_succeeded(item.result) for item in self._in_flight)

    def outcomes(self, backend: Backend) -> Iterator[Outcome]:
        """Yield the outcome of every job, in the order of the jobs.

        Args:
            backend: gets images of one size in batches of up to `backend.batch_size`.

        Raises:
            Stopped: a signal was received.
            Exception: any exception of the backend, or of a step except its DataError.
        """
        self._batch_size = backend.batch_size
        while self._in_flight or self._queue:
            self._read_ahead()
            pending = [item for item in self._in_flight if item.result is None]
            if pending:
                self._predict_batch(backend, pending)
            else:
                _wait(self._in_flight[0].result)
            while self._in_flight and _is_done(self._in_flight[0].result):
                yield self._outcome(self._in_flight.popleft())

    def _read_ahead(self) -> None:
        num_bytes = sum(item.num_bytes for item in self._in_flight)
        # Enough to keep all threads busy while one batch is in the network and the next one waits.
        max_in_flight = 2 * (self._num_threads + self._batch_size)
        while self._queue and len(self._in_flight) < max_in_flight:
            job = self._queue[0]
            needed = self._count_pixels(job) * _BYTES_PER_PIXEL
            if self._in_flight and num_bytes + needed > _MAX_BYTES:
                return
            num_bytes += needed
            self._queue.popleft()
            image = self._pool.submit(_timed, self._read, job)
            self._in_flight.append(_InFlight(job, needed, image))

    def _predict_batch(self, backend: Backend, pending: Sequence[_InFlight]) -> None:
        """Run the network on the next image and on decoded ones of the same size."""
        _wait(pending[0].image)
        batch: list[_InFlight] = []
        images: list[Image] = []
        for item in pending:
            if len(batch) == self._batch_size:
                break
            if item.image is None or not item.image.done():
                continue
            if item.image.exception() is not None:
                item.result, item.image = item.image, None
                continue
            decoded, seconds = item.image.result()
            if images and decoded.pixels.shape != images[0].shape:
                continue
            item.note, item.size, item.seconds = decoded.note, decoded.size, seconds
            item.image = None
            batch.append(item)
            images.append(decoded.pixels)
        if not batch:
            return
        started = perf_counter()
        batch_probs = backend.probs(images)
        seconds = (perf_counter() - started) / len(batch)
        for item, image, probs in zip(batch, images, batch_probs, strict=True):
            item.seconds += seconds
            item.result = self._pool.submit(_timed, self._postprocess, item.job, image, probs)

    def _outcome(self, item: _InFlight) -> Outcome:
        assert item.result is not None
        try:
            stats, seconds = item.result.result()
        except DataError as error:
            return Outcome(item.job, error=str(error))
        self.num_done += 1
        seconds += item.seconds
        return Outcome(item.job, stats, note=item.note, size=item.size, seconds=seconds)


def _timed(step: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = perf_counter()
    return step(*arguments), perf_counter() - started


def _wait(future: Future[Any] | None) -> None:
    """Wait until the future is done. Raises Stopped if a signal is received."""
    assert future is not None
    raise_if_stopped()
    while not wait([future], timeout=_SIGNAL_POLL_SECONDS).done:
        raise_if_stopped()


def _is_done(future: Future[Any] | None) -> bool:
    return future is not None and future.done()


def _succeeded(future: Future[Any] | None) -> bool:
    return (
        future is not None
        and future.done()
        and not future.cancelled()
        and future.exception() is None
    )
