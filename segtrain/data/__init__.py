"""Data sets, and the choice of one. A new kind is one new module and one new row."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segtrain.config import DataConfig
from segtrain.data.coco import CocoPeople, is_coco
from segtrain.data.folder import FolderPeople
from segtrain.data.folder_layout import is_folder
from segtrain.data.sample import Catalog, LabelRules, Sample, Source, manifest_hash
from segtrain.data.selection import Indices, select
from segtrain.errors import DataError


@dataclass(frozen=True)
class DatasetKind:
    """How a kind of data set is recognised and opened."""

    matches: Callable[[Path], bool]
    open: Callable[[Path, str, LabelRules], Source]
    layout: str


DATASET_KINDS: dict[str, DatasetKind] = {
    "COCO": DatasetKind(
        is_coco, CocoPeople, "train2017/ val2017/ annotations/instances_*2017.json"
    ),
    "folders of masks": DatasetKind(is_folder, FolderPeople, "images/ masks/"),
}


def kind_of(root: Path) -> str:
    """The key in DATASET_KINDS of the data set at `root`.

    Raises:
        DataError: there is no data set of a known kind.
    """
    if not root.is_dir():
        raise DataError(f"{root} is no folder; --data takes the root of a data set")
    for name, kind in DATASET_KINDS.items():
        if kind.matches(root):
            return name
    layouts = "; ".join(f"{name}: {kind.layout}" for name, kind in DATASET_KINDS.items())
    raise DataError(f"{root} holds no data set; expected {layouts}")


def open_dataset(root: Path, split: str, rules: LabelRules | None = None) -> Source:
    """Open `split` ("train" or "val") of the data set at `root`, whichever kind it is.

    Raises:
        DataError: there is no data set of a known kind, or it is malformed.
    """
    return DATASET_KINDS[kind_of(root)].open(root, split, rules or LabelRules())


class Pictures:
    """The selected pictures of one or several data sets, one after the other."""

    def __init__(self, parts: list[tuple[Source, Indices]], rules: LabelRules) -> None:
        self.parts, self.rules = parts, rules
        self.ends = np.cumsum([len(indices) for _, indices in parts])
        self.catalog = Catalog.joined([source.catalog.take(chosen) for source, chosen in parts])
        self.notes = [note for source, _ in parts for note in source.notes]
        self.skipped: Counter[str] = sum((source.skipped for source, _ in parts), Counter())
        self.manifest = manifest_hash(self.catalog.identities, rules)
        """Hash of the selection: the same pictures under the same rules have the same."""

    def __len__(self) -> int:
        return len(self.catalog)

    @property
    def lengths(self) -> list[int]:
        """How many pictures there are of each data set."""
        return [len(chosen) for _, chosen in self.parts]

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """As `Source.sample`."""
        source, own_index = self._find(index)
        return source.sample(own_index, short_side)

    def picture_path(self, index: int) -> Path:
        """As `Source.picture_path`."""
        source, own_index = self._find(index)
        return source.picture_path(own_index)

    def stem(self, index: int) -> str:
        """As `Source.stem`."""
        source, own_index = self._find(index)
        return source.stem(own_index)

    def spread(self, num: int) -> "Pictures":
        """`num` of them, evenly spread; all if there are no more."""
        chosen = np.linspace(0, len(self) - 1, min(num, len(self))).astype(np.intp)
        starts = self.ends - self.lengths
        return Pictures(
            [
                (source, own[chosen[(chosen >= start) & (chosen < end)] - start])
                for (source, own), start, end in zip(self.parts, starts, self.ends, strict=True)
            ],
            self.rules,
        )

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        source, chosen = self.parts[part]
        return source, int(chosen[index - (self.ends[part] - len(chosen))])


def open_pictures(config: DataConfig, split: str) -> Pictures:
    """The pictures of `config.root`, which must be given, that the configuration selects.

    Raises:
        DataError: a data set is malformed, or nothing is left of it.
    """
    rules = label_rules(config)
    parts = []
    for root in data_roots(config):
        source = open_dataset(root, split, rules)
        chosen = select(source.catalog, config)
        if not len(chosen):
            raise DataError(
                f"none of the {len(source)} {split} pictures in {root} is in the selection; "
                "widen data.person_area, max_people or negatives"
            )
        parts.append((source, chosen))
    return Pictures(parts, rules)


def describe_roots(roots: Iterable[Path]) -> str:
    """The folders, each with the kind of data set found there."""
    return ", ".join(f"{root} ({kind_of(root)})" for root in roots)


def label_rules(config: DataConfig) -> LabelRules:
    """What the configuration says of masks."""
    return LabelRules(
        crowd=config.crowd,
        largest_only=config.largest_only,
        min_person_area=config.min_person_area,
        invert_masks=config.invert_masks,
    )


def data_roots(config: DataConfig) -> list[Path]:
    """The folders of a resolved configuration."""
    assert config.root is not None
    roots = (config.root,) if isinstance(config.root, str) else config.root
    return [Path(root) for root in roots]


def named_data_roots(given: str | Iterable[str] | None) -> tuple[tuple[Path, ...], str] | None:
    """The data folders the user named and by what: `given`, else $SEGTRAIN_DATA, else None."""
    if given is not None:
        names = (given,) if isinstance(given, str) else tuple(given)
        return tuple(map(_absolute, names)), "--data or configuration"
    if environment := os.environ.get("SEGTRAIN_DATA"):
        return (_absolute(environment),), "$SEGTRAIN_DATA"
    return None


def _absolute(name: str) -> Path:
    return Path(name).expanduser().resolve()
