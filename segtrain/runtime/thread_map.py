"""Work on many images in parallel.

Decoding, scaling and encoding release the GIL, so threads are enough. Unlike processes, threads
end with their program, however it ends.
"""

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from segtrain.runtime.cpu import available_cpus
from segtrain.runtime.progress import progress_bar
from segtrain.runtime.signals import raise_if_stopped

_T = TypeVar("_T")
_R = TypeVar("_R")

_CHUNK_SIZE = 500


def thread_map(
    work: Callable[[_T], _R],
    items: Sequence[_T],
    *,
    desc: str,
    workers: int | None = None,
) -> Generator[tuple[_T, _R], None, None]:
    """Yield each item with its result, in order, under a progress bar.

    A caller that stops early or is stopped waits only for the items in progress.

    Args:
        workers: number of threads; None means one for each core.
    """
    pool = ThreadPoolExecutor(workers or available_cpus())
    try:
        with progress_bar(total=len(items), desc=desc) as bar:
            for start in range(0, len(items), _CHUNK_SIZE):
                chunk = items[start : start + _CHUNK_SIZE]
                for item, result in zip(chunk, pool.map(work, chunk), strict=True):
                    yield item, result
                    raise_if_stopped()
                    bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
