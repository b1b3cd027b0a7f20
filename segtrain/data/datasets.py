"""Dataset registry, and the selection of images that a configuration describes."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segtrain.config.schema import DataConfig
from segtrain.data.coco.dataset import CocoDataset, is_coco
from segtrain.data.mask_folder.dataset import MaskFolderDataset
from segtrain.data.mask_folder.layout import is_mask_folder
from segtrain.data.sample import (
    DatasetIndex,
    LabelRules,
    Sample,
    SegmentationDataset,
    manifest_hash,
)
from segtrain.data.selection import Indices, select
from segtrain.errors import DataError


@dataclass(frozen=True)
class DatasetKind:
    """How to recognize and open a kind of dataset; `layout` is for messages."""

    matches: Callable[[Path], bool]
    open: Callable[[Path, str, LabelRules], SegmentationDataset]
    layout: str


DATASETS: dict[str, DatasetKind] = {
    "COCO": DatasetKind(
        is_coco, CocoDataset, "train2017/ val2017/ annotations/instances_*2017.json"
    ),
    "folders of masks": DatasetKind(is_mask_folder, MaskFolderDataset, "images/ masks/"),
}


def dataset_kind(root: Path) -> str:
    """Return the key in DATASETS of the dataset at `root`.

    Raises:
        DataError: `root` is not a folder, or its layout is unknown.
    """
    if not root.is_dir():
        raise DataError(f"{root}: not a folder", "--data takes the root folder of a dataset")
    for name, kind in DATASETS.items():
        if kind.matches(root):
            return name
    layouts = " or ".join(f"{kind.layout} ({name})" for name, kind in DATASETS.items())
    raise DataError(f"{root}: unknown dataset layout", f"expected {layouts}")


def open_dataset(root: Path, split: str, rules: LabelRules | None = None) -> SegmentationDataset:
    """Open `split` ("train" or "val") of the dataset at `root`, of any kind.

    Raises:
        DataError: the layout is unknown, or the dataset is malformed.
    """
    return DATASETS[dataset_kind(root)].open(root, split, rules or LabelRules())


class ImageSelection:
    """The selected images of one or several datasets, one dataset after the other.

    Args:
        parts: the datasets, each with the indices of its selected images.
        rules: the label rules of all parts.

    Attributes:
        ends: for each part the index after its last image.
        manifest: hash of the selection, equal for the same images and rules.
    """

    def __init__(self, parts: list[tuple[SegmentationDataset, Indices]], rules: LabelRules) -> None:
        self.parts, self.rules = parts, rules
        self.ends = np.cumsum(self.lengths)
        self.index = DatasetIndex.concatenate(
            [dataset.index.take(indices) for dataset, indices in parts]
        )
        self.notes = [note for dataset, _ in parts for note in dataset.notes]
        self.skipped: Counter[str] = sum((dataset.skipped for dataset, _ in parts), Counter())
        self.manifest = manifest_hash(self.index.identities, rules)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> list[int]:
        """Number of selected images of each dataset."""
        return [len(indices) for _, indices in self.parts]

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """See `SegmentationDataset.sample`."""
        dataset, own_index = self._locate(index)
        return dataset.sample(own_index, short_side)

    def image_path(self, index: int) -> Path:
        """See `SegmentationDataset.image_path`."""
        dataset, own_index = self._locate(index)
        return dataset.image_path(own_index)

    def name(self, index: int) -> str:
        """See `SegmentationDataset.name`."""
        dataset, own_index = self._locate(index)
        return dataset.name(own_index)

    def subsample(self, num: int) -> "ImageSelection":
        """Select `num` images, evenly spaced; all if there are fewer."""
        chosen = np.linspace(0, len(self) - 1, min(num, len(self))).astype(np.intp)
        starts = self.ends - self.lengths
        return ImageSelection(
            [
                (dataset, indices[chosen[(chosen >= start) & (chosen < end)] - start])
                for (dataset, indices), start, end in zip(
                    self.parts, starts, self.ends, strict=True
                )
            ],
            self.rules,
        )

    def _locate(self, index: int) -> tuple[SegmentationDataset, int]:
        """Return the dataset of an image and the image's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = int(np.searchsorted(self.ends, index, side="right"))
        dataset, indices = self.parts[part]
        return dataset, int(indices[index - (self.ends[part] - len(indices))])


def open_selection(config: DataConfig, split: str) -> ImageSelection:
    """Open the images that the configuration selects from `config.root`, which must be set.

    Raises:
        DataError: a dataset is malformed, or none of its images is selected.
    """
    rules = label_rules(config)
    parts = []
    for root in data_roots(config):
        dataset = open_dataset(root, split, rules)
        indices = select(dataset.index, config)
        if not len(indices):
            raise DataError(
                f"none of the {len(dataset)} {split} images in {root} is selected",
                "widen data.person_area, data.max_people or data.negatives",
            )
        parts.append((dataset, indices))
    return ImageSelection(parts, rules)


def describe_roots(roots: Iterable[Path]) -> str:
    """List the roots, each with the kind of its dataset."""
    return ", ".join(f"{root} ({dataset_kind(root)})" for root in roots)


def label_rules(config: DataConfig) -> LabelRules:
    """Extract the label rules of a configuration."""
    return LabelRules(
        crowd=config.crowd,
        largest_only=config.largest_only,
        min_person_area=config.min_person_area,
        invert_masks=config.invert_masks,
    )


def data_roots(config: DataConfig) -> list[Path]:
    """Return the dataset roots of a resolved configuration."""
    assert config.root is not None
    roots = (config.root,) if isinstance(config.root, str) else config.root
    return [Path(root) for root in roots]


def named_data_roots(given: str | Iterable[str] | None) -> tuple[tuple[Path, ...], str] | None:
    """Return the dataset roots that the user named and where: `given`, $SEGTRAIN_DATA, or None."""
    if given is not None:
        names = (given,) if isinstance(given, str) else tuple(given)
        return tuple(map(_absolute, names)), "--data or configuration"
    if environment := os.environ.get("SEGTRAIN_DATA"):
        return (_absolute(environment),), "$SEGTRAIN_DATA"
    return None


def _absolute(name: str) -> Path:
    return Path(name).expanduser().resolve()
