"""The drawn demo people as a data set on disk, made once and kept in the cache."""

import os
import shutil
from pathlib import Path

from segtrain.data.cache import cache_folder
from segtrain.data.people import GENERATOR_VERSION, write_demo_people
from segtrain.errors import ResourceError, UsageError
from segtrain.progress import progress_bar

NUM_TRAIN, NUM_VAL = 512, 96


def demo_people_root() -> Path:
    """The embedded default data set; drawn into $SEGTRAIN_CACHE or the user's cache if new.

    Raises:
        ResourceError: the cache is full or not writable.
    """
    root = _cached_root()
    if not root.is_dir():
        try:
            draw_demo_people(root, num_train=NUM_TRAIN, num_val=NUM_VAL, seed=0)
        except ResourceError as error:
            raise ResourceError(f"{error}; $SEGTRAIN_CACHE names the cache") from error
    return root


def is_demo_root(root: Path) -> bool:
    """Whether `root` is where the embedded default data set lies, drawn already or not."""
    return root == _cached_root()


def _cached_root() -> Path:
    return cache_folder() / f"demo-people-v{GENERATOR_VERSION}-{NUM_TRAIN}-{NUM_VAL}"


def draw_demo_people(root: Path, *, num_train: int, num_val: int, seed: int) -> None:
    """Draw a data set in COCO layout at `root`, whole or not at all.

    Raises:
        UsageError: `root` exists already; it is kept.
        ResourceError: the disk is full or not writable.
    """
    if root.exists():
        raise UsageError(f"{root} exists already; name a new folder")
    unfinished = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    try:
        with progress_bar(total=num_train + num_val, desc="drawing demo people") as bar:
            write_demo_people(
                unfinished,
                num_train=num_train,
                num_val=num_val,
                seed=seed,
                on_image=bar.update,
            )
        unfinished.rename(root)
    except OSError as error:
        if root.is_dir():
            return  # another process was faster; its people are the same
        raise ResourceError(
            f"cannot write {root}: {error.strerror or error}; choose another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
