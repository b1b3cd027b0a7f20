"""Samples, dataset metadata, and the dataset protocol."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from segtrain.types import Image, Mask

BackdropFn = Callable[[int], Image | None]
"""From any number to an image without people, H W 3 uint8; None if there is none."""


def max_bad_samples(total: int) -> int:
    """Number of bad annotations or images to skip and count; more than this is an error.

    Large datasets have a few bad samples in a hundred thousand. More than 1 % is a mistake.
    """
    return max(1, total // 100)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image with its ground truth.

    image: H W 3 uint8 RGB. mask: H W uint8 in {0 background, 1 person, 255 ignore}.
    """

    image: Image
    mask: Mask
    image_id: str


@dataclass(frozen=True, kw_only=True)
class LabelRules:
    """How annotations become a mask.

    crowd: class of crowd regions; "drop" excludes the images that have one. Masks drawn under
        "drop" ignore crowds.
    largest_only: only the largest person of an image is a person; the others are ignored.
    min_person_area: a person that covers less than this fraction of the frame is ignored.
    invert_masks: white is background in folders of masks.
    """

    crowd: Literal["ignore", "person", "drop"] = "ignore"
    largest_only: bool = False
    min_person_area: float = 0.0
    invert_masks: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """Metadata of N images, available without decoding them; arrays of N rows.

    sizes: N 2 int32, height and width of the sample at its original resolution.
    person_fraction: float32 in 0..1, fraction of the frame that the mask marks as person.
    num_people: int32, annotated people, including those that the rules ignore.
    has_crowd: bool, whether the image has a crowd region.
    identities: uint64, equal for the same image of the same dataset in any split.
    """

    sizes: npt.NDArray[np.int32]
    person_fraction: npt.NDArray[np.float32]
    num_people: npt.NDArray[np.int32]
    has_crowd: npt.NDArray[np.bool_]
    identities: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.sizes)

    def take(self, rows: npt.NDArray[np.intp]) -> "DatasetIndex":
        """Select `rows`, in that order."""
        return DatasetIndex(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @staticmethod
    def concatenate(parts: "Sequence[DatasetIndex]") -> "DatasetIndex":
        """Join the rows of all parts, in order."""
        return DatasetIndex(
            **{
                f.name: np.concatenate([getattr(part, f.name) for part in parts])
                for f in fields(DatasetIndex)
            }
        )


class SegmentationDataset(Protocol):
    """A dataset of images and masks."""

    @property
    def index(self) -> DatasetIndex: ...

    @property
    def skipped(self) -> Counter[str]:
        """What opening the dataset skipped: reason → count."""
        ...

    @property
    def notes(self) -> list[str]:
        """Observations about the data to show to the user."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, short_side: int | None = None) -> Sample:
        """Load an image and its mask.

        Args:
            short_side: scale both by `segtrain.imaging.images.scaled_size`, which is far cheaper
                than scaling the result; None keeps the original resolution.

        Raises:
            DataError: this image is damaged.
        """
        ...

    def image_path(self, index: int) -> Path:
        """Path of the image file, for messages."""
        ...

    def name(self, index: int) -> str:
        """Name of the image in its split, with forward slashes and without suffix."""
        ...


def identity_hash(*parts: str | int) -> int:
    """Compute a 64-bit hash of an image's identity.

    A few in a billion billion pairs collide.
    """
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big")


def manifest_hash(identities: Iterable[int], rules: LabelRules) -> str:
    """Compute 16 hex digits that are equal for the same images, in any order, and rules."""
    digest = hashlib.sha256(repr(rules).encode())
    digest.update(np.sort(np.asarray(identities, dtype=">u8")).tobytes())
    return digest.hexdigest()[:16]
