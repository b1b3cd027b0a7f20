"""Parallel work: ordered results, and a prompt end when the caller stops."""

import threading
import time
from contextlib import closing

import pytest

from segtrain.runtime.thread_map import thread_map


def test_results_are_in_order_with_their_items() -> None:
    def work(item: int) -> int:
        time.sleep((item * 7 % 5) / 2000)
        return item * item

    results = list(thread_map(work, range(1203), desc="squaring", workers=8))
    assert results == [(item, item * item) for item in range(1203)]


def test_items_are_processed_in_parallel() -> None:
    barrier = threading.Barrier(3, timeout=20)
    assert len(list(thread_map(lambda _: barrier.wait(), range(6), desc="x", workers=3))) == 6


def test_a_caller_that_stops_waits_only_for_the_items_in_progress() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    with closing(thread_map(work, range(400), desc="x", workers=2)) as results:
        next(results)
    num_done = len(done)
    assert num_done <= 6
    time.sleep(0.1)
    assert len(done) == num_done


def test_an_error_is_raised_and_ends_the_work() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        list(thread_map(work, range(400), desc="x", workers=2))
    assert len(done) <= 10
