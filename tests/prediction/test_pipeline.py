"""The pipeline overlaps its steps, keeps order and memory bounds, and never hangs.

The steps here synchronize by events, not by time: a test of a hanging pipeline would hang forever.
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
from segtrain.imaging.images import DecodedImage
from segtrain.inference.probability import ProbsLike
from segtrain.prediction.jobs import Job
from segtrain.prediction.pipeline import Outcome, Pipeline
from segtrain.runtime.signals import Stopped, handle_signals
from segtrain.types import Image

TIMEOUT = 30  # seconds until a test reports a hang


class FakeBackend:
    """Records the batch sizes. `before` runs before each batch and may raise."""

    description = "fake"

    def __init__(self, before: Callable[[], object] = lambda: None, *, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.batches: list[int] = []
        self._before = before

    def probs(self, images: Sequence[Image]) -> list[ProbsLike]:
        self._before()
        self.batches.append(len(images))
        return [np.full(image.shape[:2], 0.5, dtype=np.float32) for image in images]


def make_job(number: int) -> Job:
    return Job(Path(f"{number}.png"), {"mask": Path(f"{number}_mask.png")})


def number_of(job: Job) -> int:
    assert job.source is not None
    return int(job.source.stem)


def read(job: Job, size: tuple[int, int] = (2, 3)) -> DecodedImage:
    pixels = np.full((*size, 3), number_of(job), dtype=np.uint8)
    return DecodedImage(pixels, size, None)


def postprocess(job: Job, image: Image, probs: ProbsLike) -> dict[str, Any]:
    return {"number": int(image[0, 0, 0])}


def make_pipeline(num_jobs: int, **steps: Any) -> Pipeline:
    arguments: dict[str, Any] = {
        "count_pixels": lambda job: 6,
        "read": read,
        "postprocess": postprocess,
    } | steps
    return Pipeline([make_job(number) for number in range(num_jobs)], **arguments)


def run_pipeline(pipeline: Pipeline, backend: FakeBackend | None = None) -> list[Outcome]:
    with pipeline:
        return list(pipeline.outcomes(backend or FakeBackend()))


@pytest.fixture(autouse=True)
def no_thread_remains() -> Any:
    yield
    remaining = [thread.name for thread in threading.enumerate() if "images" in thread.name]
    assert remaining == []


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 50])
def test_outcomes_come_in_the_order_of_the_jobs(num_jobs: int) -> None:
    outcomes = run_pipeline(make_pipeline(num_jobs))

    assert [number_of(outcome.job) for outcome in outcomes] == list(range(num_jobs))
    assert [outcome.stats for outcome in outcomes] == [{"number": n} for n in range(num_jobs)]
    assert all(outcome.size == (2, 3) and outcome.seconds > 0 for outcome in outcomes)


def test_a_slow_first_image_does_not_change_the_order() -> None:
    second_is_done = threading.Event()

    def slow(job: Job, image: Image, probs: ProbsLike) -> dict[str, Any]:
        if number_of(job) == 0:
            assert second_is_done.wait(TIMEOUT)
        elif number_of(job) == 1:
            second_is_done.set()
        return {}

    outcomes = run_pipeline(make_pipeline(6, postprocess=slow))

    assert [number_of(outcome.job) for outcome in outcomes] == [0, 1, 2, 3, 4, 5]


def test_reading_starts_before_the_network_is_loaded() -> None:
    started = threading.Event()

    def signal_start(job: Job) -> DecodedImage:
        started.set()
        return read(job)

    with make_pipeline(3, read=signal_start) as pipeline:
        assert started.wait(TIMEOUT)
        assert len(list(pipeline.outcomes(FakeBackend()))) == 3


def test_reading_and_writing_overlap_with_the_network() -> None:
    """Sequential steps would set neither event."""
    third_is_read, first_is_written = threading.Event(), threading.Event()

    def read_and_signal(job: Job) -> DecodedImage:
        if number_of(job) == 2:
            third_is_read.set()
        return read(job)

    def write_and_signal(job: Job, image: Image, probs: ProbsLike) -> dict[str, Any]:
        if number_of(job) == 0:
            first_is_written.set()
        return {}

    backend = FakeBackend()

    def wait_before_second_batch() -> None:
        if backend.batches:
            assert third_is_read.wait(TIMEOUT)
            assert first_is_written.wait(TIMEOUT)

    backend._before = wait_before_second_batch
    pipeline = make_pipeline(3, read=read_and_signal, postprocess=write_and_signal)
    assert len(run_pipeline(pipeline, backend)) == 3


@pytest.mark.parametrize(("megapixels", "max_in_flight"), [(100, 1), (30, 1), (12, 3), (0, 6)])
def test_large_images_share_a_gigabyte(
    megapixels: int, max_in_flight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 bytes per pixel: images of 30 or 100 megapixels run alone, three of 12 run together."""
    monkeypatch.setattr("segtrain.prediction.pipeline.available_cpus", lambda: 2)
    lock, in_flight, most = threading.Lock(), 0, 0

    def count(job: Job) -> DecodedImage:
        nonlocal in_flight, most
        with lock:
            in_flight += 1
            most = max(most, in_flight)
        return read(job)

    with make_pipeline(20, read=count, count_pixels=lambda job: megapixels * 10**6) as pipeline:
        for _ in pipeline.outcomes(FakeBackend()):
            with lock:
                in_flight -= 1
    assert most <= max_in_flight


def test_decoded_images_of_one_size_form_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segtrain.prediction.pipeline.available_cpus", lambda: 2)
    sizes = {0: (2, 3), 1: (3, 2), 2: (2, 3), 3: (2, 3)}
    others_are_read = threading.Event()

    def mixed(job: Job) -> DecodedImage:
        # One thread holds the first image back until the other one has reached the last.
        if number_of(job) == 0:
            assert others_are_read.wait(TIMEOUT)
        elif number_of(job) == 3:
            others_are_read.set()
        return read(job, sizes[number_of(job)])

    backend = FakeBackend(batch_size=2)
    outcomes = run_pipeline(make_pipeline(4, read=mixed), backend)

    assert backend.batches == [2, 1, 1]  # 0 and 2, then 1, then 3
    assert [outcome.stats for outcome in outcomes] == [{"number": n} for n in range(4)]


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("step", ["read", "postprocess"])
def test_a_data_error_fails_one_image(step: str) -> None:
    def fail_some(job: Job, *arguments: Any) -> Any:
        if number_of(job) in {0, 3, 9}:
            raise DataError(f"{number_of(job)} is damaged")
        return read(job) if step == "read" else postprocess(job, *arguments)

    pipeline = make_pipeline(10, **{step: fail_some})
    outcomes = run_pipeline(pipeline)

    assert [outcome.error for outcome in outcomes if outcome.error] == [
        f"{n} is damaged" for n in (0, 3, 9)
    ]
    assert [number_of(outcome.job) for outcome in outcomes] == list(range(10))
    assert pipeline.num_done == 7


@pytest.mark.parametrize("error", [ResourceError, MemoryError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["read", "postprocess", "backend", "count_pixels"])
@pytest.mark.parametrize("num_good_calls", [0, 7])
def test_any_other_exception_is_propagated(
    step: str, num_good_calls: int, error: type[BaseException]
) -> None:
    """The exception is raised unchanged, and no thread hangs."""
    calls = 0

    def fail_late(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > num_good_calls:
            raise error("planted")

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            fail_late()
            return original(*arguments)

        return run

    steps = {"read": read, "postprocess": postprocess, "count_pixels": lambda job: 6}
    replaced = {step: failing(steps[step])} if step in steps else {}
    backend = FakeBackend(fail_late if step == "backend" else lambda: None)

    with pytest.raises(error, match="planted"):
        run_pipeline(make_pipeline(30, **replaced), backend)


def test_a_failure_finishes_started_writes_and_starts_no_others() -> None:
    """An image that is being written when the network fails is completed and counted."""
    writing, network_failed = threading.Event(), threading.Event()
    written = []

    def write(job: Job, image: Image, probs: ProbsLike) -> dict[str, Any]:
        writing.set()
        assert network_failed.wait(TIMEOUT)
        written.append(number_of(job))
        return {}

    backend = FakeBackend()

    def fail() -> None:
        if backend.batches:
            assert writing.wait(TIMEOUT)
            network_failed.set()
            raise RuntimeError("planted")

    backend._before = fail
    pipeline = make_pipeline(30, postprocess=write)
    with pytest.raises(RuntimeError, match="planted"):
        run_pipeline(pipeline, backend)

    assert written == [0]
    assert pipeline.num_done == 1


def test_a_signal_interrupts_waiting_for_an_image() -> None:
    stopping = threading.Event()

    def hang(job: Job) -> DecodedImage:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopping.wait(TIMEOUT)  # like an unresponsive network drive
        return read(job)

    pipeline = make_pipeline(5, read=hang)

    def stop() -> None:
        with pipeline:
            try:
                list(pipeline.outcomes(FakeBackend()))
            finally:
                stopping.set()

    with handle_signals(), pytest.raises(Stopped):
        stop()
    with handle_signals():
        pass  # clear the received signal for the next tests


def test_leaving_early_leaves_no_threads() -> None:
    with make_pipeline(50) as pipeline:
        outcomes = pipeline.outcomes(FakeBackend())
        assert number_of(next(outcomes).job) == 0
