"""The drawn demo people as a dataset on disk, drawn once and cached."""

import os
import shutil
from pathlib import Path

from segtrain.demo import GENERATOR_VERSION, write_demo_people
from segtrain.errors import ResourceError, UsageError
from segtrain.runtime.cache import cache_dir
from segtrain.runtime.progress import progress_bar

NUM_TRAIN, NUM_VAL = 512, 96


def demo_people_root() -> Path:
    """The default dataset; drawn into $SEGTRAIN_CACHE or the user's cache if it does not exist.

    Raises:
        ResourceError: the disk is full or the cache is not writable.
    """
    root = _cached_root()
    if not root.is_dir():
        try:
            draw_demo_people(root, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=0)
        except ResourceError as error:
            raise ResourceError(str(error), "set $SEGTRAIN_CACHE to move the cache") from error
    return root


def is_demo_root(root: Path) -> bool:
    """Whether `root` is the path of the default dataset, which need not exist yet."""
    return root == _cached_root()


def draw_demo_people(root: Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Draw a dataset in COCO layout at `root`, completely or not at all.

    Raises:
        UsageError: `root` exists already; it is not changed.
        ResourceError: the disk is full or not writable.
    """
    if root.exists():
        raise UsageError(f"{root} exists already", "choose a new folder")
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    try:
        with progress_bar(total=num_train + num_val, desc="drawing demo people") as bar:
            write_demo_people(
                temporary, num_train=num_train, num_val=num_val, seed=seed, on_image=bar.update
            )
        temporary.rename(root)
    except OSError as error:
        if root.is_dir():
            return  # another process was faster; its files are the same
        raise ResourceError(
            f"cannot write {root}: {error.strerror or error}", "choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _cached_root() -> Path:
    return cache_dir() / f"demo-people-v{GENERATOR_VERSION}-{NUM_TRAIN}-{NUM_VAL}"
