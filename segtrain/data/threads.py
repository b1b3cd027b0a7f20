"""Work on many pictures at once.

Decoding, scaling and encoding leave the interpreter's lock alone, so threads are enough; unlike
processes they end with their program, however it ends.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from segtrain.cores import usable_cores
from segtrain.progress import progress_bar

Item = TypeVar("Item")
Result = TypeVar("Result")

_AT_ONCE = 500


def in_threads(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    desc: str,
    workers: int | None = None,
) -> Generator[tuple[Item, Result], None, None]:
    """Each item with its result, in order, under a progress bar.

    Whoever stops asking, or is stopped, waits only for what is being worked on.

    Args:
        workers: threads; None takes one for each core.
    """
    pool = ThreadPoolExecutor(workers or usable_cores())
    try:
        with progress_bar(total=len(items), desc=desc) as bar:
            for start in range(0, len(items), _AT_ONCE):
                some = items[start : start + _AT_ONCE]
                for item, result in zip(some, pool.map(work, some), strict=True):
                    yield item, result
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
