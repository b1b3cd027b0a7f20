"""Many pictures at once: in order, and left when nobody asks any more."""

import threading
import time
from contextlib import closing

import pytest

from segtrain.data.threads import in_threads


def test_results_come_in_order_with_their_items() -> None:
    def work(item: int) -> int:
        time.sleep((item * 7 % 5) / 2000)
        return item * item

    found = list(in_threads(work, range(1203), desc="squaring", workers=8))
    assert found == [(item, item * item) for item in range(1203)]


def test_more_than_one_works() -> None:
    together = threading.Barrier(3, timeout=20)
    assert len(list(in_threads(lambda _: together.wait(), range(6), desc="x", workers=3))) == 6


def test_who_stops_asking_waits_only_for_what_is_being_worked_on() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        time.sleep(0.01)
        done.append(item)

    with closing(in_threads(work, range(400), desc="x", workers=2)) as results:
        next(results)
    counted = len(done)
    assert counted <= 6
    time.sleep(0.1)
    assert len(done) == counted


def test_an_error_comes_out_and_ends_the_work() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 3:
            raise ValueError("three")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        list(in_threads(work, range(400), desc="x", workers=2))
    assert len(done) <= 10
