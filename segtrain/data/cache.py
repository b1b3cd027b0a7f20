"""Arrays that take long to make, kept in the cache by the content they were made of."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from segtrain.errors import ResourceError
from segtrain.files import atomic_write

Arrays = Mapping[str, npt.NDArray[np.generic]]


def cache_folder() -> Path:
    """$SEGTRAIN_CACHE, else the user's cache folder."""
    given = os.environ.get("SEGTRAIN_CACHE")
    return (Path(given) if given else platformdirs.user_cache_path("segtrain")).resolve()


def cached_arrays(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays kept as `name`.npz in the cache, or those of `make`, kept for the next time.

    Args:
        name: says the kind, its version and the hash of all that the arrays are made of.
        make: gives named arrays of numbers, bytes or truth values.

    A damaged file is made anew, and a cache that cannot be written is gone without.
    """
    path = cache_folder() / f"{name}.npz"
    kept = _load(path)
    if kept is not None:
        return kept
    arrays = make()
    named: dict[str, Any] = dict(arrays)
    with suppress(ResourceError), atomic_write(path) as file:
        # Without allow_pickle=False: numpy 2.0 would keep that as another array.
        np.savez(file, **named)
    return arrays


def _load(path: Path) -> Arrays | None:
    try:
        # Each member of the archive carries a checksum, so a flipped bit is found, too.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as kept:
            return {key: kept[key] for key in kept.files}
    except Exception:  # missing, cut short, no archive, or anything else that a file can be
        return None
