"""Open the data as training does, and scan its images."""

import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from segtrain.config.schema import DataConfig
from segtrain.data.datasets import (
    ImageSelection,
    data_roots,
    dataset_kind,
    label_rules,
    open_dataset,
)
from segtrain.data.sample import SegmentationDataset
from segtrain.data.selection import Indices, select
from segtrain.doctor.duplicates import Fingerprint, fingerprint
from segtrain.doctor.findings import Finding, finding_from_error
from segtrain.errors import DataError
from segtrain.imaging.images import map_decode_errors
from segtrain.runtime.thread_map import thread_map
from segtrain.types import IGNORE, PERSON, BoolMask

SPLITS = ("train", "val")
MAX_SCANNED = 2000

# A large JPEG decodes several times as fast at this size, which is enough for all statistics.
SHORT_SIDE = 128
_MAX_SECONDS_PER_SPLIT = 20.0


@dataclass(frozen=True, kw_only=True)
class ImageStats:
    """Statistics of an image and its mask.

    person_fraction, ignore_fraction: fractions of the image's pixels.
    border_person_fraction: fraction of the outermost pixels that is person.
    orientation: EXIF orientation, 1..8; 1 if there is none.
    """

    index: int
    person_fraction: float
    ignore_fraction: float
    border_person_fraction: float
    orientation: int
    fingerprint: Fingerprint


@dataclass(frozen=True, kw_only=True)
class DatasetPart:
    """The part of a split that one dataset contributes."""

    root: Path
    kind: str
    num_images: int
    num_selected: int


@dataclass(frozen=True, kw_only=True)
class ScannedSplit:
    """The images of one split that training uses.

    stats: of the readable scanned images. damaged: image index → error message.
    """

    name: str
    parts: list[DatasetPart]
    images: ImageSelection
    stats: list[ImageStats] = field(default_factory=list)
    damaged: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def num_scanned(self) -> int:
        return len(self.stats) + len(self.damaged)

    def name_of(self, index: int) -> str:
        """The image's path relative to the root of its dataset."""
        root = self._part(index).root
        path = self.images.image_path(index)
        return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)

    def kind_of(self, index: int) -> str:
        """The kind of dataset that the image belongs to."""
        return self._part(index).kind

    def _part(self, index: int) -> DatasetPart:
        return self.parts[int(np.searchsorted(self.images.ends, index, side="right"))]


def open_split(config: DataConfig, name: str) -> tuple[ScannedSplit | None, list[Finding]]:
    """Open a split as training does. A DataError becomes a finding."""
    rules = label_rules(config)
    findings: list[Finding] = []
    parts: list[DatasetPart] = []
    sources: list[tuple[SegmentationDataset, Indices]] = []
    for root in data_roots(config):
        try:
            kind = dataset_kind(root)
            source = open_dataset(root, name, rules)
        except DataError as error:
            findings.append(finding_from_error("opening", error))
            continue
        indices = select(source.index, config)
        if not len(indices):
            findings.append(
                Finding(
                    level="error",
                    check="selection",
                    message=f"none of the {len(source)} {name} images in {root} is selected",
                    remedy="widen data.person_area, data.max_people or data.negatives",
                )
            )
            continue
        sources.append((source, indices))
        parts.append(
            DatasetPart(root=root, kind=kind, num_images=len(source), num_selected=len(indices))
        )
    if not sources:
        return None, findings
    return ScannedSplit(name=name, parts=parts, images=ImageSelection(sources, rules)), findings


def scan_split(split: ScannedSplit) -> ScannedSplit:
    """Fill in `stats` and `damaged` from up to `MAX_SCANNED` images, within a time limit."""
    indices = _choose_indices(len(split.images))
    started = time.perf_counter()
    stats: list[ImageStats] = []
    damaged: dict[int, str] = {}
    with closing(
        thread_map(lambda i: _scan_image(split, i), indices, desc=f"scanning {split.name}")
    ) as results:
        for index, result in results:
            if isinstance(result, ImageStats):
                stats.append(result)
            else:
                damaged[index] = result
            if time.perf_counter() - started > _MAX_SECONDS_PER_SPLIT:
                break
    return replace(
        split,
        stats=sorted(stats, key=lambda s: s.index),
        damaged=dict(sorted(damaged.items())),
        seconds=time.perf_counter() - started,
    )


def _choose_indices(num_images: int) -> list[int]:
    """Evenly spaced, in random order: the part scanned before the time limit is spread over all."""
    even = np.linspace(0, num_images - 1, min(MAX_SCANNED, num_images)).round().astype(int)
    return np.random.default_rng(0).permutation(even).tolist()  # type: ignore[no-any-return]


def _scan_image(split: ScannedSplit, index: int) -> ImageStats | str:
    """The image's statistics, or the message of the DataError it raises."""
    try:
        sample = split.images.sample(index, SHORT_SIDE)
        orientation = _exif_orientation(split.images.image_path(index))
    except DataError as error:
        return str(error)
    person = sample.mask == PERSON
    return ImageStats(
        index=index,
        person_fraction=float(person.mean()),
        ignore_fraction=float((sample.mask == IGNORE).mean()),
        border_person_fraction=float(_border(person).mean()),
        orientation=orientation,
        fingerprint=fingerprint(sample.image),
    )


def _exif_orientation(path: Path) -> int:
    """1..8; 1 if it is missing or invalid."""
    with map_decode_errors(path), Image.open(path) as image:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in range(1, 9) else 1


def _border(person: BoolMask) -> BoolMask:
    """The outermost pixels of H W; corners occur twice."""
    return np.concatenate([person[0], person[-1], person[:, 0], person[:, -1]])
