"""Reading, the network and writing at the same time, in bounded memory, results in order.

Threads read ahead and write behind; the network is asked by the thread that asks for outcomes,
which also decides everything: what is let in, what goes together, what comes out next. So there is
nothing to lock and no way to wait in a circle.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from segtrain.cores import usable_cores
from segtrain.errors import DataError
from segtrain.images import Picture, Pixels
from segtrain.prediction.jobs import Job
from segtrain.prediction.network import Network
from segtrain.prediction.probability import Probability
from segtrain.stopping import check

Facts = Mapping[str, Any]
Finish = Callable[[Job, Pixels, Probability], Facts]

# What a picture takes from decoding to its encoded outputs, in bytes a pixel.
_BYTES_PER_PIXEL = 24
# All pictures under way share so much; one that takes more goes alone.
_ROOM = 10**9
_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class Outcome:
    """What became of a picture.

    facts: what finishing it found; None where it could not be used, and `problem` says why.
    size: height and width. seconds: spent on it, waiting not counted.
    """

    job: Job
    facts: Facts | None = None
    problem: str | None = None
    note: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0


@dataclass
class _Flight:
    """A picture on its way.

    reading: let go as soon as the network has the picture. ending: what its outcome comes from:
    finishing it, or reading it where that failed.
    """

    job: Job
    room: int
    reading: Future[tuple[Picture, float]] | None
    ending: Future[Any] | None = None
    note: str | None = None
    size: tuple[int, int] | None = None
    seconds: float = 0.0


class Pipeline:
    """Does jobs. Inside `with` it reads ahead, even before there is a network to ask.

    Leaving it early, by whatever exception, waits for what is being read or written and begins
    nothing new: a picture's outputs are all there or none is.

    Args:
        jobs: pictures, no videos.
        weigh: how many pixels a job will have, at a glance; 0 where that cannot be seen.
        read: decodes the picture of a job; its DataError costs this picture only.
        finish: makes and writes the outputs of a job; as `read` does.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        weigh: Callable[[Job], int],
        read: Callable[[Job], Picture],
        finish: Finish,
    ) -> None:
        self._waiting = deque(jobs)
        self._weigh, self._read, self._finish = weigh, read, finish
        self._flights: deque[_Flight] = deque()
        self._threads = usable_cores()
        self._pool = ThreadPoolExecutor(self._threads, "pictures")
        self._at_once = 1
        self.num_done = 0

    def __enter__(self) -> Self:
        self._let_in()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.num_done += sum(_went_well(flight.ending) for flight in self._flights)

    def outcomes(self, network: Network) -> Iterator[Outcome]:
        """Every job's outcome, in the order of the jobs.

        Args:
            network: gets pictures of one size together, as many as it likes best.

        Raises:
            Stopped: a signal has come.
            Exception: whatever the network, or a step but for its DataError, raises.
        """
        self._at_once = network.at_once
        while self._flights or self._waiting:
            self._let_in()
            unasked = [flight for flight in self._flights if flight.ending is None]
            if unasked:
                self._ask(network, unasked)
            else:
                _wait(self._flights[0].ending)
            while self._flights and _has_ended(self._flights[0].ending):
                yield self._outcome(self._flights.popleft())

    def _let_in(self) -> None:
        taken = sum(flight.room for flight in self._flights)
        # So many keep all threads busy while the network has a batch and the next one waits.
        at_most = 2 * (self._threads + self._at_once)
        while self._waiting and len(self._flights) < at_most:
            job = self._waiting[0]
            room = self._weigh(job) * _BYTES_PER_PIXEL
            if self._flights and taken + room > _ROOM:
                return
            taken += room
            self._waiting.popleft()
            self._flights.append(_Flight(job, room, self._pool.submit(_timed, self._read, job)))

    def _ask(self, network: Network, unasked: Sequence[_Flight]) -> None:
        """Ask about the next picture, and those of its size that have been read."""
        _wait(unasked[0].reading)
        batch: list[_Flight] = []
        pictures: list[Pixels] = []
        for flight in unasked:
            if len(batch) == self._at_once:
                break
            if flight.reading is None or not flight.reading.done():
                continue
            if flight.reading.exception() is not None:
                flight.ending, flight.reading = flight.reading, None
                continue
            picture, seconds = flight.reading.result()
            if pictures and picture.pixels.shape != pictures[0].shape:
                continue
            flight.note, flight.size, flight.seconds = picture.note, picture.size, seconds
            flight.reading = None
            batch.append(flight)
            pictures.append(picture.pixels)
        if not batch:
            return
        started = perf_counter()
        answers = network.probs(pictures)
        seconds = (perf_counter() - started) / len(batch)
        for flight, pixels, probability in zip(batch, pictures, answers, strict=True):
            flight.seconds += seconds
            flight.ending = self._pool.submit(_timed, self._finish, flight.job, pixels, probability)

    def _outcome(self, flight: _Flight) -> Outcome:
        assert flight.ending is not None
        try:
            facts, seconds = flight.ending.result()
        except DataError as error:
            return Outcome(flight.job, problem=str(error))
        self.num_done += 1
        seconds += flight.seconds
        return Outcome(flight.job, facts, note=flight.note, size=flight.size, seconds=seconds)


def _timed(step: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    started = perf_counter()
    return step(*arguments), perf_counter() - started


def _wait(future: Future[Any] | None) -> None:
    """Until it has ended, or a signal has come."""
    assert future is not None
    check()
    while not wait([future], timeout=_SECONDS_BETWEEN_LOOKS).done:
        check()


def _has_ended(future: Future[Any] | None) -> bool:
    return future is not None and future.done()


def _went_well(future: Future[Any] | None) -> bool:
    return (
        future is not None
        and future.done()
        and not future.cancelled()
        and future.exception() is None
    )
