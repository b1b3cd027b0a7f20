"""Data sets, and the choice of one. A new kind is one new module and one new row."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from segtrain.data.coco import CocoPeople, is_coco
from segtrain.data.sample import Source
from segtrain.errors import DataError


@dataclass(frozen=True)
class DatasetKind:
    """How a kind of data set is recognised and opened."""

    matches: Callable[[Path], bool]
    open: Callable[[Path, str], Source]
    layout: str


DATASET_KINDS: dict[str, DatasetKind] = {
    "COCO": DatasetKind(is_coco, CocoPeople, "train2017/ val2017/ annotations/instances_*2017.json")
}


def open_dataset(root: Path, split: str) -> Source:
    """Open `split` ("train" or "val") of the data set at `root`, whichever kind it is.

    Raises:
        DataError: there is no data set of a known kind, or it is malformed.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; --data takes the root of a data set")
    for kind in DATASET_KINDS.values():
        if kind.matches(root):
            return kind.open(root, split)
    layouts = "; ".join(f"{name}: {kind.layout}" for name, kind in DATASET_KINDS.items())
    raise DataError(f"{root} holds no data set; expected {layouts}")


def named_data_root(given: str | None) -> tuple[Path, str] | None:
    """The data folder the user named and by what: `given`, else $SEGTRAIN_DATA, else None."""
    if given is not None:
        return Path(given).expanduser().resolve(), "--data or configuration"
    if environment := os.environ.get("SEGTRAIN_DATA"):
        return Path(environment).expanduser().resolve(), "$SEGTRAIN_DATA"
    return None
