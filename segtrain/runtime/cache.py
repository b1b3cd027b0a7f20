"""On-disk cache of arrays that are expensive to compute, keyed by a hash of their inputs."""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs

from segtrain.errors import ResourceError
from segtrain.runtime.files import atomic_write

Arrays = Mapping[str, npt.NDArray[np.generic]]


def cache_dir() -> Path:
    """$SEGTRAIN_CACHE, else segtrain's folder in the user's cache."""
    path = os.environ.get("SEGTRAIN_CACHE")
    return (Path(path) if path else platformdirs.user_cache_path("segtrain")).resolve()


def cached_arrays(name: str, compute: Callable[[], Arrays]) -> Arrays:
    """Load `name`.npz from the cache, or call `compute` and store its result.

    A damaged file is computed again. An unwritable cache is ignored.

    Args:
        name: the kind of the arrays, their version, and a hash of all that they depend on.
        compute: returns named arrays of numbers, bytes or booleans.
    """
    path = cache_dir() / f"{name}.npz"
    cached = _load(path)
    if cached is not None:
        return cached
    arrays = compute()
    named: dict[str, Any] = dict(arrays)
    with suppress(ResourceError), atomic_write(path) as file:
        # Without allow_pickle=False: numpy 2.0 would store it as another array.
        np.savez(file, **named)
    return arrays


def _load(path: Path) -> Arrays | None:
    try:
        # Each member of the archive has a checksum, so that a flipped bit is detected too.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception:  # missing, truncated, not an archive, or damaged in any other way
        return None
