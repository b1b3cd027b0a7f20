"""Reading, asking and writing overlap, keep their order and memory, and never hang or leave halves.

Networks and steps here are made of events, not of time: a test that waits would wait for ever.
"""

import os
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from segtrain.errors import DataError, ResourceError
from segtrain.images import Picture, Pixels
from segtrain.prediction.jobs import Job
from segtrain.prediction.pipeline import Outcome, Pipeline
from segtrain.prediction.probability import Probability
from segtrain.stopping import Stopped, listening

SECONDS = 30  # of patience before a test says that something hangs


class FakeNetwork:
    """Says how large the batches were; may be told to fail."""

    description = "fake"

    def __init__(self, before: Callable[[], object] = lambda: None, *, at_once: int = 1) -> None:
        self.at_once = at_once
        self.batches: list[int] = []
        self._before = before

    def probs(self, pictures: Sequence[Pixels]) -> list[Probability]:
        self._before()
        self.batches.append(len(pictures))
        return [np.full(picture.shape[:2], 0.5, dtype=np.float32) for picture in pictures]


def job(number: int) -> Job:
    return Job(Path(f"{number}.png"), {"mask": Path(f"{number}_mask.png")})


def number_of(job: Job) -> int:
    assert job.source is not None
    return int(job.source.stem)


def read(job: Job, size: tuple[int, int] = (2, 3)) -> Picture:
    pixels = np.full((*size, 3), number_of(job), dtype=np.uint8)
    return Picture(pixels, size, None)


def finish(job: Job, image: Pixels, probability: Probability) -> dict[str, Any]:
    return {"number": int(image[0, 0, 0])}


def pipeline(num_jobs: int, **steps: Any) -> Pipeline:
    given: dict[str, Any] = {"weigh": lambda job: 6, "read": read, "finish": finish} | steps
    return Pipeline([job(number) for number in range(num_jobs)], **given)


def outcomes_of(running: Pipeline, network: FakeNetwork | None = None) -> list[Outcome]:
    with running:
        return list(running.outcomes(network or FakeNetwork()))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    left = [thread.name for thread in threading.enumerate() if "pictures" in thread.name]
    assert left == []


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 50])
def test_each_job_has_its_outcome_in_the_order_of_the_jobs(num_jobs: int) -> None:
    done = outcomes_of(pipeline(num_jobs))

    assert [number_of(outcome.job) for outcome in done] == list(range(num_jobs))
    assert [outcome.facts for outcome in done] == [{"number": n} for n in range(num_jobs)]
    assert all(outcome.size == (2, 3) and outcome.seconds > 0 for outcome in done)


def test_a_slow_first_picture_does_not_change_the_order() -> None:
    second_is_finished = threading.Event()

    def slow(job: Job, image: Pixels, probability: Probability) -> dict[str, Any]:
        if number_of(job) == 0:
            assert second_is_finished.wait(SECONDS)
        elif number_of(job) == 1:
            second_is_finished.set()
        return {}

    done = outcomes_of(pipeline(6, finish=slow))

    assert [number_of(outcome.job) for outcome in done] == [0, 1, 2, 3, 4, 5]


def test_reading_begins_before_there_is_a_network() -> None:
    was_read = threading.Event()

    def note(job: Job) -> Picture:
        was_read.set()
        return read(job)

    with pipeline(3, read=note) as running:
        assert was_read.wait(SECONDS)
        assert len(list(running.outcomes(FakeNetwork()))) == 3


def test_the_next_is_read_and_the_last_written_while_the_network_works() -> None:
    """Neither event can come true where the steps take turns."""
    third_was_read, first_is_written = threading.Event(), threading.Event()

    def note_reading(job: Job) -> Picture:
        if number_of(job) == 2:
            third_was_read.set()
        return read(job)

    def note_writing(job: Job, image: Pixels, probability: Probability) -> dict[str, Any]:
        if number_of(job) == 0:
            first_is_written.set()
        return {}

    network = FakeNetwork()

    def second_question_waits() -> None:
        if network.batches:
            assert third_was_read.wait(SECONDS)
            assert first_is_written.wait(SECONDS)

    network._before = second_question_waits
    assert len(outcomes_of(pipeline(3, read=note_reading, finish=note_writing), network)) == 3


@pytest.mark.parametrize(("megapixels", "together"), [(100, 1), (30, 1), (12, 3), (0, 6)])
def test_large_pictures_share_a_gigabyte(
    megapixels: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 bytes a pixel: 100 megapixels go alone, three of 12 go together."""
    monkeypatch.setattr("segtrain.prediction.pipeline.usable_cores", lambda: 2)
    lock, under_way, most = threading.Lock(), 0, 0

    def count(job: Job) -> Picture:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        return read(job)

    with pipeline(20, read=count, weigh=lambda job: megapixels * 10**6) as running:
        for _ in running.outcomes(FakeNetwork()):
            with lock:
                under_way -= 1
    assert most <= together


def test_pictures_of_one_size_that_are_read_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segtrain.prediction.pipeline.usable_cores", lambda: 2)
    sizes = {0: (2, 3), 1: (3, 2), 2: (2, 3), 3: (2, 3)}
    others_are_read = threading.Event()

    def mixed(job: Job) -> Picture:
        # One thread keeps the first picture back until the other one has come to the last.
        if number_of(job) == 0:
            assert others_are_read.wait(SECONDS)
        elif number_of(job) == 3:
            others_are_read.set()
        return read(job, sizes[number_of(job)])

    network = FakeNetwork(at_once=2)
    done = outcomes_of(pipeline(4, read=mixed), network)

    assert network.batches == [2, 1, 1]  # 0 with 2, then 1, then 3
    assert [outcome.facts for outcome in done] == [{"number": n} for n in range(4)]


# -------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("where", ["read", "finish"])
def test_bad_data_costs_one_picture(where: str) -> None:
    def fails(job: Job, *arguments: Any) -> Any:
        if number_of(job) in {0, 3, 9}:
            raise DataError(f"{number_of(job)} is damaged")
        return read(job) if where == "read" else finish(job, *arguments)

    running = pipeline(10, **{where: fails})
    done = outcomes_of(running)

    assert [outcome.problem for outcome in done if outcome.problem] == [
        f"{n} is damaged" for n in (0, 3, 9)
    ]
    assert [number_of(outcome.job) for outcome in done] == list(range(10))
    assert running.num_done == 7


@pytest.mark.parametrize("error", [ResourceError, MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["read", "finish", "network", "weigh"])
@pytest.mark.parametrize("at", [0, 7])
def test_any_other_exception_ends_it_all(where: str, at: int, error: type[BaseException]) -> None:
    """It comes out as it is, and nothing waits for ever."""
    calls = 0

    def fail_in_time(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise error("planted")

    def step(original: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any) -> Any:
            fail_in_time()
            return original(*arguments)

        return failing

    steps = {"read": read, "finish": finish, "weigh": lambda job: 6}
    planted = {where: step(steps[where])} if where in steps else {}
    network = FakeNetwork(fail_in_time if where == "network" else lambda: None)

    with pytest.raises(error, match="planted"):
        outcomes_of(pipeline(30, **planted), network)


def test_what_has_begun_is_finished_and_nothing_else_begins() -> None:
    """The picture being written when the network fails is written, and counted."""
    writing, network_failed = threading.Event(), threading.Event()
    written = []

    def write(job: Job, image: Pixels, probability: Probability) -> dict[str, Any]:
        writing.set()
        assert network_failed.wait(SECONDS)
        written.append(number_of(job))
        return {}

    network = FakeNetwork()

    def fail() -> None:
        if network.batches:
            assert writing.wait(SECONDS)
            network_failed.set()
            raise RuntimeError("planted")

    network._before = fail
    running = pipeline(30, finish=write)
    with pytest.raises(RuntimeError, match="planted"):
        outcomes_of(running, network)

    assert written == [0]
    assert running.num_done == 1


def test_a_signal_stops_it_even_while_it_waits_for_a_picture() -> None:
    stopping = threading.Event()

    def endless(job: Job) -> Picture:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.wait(SECONDS)  # as a network drive that does not answer
        return read(job)

    running = pipeline(5, read=endless)

    def stop() -> None:
        with running:
            try:
                list(running.outcomes(FakeNetwork()))
            finally:
                stopping.set()

    with listening(), pytest.raises(Stopped):
        stop()
    with listening():
        pass  # the next tests have received nothing


def test_whoever_takes_only_some_outcomes_leaves_nothing_behind() -> None:
    with pipeline(50) as running:
        results = running.outcomes(FakeNetwork())
        assert number_of(next(results).job) == 0
